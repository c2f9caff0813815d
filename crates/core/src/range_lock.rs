//! A lock over ranges of bytes, for whoever must read, change and write back (or let a slow write finish) without
//! stopping everyone else.
//!
//! It needs no runtime: waiting is a future that a released range wakes. It is fair enough for its use: everybody who
//! waits is woken when a range is released and the first to come takes it.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::sync::{Mutex, lock};

/// Ranges that are held, and who waits for one. Cloning gives another handle to the same lock.
#[derive(Debug, Clone)]
pub struct RangeLock {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    ranges: Vec<(u64, Range<u64>)>,
    waiting: Vec<Waker>,
    next: u64,
}

impl Default for RangeLock {
    fn default() -> Self {
        Self { held: Arc::new(Mutex::new(Held::default())) }
    }
}

impl RangeLock {
    /// A lock that nobody holds.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits until nobody holds a range that overlaps `range`, and holds it. An empty range overlaps nothing. Dropping
    /// the future gives up; dropping the guard, from any thread, releases.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard {
        let id = poll_fn(|context| self.poll(context, |held| held.take(&range))).await;
        RangeGuard { held: self.held.clone(), id }
    }

    /// Waits until nobody holds a range that overlaps `range`, and holds nothing. Dropping the future gives up.
    pub async fn free(&self, range: &Range<u64>) {
        poll_fn(|context| self.poll(context, |held| held.is_free(range).then_some(()))).await;
    }

    /// Holds `range` if nobody holds one that overlaps it.
    #[must_use]
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard> {
        let id = lock(&self.held).take(&range)?;
        Some(RangeGuard { held: self.held.clone(), id })
    }

    fn poll<T>(&self, context: &mut Context<'_>, attempt: impl FnOnce(&mut Held) -> Option<T>) -> Poll<T> {
        let mut held = lock(&self.held);
        if let Some(got) = attempt(&mut held) {
            return Poll::Ready(got);
        }
        if !held.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            held.waiting.push(context.waker().clone());
        }
        Poll::Pending
    }
}

impl Held {
    fn is_free(&self, range: &Range<u64>) -> bool {
        !self.ranges.iter().any(|(_, other)| other.start.max(range.start) < other.end.min(range.end))
    }

    fn take(&mut self, range: &Range<u64>) -> Option<u64> {
        if !self.is_free(range) {
            return None;
        }
        self.next += 1;
        self.ranges.push((self.next, range.clone()));
        Some(self.next)
    }
}

/// A range that is held until this is dropped.
#[derive(Debug)]
#[must_use = "the range is released when this is dropped"]
pub struct RangeGuard {
    held: Arc<Mutex<Held>>,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let waiting = {
            let mut held = lock(&self.held);
            held.ranges.retain(|(id, _)| *id != self.id);
            std::mem::take(&mut held.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_overlaps_exclude() {
        let ranges = RangeLock::new();
        let a = ranges.try_lock(0..10).unwrap();
        assert!(ranges.try_lock(9..20).is_none());
        let b = ranges.try_lock(10..20).unwrap();
        drop(a);
        let c = ranges.try_lock(0..10).unwrap();
        assert!(ranges.try_lock(0..20).is_none());
        drop((b, c));
        assert!(ranges.try_lock(0..20).is_some());
    }

    #[test]
    fn a_release_wakes_and_an_abandoned_wait_leaves_nothing_held() {
        let ranges = RangeLock::new();
        let held = ranges.try_lock(0..10).unwrap();
        let mut context = Context::from_waker(Waker::noop());
        {
            let mut abandoned = Box::pin(ranges.lock(5..6));
            assert!(abandoned.as_mut().poll(&mut context).is_pending());
        }
        let mut waiting = Box::pin(ranges.lock(0..1));
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        drop(held);
        let Poll::Ready(guard) = waiting.as_mut().poll(&mut context) else { panic!("the range is free") };
        drop(guard);
        assert!(ranges.try_lock(0..10).is_some());
    }

    #[test]
    fn an_empty_range_overlaps_nothing() {
        let ranges = RangeLock::new();
        let _held = ranges.try_lock(0..10).unwrap();
        let _empty = ranges.try_lock(5..5).unwrap();
        let _other = ranges.try_lock(20..20).unwrap();
        assert!(ranges.try_lock(15..25).is_some());
    }

    #[test]
    fn who_waits_for_a_range_to_be_free_holds_nothing() {
        let ranges = RangeLock::new();
        let held = ranges.try_lock(0..10).unwrap();
        let mut context = Context::from_waker(Waker::noop());
        let mut waiting = Box::pin(ranges.free(&(5..6)));
        assert!(waiting.as_mut().poll(&mut context).is_pending());
        assert!(Box::pin(ranges.free(&(10..20))).as_mut().poll(&mut context).is_ready());
        drop(held);
        assert!(waiting.as_mut().poll(&mut context).is_ready());
        assert!(ranges.try_lock(0..10).is_some());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::future::block_on;
    use loom::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn nobody_sleeps_through_a_release() {
        loom::model(|| {
            let ranges = RangeLock::new();
            let inside = loom::sync::Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (ranges, inside) = (ranges.clone(), inside.clone());
                    loom::thread::spawn(move || {
                        let guard = block_on(ranges.lock(0..1));
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(guard);
                    })
                })
                .collect();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}
