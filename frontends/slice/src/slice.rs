//! A region as memory: the mapping, the threads that answer its faults, and the cached region that knows the state of
//! each of its blocks.

use std::num::NonZeroUsize;
use std::ops::{Deref, Range};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use r3map_core::{Access, Backend, Capabilities, Error, ErrorKind, Geometry, Operation, Result, check_range};
use r3map_pipeline::{BlockSet, Cached, Progress, Tracker, Writes};
use r3map_sys::{FaultScope, Mapping, Pager, Protection, ScopeWanted};
use tokio::sync::watch;

use crate::pages::Pages;
use crate::runtime::Background;
use crate::server::{Handler, Server};
use crate::settings::{SliceParts, SliceSettings};
use crate::task::{Task, block_on};

/// A remote region as this process's own memory.
///
/// Reading or writing a byte that is not there waits until it has come; what is there is memory like any other. What
/// is written is noticed page by page, without a call, and pushed in the background and on [`Self::flush`].
///
/// # Views
/// [`Self::as_slice`] and [`Self::as_mut_slice`] are ordinary slices under ordinary borrow rules. Bytes that come in the
/// background only ever fill pages that nobody has seen, and what is written is read in the background by the kernel;
/// why that is sound is written at [`Mapping`]. Several threads can write at once to parts of the view
/// (`chunks_mut`, `split_at_mut`). A write through a view is part of a flush that begins after the view's borrow has
/// ended; [`Self::handle`] can flush while a view is alive.
///
/// # When bytes cannot be had
/// Touching them raises SIGBUS once the remote's retries are spent, as for a mapped file whose disk fails; it never
/// reads zeros and never waits for ever. [`Self::read_at`] and [`Self::write_at`] answer with an error in place of the
/// signal, and [`Self::demand`] makes sure beforehand.
///
/// # Threads
/// Whatever fetches the bytes must not wait for them. A slice does its own work on a runtime of its own; a remote that
/// does its work on another runtime (a client that was connected there) needs that one to have threads left which do
/// not touch the slice. So in asynchronous programs touch it from `spawn_blocking` or from threads of your own. The
/// same holds for locks: while a thread holds the lock of a log's output and reads the slice (`println!` of a part of
/// it), the slice cannot write to that log.
///
/// # Limits
/// - Where [`Self::scope`] is [`FaultScope::UserOnly`], a system call that is given memory which was never touched
///   fails with EFAULT.
/// - A forked child does not have the memory: it gets a segmentation fault.
/// - `madvise` must not be used on the memory: what is dropped with it is lost, and raises SIGBUS.
/// - A program that closes all of its file descriptors (`close_range` in a daemon) must do so before it opens a slice:
///   the kernel would otherwise take the slice for ended.
#[derive(Debug)]
pub struct Slice {
    mapping: Mapping,
    open: Open,
    closing: bool,
}

impl Slice {
    /// Maps all of `remote` into memory. Returns at once; bytes come on demand and, where the settings say so, in the
    /// background. Needs no runtime around it. Retries are the remote's business: wrap it in them first.
    ///
    /// # Errors
    /// `Denied` where the kernel forbids this process to handle page faults, naming what to change; `Exhausted` when
    /// there is no room in the address space; `InvalidInput` for settings that contradict each other or the remote.
    pub fn open(remote: Arc<dyn Backend>, settings: SliceSettings, parts: SliceParts) -> Result<Self> {
        let pushed = settings.region.writes == Writes::Pushed;
        let read_only = settings.region.read_only || pushed && remote.capabilities().read_only;
        let protection = if read_only { Protection::ReadOnly } else { Protection::Tracked };
        Self::open_on(map_bytes(remote.size(), protection, settings.scope)?, remote, settings, parts)
    }

    /// The same on memory that is mapped already, and not in anybody's view.
    pub(crate) fn open_on(
        mapping: Mapping,
        remote: Arc<dyn Backend>,
        settings: SliceSettings,
        parts: SliceParts,
    ) -> Result<Self> {
        settings.validate()?;
        if parts.region.record.is_some() {
            let message = "memory does not survive the process, so that a slice cannot have a record of it";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        let inner = Inner::open(mapping.pager().clone(), remote, settings, parts)?;
        Ok(Self { mapping, open: Open(inner), closing: false })
    }

    /// The bytes. Touching one that is not there waits for it.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.mapping.as_slice()
    }

