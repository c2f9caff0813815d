//! Demand, the background, and how they get along.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use r3map_core::{Backend, ChunkSize, ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Link, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tokio_util::sync::CancellationToken;

use super::fakes::{SOON, joined, lending, quiet, read, reading, writing};
use super::{Side, open};
use crate::{Cached, CachedParts, CachedSettings, Hooks, Priority, PullSettings, Workers};

const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 20 * CHUNK + 100;

fn background(workers: Workers, max_request: u64) -> CachedSettings {
    let max_request = NonZeroU64::new(max_request).unwrap();
    CachedSettings { pull: PullSettings { workers, max_request, ..PullSettings::default() }, ..quiet() }
}

fn fixed(workers: usize) -> Workers {
    Workers::Fixed(NonZeroUsize::new(workers).unwrap())
}

fn filled(size: u64) -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(size).filled(7)))
}

#[tokio::test]
async fn many_readers_of_one_chunk_make_one_pull() {
    for local in [Side::vector(SIZE), Side::over(Arc::new(Store::new(SIZE)))] {
        let (remote, pause) = (filled(SIZE), Pause::new());
        remote.add(Rule::on(Operation::Read).hold(&pause));
        let cached = open(local, remote.clone(), quiet()).await;
        let readers: Vec<_> = (0..10).map(|reader| reading(&cached, reader * 100, 100)).collect();
        deadline(SOON, "the pull", pause.wait_held(1)).await;
        tokio::task::yield_now().await;
        pause.release();
        for (reader, task) in readers.into_iter().enumerate() {
            fill::check(&joined(task).await.unwrap(), reader as u64 * 100, 7).unwrap();
        }
        assert_eq!(remote.count(Operation::Read), 1);
        read(&cached, 0, CHUNK as usize).await;
        assert_eq!(remote.count(Operation::Read), 1, "what is local stays local");
    }
}

#[tokio::test]
async fn a_pull_outlives_the_reader_that_began_it() {
    let (remote, pause) = (filled(SIZE), Pause::new());
    remote.add(Rule::on(Operation::Read).hold(&pause));
    let cached = open(Side::vector(SIZE), remote.clone(), quiet()).await;
    let first = reading(&cached, 0, 10);
    deadline(SOON, "the pull", pause.wait_held(1)).await;
    let second = reading(&cached, 10, 10);
    tokio::task::yield_now().await;
    first.abort();
    pause.release();
    fill::check(&joined(second).await.unwrap(), 10, 7).unwrap();
    assert_eq!(remote.count(Operation::Read), 1);
}

#[tokio::test]
async fn a_long_read_is_pulled_side_by_side() {
    let size = 5 << 20;
    let (remote, pause) = (filled(size), Pause::new());
    remote.add(Rule::on(Operation::Read).hold(&pause));
    let cached = open(Side::vector(size), remote.clone(), quiet()).await;
    let task = reading(&cached, 100, (size - 100) as usize);
    deadline(SOON, "five pulls at once", pause.wait_held(5)).await;
    pause.release();
    fill::check(&joined(task).await.unwrap(), 100, 7).unwrap();
}

#[tokio::test]
async fn a_demand_that_can_be_had_at_once_completes_in_its_first_poll() {
    // The testkit's store gives way once; a slice or memory does not. This one answers at once.
    let remote = lending(SIZE, Ready(7));
    let cached = open(Side::vector(SIZE), remote, quiet()).await;
    let mut buf = [0; 10];
    let polled = futures_util::FutureExt::now_or_never(cached.read_at(CHUNK - 5, &mut buf));
    polled.expect("no task, no waiting").unwrap();
    fill::check(&buf, CHUNK - 5, 7).unwrap();
}

/// A remote that lends its bytes without waiting.
struct Ready(u64);

#[async_trait::async_trait]
impl r3map_core::ReadPieces for Ready {
    // In pieces that begin and end anywhere, as they come out of a stream.
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, r3map_core::Piece<'p>) -> r3map_core::Result<()> + Send),
    ) -> r3map_core::Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let next = (at + 1 + at % 9973).min(end);
            visit(at, r3map_core::Piece::Data(&fill::bytes(at, (next - at) as usize, self.0)))?;
            at = next;
        }
        Ok(())
    }
}

