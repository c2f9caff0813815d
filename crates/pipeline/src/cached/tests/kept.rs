//! Regions whose writes stay here, as after a migration: the remote only has what is missing.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, ChunkSize, Operation};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::fill;
use r3map_testkit::store::Store;

use super::Side;
use crate::{BlockSet, Cached, CachedParts, CachedSettings, PullSettings, Workers, Writes};

/// One block after another.
fn kept() -> CachedSettings {
    let pull = PullSettings {
        workers: Workers::Fixed(NonZeroUsize::MIN),
        max_request: NonZeroU64::MIN,
        ..PullSettings::default()
    };
    CachedSettings { chunk_size: ChunkSize::MIN, pull, writes: Writes::Kept, ..CachedSettings::default() }
}

fn store(seed: u64) -> Arc<Store> {
    Arc::new(Store::new(10 * 4096 + 5).filled(seed))
}

async fn open(remote: Arc<dyn Backend>, local: Arc<Store>, present: BlockSet) -> Arc<Cached> {
    let parts = CachedParts { present, ..CachedParts::default() };
    Cached::open(Side::over(local), remote, kept(), parts).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn nothing_is_ever_written_to_the_remote() {
    let faults = Faults::new(Arc::new(Store::new(10 * 4096 + 5).filled(1).read_only()));
    let region = open(faults.clone(), store(2), BlockSet::default()).await;
    assert!(!region.capabilities().read_only, "that the remote is read-only does not matter");
    region.write_at(4000, &[7; 5000]).await.unwrap();
    region.flush().await.unwrap();
    region.pulled().await.unwrap();
    tokio::time::sleep(Duration::from_secs(120)).await;
    region.close().await.unwrap();
    assert_eq!((faults.count(Operation::Write), faults.count(Operation::Flush)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_present_is_not_pulled_and_the_rest_is() {
    let faults = Faults::new(store(1));
    let mut present = BlockSet::default();
    [0..3, 10..11].into_iter().for_each(|run| present.insert(run));
    let region = open(faults.clone(), store(2), present.clone()).await;
    assert_eq!(region.local_blocks(), present);
    region.pulled().await.unwrap();
    assert_eq!(faults.bytes(Operation::Read), 7 * 4096);
    let mut bytes = vec![0; 10 * 4096 + 5];
    region.read_at(0, &mut bytes).await.unwrap();
    fill::check(&bytes[..3 * 4096], 0, 2).unwrap();
    fill::check(&bytes[3 * 4096..10 * 4096], 3 * 4096, 1).unwrap();
    fill::check(&bytes[10 * 4096..], 10 * 4096, 2).unwrap();
    let mut beyond = BlockSet::default();
    beyond.insert(11..12);
    let parts = CachedParts { present: beyond, ..CachedParts::default() };
    assert!(Cached::open(Side::over(store(2)), store(1), kept(), parts).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn after_it_was_abandoned_nothing_more_is_put_in_place() {
    let faults = Faults::new(store(1));
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Read).after(2).hold(&pause));
    let local = store(2);
    let region = open(faults.clone(), local.clone(), BlockSet::default()).await;
    pause.wait_held(1).await;
    region.abandoned().await;
    let (known, before) = (region.local_blocks(), local.snapshot());
    pause.release();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(local.snapshot() == before);
    let whole = usize::try_from(known.len()).unwrap() * 4096;
    let pulled = before.chunks(4096).zip(0..).filter(|(bytes, at)| fill::check(bytes, at * 4096, 1).is_ok());
    assert_eq!(pulled.map(|(bytes, _)| bytes.len()).sum::<usize>(), whole);
}
