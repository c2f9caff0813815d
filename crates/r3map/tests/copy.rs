//! Copying: every byte, holes as holes, and only what differs if asked.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map::{Backend, ChunkSize, CopyProgress, CopySettings, ErrorKind, Operation, copy};
use r3map_core::{Capabilities, Extent, ExtentKind, Extents, Geometry, Result};
use r3map_local::Memory;
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tokio::sync::Semaphore;

const SIZE: u64 = (5 << 20) + 77;
const LIMIT: Duration = Duration::from_secs(60);
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
    let (source, destination) = (pieces(12 << 10, 5).await, Arc::new(Store::new(SIZE)));
    let requests = Faults::new(source.clone());
    let written = run(requests.clone(), destination.clone(), CopySettings::default()).await.unwrap();
    assert!(source.snapshot() == destination.snapshot());
    assert!(extents(&*source).await == extents(&*destination).await, "holes are no holes any more");
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

/// Data in 4 KiB of every `step` bytes, as `seed` has it.
async fn pieces(step: usize, seed: u64) -> Arc<Store> {
    let store = Arc::new(Store::new(SIZE));
    for offset in (0..SIZE).step_by(step) {
        let len = 4096.min(SIZE - offset);
        store.write_at(offset, &fill::bytes(offset, usize::try_from(len).unwrap(), seed)).await.unwrap();
    }
    store
}

async fn extents(of: &dyn Backend) -> Vec<Extent> {
    of.capabilities().extents.unwrap().extents(0, SIZE).await.unwrap()
}

#[tokio::test]
async fn whole_chunks_are_written_once_and_never_read_however_many_pieces_they_are_of() {
    let chunk = ChunkSize::new(1 << 16).unwrap();
    // Several pieces in each chunk; one in every third; a hole of several steps, which ends within a chunk.
    for (step, hole) in [(12 << 10, 0), (192 << 10, 0), (12 << 10, (2 << 20) + 8192)] {
        let source = pieces(step, 5).await;
        source.capabilities().trim.unwrap().trim(0, hole).await.unwrap();
        let destination = Arc::new(Store::new(SIZE).whole_chunks(chunk));
        let calls = Faults::new(destination.clone());
        run(source.clone(), calls.clone(), CopySettings::default()).await.unwrap();
        assert!(source.snapshot() == destination.snapshot(), "{step}");
        assert_eq!(calls.count(Operation::Read), 0, "{step}: changed in place");
        let geometry = Geometry::new(SIZE, chunk).unwrap();
        let data = extents(&*source).await.into_iter().filter(|run| run.kind == ExtentKind::Data);
        let mut expected: Vec<_> = data.flat_map(|run| geometry.chunks_touched(&run.range)).collect();
        expected.dedup();
        let writes = calls.calls().into_iter().filter(|call| call.operation == Operation::Write);
        let mut written: Vec<_> =
            writes.flat_map(|call| call.ranges).flat_map(|range| geometry.chunks_touched(&range)).collect();
        written.sort_unstable();
        assert_eq!(written, expected, "{step}: each chunk with data once, and no other");
    }
}

#[tokio::test]
async fn no_more_requests_are_in_flight_than_is_said() {
    for in_flight in [1, 4] {
        let settings = CopySettings { in_flight: NonZeroUsize::new(in_flight).unwrap(), ..CopySettings::default() };
        let (source, destination) = (pieces(12 << 10, 5).await, Arc::new(Store::new(SIZE)));
        let (reads, puts) = (Faults::new(source.clone()), Faults::new(destination.clone()));
        let pause = Pause::new();
        puts.add(Rule::on(Operation::Write).hold(&pause));
        let copying = tokio::spawn(run(reads.clone(), puts.clone(), settings));
        deadline(LIMIT, "writes", pause.wait_held(in_flight)).await;
        for _ in 0..100 {
            tokio::task::yield_now().await; // Whatever else could be asked for would be by now.
        }
        assert_eq!((reads.in_flight(), puts.in_flight()), (0, in_flight), "both sides share them");
        pause.release();
        deadline(LIMIT, "the copy", copying).await.unwrap().unwrap();
        assert_eq!(puts.most_in_flight(), in_flight);
        assert!(reads.most_in_flight() <= in_flight);
        assert!(source.snapshot() == destination.snapshot());
    }
}

/// A source that is written after it has told where its holes are.
struct Changing {
    now: Arc<Store>,
    before: Vec<Extent>,
}

#[async_trait]
impl Backend for Changing {
    fn size(&self) -> u64 {
        self.now.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { extents: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.now.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.now.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.now.flush().await
    }
}

#[async_trait]
impl Extents for Changing {
    async fn extents(&self, offset: u64, _: u64) -> Result<Vec<Extent>> {
        assert_eq!(offset, 0, "it is asked once");
        Ok(self.before.clone())
    }
}

#[tokio::test]
async fn what_was_a_hole_and_is_read_as_data_is_copied() {
    let now = pieces(12 << 10, 5).await;
    let before = extents(&*now).await;
    now.write_at((12 << 10) - 4096, &fill::bytes(0, 4096, 6)).await.unwrap();
    let destination = Arc::new(Store::new(SIZE));
    run(Arc::new(Changing { now: now.clone(), before }), destination.clone(), CopySettings::default()).await.unwrap();
    assert!(now.snapshot() == destination.snapshot());
}

/// A source behind a connection that carries one answer at a time, and tells of a part of its holes at a time.
struct Narrow {
    store: Arc<Store>,
    way: Semaphore,
}

#[async_trait]
impl Backend for Narrow {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { extents: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _way = self.way.acquire().await.unwrap();
        tokio::task::yield_now().await;
        self.store.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.store.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.store.flush().await
    }
}

#[async_trait]
impl Extents for Narrow {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let _way = self.way.acquire().await.unwrap();
        self.store.capabilities().extents.unwrap().extents(offset, len.min(1 << 20)).await
    }
}

#[tokio::test]
async fn what_is_under_way_goes_on_while_the_source_is_asked_for_its_holes() {
    let source = Arc::new(Narrow { store: Arc::new(Store::new(SIZE).filled(1)), way: Semaphore::new(1) });
    let destination = Arc::new(Store::new(SIZE));
    let settings = CopySettings { in_flight: NonZeroUsize::new(2).unwrap(), ..CopySettings::default() };
    deadline(LIMIT, "the copy", run(source.clone(), destination.clone(), settings)).await.unwrap();
    assert!(source.store.snapshot() == destination.snapshot());
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
    let full = Store::new(SIZE).filled(1).whole_chunks(chunk).max_request(chunk.bytes());
    let sparse = Store::new(SIZE).max_request(100_000);
    for offset in [70_000, 3 << 20] {
        sparse.write_at(offset, &fill::bytes(offset, 5000, 1)).await.unwrap();
    }
    for source in [full, sparse].map(Arc::new) {
        let destination = Arc::new(Store::new(SIZE).filled(2).whole_chunks(ChunkSize::new(1 << 22).unwrap()));
        run(source.clone(), destination.clone(), CopySettings::default()).await.unwrap();
        assert!(source.snapshot() == destination.snapshot());
    }
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
