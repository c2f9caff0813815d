//! Claims on dirty blocks, and what becomes of pushed ones.

use std::ops::Range;
use std::sync::Arc;

use super::{Part, Segment, Table, narrow};
use crate::bits::{first, first_run};
use crate::sync::lock;
use crate::{BLOCK_SIZE, Error, Result};

/// What is to be pushed next; see [`Table::push`].
#[derive(Debug)]
pub enum NextPush {
    /// These blocks.
    Push(Push),
    /// A unit whose dirty blocks can go only with the rest of it, which is absent: pull these bytes and ask again.
    Absent(Range<u64>),
    /// The journal refuses to call clean ones among these blocks dirty, which a push that fails would make them. They stay
    /// as they were: go on behind them, and come back to them later.
    Refused(Range<u64>, Error),
}

impl Table {
    /// Claims the first run of dirty blocks at or after block `from` that nobody is pushing, up to `max_bytes` (at
    /// least one unit). It begins and ends at multiples of `unit` bytes (a power of two, at least a block and at most a
    /// chunk; the region's end counts) and takes clean blocks in between along. Nothing if there is none.
    pub fn push(self: &Arc<Self>, from: u64, max_bytes: u64, unit: u64) -> Option<NextPush> {
        let unit = narrow(unit / BLOCK_SIZE);
        let max = narrow((max_bytes / BLOCK_SIZE).clamp(u64::from(unit), self.segment_blocks));
        let mut at = from;
        loop {
            let index = lock(&self.dirty).range(at / self.segment_blocks..).next().copied()?;
            let base = index * self.segment_blocks;
            let part = self.part(index, at.max(base)..self.geometry.block_count());
            let next = self.with(index, |segment, _| self.push_in(segment, part, max / unit * unit, unit));
            if next.is_some() {
                return next;
            }
            at = base + self.segment_blocks;
        }
    }

    fn push_in(self: &Arc<Self>, segment: &mut Segment, part: Part, max: u32, unit: u32) -> Option<NextPush> {
        let len = self.segment_len(part.segment);
        let mut rest = part.bits;
        while let Some(dirty) = first(rest.clone(), |index| segment.dirty.word(index) & !segment.pushing.word(index)) {
            let start = dirty / unit * unit;
            let end = segment.pushable_until(start, (start + max).min(len), unit);
            if end > start {
                let claim = Part { segment: part.segment, bits: start..end };
                return Some(match self.begin_push(segment, &claim) {
                    Ok(()) => NextPush::Push(Push { table: self.clone(), part: claim, done: false }),
                    Err(error) => NextPush::Refused(self.blocks(&claim), error),
                });
            }
            let one = start..(start + unit).min(len);
            if !segment.valid.all(one.clone()) {
                let blocks = self.blocks(&Part { segment: part.segment, bits: one });
                return Some(NextPush::Absent(self.geometry.blocks_range(&blocks)));
            }
            // Part of this unit is on its way already; the rest comes the next time.
            rest.start = one.end.min(rest.end);
        }
        None
    }

    fn begin_push(&self, segment: &mut Segment, claim: &Part) -> Result<()> {
        let len = self.segment_len(claim.segment);
        self.journal_clean_as_dirty(segment, claim)?;
        let before = segment.unpushed(claim.bits.clone());
        segment.pushing.fill(len, claim.bits.clone(), true);
        segment.dirty.fill(len, claim.bits.clone(), false);
        for at in 0..segment.writers.len() {
            let writer = &segment.writers[at];
            let torn = writer.start.max(claim.bits.start)..writer.end.min(claim.bits.end);
            if !torn.is_empty() {
                segment.dirty.fill(len, torn, true);
            }
        }
        self.count_unpushed(before, segment.unpushed(claim.bits.clone()));
        Ok(())
    }

