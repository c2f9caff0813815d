//! Memory against the contract.

use std::sync::Arc;

use r3map_local::{Memory, Stored};
use r3map_testkit::{conformance, model};

#[tokio::test]
async fn keeps_the_contract() {
    for size in [1, 4096, 300_001] {
        conformance::backend(async || Arc::new(Memory::new(size).unwrap()) as _).await;
    }
    let stored = async || Arc::new(Stored::memory(Arc::new(Memory::new(200_001).unwrap()))) as _;
    conformance::backend(stored).await;
}

#[tokio::test]
async fn agrees_with_the_model() {
    for size in [4095, 65536, 300_001] {
        model::check(async || Arc::new(Memory::new(size).unwrap()) as _, model::Settings::default()).await;
    }
}
