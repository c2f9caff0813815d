//! A fixed number of bits that costs nothing while all of them are alike.
//!
//! The building block of [`crate::state`]: a region that is wholly absent or wholly valid keeps no bitmap at all. It
//! knows nothing of what a bit means.

use std::ops::Range;

/// Bits per word.
const WORD: u32 = u64::BITS;

/// A set of bits. The number of bits is its owner's business and given with each call that needs it.
#[derive(Debug, Clone, Default)]
pub(crate) enum Bits {
    /// No bit is set.
    #[default]
    Clear,
    /// Every bit is set.
    Full,
    /// Some are: the words, and how many.
    Mixed(Box<[u64]>, u32),
}

impl Bits {
    /// Whether any bit is set.
    pub(crate) fn any(&self) -> bool {
        !matches!(self, Self::Clear)
    }

    /// 64 bits from bit `64 * index` on. Bits past the end are whatever they are: mask them.
    pub(crate) fn word(&self, index: u32) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Full => u64::MAX,
            Self::Mixed(words, _) => words[index as usize],
        }
    }

    /// Sets or clears a range of the `len` bits, and says how many changed.
    pub(crate) fn fill(&mut self, len: u32, range: Range<u32>, value: bool) -> u32 {
        match (&*self, value) {
            (Self::Clear, false) | (Self::Full, true) => return 0,
            _ if range.is_empty() => return 0,
            _ if range == (0..len) => return self.fill_all(len, value),
            (Self::Clear, true) => *self = Self::Mixed(vec![0; len.div_ceil(WORD) as usize].into(), 0),
            (Self::Full, false) => *self = Self::Mixed(vec![u64::MAX; len.div_ceil(WORD) as usize].into(), len),
            (Self::Mixed(..), _) => {}
        }
        let Self::Mixed(words, ones) = self else { unreachable!("made mixed above") };
        let mut changed = 0;
        for (index, mask) in masks(range) {
            let word = &mut words[index as usize];
            let flips = if value { !*word & mask } else { *word & mask };
            *word ^= flips;
            changed += flips.count_ones();
        }
        *ones = if value { *ones + changed } else { *ones - changed };
        if *ones == 0 {
            *self = Self::Clear;
        } else if *ones == len {
            *self = Self::Full;
        }
        changed
    }

    fn fill_all(&mut self, len: u32, value: bool) -> u32 {
        let ones = match self {
            Self::Clear => 0,
            Self::Full => len,
            Self::Mixed(_, ones) => *ones,
        };
        *self = if value { Self::Full } else { Self::Clear };
        if value { len - ones } else { ones }
    }

    /// Whether every bit of a range is set.
    pub(crate) fn all(&self, range: Range<u32>) -> bool {
        match self {
            Self::Clear => range.is_empty(),
            Self::Full => true,
            Self::Mixed(words, _) => masks(range).all(|(index, mask)| words[index as usize] & mask == mask),
        }
    }

    /// Whether any bit of a range is set.
    pub(crate) fn intersects(&self, range: Range<u32>) -> bool {
        match self {
            Self::Clear => false,
            Self::Full => !range.is_empty(),
            Self::Mixed(words, _) => masks(range).any(|(index, mask)| words[index as usize] & mask != 0),
        }
    }
}

/// The words that a range of bits touches, each with the mask of its bits inside.
fn masks(range: Range<u32>) -> impl Iterator<Item = (u32, u64)> {
    let last = if range.is_empty() { range.start / WORD } else { range.end.div_ceil(WORD) };
    (range.start / WORD..last).map(move |index| {
        let base = index * WORD;
        let low = range.start.saturating_sub(base);
        let high = (range.end - base).min(WORD);
        (index, (u64::MAX << low) & (u64::MAX >> (WORD - high)))
    })
}

/// How many bits of `word(index)` are set inside `range`.
pub(crate) fn count(range: Range<u32>, word: impl Fn(u32) -> u64) -> u32 {
    masks(range).map(|(index, mask)| (word(index) & mask).count_ones()).sum()
}

/// The first bit at or after `range.start` that is set in `word(index)`.
pub(crate) fn first(range: Range<u32>, word: impl Fn(u32) -> u64) -> Option<u32> {
    masks(range).find_map(|(index, mask)| match word(index) & mask {
        0 => None,
        bits => Some(index * WORD + bits.trailing_zeros()),
    })
}

/// The first run of set bits of `word(index)` inside `range`.
pub(crate) fn first_run(range: Range<u32>, word: impl Fn(u32) -> u64) -> Option<Range<u32>> {
    let start = first(range.clone(), &word)?;
    let end = first(start..range.end, |index| !word(index)).unwrap_or(range.end);
    Some(start..end)
}

/// Calls `visit` with every run of set bits of `word(index)` inside `range`, until it fails.
pub(crate) fn each_run<E>(
    range: Range<u32>,
    word: impl Fn(u32) -> u64,
    mut visit: impl FnMut(Range<u32>) -> Result<(), E>,
) -> Result<(), E> {
    let mut rest = range;
    while let Some(run) = first_run(rest.clone(), &word) {
        rest.start = run.end;
        visit(run)?;
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_bools(
            len in 1u32..300,
            steps in proptest::collection::vec((0u32..300, 0u32..300, any::<bool>()), 0..40),
        ) {
            let mut bits = Bits::default();
            let mut model = vec![false; len as usize];
            for (a, b, value) in steps {
                let (a, b) = (a % (len + 1), b % (len + 1));
                let range = a.min(b)..a.max(b);
                let inside = &mut model[range.start as usize..range.end as usize];
                let changes = inside.iter().filter(|bit| **bit != value).count();
                inside.fill(value);
                let (all, any) = (inside.iter().all(|bit| *bit), inside.iter().any(|bit| *bit));
                let ones = inside.iter().filter(|bit| **bit).count();
                prop_assert_eq!(bits.fill(len, range.clone(), value) as usize, changes);
                prop_assert_eq!(bits.all(range.clone()), all);
                prop_assert_eq!(bits.intersects(range.clone()), any);
                prop_assert_eq!(count(range, |index| bits.word(index)) as usize, ones);
                prop_assert_eq!(bits.any(), model.contains(&true));
                let mut found = vec![false; len as usize];
                each_run(0..len, |index| bits.word(index), |run| {
                    found[run.start as usize..run.end as usize].fill(true);
                    Ok::<(), ()>(())
                }).unwrap();
                prop_assert_eq!(&found, &model);
            }
        }
    }
}
