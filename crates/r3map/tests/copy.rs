//! Copying: every byte, holes as holes, and only what differs if asked.

use std::sync::Arc;

use r3map::{Backend, ChunkSize, CopyProgress, CopySettings, ErrorKind, Operation, copy};
use r3map_core::Result;
use r3map_local::Memory;
use r3map_testkit::faults::{Faults, Rule};
use r3map_testkit::fill;
use r3map_testkit::store::Store;

const SIZE: u64 = (5 << 20) + 77;
const SKIP_SAME: fn() -> CopySettings = || CopySettings { skip_same: true, ..CopySettings::default() };

async fn run(source: Arc<dyn Backend>, destination: Arc<dyn Backend>, settings: CopySettings) -> Result<CopyProgress> {
    // On a thread of the runtime's, as it may be.
    tokio::spawn(copy(source, destination, settings, |_| {})).await.unwrap()
}

/// Data in two places, nothing elsewhere.
async fn sparse() -> Arc<Memory> {
    let memory = Arc::new(Memory::new(SIZE).unwrap());
    for offset in [0, 3 << 20] {
        memory.write_at(offset, &fill::bytes(offset, 300_000, 7)).await.unwrap();
    }
    memory
}

async fn bytes(backend: &dyn Backend) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(backend.size()).unwrap()];
    backend.read_at(0, &mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn every_byte_arrives_and_holes_stay_holes() {
    let (source, destination) = (sparse().await, Arc::new(Memory::new(SIZE).unwrap()));
    let writes = Faults::new(destination.clone());
    let done = run(source.clone(), writes.clone(), CopySettings::default()).await.unwrap();
    assert_eq!((done.size, done.done), (SIZE, SIZE));
    assert_eq!(done.written + done.zeroes, SIZE);
    assert!(writes.bytes(Operation::Write) < 2 << 20, "holes were written: {done:?}");
    assert_eq!(writes.count(Operation::Flush), 1);
    assert!(bytes(&*source).await == bytes(&*destination).await);
}

/// A round trip for each piece would take for ever.
#[tokio::test]
async fn what_is_in_many_pieces_takes_few_requests_and_stays_in_pieces() {
    let (source, destination) = (Arc::new(Store::new(SIZE)), Arc::new(Store::new(SIZE)));
    for offset in (0..SIZE).step_by(12 << 10) {
        let len = 4096.min(SIZE - offset);
        source.write_at(offset, &fill::bytes(offset, usize::try_from(len).unwrap(), 5)).await.unwrap();
    }
    let requests = Faults::new(source.clone());
    let written = run(requests.clone(), destination.clone(), CopySettings::default()).await.unwrap();
    assert!(source.snapshot() == destination.snapshot());
    let extents = async |of: &Store| of.capabilities().extents.unwrap().extents(0, SIZE).await.unwrap();
    assert!(extents(&source).await == extents(&destination).await, "holes are no holes any more");
    assert_eq!((requests.count(Operation::Extents), requests.count(Operation::Read)), (1, 5));
    assert_eq!(written.written + written.zeroes, SIZE);

    destination.write_at(4096, b"neither data nor hole").await.unwrap();
    destination.write_at((12 << 10) + 5, b"other data").await.unwrap();
    let changes = Faults::new(destination.clone());
    let mended = run(source.clone(), changes.clone(), SKIP_SAME()).await.unwrap();
    assert!(source.snapshot() == destination.snapshot());
    assert_eq!((mended.written, mended.done), (4096, SIZE));
    let counts = [Operation::Write, Operation::WriteZeroes].map(|operation| changes.count(operation));
    assert_eq!(counts, [1, 1]);
}

#[tokio::test]
async fn what_was_there_before_is_replaced_by_holes_too() {
    for destination in [Store::new(SIZE).filled(3), Store::new(SIZE).filled(3).plain()] {
        let (source, destination) = (sparse().await, Arc::new(destination));
        for settings in [CopySettings::default(), SKIP_SAME()] {
            run(source.clone(), destination.clone(), settings).await.unwrap();
            assert!(bytes(&*source).await == destination.snapshot());
        }
    }
}

#[tokio::test]
async fn only_what_differs_is_written_if_asked() {
    let source = Arc::new(Store::new(SIZE).filled(1).plain());
    let destination = Arc::new(Store::new(SIZE).filled(1).plain());
    destination.write_at((2 << 20) + 5, b"another").await.unwrap();
    let done = run(source.clone(), destination.clone(), SKIP_SAME()).await.unwrap();
    assert_eq!((done.written, done.same), (1 << 20, SIZE - (1 << 20)));
    assert!(source.snapshot() == destination.snapshot());
}

#[tokio::test]
async fn takes_sides_that_know_only_whole_chunks_or_short_requests() {
    let chunk = ChunkSize::new(1 << 16).unwrap();
    let source = Arc::new(Store::new(SIZE).filled(1).whole_chunks(chunk).max_request(chunk.bytes()));
    let destination = Arc::new(Store::new(SIZE).whole_chunks(ChunkSize::new(1 << 22).unwrap()));
    run(source.clone(), destination.clone(), CopySettings::default()).await.unwrap();
    assert!(source.snapshot() == destination.snapshot());
}

#[tokio::test]
async fn a_failure_on_either_side_is_a_failure_of_the_copy() {
    for (operation, at_source) in [(Operation::Read, true), (Operation::Write, false), (Operation::Flush, false)] {
        let (source, destination) = (Store::new(SIZE).filled(1).plain(), Store::new(SIZE).plain());
        let (source, destination) = (Faults::new(Arc::new(source)), Faults::new(Arc::new(destination)));
        let side = if at_source { &source } else { &destination };
        side.add(Rule::on(operation).times(1).fail(ErrorKind::Exhausted));
        let error = run(source, destination, CopySettings::default()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted, "{operation}");
    }
    let error = run(Arc::new(Store::new(1)), Arc::new(Store::new(2)), CopySettings::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
