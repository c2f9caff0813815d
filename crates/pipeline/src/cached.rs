//! The managed region: a local side that is filled from a remote on demand and in the background, and whose writes go
//! back in the background.
//!
//! This file is the region as a [`Backend`], its opening and its end. What is known of each block is in
//! [`r3map_core::state`]; how bytes come is in `puller`, how they go in `pusher`. There are no retries here: a remote
//! is wrapped in its retries before it is given to a region.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::pull::{PullPlan, Workers};
use r3map_core::push::PushPlan;
use r3map_core::state::{Begin, Journal, Table};
use r3map_core::{
    Access, BLOCK_SIZE, Backend, Capabilities, Error, ErrorKind, Extent, ExtentKind, Extents, Geometry, Operation,
    Piece, ReadPieces, Result, Trim, WriteZeroes, check_range,
};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::{BlockSet, Local, Recorded, StateRecord};

mod buffers;
mod placer;
mod puller;
mod pusher;
mod report;
mod settings;
#[cfg(test)]
mod tests;

use buffers::Buffers;
use report::Report;
pub use settings::{
    CachedParts, CachedSettings, Durability, Hook, Hooks, Phase, Progress, PullSettings, PushSettings, Writes,
};

/// The longest demand pull in bytes: a longer read is several, side by side.
const DEMAND_REQUEST: u64 = 1 << 20;
/// Zeros that are written at a time where the local side cannot do it without bytes.
const ZEROES: usize = 256 << 10;

/// A local copy of a remote region: reads of what is local cost what the local side costs, reads of what is not pull
/// it, writes are local at once and pushed later. See the design's contracts for what it promises, and
/// [`CachedSettings`] for what can be chosen.
///
/// It works on the runtime that it was opened in; its calls may come from any thread, inside that runtime or not.
/// Dropping it without [`Self::close`] is [`Self::abandon`].
pub struct Cached {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Cached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cached").field("table", &self.inner.table).field("phase", &self.inner.phase()).finish()
    }
}

struct Inner {
    local: Arc<dyn Local>,
    remote: Arc<dyn Backend>,
    table: Arc<Table>,
    settings: CachedSettings,
    parts: CachedParts,
    read_only: bool,
    runtime: Handle,
    opened: Instant,
    /// The remote's longest request, in bytes, in whole units.
    request_limit: u64,
    /// What the remote can be written in, in bytes.
    push_unit: u64,
    buffers: Buffers,
    report: Report,
    phase: AtomicU8,
    /// Ends everything.
    stop: CancellationToken,
    /// Ends the background pulls only.
    stop_pulling: CancellationToken,
    tasks: TaskTracker,
    pull_plan: Mutex<PullPlan>,
    pull_wake: Notify,
    /// A pull has failed, or all are done.
    pull_news: Notify,
    /// Whether it has been told that all are done.
    told_complete: AtomicBool,
    pull_failures: puller::Failures,
    /// Demand pulls that wait for the remote.
    demands: AtomicUsize,
    push_plan: Mutex<PushPlan>,
    /// Dirty bytes at which the pusher is woken.
    press_at: u64,
    push_wake: Notify,
    /// Dirty bytes have become fewer, or writes are refused from now on.
    room: Notify,
    /// Writes that have begun; a close waits for them.
    writers: AtomicUsize,
    /// Held while a mapping is searched for writes, and what is found is marked.
    collecting: Mutex<()>,
    /// One round of pushes and flushes at a time.
    rounds: tokio::sync::Mutex<()>,
    flushes_asked: AtomicU64,
    flushes_done: AtomicU64,
    closing: tokio::sync::Mutex<Closing>,
}

