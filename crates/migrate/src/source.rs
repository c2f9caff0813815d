//! A region that can leave this host.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_pipeline::BlockSet;

use crate::hooks::within;

/// How firmly writing is ended. It matters where that takes long: memory, 20 ms for each GiB, which is downtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// Nothing can be written any more when there is the fence. For an application that nobody suspends: what it writes
    /// then is refused, and not lost.
    Strict,
    /// The application has said that it writes no more. It may take effect a little later that nothing can be written; what
    /// is written in between is found out, and reported as an error.
    Trusting,
}

/// What a seeder needs of a frontend. Calls are made one after another. One that takes longer than the limit for hooks is
/// given up, and its future dropped: a [`Self::take`] that is forgets nothing, and a [`Self::fence`] that is leaves nothing
/// behind that [`Self::unfence`] does not lift.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// The region for leechers to read. It gives what was written last, while the application writes and after
    /// [`Self::fence`].
    fn backend(&self) -> Arc<dyn Backend>;

    /// The unit of transfer that suits it.
    fn chunk_size(&self) -> ChunkSize;

    /// Starts to record which blocks are written, with an empty record. What was written before the call is visible to
    /// every read after it.
    ///
    /// # Errors
    /// When nothing can be recorded.
    async fn track(&self) -> Result<()>;

    /// Takes what was written since [`Self::track`] or the last call. Every write that returned before the call is in
    /// this record or an earlier one, and visible to every read after it.
    ///
    /// # Errors
    /// When it is not known what was written; nothing is forgotten then.
    async fn take(&self) -> Result<BlockSet>;

    /// Stops recording.
    async fn untrack(&self);

    /// Hands over what a kernel holds of earlier writes, so that the next [`Self::take`] knows of it.
    ///
    /// # Errors
    /// When something may not have been handed over.
    async fn flush(&self) -> Result<()>;

    /// Ends writing: the next [`Self::take`] is the last and complete, and what is written all the same fails, from when on
    /// says `fencing`.
    ///
    /// # Errors
    /// When writing cannot be ended; it goes on then.
    async fn fence(&self, fencing: Fencing) -> Result<()>;

    /// Lets the application write again.
    async fn unfence(&self);
}

/// Lets the application write again, to as many sources as do as they are told.
pub(crate) async fn unfence(sources: &[Arc<dyn Source>], limit: Duration) -> Result<()> {
    each(sources, limit, "letting the application write again", |source| {
        async {
            source.unfence().await;
            Ok(())
        }
        .boxed()
    })
    .await
}

/// Has them stop recording, as many as do as they are told.
pub(crate) async fn untrack(sources: &[Arc<dyn Source>], limit: Duration) -> Result<()> {
    each(sources, limit, "stopping to record what is written", |source| {
        async {
            source.untrack().await;
            Ok(())
        }
        .boxed()
    })
    .await
}

/// Ends writing for good, to as many of them as do as they are told. What a kernel holds of earlier writes is stored if that is
/// possible.
pub(crate) async fn close(sources: &[Arc<dyn Source>], limit: Duration) -> Result<()> {
    let flushed = each(sources, limit, "flushing", |source| source.flush()).await;
    each(sources, limit, "fencing", |source| source.fence(Fencing::Strict)).await.and(flushed)
}

/// Calls all of them at once, so that none that hangs or panics keeps another from what it is told, or anybody waiting for
/// longer than `limit`.
async fn each(
    sources: &[Arc<dyn Source>],
    limit: Duration,
    what: &str,
    call: for<'a> fn(&'a dyn Source) -> BoxFuture<'a, Result<()>>,
) -> Result<()> {
    let calls = sources.iter().map(|source| {
        let called = AssertUnwindSafe(async { call(&**source).await }).catch_unwind();
        within(limit, what, async {
            called.await.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Internal, Operation::Close, format!("{what}: it has panicked")))
            })
        })
    });
    join_all(calls).await.into_iter().collect()
}
