//! A region whose every access is a call, made ready to leave: what frontends that are not memory are put on.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Result};
use r3map_pipeline::{BlockSet, Closed, Gate, Tracked, WhenClosed};

use crate::{Fencing, Source};

/// A backend behind a record of what is written, behind a gate.
pub struct Guarded {
    tracked: Arc<Tracked>,
    gate: Arc<Gate>,
    chunk_size: ChunkSize,
    fence: Mutex<Option<Closed>>,
}

impl Guarded {
    /// Guards `backend`, which suits chunks of `chunk_size`.
    ///
    /// # Errors
    /// As [`Tracked::new`].
    pub fn new(backend: Arc<dyn Backend>, chunk_size: ChunkSize) -> Result<Self> {
        let tracked = Arc::new(Tracked::new(backend)?);
        let gate = Arc::new(Gate::new(tracked.clone(), WhenClosed::Fail));
        Ok(Self { tracked, gate, chunk_size, fence: Mutex::default() })
    }

    /// What the application's frontend stands on. While there is a fence, every call fails as cancelled.
    #[must_use]
    pub fn front(&self) -> Arc<dyn Backend> {
        self.gate.clone()
    }

    /// Whether there is a fence.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.fence.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn set(&self, fence: Option<Closed>) {
        *self.fence.lock().unwrap_or_else(PoisonError::into_inner) = fence;
    }
}

#[async_trait]
impl Source for Guarded {
    fn backend(&self) -> Arc<dyn Backend> {
        self.tracked.clone()
    }

    fn chunk_size(&self) -> ChunkSize {
        self.chunk_size
    }

    async fn track(&self) -> Result<()> {
        self.tracked.track();
        Ok(())
    }

    async fn take(&self) -> Result<BlockSet> {
        Ok(self.tracked.take().confirm())
    }

    async fn untrack(&self) {
        self.tracked.stop();
    }

    /// Every write is a call: nobody holds anything.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Each write is refused from then on: that takes no time.
    async fn fence(&self, _: Fencing) -> Result<()> {
        let closed = self.gate.close().await;
        self.set(Some(closed));
        Ok(())
    }

    async fn unfence(&self) {
        self.set(None);
    }
}
