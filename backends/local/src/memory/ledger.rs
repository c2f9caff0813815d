//! How much memory a region takes, and so whether its next slab may be made of huge pages.
//!
//! Huge pages make a region several times faster to fill and a good deal faster to read, but a slab that is made of them
//! takes all of its memory at once. So they are used only while the pages that they waste are no more than those that
//! hold data: a region takes at most about twice what is in it, however sparse it is, and a region that is being filled
//! has huge pages in whatever order that happens.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use r3map_sys::Pages;

use super::slab::{SIZE, Usage};

/// What all slabs of a region take.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    data: AtomicI64,
    spare: AtomicI64,
}

impl Ledger {
    /// What a new slab of `len` bytes is to be made of. Several that are made at once may all be told the same.
    pub(super) fn pages(&self, len: u64) -> Pages {
        let afford = self.spare.load(Relaxed) <= self.data.load(Relaxed);
        if len == SIZE && afford { Pages::Huge } else { Pages::Small }
    }

    /// Notes what became of a slab.
    pub(super) fn record(&self, before: Usage, after: Usage) {
        if before != after {
            self.data.fetch_add(after.data - before.data, Relaxed);
            self.spare.fetch_add(after.spare - before.spare, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts data into `pages` new slabs each; how many of the slabs are made of huge pages.
    fn fill(ledger: &Ledger, slabs: usize, pages: i64) -> usize {
        let make = |_| {
            let made_of = ledger.pages(SIZE);
            let spare = if made_of == Pages::Huge { 32 - pages } else { 0 };
            ledger.record(Usage::default(), Usage { data: pages, spare });
            made_of
        };
        (0..slabs).map(make).filter(|made_of| *made_of == Pages::Huge).count()
    }

    #[test]
    fn what_is_filled_is_huge_and_what_is_sparse_is_mostly_not() {
        assert_eq!(fill(&Ledger::default(), 1000, 32), 1000);
        assert_eq!(fill(&Ledger::default(), 1000, 16), 1000);
        let sparse = Ledger::default();
        assert!(fill(&sparse, 1000, 1) <= 33);
        assert!(sparse.spare.load(Relaxed) <= sparse.data.load(Relaxed) + 32);
        assert!(fill(&sparse, 1000, 32) >= 999, "and when it is filled later, it is");
        assert_eq!(Ledger::default().pages(SIZE - 1), Pages::Small);
    }

    #[test]
    fn what_goes_does_not_count() {
        let ledger = Ledger::default();
        let taken = Usage { data: 1, spare: 31 };
        ledger.record(Usage::default(), taken);
        assert_eq!(ledger.pages(SIZE), Pages::Small);
        ledger.record(taken, Usage::default());
        assert_eq!(ledger.pages(SIZE), Pages::Huge);
    }
}
