//! Keeps in mind what a remote has lost: so that a flush which failed fails again until everything is durable.
//!
//! A remote that died with writes which were not flushed says so once, to the next flush, and forgets it: that is how a
//! [cached region](crate::Cached) wants it, which has the bytes still and writes them again. Where nobody has them, the
//! application must, and until it has, no flush may tell it that all is well.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use r3map_core::{BLOCK_SIZE, Backend, Capabilities, Error, ErrorKind, Operation, Result, Trim, WriteZeroes};
use rangemap::RangeSet;

use crate::DECLARED;
use crate::folded::Folded;

/// How many ranges of writes are told apart. Beyond that neighbours become one, with what lies between them.
const MAX_RANGES: usize = 1 << 16;
/// How many of what is lost. More, since writing it again in small pieces cuts it into pieces: if they became one, the
/// application would have to write them once more.
const MAX_LOST: usize = 1 << 20;

/// A backend whose flush fails until everything that was lost is written again.
///
/// After a flush that fails as a conflict, what was written since the last good one counts as lost, byte by byte. Whatever
/// is written, trimmed or zeroed again counts as any other write. Flushes that fail for other reasons leave their writes to
/// the next flush.
///
/// One flush at a time reaches the backend inside; those that wait for it share the next one. Where very many small
/// writes lie between two flushes, some of what lies between them may have to be written again with them.
pub struct Mindful {
    inner: Arc<dyn Backend>,
    state: Mutex<State>,
    /// One at a time: one that began after another had been told of a loss, and before that was noted down here, would be
    /// told that all is well.
    flushes: Folded<Result<()>>,
}

#[derive(Default)]
struct State {
    size: u64,
    /// Acknowledged since the last flush began.
    written: RangeSet<u64>,
    /// Acknowledged before that, and not durable.
    flushing: RangeSet<u64>,
    lost: RangeSet<u64>,
    /// The flush that told of it last.
    told: Option<Error>,
    /// How many flushes have told of losses.
    losses: u64,
}

impl Mindful {
    /// Wraps `inner`, of which nothing is lost yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>) -> Self {
        let state = Mutex::new(State { size: inner.size(), ..State::default() });
        Self { inner, state, flushes: Folded::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn change(&self, offset: u64, len: u64, call: impl Future<Output = Result<()>> + Send) -> Result<()> {
        let losses = self.state().losses;
        call.await?;
        if len > 0 {
            self.state().acknowledged(offset..offset + len, losses);
        }
        Ok(())
    }
}

impl State {
    /// Something was written that had begun after so many `losses`.
    fn acknowledged(&mut self, range: Range<u64>, losses: u64) {
        if self.losses == losses {
            self.lost.remove(range.clone());
            self.written.insert(range);
            widen(&mut self.written, MAX_RANGES, self.size);
        } else {
            // It may be one of the writes that were lost, whose answer was late.
            self.lost.insert(range);
        }
        widen(&mut self.lost, MAX_LOST, self.size);
    }

    fn flush_begins(&mut self) {
        let written = std::mem::take(&mut self.written);
        self.flushing.extend(written);
        widen(&mut self.flushing, MAX_RANGES, self.size);
    }