/// Gives the region up when the runtime that works for it ends before it does, so that nobody waits for that work.
struct Alive(Arc<Inner>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// How far a close has come.
#[derive(Default)]
struct Closing {
    hook_called: bool,
}

impl Cached {
    /// Opens a region on `local`, which is filled from `remote` and must have its size. Returns at once; pulling goes on
    /// in the background. Must be called in a tokio runtime with time enabled, which does the background work.
    ///
    /// # Errors
    /// `InvalidInput` for settings that contradict each other or the two sides; `Conflict` for a read-only region whose
    /// record has writes that were never pushed; what the record answers when it cannot be loaded.
    pub async fn open(
        local: Arc<dyn Local>,
        remote: Arc<dyn Backend>,
        settings: CachedSettings,
        parts: CachedParts,
    ) -> Result<Arc<Self>> {
        let inner = Arc::new(Inner::new(local, remote, settings, parts)?);
        inner.start();
        Ok(Arc::new(Self { inner }))
    }

    /// How the region is cut.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.inner.table.geometry()
    }

    /// The runtime that does the background work.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.inner.runtime
    }

    /// Whether all of a range of bytes is local now. It stays so.
    #[must_use]
    pub fn is_local(&self, range: &Range<u64>) -> bool {
        self.inner.table.is_valid(range)
    }

    /// Makes a range of bytes local. What is missing is pulled at once, ahead of all background work; where the remote
    /// lends its bytes and the local side takes them at once, on the first poll. A pull that has to wait goes on in the
    /// region's runtime, so that dropping this future does not take it away from others.
    ///
    /// # Errors
    /// `InvalidInput` past the end; `Cancelled` when the region serves no more; what the remote answered when its
    /// retries were spent. [`Local::fail`] was called for the chunks in question then, and the next call tries again.
    pub async fn demand(&self, range: Range<u64>) -> Result<()> {
        check_range(Operation::Read, self.size(), range.start, range.end.saturating_sub(range.start))?;
        self.inner.check_serving(Operation::Read)?;
        self.inner.demand(range).await
    }

    /// The blocks that are local now.
    #[must_use]
    pub fn local_blocks(&self) -> BlockSet {
        let (mut blocks, mut at) = (BlockSet::default(), 0);
        while let Some(run) = self.inner.table.next_valid(at) {
            at = run.end;
            blocks.insert(run);
        }
        blocks
    }

    /// Searches for what was written through a mapping before the call, and tells [`CachedParts::tracker`] of it; the
    /// search that comes after it finds what was written later. Nothing where writes are calls.
    ///
    /// # Errors
    /// When the kernel does not answer; what it has not answered for is found the next time.
    pub async fn collect_written(&self) -> Result<()> {
        self.inner.collect_all().await
    }

    /// Waits until the whole region is local.
    ///
    /// # Errors
    /// The error of a background pull that fails while this waits (it will be tried again: so may this call);
    /// `InvalidInput` where background pulling is off and something is missing; `Cancelled` when the region is closing.
    pub async fn pulled(&self) -> Result<()> {
        self.inner.pulled().await
    }

    /// Where the region stands, now and as it changes; at most some twenty changes a second.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.inner.publish();
        self.inner.report.subscribe()
    }

    /// Stops pulling, refuses writes from now on, stores everything that is dirty and ends the region. Progress goes on
    /// being told. Dropping the future, and an error, leave the region closing: what is dirty is pushed on in the
    /// background, and `close` may be called again.
    ///
    /// # Errors
    /// When anything could not be stored; `Cancelled` after [`Self::abandon`].
    pub async fn close(&self) -> Result<()> {
        let inner = &self.inner;
        let closed = inner.in_runtime(inner.unless_stopped(Operation::Close, inner.close())).await;
        // Where it is closed already, what ended it has also given up this call.
        if inner.phase() != Phase::Closed {
            closed?;
        }
        inner.stop.cancel();
        inner.tasks.close();
        inner.ended().await;
        Ok(())
    }

    /// Ends the region at once: everything under way is given up, waiting calls are answered with `Cancelled`, and what
    /// is dirty is not stored. Nothing after a successful [`Self::close`].
    pub fn abandon(&self) {
        self.inner.abandon();
    }

    /// The same, and waits until everything that was under way has ended: nothing more is put in place afterwards.
    pub async fn abandoned(&self) {
        self.inner.abandon();
        self.inner.ended().await;
    }
}

impl Drop for Cached {
    fn drop(&mut self) {
        self.inner.abandon();
    }
}

