//! What the application wants to be told, and asked.

use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_pipeline::Hook;
use tokio::time::timeout;

/// How long a hook may take, unless told otherwise.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Something that is told of each chunk that has become local: the region and the chunk.
type OnChunk = Arc<dyn Fn(usize, u64) + Send + Sync>;

/// The application's side of a migration; each side calls those that concern it. One that takes longer than the limit is
/// given up, and one that panics has failed.
#[derive(Clone, Default)]
pub struct Hooks {
    /// On the seeder, when it is finalized: returns when the application writes no more. An error refuses the
    /// migration, and the application is resumed. On the leecher, when the regions turn out to have been taken back over there.
    pub suspend: Option<Hook>,
    /// On the side that owns the region: the application may run. On the leecher after finalize, on the seeder when a
    /// finalize did not come to its end.
    pub resume: Option<Hook>,
    /// On the seeder, when the leecher has everything.
    pub before_close: Option<Hook>,
    /// On the leecher, with region and chunk. It must be short. A chunk that changed over there comes again.
    pub on_chunk_local: Option<OnChunk>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("suspend", &self.suspend.is_some())
            .field("resume", &self.resume.is_some())
            .field("before_close", &self.before_close.is_some())
            .field("on_chunk_local", &self.on_chunk_local.is_some())
            .finish()
    }
}

impl Hooks {
    /// With this called to suspend the application.
    #[must_use]
    pub fn on_suspend<F>(mut self, hook: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.suspend = Some(Arc::new(move || Box::pin(hook())));
        self
    }

    /// With this called to let the application run.
    #[must_use]
    pub fn on_resume<F>(mut self, hook: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.resume = Some(Arc::new(move || Box::pin(hook())));
        self
    }

    /// With this called when the leecher has everything.
    #[must_use]
    pub fn on_before_close<F>(mut self, hook: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.before_close = Some(Arc::new(move || Box::pin(hook())));
        self
    }

    /// With this called for each chunk that has become local.
    #[must_use]
    pub fn on_chunk_local(mut self, hook: impl Fn(usize, u64) + Send + Sync + 'static) -> Self {
        self.on_chunk_local = Some(Arc::new(hook));
        self
    }
}

/// Calls a hook that may not be there, that may hang, and that may panic: whoever calls goes on in any case.
pub(crate) async fn call(hook: Option<&Hook>, limit: Duration, what: &str) -> Result<()> {
    let Some(hook) = hook else { return Ok(()) };
    let called = AssertUnwindSafe(async { hook().await }).catch_unwind();
    within(limit, what, async {
        called.await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Cancelled, Operation::Close, format!("{what}: the hook has panicked")))
        })
    })
    .await
}

/// Does something within a limit.
pub(crate) async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        let message = format!("{what} took longer than {limit:?}");
        Err(Error::new(ErrorKind::Cancelled, Operation::Close, message))
    })
}
