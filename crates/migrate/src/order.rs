//! In which order to pull: what is written often comes last, because it will change again.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use r3map_core::Geometry;
use r3map_pipeline::{BlockSet, Priority};

/// The most chunks that are sorted; beyond it the rest follows in sequence.
const SORTED: usize = 1 << 20;

/// When each chunk was last seen to be written.
#[derive(Debug, Default)]
pub(crate) struct Heat {
    /// The number of the record that named the chunk last.
    rounds: HashMap<u64, u64>,
}

impl Heat {
    /// Record number `round` names these blocks.
    pub(crate) fn written(&mut self, geometry: &Geometry, blocks: &BlockSet, round: u64) {
        for chunk in blocks.chunks(geometry).flatten().take(SORTED) {
            self.rounds.insert(chunk, round);
        }
    }

    /// What to pull first of `missing`: what was never written in the caller's order, then the least recently written.
    pub(crate) fn order(&self, geometry: &Geometry, missing: &BlockSet, callers: &Priority) -> Priority {
        if self.rounds.is_empty() {
            return callers.clone();
        }
        let rank = Rank::new(callers);
        let mut chunks: Vec<u64> = missing.chunks(geometry).flatten().take(SORTED).collect();
        chunks.sort_by_cached_key(|chunk| {
            (self.rounds.get(chunk).copied().unwrap_or(0), Reverse(rank.of(*chunk)), *chunk)
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
        assert_eq!(chunks(&heat.order(&geometry, &missing, &callers)), [5, 3, 2, 4, 1]);
        let callers = Priority::List(Arc::from([5, 4]));
        assert_eq!(chunks(&heat.order(&geometry, &missing, &callers)), [5, 3, 2, 4, 1]);
    }
}