impl Inner {
    fn new(
        local: Arc<dyn Local>,
        remote: Arc<dyn Backend>,
        settings: CachedSettings,
        parts: CachedParts,
    ) -> Result<Self> {
        settings.validate()?;
        let geometry = Geometry::new(remote.size(), settings.chunk_size)?;
        let (request_limit, push_unit) = check_sides(&*local, &*remote, &settings, &parts)?;
        let pushed = settings.writes == Writes::Pushed;
        let read_only = settings.read_only || pushed && remote.capabilities().read_only;
        let table = Arc::new(open_table(geometry, &parts, read_only)?);
        let pull_request = settings.pull.max_request.get().min(request_limit);
        let pull_plan = PullPlan::new(table.clone(), settings.pull.workers, pull_request, parts.priority.clone());
        let mut pull_plan = pull_plan.alone(settings.pull.alone);
        pull_plan.urgent(parts.urgent.iter().copied());
        let push = &settings.push;
        let push_plan = PushPlan::new(push.workers, push.interval, push.dirty_budget.get());
        let stop = CancellationToken::new();
        Ok(Self {
            runtime: Handle::current(),
            opened: Instant::now(),
            report: Report::new(geometry.size()),
            phase: AtomicU8::new(Phase::Running as u8),
            stop_pulling: stop.child_token(),
            stop,
            tasks: TaskTracker::new(),
            pull_plan: Mutex::new(pull_plan),
            pull_wake: Notify::new(),
            pull_news: Notify::new(),
            told_complete: AtomicBool::new(false),
            pull_failures: puller::Failures::default(),
            demands: AtomicUsize::new(0),
            press_at: push_plan.press_at(),
            push_plan: Mutex::new(push_plan),
            push_wake: Notify::new(),
            room: Notify::new(),
            writers: AtomicUsize::new(0),
            collecting: Mutex::new(()),
            rounds: tokio::sync::Mutex::new(()),
            flushes_asked: AtomicU64::new(0),
            flushes_done: AtomicU64::new(0),
            closing: tokio::sync::Mutex::new(Closing::default()),
            buffers: Buffers::default(),
            local,
            remote,
            table,
            settings,
            parts,
            read_only,
            request_limit,
            push_unit,
        })
    }

    fn start(self: &Arc<Self>) {
        let alive = Alive(self.clone());
        self.spawn(&self.stop, async move { alive.0.run_report().await });
        for _ in 0..self.pull_drivers() {
            self.spawn(&self.stop_pulling, self.clone().run_puller());
        }
        if !self.read_only && !self.keeps_writes() {
            self.spawn(&self.stop, self.clone().run_pusher());
        }
    }

    fn spawn(&self, until: &CancellationToken, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(until.clone().run_until_cancelled_owned(task), &self.runtime);
    }

    /// Tasks that pull in the background: several, so that checking and copying use several cores.
    fn pull_drivers(&self) -> usize {
        let cores = self.runtime.metrics().num_workers().min(4);
        match self.settings.pull.workers {
            Workers::Off => 0,
            Workers::Adaptive => cores,
            Workers::Fixed(limit) => cores.min(limit.get()),
        }
    }

    fn keeps_writes(&self) -> bool {
        self.settings.writes == Writes::Kept
    }

