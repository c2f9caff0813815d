//! Which server has which writes: so that a flush does not promise what a server that died has taken with it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// No instance.
const NOBODY: u128 = u128::MAX;

/// Writes that were acknowledged since the last good flush, by the instance of the server that acknowledged them.
#[derive(Debug, Default)]
pub(crate) struct Unflushed(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts acknowledgements.
    clock: u64,
    /// How often it was reported that something may be lost.
    reports: u64,
    /// Instances, each with the time of its last acknowledgement. Rarely more than one.
    writes: Vec<(u128, u64)>,
}

/// What there was to flush when a flush began.
#[derive(Debug)]
pub(crate) struct Mark(Vec<(u128, u64)>);

impl Unflushed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write was acknowledged by `instance`.
    pub(crate) fn written(&self, instance: u128) {
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        match state.writes.iter_mut().find(|(other, _)| *other == instance) {
            Some((_, last)) => *last = now,
            None => state.writes.push((instance, now)),
        }
    }

    /// A flush begins.
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.state().writes.clone())
    }

    /// The flush that began at `mark` was answered by `instance`. Returns whether that instance has everything that was
    /// written before; if not, what is lost counts as reported and is forgotten, so that writing it again and flushing
    /// again can succeed.
    pub(crate) fn flushed(&self, mark: &Mark, instance: u128) -> bool {
        let mut state = self.state();
        state.writes.retain(|write| !mark.0.contains(write));
        mark.0.iter().all(|(other, _)| *other == instance)
    }

    /// A flush failed for good: no instance has any of what was acknowledged, as the next flush finds, whether anybody hears
    /// of this one or not.
    pub(crate) fn lost(&self) {
        self.state().writes.iter_mut().for_each(|(instance, _)| *instance = NOBODY);
    }

    /// Whoever flushes is told that what there was at `mark` may be lost. Returns whether there was anything.
    pub(crate) fn report(&self, mark: &Mark) -> bool {
        let mut state = self.state();
        state.writes.retain(|(_, last)| !mark.0.iter().any(|(_, marked)| marked == last));
        state.reports += 1;
        !mark.0.is_empty()
    }

    /// How often somebody was told.
    pub(crate) fn reports(&self) -> u64 {
        self.state().reports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_instance_has_it_all() {
        let unflushed = Unflushed::default();
        unflushed.written(1);
        let mark = unflushed.mark();
        assert!(unflushed.flushed(&mark, 1));
        assert!(unflushed.mark().0.is_empty());
        assert!(unflushed.flushed(&unflushed.mark(), 2), "nothing was written since");
    }

    #[test]
    fn another_instance_is_reported_to_every_flush_that_it_concerns_and_then_forgotten() {
        let unflushed = Unflushed::default();
        unflushed.written(1);
        unflushed.written(2);
        let marks = [unflushed.mark(), unflushed.mark()];
        assert!(marks.iter().all(|mark| !unflushed.flushed(mark, 2)));
        unflushed.written(2);
        assert!(unflushed.flushed(&unflushed.mark(), 2));
    }

    #[test]
    fn a_write_during_the_flush_is_kept_for_the_next() {
        let unflushed = Unflushed::default();
        unflushed.written(1);
        let mark = unflushed.mark();
        unflushed.written(1);
        assert!(unflushed.flushed(&mark, 1));
        assert!(!unflushed.flushed(&unflushed.mark(), 2));
    }

    #[test]
    fn a_write_during_a_flush_that_failed_for_good_is_lost_too() {
        let unflushed = Unflushed::default();
        unflushed.written(1);
        let mark = unflushed.mark();
        unflushed.written(1);
        unflushed.lost();
        assert!(unflushed.report(&mark));
        unflushed.written(1);
        assert!(!unflushed.flushed(&unflushed.mark(), 1));
        assert!(!unflushed.report(&unflushed.mark()), "it was reported");
    }
}
