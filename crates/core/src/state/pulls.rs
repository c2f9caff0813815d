//! Claims on absent chunks: one pull at a time per chunk, and everybody else waits for it.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::{Part, Segment, Table};
use crate::bits::first_run;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::{Error, Result};

/// One pull of consecutive chunks, shared by those who wait for it.
#[derive(Debug)]
pub(super) struct Run {
    chunks: Range<u64>,
    /// Every chunk before this one has ended. Changed under the lock of `state`.
    next: AtomicU64,
    state: Mutex<RunState>,
}

#[derive(Debug, Default)]
struct RunState {
    /// Those that have ended and failed.
    failed: Vec<Failed>,
    /// The rest was given up.
    abandoned: bool,
    wakers: Vec<Waker>,
}

impl Run {
    fn new(chunks: Range<u64>) -> Self {
        Self { next: AtomicU64::new(chunks.start), chunks, state: Mutex::new(RunState::default()) }
    }

    /// The chunks that have not ended.
    fn open(&self) -> Range<u64> {
        self.next.load(Ordering::Acquire)..self.chunks.end
    }
}

/// Chunks that could not be had.
#[derive(Debug, Clone)]
pub struct Failed {
    /// Which.
    pub chunks: Range<u64>,
    /// Why.
    pub error: Error,
}

impl Failed {
    fn overlaps(&self, chunks: &Range<u64>) -> bool {
        self.chunks.start < chunks.end && chunks.start < self.chunks.end
    }
}

/// What a range still lacks; see [`Table::need`].
#[derive(Debug)]
pub enum Need {
    /// Nothing: every block is present.
    Nothing,
    /// These chunks are being pulled: wait for them.
    Join(Wait),
    /// Nobody was pulling these: the caller is now, and must do it.
    Pull(Pull),
    /// All that is absent of this chunk is being written: wait with [`Table::settled`].
    Busy(u64),
}

impl Table {
    /// What is lacking first in `bytes`: claims up to `max_chunks` chunks if nobody pulls them already.
    pub fn need(self: &Arc<Self>, bytes: &Range<u64>, max_chunks: u64) -> Need {
        if self.is_complete() {
            return Need::Nothing;
        }
        for part in self.parts(self.geometry.blocks_touched(bytes)) {
            let need = self.with(part.segment, |segment, _| self.need_in(segment, &part, max_chunks));
            if !matches!(need, Need::Nothing) {
                return need;
            }
        }
        Need::Nothing
    }

    fn need_in(self: &Arc<Self>, segment: &mut Segment, part: &Part, max_chunks: u64) -> Need {
        let Some(absent) = first_run(part.bits.clone(), |index| !segment.valid.word(index)) else {
            return Need::Nothing;
        };
        let last = self.chunks(part).end;
        let chunk = self.chunks(&Part { segment: part.segment, bits: absent }).start;
        if let Some(run) = segment.pull_of(chunk) {
            let chunks = chunk..run.chunks.end.min(last);
            return Need::Join(Wait { run, chunks });
        }
        if segment.next_wanted(self.chunk_bits(chunk)).is_none() {
            return Need::Busy(chunk);
        }
        Need::Pull(self.claim(segment, chunk, last.min(chunk.saturating_add(max_chunks))))
    }

    /// Claims the first chunks of `chunks` that lack something and that nobody pulls: consecutive ones in one segment.
    /// Nothing if there are none.
    pub fn pull(self: &Arc<Self>, chunks: Range<u64>, max_chunks: u64) -> Option<Pull> {
        let mut at = chunks.start;
        let end = chunks.end.min(self.geometry.chunk_count());
        while at < end && !self.is_complete() {
            let stop = self.segment_end(at).min(end);
            let claimed = self.with(self.segment_of(at), |segment, _| {
                let first = self.next_pullable(segment, at..stop)?;
                Some(self.claim(segment, first, stop.min(first.saturating_add(max_chunks))))
            });
            if claimed.is_some() {
                return claimed;
            }
            at = stop;
        }
        None
    }

    /// The first chunk with something to pull that nobody pulls. Runs of valid blocks are skipped whole.
    fn next_pullable(&self, segment: &Segment, chunks: Range<u64>) -> Option<u64> {
        let mut at = chunks.start;
        while at < chunks.end {
            let bits = self.chunk_bits(at).start..self.chunk_bits(chunks.end - 1).end;
            let wanted = segment.next_wanted(bits)?;
            let chunk = self.chunks(&Part { segment: self.segment_of(at), bits: wanted }).start;
            match segment.pull_of(chunk) {
                None => return Some(chunk),
                Some(run) => at = run.chunks.end,
            }
        }
        None
    }

