//! Local sides over the testkit's store and over a vector, a remote that lends its bytes, and a record in memory that outlives a region.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Error, ErrorKind, Operation, Piece, ReadPieces, Result, check_range};

use r3map_testkit::deadline;
use tokio::task::JoinHandle;

use crate::{
    Cached, CachedParts, CachedSettings, InstallNow, Local, PullSettings, PushSettings, Recorded, StateRecord, Workers,
    Written,
};

/// A read-only remote of `size` bytes that does nothing but lend them, as `pieces` does.
pub(crate) fn lending<P: ReadPieces + 'static>(size: u64, pieces: P) -> Arc<Lender<P>> {
    Arc::new(Lender { size, pieces })
}

pub(crate) struct Lender<P> {
    size: u64,
    pub(crate) pieces: P,
}

#[async_trait]
impl<P: ReadPieces + 'static> Backend for Lender<P> {
    fn size(&self) -> u64 {
        self.size
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { pieces: Some(&self.pieces), read_only: true, ..Capabilities::default() }
    }

    async fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        panic!("it lends its bytes")
    }

    async fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        panic!("it is read-only")
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// A local side whose bytes rest in `bytes`.
pub(crate) struct Side {
    bytes: Arc<dyn Backend>,
    /// The same, where pulled bytes can be put there at once.
    vector: Option<Arc<Vector>>,
    /// Ranges written through the mapping that this side pretends to be.
    mapped: Option<Mutex<Vec<Range<u64>>>>,
    pub(crate) failed: Mutex<Vec<Range<u64>>>,
    /// Ranges that were installed as zeros.
    pub(crate) zeroed: Mutex<Vec<Range<u64>>>,
    pub(crate) installs: AtomicUsize,
    pub(crate) refuses_installs: AtomicBool,
    /// Called before pulled bytes are put in place, and when a search knows what was written and has not told of it.
    pub(crate) meanwhile: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Side {
    /// Over any backend, where putting pulled bytes has to be waited for.
    pub(crate) fn over(bytes: Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self::new(bytes, None))
    }

    /// In a vector, which takes pulled bytes at once.
    pub(crate) fn vector(size: u64) -> Arc<Self> {
        let vector = Arc::new(Vector::new(size));
        Arc::new(Self::new(vector.clone(), Some(vector)))
    }

    /// In a vector that is written through a mapping, too.
    pub(crate) fn mapping(size: u64) -> Arc<Self> {
        let vector = Arc::new(Vector::new(size));
        Arc::new(Self { mapped: Some(Mutex::default()), ..Self::new(vector.clone(), Some(vector)) })
    }

    fn new(bytes: Arc<dyn Backend>, vector: Option<Arc<Vector>>) -> Self {
        Self {
            bytes,
            vector,
            mapped: None,
            failed: Mutex::default(),
            zeroed: Mutex::default(),
            installs: AtomicUsize::new(0),
            refuses_installs: AtomicBool::new(false),
            meanwhile: OnceLock::new(),
        }
    }

    /// A write through the mapping: no call tells the region of it.
    pub(crate) fn poke(&self, offset: u64, bytes: &[u8]) {
        self.vector.as_ref().unwrap().put(offset, bytes);
        self.mapped.as_ref().unwrap().lock().unwrap().push(offset..offset + bytes.len() as u64);
    }

    fn meanwhile(&self) {
        if let Some(call) = self.meanwhile.get() {
            call();
        }
    }

    fn note_install(&self) -> Result<()> {
        self.meanwhile();
        self.installs.fetch_add(1, Ordering::SeqCst);
        match self.refuses_installs.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the local disk is full")),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl Backend for Side {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        self.bytes.capabilities()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.bytes.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.bytes.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.bytes.flush().await
    }
}

#[async_trait]
impl Local for Side {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.note_install()?;
        self.bytes.write_at(offset, bytes).await
    }

    fn install_now(&self) -> Option<&dyn InstallNow> {
        self.vector.as_ref().map(|_| self as &dyn InstallNow)
    }

    fn written(&self) -> Option<&dyn Written> {
        self.mapped.as_ref().map(|_| self as &dyn Written)
    }

    fn fail(&self, range: Range<u64>, _error: &Error) {
        self.failed.lock().unwrap().push(range);
    }
}

impl InstallNow for Side {
    fn install_now(&self, offset: u64, piece: Piece<'_>) -> Result<()> {
        self.note_install()?;
        assert_eq!(offset % 4096, 0, "installed ranges begin at blocks");
        assert!(piece.len().is_multiple_of(4096) || offset + piece.len() == self.size(), "and end there");
        let vector = self.vector.as_ref().unwrap();
        match piece {
            Piece::Data(bytes) => vector.put(offset, bytes),
            Piece::Zeroes(len) => {
                self.zeroed.lock().unwrap().push(offset..offset + len);
                vector.put(offset, &vec![0; len as usize]);
            }
        }
        Ok(())
    }
}

