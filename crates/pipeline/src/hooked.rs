//! Hooks where there is no local copy that would call them: before each flush, and when a region is closed.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Result};
use tokio::sync::Mutex;

use crate::Hooks;

/// A backend that calls [`Hooks::on_before_flush`] and [`Hooks::on_before_close`] as a [cached region](crate::Cached)
/// does. Nothing becomes local here, so that [`Hooks::on_chunk_local`] is never called.
pub struct Hooked {
    inner: Arc<dyn Backend>,
    hooks: Hooks,
    /// Whether closing has begun.
    closing: Mutex<bool>,
}

impl Hooked {
    /// Wraps `inner`. Where it is read-only there is nothing to flush, and its flushes call nobody.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, hooks: Hooks) -> Self {
        Self { inner, hooks, closing: Mutex::new(false) }
    }

    /// Says that the region is about to be closed. Flush it afterwards, whatever comes of it.
    ///
    /// # Errors
    /// What the hook answers; the next call calls it again.
    pub async fn before_close(&self) -> Result<()> {
        let mut closing = self.closing.lock().await;
        if let (Some(hook), false) = (&self.hooks.on_before_close, *closing) {
            hook().await?;
        }
        *closing = true;
        Ok(())
    }
}

#[async_trait]
impl Backend for Hooked {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        self.inner.capabilities()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        if let (Some(hook), false) = (&self.hooks.on_before_flush, self.capabilities().read_only) {
            hook().await?;
        }
        self.inner.flush().await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use r3map_core::{ChunkSize, Error, ErrorKind, Operation};
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, model};

    use super::*;
    use crate::Hook;

    const SIZE: u64 = 100_001;

    #[tokio::test]
    async fn conforms() {
        let make = |store: Store| -> Arc<dyn Backend> { Arc::new(Hooked::new(Arc::new(store), Hooks::default())) };
        conformance::backend(async || make(Store::new(SIZE))).await;
        conformance::backend(async || make(Store::new(SIZE).whole_chunks(ChunkSize::MIN).plain())).await;
        conformance::filled(async || make(Store::new(SIZE).filled(2).read_only()), 2).await;
        model::check(async || make(Store::new(SIZE)), model::Settings::default()).await;
    }

    /// A hook that fails the first time, and counts.
    fn failing_once(calls: &Arc<AtomicUsize>) -> Hook {
        let calls = calls.clone();
        Arc::new(move || {
            let failed = calls.fetch_add(1, Ordering::SeqCst) == 0;
            let error = || Error::new(ErrorKind::Conflict, Operation::Flush, "not now");
            Box::pin(std::future::ready(if failed { Err(error()) } else { Ok(()) }))
        })
    }

    #[tokio::test]
    async fn a_hook_that_fails_fails_the_call_and_is_called_again() {
        let (flushes, closes) = (Arc::default(), Arc::default());
        let (on_before_flush, on_before_close) = (Some(failing_once(&flushes)), Some(failing_once(&closes)));
        let hooks = Hooks { on_before_flush, on_before_close, ..Hooks::default() };
        let hooked = Hooked::new(Arc::new(Store::new(SIZE)), hooks);
        assert_eq!(hooked.flush().await.unwrap_err().kind(), ErrorKind::Conflict);
        hooked.flush().await.unwrap();
        assert_eq!(hooked.before_close().await.unwrap_err().kind(), ErrorKind::Conflict);
        hooked.before_close().await.unwrap();
        hooked.before_close().await.unwrap();
        assert_eq!((flushes.load(Ordering::SeqCst), closes.load(Ordering::SeqCst)), (2, 2), "closing begins once");
    }

    #[tokio::test]
    async fn what_a_hook_writes_is_flushed() {
        let cell: Arc<OnceLock<Arc<Hooked>>> = Arc::default();
        let writer = cell.clone();
        let hook: Hook = Arc::new(move || {
            let hooked = writer.get().unwrap().clone();
            Box::pin(async move { hooked.write_at(5, b"hook").await })
        });
        let store = Arc::new(Store::new(SIZE).volatile_cache());
        let hooks = Hooks { on_before_flush: Some(hook), ..Hooks::default() };
        let hooked = Arc::new(Hooked::new(store.clone(), hooks));
        assert!(cell.set(hooked.clone()).is_ok());
        hooked.flush().await.unwrap();
        store.lose_unflushed();
        assert_eq!(store.snapshot()[5..9], *b"hook");
    }

    #[tokio::test]
    async fn read_only_nothing_is_flushed() {
        let calls = Arc::default();
        let hooks = Hooks { on_before_flush: Some(failing_once(&calls)), ..Hooks::default() };
        Hooked::new(Arc::new(Store::new(SIZE).read_only()), hooks).flush().await.unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 0);
    }
}
