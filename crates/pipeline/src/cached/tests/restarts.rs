//! What a record and a mapping are for: regions that go on where another one ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use r3map_core::{Backend, ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};

use super::fakes::{Record, SOON, flushing, joined, quiet, read};
use super::{Side, open};
use crate::{Cached, CachedParts, CachedSettings, Durability, Recorded};

const SIZE: u64 = 300_001;
async fn recorded(
    local: &Arc<Side>,
    remote: &Arc<Faults>,
    record: &Arc<Record>,
    settings: CachedSettings,
) -> r3map_core::Result<Arc<Cached>> {
    let parts = CachedParts { record: Some(record.clone()), ..CachedParts::default() };
    Cached::open(local.clone(), remote.clone(), settings, parts).await
}

#[tokio::test]
async fn a_restart_neither_pulls_again_nor_loses_what_was_flushed_locally() {
    let store = Arc::new(Store::new(SIZE).filled(3));
    let (remote, local, record) = (Faults::new(store.clone()), Side::vector(SIZE), Arc::new(Record::default()));
    let settings = CachedSettings { durability: Durability::Local, ..quiet() };

    let first = recorded(&local, &remote, &record, settings.clone()).await.unwrap();
    read(&first, 0, 1).await;
    first.write_at(5000, &[9; 100]).await.unwrap();
    first.write_at(200_000, &[8; 8192]).await.unwrap();
    remote.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    first.flush().await.unwrap();
    assert!(record.checkpoints.load(Ordering::SeqCst) > 0);
    assert_eq!((record.state(0), record.state(1)), (Some(Recorded::Clean), Some(Recorded::Dirty)));
    drop(first);

    remote.clear();
    let _before = remote.take_calls();
    let second = recorded(&local, &remote, &record, settings).await.unwrap();
    assert_eq!(read(&second, 5000, 100).await, [9; 100]);
    assert_eq!(remote.count(Operation::Read), 0, "what was valid is valid");
    deadline(SOON, "closing", second.close()).await.unwrap();
    let there = store.snapshot();
    assert!(there[5000..5100] == [9; 100] && there[200_000..208_192] == [8; 8192]);
    assert_eq!(fill::check(&there[..5000], 0, 3), Ok(()));
    assert_eq!(record.state(1), Some(Recorded::Clean));
}

#[tokio::test]
async fn a_block_is_recorded_dirty_before_its_bytes_change_and_clean_after_the_remote_flushed_it() {
    let remote = Faults::new(Arc::new(Store::new(SIZE).filled(3)));
    let (local, record) = (Side::vector(SIZE), Arc::new(Record::default()));
    let cached = recorded(&local, &remote, &record, quiet()).await.unwrap();
    read(&cached, 0, 1).await;
    cached.write_at(10, &[1]).await.unwrap();
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Flush).hold(&pause));
    let flush = flushing(&cached);
    deadline(SOON, "the remote's flush", pause.wait_held(1)).await;
    assert_eq!(record.state(0), Some(Recorded::Dirty), "pushed is not flushed");
    pause.release();
    joined(flush).await.unwrap();
    assert_eq!(record.state(0), Some(Recorded::Clean));
}

#[tokio::test]
async fn a_read_only_region_does_not_hide_writes_that_were_never_pushed() {
    let remote = Faults::new(Arc::new(Store::new(SIZE)));
    let (local, record) = (Side::vector(SIZE), Arc::new(Record::default()));
    let first = recorded(&local, &remote, &record, quiet()).await.unwrap();
    first.write_at(0, &[1; 4096]).await.unwrap();
    first.abandon();
    let settings = CachedSettings { read_only: true, ..quiet() };
    let error = recorded(&local, &remote, &record, settings).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn a_read_only_region_remembers_what_it_pulled() {
    let remote = Faults::new(Arc::new(Store::new(SIZE).filled(3)));
    let (local, record) = (Side::vector(SIZE), Arc::new(Record::default()));
    let settings = CachedSettings { read_only: true, ..quiet() };
    let cached = recorded(&local, &remote, &record, settings).await.unwrap();
    read(&cached, 0, 1).await;
    deadline(SOON, "closing", cached.close()).await.unwrap();
    assert_eq!((record.state(0), record.checkpoints.load(Ordering::SeqCst)), (Some(Recorded::Clean), 1));
}

#[tokio::test]
async fn writes_through_a_mapping_are_found_and_pushed() {
    let store = Arc::new(Store::new(SIZE).filled(3));
    let local = Side::mapping(SIZE);
    let cached = open(local.clone(), store.clone(), quiet()).await;
    read(&cached, 0, SIZE as usize).await;
    local.poke(70_000, &[5; 10]);
    local.poke(SIZE - 1, &[6]);
    cached.flush().await.unwrap();
    assert_eq!((store.snapshot()[70_009], store.snapshot()[SIZE as usize - 1]), (5, 6));
    local.poke(0, &[7]);
    deadline(SOON, "closing", cached.close()).await.unwrap();
    assert_eq!(store.snapshot()[0], 7);
    assert_eq!(fill::check(&store.snapshot()[1..70_000], 1, 3), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn writes_through_a_mapping_are_pushed_when_they_use_up_the_budget() {
    let store = Arc::new(Store::new(SIZE));
    let local = Side::mapping(SIZE);
    let mut settings = quiet();
    settings.push.dirty_budget = std::num::NonZeroU64::new(8192).unwrap();
    let cached = open(local.clone(), store.clone(), settings).await;
    read(&cached, 0, SIZE as usize).await;
    local.poke(0, &[1; 40_000]);
    let mut progress = cached.progress();
    let pushed = progress.wait_for(|progress| progress.pushed_bytes >= 40_000);
    deadline(SOON, "noticing", pushed).await.unwrap();
    assert!(store.snapshot()[..40_000] == [1; 40_000]);
}
