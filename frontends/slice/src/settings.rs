//! What can be set on a slice, and what can be plugged into it. Plain data, apart from the parts.

use std::num::NonZeroUsize;
use std::time::Duration;

use r3map_core::pull::Workers;
use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_pipeline::{CachedParts, CachedSettings};
use r3map_sys::ScopeWanted;
use tokio::runtime::Handle;

/// Longer than any slice lives.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How a slice works.
#[derive(Debug, Clone)]
pub struct SliceSettings {
    /// How its bytes are pulled and pushed.
    pub region: CachedSettings,
    /// Whose accesses to missing bytes wait for them. Default: the widest that the kernel allows; see [`ScopeWanted`].
    pub scope: ScopeWanted,
    /// Threads that answer page faults. Default 1: each only starts what has to be waited for, so that more help only
    /// where many threads fault on a remote that answers from memory.
    pub fault_threads: NonZeroUsize,
    /// Threads of the slice's own runtime, which does everything else. Default 2. Not used where
    /// [`SliceParts::runtime`] is given.
    pub workers: NonZeroUsize,
    /// How long a page that could not be had raises SIGBUS before the next access asks for it anew. Default 1 s; the
    /// retries that the remote itself makes come on top.
    pub heal_after: Duration,
}

impl Default for SliceSettings {
    /// A managed slice: pulled and pushed in the background.
    fn default() -> Self {
        Self {
            region: CachedSettings::default(),
            scope: ScopeWanted::default(),
            fault_threads: NonZeroUsize::MIN,
            workers: NonZeroUsize::MIN.saturating_add(1),
            heal_after: Duration::from_secs(1),
        }
    }
}

impl SliceSettings {
    /// A direct slice: pulled when it is touched, pushed when it is flushed or closed (or the dirty budget is used up),
    /// and nothing else.
    #[must_use]
    pub fn direct() -> Self {
        let mut settings = Self::default();
        settings.region.pull.workers = Workers::Off;
        settings.region.push.interval = NEVER;
        settings.region.push.collect_interval = NEVER;
        settings
    }

    /// The same, to be read only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.region.read_only = true;
        self
    }

    /// Checks what does not depend on the remote.
    ///
    /// # Errors
    /// `InvalidInput` naming the setting.
    pub fn validate(&self) -> Result<()> {
        if self.heal_after.is_zero() {
            let message = "heal_after must be longer than zero";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        self.region.validate()
    }
}

/// What can be plugged into a slice.
#[derive(Debug, Clone, Default)]
pub struct SliceParts {
    /// Hooks, the order of pulling, and what is urgent. Hooks run where bytes are fetched, and so must not touch the
    /// slice's memory, nor wait for whoever does. A record makes no sense for memory, which does not survive the
    /// process, and is refused.
    pub region: CachedParts,
    /// The runtime to work on, in place of one of the slice's own: multi-threaded, with time enabled, and running for
    /// as long as the slice is open. **No task on it may touch the slice's memory**: a thread that waits for a page
    /// cannot fetch it.
    pub runtime: Option<Handle>,
}