    /// The time since the region was opened, for the plans.
    fn now(&self) -> Duration {
        self.opened.elapsed()
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            phase if phase == Phase::Running as u8 => Phase::Running,
            phase if phase == Phase::Closing as u8 => Phase::Closing,
            phase if phase == Phase::Closed as u8 => Phase::Closed,
            _ => Phase::Abandoned,
        }
    }

    /// Goes on to a phase. Closed and abandoned are for good: nothing changes then.
    fn set_phase(&self, phase: Phase) {
        let next = |now| (now < Phase::Closed as u8).then_some(phase as u8);
        if self.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok() {
            self.publish();
            self.room.notify_waiters();
            self.pull_news.notify_waiters();
        }
    }

    fn check_serving(&self, operation: Operation) -> Result<()> {
        match self.phase() {
            Phase::Running | Phase::Closing => Ok(()),
            Phase::Closed => Err(Error::new(ErrorKind::Cancelled, operation, "the region is closed")),
            Phase::Abandoned => Err(Error::new(ErrorKind::Cancelled, operation, "the region was given up")),
        }
    }

    fn check_writable(&self, operation: Operation) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::Denied, operation, "the region is read-only"));
        }
        match self.phase() {
            Phase::Running => Ok(()),
            _ => Err(Error::new(ErrorKind::Cancelled, operation, "the region is closing or closed")),
        }
    }

    /// Polls a future inside the region's runtime, whatever thread polls it: remotes need its timers and sockets, files its
    /// threads.
    async fn in_runtime<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|context| {
            let _inside = self.runtime.enter();
            future.as_mut().poll(context)
        })
        .await
    }

    async fn unless_stopped<T>(&self, operation: Operation, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.stop.run_until_cancelled(work).await {
            Some(result) => result,
            None => {
                self.check_serving(operation)?;
                Err(Error::new(ErrorKind::Cancelled, operation, "the region was given up"))
            }
        }
    }

    fn abandon(&self) {
        self.set_phase(Phase::Abandoned);
        self.stop.cancel();
        self.tasks.close();
    }

    /// Waits for all work to end, and tells how things stand then.
    async fn ended(&self) {
        self.tasks.wait().await;
        self.publish();
    }

    async fn close(self: &Arc<Self>) -> Result<()> {
        let mut closing = self.closing.lock().await;
        if self.phase() == Phase::Closed {
            return Ok(());
        }
        self.check_serving(Operation::Close)?;
        if let Err(refused) = self.before_close(&mut closing).await {
            // Whoever does not close again must not lose what was written.
            return match self.drain().await {
                Ok(()) => Err(refused),
                Err(unstored) => Err(refused.along_with(&unstored)),
            };
        }
        self.stop_pulling.cancel();
        self.set_phase(Phase::Closing);
        self.check_serving(Operation::Close)?;
        self.writers_gone().await;
        self.drain().await?;
        self.set_phase(Phase::Closed);
        Ok(())
    }

    /// Calls the hooks that there are for it.
    async fn before_close(&self, closing: &mut Closing) -> Result<()> {
        if let (Some(hook), false) = (&self.parts.hooks.on_before_close, closing.hook_called) {
            hook().await?;
            closing.hook_called = true;
        }
        if self.read_only { Ok(()) } else { self.before_flush().await }
    }

    async fn writers_gone(&self) {
        loop {
            let mut gone = pin!(self.room.notified());
            gone.as_mut().enable();
            if self.writers.load(Ordering::SeqCst) == 0 {
                return;
            }
            gone.await;
        }
    }

    /// Tells the hook which chunks have become local.
    fn tell_local(&self, chunks: Vec<u64>) {
        if let Some(hook) = &self.parts.hooks.on_chunk_local {
            chunks.into_iter().for_each(|chunk| hook(chunk));
        }
    }

    fn push_plan(&self) -> MutexGuard<'_, PushPlan> {
        self.push_plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pull_plan(&self) -> MutexGuard<'_, PullPlan> {
        self.pull_plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What writing to a range means.
#[derive(Clone, Copy)]
enum Change<'a> {
    Bytes(&'a [u8]),
    Zeroes,
    Trim,
}

impl Change<'_> {
    fn operation(self) -> Operation {
        match self {
            Self::Bytes(_) => Operation::Write,
            Self::Zeroes => Operation::WriteZeroes,
            Self::Trim => Operation::Trim,
        }
    }
}

/// A write that has begun, as far as a close is concerned.
struct Writing<'a>(&'a Inner);

impl<'a> Writing<'a> {
    /// Counted before the phase is looked at, and a close looks at the count after it has set the phase: one of the two
    /// sees the other.
    fn begin(inner: &'a Inner, operation: Operation) -> Result<Self> {
        inner.writers.fetch_add(1, Ordering::SeqCst);
        let writing = Self(inner);
        inner.check_writable(operation)?;
        Ok(writing)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if self.0.writers.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.phase() != Phase::Running {
            self.0.room.notify_waiters();
        }
        // However it has ended, something may be dirty now.
        self.0.report.touch();
    }
}

impl Inner {
    async fn change(self: &Arc<Self>, range: Range<u64>, change: Change<'_>) -> Result<()> {
        let _writing = Writing::begin(self, change.operation())?;
        if range.is_empty() {
            return Ok(());
        }
        loop {
            self.wait_for_budget(change.operation()).await?;
            match self.table.write(&range).await? {
                Begin::Absent(block) => self.demand(block).await?,
                Begin::Now(write) => {
                    self.in_runtime(self.change_local(&range, change)).await?;
                    self.tell_local(write.commit()?);
                    self.changed();
                    return Ok(());
                }
            }
        }
    }

    fn changed(&self) {
        if self.table.unpushed_bytes() >= self.press_at {
            self.push_wake.notify_one();
        }
        self.tell_if_complete();
    }

