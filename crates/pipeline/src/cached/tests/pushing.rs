//! Rounds, flushes, back-pressure, and the end.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use r3map_core::{Backend, ChunkSize, ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};

use super::fakes::{SOON, flushing, joined, quiet, read, writing};
use super::{Side, open};
use crate::{Cached, CachedParts, CachedSettings, Hooks, Phase, PushSettings, Workers};

const BLOCK: u64 = 4096;
const SIZE: u64 = 300_001;

fn pushing(change: impl FnOnce(&mut PushSettings)) -> CachedSettings {
    let mut settings = quiet();
    change(&mut settings.push);
    settings
}

/// A store, faults around it, and a region in front of both.
async fn region(settings: CachedSettings) -> (Arc<Store>, Arc<Faults>, Arc<Cached>) {
    let store = Arc::new(Store::new(SIZE).filled(7));
    let remote = Faults::new(store.clone());
    let cached = open(Side::vector(SIZE), remote.clone(), settings).await;
    (store, remote, cached)
}

#[tokio::test]
async fn a_flush_pushes_runs_and_then_has_them_flushed() {
    let (store, remote, cached) = region(quiet()).await;
    cached.write_at(BLOCK, &vec![1; 8 * BLOCK as usize]).await.unwrap();
    cached.write_at(9 * BLOCK, &[2; 4096]).await.unwrap();
    cached.write_at(20 * BLOCK, &[3; 4096]).await.unwrap();
    assert_eq!(remote.calls(), [], "writes are local");
    joined(flushing(&cached)).await.unwrap();
    let calls: Vec<_> = remote.take_calls().iter().map(|call| (call.operation, call.len())).collect();
    let pushes = [(Operation::Write, 9 * BLOCK), (Operation::Write, BLOCK), (Operation::Flush, 0)];
    assert_eq!(calls, pushes);
    assert!(store.snapshot()[BLOCK as usize..][..8 * BLOCK as usize] == [1; 8 * 4096]);
    joined(flushing(&cached)).await.unwrap();
    assert_eq!(remote.calls(), [], "nothing to do");
}

#[tokio::test]
async fn a_write_during_its_push_is_not_lost() {
    let (store, remote, cached) = region(quiet()).await;
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Write).times(1).hold(&pause));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let flush = flushing(&cached);
    deadline(SOON, "the push", pause.wait_held(1)).await;
    joined(writing(&cached, 0, vec![2; 4096])).await.unwrap();
    pause.release();
    joined(flush).await.unwrap();
    assert_eq!(cached.progress().borrow().dirty_bytes, BLOCK);
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..4096] == [2; 4096]);
}

#[tokio::test]
async fn a_flush_that_is_dropped_loses_nothing() {
    let (store, remote, cached) = region(quiet()).await;
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Write).times(1).hold(&pause));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let flush = flushing(&cached);
    deadline(SOON, "the push", pause.wait_held(1)).await;
    flush.abort();
    assert!(flush.await.unwrap_err().is_cancelled());
    assert_eq!(cached.progress().borrow().pushing_bytes, 0);
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..4096] == [1; 4096]);
}

#[tokio::test]
async fn flushes_that_wait_for_one_another_become_one() {
    let (_store, remote, cached) = region(quiet()).await;
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Flush).times(1).hold(&pause));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let first = flushing(&cached);
    deadline(SOON, "the first flush", pause.wait_held(1)).await;
    cached.write_at(BLOCK, &[1; 4096]).await.unwrap();
    let others: Vec<_> = (0..5).map(|_| flushing(&cached)).collect();
    tokio::task::yield_now().await;
    pause.release();
    joined(first).await.unwrap();
    for other in others {
        joined(other).await.unwrap();
    }
    assert_eq!(remote.count(Operation::Flush), 2, "five in one");
    assert_eq!(cached.progress().borrow().dirty_bytes, 0);
}

#[tokio::test]
async fn intervals_may_be_endless() {
    let (store, _remote, cached) = region(pushing(|push| {
        push.interval = Duration::MAX;
        push.collect_interval = Duration::MAX;
    }))
    .await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..4096] == [1; 4096]);
    let side = Side::mapping(SIZE);
    let mapped = open(side.clone(), store.clone(), pushing(|push| push.collect_interval = Duration::MAX)).await;
    read(&mapped, 0, 10).await;
    side.poke(0, &[2]);
    tokio::task::yield_now().await;
    joined(flushing(&mapped)).await.unwrap();
    assert_eq!(store.snapshot()[0], 2);
}

