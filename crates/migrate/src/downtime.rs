//! What a migration took, in numbers.

use std::fmt;
use std::time::Duration;

/// The time in which the application ran nowhere, in its parts.
///
/// Both ends are measured by the leecher, from its call to finalize on: so that it is too long by the way of that call to
/// the seeder, and never too short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Downtime {
    /// The application stopped.
    pub suspend: Duration,
    /// What it had written was recorded, and writing ended.
    pub flush: Duration,
    /// The rest of the call: the way there and back, and a reply that was lost.
    pub round_trip: Duration,
    /// The regions were shown, and the application let run.
    pub resume: Duration,
}

impl Downtime {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.suspend + self.flush + self.round_trip + self.resume
    }
}

impl fmt::Display for Downtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { suspend, flush, round_trip, resume } = self;
        let total = self.total();
        write!(
            f,
            "{total:.1?} (suspend {suspend:.1?}, flush {flush:.1?}, round trip {round_trip:.1?}, resume {resume:.1?})"
        )
    }
}

/// What a migration took. Sizes are in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Of all regions together.
    pub size: u64,
    /// Records that were taken before the application was suspended.
    pub rounds: u64,
    /// Pulled before.
    pub pulled_before: u64,
    /// Pulled since; still growing until everything is here.
    pub pulled_after: u64,
    /// In the last record, which came with the handover.
    pub dirty: u64,
    /// The time in which the application ran nowhere.
    pub downtime: Downtime,
    /// From the first call to now, or to when everything was here.
    pub total: Duration,
}
