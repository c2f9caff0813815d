//! A very long row of slots, in tables that are allocated when one of their slots is first used.

use std::sync::OnceLock;

/// log2 of the slots in a leaf.
const LEAF_BITS: u32 = 9;
/// log2 of the leaves in an inner table.
const INNER_BITS: u32 = 14;

type Leaf<T> = Box<[T]>;
type Inner<T> = Box<[OnceLock<Leaf<T>>]>;

/// So many slots, each with its default value until something else is put in.
pub(super) struct Sparse<T> {
    count: u64,
    top: Box<[OnceLock<Inner<T>>]>,
}

impl<T: Default> Sparse<T> {
    /// `count` slots, at least one. Allocates in proportion to `count >> 23`.
    pub(super) fn new(count: u64) -> Self {
        Self { count, top: table(count, 0, LEAF_BITS + INNER_BITS, count) }
    }

    /// A slot, unless nothing near it was ever used.
    pub(super) fn get(&self, index: u64) -> Option<&T> {
        Some(&self.leaf(index)?[place(index, 0, LEAF_BITS)])
    }

    /// A slot, after allocating the tables above it.
    pub(super) fn get_or_make(&self, index: u64) -> &T {
        let inner = self.top[top(index)].get_or_init(|| table(self.count, index, LEAF_BITS, 1 << INNER_BITS));
        let leaf =
            inner[place(index, LEAF_BITS, INNER_BITS)].get_or_init(|| table(self.count, index, 0, 1 << LEAF_BITS));
        &leaf[place(index, 0, LEAF_BITS)]
    }

    /// The first slot from `index` on that is allocated.
    pub(super) fn next(&self, index: u64) -> Option<(u64, &T)> {
        let mut index = index;
        while index < self.count {
            let skip = match self.top[top(index)].get() {
                None => LEAF_BITS + INNER_BITS,
                Some(_) => match self.get(index) {
                    Some(slot) => return Some((index, slot)),
                    None => LEAF_BITS,
                },
            };
            index = ((index >> skip) + 1) << skip;
        }
        None
    }

    fn leaf(&self, index: u64) -> Option<&Leaf<T>> {
        self.top[top(index)].get()?[place(index, LEAF_BITS, INNER_BITS)].get()
    }
}

/// A table with room for the entries of `1 << bits` slots each that lie beside slot `index` among `count` slots, at
/// most `most` of them.
fn table<T: Default>(count: u64, index: u64, bits: u32, most: u64) -> Box<[T]> {
    let entries = ((count - 1) >> bits) + 1;
    let first = (index >> bits) / most * most;
    (first..entries.min(first + most)).map(|_| T::default()).collect()
}

fn top(index: u64) -> usize {
    usize::try_from(index >> (LEAF_BITS + INNER_BITS)).unwrap_or(usize::MAX)
}

/// Where slot `index` belongs in a table of `1 << size` entries of `1 << bits` slots each.
fn place(index: u64, bits: u32, size: u32) -> usize {
    usize::try_from((index >> bits) & ((1 << size) - 1)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;

    #[test]
    fn slots_are_apart_and_found_again() {
        let last = 1 << 39;
        let slots: Sparse<AtomicU64> = Sparse::new(last + 1);
        let used = [0, 1, 511, 512, (1 << 23) - 1, 1 << 23, last - 1, last];
        assert!(slots.get(0).is_none() && slots.next(0).is_none());
        used.iter().for_each(|index| slots.get_or_make(*index).store(index + 1, Relaxed));
        used.iter().for_each(|index| assert_eq!(slots.get(*index).unwrap().load(Relaxed), index + 1));
        assert!(slots.get(1024).is_none());
        let next = |index| slots.next(index).map(|(index, _)| index);
        // Those beside a used one are allocated, and others are skipped.
        assert_eq!(
            [next(0), next(600), next(1024), next(last)],
            [Some(0), Some(600), Some((1 << 23) - 512), Some(last)]
        );
        assert_eq!([next((1 << 23) + 512), next(last + 1)], [Some(last - 512), None]);
    }

    #[test]
    fn tables_are_no_longer_than_the_row() {
        let slots: Sparse<u8> = Sparse::new(1 << 9 | 3);
        slots.get_or_make(514);
        assert_eq!((slots.leaf(514).unwrap().len(), slots.top.len()), (3, 1));
        slots.get_or_make(0);
        assert_eq!(slots.leaf(0).unwrap().len(), 512);
    }
}