    /// The bytes, to change. Touching one that is not there waits for it: its page is fetched before it is written.
    ///
    /// # Errors
    /// `Denied` if the slice is read-only; `Cancelled` after [`Self::close`] was called.
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        if self.closing {
            return Err(Error::new(ErrorKind::Cancelled, Operation::Write, "the slice is closing or closed"));
        }
        let denied = || Error::new(ErrorKind::Denied, Operation::Write, "the slice is read-only");
        self.mapping.as_mut_slice().ok_or_else(denied)
    }

    /// The address of the first byte, for other languages; the length is that of [`Self::as_slice`]. It is valid until
    /// the slice is dropped; whoever uses it keeps the rules of the two views above.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Copies bytes out, waiting for those that are not there; an error takes the place of a signal. In asynchronous
    /// code use [`Self::handle`], which is a [`Backend`].
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.demand_now(Operation::Read, offset, buf.len())?;
        buf.copy_from_slice(&self.as_slice()[range]);
        Ok(())
    }

    /// Copies bytes in, after those that are not there have come; an error takes the place of a signal. In asynchronous
    /// code await [`Self::demand`] and write to the view.
    ///
    /// # Errors
    /// As [`Backend::write_at`], and as [`Self::as_mut_slice`].
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.as_mut_slice()?;
        let range = self.demand_now(Operation::Write, offset, bytes.len())?;
        self.as_mut_slice()?[range].copy_from_slice(bytes);
        Ok(())
    }

    fn demand_now(&self, operation: Operation, offset: u64, len: usize) -> Result<Range<usize>> {
        check_range(operation, self.len() as u64, offset, len as u64)?;
        self.demand(offset..offset + len as u64).wait()?;
        // In range, so that it fits.
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        Ok(offset..offset + len)
    }

    /// Makes a range of bytes local, ahead of all background work. Touching them does not wait, and raises no signal,
    /// once this has succeeded.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub fn demand(&self, range: Range<u64>) -> Task<()> {
        self.task(Operation::Read, |region| async move { region.demand(range).await })
    }

    /// Waits until everything is local.
    ///
    /// # Errors
    /// `InvalidInput` where background pulling is off; the error of a background pull that fails meanwhile, which will
    /// be tried again.
    pub fn pulled(&self) -> Task<()> {
        self.task(Operation::Read, |region| async move { region.pulled().await })
    }

    /// Makes everything that was written before the call as durable as the remote can.
    ///
    /// # Errors
    /// As [`Backend::flush`]; what could not be stored is tried again.
    pub fn flush(&self) -> Task<()> {
        self.task(Operation::Flush, |region| async move { region.flush().await })
    }

    /// Stores everything that was written and ends the slice: from the call on it cannot be written to, and once it has
    /// succeeded touching what was not local raises SIGBUS. The memory stays until the slice is dropped.
    ///
    /// # Errors
    /// When anything could not be stored; call it again to try again.
    pub fn close(&mut self) -> Task<()> {
        self.closing = true;
        self.task(Operation::Close, |region| async move { region.close().await })
    }

    fn task<F>(&self, operation: Operation, work: impl FnOnce(Arc<Cached>) -> F) -> Task<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        Task::spawn(self.open.0.background.handle(), operation, work(self.open.0.region.clone()))
    }

    /// How far pulling and pushing are, now and as it changes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.open.0.region.progress()
    }

    /// How the region is cut.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.open.0.region.geometry()
    }

    /// Whose accesses to missing bytes wait for them.
    #[must_use]
    pub fn scope(&self) -> FaultScope {
        self.mapping.pager().scope()
    }

    /// The region as a backend, beside the memory: for reading, flushing and giving up. It takes no writes, which would
    /// change bytes under the views.
    #[must_use]
    pub fn handle(&self) -> SliceHandle {
        SliceHandle { inner: self.open.0.clone(), writable: false }
    }

    /// Gives up the views of the memory for good, and with that lets it be written to as a backend. The slice lives on
    /// until the last handle of it is dropped.
    #[must_use]
    pub fn share(self) -> SliceHandle {
        let Self { mapping, open, .. } = self;
        drop(mapping.share());
        SliceHandle { inner: open.keep(), writable: true }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Memory whose pages are all missing.
pub(crate) fn map_bytes(size: u64, protection: Protection, scope: ScopeWanted) -> Result<Mapping> {
    Mapping::new(size, protection, scope)
        .map_err(|error| Error::from_io(Operation::Mount, "cannot map the region into memory", error))
}

/// Maps all of a backend into memory, to be read: each chunk is read when it is first touched, and nothing else is
/// done, by nobody else.
///
/// # Errors
/// As [`Slice::open`].
pub fn map(backend: Arc<dyn Backend>) -> Result<Slice> {
    let mut settings = SliceSettings::direct().read_only();
    settings.workers = NonZeroUsize::MIN;
    let capabilities = backend.capabilities();
    settings.region.chunk_size = match capabilities.access {
        Access::WholeChunks(chunk) => chunk,
        Access::Any => capabilities.preferred_chunk.unwrap_or_default(),
    };
    Slice::open(backend, settings, SliceParts::default())
}

/// Ends a slice when the one who has its views lets go, whoever else has a handle.
#[derive(Debug)]
struct Open(Arc<Inner>);

impl Open {
    /// Leaves the end to the handles.
    fn keep(self) -> Arc<Inner> {
        self.0.kept.store(true, Ordering::Relaxed);
        self.0.clone()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !leave_to_parent(&self.0) && !self.0.kept.load(Ordering::Relaxed) {
            self.0.end();
        }
    }
}

/// In a forked child, keeps it from being ended: the child has none of the threads that an orderly end would wait for, and
/// what tells them to stop it shares with its parent, whose faults nobody would answer any more.
fn leave_to_parent(inner: &Arc<Inner>) -> bool {
    let is_child = !inner.pager.is_ours();
    if is_child {
        std::mem::forget(inner.clone());
    }
    is_child
}

/// What a slice and its handles share.
#[derive(Debug)]
struct Inner {
    region: Arc<Cached>,
    pager: Arc<Pager>,
    server: Mutex<Option<Server>>,
    background: Background,
    tracker: Tracker,
    kept: AtomicBool,
}

impl Inner {
    fn open(
        pager: Arc<Pager>,
        remote: Arc<dyn Backend>,
        settings: SliceSettings,
        parts: SliceParts,
    ) -> Result<Arc<Self>> {
        let background = Background::new(parts.runtime, settings.workers)?;
        let tracker = parts.region.tracker.clone();
        let region = {
            let _inside = background.handle().enter();
            block_on(pin!(Cached::open(Arc::new(Pages::new(pager.clone())), remote, settings.region, parts.region)))?
        };
        let handler = Handler {
            pager: pager.clone(),
            region: region.clone(),
            runtime: background.handle().clone(),
            heal_after: settings.heal_after,
        };
        let server = Mutex::new(Some(Server::start(handler, settings.fault_threads)?));
        Ok(Arc::new(Self { region, pager, server, background, tracker, kept: AtomicBool::new(false) }))
    }

    /// Gives up what was not stored, then takes the memory away: nobody reads zeros or waits for ever.
    fn end(&self) {
        self.region.abandon();
        drop(self.server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}

/// A slice as a [`Backend`]. Cloning gives another handle to the same.
#[derive(Debug, Clone)]
pub struct SliceHandle {
    inner: Arc<Inner>,
    writable: bool,
}

impl Drop for SliceHandle {
    fn drop(&mut self) {
        leave_to_parent(&self.inner);
    }
}

impl SliceHandle {
    /// How far pulling and pushing are, now and as it changes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.inner.region.progress()
    }

    /// Waits until everything is local.
    ///
    /// # Errors
    /// As [`Slice::pulled`].
    pub async fn pulled(&self) -> Result<()> {
        self.inner.region.pulled().await
    }

    /// Stores everything that was written and ends the slice, as [`Slice::close`] does.
    ///
    /// # Errors
    /// As [`Slice::close`].
    pub async fn close(&self) -> Result<()> {
        self.inner.region.close().await
    }

    /// Starts to record which blocks are written, with an empty record: what was written before the call is not in it.
    /// Costs the application a cheap fault for each page that it writes from now on; while nothing is recorded and
    /// nothing pushed there is none.
    ///
    /// # Errors
    /// As [`Cached::collect_written`]; nothing is recorded then.
    pub async fn track(&self) -> Result<()> {
        self.inner.region.collect_written().await?;
        self.inner.tracker.track();
        Ok(())
    }

    /// Takes what was written since the last call of this, or of [`Self::track`]; nothing if nothing is recorded.
    ///
    /// # Errors
    /// As [`Cached::collect_written`]; what was found is given by the next call.
    pub async fn take_written(&self) -> Result<BlockSet> {
        self.inner.region.collect_written().await?;
        Ok(self.inner.tracker.take().confirm())
    }

    /// Stops recording, and forgets the record.
    pub fn untrack(&self) {
        self.inner.tracker.stop();
    }

    /// Makes every store to the memory a segmentation fault from now on: what is taken afterwards is the last of it.
    /// Reading goes on, here and in the application. Blocks for some 20 ms for each GiB.
    ///
    /// # Errors
    /// When the kernel refuses; nothing has changed then.
    pub fn freeze(&self) -> Result<()> {
        self.inner.pager.freeze().map_err(cannot_protect)
    }

    /// The same in twice the time, half of which it leaves the process's memory to others.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub fn freeze_gently(&self) -> Result<()> {
        self.inner.pager.freeze_gently().map_err(cannot_protect)
    }

    /// Lets the application write again.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn thaw(&self) -> Result<()> {
        self.inner.pager.thaw().map_err(cannot_protect)
    }

    /// How the region is cut.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.inner.region.geometry()
    }

    /// Ends the slice at once, without storing what was written: whoever waits for a page gets SIGBUS.
    pub fn abandon(&self) {
        self.inner.region.abandon();
    }
}

fn cannot_protect(error: std::io::Error) -> Error {
    Error::from_io(Operation::Close, "the memory's protection cannot be changed", error)
}

#[async_trait]
impl Backend for SliceHandle {
    fn size(&self) -> u64 {
        self.inner.region.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let region = self.inner.region.capabilities();
        match self.writable {
            true => region,
            false => Capabilities { read_only: true, trim: None, write_zeroes: None, ..region },
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.region.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        if !self.writable {
            let message = "the slice has views of its memory, which must not change under them";
            return Err(Error::new(ErrorKind::Denied, Operation::Write, message).at(offset, buf.len() as u64));
        }
        self.inner.region.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.region.flush().await
    }
}