    async fn change_local(&self, range: &Range<u64>, change: Change<'_>) -> Result<()> {
        let (offset, len) = (range.start, range.end - range.start);
        let able = self.local.capabilities();
        match (change, able.trim, able.write_zeroes) {
            (Change::Bytes(bytes), _, _) => self.local.write_at(offset, bytes).await,
            (Change::Trim, Some(local), _) => local.trim(offset, len).await,
            (_, _, Some(local)) => local.write_zeroes(offset, len).await,
            _ => self.write_zero_bytes(range.clone()).await,
        }
    }

    async fn write_zero_bytes(&self, range: Range<u64>) -> Result<()> {
        let zeroes = vec![0; ZEROES.min(index(range.end - range.start))];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(zeroes.len() as u64);
            self.local.write_at(at, &zeroes[..index(len)]).await?;
            at += len;
        }
        Ok(())
    }

    /// Back-pressure: waits while the dirty budget is used up.
    async fn wait_for_budget(&self, operation: Operation) -> Result<()> {
        if self.keeps_writes() || self.table.unpushed_bytes() < self.settings.push.dirty_budget.get() {
            return Ok(());
        }
        loop {
            let mut room = pin!(self.room.notified());
            room.as_mut().enable();
            self.check_writable(operation)?;
            if self.table.unpushed_bytes() < self.settings.push.dirty_budget.get() {
                return Ok(());
            }
            self.push_wake.notify_one();
            room.await;
        }
    }

    fn is_readable_now(&self, offset: u64, len: u64) -> bool {
        self.check_serving(Operation::Read).is_ok()
            && check_range(Operation::Read, self.table.geometry().size(), offset, len).is_ok()
            && self.table.is_valid(&(offset..offset + len))
    }

    async fn read(self: &Arc<Self>, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check_serving(Operation::Read)?;
        check_range(Operation::Read, self.local.size(), offset, buf.len() as u64)?;
        self.demand(offset..offset + buf.len() as u64).await?;
        self.in_runtime(self.local.read_at(offset, buf)).await
    }

    async fn change_at(self: &Arc<Self>, offset: u64, len: u64, change: Change<'_>) -> Result<()> {
        check_range(change.operation(), self.local.size(), offset, len)?;
        self.change(offset..offset + len, change).await
    }
}

/// A call's future, boxed.
type Call<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

#[async_trait]
impl Backend for Cached {
    fn size(&self) -> u64 {
        self.geometry().size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let writable = !self.inner.read_only;
        let local = self.inner.local.capabilities();
        Capabilities {
            read_only: !writable,
            preferred_chunk: Some(self.geometry().chunk_size()),
            pieces: local.pieces.is_some().then_some(self as &dyn ReadPieces),
            trim: writable.then_some(self as &dyn Trim),
            write_zeroes: writable.then_some(self as &dyn WriteZeroes),
            extents: Some(self),
            ..Capabilities::default()
        }
    }

    // Written out, so that a read of what is local is the local side's own future and not one box inside another.
    fn read_at<'a, 'b, 'c>(&'a self, offset: u64, buf: &'b mut [u8]) -> Call<'c>
    where
        'a: 'c,
        'b: 'c,
        Self: 'c,
    {
        if self.inner.is_readable_now(offset, buf.len() as u64) && Handle::try_current().is_ok() {
            return self.inner.local.read_at(offset, buf);
        }
        Box::pin(self.inner.read(offset, buf))
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.change_at(offset, buf.len() as u64, Change::Bytes(buf)).await
    }

    async fn flush(&self) -> Result<()> {
        let inner = &self.inner;
        inner.check_serving(Operation::Flush)?;
        if inner.read_only {
            return Ok(());
        }
        inner.in_runtime(inner.unless_stopped(Operation::Flush, inner.flush())).await
    }
}

#[async_trait]
impl ReadPieces for Cached {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        check_range(Operation::Read, self.size(), offset, len)?;
        self.demand(offset..offset + len).await?;
        match self.inner.local.capabilities().pieces {
            Some(local) => self.inner.in_runtime(local.read_pieces(offset, len, visit)).await,
            None => Err(Error::new(ErrorKind::Internal, Operation::Read, "the local side no longer lends its bytes")),
        }
    }
}

#[async_trait]
impl Trim for Cached {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.change_at(offset, len, Change::Trim).await
    }
}

#[async_trait]
impl WriteZeroes for Cached {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.inner.change_at(offset, len, Change::Zeroes).await
    }
}

