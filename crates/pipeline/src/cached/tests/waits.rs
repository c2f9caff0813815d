//! Nobody waits for ever, nothing is lost and nothing is told wrongly, whatever panics, comes late, ends early or is given
//! up meanwhile.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak, mpsc};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Access, Backend, Capabilities, ChunkSize, Error, ErrorKind, Operation, Piece, ReadPieces, Result};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::fakes::{SOON, flushing, joined, lending, quiet, read, reading, writing};
use super::{Side, open};
use crate::{Cached, CachedParts, CachedSettings, Hooks, Phase, Priority, PullSettings, Workers};

const BLOCK: u64 = 4096;
const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 20 * CHUNK + 100;
/// So long it is waited for what must not happen: it does at once, or not at all.
const A_WHILE: Duration = Duration::from_millis(300);

fn filled() -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(SIZE).filled(7)))
}

fn fixed(workers: usize) -> Workers {
    Workers::Fixed(NonZeroUsize::new(workers).unwrap())
}

fn pulling(workers: usize) -> CachedSettings {
    CachedSettings { pull: PullSettings { workers: fixed(workers), ..PullSettings::default() }, ..quiet() }
}

/// The second write waits for the first to be stored.
fn one_write() -> CachedSettings {
    let mut settings = quiet();
    settings.push.dirty_budget = NonZeroU64::MIN;
    settings
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_panics_does_not_leave_anyone_waiting() {
    let priority = Priority::Function(Arc::new(|_| panic!("a bad order")));
    // What comes before all order is chosen in the same breath.
    let parts = CachedParts { priority, urgent: vec![9], ..CachedParts::default() };
    let cached = Cached::open(Side::vector(SIZE), filled(), pulling(2), parts).await.unwrap();
    let error = deadline(SOON, "pulling", cached.pulled()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(!cached.progress().borrow().pulled);
    fill::check(&read(&cached, 0, 10).await, 0, 7).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_push_that_panics_is_made_again() {
    let remote = Arc::new(Panicking { store: Store::new(SIZE), panicked: AtomicBool::new(false) });
    let cached = open(Side::vector(SIZE), remote.clone(), one_write()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    joined(writing(&cached, BLOCK, vec![2; 4096])).await.unwrap();
    assert_eq!(cached.progress().borrow().last_error.as_ref().unwrap().kind(), ErrorKind::Internal);
    deadline(SOON, "closing", cached.close()).await.unwrap();
    let there = remote.store.snapshot();
    assert!(there[..4096] == [1; 4096] && there[4096..8192] == [2; 4096]);
}

/// A remote whose first write panics.
struct Panicking {
    store: Store,
    panicked: AtomicBool,
}

#[async_trait]
impl Backend for Panicking {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.store.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        assert!(self.panicked.swap(true, Ordering::SeqCst), "a bad remote");
        self.store.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.store.flush().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_pull_that_a_push_needs_does_not_stop_the_other_pushes() {
    let remote = Arc::new(OneByOne { store: Store::new(SIZE).filled(7), turn: tokio::sync::Mutex::default() });
    let mut settings = quiet();
    settings.push.workers = fixed(2);
    let cached = open(Side::vector(SIZE), remote.clone(), settings).await;
    for chunk in [0, 2] {
        cached.write_at(chunk * CHUNK, &vec![1; CHUNK as usize]).await.unwrap();
    }
    cached.write_at(4 * CHUNK, &[2; 4096]).await.unwrap();
    joined(flushing(&cached)).await.unwrap();
    let there = remote.store.snapshot();
    assert!(there[..CHUNK as usize] == [1; CHUNK as usize] && there[4 * CHUNK as usize] == 2);
    fill::check(&there[4 * CHUNK as usize + 4096..], 4 * CHUNK + BLOCK, 7).unwrap();
}

/// A remote of whole chunks that does one thing at a time, in the order in which it was asked.
struct OneByOne {
    store: Store,
    turn: tokio::sync::Mutex<()>,
}

#[async_trait]
impl Backend for OneByOne {
    fn size(&self) -> u64 {
        SIZE
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { access: Access::WholeChunks(ChunkSize::new(CHUNK).unwrap()), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.store.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.store.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.store.flush().await
    }
}

/// The kernel tells of what was written through a mapping once. Who asks while another has been told, and has not noted it
/// down yet, must not take it that nothing was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_flush_waits_for_what_another_search_has_found() {
    let (store, local) = (Arc::new(Store::new(SIZE).filled(3)), Side::mapping(SIZE));
    let mut settings = quiet();
    settings.push.collect_interval = Duration::from_secs(1 << 20);
    let cached = open(local.clone(), store.clone(), settings).await;
    read(&cached, 0, SIZE as usize).await;
    local.poke(70_000, &[5; 10]);
    let (found, first) = (Arc::new(Notify::new()), AtomicBool::new(true));
    let (second, came) = mpsc::channel();
    let (flushed, is_flushed) = mpsc::channel();
    let (tell, waits) = (found.clone(), std::sync::Mutex::new((came, is_flushed)));
    let call = move || {
        if !first.swap(false, Ordering::SeqCst) {
            return second.send(()).unwrap();
        }
        tell.notify_one();
        let waits = waits.lock().unwrap();
        if waits.0.recv_timeout(A_WHILE).is_ok() {
            waits.1.recv_timeout(SOON).unwrap();
        }
    };
    assert!(local.meanwhile.set(Box::new(call)).is_ok());
    let search = tokio::spawn({
        let cached = cached.clone();
        async move { cached.collect_written().await }
    });
    deadline(SOON, "the search", found.notified()).await;
    joined(flushing(&cached)).await.unwrap();
    let there = store.snapshot()[70_009];
    flushed.send(()).unwrap();
    joined(search).await.unwrap();
    assert_eq!(there, 5, "it was written before the flush");
}

#[tokio::test]
async fn a_region_that_is_given_up_while_it_closes_stays_given_up() {
    let cell: Arc<OnceLock<Weak<Cached>>> = Arc::default();
    let region = cell.clone();
    let on_before_close = Some(Arc::new(move || -> futures_util::future::BoxFuture<'static, Result<()>> {
        region.get().and_then(Weak::upgrade).unwrap().abandon();
        Box::pin(std::future::ready(Ok(())))
    }) as crate::Hook);
    let parts = CachedParts { hooks: Hooks { on_before_close, ..Hooks::default() }, ..CachedParts::default() };
    let remote = filled();
    let cached = Cached::open(Side::vector(SIZE), remote.clone(), quiet(), parts).await.unwrap();
    assert!(cell.set(Arc::downgrade(&cached)).is_ok());
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let error = deadline(SOON, "closing", cached.close()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(cached.progress().borrow().phase, Phase::Abandoned);
    assert_eq!(remote.count(Operation::Write), 0, "what is dirty is not stored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn who_gave_a_region_up_can_wait_for_a_pull_that_a_reader_does_himself() {
    let local = Side::vector(SIZE);
    let cached = open(local.clone(), lending(SIZE, Lending(Ok(()))), quiet()).await;
    let (installs, (release, released)) = (Arc::new(Notify::new()), mpsc::channel::<()>());
    let (tell, released) = (installs.clone(), std::sync::Mutex::new(released));
    let call = move || {
        tell.notify_one();
        let _ = released.lock().unwrap().recv_timeout(SOON);
    };
    assert!(local.meanwhile.set(Box::new(call)).is_ok());
    let reader = reading(&cached, 0, 10);
    deadline(SOON, "the pull", installs.notified()).await;
    let mut gone = Box::pin(cached.abandoned());
    timeout(A_WHILE, &mut gone).await.expect_err("something is being put in place");
    drop(release);
    deadline(SOON, "its end", gone).await;
    let _ = joined(reader).await;
}

#[test]
fn a_region_whose_runtime_ends_leaves_nobody_waiting() {
    let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let remote = filled();
    remote.add(Rule::any().hang());
    let settings = CachedSettings { pull: pulling(1).pull, ..one_write() };
    let cached = own.block_on(open(Side::vector(SIZE), remote, settings));
    other.block_on(async {
        cached.write_at(0, &[1; 4096]).await.unwrap();
        let write = writing(&cached, BLOCK, vec![1; 4096]);
        let pulled = tokio::spawn({
            let cached = cached.clone();
            async move { cached.pulled().await }
        });
        tokio::task::yield_now().await;
        own.shutdown_background();
        assert_eq!(joined(write).await.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(joined(pulled).await.unwrap_err().kind(), ErrorKind::Cancelled);
    });
}

/// A remote that lends everything, and then goes on as it was told.
struct Lending(Result<()>);

#[async_trait]
impl ReadPieces for Lending {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        visit(offset, Piece::Data(&fill::bytes(offset, len as usize, 7)))?;
        self.0.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_after_everything_has_come_is_none() {
    let error = Error::new(ErrorKind::Unavailable, Operation::Read, "the connection is gone");
    let cached = open(Side::vector(SIZE), lending(SIZE, Lending(Err(error))), pulling(2)).await;
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
    assert!(cached.progress().borrow().last_error.is_none());
}

/// The remote was away for a moment, so that nothing is asked of it for an hour; what is under way comes, and its reply does
/// not end.
#[tokio::test(start_paused = true)]
async fn everything_is_there_when_it_is_though_the_next_look_is_far_away() {
    let remote = lending(2 * CHUNK, Hesitant { failing: AtomicBool::new(true), come: Notify::new() });
    let mut settings = pulling(2);
    settings.pull.max_request = NonZeroU64::new(CHUNK).unwrap();
    settings.pull.retry_pause = Duration::from_secs(3600);
    let cached = open(Side::vector(2 * CHUNK), remote.clone(), settings).await;
    assert_eq!(cached.pulled().await.unwrap_err().kind(), ErrorKind::Unavailable);
    read(&cached, 0, 10).await;
    remote.pieces.come.notify_one();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    fill::check(&read(&cached, 0, 2 * CHUNK as usize).await, 0, 7).unwrap();
}

/// A remote that fails once for its first chunk, and never ends the reply of the second.
struct Hesitant {
    failing: AtomicBool,
    come: Notify,
}

#[async_trait]
impl ReadPieces for Hesitant {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        if offset == 0 && self.failing.swap(false, Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Unavailable, Operation::Read, "not now"));
        }
        if offset > 0 {
            self.come.notified().await;
        }
        visit(offset, Piece::Data(&fill::bytes(offset, len as usize, 7)))?;
        if offset > 0 { std::future::pending().await } else { Ok(()) }
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_word_on_a_push_that_fails_is_that_nothing_is_under_way() {
    let (failing, pause) = (filled(), Pause::new());
    let remote = Faults::new(failing.clone());
    failing.add(Rule::on(Operation::Write).times(1).fail(ErrorKind::Unavailable));
    remote.add(Rule::on(Operation::Write).times(1).hold(&pause));
    let cached = open(Side::vector(SIZE), remote, quiet()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let flush = flushing(&cached);
    deadline(SOON, "the push", pause.wait_held(1)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut progress = cached.progress();
    assert_eq!(progress.borrow_and_update().pushing_bytes, BLOCK);
    pause.release();
    assert_eq!(joined(flush).await.unwrap_err().kind(), ErrorKind::Unavailable);
    deadline(SOON, "the last word", progress.wait_for(|now| now.pushing_bytes == 0)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_flush_may_have_lost_is_told_of_as_dirty() {
    let (failing, pause) = (filled(), Pause::new());
    let remote = Faults::new(failing.clone());
    failing.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Unavailable));
    remote.add(Rule::on(Operation::Flush).times(1).hold(&pause));
    let cached = open(Side::vector(SIZE), remote, quiet()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let flush = flushing(&cached);
    deadline(SOON, "the flush", pause.wait_held(1)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut progress = cached.progress();
    assert_eq!(progress.borrow_and_update().dirty_bytes, 0);
    pause.release();
    assert_eq!(joined(flush).await.unwrap_err().kind(), ErrorKind::Unavailable);
    deadline(SOON, "the last word", progress.wait_for(|now| now.dirty_bytes == BLOCK)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_write_may_have_changed_is_told_of_as_dirty() {
    let bytes = Faults::new(Arc::new(Store::new(SIZE)));
    let cached = open(Side::over(bytes.clone()), filled(), quiet()).await;
    read(&cached, 0, 4096).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut progress = cached.progress();
    bytes.add(Rule::on(Operation::Write).times(1).fail_after(ErrorKind::Exhausted));
    assert_eq!(cached.write_at(0, &[1; 4096]).await.unwrap_err().kind(), ErrorKind::Exhausted);
    deadline(SOON, "the last word", progress.wait_for(|now| now.dirty_bytes == BLOCK)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn writes_to_what_is_all_local_are_told_of_together() {
    let cached = open(Side::vector(SIZE), filled(), pulling(1)).await;
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut progress = cached.progress();
    assert!(progress.borrow_and_update().pulled);
    for block in 0..3 {
        cached.write_at(block * BLOCK, &[1; 4096]).await.unwrap();
        assert!(!progress.has_changed().unwrap());
    }
    deadline(SOON, "the news", progress.wait_for(|now| now.dirty_bytes == 3 * BLOCK)).await.unwrap();
}
