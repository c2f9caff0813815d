//! What the tests share.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, ChunkSize};
use r3map_local::Memory;
use r3map_slice::{Slice, SliceParts, SliceSettings};
use r3map_testkit::{crash, fill};

pub(crate) const PAGE: usize = 4096;
pub(crate) const CHUNK: usize = 64 << 10;
pub(crate) const LIMIT: Duration = Duration::from_secs(120);
pub(crate) const SIGBUS: i32 = 7;
pub(crate) const SEED: u64 = 7;

/// Memory that holds position-dependent bytes.
pub(crate) fn filled(size: usize) -> Arc<Memory> {
    let memory = Memory::new(size as u64).unwrap();
    for start in (0..size).step_by(1 << 20) {
        let bytes = fill::bytes(start as u64, (size - start).min(1 << 20), SEED);
        memory.write_now(start as u64, &bytes).unwrap();
    }
    Arc::new(memory)
}

/// What a region in memory holds.
pub(crate) fn contents(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.size()).unwrap()];
    memory.read_now(0, &mut bytes).unwrap();
    bytes
}

/// A managed slice that pushes and collects all the time.
pub(crate) fn busy() -> SliceSettings {
    let mut settings = SliceSettings::default();
    settings.region.push.interval = Duration::from_millis(3);
    settings.region.push.collect_interval = Duration::from_millis(1);
    settings
}

pub(crate) fn with_chunks(mut settings: SliceSettings, bytes: usize) -> SliceSettings {
    settings.region.chunk_size = ChunkSize::new(bytes as u64).unwrap();
    settings
}

pub(crate) fn open(remote: Arc<dyn Backend>, settings: SliceSettings) -> Slice {
    Slice::open(remote, settings, SliceParts::default()).unwrap()
}

/// Says where two regions differ first, instead of printing both.
pub(crate) fn assert_same(found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len());
    if found != expected {
        let at = found.iter().zip(expected).position(|(found, expected)| found != expected).unwrap();
        panic!("byte {at} is {} and should be {}", found[at], expected[at]);
    }
}

/// Runs `body` in a process of its own; how that ended. `test` is the path of the calling test.
pub(crate) fn in_child(test: &str, body: impl FnOnce()) -> ExitStatus {
    if crash::role("child").is_some() {
        body();
        std::process::exit(0);
    }
    crash::child(test, "child", "").wait(LIMIT)
}

#[track_caller]
pub(crate) fn assert_killed_by(signal: i32, status: ExitStatus) {
    assert_eq!(status.signal(), Some(signal), "the child ended with {status}");
}

/// Waits for a condition that other threads bring about.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
