//! A place where a region can arrive.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Geometry, Result};
use r3map_pipeline::{
    BlockSet, CachedParts, CachedSettings, Hooks as RegionHooks, Local, Priority, Progress, PullSettings, Retry,
    StateRecord, Writes,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Source;

/// What a leecher needs of a frontend that is not shown yet.
#[async_trait]
pub trait Target: Send + Sync + 'static {
    /// The same, shown.
    type Shown: Shown;

    /// Where bytes are put. Nobody reads it before [`Self::show`].
    fn local(&self) -> Arc<dyn Local>;

    /// Where it is written down what is in place, if that outlives the process: then copying can go on after it. What the
    /// region is [shown](Self::show) with is the same.
    fn record(&self) -> Option<Arc<dyn StateRecord>> {
        None
    }

    /// Takes back what was put into whole blocks. Needed where bytes can be put only once.
    ///
    /// # Errors
    /// When they cannot be filled anew.
    fn forget(&mut self, bytes: Range<u64>) -> Result<()> {
        let _ = bytes;
        Ok(())
    }

    /// Shows the region, but fenced: nothing can be written, and nothing is promised of reads, before
    /// [`Source::unfence`].
    ///
    /// # Errors
    /// When it cannot be shown; nothing is left behind.
    async fn show(self, arrival: Arrival) -> Result<Self::Shown>;
}

/// A region that has arrived and is shown.
#[async_trait]
pub trait Shown: Send + Sync + 'static {
    /// The same as a region that can leave again.
    fn source(&self) -> Arc<dyn Source>;

    /// Waits until nothing is missing.
    ///
    /// # Errors
    /// When something could not be had lately (it is tried again, and so may this be), or the region is closed:
    /// `Cancelled`.
    async fn pulled(&self) -> Result<()>;

    /// Called when nothing is missing, before the seeder hears of it and may forget the region: if what is here is to
    /// outlive the process, then from now on all of it survives a loss of power, not only what was written here. May be
    /// called again.
    ///
    /// # Errors
    /// When it may not be durable; the seeder hears of nothing then, and this is tried again.
    async fn keep(&self) -> Result<()> {
        Ok(())
    }

    /// How far pulling is.
    fn progress(&self) -> watch::Receiver<Progress>;
}

/// What is known of a region when it arrives.
#[derive(Clone)]
pub struct Arrival {
    /// How it is cut.
    pub geometry: Geometry,
    /// Where what is missing comes from, with its retries. It takes no writes.
    pub remote: Arc<Retry>,
    /// What is in place.
    pub present: BlockSet,
    /// Chunks that were written last on the other side.
    pub urgent: Vec<u64>,
    /// What to pull first of the rest.
    pub priority: Priority,
    /// How to pull.
    pub pull: PullSettings,
    /// Cancelled when all regions are shown: to pull before would only hold that up.
    pub shown: CancellationToken,
    /// Told of each chunk that has become local.
    pub on_chunk_local: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

impl Arrival {
    /// How the region is to be opened.
    #[must_use]
    pub fn settings(&self) -> CachedSettings {
        CachedSettings {
            chunk_size: self.geometry.chunk_size(),
            pull: self.pull.clone(),
            writes: Writes::Kept,
            ..CachedSettings::default()
        }
    }

    /// What is plugged into it.
    #[must_use]
    pub fn parts(&self) -> CachedParts {
        CachedParts {
            hooks: RegionHooks { on_chunk_local: self.on_chunk_local.clone(), ..RegionHooks::default() },
            priority: self.priority.clone(),
            urgent: self.urgent.clone(),
            present: self.present.clone(),
            pull_after: Some(self.shown.clone()),
            ..CachedParts::default()
        }
    }
}
