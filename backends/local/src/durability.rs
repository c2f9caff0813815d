//! Knowing whether everything that was changed is on stable storage, and never forgetting that it may not be.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use r3map_core::{Error, Result};

/// Counts changes, and how many of them are durable.
///
/// A failed `fsync` is remembered for good: Linux marks the pages that it could not write as clean, so that the next
/// `fsync` succeeds without having written them. Only reading everything back after opening the file anew can tell.
#[derive(Debug)]
pub(crate) struct Durability {
    changes: AtomicU64,
    durable: AtomicU64,
    failed: Mutex<Option<Error>>,
}

impl Durability {
    /// Nothing is known of what was there before, so that it counts as one change.
    pub(crate) fn unknown() -> Self {
        Self { changes: AtomicU64::new(1), durable: AtomicU64::new(0), failed: Mutex::default() }
    }

    /// Something changes: called before it does, and again when it has.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether every change so far is durable.
    pub(crate) fn is_durable(&self) -> bool {
        self.changes.load(Ordering::SeqCst) == self.durable.load(Ordering::SeqCst) && self.failure().is_none()
    }

    /// Makes every change so far durable with `sync`, unless it is already.
    ///
    /// # Errors
    /// What `sync` gave, now or ever before.
    pub(crate) fn make(&self, sync: impl FnOnce() -> io::Result<()>, fault: impl Fn(io::Error) -> Error) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let seen = self.changes.load(Ordering::SeqCst);
        if self.durable.load(Ordering::SeqCst) >= seen {
            return Ok(());
        }
        match sync() {
            Ok(()) => {
                self.durable.fetch_max(seen, Ordering::SeqCst);
                Ok(())
            }
            Err(error) => {
                let error = fault(error);
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
                Err(error)
            }
        }
    }

    fn failure(&self) -> Option<Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::Operation;

    use super::*;

    fn fault(error: io::Error) -> Error {
        Error::from_io(Operation::Flush, "cannot sync", error)
    }

    #[test]
    fn only_changes_are_synced_and_one_that_comes_meanwhile_counts_for_the_next() {
        let durability = Durability::unknown();
        durability.make(|| Ok(()), fault).unwrap();
        assert!(durability.is_durable());
        durability.make(|| panic!("nothing has changed"), fault).unwrap();
        durability.changed();
        let meanwhile = || {
            durability.changed();
            Ok(())
        };
        durability.make(meanwhile, fault).unwrap();
        assert!(!durability.is_durable());
        durability.make(|| Ok(()), fault).unwrap();
        assert!(durability.is_durable());
    }

    #[test]
    fn a_failure_is_never_forgotten() {
        let durability = Durability::unknown();
        assert!(durability.make(|| Err(io::Error::from_raw_os_error(5)), fault).is_err());
        let error = durability.make(|| Ok(()), fault).unwrap_err();
        assert!(error.to_string().contains("cannot sync"), "{error}");
        assert!(!durability.is_durable());
    }
}