#[tokio::test]
async fn what_a_failed_flush_may_have_lost_is_pushed_again() {
    let store = Arc::new(Store::new(SIZE).volatile_cache());
    let remote = Faults::new(store.clone());
    let cached = open(Side::vector(SIZE), remote.clone(), quiet()).await;
    remote.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Unavailable));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    assert_eq!(joined(flushing(&cached)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    store.lose_unflushed();
    assert_eq!(cached.progress().borrow().dirty_bytes, BLOCK);
    joined(flushing(&cached)).await.unwrap();
    store.lose_unflushed();
    assert!(store.snapshot()[..4096] == [1; 4096]);
}

#[tokio::test]
async fn a_remote_that_was_replaced_is_written_again_in_the_same_flush() {
    let (store, remote, cached) = region(quiet()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    remote.add(Rule::on(Operation::Flush).times(2).fail(ErrorKind::Conflict));
    joined(flushing(&cached)).await.unwrap();
    assert_eq!((remote.count(Operation::Write), remote.count(Operation::Flush)), (3, 3));
    assert!(store.snapshot()[..4096] == [1; 4096]);
    cached.write_at(0, &[2; 4096]).await.unwrap();
    remote.add(Rule::on(Operation::Flush).fail(ErrorKind::Conflict));
    let error = joined(flushing(&cached)).await.unwrap_err();
    assert_eq!((error.kind(), cached.progress().borrow().dirty_bytes), (ErrorKind::Conflict, BLOCK));
}

#[tokio::test]
async fn one_bad_run_does_not_keep_the_others_back() {
    let (store, remote, cached) = region(quiet()).await;
    remote.add(Rule::on(Operation::Write).touching(0..BLOCK).fail(ErrorKind::Exhausted));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    cached.write_at(5 * BLOCK, &[1; 4096]).await.unwrap();
    assert_eq!(joined(flushing(&cached)).await.unwrap_err().kind(), ErrorKind::Exhausted);
    assert!(store.snapshot()[5 * 4096..6 * 4096] == [1; 4096]);
    assert_eq!(cached.progress().borrow().dirty_bytes, BLOCK);
}

#[tokio::test(start_paused = true)]
async fn what_is_dirty_is_pushed_and_flushed_at_every_interval() {
    let (store, remote, cached) = region(pushing(|push| push.interval = Duration::from_secs(20))).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(19)).await;
    assert_eq!(remote.calls(), []);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((remote.count(Operation::Write), remote.count(Operation::Flush)), (1, 1));
    assert!(store.snapshot()[..4096] == [1; 4096]);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!((remote.count(Operation::Write), remote.count(Operation::Flush)), (1, 1), "nothing to do");
}

#[tokio::test(start_paused = true)]
async fn writers_are_slowed_and_not_failed_when_the_budget_is_used_up() {
    let budget = NonZeroU64::new(4 * BLOCK).unwrap();
    let (store, remote, cached) = region(pushing(|push| push.dirty_budget = budget)).await;
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Write).hold(&pause));
    for block in 0..4 {
        deadline(SOON, "a write within the budget", cached.write_at(block * BLOCK, &[1; 4096])).await.unwrap();
    }
    let slow = writing(&cached, 4 * BLOCK, vec![1; 4096]);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(!slow.is_finished());
    pause.release();
    joined(slow).await.unwrap();
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..5 * 4096] == [1; 5 * 4096]);
}

#[tokio::test(start_paused = true)]
async fn a_remote_that_is_away_only_slows_writers() {
    let budget = NonZeroU64::new(4 * BLOCK).unwrap();
    let (store, remote, cached) = region(pushing(|push| push.dirty_budget = budget)).await;
    remote.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    let writes: Vec<_> = (0..20).map(|block| writing(&cached, block * BLOCK, vec![1; 4096])).collect();
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(joined(flushing(&cached)).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let error = cached.progress().borrow().last_error.clone();
    assert_eq!(error.unwrap().kind(), ErrorKind::Unavailable);
    remote.clear();
    for write in writes {
        deadline(10 * SOON, "a write", write).await.unwrap().unwrap();
    }
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..20 * 4096] == [1; 20 * 4096]);
}

#[tokio::test]
async fn fixed_workers_push_that_many_at_once() {
    let (store, remote, cached) = region(pushing(|push| {
        push.workers = Workers::Fixed(NonZeroUsize::new(2).unwrap());
        push.max_request = NonZeroU64::new(BLOCK).unwrap();
    }))
    .await;
    cached.write_at(0, &[1; 10 * 4096]).await.unwrap();
    joined(flushing(&cached)).await.unwrap();
    assert_eq!((remote.most_in_flight(), remote.count(Operation::Write)), (2, 10));
    assert!(store.snapshot()[..10 * 4096] == [1; 10 * 4096]);
}