#[tokio::test]
async fn pieces_of_any_length_are_put_together() {
    let cached = open(Side::vector(SIZE), lending(SIZE, Ready(3)), quiet()).await;
    fill::check(&read(&cached, 0, SIZE as usize).await, 0, 3).unwrap();
}

/// A remote that has lent everything, and never ends its reply.
struct Unending;

#[async_trait::async_trait]
impl r3map_core::ReadPieces for Unending {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, r3map_core::Piece<'p>) -> r3map_core::Result<()> + Send),
    ) -> r3map_core::Result<()> {
        visit(offset, r3map_core::Piece::Data(&fill::bytes(offset, len as usize, 7)))?;
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn everything_is_there_when_it_is_though_a_reply_has_not_ended() {
    let told: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = told.clone();
    let hooks =
        Hooks { on_chunk_local: Some(Arc::new(move |chunk| seen.lock().unwrap().push(chunk))), ..Hooks::default() };
    let parts = CachedParts { hooks, ..CachedParts::default() };
    let settings = background(fixed(3), 8 * CHUNK);
    let cached = Cached::open(Side::vector(SIZE), lending(SIZE, Unending), settings, parts).await.unwrap();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    assert!(cached.progress().borrow().pulled);
    fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
    let mut told = told.lock().unwrap().clone();
    told.sort_unstable();
    assert_eq!(told, (0..21).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_region_can_be_used_from_threads_outside_the_runtime() {
    let cached = open(Side::over(Arc::new(OnThreads(Store::new(SIZE)))), filled(SIZE), quiet()).await;
    let user = {
        let cached = cached.clone();
        move || {
            assert!(tokio::runtime::Handle::try_current().is_err());
            let mut bytes = [vec![0; SIZE as usize], vec![0; SIZE as usize]];
            // The first time it is pulled, and the second time it is local.
            for buf in &mut bytes {
                block_on(cached.read_at(0, buf))?;
            }
            block_on(cached.write_at(5, &[1; 5000]))?;
            block_on(cached.capabilities().write_zeroes.unwrap().write_zeroes(CHUNK, 5000))?;
            let mut visit = |_: u64, piece: r3map_core::Piece<'_>| -> r3map_core::Result<()> {
                assert!(piece == r3map_core::Piece::Data(&[1; 5000]));
                Ok(())
            };
            block_on(cached.capabilities().pieces.unwrap().read_pieces(5, 5000, &mut visit))?;
            block_on(cached.flush())?;
            block_on(cached.close()).map(|()| bytes)
        }
    };
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || ended.send(user()));
    for bytes in deadline(SOON, "its end", end).await.unwrap().unwrap() {
        fill::check(&bytes, 0, 7).unwrap();
    }
}

/// Bytes that are reached on tokio's threads, as those of a file are.
struct OnThreads(Store);

impl OnThreads {
    async fn hop() {
        tokio::task::spawn_blocking(|| {}).await.unwrap();
    }
}

#[async_trait::async_trait]
impl Backend for OnThreads {
    fn size(&self) -> u64 {
        SIZE
    }

    fn capabilities(&self) -> r3map_core::Capabilities<'_> {
        r3map_core::Capabilities { pieces: Some(self), ..Default::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> r3map_core::Result<()> {
        Self::hop().await;
        self.0.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> r3map_core::Result<()> {
        Self::hop().await;
        self.0.write_at(offset, buf).await
    }

    async fn flush(&self) -> r3map_core::Result<()> {
        Self::hop().await;
        self.0.flush().await
    }
}

#[async_trait::async_trait]
impl r3map_core::ReadPieces for OnThreads {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, r3map_core::Piece<'p>) -> r3map_core::Result<()> + Send),
    ) -> r3map_core::Result<()> {
        let mut bytes = vec![0; len as usize];
        self.read_at(offset, &mut bytes).await?;
        visit(offset, r3map_core::Piece::Data(&bytes))
    }
}

/// Polls a future on this thread, with no runtime around it.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park_timeout(Duration::from_secs(1)),
        }
    }
}

