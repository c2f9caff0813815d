//! What can be chosen about a leecher, and what it tells of itself.

use std::time::Duration;

use r3map_core::Error;
use r3map_pipeline::{PullSettings, RetrySettings};

use crate::{Precopy, Verdict};

/// How a leecher works.
#[derive(Debug, Clone)]
pub struct LeecherSettings {
    /// When the application may be moved.
    pub precopy: Precopy,
    /// How to pull, before and after.
    pub pull: PullSettings,
    /// How long to try a seeder that does not answer, before the application is moved, and while it is asked to hand
    /// over. When it is spent the migration ends, and the application runs on over there.
    pub before: RetrySettings,
    /// How long to ask for the handover instead, and how long to find out what came of it, or to give the regions back, at a
    /// time. Default as `before` says.
    pub handover_limit: Option<Duration>,
    /// As `before` for what is missing after the application was moved: readers wait so long, then get an error, and the
    /// next one asks again.
    pub after: RetrySettings,
    /// How long one attempt to have the regions handed over may take. Default 70 s, which is more than a seeder takes for
    /// suspending and flushing; shorter, and a refusal that takes long is not heard. A connection that breaks ends an
    /// attempt before.
    pub handover_timeout: Duration,
}

impl Default for LeecherSettings {
    fn default() -> Self {
        Self {
            precopy: Precopy::default(),
            pull: PullSettings::default(),
            before: RetrySettings::default(),
            handover_limit: None,
            after: RetrySettings::default(),
            handover_timeout: Duration::from_secs(70),
        }
    }
}

impl LeecherSettings {
    /// How patiently to ask for the handover.
    pub(crate) fn handover(&self) -> RetrySettings {
        let settling = self.settling();
        let limit = settling.limit.map(|limit| limit.max(self.handover_timeout));
        RetrySettings { limit, attempt_timeout: self.handover_timeout, ..settling }
    }

    /// How patiently to ask what came of it, or to give the regions back.
    pub(crate) fn settling(&self) -> RetrySettings {
        RetrySettings { limit: self.handover_limit.or(self.before.limit), ..self.before.clone() }
    }
}

/// What a leecher that pulls is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPhase {
    /// Copying; the application runs over there.
    #[default]
    Pulling,
    /// The rest is small, or does not become smaller: the application may be moved. It copies on.
    Ready,
    /// It has stopped: to be finalized, or because of an error.
    Stopped,
}

/// Where a leecher stands before it is finalized. Sizes are in bytes, of all regions together.
#[derive(Debug, Clone, Default)]
pub struct PullProgress {
    /// What it is doing.
    pub phase: PullPhase,
    /// Of the regions.
    pub size: u64,
    /// In place, as far as is known.
    pub present: u64,
    /// That came over the link.
    pub pulled: u64,
    /// Records that were taken.
    pub rounds: u64,
    /// In the last of them.
    pub dirty: u64,
    /// What the last one said.
    pub verdict: Option<Verdict>,
    /// How often it had to start again, with nothing in place, because the seeder no longer recorded for it.
    pub restarts: u64,
    /// Why it has stopped.
    pub error: Option<Error>,
}