#[tokio::test]
async fn a_remote_of_whole_chunks_gets_whole_chunks() {
    let chunk = ChunkSize::new(16 << 10).unwrap();
    let store = Arc::new(Store::new(SIZE).filled(7).plain().whole_chunks(chunk));
    let remote = Faults::new(store.clone());
    let cached = open(Side::vector(SIZE), remote.clone(), quiet()).await;
    cached.write_at(BLOCK, &[1; 4096]).await.unwrap();
    cached.write_at(SIZE - 1, &[2]).await.unwrap();
    joined(flushing(&cached)).await.unwrap();
    let there = store.snapshot();
    fill::check(&there[..4096], 0, 7).unwrap();
    assert!(there[4096..8192] == [1; 4096] && there[SIZE as usize - 1] == 2);
    fill::check(&there[8192..SIZE as usize - 1], 8192, 7).unwrap();
}

#[tokio::test]
async fn zeros_are_not_sent() {
    let (store, remote, cached) = region(quiet()).await;
    let able = cached.capabilities();
    able.write_zeroes.unwrap().write_zeroes(100, 50_000).await.unwrap();
    able.trim.unwrap().trim(100_000, 100_000).await.unwrap();
    assert!(read(&cached, 100, 50_000).await.iter().all(|byte| *byte == 0));
    joined(flushing(&cached)).await.unwrap();
    let there = store.snapshot();
    assert!(there[100..50_100].iter().chain(&there[100_000..200_000]).all(|byte| *byte == 0));
    fill::check(&there[50_100..100_000], 50_100, 7).unwrap();
    assert!(remote.count(Operation::WriteZeroes) > 0);
}