    /// Claims `first`, which is pullable, and as many after it as are, up to `end`.
    fn claim(self: &Arc<Self>, segment: &mut Segment, first: u64, end: u64) -> Pull {
        let pullable =
            |chunk: &u64| segment.pull_of(*chunk).is_none() && segment.next_wanted(self.chunk_bits(*chunk)).is_some();
        let count = (first + 1..end.min(self.segment_end(first))).take_while(pullable).count();
        let run = Arc::new(Run::new(first..first + 1 + count as u64));
        segment.pulls.push(run.clone());
        Pull { table: self.clone(), run }
    }

    /// Waits until nobody is writing absent blocks of `chunk`: they are present then, or free to be pulled.
    pub async fn settled(&self, chunk: u64) {
        let bits = self.chunk_bits(chunk);
        self.wait_for(self.segment_of(chunk), |segment, _| {
            let mut absent = bits.clone();
            while let Some(run) = first_run(absent.clone(), |index| !segment.valid.word(index)) {
                if segment.is_written(&run) {
                    return Poll::Pending;
                }
                absent.start = run.end;
            }
            Poll::Ready(())
        })
        .await;
    }
}

impl Segment {
    fn pull_of(&self, chunk: u64) -> Option<Arc<Run>> {
        self.pulls.iter().find(|run| run.chunks.contains(&chunk) && run.open().contains(&chunk)).cloned()
    }
}

/// The claim to pull consecutive chunks. They end in ascending order, each with a result of its own; those that have
/// not ended when this is dropped are given up, and whoever waits for them finds out and may pull them himself.
#[derive(Debug)]
#[must_use = "the chunks are given up when this is dropped"]
pub struct Pull {
    table: Arc<Table>,
    run: Arc<Run>,
}

impl Pull {
    /// The chunks that have not ended.
    #[must_use]
    pub fn chunks(&self) -> Range<u64> {
        self.run.open()
    }

    /// Their bytes.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        self.table.geometry.chunks_range(&self.chunks())
    }

    /// The table that the claim is on.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// A way to wait for all of it, as everybody else does.
    #[must_use]
    pub fn wait(&self) -> Wait {
        Wait { run: self.run.clone(), chunks: self.chunks() }
    }

    /// Claims the next run of blocks in `blocks` (inside chunks that have not ended) to put pulled bytes into: absent,
    /// and not being written. Nothing if there is none left.
    #[must_use]
    pub fn claim(&self, blocks: Range<u64>) -> Option<Install<'_>> {
        if blocks.is_empty() {
            return None;
        }
        let index = blocks.start / self.table.segment_blocks;
        let part = self.table.part(index, blocks);
        let bits = self.table.with(index, |segment, _| {
            let free = segment.next_wanted(part.bits)?;
            segment.installing.push(free.clone());
            Some(free)
        })?;
        Some(Install { table: &self.table, part: Part { segment: index, bits }, committed: false })
    }

    /// The chunks before `end` have ended, well or with an error. Wakes whoever waits for them.
    pub fn end(&mut self, end: u64, result: Result<()>) {
        let open = self.chunks();
        let ended = open.start..end.min(open.end);
        if ended.is_empty() {
            return;
        }
        let wakers = {
            let mut state = lock(&self.run.state);
            self.run.next.store(ended.end, Ordering::Release);
            if let Err(error) = result {
                state.failed.push(Failed { chunks: ended, error });
            }
            std::mem::take(&mut state.wakers)
        };
        self.forget_if_over();
        wakers.into_iter().for_each(Waker::wake);
    }

    fn forget_if_over(&self) {
        if self.chunks().is_empty() {
            self.forget();
        }
    }

    fn forget(&self) {
        let segment = self.table.segment_of(self.run.chunks.start);
        self.table.with(segment, |segment, _| segment.pulls.retain(|run| !Arc::ptr_eq(run, &self.run)));
    }
}

