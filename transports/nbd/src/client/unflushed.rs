//! Which connection has acknowledged which writes: so that a flush does not promise what a server that died has taken
//! with it.
//!
//! NBD servers have no identity. What is known is this: whoever answers a flush on a connection is the one who was at its
//! other end ever since it was opened. So a flush covers what was acknowledged on the same connection, and, where the
//! server shares its cache between connections (`NBD_FLAG_CAN_MULTI_CONN`), whatever was sent on any other after this one was
//! opened, and acknowledged: that other server lived while this one did. (When it was acknowledged says nothing: the
//! answer of a server that has died may still be on its way.) What no connection that still works covers may be lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names a connection, and orders events: each is later than those with smaller numbers.
pub(crate) type Moment = u64;

/// Names no connection, and is before all of them.
const NO_LINK: Moment = 0;

/// Changes that were acknowledged since the last good flush.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    clock: AtomicU64,
    /// How often it was reported that something may be lost.
    reports: AtomicU64,
    written: Mutex<Vec<Written>>,
}

/// What one connection has acknowledged. Connections are named by the moment at which they were opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) link: Moment,
    /// When the first of it was sent.
    first_sent: Moment,
    /// When the last of it was acknowledged.
    last: Moment,
}

impl Written {
    /// Whether a flush that the link `other` answers makes this durable.
    pub(crate) fn covered_by(&self, other: Moment, shared_cache: bool) -> bool {
        self.link == other || (shared_cache && self.first_sent > other)
    }
}

impl Unflushed {
    /// Now: a connection is open, and this names it; or something is about to be sent.
    pub(crate) fn now(&self) -> Moment {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// A change that was `sent` on `link` was acknowledged.
    pub(crate) fn written(&self, link: Moment, sent: Moment) {
        let mut written = self.lock();
        let last = self.now();
        match written.iter_mut().find(|written| written.link == link) {
            Some(written) => *written = Written { link, first_sent: written.first_sent.min(sent), last },
            None => written.push(Written { link, first_sent: sent, last }),
        }
    }

    /// A flush begins: what there is to flush.
    pub(crate) fn mark(&self) -> Vec<Written> {
        self.lock().clone()
    }

    /// What there was to flush at `mark` is flushed, or reported as lost. What was acknowledged on the same connection
    /// since then is kept, as if it had been sent as early as the rest.
    pub(crate) fn settled(&self, mark: &[Written]) {
        self.lock().retain(|written| !mark.iter().any(|marked| marked.last == written.last));
    }

    /// A flush has failed, or nobody knows what became of it: no connection covers any of what was acknowledged, as the next
    /// flush finds, whether anybody heard of this one or not.
    pub(crate) fn lost(&self) {
        self.lock().iter_mut().for_each(|written| (written.link, written.first_sent) = (NO_LINK, NO_LINK));
    }

    /// Somebody is told that what there was to flush may be lost.
    pub(crate) fn report(&self) {
        self.reports.fetch_add(1, Ordering::SeqCst);
    }

    /// How often that was so.
    pub(crate) fn reports(&self) -> u64 {
        self.reports.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(unflushed: &Unflushed, link: Moment) {
        unflushed.written(link, unflushed.now());
    }

    #[test]
    fn a_connection_covers_what_it_has_acknowledged() {
        let unflushed = Unflushed::default();
        let link = unflushed.now();
        write(&unflushed, link);
        let mark = unflushed.mark();
        assert!(mark.iter().all(|written| written.covered_by(link, false)));
        unflushed.settled(&mark);
        assert_eq!(unflushed.mark(), []);
    }

    #[test]
    fn an_older_connection_covers_others_only_where_the_cache_is_shared() {
        let unflushed = Unflushed::default();
        let (old, new) = (unflushed.now(), unflushed.now());
        write(&unflushed, new);
        let [written] = unflushed.mark()[..] else { panic!("one entry") };
        assert!(written.covered_by(old, true));
        assert!(!written.covered_by(old, false));
    }

    #[test]
    fn a_connection_that_was_opened_after_the_write_was_sent_proves_nothing() {
        let unflushed = Unflushed::default();
        let (old, sent) = (unflushed.now(), unflushed.now());
        let new = unflushed.now();
        unflushed.written(old, sent);
        assert!(!unflushed.mark()[0].covered_by(new, true), "the server may have died between the two");
        write(&unflushed, old);
        assert!(!unflushed.mark()[0].covered_by(new, true), "the earlier one is still there");
    }

    #[test]
    fn a_write_during_the_flush_is_kept_for_the_next() {
        let unflushed = Unflushed::default();
        let link = unflushed.now();
        write(&unflushed, link);
        let mark = unflushed.mark();
        write(&unflushed, link);
        unflushed.settled(&mark);
        assert_eq!(unflushed.mark().len(), 1);
        unflushed.settled(&unflushed.mark());
        assert_eq!(unflushed.mark(), []);
    }

    #[test]
    fn a_write_during_a_flush_that_is_refused_is_covered_by_nobody() {
        let unflushed = Unflushed::default();
        let link = unflushed.now();
        write(&unflushed, link);
        let mark = unflushed.mark();
        write(&unflushed, link);
        unflushed.lost();
        unflushed.settled(&mark);
        write(&unflushed, link);
        let covered =
            |shared| unflushed.mark().iter().map(|written| written.covered_by(link, shared)).collect::<Vec<_>>();
        assert_eq!((covered(false), covered(true)), (vec![false, true], vec![false, true]));
        unflushed.lost();
        unflushed.settled(&unflushed.mark());
        assert_eq!(unflushed.mark(), []);
    }
}
