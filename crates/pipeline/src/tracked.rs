//! Records which blocks are written since it was asked to: what a migration must send again.
//!
//! Writes that go past it (through a mapping, or by somebody else to the same backend) it cannot see.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, ChunkSize, Geometry, Operation, Result, Trim, WriteZeroes, check_range};

use crate::{DECLARED, Taken, Tracker};

/// A backend that can record what is written, trimmed or zeroed.
///
/// A write counts from before it begins until after it has ended, failed or was dropped: it is in the record that is
/// taken before it lands, or in the next one, or in both. So whoever copies in rounds (take the record, copy what it
/// names, again) never misses a write; and when no write is under way, the last record is complete.
///
/// While nothing is recorded it costs a write two looks at a flag, and reads nothing at any time.
pub struct Tracked {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
    tracker: Tracker,
}

impl Tracked {
    /// Wraps `inner`; nothing is recorded yet.
    ///
    /// # Errors
    /// `InvalidInput` if the size of `inner` is no region's, as [`Geometry::new`].
    pub fn new(inner: Arc<dyn Backend>) -> Result<Self> {
        let geometry = Geometry::new(inner.size(), ChunkSize::MIN)?;
        Ok(Self { inner, geometry, tracker: Tracker::default() })
    }

    /// Starts to record, with an empty record. Whatever ended before this call is not in it; whatever ends after it is.
    pub fn track(&self) {
        self.tracker.track();
    }

    /// Stops recording, and forgets the record.
    pub fn stop(&self) {
        self.tracker.stop();
    }

    /// Takes the record so far; recording goes on with an empty one. What is taken is put back unless it is
    /// [confirmed](Taken::confirm).
    #[must_use = "what is not confirmed is put back"]
    pub fn take(&self) -> Taken {
        self.tracker.take()
    }

    fn change(&self, operation: Operation, offset: u64, len: u64) -> Result<Change<'_>> {
        check_range(operation, self.geometry.size(), offset, len)?;
        let change = Change { tracked: self, offset, len };
        change.record();
        Ok(change)
    }
}

/// A change under way: recorded when it begins and when it is over, whichever way.
struct Change<'a> {
    tracked: &'a Tracked,
    offset: u64,
    len: u64,
}

impl Change<'_> {
    fn record(&self) {
        let tracked = self.tracked;
        if tracked.tracker.is_tracking() {
            tracked.tracker.note(tracked.geometry.blocks_touched(&(self.offset..self.offset + self.len)));
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.record();
    }
}

#[async_trait]
impl Backend for Tracked {
    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let inner = self.inner.capabilities();
        Capabilities {
            trim: inner.trim.map(|_| self as _),
            write_zeroes: inner.write_zeroes.map(|_| self as _),
            ..inner
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _change = self.change(Operation::Write, offset, buf.len() as u64)?;
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[async_trait]
impl Trim for Tracked {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let _change = self.change(Operation::Trim, offset, len)?;
        self.inner.capabilities().trim.expect(DECLARED).trim(offset, len).await
    }
}

#[async_trait]
impl WriteZeroes for Tracked {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let _change = self.change(Operation::WriteZeroes, offset, len)?;
        self.inner.capabilities().write_zeroes.expect(DECLARED).write_zeroes(offset, len).await
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicBool, Ordering};

