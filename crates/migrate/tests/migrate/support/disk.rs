//! What of a host survives its process: bytes, what is known of them, and who owns them; and the process, which can be
//! killed between any two things that it does.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Error, ErrorKind, Operation, Result};
use r3map_local::Memory;
use r3map_migrate::{Ledger, Standing};
use r3map_pipeline::{BlockSet, Local, Recorded, StateRecord};
use tokio::sync::Notify;

use super::{SIZE, geometry};

/// Whether a process lives.
pub(crate) struct Life {
    /// What it may do before it is killed.
    steps: AtomicU64,
    dead: AtomicBool,
    killed: Notify,
}

impl Life {
    pub(crate) fn new() -> Arc<Self> {
        Self::of(u64::MAX)
    }

    /// One that is killed after it has done so many things to its disk.
    pub(crate) fn of(steps: u64) -> Arc<Self> {
        Arc::new(Self { steps: AtomicU64::new(steps), dead: AtomicBool::new(false), killed: Notify::new() })
    }

    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.killed.notify_one();
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Whether it has done all that it may.
    pub(crate) fn ran_out(&self) -> bool {
        self.steps.load(Ordering::SeqCst) == 0
    }

    /// Waits until it is killed.
    pub(crate) async fn killed(&self) {
        self.killed.notified().await;
    }

    fn step(&self) -> Result<()> {
        if !self.is_dead()
            && self.steps.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            return Ok(());
        }
        self.kill();
        Err(Error::new(ErrorKind::Internal, Operation::Write, "the process was killed"))
    }
}

/// A disk, as one process has it: what that does after it was killed changes nothing.
pub(crate) struct Disk {
    platter: Arc<Platter>,
    life: Arc<Life>,
}

/// It can be full: nothing can be put where nothing was then.
struct Platter {
    bytes: Memory,
    recorded: Mutex<(BlockSet, BlockSet)>,
    standing: Mutex<Option<Standing>>,
    full: AtomicBool,
    /// How many entries the ledger takes, and how many it then refuses.
    ledger: Mutex<(u32, u32)>,
    /// What it refuses next is found in it all the same.
    late: AtomicBool,
    /// How often it refuses to keep what is here.
    refuses_to_keep: AtomicU32,
}

impl Disk {
    pub(crate) fn new() -> Arc<Self> {
        let (recorded, standing) = (Mutex::default(), Mutex::default());
        let (full, ledger, late) = (AtomicBool::new(false), Mutex::default(), AtomicBool::new(false));
        let (bytes, refuses_to_keep) = (Memory::new(SIZE).unwrap(), AtomicU32::new(0));
        let platter = Platter { bytes, recorded, standing, full, ledger, late, refuses_to_keep };
        Arc::new(Self { platter: Arc::new(platter), life: Life::new() })
    }

    /// The same disk as another process has it.
    pub(crate) fn in_process(&self, life: &Arc<Life>) -> Arc<Self> {
        Arc::new(Self { platter: self.platter.clone(), life: life.clone() })
    }

    pub(crate) fn fill(&self, full: bool) {
        self.platter.full.store(full, Ordering::SeqCst);
    }

    /// What counts as present and the same as over there.
    pub(crate) fn present(&self) -> BlockSet {
        self.platter.recorded.lock().unwrap().0.clone()
    }

    /// What counts as written here.
    pub(crate) fn own(&self) -> BlockSet {
        self.platter.recorded.lock().unwrap().1.clone()
    }

    /// Has the ledger refuse entries after it has taken some.
    pub(crate) fn fail_ledger(&self, after: u32, times: u32) {
        *self.platter.ledger.lock().unwrap() = (after, times);
    }

    /// The same, where the first of these entries takes effect before it fails.
    pub(crate) fn fail_ledger_late(&self, after: u32, times: u32) {
        self.platter.late.store(true, Ordering::SeqCst);
        self.fail_ledger(after, times);
    }

    /// Has it refuse to keep what is here.
    pub(crate) fn fail_to_keep(&self, times: u32) {
        self.platter.refuses_to_keep.store(times, Ordering::SeqCst);
    }

    /// Has all of it count as its own.
    pub(crate) fn keep(&self) -> Result<()> {
        let refuses = &self.platter.refuses_to_keep;
        if refuses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(Error::new(ErrorKind::Exhausted, Operation::Write, "nothing can be made durable"));
        }
        self.record(0..geometry().block_count(), Recorded::Dirty)
    }

    /// Whether all of it counts as its own.
    pub(crate) fn is_kept(&self) -> bool {
        self.platter.recorded.lock().unwrap().1.len() == geometry().block_count()
    }

    fn ledger_takes(&self) -> bool {
        let mut ledger = self.platter.ledger.lock().unwrap();
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
        *self.platter.recorded.lock().unwrap() = Default::default();
        *self.platter.standing.lock().unwrap() = None;
    }

    fn check_room(&self) -> Result<()> {
        match self.platter.full.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the disk is full")),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Disk {
    fn size(&self) -> u64 {
        self.platter.bytes.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        tokio::task::yield_now().await;
        self.platter.bytes.read_now(offset, buf)
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        tokio::task::yield_now().await;
        self.life.step()?;
        self.platter.bytes.write_now(offset, buf)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Local for Disk {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_room()?;
        self.write_at(offset, bytes).await
    }
}

#[async_trait]
impl StateRecord for Disk {
    fn load(&self, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> Result<()> {
        let recorded = self.platter.recorded.lock().unwrap();
        recorded.0.runs().for_each(|run| visit(run, Recorded::Clean));
        recorded.1.runs().for_each(|run| visit(run, Recorded::Dirty));
        Ok(())
    }

    fn record(&self, blocks: Range<u64>, state: Recorded) -> Result<()> {
        self.life.step()?;
        if state == Recorded::Clean {
            self.check_room()?;
        }
        let mut recorded = self.platter.recorded.lock().unwrap();
        match state {
            Recorded::Clean => recorded.0.insert(blocks),
            Recorded::Dirty => recorded.1.insert(blocks),
        }
        Ok(())
    }

    fn forget(&self, blocks: Range<u64>) -> Result<()> {
        self.life.step()?;
        let mut forgotten = BlockSet::default();
        forgotten.insert(blocks);
        let mut recorded = self.platter.recorded.lock().unwrap();
        recorded.0.subtract(&forgotten);
        recorded.1.subtract(&forgotten);
        Ok(())
    }

    async fn checkpoint(&self) -> Result<()> {
        Ok(())
    }
}

impl Ledger for Disk {
    fn load(&self) -> Result<Option<Standing>> {
        Ok(self.platter.standing.lock().unwrap().clone())
    }

    fn save(&self, standing: &Standing) -> Result<()> {
        self.life.step()?;
        self.check_room()?;
        if !self.ledger_takes() {
            if self.platter.late.swap(false, Ordering::SeqCst) {
                *self.platter.standing.lock().unwrap() = Some(standing.clone());
            }
            return Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the ledger cannot be written"));
        }
        *self.platter.standing.lock().unwrap() = Some(standing.clone());
        Ok(())
    }
}
