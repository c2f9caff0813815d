//! Mounts as regions that can leave.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use r3map_core::{Backend, ChunkSize, Result};
use r3map_migrate::{Guarded, Source};
use r3map_pipeline::BlockSet;
use r3map_slice::SliceHandle;

/// A slice that can leave: what is written is found in the mapping, and writing is ended by its protection.
pub(crate) struct SliceSource(pub(crate) SliceHandle);

#[async_trait]
impl Source for SliceSource {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.0.clone())
    }

    fn chunk_size(&self) -> ChunkSize {
        self.0.geometry().chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.0.track().await
    }

    async fn take(&self) -> Result<BlockSet> {
        self.0.take_written().await
    }

    async fn untrack(&self) {
        self.0.untrack();
    }

    /// No kernel holds anything: the memory itself is read.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn fence(&self) -> Result<()> {
        self.0.freeze()
    }

    async fn unfence(&self) {
        if let Err(error) = self.0.thaw() {
            tracing::error!(%error, "the memory stays read-only");
        }
    }
}

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

    async fn fence(&self) -> Result<()> {
        self.guarded.fence().await
    }

    async fn unfence(&self) {
        self.guarded.unfence().await;
    }
}
