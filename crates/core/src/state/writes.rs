//! Claims of the application's writes.

use std::ops::Range;
use std::task::Poll;

use super::{Part, Segment, Table};
use crate::Result;
use crate::bits::{each_run, first};

/// How a write may begin; see [`Table::write`].
#[derive(Debug)]
pub enum Begin<'a> {
    /// Now.
    Now(Write<'a>),
    /// Only once these bytes, a block that the write covers in part, have been pulled.
    Absent(Range<u64>),
}

impl Table {
    /// Asks to write `bytes`. Waits for installations of the same blocks that have begun, never for a remote. Dropping
    /// the future gives up.
    ///
    /// # Errors
    /// When the journal refuses; nothing must be written then.
    pub async fn write(&self, bytes: &Range<u64>) -> Result<Begin<'_>> {
        let blocks = self.geometry.blocks_touched(bytes);
        if let Some(absent) = self.partial_and_absent(bytes).await {
            return Ok(Begin::Absent(absent));
        }
        let mut write = Write { table: self, claimed: blocks.start..blocks.start, committed: false };
        for part in self.parts(blocks) {
            self.wait_for(part.segment, |segment, _| {
                if segment.is_installing(&part.bits) {
                    return Poll::Pending;
                }
                Poll::Ready(self.begin_write(segment, &part))
            })
            .await?;
            write.claimed.end = self.blocks(&part).end;
        }
        Ok(Begin::Now(write))
    }

    /// The bytes of the first or last block of `bytes` if it is covered in part, absent, and not about to be valid.
    async fn partial_and_absent(&self, bytes: &Range<u64>) -> Option<Range<u64>> {
        let (touched, covered) = (self.geometry.blocks_touched(bytes), self.geometry.blocks_covered(bytes));
        if covered.is_empty() {
            return self.absent(touched).await;
        }
        match self.absent(touched.start..covered.start).await {
            Some(absent) => Some(absent),
            None => self.absent(covered.end..touched.end).await,
        }
    }

    /// The bytes of the first of `blocks` (two at most) that is absent, once nobody is writing it.
    async fn absent(&self, blocks: Range<u64>) -> Option<Range<u64>> {
        for part in self.parts(blocks) {
            let found = self
                .wait_for(part.segment, |segment, _| {
                    match first(part.bits.clone(), |index| !segment.valid.word(index)) {
                        Some(bit) if segment.is_written(&(bit..bit + 1)) => Poll::Pending,
                        found => Poll::Ready(found),
                    }
                })
                .await;
            if let Some(bit) = found {
                return Some(self.geometry.block_range(self.block(part.segment, bit)));
            }
        }
        None
    }

    /// Journals and marks what is valid, and claims all of it.
    fn begin_write(&self, segment: &mut Segment, part: &Part) -> Result<()> {
        self.journal_clean_as_dirty(segment, part)?;
        self.dirty_what_is_valid(segment, part);
        segment.writers.push(part.bits.clone());
        Ok(())
    }

    /// What is dirty, pushing or unflushed is in the journal as dirty already.
    pub(super) fn journal_clean_as_dirty(&self, segment: &Segment, part: &Part) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let clean =
            |i| segment.valid.word(i) & !(segment.dirty.word(i) | segment.pushing.word(i) | segment.unflushed.word(i));
        each_run(part.bits.clone(), clean, |run| journal.dirty(self.blocks(&Part { bits: run, ..*part })))
    }

    fn dirty_what_is_valid(&self, segment: &mut Segment, part: &Part) {
        let mut rest = part.bits.clone();
        while let Some(run) = crate::bits::first_run(rest.clone(), |index| segment.valid.word(index)) {
            rest.start = run.end;
            self.set_dirty(segment, part, run);
        }
    }

    /// Nobody else makes these blocks valid before the write has ended.
    fn journal_absent_as_dirty(&self, blocks: Range<u64>) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        self.parts(blocks).try_for_each(|part| {
            self.with(part.segment, |segment, _| {
                let absent = |index| !segment.valid.word(index);
                each_run(part.bits.clone(), absent, |run| journal.dirty(self.blocks(&Part { bits: run, ..part })))
            })
        })
    }

    /// Marks present blocks dirty that were changed without a claim (through a mapping).
    ///
    /// # Errors
    /// When the journal refuses. The blocks are dirty all the same.
    pub fn mark_dirty(&self, blocks: Range<u64>) -> Result<()> {
        let mut result = Ok(());
        for part in self.parts(blocks) {
            let marked = self.with(part.segment, |segment, _| {
                let journalled = self.begin_write(segment, &part);
                if journalled.is_ok() {
                    segment.end_write(&part.bits);
                }
                self.dirty_what_is_valid(segment, &part);
                journalled
            });
            result = result.and(marked);
        }
        result
    }
}

impl Segment {
    fn end_write(&mut self, bits: &Range<u32>) {
        if let Some(at) = self.writers.iter().position(|writer| writer == bits) {
            self.writers.swap_remove(at);
        }
    }
}

/// Blocks that are being written. Dropped without [`Self::commit`] (the write failed, or its caller went away) those
/// that were absent are absent still and the others dirty: their bytes are undefined, but never lost sight of.
#[derive(Debug)]
#[must_use = "the write counts as failed when this is dropped"]
pub struct Write<'a> {
    table: &'a Table,
    claimed: Range<u64>,
    committed: bool,
}

impl Write<'_> {
    /// All bytes are in place: the blocks are valid and dirty. Answers the chunks that became wholly present, where the
    /// table [reports](Table::reporting_chunks) them.
    ///
    /// # Errors
    /// When the journal refuses; blocks that were absent are absent still, all of them.
    pub fn commit(mut self) -> Result<Vec<u64>> {
        // For all parts before the first is valid: chunks of it would be present and nobody told.
        self.table.journal_absent_as_dirty(self.claimed.clone())?;
        let mut completed = Vec::new();
        for part in self.table.parts(self.claimed.clone()) {
            self.table.with(part.segment, |segment, wake| {
                wake.all_waiting = true;
                segment.end_write(&part.bits);
                self.table.set_valid(segment, &part, &mut completed);
                self.table.set_dirty(segment, &part, part.bits.clone());
            });
        }
        self.committed = true;
        Ok(completed)
    }
}

impl Drop for Write<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        for part in self.table.parts(self.claimed.clone()) {
            self.table.with(part.segment, |segment, wake| {
                wake.all_waiting = true;
                segment.end_write(&part.bits);
                self.table.dirty_what_is_valid(segment, &part);
            });
        }
    }
}