#[tokio::test]
async fn closing_stores_everything_and_ends_the_region() {
    let (store, remote, cached) = region(quiet()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    deadline(SOON, "closing", cached.close()).await.unwrap();
    assert!(store.snapshot()[..4096] == [1; 4096]);
    assert_eq!(remote.count(Operation::Flush), 1);
    assert_eq!(cached.progress().borrow().phase, Phase::Closed);
    deadline(SOON, "closing again", cached.close()).await.unwrap();
    let kinds = [
        cached.read_at(0, &mut [0]).await.unwrap_err().kind(),
        cached.write_at(0, &[0]).await.unwrap_err().kind(),
        cached.flush().await.unwrap_err().kind(),
        cached.demand(0..1).await.unwrap_err().kind(),
    ];
    assert_eq!(kinds, [ErrorKind::Cancelled; 4]);
    cached.abandon();
    assert_eq!(cached.progress().borrow().phase, Phase::Closed, "closed is closed");
}

#[tokio::test]
async fn a_close_that_fails_can_be_called_again() {
    let (store, remote, cached) = region(quiet()).await;
    cached.write_at(0, &[1; 4096]).await.unwrap();
    remote.add(Rule::on(Operation::Write).times(1).fail(ErrorKind::Unavailable));
    assert_eq!(cached.close().await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(cached.write_at(0, &[2]).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(read(&cached, 0, 4096).await == [1; 4096], "it can be read until it is closed");
    deadline(SOON, "closing again", cached.close()).await.unwrap();
    assert!(store.snapshot()[..4096] == [1; 4096]);
}

#[tokio::test]
async fn a_close_waits_for_writes_that_have_begun() {
    let store = Arc::new(Store::new(SIZE));
    let (bytes, pause) = (Faults::new(Arc::new(Store::new(SIZE))), Pause::new());
    bytes.add(Rule::on(Operation::Write).hold(&pause));
    let cached = open(Side::over(bytes), store.clone(), quiet()).await;
    let write = writing(&cached, 0, vec![1; 4096]);
    deadline(SOON, "the write", pause.wait_held(1)).await;
    let close = tokio::spawn({
        let cached = cached.clone();
        async move { cached.close().await }
    });
    tokio::task::yield_now().await;
    assert!(!close.is_finished());
    pause.release();
    joined(write).await.unwrap();
    joined(close).await.unwrap();
    assert!(store.snapshot()[..4096] == [1; 4096], "what was acknowledged is stored");
}

#[tokio::test]
async fn giving_up_ends_everything_that_waits() {
    let (_store, remote, cached) = region(pushing(|push| push.dirty_budget = NonZeroU64::MIN)).await;
    let pause = Pause::new();
    remote.add(Rule::any().hold(&pause));
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let calls = [writing(&cached, BLOCK, vec![1; 4096]), flushing(&cached)];
    let read = super::fakes::reading(&cached, 20 * BLOCK, 10);
    deadline(SOON, "the remote", pause.wait_held(2)).await;
    let close = tokio::spawn({
        let cached = cached.clone();
        async move { cached.close().await }
    });
    tokio::task::yield_now().await;
    cached.abandon();
    for call in calls {
        assert_eq!(joined(call).await.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(joined(read).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(joined(close).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(cached.progress().borrow().phase, Phase::Abandoned);
    deadline(SOON, "the remote's calls are dropped", remote.wait_idle()).await;
}

#[tokio::test]
async fn hooks_come_at_their_time_and_may_write() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let cell: Arc<std::sync::OnceLock<std::sync::Weak<Cached>>> = Arc::default();
    let hook = |name: &'static str, byte: u8| -> crate::Hook {
        let (told, cell) = (told.clone(), cell.clone());
        Arc::new(move || {
            told.lock().unwrap().push(name);
            let cached = cell.get().unwrap().upgrade().unwrap();
            Box::pin(async move { cached.write_at(0, &[byte; 4096]).await })
        })
    };
    let hooks =
        Hooks { on_before_flush: Some(hook("flush", 5)), on_before_close: Some(hook("close", 6)), ..Hooks::default() };
    let store = Arc::new(Store::new(SIZE));
    let parts = CachedParts { hooks, ..CachedParts::default() };
    let cached = Cached::open(Side::vector(SIZE), store.clone(), quiet(), parts).await.unwrap();
    cell.set(Arc::downgrade(&cached)).unwrap();
    joined(flushing(&cached)).await.unwrap();
    assert!(store.snapshot()[..4096] == [5; 4096], "what the hook writes is flushed");
    deadline(SOON, "closing", cached.close()).await.unwrap();
    assert_eq!(*told.lock().unwrap(), ["flush", "close", "flush"]);
}

#[tokio::test]
async fn a_hook_that_fails_fails_the_call() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let failing: crate::Hook = Arc::new(move || {
        let call = counter.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            let error = r3map_core::Error::new(ErrorKind::Conflict, Operation::Close, "not now");
            if call == 0 { Err(error) } else { Ok(()) }
        })
    });
    let parts =
        CachedParts { hooks: Hooks { on_before_close: Some(failing), ..Hooks::default() }, ..CachedParts::default() };
    let store = Arc::new(Store::new(SIZE));
    let cached = Cached::open(Side::vector(SIZE), store.clone(), quiet(), parts).await.unwrap();
    cached.write_at(0, &[1]).await.unwrap();
    let refused = deadline(SOON, "closing", cached.close()).await.unwrap_err();
    assert!(refused.kind() == ErrorKind::Conflict && refused.to_string().contains("not now"), "{refused}");
    assert_eq!(store.snapshot()[..2], [1, 0], "it is stored all the same");
    cached.write_at(1, &[2]).await.unwrap();
    deadline(SOON, "closing", cached.close()).await.unwrap();
    assert_eq!(store.snapshot()[..2], [1, 2]);
    assert_eq!(calls.load(Ordering::SeqCst), 2);
}

/// Whoever closes is to hear of the hook that does not let it, and only then of what its own writers have done meanwhile.
#[tokio::test]
async fn a_hook_that_fails_is_told_of_also_where_not_everything_was_stored() {
    let failing: crate::Hook =
        Arc::new(|| Box::pin(async { Err(r3map_core::Error::new(ErrorKind::Denied, Operation::Close, "not now")) }));
    let parts =
        CachedParts { hooks: Hooks { on_before_close: Some(failing), ..Hooks::default() }, ..CachedParts::default() };
    let store = Arc::new(Store::new(SIZE));
    let remote = Faults::new(store.clone());
    let cached = Cached::open(Side::vector(SIZE), remote.clone(), quiet(), parts).await.unwrap();
    cached.write_at(0, &[1; 4096]).await.unwrap();
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Flush).times(1).hold(&pause));
    let closing = tokio::spawn({
        let cached = cached.clone();
        async move { cached.close().await }
    });
    deadline(SOON, "storing", pause.wait_held(1)).await;
    joined(writing(&cached, BLOCK, vec![2; 4096])).await.unwrap();
    pause.release();
    let refused = joined(closing).await.unwrap_err();
    assert_eq!((refused.kind(), refused.operation()), (ErrorKind::Denied, Operation::Close));
    assert!(refused.message().starts_with("not now; besides: 4096 bytes were written"), "{refused}");
    joined(flushing(&cached)).await.unwrap();
    assert_eq!(store.snapshot()[4096..4098], [2, 2], "the region goes on");
}
