//! Which bytes of a read have arrived, where a server may send them in any order but each only once.

use std::ops::Range;

/// The most runs with gaps between them: a server that needs more of them is not sending a reply but an attack.
const MAX_RUNS: usize = 4096;

/// Bytes that have arrived, as runs in ascending order with gaps between them.
#[derive(Debug, Default)]
pub(crate) struct Coverage(Vec<Range<u64>>);

impl Coverage {
    /// Adds a range that is not empty.
    ///
    /// # Errors
    /// If some of it is there already, or there are too many gaps.
    pub(crate) fn add(&mut self, range: Range<u64>) -> Result<(), &'static str> {
        let at = self.0.partition_point(|run| run.start < range.start);
        let before = at.checked_sub(1).map(|before| self.0[before].end);
        let after = self.0.get(at).map(|run| run.start);
        if before.is_some_and(|end| end > range.start) || after.is_some_and(|start| start < range.end) {
            return Err("bytes that it has sent before");
        }
        match (before == Some(range.start), after == Some(range.end)) {
            (true, true) => self.0[at - 1].end = self.0.remove(at).end,
            (true, false) => self.0[at - 1].end = range.end,
            (false, true) => self.0[at].start = range.start,
            (false, false) if self.0.len() == MAX_RUNS => return Err("a reply in too many pieces"),
            (false, false) => self.0.insert(at, range),
        }
        Ok(())
    }

    /// Whether exactly `range` has arrived.
    pub(crate) fn is(&self, range: &Range<u64>) -> bool {
        self.0 == [range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use r3map_testkit::random::Random;

    use super::*;

    #[test]
    fn any_order_is_fine_and_any_overlap_is_not() {
        let mut coverage = Coverage::default();
        for range in [4..6, 0..2, 8..9, 2..4, 6..8] {
            coverage.add(range).unwrap();
        }
        assert!(coverage.is(&(0..9)));
        assert!(!coverage.is(&(0..10)));
        for range in [0..1, 3..7, 8..20, 0..9] {
            assert!(coverage.add(range).is_err());
        }
    }

    #[test]
    fn agrees_with_a_list_of_bytes() {
        let mut random = Random::new(7);
        for _ in 0..200 {
            let (mut coverage, mut bytes) = (Coverage::default(), [false; 64]);
            for _ in 0..40 {
                let start = random.below(60);
                let range = start..start + 1 + random.below(4);
                let slice = &mut bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()];
                let free = slice.iter().all(|byte| !byte);
                assert_eq!(coverage.add(range).is_ok(), free);
                if free {
                    slice.fill(true);
                }
            }
            assert_eq!(coverage.is(&(0..64)), bytes.iter().all(|byte| *byte));
        }
    }

    #[test]
    fn an_attack_is_cut_short() {
        let mut coverage = Coverage::default();
        let added = (0..u64::MAX).take_while(|at| coverage.add(at * 2..at * 2 + 1).is_ok()).count();
        assert_eq!(added, MAX_RUNS);
    }
}