impl Drop for Pull {
    fn drop(&mut self) {
        if self.chunks().is_empty() {
            return;
        }
        // First out of the table, then told: whoever is woken must find the chunks free.
        self.forget();
        let wakers = {
            let mut state = lock(&self.run.state);
            state.abandoned = true;
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Table {
    /// Waits until every installation that had begun before this call has ended, well or not.
    ///
    /// Through a mapping, bytes can be seen and changed as soon as they are in place, which is before their blocks count
    /// as present. Who wants to learn of every change that was made so far, and asks about present blocks only, waits
    /// for this first. Installations are local and short.
    pub async fn installations_ended(&self) {
        for shard in &self.shards {
            let begun: Vec<_> = lock(shard)
                .segments
                .iter()
                .filter(|(_, segment)| !segment.installing.is_empty())
                .map(|(index, segment)| (*index, segment.installing.clone()))
                .collect();
            for (index, begun) in begun {
                self.wait_for(index, |segment, _| match begun.iter().any(|bits| segment.is_installing(bits)) {
                    true => Poll::Pending,
                    false => Poll::Ready(()),
                })
                .await;
            }
        }
    }
}

/// Blocks that pulled bytes are being put into. Dropped without [`Self::commit`] they are absent again.
#[derive(Debug)]
#[must_use = "the blocks stay absent when this is dropped"]
pub struct Install<'a> {
    table: &'a Table,
    part: Part,
    committed: bool,
}

impl Install<'_> {
    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> Range<u64> {
        self.table.blocks(&self.part)
    }

    /// Their bytes.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        self.table.geometry.blocks_range(&self.blocks())
    }

    /// The bytes are in place: the blocks are valid and clean. Answers the chunks that became wholly present, where the
    /// table [reports](Table::reporting_chunks) them.
    ///
    /// # Errors
    /// When the journal refuses; the blocks are absent then.
    pub fn commit(mut self) -> Result<Vec<u64>> {
        if let Some(journal) = &self.table.journal {
            // Nobody else changes the state of a block that is being installed, so the lock is not needed.
            journal.clean(self.blocks())?;
        }
        let mut completed = Vec::new();
        self.table.with(self.part.segment, |segment, wake| {
            self.table.set_valid(segment, &self.part, &mut completed);
            self.release(segment);
            wake.all_waiting = true;
        });
        self.committed = true;
        Ok(completed)
    }

    fn release(&self, segment: &mut Segment) {
        segment.installing.retain(|installing| *installing != self.part.bits);
    }
}

impl Drop for Install<'_> {
    fn drop(&mut self) {
        if !self.committed {
            self.table.with(self.part.segment, |segment, wake| {
                self.release(segment);
                wake.all_waiting = true;
            });
        }
    }
}

/// Waiting for somebody's pull. Ready with its result when the chunks have ended, or `None` when it was given up: then
/// ask the table again. Dropping it changes nothing.
#[derive(Debug)]
pub struct Wait {
    run: Arc<Run>,
    chunks: Range<u64>,
}

impl Wait {
    /// The chunks that are waited for.
    #[must_use]
    pub fn chunks(&self) -> Range<u64> {
        self.chunks.clone()
    }
}

impl Future for Wait {
    type Output = Option<Result<(), Failed>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.run.state);
        if let Some(failed) = state.failed.iter().find(|failed| failed.overlaps(&self.chunks)) {
            return Poll::Ready(Some(Err(failed.clone())));
        }
        if self.run.open().start >= self.chunks.end {
            return Poll::Ready(Some(Ok(())));
        }
        if state.abandoned {
            return Poll::Ready(None);
        }
        if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            state.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::pin::pin;
    use std::task::Waker;

    use super::*;
    use crate::{ChunkSize, Geometry};

    #[test]
    fn waiting_for_installations_waits_for_those_that_had_begun() {
        let geometry = Geometry::new(64 << 20, ChunkSize::DEFAULT).unwrap();
        let table = Arc::new(Table::new(geometry, None));
        let mut context = Context::from_waker(Waker::noop());
        let pulls = [0, 400].map(|chunk| table.pull(chunk..chunk + 2, 2).unwrap());
        let [first, second] = [(&pulls[0], 3), (&pulls[1], 6402)].map(|(pull, at)| pull.claim(at..at + 4).unwrap());
        let mut ended = pin!(table.installations_ended());
        assert!(ended.as_mut().poll(&mut context).is_pending());
        let later = pulls[0].claim(8..9).unwrap();
        first.commit().unwrap();
        assert!(ended.as_mut().poll(&mut context).is_pending());
        drop(second);
        assert!(ended.as_mut().poll(&mut context).is_ready());
        drop(later);
        assert!(pin!(table.installations_ended()).poll(&mut context).is_ready());
    }
}
