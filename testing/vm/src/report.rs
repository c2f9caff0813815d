//! How tests went, and how that is told.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a test went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It passed.
    Passed,
    /// It was left out, by itself or because it is marked so.
    Skipped {
        /// Why.
        reason: String,
    },
    /// It failed.
    Failed {
        /// How.
        reason: String,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("ok"),
            Self::Skipped { reason } => write!(f, "skipped: {reason}"),
            Self::Failed { reason } => write!(f, "FAILED: {reason}"),
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// How many tests passed.
    pub passed: u64,
    /// How many were left out.
    pub skipped: u64,
    /// The full names of those that failed; a virtual machine that died is one of them.
    pub failed: Vec<String>,
}

impl Report {
    pub(crate) fn add(&mut self, test: &str, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Skipped { .. } => self.skipped += 1,
            Verdict::Failed { .. } => self.failed.push(test.to_owned()),
        }
    }
}
