//! Showing a region to an application: as a slice of memory, as a file on a path, as an opened file, or as a block
//! device; with a local copy that is kept in step, or without one.
//!
//! This is where the parts are put together: which stages lie between a frontend and a remote is decided here and
//! nowhere else. All of them run on the [engine](crate::engine).

#[cfg(feature = "block")]
mod block;
#[cfg(feature = "file")]
mod file;
#[cfg(feature = "block")]
mod link;
mod region;
#[cfg(feature = "slice")]
mod slice;

#[cfg(all(feature = "block", feature = "file", feature = "slice"))]
pub(crate) use block::Plan;
#[cfg(feature = "block")]
pub use block::{BlockMount, Refused, remove_device};
#[cfg(feature = "file")]
pub use file::{FileMount, PathMount};
#[cfg(feature = "slice")]
pub use slice::SliceMount;

pub use region::Region;

use std::future::Future;
use std::num::NonZeroU64;
use std::sync::Arc;

use r3map_core::{Backend, Result};
use r3map_pipeline::{Hooks, Priority};

use crate::{Cache, Settings};

/// A mount that is being described: choose, then show it with [`slice`](Self::slice), [`path`](Self::path),
/// [`file`](Self::file) or [`block`](Self::block).
///
/// ```
/// # fn main() -> r3map::Result<()> {
/// use r3map::{Mount, OpenOptions, Registry};
///
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let remote = Registry::standard().open(&"memory:?size=1MiB".parse()?, &OpenOptions::default()).await?;
/// let mut mount = Mount::managed(remote.clone()).on_chunk_local(|chunk| println!("{chunk} is here")).slice().await?;
/// mount.write_at(4096, b"hello")?;
/// mount.flush().await?;
/// mount.close().await?;
///
/// let mut bytes = [0; 5];
/// remote.read_at(4096, &mut bytes).await?;
/// assert_eq!(&bytes, b"hello");
/// # Ok(()) })
/// # }
/// ```
#[must_use = "nothing is mounted until it is shown"]
pub struct Mount {
    remote: Arc<dyn Backend>,
    identity: Option<String>,
    managed: bool,
    settings: Settings,
    hooks: Hooks,
    priority: Priority,
    migratable: bool,
}

impl Mount {
    /// A mount without a local copy: what the kernel has not cached goes to the remote. A file that is open may show what
    /// it was before others changed the remote, until it is opened again; with
    /// [`FileOptions::direct_io`](crate::FileOptions::direct_io) every read and write goes to the remote. Of a block device
    /// the kernel caches what is not read and written with `O_DIRECT`. A slice reads a chunk once, when it is first touched,
    /// and writes when it is flushed.
    ///
    /// When the remote has lost what was written and not flushed, because it was restarted, every flush fails until that is
    /// written again, and so does closing the mount.
    pub fn direct(remote: Arc<dyn Backend>) -> Self {
        Self::new(remote, false)
    }

    /// A mount with a local copy that is pulled from and pushed to the remote in the background.
    pub fn managed(remote: Arc<dyn Backend>) -> Self {
        Self::new(remote, true)
    }

    fn new(remote: Arc<dyn Backend>, managed: bool) -> Self {
        let (settings, hooks) = (Settings::default(), Hooks::default());
        Self { remote, identity: None, managed, settings, hooks, priority: Priority::None, migratable: false }
    }

    /// With these settings instead of the default ones.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// With its local copy in `cache`.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.settings.cache = cache;
        self
    }

    /// What the region is called, for instance what [`Registry::identity`](crate::Registry::identity) says. A cache file belongs to one region and is refused for any other.
    pub fn identity(mut self, name: impl Into<String>) -> Self {
        self.identity = Some(name.into());
        self
    }

    /// With at most so many bytes changed and not yet pushed; writers wait beyond that.
    pub fn dirty_budget(mut self, bytes: NonZeroU64) -> Self {
        self.settings = self.settings.dirty_budget(bytes);
        self
    }

    /// Pulls these chunks first, or those with the highest value of a function. What is touched always goes before.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Made so that it can be [migrated](crate::migration) while it is used: then every access passes one more stage, which
    /// can record what is written. A slice always can be.
    pub fn migratable(mut self) -> Self {
        self.migratable = true;
        self
    }

    /// Calls `hook` with each chunk that has become local: never for a direct mount of a file, which has no local copy. It
    /// must be short.
    pub fn on_chunk_local(mut self, hook: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.hooks.on_chunk_local = Some(Arc::new(hook));
        self
    }

    /// Calls `hook` before each flush that somebody asks for, `fsync` among them, and before the last one of a close, and
    /// waits for it. It may write to the region: through a slice's memory, but on a thread that may wait (`spawn_blocking`),
    /// because the one that calls it also fetches what is missing; or by [`Region::backend`], of which a file's
    /// kernel has to be told ([`PathMount::invalidate`]). It must not use the file itself, which waits for the flush. An
    /// error makes the flush fail.
    pub fn on_before_flush<F>(mut self, hook: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.hooks.on_before_flush = Some(Arc::new(move || Box::pin(hook())));
        self
    }

    /// Calls `hook` when closing begins, and waits for it. It may write to the region as before a flush; a file is
    /// unmounted by then. An error makes the close fail; what was written is stored all the same, what the hook itself wrote
    /// too. Where it can be closed again, that calls it again.
    pub fn on_before_close<F>(mut self, hook: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.hooks.on_before_close = Some(Arc::new(move || Box::pin(hook())));
        self
    }
}
