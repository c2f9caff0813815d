//! A set of blocks: which ones were written since somebody asked. It knows nothing of what they hold.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Range;

use r3map_core::Geometry;

/// Blocks that one leaf covers: 16 MiB of the region in 512 bytes.
const LEAF: u64 = 4096;
const WORD: u64 = u64::BITS as u64;
const WORDS: usize = (LEAF / WORD) as usize;

/// A set of block indices, as bits in leaves that exist where something was set: at most 32 MiB for each TiB of the
/// region, however the blocks lie.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockSet {
    leaves: BTreeMap<u64, Box<[u64; WORDS]>>,
}

impl BlockSet {
    /// Adds a run of blocks.
    pub fn insert(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let leaf = at / LEAF;
            let end = blocks.end.min((leaf + 1) * LEAF);
            let words = self.leaves.entry(leaf).or_insert_with(|| Box::new([0; WORDS]));
            set(words, at % LEAF..end - leaf * LEAF);
            at = end;
        }
    }

    /// Adds all blocks of another set.
    pub fn union(&mut self, other: &Self) {
        for (leaf, words) in &other.leaves {
            let ours = self.leaves.entry(*leaf).or_insert_with(|| Box::new([0; WORDS]));
            ours.iter_mut().zip(words.iter()).for_each(|(ours, theirs)| *ours |= theirs);
        }
    }

    /// Takes all blocks of another set out.
    pub fn subtract(&mut self, other: &Self) {
        self.leaves.retain(|leaf, ours| {
            let Some(theirs) = other.leaves.get(leaf) else { return true };
            ours.iter_mut().zip(theirs.iter()).for_each(|(ours, theirs)| *ours &= !theirs);
            ours.iter().any(|word| *word != 0)
        });
    }

    /// The blocks from 0 to `count` that are not in the set.
    #[must_use]
    pub fn complement(&self, count: u64) -> Self {
        let mut others = Self::default();
        others.insert(0..count);
        others.subtract(self);
        others
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.leaves.values().flat_map(|words| words.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether a block is one of them.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        let words = self.leaves.get(&(block / LEAF));
        words.is_some_and(|words| words[word(block % LEAF)] & (1 << (block % WORD)) != 0)
    }

    /// The longest runs of blocks, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        joined(self.leaves.iter().flat_map(|(leaf, words)| {
            let starts = (leaf * LEAF..).step_by(WORDS);
            starts.zip(words.iter()).flat_map(|(start, word)| word_runs(start, *word))
        }))
    }

    /// The longest runs of chunks in which a block is set, ascending.
    pub fn chunks<'a>(&'a self, geometry: &'a Geometry) -> impl Iterator<Item = Range<u64>> + 'a {
        joined(self.runs().map(|run| geometry.chunks_touched(&geometry.blocks_range(&run))))
    }
}

fn word(bit: u64) -> usize {
    usize::try_from(bit / WORD).expect("a leaf has few words")
}

/// Sets a run of bits that is not empty.
fn set(words: &mut [u64; WORDS], bits: Range<u64>) {
    let (first, last) = (word(bits.start), word(bits.end - 1));
    let head = u64::MAX << (bits.start % WORD);
    let tail = u64::MAX >> (WORD - 1 - (bits.end - 1) % WORD);
    if first == last {
        words[first] |= head & tail;
        return;
    }
    words[first] |= head;
    words[first + 1..last].fill(u64::MAX);
    words[last] |= tail;
}

fn word_runs(start: u64, mut word: u64) -> impl Iterator<Item = Range<u64>> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let zeros = word.trailing_zeros();
        let ones = (word >> zeros).trailing_ones();
        // Adding to the lowest one carries through the run; what is carried beyond the word is gone.
        word &= word.wrapping_add(1 << zeros);
        let from = start + u64::from(zeros);
        Some(from..from + u64::from(ones))
    })
}

/// Joins ascending runs that touch or overlap.
fn joined(runs: impl Iterator<Item = Range<u64>>) -> impl Iterator<Item = Range<u64>> {
    let mut runs: Peekable<_> = runs.peekable();
    std::iter::from_fn(move || {
        let mut run = runs.next()?;
        while let Some(next) = runs.next_if(|next| next.start <= run.end) {
            run.end = run.end.max(next.end);
        }
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use r3map_core::ChunkSize;

    use super::*;

    fn runs_of(blocks: &BTreeSet<u64>) -> Vec<Range<u64>> {
        joined(blocks.iter().map(|block| *block..block + 1)).collect()
    }

    proptest! {
        #[test]
        fn is_a_set(runs in prop::collection::vec((0u64..20_000, 0u64..300), 0..40), split in 0usize..40) {
            let (mut ours, mut theirs, mut model) = (BlockSet::default(), BlockSet::default(), BTreeSet::new());
            for (n, (start, len)) in runs.iter().enumerate() {
                let set = if n < split { &mut ours } else { &mut theirs };
                set.insert(*start..start + len);
                model.extend(*start..start + len);
            }
            ours.union(&theirs);
            prop_assert_eq!(ours.len(), model.len() as u64);
            prop_assert_eq!(ours.is_empty(), model.is_empty());
            prop_assert_eq!(ours.runs().collect::<Vec<_>>(), runs_of(&model));
            for block in (0..20_300).step_by(37) {
                prop_assert_eq!(ours.contains(block), model.contains(&block));
            }
            let geometry = Geometry::new(20_300 * 4096 - 5, ChunkSize::new(16384).unwrap()).unwrap();
            let chunks: BTreeSet<_> = model.iter().map(|block| block / 4).collect();
            prop_assert_eq!(ours.chunks(&geometry).collect::<Vec<_>>(), runs_of(&chunks));
            let absent = (0..20_300).filter(|block| !model.contains(block)).collect();
            prop_assert_eq!(ours.complement(20_300).runs().collect::<Vec<_>>(), runs_of(&absent));
            prop_assert!(theirs.runs().flatten().all(|block| model.remove(&block)));
            ours.subtract(&theirs);
            prop_assert_eq!(ours.runs().collect::<Vec<_>>(), runs_of(&model));
            prop_assert_eq!(ours.is_empty(), model.is_empty());
        }
    }

    #[test]
    fn a_long_run_stays_one() {
        let mut set = BlockSet::default();
        set.insert(100..3 * LEAF + 7);
        assert!(set.runs().eq(std::iter::once(100..3 * LEAF + 7)));
    }
}
