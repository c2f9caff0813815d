//! The one place where locks and atomics come from, so that loom can swap them.
//!
//! It does not hold any of our own synchronisation; see `range_lock` and `state` for that.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

/// Locks, and goes on after a panic elsewhere: every critical section in this crate leaves its data consistent at each
/// step that can panic (allocation), so poisoning would only turn one failure into many.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}
