//! What of a host survives its process: bytes, what is known of them, and who owns them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Error, ErrorKind, Operation, Result};
use r3map_local::Memory;
use r3map_migrate::{Ledger, Standing};
use r3map_pipeline::{BlockSet, Local, Recorded, StateRecord};

use super::SIZE;

/// A disk. It can be full: nothing can be put where nothing was then.
pub(crate) struct Disk {
    bytes: Memory,
    recorded: Mutex<(BlockSet, BlockSet)>,
    standing: Mutex<Option<Standing>>,
    pub(crate) full: AtomicBool,
    /// How many entries the ledger takes, and how many it then refuses.
    ledger: Mutex<(u32, u32)>,
}

impl Disk {
    pub(crate) fn new() -> Arc<Self> {
        let (recorded, standing) = (Mutex::default(), Mutex::default());
        let (full, ledger) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { bytes: Memory::new(SIZE).unwrap(), recorded, standing, full, ledger })
    }

    /// Has the ledger refuse entries after it has taken some.
    pub(crate) fn fail_ledger(&self, after: u32, times: u32) {
        *self.ledger.lock().unwrap() = (after, times);
    }

    fn ledger_takes(&self) -> bool {
        let mut ledger = self.ledger.lock().unwrap();
        match &mut *ledger {
            (0, 0) => true,
            (0, refuses) => {
                *refuses -= 1;
                false
            }
            (takes, _) => {
                *takes -= 1;
                true
            }
        }
    }

    /// Forgets what it holds, and who owns it.
    pub(crate) fn erase(&self) {
        *self.recorded.lock().unwrap() = Default::default();
        *self.standing.lock().unwrap() = None;
    }

    /// Forgets what it holds.
    pub(crate) fn forget_blocks(&self) {
        *self.recorded.lock().unwrap() = Default::default();
    }

    fn check(&self) -> Result<()> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the disk is full")),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Disk {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        tokio::task::yield_now().await;
        self.bytes.read_now(offset, buf)
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        tokio::task::yield_now().await;
        self.bytes.write_now(offset, buf)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Local for Disk {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check()?;
        self.write_at(offset, bytes).await
    }
}

#[async_trait]
impl StateRecord for Disk {
    fn load(&self, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> Result<()> {
        let recorded = self.recorded.lock().unwrap();
        recorded.0.runs().for_each(|run| visit(run, Recorded::Clean));
        recorded.1.runs().for_each(|run| visit(run, Recorded::Dirty));
        Ok(())
    }

    fn record(&self, blocks: Range<u64>, state: Recorded) -> Result<()> {
        let mut recorded = self.recorded.lock().unwrap();
        match state {
            Recorded::Clean => recorded.0.insert(blocks),
            Recorded::Dirty => recorded.1.insert(blocks),
        }
        Ok(())
    }

    async fn checkpoint(&self) -> Result<()> {
        Ok(())
    }
}

impl Ledger for Disk {
    fn load(&self) -> Result<Option<Standing>> {
        Ok(self.standing.lock().unwrap().clone())
    }

    fn save(&self, standing: &Standing) -> Result<()> {
        if !self.ledger_takes() {
            return Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the ledger cannot be written"));
        }
        *self.standing.lock().unwrap() = Some(standing.clone());
        Ok(())
    }
}