    fn flush_ended(&mut self, result: Result<()>) -> Result<()> {
        match result {
            Ok(()) => {
                self.flushing.clear();
                self.check_lost()
            }
            Err(error) if error.kind() == ErrorKind::Conflict => {
                // Also what was acknowledged meanwhile: it may have been before the backend inside began to flush.
                self.lost.extend(std::mem::take(&mut self.flushing));
                self.lost.extend(std::mem::take(&mut self.written));
                widen(&mut self.lost, MAX_LOST, self.size);
                self.losses += 1;
                self.told = Some(error.clone());
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn check_lost(&self) -> Result<()> {
        let Some(first) = self.lost.iter().next() else { return Ok(()) };
        let message = "not everything that was lost before has been written again";
        let error = match &self.told {
            Some(told) => told.clone().context(message),
            None => Error::new(ErrorKind::Conflict, Operation::Flush, message),
        };
        Err(error.at(first.start, first.end - first.start))
    }
}

/// Makes fewer ranges of too many.
fn widen(ranges: &mut RangeSet<u64>, most: usize, size: u64) {
    if ranges.len() <= most {
        return;
    }
    let mut unit = BLOCK_SIZE;
    while ranges.len() > most / 2 {
        let wide =
            |range: &Range<u64>| range.start / unit * unit..range.end.div_ceil(unit).saturating_mul(unit).min(size);
        *ranges = ranges.iter().map(wide).collect();
        unit = unit.saturating_mul(16);
    }
}

#[async_trait]
impl Backend for Mindful {
    fn size(&self) -> u64 {
        self.inner.size()
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
        self.change(offset, buf.len() as u64, self.inner.write_at(offset, buf)).await
    }

    async fn flush(&self) -> Result<()> {
        let flush = async || {
            self.state().flush_begins();
            let flushed = self.inner.flush().await;
            self.state().flush_ended(flushed)
        };
        self.flushes.flush(flush).await
    }
}

#[async_trait]
impl Trim for Mindful {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let trim = self.inner.capabilities().trim.expect(DECLARED);
        self.change(offset, len, trim.trim(offset, len)).await
    }
}

#[async_trait]
impl WriteZeroes for Mindful {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeroes = self.inner.capabilities().write_zeroes.expect(DECLARED);
        self.change(offset, len, zeroes.write_zeroes(offset, len)).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use r3map_core::ChunkSize;
    use r3map_testkit::faults::{Faults, Pause, Rule, cancel_after};
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, deadline, model};

    use super::*;

    const SIZE: u64 = 100_001;
    const SOON: Duration = Duration::from_secs(60);

    fn mindful() -> (Arc<Faults>, Arc<Mindful>) {
        let faults = Faults::new(Arc::new(Store::new(SIZE)));
        (faults.clone(), Arc::new(Mindful::new(faults)))
    }

    /// The next flush tells of a loss, as a remote does that was restarted.
    fn lose(faults: &Faults) {
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
    }

    async fn lost(mindful: &Mindful) -> Error {
        let error = mindful.flush().await.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Conflict, Operation::Flush));
        error
    }

    #[tokio::test]
    async fn conforms() {
        let make = |store: Store| -> Arc<dyn Backend> { Arc::new(Mindful::new(Arc::new(store))) };
        conformance::backend(async || make(Store::new(SIZE))).await;
        conformance::backend(async || make(Store::new(SIZE).whole_chunks(ChunkSize::MIN).plain())).await;
        conformance::filled(async || make(Store::new(SIZE).filled(2).read_only()), 2).await;
        model::check(async || make(Store::new(SIZE)), model::Settings::default()).await;
    }

