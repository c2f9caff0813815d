//! What a server needs of a seeder, and what a leecher gets from one: plain data, and two traits.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Result};
use r3map_pipeline::BlockSet;

/// What a seeder has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeded {
    /// Counts changes of ownership.
    pub epoch: u64,
    /// Its regions.
    pub regions: Vec<SeededRegion>,
    /// Whether it can say what was written without suspending anybody. A Go seeder cannot.
    pub precopy: bool,
    /// Whether it records for some leecher now.
    pub busy: bool,
    /// How long a leecher may be silent before it stops to record for it; nothing where it may be for ever.
    pub lease: Option<Duration>,
    /// The migration from which the regions were taken back.
    pub revoked: Option<[u8; 16]>,
    /// The migration for which it records, or has last: zeros where there was none yet, nothing where it does not say.
    pub last: Option<[u8; 16]>,
}

/// One region of a seeder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeededRegion {
    /// What it is called.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The unit of transfer.
    pub chunk_size: ChunkSize,
}

/// What a leecher gets when regions change hands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handed {
    /// The epoch that begins with it.
    pub epoch: u64,
    /// What was written since the last record that has arrived, for each region.
    pub dirty: Vec<BlockSet>,
    /// How long the application took to stop.
    pub suspend: Duration,
    /// How long it took to record and fence everything.
    pub flush: Duration,
}

/// Which service a request is made to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// One of ours.
    Own,
    /// One of the Go programs, which cannot show a secret.
    Go,
}

/// A seeder, as a server has it.
#[async_trait]
pub trait Seeding: Send + Sync + 'static {
    /// What there is. The regions stay the same.
    ///
    /// # Errors
    /// As the seeder has it; so for all.
    async fn describe(&self) -> Result<Seeded>;

    /// A region's bytes.
    fn region(&self, index: usize) -> Arc<dyn Backend>;

    /// Lets whoever makes a request in, before anything else is done: `secret` is what the request shows, and empty if it
    /// shows nothing.
    ///
    /// # Errors
    /// `Denied` if he may not read, let alone take regions away.
    fn admit(&self, secret: &[u8], service: Service) -> Result<Arc<dyn Leeching>>;
}

/// The calls of a leecher that was let in, as they arrive. Dropping a call's future must not stop it half-way.
#[async_trait]
pub trait Leeching: Send + Sync + 'static {
    /// Somebody reads for `id`, or has just read.
    ///
    /// # Errors
    /// As the seeder has it where he may not have what he reads.
    fn heard(&self, id: [u8; 16]) -> Result<()>;

    /// Starts to record for `id`, if `after` is the one that it has recorded for last; nothing: whoever that was.
    ///
    /// # Errors
    /// See above.
    async fn track(&self, id: [u8; 16], after: Option<[u8; 16]>) -> Result<()>;

    /// The same for a leecher in Go, which gives no sign of life while it waits, and of which another may come under the
    /// same name.
    ///
    /// # Errors
    /// See above.
    async fn track_for_ever(&self, id: [u8; 16]) -> Result<()>;

    /// The record of that number.
    ///
    /// # Errors
    /// See above.
    async fn dirty(&self, id: [u8; 16], round: u64) -> Result<Vec<BlockSet>>;

    /// Hands the regions over.
    ///
    /// # Errors
    /// See above.
    async fn finalize(&self, id: [u8; 16], rounds: u64) -> Result<Handed>;

    /// The same for a leecher in Go, which never asks again: it is refused when the regions were handed over before, to one
    /// of the same name.
    ///
    /// # Errors
    /// See above.
    async fn finalize_once(&self, id: [u8; 16]) -> Result<Handed>;

    /// The leecher has everything.
    ///
    /// # Errors
    /// See above.
    async fn confirm(&self, id: [u8; 16]) -> Result<()>;

    /// The leecher has not run and never will.
    ///
    /// # Errors
    /// See above.
    async fn abort(&self, id: [u8; 16]) -> Result<()>;
}

/// A record as runs: how many blocks are left out, how many are named, and so on.
pub(crate) fn to_runs(blocks: &BlockSet) -> Vec<u64> {
    let mut at = 0;
    let mut runs = Vec::new();
    for run in blocks.runs() {
        runs.extend([run.start - at, run.end - run.start]);
        at = run.end;
    }
    runs
}

/// The record in which all gaps of at most so many blocks count as written too.
pub(crate) fn coarser(blocks: &BlockSet, gap: u64) -> BlockSet {
    let mut coarser = BlockSet::default();
    let mut runs = blocks.runs();
    let Some(mut joined) = runs.next() else { return coarser };
    for run in runs {
        if run.start - joined.end <= gap {
            joined.end = run.end;
        } else {
            coarser.insert(std::mem::replace(&mut joined, run));
        }
    }
    coarser.insert(joined);
    coarser
}

/// The record that runs mean, in a region of `count` blocks; nothing if they mean none.
pub(crate) fn from_runs(runs: &[u64], count: u64) -> Option<BlockSet> {
    let mut blocks = BlockSet::default();
    let mut at = 0u64;
    for run in runs.chunks(2) {
        let &[gap, length] = run else { return None };
        let start = at.checked_add(gap)?;
        at = start.checked_add(length).filter(|end| *end <= count)?;
        blocks.insert(start..at);
    }
    Some(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coarser_records_have_all_that_was_written_and_fewer_runs() {
        let mut blocks = BlockSet::default();
        assert_eq!(coarser(&blocks, 5), blocks);
        [0..1, 3..4, 10..11, 14..20].into_iter().for_each(|run| blocks.insert(run));
        let runs = |gap| coarser(&blocks, gap).runs().collect::<Vec<_>>();
        assert_eq!(runs(0), blocks.runs().collect::<Vec<_>>());
        assert_eq!(runs(2), [0..4, 10..11, 14..20]);
        assert_eq!(runs(5), [0..4, 10..20]);
        assert_eq!(runs(6), std::slice::from_ref(&(0..20)));
    }

    #[test]
    fn records_go_there_and_back_and_hostile_ones_do_not() {
        let mut blocks = BlockSet::default();
        assert_eq!(from_runs(&to_runs(&blocks), 10).unwrap(), blocks);
        [0..1, 5..9, 4000..70_000].into_iter().for_each(|run| blocks.insert(run));
        assert_eq!(to_runs(&blocks), [0, 1, 4, 4, 3991, 66_000]);
        assert_eq!(from_runs(&to_runs(&blocks), 70_000).unwrap(), blocks);
        for wrong in [&[0][..], &[0, 11], &[u64::MAX, 1], &[1, u64::MAX], &[5, 5, 1, 1]] {
            assert_eq!(from_runs(wrong, 10), None, "{wrong:?}");
        }
    }
}