#[async_trait]
impl Extents for Cached {
    /// What is local is as the local side says, what is not as the remote says, and data where either does not know.
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.size(), offset, len)?;
        self.inner.check_serving(Operation::Extents)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        let (is_local, blocks) = self.inner.table.run_at(offset / BLOCK_SIZE);
        let run = offset..self.geometry().blocks_range(&blocks).end.min(offset + len);
        let side = if is_local { self.inner.local.capabilities() } else { self.inner.remote.capabilities() };
        match side.extents {
            Some(extents) => self.inner.in_runtime(extents.extents(run.start, run.end - run.start)).await,
            None => Ok(vec![Extent { range: run, kind: ExtentKind::Data }]),
        }
    }
}

/// Checks that the two sides and the settings fit, and answers the remote's request limit and its unit of writing.
fn check_sides(
    local: &dyn Local,
    remote: &dyn Backend,
    settings: &CachedSettings,
    parts: &CachedParts,
) -> Result<(u64, u64)> {
    let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    if local.size() != remote.size() {
        return refuse(format!("the local side has {} bytes, the remote {}", local.size(), remote.size()));
    }
    let able = local.capabilities();
    if able.access != Access::Any || able.max_request.is_some() || able.read_only {
        return refuse("the local side must take any request".into());
    }
    if settings.durability == Durability::Local && parts.record.is_none() {
        return refuse("local durability needs a local side that remembers its state, such as a cache file".into());
    }
    let chunk = settings.chunk_size;
    let unit = match remote.capabilities().access {
        Access::Any => BLOCK_SIZE,
        Access::WholeChunks(unit) if chunk.bytes().is_multiple_of(unit.bytes()) => unit.bytes(),
        Access::WholeChunks(unit) => {
            return refuse(format!("the remote takes chunks of {unit} only, which chunks of {chunk} are not made of"));
        }
    };
    match remote.capabilities().max_request.unwrap_or(u64::MAX) / unit * unit {
        0 => refuse(format!("the remote takes less than {unit} bytes at a time; wrap it so that it takes more")),
        limit => Ok((limit, unit)),
    }
}

/// A state record as the table's journal.
struct RecordJournal(Arc<dyn StateRecord>);

impl Journal for RecordJournal {
    fn clean(&self, blocks: Range<u64>) -> Result<()> {
        self.0.record(blocks, Recorded::Clean)
    }

    fn dirty(&self, blocks: Range<u64>) -> Result<()> {
        self.0.record(blocks, Recorded::Dirty)
    }
}

fn open_table(geometry: Geometry, parts: &CachedParts, read_only: bool) -> Result<Table> {
    let journal = parts.record.clone().map(|record| Box::new(RecordJournal(record)) as Box<dyn Journal>);
    let mut table = Table::new(geometry, journal);
    if parts.hooks.on_chunk_local.is_some() {
        table = table.reporting_chunks();
    }
    restore_present(&table, parts)?;
    let Some(record) = &parts.record else { return Ok(table) };
    let mut fits = true;
    record.load(&mut |blocks, state| {
        fits &= blocks.end <= geometry.block_count();
        table.restore(blocks.start..blocks.end.min(geometry.block_count()), state == Recorded::Dirty);
    })?;
    if !fits {
        return Err(Error::new(ErrorKind::Corrupt, Operation::Open, "the record has blocks past the region's end"));
    }
    if read_only && table.unpushed_bytes() > 0 {
        let message = "the cache has writes that were never pushed; open it writable so that they are";
        return Err(Error::new(ErrorKind::Conflict, Operation::Open, message));
    }
    Ok(table)
}

/// Takes over what is in place already, and has the record know of it.
fn restore_present(table: &Table, parts: &CachedParts) -> Result<()> {
    for run in parts.present.runs() {
        if run.end > table.geometry().block_count() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                Operation::Open,
                "blocks past the region's end are present",
            ));
        }
        if let Some(record) = &parts.record {
            record.record(run.clone(), Recorded::Clean)?;
        }
        table.restore(run, false);
    }
    Ok(())
}

/// A length of something in memory.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("what is in memory has a length that fits")
}

/// Polls a boxed future once, inside `runtime`.
async fn poll_once<F: Future + ?Sized>(runtime: &Handle, future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    poll_fn(|context| {
        let _inside = runtime.enter();
        Poll::Ready(future.as_mut().poll(context))
    })
    .await
}
