//! Telling how far a region is, without costing the work that it tells of: whoever makes progress sets a flag, and one
//! task publishes.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Duration;

use r3map_core::Error;
use tokio::sync::{Notify, watch};

use super::{Inner, Progress};

/// How long changes are gathered before they are published.
const GATHER: Duration = Duration::from_millis(50);

pub(super) struct Report {
    sender: watch::Sender<Progress>,
    changed: AtomicBool,
    wake: Notify,
    pub(super) pulled_bytes: AtomicU64,
    pub(super) pushed_bytes: AtomicU64,
    last_error: Mutex<Option<Error>>,
}

impl Report {
    pub(super) fn new(size: u64) -> Self {
        Self {
            sender: watch::Sender::new(Progress { size, ..Progress::default() }),
            changed: AtomicBool::new(false),
            wake: Notify::new(),
            pulled_bytes: AtomicU64::new(0),
            pushed_bytes: AtomicU64::new(0),
            last_error: Mutex::new(None),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Progress> {
        self.sender.subscribe()
    }

    /// Something has changed.
    pub(super) fn touch(&self) {
        // Either the task that publishes sees the change, or this sees that it has begun to look.
        fence(Ordering::SeqCst);
        if !self.changed.load(Ordering::Relaxed) && !self.changed.swap(true, Ordering::AcqRel) {
            self.wake.notify_one();
        }
    }

    fn last_error(&self) -> Option<Error> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Something has gone wrong in the background.
    pub(super) fn failed(&self, error: &Error) {
        tracing::warn!(%error, "background work on a region failed; it will be tried again");
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        self.touch();
    }
}

impl Inner {
    pub(super) async fn run_report(&self) {
        loop {
            self.report.wake.notified().await;
            tokio::time::sleep(GATHER).await;
            self.report.changed.store(false, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.publish();
            if self.table.is_complete() {
                // Whatever they wait for, they need no longer.
                self.pull_wake.notify_waiters();
            }
        }
    }

    /// Publishes how things stand now.
    pub(super) fn publish(&self) {
        // Looked at under the channel's lock, so that an older look never replaces a newer one.
        self.report.sender.send_modify(|progress| *progress = self.look());
    }

    fn look(&self) -> Progress {
        Progress {
            size: self.table.geometry().size(),
            valid_bytes: self.table.valid_bytes(),
            pulled: self.table.is_complete(),
            dirty_bytes: self.table.unpushed_bytes(),
            pulled_bytes: self.report.pulled_bytes.load(Ordering::Relaxed),
            pushed_bytes: self.report.pushed_bytes.load(Ordering::Relaxed),
            pulling_bytes: self.pull_plan().window().in_flight(),
            pushing_bytes: self.push_plan().window().in_flight(),
            phase: self.phase(),
            last_error: self.report.last_error(),
        }
    }
}
