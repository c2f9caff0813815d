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

/// What this process has in memory, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = status.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_sparse_region_takes_little_more_than_what_is_in_it() {
    const PAGE: u64 = 64 << 10;
    let memory = Memory::new(1 << 40).unwrap();
    let before = resident();
    let touched = 1000;
    for at in 0..touched {
        memory.write_now(at * 977 * PAGE, &[1; 64 << 10]).unwrap();
    }
    let taken = resident() - before;
    // Twice the bytes, and the tables of 1000 places.
    assert!(taken < touched * (2 * PAGE + (32 << 10)), "{taken} bytes");
    memory.trim_now(0, 1 << 40).unwrap();
    assert!(resident() - before < taken / 2);
}
