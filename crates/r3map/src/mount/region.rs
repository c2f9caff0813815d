//! What lies between a frontend and a remote: the stages of a direct or a managed mount, put together.

use std::fmt;
use std::sync::Arc;

use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Geometry, Operation, Result};
use r3map_local::{CacheFile, Memory, Stored};
use r3map_migrate::Guarded;
use r3map_pipeline::{
    Aligned, Cached, CachedParts, CachedSettings, Durability, Hooked, Local, Mindful, Outage, Progress, PullSettings,
    Retry, StateRecord, Writes,
};
use tokio::sync::watch;

use super::Mount;
use crate::Cache;

/// What a mount stands on: how far it is, and whether the remote answers.
#[derive(Clone)]
pub struct Region {
    backend: Arc<dyn Backend>,
    copy: Copy,
    retry: Arc<Retry>,
    read_only: bool,
    guarded: Option<Arc<Guarded>>,
}

/// The local copy, whose progress is the mount's.
#[derive(Clone)]
pub(super) enum Copy {
    /// None: what the kernel has not cached goes to the remote. With what calls the mount's hooks.
    None(Arc<Hooked>),
    /// Under a file, or under a slice that has a cache file.
    Below(Arc<Cached>),
    /// The slice itself, which ends its own.
    #[cfg(feature = "slice")]
    Slice(r3map_slice::SliceHandle),
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Region {
    pub(super) fn new(backend: Arc<dyn Backend>, copy: Copy, retry: Arc<Retry>, read_only: bool) -> Self {
        let read_only = read_only || retry.capabilities().read_only;
        Self { backend, copy, retry, read_only, guarded: None }
    }

    /// A region that a migration has brought, and whose writes stay here. Its frontend stands on `backend`.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub(crate) fn arrived(
        cached: Arc<Cached>,
        guarded: Arc<Guarded>,
        backend: Arc<dyn Backend>,
        retry: Arc<Retry>,
    ) -> Self {
        let copy = Copy::Below(cached);
        Self { backend, copy, retry, read_only: false, guarded: Some(guarded) }
    }

    /// The same, in memory.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub(crate) fn arrived_in_memory(slice: r3map_slice::SliceHandle, retry: Arc<Retry>) -> Self {
        let (backend, copy) = (Arc::new(slice.clone()), Copy::Slice(slice));
        Self { backend, copy, retry, read_only: false, guarded: None }
    }

    /// What records writes, where the mount was made to be migrated.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub(super) fn guarded(&self) -> Result<Arc<Guarded>> {
        self.guarded.clone().ok_or_else(|| {
            let message = "the mount was not made to be migrated: make it with `migratable`";
            Error::new(ErrorKind::InvalidInput, Operation::Mount, message)
        })
    }

    /// The same, ready to be migrated if it shall be.
    fn guard(mut self, migratable: bool, chunk_size: ChunkSize) -> Result<Self> {
        if migratable {
            let guarded = Arc::new(Guarded::new(self.backend, chunk_size)?);
            self.backend = guarded.front();
            self.guarded = Some(guarded);
        }
        Ok(self)
    }

    /// The region's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.backend.size()
    }

    /// Whether nothing can be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How far the local copy is, now and as it changes; nothing for a direct mount of a file, which has none.
    #[must_use]
    pub fn progress(&self) -> Option<watch::Receiver<Progress>> {
        match &self.copy {
            Copy::None(_) => None,
            Copy::Below(cached) => Some(cached.progress()),
            #[cfg(feature = "slice")]
            Copy::Slice(slice) => Some(slice.progress()),
        }
    }

    /// Waits until all of the region is local; returns at once where there is no local copy.
    ///
    /// # Errors
    /// When the mount is closed or given up first.
    pub async fn pulled(&self) -> Result<()> {
        match &self.copy {
            Copy::None(_) => Ok(()),
            Copy::Below(cached) => cached.pulled().await,
            #[cfg(feature = "slice")]
            Copy::Slice(slice) => slice.pulled().await,
        }
    }

    /// Since when the remote has not answered, and why; nothing while it does.
    #[must_use]
    pub fn outage(&self) -> watch::Receiver<Option<Outage>> {
        self.retry.outage()
    }

    /// The region as a backend: reads and writes without a frontend.
    #[must_use]
    pub fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }

    /// Stores everything and ends the region.
    pub(super) async fn close(&self) -> Result<()> {
        match self.copy.clone() {
            Copy::None(hooked) => {
                let backend = self.backend.clone();
                crate::engine::run(async move {
                    let closing = hooked.before_close().await;
                    // Whatever the hook says: what was written is to be stored.
                    match (closing, backend.flush().await) {
                        (Err(refused), Err(unstored)) => Err(refused.along_with(&unstored)),
                        (closing, stored) => closing.and(stored),
                    }
                })
                .await
            }
            Copy::Below(cached) => crate::engine::run(async move { cached.close().await }).await,
            #[cfg(feature = "slice")]
            Copy::Slice(_) => Ok(()),
        }
    }

    /// Ends the region without storing anything more.
    pub(super) fn abandon(&self) {
        if let Copy::Below(cached) = &self.copy {
            cached.abandon();
        }
    }
}

