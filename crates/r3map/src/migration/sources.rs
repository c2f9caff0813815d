//! Files and block devices as regions that can leave.

use std::sync::Arc;
#[cfg(feature = "block")]
use std::sync::{Mutex, PoisonError, Weak};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
#[cfg(feature = "block")]
use r3map_block::BlockDevice;
use r3map_core::{Backend, ChunkSize, Result};
#[cfg(feature = "block")]
use r3map_core::{Error, ErrorKind, Operation};
use r3map_migrate::{Fencing, Guarded, Source};
use r3map_pipeline::BlockSet;
#[cfg(feature = "block")]
use r3map_pipeline::Closed;

/// Has the kernel hand over what it holds of a file.
pub(crate) type Syncing = Arc<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// A file that can leave: what is written is recorded behind the kernel, which is asked to hand over what it holds.
pub(crate) struct FileSource {
    pub(crate) guarded: Arc<Guarded>,
    pub(crate) sync: Syncing,
}

#[async_trait]
impl Source for FileSource {
    fn backend(&self) -> Arc<dyn Backend> {
        self.guarded.backend()
    }

    fn chunk_size(&self) -> ChunkSize {
        self.guarded.chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.guarded.track().await?;
        // What mappings wrote before is seen by whoever reads from now on.
        (self.sync)().await
    }

    /// What mappings wrote is known when the kernel has handed it over: by itself after a while, and by [`Self::flush`].
    async fn take(&self) -> Result<BlockSet> {
        self.guarded.take().await
    }

    async fn untrack(&self) {
        self.guarded.untrack().await;
    }

    async fn flush(&self) -> Result<()> {
        (self.sync)().await
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        self.guarded.fence(fencing).await
    }

    async fn unfence(&self) {
        self.guarded.unfence().await;
    }
}

/// A block device that can leave. What is written is recorded behind the kernel, whose cache of the device is written back
/// before every record: programs that do not write around it are told that they have written long before. A file system
/// on the device has a cache of its own, of which only who stops it can make an end.
#[cfg(feature = "block")]
pub(crate) struct BlockSource {
    guarded: Arc<Guarded>,
    /// Not kept: it goes when its mount does.
    device: Weak<BlockDevice>,
    /// Since it arrived, until it may be written. Reading goes on, because the kernel looks for partitions when a device
    /// appears.
    arriving: Mutex<Option<Closed>>,
}

#[cfg(feature = "block")]
impl BlockSource {
    pub(crate) fn new(guarded: Arc<Guarded>, device: Weak<BlockDevice>, arriving: Option<Closed>) -> Self {
        Self { guarded, device, arriving: Mutex::new(arriving) }
    }

    fn device(&self) -> Result<Arc<BlockDevice>> {
        self.device.upgrade().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, Operation::Flush, "the device that showed the region was removed")
        })
    }
}

#[cfg(feature = "block")]
#[async_trait]
impl Source for BlockSource {
    fn backend(&self) -> Arc<dyn Backend> {
        self.guarded.backend()
    }

    fn chunk_size(&self) -> ChunkSize {
        self.guarded.chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.guarded.track().await?;
        self.device()?.write_back().await
    }

    async fn take(&self) -> Result<BlockSet> {
        // Behind the fence nothing can be written back; the flush was before.
        if !self.guarded.is_fenced() {
            self.device()?.write_back().await?;
        }
        self.guarded.take().await
    }

    async fn untrack(&self) {
        self.guarded.untrack().await;
    }

    async fn flush(&self) -> Result<()> {
        self.device()?.sync().await
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        self.guarded.fence(fencing).await
    }

    async fn unfence(&self) {
        self.guarded.unfence().await;
        *self.arriving.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
