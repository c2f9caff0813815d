//! The contract and the model, over every kind of remote and local side.

use std::num::NonZeroUsize;
use std::sync::Arc;

use r3map_core::{Backend, ChunkSize};
use r3map_testkit::store::Store;
use r3map_testkit::{conformance, model};

use super::{Side, open};
use crate::{CachedSettings, PullSettings, Workers};

const SIZE: u64 = 300_001;

fn chunks(bytes: u64) -> CachedSettings {
    CachedSettings { chunk_size: ChunkSize::new(bytes).unwrap(), ..CachedSettings::default() }
}

fn on_demand(settings: CachedSettings) -> CachedSettings {
    CachedSettings { pull: PullSettings { workers: Workers::Off, ..settings.pull.clone() }, ..settings }
}

/// Every combination that takes another way through the code.
async fn combination(index: usize, remote: Store) -> Arc<dyn Backend> {
    let local = match index & 1 {
        0 => Side::vector(remote.size()),
        _ => Side::over(Arc::new(Store::new(remote.size()))),
    };
    let settings = chunks(16 << 10);
    let settings = match index >> 1 & 3 {
        0 => settings,
        1 => on_demand(settings),
        _ => CachedSettings {
            pull: PullSettings { workers: Workers::Fixed(NonZeroUsize::MIN), ..PullSettings::default() },
            ..settings
        },
    };
    let remote = match index >> 3 {
        0 => remote,
        1 => remote.plain(),
        2 => remote.whole_chunks(ChunkSize::new(8192).unwrap()),
        _ => remote.max_request(12_288),
    };
    open(local, Arc::new(remote), settings).await
}

#[tokio::test]
async fn keeps_the_contract_over_an_empty_remote() {
    for index in (0..32).filter(|index| index & 6 != 6) {
        conformance::backend(async || combination(index, Store::new(SIZE)).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract_over_a_full_remote() {
    for index in (0..32).filter(|index| index & 6 != 6) {
        conformance::filled(async || combination(index, Store::new(SIZE).filled(7)).await, 7).await;
    }
}

#[tokio::test]
async fn a_read_only_remote_makes_a_read_only_region() {
    let remote = || Store::new(SIZE).filled(7).read_only();
    conformance::filled(async || combination(0, remote()).await, 7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agrees_with_a_model() {
    for index in (0..32).filter(|index| index & 6 != 6) {
        let settings = model::Settings { runs: 2, ..model::Settings::default() };
        model::check(async || combination(index, Store::new(SIZE)).await, settings).await;
    }
}
