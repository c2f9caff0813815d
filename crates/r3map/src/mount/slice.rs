//! Mounts that are shown as memory.

use std::ops::Range;
use std::sync::Arc;

use r3map_core::pull::Workers;
use r3map_core::{Backend, Result};
use r3map_pipeline::{CachedParts, Hooks};
use r3map_slice::{FaultScope, Slice, SliceParts, SliceSettings};

use super::Mount;
use super::region::{self, Copy, Region};
use crate::Cache;

impl Mount {
    /// Shows the region as memory of this process.
    ///
    /// # Errors
    /// What the settings, the cache or the remote object to; `Denied` where the kernel forbids to handle page faults,
    /// naming what to change.
    pub async fn slice(self) -> Result<SliceMount> {
        crate::engine::run(open(self)).await
    }
}

async fn open(mount: Mount) -> Result<SliceMount> {
    let retry = region::patient(&mount)?;
    let pull_first = mount.managed && mount.settings.pull_first;
    // With a cache file the slice is a second copy, of what it touches, in front of the first.
    let below = match (&mount.settings.cache, mount.managed) {
        (Cache::File(_), true) => {
            // What the slice's own hooks write must be found in the slice first; so the lower copy has none of them.
            let hooks = Hooks { on_before_flush: None, on_before_close: None, ..mount.hooks.clone() };
            let parts = CachedParts { hooks, ..region::parts(&mount) };
            Some(region::cached(&mount, retry.clone(), parts).await?)
        }
        _ => None,
    };
    let remote: Arc<dyn Backend> = match &below {
        Some(cached) => cached.clone(),
        None => retry.clone(),
    };
    let chunk_size = region::chunk_size(&mount, &*retry)?;
    let mut settings =
        SliceSettings { region: region::cached_settings(&mount, chunk_size), ..SliceSettings::default() };
    let mut parts = region::parts(&mount);
    if !mount.managed {
        let direct = SliceSettings::direct().region;
        settings.region.pull.workers = direct.pull.workers;
        settings.region.push = direct.push;
    } else if below.is_some() {
        settings.region.pull.workers = Workers::Off;
        settings.region.durability = r3map_pipeline::Durability::Remote; // which is the cache file's region, and decides
        parts = CachedParts { hooks: Hooks { on_chunk_local: None, ..parts.hooks }, ..CachedParts::default() };
    }
    let slice = Slice::open(remote, settings, SliceParts { region: parts, runtime: Some(crate::engine::handle()) })?;
    let copy = match below {
        Some(cached) => Copy::Below(cached),
        None => Copy::Slice(slice.handle()),
    };
    let region = Region::new(Arc::new(slice.handle()), copy, retry, mount.settings.read_only);
    if pull_first {
        region.pulled().await?;
    }
    Ok(SliceMount { slice, region })
}

/// A region that is memory of this process.
///
/// Touching a byte that is not there waits for it, on the thread that touches it: in asynchronous programs use
/// `spawn_blocking` or threads of your own. What cannot be had raises SIGBUS; [`read_at`](Self::read_at) and
/// [`write_at`](Self::write_at) answer with an error instead. Dropping the mount loses what was not flushed;
/// [`close`](Self::close) it.
#[derive(Debug)]
pub struct SliceMount {
    // In this order they are dropped: the memory goes before what it is filled from.
    slice: Slice,
    region: Region,
}

impl SliceMount {
    #[cfg(feature = "file")]
    pub(crate) fn new(slice: Slice, region: Region) -> Self {
        Self { slice, region }
    }

    /// The region as one that can leave for another host; see [`crate::migration`]. Once it has left, writing to the memory
    /// is a segmentation fault: by and by, some 40 ms for each GiB after the application was suspended. Whoever writes
    /// before, though it was suspended, is found out, and an error is logged.
    #[cfg(feature = "file")]
    #[must_use]
    pub fn source(&self) -> Arc<dyn r3map_migrate::Source> {
        Arc::new(crate::migration::SliceSource::new(self.slice.handle()))
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.slice.as_slice()
    }

    /// The bytes, to change.
    ///
    /// # Errors
    /// `Denied` if the region is read-only; `Cancelled` after a [`close`](Self::close).
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        self.slice.as_mut_slice()
    }

    /// The address of the first byte, for other languages; valid until the mount is dropped.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.slice.as_ptr()
    }

    /// Copies bytes out, waiting on this thread for those that are not there.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.slice.read_at(offset, buf)
    }

    /// Copies bytes in, waiting on this thread for those that are not there.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.slice.write_at(offset, bytes)
    }

    /// Makes a range of bytes local, ahead of all background work, so that touching it does not wait.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub async fn demand(&self, range: Range<u64>) -> Result<()> {
        self.slice.demand(range).await
    }

    /// Whose accesses to missing bytes wait for them: everybody's, or only this program's own instructions.
    #[must_use]
    pub fn scope(&self) -> FaultScope {
        self.slice.scope()
    }

    /// What the mount stands on.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Makes everything that was written before the call durable.
    ///
    /// # Errors
    /// What could not be stored; it stays to be stored by the next flush.
    pub async fn flush(&self) -> Result<()> {
        self.slice.flush().await
    }

    /// Stores everything and ends the mount: it can be read, as far as it is local, and not written any more. Can be
    /// called again after an error.
    ///
    /// # Errors
    /// What could not be stored.
    pub async fn close(&mut self) -> Result<()> {
        self.slice.close().await?;
        self.region.close().await
    }

    /// Ends the mount without storing anything more; touching what is not local raises SIGBUS.
    pub fn abandon(&self) {
        self.slice.handle().abandon();
        self.region.abandon();
    }
}