    /// The remote has made everything durable that was pushed before its flush began; no push may have been under way
    /// since. What was not written again is clean.
    ///
    /// # Errors
    /// When the journal refuses; the blocks stay unflushed.
    pub fn flushed(&self) -> Result<()> {
        self.each_unflushed(|table, segment, part| {
            let len = table.segment_len(part.segment);
            let mut rest = part.bits.clone();
            while let Some(run) = segment.next_flushed(rest.clone()) {
                rest.start = run.end;
                if let Some(journal) = &table.journal {
                    journal.clean(table.blocks(&Part { bits: run.clone(), ..*part }))?;
                }
                // At once: what the journal calls clean must count as clean here, or a write would not be journalled.
                segment.unflushed.fill(len, run, false);
            }
            segment.unflushed.fill(len, part.bits.clone(), false);
            Ok(())
        })
    }

    /// The remote could not make what was pushed durable and may have lost it: it is dirty again.
    pub fn flush_failed(&self) {
        let result = self.each_unflushed(|table, segment, part| {
            let mut rest = part.bits.clone();
            while let Some(run) = first_run(rest.clone(), |index| segment.unflushed.word(index)) {
                rest.start = run.end;
                table.set_dirty(segment, part, run);
            }
            segment.unflushed.fill(table.segment_len(part.segment), part.bits.clone(), false);
            Ok(())
        });
        debug_assert!(result.is_ok(), "nothing above can fail");
    }

    /// Whether anything was pushed that the remote has not flushed.
    #[must_use]
    pub fn has_unflushed(&self) -> bool {
        !lock(&self.unflushed).is_empty()
    }

    fn each_unflushed(&self, mut visit: impl FnMut(&Self, &mut Segment, &Part) -> Result<()>) -> Result<()> {
        let mut at = 0;
        loop {
            let Some(index) = lock(&self.unflushed).range(at..).next().copied() else {
                return Ok(());
            };
            let part = Part { segment: index, bits: 0..self.segment_len(index) };
            self.with(index, |segment, _| visit(self, segment, &part))?;
            at = index + 1;
        }
    }
}

impl Segment {
    /// The next run that was pushed and not written to since.
    fn next_flushed(&self, bits: Range<u32>) -> Option<Range<u32>> {
        first_run(bits, |i| self.unflushed.word(i) & !(self.dirty.word(i) | self.pushing.word(i)))
    }

    /// How far from `start`, in whole units, there is something to push that can go now.
    fn pushable_until(&self, start: u32, limit: u32, unit: u32) -> u32 {
        let mut end = start;
        while end < limit && self.is_pushable(end..(end + unit).min(limit)) {
            end = (end + unit).min(limit);
        }
        end
    }

    /// Whether a unit is dirty, all there, and not on its way.
    fn is_pushable(&self, bits: Range<u32>) -> bool {
        self.dirty.intersects(bits.clone()) && self.valid.all(bits.clone()) && !self.pushing.intersects(bits)
    }
}

/// Blocks that are being pushed. Dropped without [`Self::done`] they are dirty again.
#[derive(Debug)]
#[must_use = "the blocks are dirty again when this is dropped"]
pub struct Push {
    table: Arc<Table>,
    part: Part,
    done: bool,
}

impl Push {
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

    /// The remote has the bytes: the blocks wait for its flush.
    pub fn done(mut self) {
        self.done = true;
        self.end(|segment, len, bits| {
            segment.unflushed.fill(len, bits, true);
        });
    }

    fn end(&self, change: impl FnOnce(&mut Segment, u32, Range<u32>)) {
        let (len, bits) = (self.table.segment_len(self.part.segment), self.part.bits.clone());
        self.table.with(self.part.segment, |segment, _| {
            let before = segment.unpushed(bits.clone());
            segment.pushing.fill(len, bits.clone(), false);
            change(segment, len, bits.clone());
            self.table.count_unpushed(before, segment.unpushed(bits));
        });
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        if !self.done {
            self.end(|segment, len, bits| {
                segment.dirty.fill(len, bits, true);
            });
        }
    }
}