#[tokio::test]
async fn everything_is_pulled_once_in_the_background() {
    for workers in [Workers::Adaptive, fixed(1), fixed(5)] {
        let remote = filled(SIZE);
        let cached = open(Side::vector(SIZE), remote.clone(), background(workers, 4 * CHUNK)).await;
        deadline(SOON, "pulling", cached.pulled()).await.unwrap();
        assert_eq!(remote.bytes(Operation::Read), SIZE);
        assert!(remote.calls().iter().all(|call| call.len() <= 4 * CHUNK));
        let progress = cached.progress().borrow().clone();
        assert_eq!((progress.valid_bytes, progress.pulled_bytes, progress.pulled), (SIZE, SIZE, true));
        fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
        assert_eq!(remote.bytes(Operation::Read), SIZE);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fixed_workers_are_never_more() {
    let (remote, pause) = (filled(SIZE), Pause::new());
    remote.add(Rule::on(Operation::Read).hold(&pause));
    let cached = open(Side::vector(SIZE), remote.clone(), background(fixed(3), CHUNK)).await;
    deadline(SOON, "three pulls", pause.wait_held(3)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    pause.release();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    assert_eq!(remote.most_in_flight(), 3);
}

#[tokio::test]
async fn the_callers_order_is_kept() {
    let remote = filled(SIZE);
    let parts = CachedParts { priority: Priority::List([17, 3, 20].into()), urgent: vec![9], ..CachedParts::default() };
    let settings = background(fixed(1), CHUNK);
    let cached = Cached::open(Side::vector(SIZE), remote.clone(), settings, parts).await.unwrap();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    let order: Vec<u64> = remote.calls().iter().map(|call| call.ranges[0].start / CHUNK).collect();
    assert_eq!(order[..6], [9, 17, 3, 20, 0, 1]);
}

#[tokio::test]
async fn the_background_begins_when_it_may_and_demand_does_not_wait_for_that() {
    let (remote, begin) = (filled(SIZE), CancellationToken::new());
    let parts = CachedParts { pull_after: Some(begin.clone()), ..CachedParts::default() };
    let settings = background(fixed(3), CHUNK);
    let cached = Cached::open(Side::vector(SIZE), remote.clone(), settings, parts).await.unwrap();
    fill::check(&read(&cached, 5 * CHUNK, 10).await, 5 * CHUNK, 7).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(remote.count(Operation::Read), 1, "nothing but what was asked for");
    begin.cancel();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
}

#[tokio::test]
async fn chunks_far_apart_go_in_one_request_where_the_remote_can_do_that() {
    let list: Vec<u64> = (0..10).map(|chunk| chunk * 2).collect();
    let parts = || CachedParts { priority: Priority::List(list.clone().into()), ..CachedParts::default() };
    for bad in [None, Some(6 * CHUNK..6 * CHUNK + 1)] {
        let remote = filled(SIZE);
        if let Some(bad) = bad.clone() {
            remote.add(Rule::on(Operation::Read).touching(bad).times(3).fail(ErrorKind::Corrupt));
        }
        let mut settings = background(Workers::Adaptive, 16 * CHUNK);
        settings.pull.retry_pause = Duration::from_millis(1);
        let cached = Cached::open(Side::vector(SIZE), remote.clone(), settings, parts()).await.unwrap();
        while cached.pulled().await.is_err() {}
        fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
        let calls = remote.calls();
        assert!(calls.iter().any(|call| call.ranges.len() > 2), "{calls:?}");
        assert!(bad.is_some() || remote.bytes(Operation::Read) == SIZE);
    }
}

/// A remote that lends more than it was asked for, or something else.
struct Confused(u64, i64);

#[async_trait::async_trait]
impl r3map_core::ReadPieces for Confused {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, r3map_core::Piece<'p>) -> r3map_core::Result<()> + Send),
    ) -> r3map_core::Result<()> {
        visit(offset + self.0, r3map_core::Piece::Zeroes(len.saturating_add_signed(self.1)))
    }
}

#[tokio::test]
async fn a_remote_that_lends_other_bytes_than_asked_for_is_not_believed() {
    for confused in [Confused(0, 4096), Confused(4096, 0), Confused(0, -4096)] {
        let cached = open(Side::vector(SIZE), lending(SIZE, confused), quiet()).await;
        let error = joined(reading(&cached, 0, 10)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(!cached.is_local(&(CHUNK..CHUNK + 1)), "nothing was put where it does not belong");
    }
}

#[tokio::test(start_paused = true)]
async fn demand_does_not_queue_behind_the_background() {
    let size = 64 << 20;
    let delay = Duration::from_millis(40);
    let link = Link::new(Arc::new(Store::new(size).filled(7)), delay, Some(100 << 20));
    let cached = open(Side::vector(size), link, background(Workers::Adaptive, 1 << 20)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let far = size - CHUNK;
    assert!(!cached.is_local(&(far..size)));
    let before = tokio::time::Instant::now();
    read(&cached, far, 100).await;
    assert!(before.elapsed() < delay * 5, "{:?}", before.elapsed());
    assert!(!cached.is_local(&(0..size)), "the background was at work");
}

#[tokio::test(start_paused = true)]
async fn a_long_round_trip_costs_a_fast_link_little() {
    let size = 128 << 20;
    let delay = Duration::from_millis(40);
    let link = Link::new(Arc::new(Store::new(size).filled(7)), delay, Some(1 << 30));
    let before = tokio::time::Instant::now();
    let cached = open(Side::vector(size), link, background(Workers::Adaptive, 1 << 20)).await;
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    assert!(before.elapsed() < Duration::from_millis(125 + 7 * 40), "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_whole_block_write_does_not_wait_for_the_remote_and_a_pull_does_not_undo_it() {
    for local in [Side::vector(SIZE), Side::over(Arc::new(Store::new(SIZE)))] {
        let (remote, pause) = (filled(SIZE), Pause::new());
        remote.add(Rule::on(Operation::Read).hold_after(&pause));
        let cached = open(local, remote.clone(), quiet()).await;
        let reader = reading(&cached, 0, CHUNK as usize);
        deadline(SOON, "the pull", pause.wait_held(1)).await;
        joined(writing(&cached, 4096, vec![9; 8192])).await.unwrap();
        pause.release();
        joined(reader).await.unwrap();
        let buf = read(&cached, 0, CHUNK as usize).await;
        fill::check(&buf[..4096], 0, 7).unwrap();
        assert!(buf[4096..12288] == [9; 8192]);
        fill::check(&buf[12288..], 12288, 7).unwrap();
    }
}

#[tokio::test]
async fn a_partial_write_has_the_block_pulled_first() {
    let remote = filled(SIZE);
    let cached = open(Side::vector(SIZE), remote.clone(), quiet()).await;
    cached.write_at(4000, &[9; 200]).await.unwrap();
    let buf = read(&cached, 0, 8192).await;
    fill::check(&buf[..4000], 0, 7).unwrap();
    assert!(buf[4000..4200] == [9; 200]);
    fill::check(&buf[4200..], 4200, 7).unwrap();
    assert_eq!(remote.count(Operation::Read), 1);
}

#[tokio::test]
async fn each_chunk_is_told_of_once() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let sink = told.clone();
    let hooks =
        Hooks { on_chunk_local: Some(Arc::new(move |chunk| sink.lock().unwrap().push(chunk))), ..Hooks::default() };
    let parts = CachedParts { hooks, ..CachedParts::default() };
    let cached = Cached::open(Side::vector(SIZE), filled(SIZE), quiet(), parts).await.unwrap();
    read(&cached, 5, 10).await;
    cached.write_at(2 * CHUNK, &vec![1; CHUNK as usize]).await.unwrap();
    cached.write_at(3 * CHUNK, &[1; 4096]).await.unwrap();
    read(&cached, 0, SIZE as usize).await;
    let mut told = told.lock().unwrap().clone();
    assert_eq!(told[..2], [0, 2]);
    told.sort_unstable();
    assert_eq!(told, Vec::from_iter(0..21));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hook_that_panics_does_not_leave_anyone_waiting() {
    let hooks = Hooks { on_chunk_local: Some(Arc::new(|_| panic!("a bad hook"))), ..Hooks::default() };
    let parts = CachedParts { hooks, ..CachedParts::default() };
    let settings = background(fixed(1), CHUNK);
    let cached = Cached::open(Side::vector(SIZE), filled(SIZE), settings, parts).await.unwrap();
    // Also who asks when it has happened already.
    for _ in 0..2 {
        let error = deadline(SOON, "pulling", cached.pulled()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
    let mut buf = [0; 10];
    deadline(SOON, "a read of what is local", cached.read_at(0, &mut buf)).await.unwrap();
    fill::check(&buf, 0, 7).unwrap();
}

#[tokio::test]
async fn opening_a_tebibyte_takes_no_time_and_no_memory() {
    struct Endless;
    #[async_trait::async_trait]
    impl Backend for Endless {
        fn size(&self) -> u64 {
            1 << 40
        }
        async fn read_at(&self, _offset: u64, buf: &mut [u8]) -> r3map_core::Result<()> {
            buf.fill(0);
            Ok(())
        }
        async fn write_at(&self, _offset: u64, _buf: &[u8]) -> r3map_core::Result<()> {
            Ok(())
        }
        async fn flush(&self) -> r3map_core::Result<()> {
            Ok(())
        }
    }
    let before = std::time::Instant::now();
    let cached = open(Side::over(Arc::new(Endless)), Arc::new(Endless), quiet()).await;
    read(&cached, (1 << 40) - 10, 10).await;
    cached.write_at(1 << 39, &[1; 4096]).await.unwrap();
    cached.flush().await.unwrap();
    assert!(before.elapsed() < Duration::from_secs(10), "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_read_only_region_denies_writes() {
    let cached = open(Side::vector(SIZE), filled(SIZE), CachedSettings { read_only: true, ..quiet() }).await;
    assert_eq!(cached.write_at(0, &[1]).await.unwrap_err().kind(), ErrorKind::Denied);
    assert!(cached.capabilities().read_only && cached.capabilities().trim.is_none());
    cached.flush().await.unwrap();
    deadline(SOON, "closing", cached.close()).await.unwrap();
}

#[tokio::test]
async fn pulling_first_is_refused_where_nothing_pulls() {
    let cached = open(Side::vector(SIZE), filled(SIZE), quiet()).await;
    assert_eq!(cached.pulled().await.unwrap_err().kind(), ErrorKind::InvalidInput);
    read(&cached, 0, SIZE as usize).await;
    cached.pulled().await.unwrap();
}

#[tokio::test]
async fn sides_that_do_not_fit_are_refused() {
    let refused = async |local: Arc<Side>, remote: Store, settings: CachedSettings| {
        let parts = CachedParts::default();
        Cached::open(local, Arc::new(remote), settings, parts).await.unwrap_err().kind()
    };
    let chunk = |bytes| ChunkSize::new(bytes).unwrap();
    let mut kinds = vec![
        refused(Side::vector(SIZE - 1), Store::new(SIZE), quiet()).await,
        refused(Side::vector(SIZE), Store::new(SIZE).whole_chunks(chunk(1 << 20)), quiet()).await,
        refused(Side::vector(SIZE), Store::new(SIZE).max_request(4095), quiet()).await,
        refused(Side::over(Arc::new(Store::new(SIZE).read_only())), Store::new(SIZE), quiet()).await,
    ];
    let durability = crate::Durability::Local;
    kinds.push(refused(Side::vector(SIZE), Store::new(SIZE), CachedSettings { durability, ..quiet() }).await);
    for change in [
        |settings: &mut CachedSettings| settings.push.workers = Workers::Off,
        |settings: &mut CachedSettings| settings.push.interval = Duration::ZERO,
        |settings: &mut CachedSettings| settings.push.max_request = NonZeroU64::MIN,
    ] {
        let mut settings = quiet();
        change(&mut settings);
        kinds.push(refused(Side::vector(SIZE), Store::new(SIZE), settings).await);
    }
    assert!(kinds.iter().all(|kind| *kind == ErrorKind::InvalidInput), "{kinds:?}");
}

#[tokio::test]
async fn zeros_are_installed_as_zeros() {
    let remote = Store::new(SIZE);
    remote.write_at(3 * CHUNK, &[1; 10]).await.unwrap();
    let local = Side::vector(SIZE);
    let cached = open(local.clone(), Arc::new(remote), quiet()).await;
    let buf = read(&cached, 0, SIZE as usize).await;
    assert_eq!(buf.iter().filter(|byte| **byte == 1).count(), 10);
    let zeroed: u64 = local.zeroed.lock().unwrap().iter().map(|range| range.end - range.start).sum();
    assert!(zeroed >= SIZE - CHUNK, "all but one chunk");
}
