//! In which order to pull: what is written often comes last, because it will change again.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use r3map_core::Geometry;
use r3map_pipeline::{BlockSet, Priority};

/// The most chunks that are sorted; beyond it the rest follows in sequence.
const SORTED: usize = 1 << 20;

/// When each chunk was seen to be written.
#[derive(Debug, Default)]
pub(crate) struct Heat {
    chunks: HashMap<u64, Written>,
    /// The number of the last record.
    round: u64,
}

/// Which of the records have named a chunk. All that is missing in a round is named by the last record, so that it does
/// not tell them apart, and those before it do.
#[derive(Debug, Clone, Copy)]
struct Written {
    /// The number of the record that named it last.
    round: u64,
    /// That one is the highest bit, the one before it the next, and so on.
    records: u64,
}

impl Written {
    /// The same counted from record `round`: the later it was written, and the more often, the higher.
    fn seen_from(self, round: u64) -> u64 {
        let later = u32::try_from(round - self.round).unwrap_or(u32::MAX);
        self.records.checked_shr(later).unwrap_or(0)
    }
}

impl Heat {
    /// Record number `round` names these blocks.
    pub(crate) fn written(&mut self, geometry: &Geometry, blocks: &BlockSet, round: u64) {
        const LAST: u64 = 1 << 63;
        self.round = round;
        for chunk in blocks.chunks(geometry).flatten().take(SORTED) {
            let written = self.chunks.entry(chunk).or_insert(Written { round, records: 0 });
            *written = Written { round, records: written.seen_from(round) | LAST };
        }
    }

    /// What to pull first of `missing`: what was never written in the caller's order, then the least recently written.
    pub(crate) fn order(&self, geometry: &Geometry, missing: &BlockSet, callers: &Priority) -> Priority {
        if self.chunks.is_empty() {
            return callers.clone();
        }
        let rank = Rank::new(callers);
        let mut chunks: Vec<u64> = missing.chunks(geometry).flatten().take(SORTED).collect();
        chunks.sort_by_cached_key(|chunk| {
            let written = self.chunks.get(chunk).map_or(0, |written| written.seen_from(self.round));
            (written, Reverse(rank.of(*chunk)), *chunk)
        });
        Priority::List(Arc::from(chunks))
    }
}

/// The caller's priority as a value: the highest first.
enum Rank {
    None,
    Function(Arc<dyn Fn(u64) -> i64 + Send + Sync>),
    List(HashMap<u64, usize>),
}

impl Rank {
    fn new(callers: &Priority) -> Self {
        match callers {
            Priority::None => Self::None,
            Priority::Function(value) => Self::Function(value.clone()),
            Priority::List(chunks) => Self::List(chunks.iter().enumerate().map(|(at, chunk)| (*chunk, at)).collect()),
        }
    }

    fn of(&self, chunk: u64) -> i64 {
        match self {
            Self::None => 0,
            Self::Function(value) => value(chunk),
            Self::List(places) => match places.get(&chunk) {
                Some(place) => i64::try_from(*place).map_or(i64::MIN, |place| -place),
                None => i64::MIN,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::ChunkSize;

    use super::*;

    fn set(blocks: &[u64]) -> BlockSet {
        let mut set = BlockSet::default();
        blocks.iter().for_each(|block| set.insert(*block..*block + 1));
        set
    }

    fn chunks(priority: &Priority) -> Vec<u64> {
        match priority {
            Priority::List(chunks) => chunks.to_vec(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_written_often_comes_last() {
        let geometry = Geometry::new(64 << 12, ChunkSize::MIN).unwrap();
        let mut heat = Heat::default();
        let missing = set(&[1, 2, 3, 4, 5]);
        assert!(matches!(heat.order(&geometry, &missing, &Priority::None), Priority::None));
        heat.written(&geometry, &set(&[2, 4]), 1);
        heat.written(&geometry, &set(&[1, 4]), 2);
        assert_eq!(chunks(&heat.order(&geometry, &missing, &Priority::None)), [3, 5, 2, 1, 4]);
        let callers = Priority::Function(Arc::new(|chunk| i64::try_from(chunk).unwrap()));
        assert_eq!(chunks(&heat.order(&geometry, &missing, &callers)), [5, 3, 2, 1, 4], "only what is as hot");
        let callers = Priority::List(Arc::from([5, 4]));
        assert_eq!(chunks(&heat.order(&geometry, &missing, &callers)), [5, 3, 2, 1, 4]);
    }

    #[test]
    fn what_one_record_names_is_told_apart_by_those_before_it() {
        let geometry = Geometry::new(64 << 12, ChunkSize::MIN).unwrap();
        let mut heat = Heat::default();
        for (round, written) in [(1, &[1, 2][..]), (2, &[1]), (3, &[4]), (4, &[1, 2, 3, 4])] {
            heat.written(&geometry, &set(written), round);
        }
        let order = |heat: &Heat| chunks(&heat.order(&geometry, &set(&[1, 2, 3, 4]), &Priority::None));
        assert_eq!(order(&heat), [3, 2, 1, 4], "the one that was written in the round before comes last");
        heat.written(&geometry, &set(&[2]), 1000);
        assert_eq!(order(&heat), [1, 3, 4, 2], "what was so long ago is all the same");
    }
}
