//! A record of blocks that were written since somebody asked: kept here, fed by whoever notices writes (the
//! [tracked stage](crate::Tracked), or a [cached region](crate::Cached) that searches a mapping for them).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::BlockSet;

/// The record, and whether it is being kept. Cloning gives another handle to the same.
#[derive(Clone, Default)]
pub struct Tracker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    tracking: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    /// Which tracking this is: what was taken from an earlier one is not put back.
    tracking: u64,
    blocks: BlockSet,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker").field("tracking", &self.is_tracking()).finish_non_exhaustive()
    }
}

impl Tracker {
    /// Starts to record, with an empty record.
    pub fn track(&self) {
        self.restart(true);
    }

    /// Stops recording, and forgets the record.
    pub fn stop(&self) {
        self.restart(false);
    }

    /// Whether anything is recorded now.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.0.tracking.load(Ordering::SeqCst)
    }

    /// These blocks were written. Nothing if nothing is recorded now.
    pub fn note(&self, blocks: Range<u64>) {
        let mut record = self.record();
        // Under the lock, so that nothing is left in the record of a tracking that was stopped.
        if self.is_tracking() {
            record.blocks.insert(blocks);
        }
    }

    /// Takes the record so far; recording goes on with an empty one. What is taken is put back unless it is
    /// [confirmed](Taken::confirm).
    #[must_use = "what is not confirmed is put back"]
    pub fn take(&self) -> Taken {
        let mut record = self.record();
        let blocks = std::mem::take(&mut record.blocks);
        Taken { tracking: record.tracking, blocks, tracker: self.clone() }
    }

    fn restart(&self, tracking: bool) {
        let mut record = self.record();
        *record = Record { tracking: record.tracking + 1, blocks: BlockSet::default() };
        self.0.tracking.store(tracking, Ordering::SeqCst);
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record that was taken, and whose receiver does not have it yet. Dropping it puts it back, unless tracking was
/// started anew or stopped meanwhile.
#[must_use = "what is not confirmed is put back"]
pub struct Taken {
    tracking: u64,
    blocks: BlockSet,
    tracker: Tracker,
}

impl Taken {
    /// What was written.
    #[must_use]
    pub fn blocks(&self) -> &BlockSet {
        &self.blocks
    }

    /// The receiver has it: it is not put back.
    pub fn confirm(mut self) -> BlockSet {
        std::mem::take(&mut self.blocks)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut record = self.tracker.record();
        if record.tracking == self.tracking {
            record.blocks.union(&self.blocks);
        }
    }
}
