//! Flushing a file for somebody who does not have it: a migration, for which it goes on to be used.

use std::fmt;
use std::sync::Arc;

use r3map_core::Result;
use r3map_pipeline::blocking::off_runtime;

/// Flushes a file that somebody else has. It does not keep it mounted or open.
#[derive(Clone)]
pub struct Flusher(Arc<dyn Fn() -> Result<()> + Send + Sync>);

impl fmt::Debug for Flusher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flusher").finish_non_exhaustive()
    }
}

impl Flusher {
    pub(crate) fn new(flush: impl Fn() -> Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(flush))
    }

    /// Hands over what the kernel still holds, and flushes the backend, however long that takes. This process can be
    /// killed meanwhile.
    ///
    /// Dropping the future does not stop it.
    ///
    /// # Errors
    /// What the backend answers to the writes and the flush; `NotFound` for an opened file that was closed.
    pub async fn flush(&self) -> Result<()> {
        let flush = self.0.clone();
        off_runtime(move || flush()).await
    }
}