    use r3map_core::ErrorKind;
    use r3map_testkit::faults::{Faults, Pause, Rule, cancel_after};
    use r3map_testkit::random::Random;
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, fill, model};

    use super::*;

    const BLOCK: u64 = 4096;

    fn tracked() -> (Arc<Faults>, Arc<Tracked>) {
        let faults = Faults::new(Arc::new(Store::new(40 * BLOCK + 1)));
        (faults.clone(), Arc::new(Tracked::new(faults).unwrap()))
    }

    fn runs(taken: &Taken) -> Vec<Range<u64>> {
        taken.blocks().runs().collect()
    }

    #[tokio::test]
    async fn conforms() {
        let make = |store: Store, track: bool| -> Arc<dyn Backend> {
            let tracked = Tracked::new(Arc::new(store)).unwrap();
            track.then(|| tracked.track());
            Arc::new(tracked)
        };
        let chunks = || Store::new(100_001).whole_chunks(ChunkSize::MIN);
        conformance::backend(async || make(Store::new(100_001), true)).await;
        conformance::backend(async || make(chunks().plain(), false)).await;
        conformance::filled(async || make(Store::new(100_001).filled(2).read_only(), true), 2).await;
        model::check(async || make(Store::new(100_001), true), model::Settings::default()).await;
    }

    #[tokio::test]
    async fn every_change_is_recorded_and_reads_are_not() {
        let (_, tracked) = tracked();
        tracked.write_at(0, &[1]).await.unwrap();
        tracked.track();
        assert!(tracked.take().blocks().is_empty());
        tracked.write_at(5 * BLOCK - 1, &[1, 2]).await.unwrap();
        tracked.write_at(40 * BLOCK, &[1]).await.unwrap();
        tracked.capabilities().trim.unwrap().trim(10 * BLOCK + 3, 5 * BLOCK).await.unwrap();
        tracked.capabilities().write_zeroes.unwrap().write_zeroes(20 * BLOCK, 1).await.unwrap();
        tracked.read_at(30 * BLOCK, &mut [0]).await.unwrap();
        tracked.write_at(8 * BLOCK, &[]).await.unwrap();
        assert_eq!(runs(&tracked.take()), [4..6, 10..16, 20..21, 40..41]);
        tracked.stop();
        tracked.write_at(0, &[1]).await.unwrap();
        assert!(tracked.take().blocks().is_empty());
    }

    #[tokio::test]
    async fn what_was_not_handed_over_is_put_back() {
        let (_, tracked) = tracked();
        tracked.track();
        tracked.write_at(0, &[1]).await.unwrap();
        let lost = tracked.take();
        tracked.write_at(2 * BLOCK, &[1]).await.unwrap();
        drop(lost);
        let taken = tracked.take();
        assert_eq!(runs(&taken), [0..1, 2..3]);
        assert_eq!(taken.confirm().len(), 2);
        assert!(tracked.take().blocks().is_empty());
        tracked.write_at(0, &[1]).await.unwrap();
        let old = tracked.take();
        tracked.track();
        drop(old);
        assert!(tracked.take().blocks().is_empty(), "it was of another tracking");
    }

    #[tokio::test]
    async fn a_write_under_way_is_in_the_next_record_too() {
        let (faults, tracked) = tracked();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Write).hold(&pause));
        let write = {
            let tracked = tracked.clone();
            tokio::spawn(async move { tracked.write_at(0, &[1]).await })
        };
        pause.wait_held(1).await;
        tracked.track();
        assert!(tracked.take().blocks().is_empty(), "it began before");
        let early = {
            let tracked = tracked.clone();
            tokio::spawn(async move { tracked.write_at(BLOCK, &[1]).await })
        };
        pause.wait_held(2).await;
        assert!(tracked.take().confirm().runs().eq(std::iter::once(1..2)));
        pause.release();
        write.await.unwrap().unwrap();
        early.await.unwrap().unwrap();
        assert!(tracked.take().blocks().runs().eq(std::iter::once(0..2)), "both ended after");
    }

    #[tokio::test]
    async fn failed_and_dropped_writes_count_and_refused_ones_do_not() {
        let (faults, tracked) = tracked();
        tracked.track();
        faults.add(Rule::on(Operation::Write).times(1).fail(ErrorKind::Unavailable));
        tracked.write_at(0, &[1]).await.unwrap_err();
        assert!(cancel_after(1, tracked.write_at(2 * BLOCK, &[1])).await.is_none());
        tracked.write_at(u64::MAX - 1, &[1, 1]).await.unwrap_err();
        tracked.write_at(40 * BLOCK, &[1, 1]).await.unwrap_err();
        assert_eq!(runs(&tracked.take()), [0..1, 2..3]);
    }

    /// A copier works in rounds while others write; after the last round nothing is missing.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn copying_in_rounds_misses_nothing() {
        let (_, tracked) = tracked();
        let size = usize::try_from(tracked.size()).unwrap();
        tracked.track();
        let done = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..3u64)
            .map(|seed| {
                let tracked = tracked.clone();
                tokio::spawn(async move {
                    let mut random = Random::new(seed);
                    for round in 0..400 {
                        let offset = random.below(40 * BLOCK);
                        tracked.write_at(offset, &fill::bytes(offset, 1, seed * 1000 + round)).await.unwrap();
                    }
                })
            })
            .collect();
        let copier = {
            let (tracked, done) = (tracked.clone(), done.clone());
            tokio::spawn(async move {
                let mut copy = vec![0; size];
                loop {
                    let last = done.load(Ordering::SeqCst);
                    for run in tracked.take().confirm().runs() {
                        let bytes = tracked.geometry.blocks_range(&run);
                        let at = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
                        tracked.read_at(bytes.start, &mut copy[at]).await.unwrap();
                    }
                    if last {
                        return copy;
                    }
                    tokio::task::yield_now().await;
                }
            })
        };
        for writer in writers {
            writer.await.unwrap();
        }
        done.store(true, Ordering::SeqCst);
        let (copy, mut original) = (copier.await.unwrap(), vec![0; size]);
        tracked.read_at(0, &mut original).await.unwrap();
        assert!(copy == original, "the copy is complete");
    }
}