    #[tokio::test]
    async fn what_was_lost_fails_every_flush_until_all_of_it_is_written_again() {
        let (faults, mindful) = mindful();
        mindful.write_at(0, b"durable").await.unwrap();
        mindful.flush().await.unwrap();
        mindful.write_at(100, b"lost").await.unwrap();
        mindful.capabilities().trim.unwrap().trim(8192, 4096).await.unwrap();
        mindful.capabilities().write_zeroes.unwrap().write_zeroes(SIZE - 5, 5).await.unwrap();
        lose(&faults);
        assert_eq!(lost(&mindful).await.range(), None, "as the remote says it");
        let again = lost(&mindful).await;
        assert_eq!(again.range(), Some((100, 4)));
        assert!(again.message().starts_with("not everything that was lost before has been written again: "), "{again}");
        mindful.write_at(99, b"lost").await.unwrap();
        assert_eq!(lost(&mindful).await.range(), Some((103, 1)), "part of it is not enough");
        mindful.write_at(103, b"t").await.unwrap();
        mindful.write_at(8000, &[0; 5000]).await.unwrap();
        assert_eq!(lost(&mindful).await.range(), Some((SIZE - 5, 5)));
        mindful.capabilities().write_zeroes.unwrap().write_zeroes(SIZE - 5, 5).await.unwrap();
        mindful.flush().await.unwrap();
        mindful.flush().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_written_again_can_be_lost_again() {
        let (faults, mindful) = mindful();
        mindful.write_at(0, b"lost").await.unwrap();
        for _ in 0..2 {
            lose(&faults);
            lost(&mindful).await;
            mindful.write_at(0, b"lost").await.unwrap();
        }
        mindful.flush().await.unwrap();
        lose(&faults);
        lost(&mindful).await;
        mindful.flush().await.expect("nothing was written since the last good flush, so that nothing can be lost");
    }

    #[tokio::test]
    async fn other_failures_and_flushes_that_are_given_up_leave_their_writes_to_the_next() {
        let (faults, mindful) = mindful();
        mindful.write_at(0, b"written").await.unwrap();
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Unavailable));
        assert_eq!(mindful.flush().await.unwrap_err().kind(), ErrorKind::Unavailable);
        faults.add(Rule::on(Operation::Flush).times(1).hang());
        assert!(cancel_after(1, mindful.flush()).await.is_none());
        lose(&faults);
        lost(&mindful).await;
        assert_eq!(lost(&mindful).await.range(), Some((0, 7)));
        faults.add(Rule::on(Operation::Write).times(1).fail_after(ErrorKind::Unavailable));
        mindful.write_at(0, b"written").await.unwrap_err();
        assert_eq!(lost(&mindful).await.range(), Some((0, 7)), "a write that failed heals nothing");
    }

    /// The remote that was lost may have acknowledged it, and the answer been late.
    #[tokio::test]
    async fn a_write_under_way_while_a_loss_is_told_counts_as_lost() {
        let (faults, mindful) = mindful();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Write).times(1).hold_after(&pause));
        let late = {
            let mindful = mindful.clone();
            tokio::spawn(async move { mindful.write_at(10, b"late").await })
        };
        pause.wait_held(1).await;
        mindful.write_at(0, b"lost").await.unwrap();
        lose(&faults);
        lost(&mindful).await;
        mindful.write_at(0, b"lost").await.unwrap();
        pause.release();
        deadline(SOON, "the late write", late).await.unwrap().unwrap();
        assert_eq!(lost(&mindful).await.range(), Some((10, 4)));
        mindful.write_at(10, b"late").await.unwrap();
        mindful.flush().await.unwrap();
    }

    #[tokio::test]
    async fn flushes_that_wait_share_the_next_one_and_how_it_ends() {
        let (faults, mindful) = mindful();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Flush).times(1).hold(&pause));
        let flush = |mindful: &Arc<Mindful>| {
            let mindful = mindful.clone();
            tokio::spawn(async move { mindful.flush().await })
        };
        let first = flush(&mindful);
        pause.wait_held(1).await;
        mindful.write_at(0, b"lost").await.unwrap();
        let others: Vec<_> = (0..5).map(|_| flush(&mindful)).collect();
        while mindful.flushes.asked() < 6 {
            tokio::task::yield_now().await;
        }
        lose(&faults);
        pause.release();
        deadline(SOON, "the first", first).await.unwrap().unwrap();
        for other in others {
            let error = deadline(SOON, "another", other).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
        }
        assert_eq!(faults.count(Operation::Flush), 2);
    }

    #[test]
    fn a_large_loss_may_be_written_again_in_any_order() {
        let blocks = 3 * MAX_RANGES as u64;
        let mut state = State { size: blocks * BLOCK_SIZE, ..State::default() };
        state.written.insert(0..state.size);
        state.flush_begins();
        state.flush_ended(Err(Error::new(ErrorKind::Conflict, Operation::Flush, "lost"))).unwrap_err();
        for odd in [1, 0] {
            for block in (0..blocks).filter(|block| block % 2 == odd) {
                assert_eq!(state.check_lost().unwrap_err().kind(), ErrorKind::Conflict);
                state.acknowledged(block * BLOCK_SIZE..(block + 1) * BLOCK_SIZE, state.losses);
            }
        }
        state.check_lost().unwrap();
    }

    #[tokio::test]
    async fn very_many_small_losses_become_fewer_and_none_is_forgotten() {
        let size = 16 * MAX_RANGES as u64 + 1;
        let faults = Faults::new(Arc::new(Store::new(size)));
        let mindful = Mindful::new(faults.clone());
        for offset in (0..size).step_by(8) {
            mindful.write_at(offset, b"x").await.unwrap();
        }
        assert!(mindful.state().written.len() <= MAX_RANGES);
        lose(&faults);
        lost(&mindful).await;
        assert!((0..size).step_by(8).all(|offset| mindful.state().lost.contains(&offset)));
        mindful.write_at(0, &vec![1; usize::try_from(size).unwrap()]).await.unwrap();
        mindful.flush().await.expect("nothing past the end is to be written again");
    }
}
