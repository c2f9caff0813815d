//! Knowing whether everything that was changed is on stable storage, and never forgetting that it may not be.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use r3map_core::{Error, Result};

/// Why changes are not durable.
#[derive(Debug)]
pub(crate) enum Undurable {
    /// The kernel could not write something, and will not try again: see [`Durability`].
    Lost(io::Error),
    /// Something else failed, and may work the next time.
    NotYet(io::Error),
}

impl From<io::Error> for Undurable {
    fn from(error: io::Error) -> Self {
        Self::NotYet(error)
    }
}

/// `fdatasync`.
pub(crate) fn sync_data(file: &fs::File) -> std::result::Result<(), Undurable> {
    #[cfg(test)]
    on_sync::call();
    file.sync_data().map_err(Undurable::Lost)
}

/// Lets a test see what is on the disk for sure: everything that was done before this thread's last [`sync_data`].
#[cfg(test)]
pub(crate) mod on_sync {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    pub(super) fn call() {
        HOOK.with_borrow_mut(|hook| {
            if let Some(hook) = hook {
                hook();
            }
        });
    }

    pub(crate) fn set(hook: impl FnMut() + 'static) {
        HOOK.set(Some(Box::new(hook)));
    }

    pub(crate) fn unset() {
        HOOK.set(None);
    }
}

/// Counts changes, and how many of them are durable.
///
/// A failed `fsync` is remembered for good: Linux marks the pages that it could not write as clean, so that the next
/// `fsync` succeeds without having written them. Only reading everything back after opening the file anew can tell.
#[derive(Debug)]
pub(crate) struct Durability {
    changes: AtomicU64,
    durable: AtomicU64,
    failed: Mutex<Option<Error>>,
    /// Held while changes are made durable.
    turn: Mutex<()>,
}

impl Durability {
    /// Nothing is known of what was there before, so that it counts as one change.
    pub(crate) fn unknown() -> Self {
        Self {
            changes: AtomicU64::new(1),
            durable: AtomicU64::new(0),
            failed: Mutex::default(),
            turn: Mutex::default(),
        }
    }

    /// Something changes: called before it does, and again when it has.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether every change so far is durable.
    pub(crate) fn is_durable(&self) -> bool {
        self.changes.load(Ordering::SeqCst) == self.durable.load(Ordering::SeqCst) && self.failure().is_none()
    }

    /// Makes every change so far durable with `sync`, unless it is already. One at a time: who has to wait often finds
    /// that another has done it.
    ///
    /// # Errors
    /// What `sync` gave now, or what it ever gave as lost.
    pub(crate) fn make(
        &self,
        sync: impl FnOnce() -> std::result::Result<(), Undurable>,
        fault: impl Fn(io::Error) -> Error,
    ) -> Result<()> {
        let asked = self.changes.load(Ordering::SeqCst);
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = self.failure() {
            return Err(error);
        }
        if self.durable.load(Ordering::SeqCst) >= asked {
            return Ok(());
        }
        let seen = self.changes.load(Ordering::SeqCst);
        match sync() {
            Ok(()) => {
                self.durable.fetch_max(seen, Ordering::SeqCst);
                Ok(())
            }
            Err(Undurable::NotYet(error)) => Err(fault(error)),
            Err(Undurable::Lost(error)) => Err(self.lost(fault(error))),
        }
    }

    /// Remembers that something was lost, and answers it.
    pub(crate) fn lost(&self, error: Error) -> Error {
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        error
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
    fn a_loss_is_never_forgotten_and_other_failures_are() {
        let durability = Durability::unknown();
        let error = || io::Error::from_raw_os_error(5);
        assert!(durability.make(|| Err(Undurable::NotYet(error())), fault).is_err());
        durability.make(|| Ok(()), fault).unwrap();
        durability.changed();
        assert!(durability.make(|| Err(Undurable::Lost(error())), fault).is_err());
        let error = durability.make(|| Ok(()), fault).unwrap_err();
        assert!(error.to_string().contains("cannot sync"), "{error}");
        assert!(!durability.is_durable());
    }
}