/// The remote as every mount uses it: asked again while it does not answer.
pub(super) fn patient(mount: &Mount) -> Result<Arc<Retry>> {
    Ok(Arc::new(Retry::new(mount.remote.clone(), mount.settings.retry.clone())?))
}

/// A region that can be read and written at any offset, for a file. Runs on the engine.
pub(super) async fn build(mount: Mount) -> Result<Region> {
    let retry = patient(&mount)?;
    if mount.managed {
        let cached = cached(&mount, retry.clone(), parts(&mount)).await?;
        if mount.settings.pull_first {
            cached.pulled().await?;
        }
        let chunk_size = cached.geometry().chunk_size();
        let region = Region::new(cached.clone(), Copy::Below(cached), retry, mount.settings.read_only);
        return region.guard(mount.migratable, chunk_size);
    }
    let chunk_size = chunk_size(&mount, &*retry)?;
    let backend: Arc<dyn Backend> = match retry.capabilities().access {
        Access::Any => retry.clone(),
        Access::WholeChunks(_) => Arc::new(Aligned::new(retry.clone())?),
    };
    // Nobody but the application can write again what the remote loses. On top, to see what it writes: making whole chunks
    // of that is not writing the rest of them again.
    let backend = Arc::new(Mindful::new(backend));
    let mut hooks = mount.hooks;
    if mount.settings.read_only {
        // There is nothing to store.
        hooks.on_before_flush = None;
    }
    let hooked = Arc::new(Hooked::new(backend, hooks));
    let region = Region::new(hooked.clone(), Copy::None(hooked), retry, mount.settings.read_only);
    region.guard(mount.migratable, chunk_size)
}

/// A local copy in memory or in a file, in front of `remote`.
pub(super) async fn cached(mount: &Mount, remote: Arc<Retry>, parts: CachedParts) -> Result<Arc<Cached>> {
    let geometry = Geometry::new(remote.size(), chunk_size(mount, &*remote)?)?;
    let (local, record): (Arc<dyn Local>, Option<Arc<dyn StateRecord>>) = match &mount.settings.cache {
        Cache::Memory => (Arc::new(Stored::memory(Arc::new(Memory::new(geometry.size())?))), None),
        Cache::File(path) => {
            let file = Arc::new(CacheFile::open(path, &identity(mount)?, geometry)?);
            (file.clone(), Some(file))
        }
    };
    if mount.settings.durability == Durability::Local && record.is_none() {
        let message = "a flush can only be local with a cache file; choose one, or let it wait for the remote";
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
    }
    let parts = CachedParts { record, ..parts };
    Cached::open(local, remote, cached_settings(mount, geometry.chunk_size()), parts).await
}

/// Whose bytes a cache file holds: the region's name, and what the remote itself says that it is. The same name may
/// stand for another region later (another file behind the same address).
fn identity(mount: &Mount) -> Result<String> {
    let told = mount.remote.capabilities().identity.map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect());
    let parts: Vec<String> = mount.identity.clone().into_iter().chain(told).collect();
    if parts.is_empty() {
        let message = "a cache file must know whose bytes it holds; give the region a name with `identity`";
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
    }
    Ok(parts.join(" "))
}

/// The settings of a local copy in chunks of `chunk_size`.
pub(super) fn cached_settings(mount: &Mount, chunk_size: ChunkSize) -> CachedSettings {
    let settings = &mount.settings;
    CachedSettings {
        chunk_size,
        pull: PullSettings { alone: settings.pull.alone || settings.pull_first, ..settings.pull.clone() },
        push: settings.push.clone(),
        durability: settings.durability,
        writes: Writes::Pushed,
        read_only: settings.read_only,
    }
}

/// What the caller plugged in.
pub(super) fn parts(mount: &Mount) -> CachedParts {
    CachedParts { hooks: mount.hooks.clone(), priority: mount.priority.clone(), ..CachedParts::default() }
}

/// The chunk size that was asked for, or that suits the remote.
pub(super) fn chunk_size(mount: &Mount, remote: &dyn Backend) -> Result<ChunkSize> {
    let able = remote.capabilities();
    let Access::WholeChunks(unit) = able.access else {
        return Ok(mount.settings.chunk_size.or(able.preferred_chunk).unwrap_or_default());
    };
    let chosen = mount.settings.chunk_size.unwrap_or(unit);
    if chosen < unit {
        let message = format!("chunk size {chosen} is below {unit}, which is the smallest that the remote takes");
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
    }
    Ok(chosen)
}