impl Written for Side {
    fn collect(&self, valid: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        let inside = |range: &mut Range<u64>| valid.start <= range.start && range.end <= valid.end;
        let written: Vec<_> = self.mapped.as_ref().unwrap().lock().unwrap().extract_if(.., inside).collect();
        self.meanwhile();
        written.into_iter().for_each(|range| found(range.start / 4096 * 4096..range.end.next_multiple_of(4096)));
        Ok(())
    }
}

/// Bytes in a vector, read and written without waiting.
struct Vector(Mutex<Vec<u8>>);

impl Vector {
    fn new(size: u64) -> Self {
        Self(Mutex::new(vec![0; size as usize]))
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.0.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

#[async_trait]
impl Backend for Vector {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(Operation::Read, self.size(), offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(Operation::Write, self.size(), offset, buf.len() as u64)?;
        self.put(offset, buf);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// A record that outlives the region, as a file would.
#[derive(Default)]
pub(crate) struct Record {
    blocks: Mutex<BTreeMap<u64, Recorded>>,
    pub(crate) checkpoints: AtomicUsize,
    /// Blocks of which nothing can be recorded, as on a disk that is full or broken there.
    pub(crate) refused: Mutex<Range<u64>>,
    refusals: AtomicUsize,
}

impl Record {
    pub(crate) fn state(&self, block: u64) -> Option<Recorded> {
        self.blocks.lock().unwrap().get(&block).copied()
    }

    fn refuses(&self, blocks: &Range<u64>) -> bool {
        let refused = self.refused.lock().unwrap();
        blocks.start < refused.end && refused.start < blocks.end
    }
}

#[async_trait]
impl StateRecord for Record {
    fn load(&self, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> Result<()> {
        self.blocks.lock().unwrap().iter().for_each(|(block, state)| visit(*block..block + 1, *state));
        Ok(())
    }

    fn record(&self, blocks: Range<u64>, state: Recorded) -> Result<()> {
        if self.refuses(&blocks) {
            let before = self.refusals.fetch_add(1, Ordering::SeqCst);
            assert!(before < 100, "it is asked again and again");
            return Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the local disk is full"));
        }
        self.blocks.lock().unwrap().extend(blocks.map(|block| (block, state)));
        Ok(())
    }

    fn forget(&self, blocks: Range<u64>) -> Result<()> {
        self.blocks.lock().unwrap().retain(|block, _| !blocks.contains(block));
        Ok(())
    }

    async fn checkpoint(&self) -> Result<()> {
        self.checkpoints.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Opens a region with plain parts.
pub(crate) async fn open(local: Arc<Side>, remote: Arc<dyn Backend>, settings: CachedSettings) -> Arc<Cached> {
    Cached::open(local, remote, settings, CachedParts::default()).await.unwrap()
}

/// Only what a test asks for happens: nothing in the background.
pub(crate) fn quiet() -> CachedSettings {
    CachedSettings {
        pull: PullSettings { workers: Workers::Off, ..PullSettings::default() },
        push: PushSettings { interval: Duration::from_secs(1 << 20), ..PushSettings::default() },
        ..CachedSettings::default()
    }
}

/// Longer than anything here takes.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Reads, which has to work.
pub(crate) async fn read(cached: &Cached, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    deadline(SOON, "a read", cached.read_at(offset, &mut buf)).await.unwrap();
    buf
}

/// A read in a task of its own.
pub(crate) fn reading(cached: &Arc<Cached>, offset: u64, len: usize) -> JoinHandle<Result<Vec<u8>>> {
    let cached = cached.clone();
    tokio::spawn(async move {
        let mut buf = vec![0; len];
        cached.read_at(offset, &mut buf).await.map(|()| buf)
    })
}

/// A write in a task of its own.
pub(crate) fn writing(cached: &Arc<Cached>, offset: u64, bytes: Vec<u8>) -> JoinHandle<Result<()>> {
    let cached = cached.clone();
    tokio::spawn(async move { cached.write_at(offset, &bytes).await })
}

/// A flush in a task of its own.
pub(crate) fn flushing(cached: &Arc<Cached>) -> JoinHandle<Result<()>> {
    let cached = cached.clone();
    tokio::spawn(async move { cached.flush().await })
}

/// The result of a task, which has to end.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> T {
    deadline(SOON, "a call", task).await.unwrap()
}
