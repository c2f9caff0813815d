//! Runs requests against the backend: at once on the thread that took the request from the kernel where the backend
//! answers at once, as a task of the runtime where it does not. It knows nothing of what a request is.
//!
//! Every request owns its reply object, and that answers `EIO` when it is dropped: a panic, a cancelled task or a
//! runtime that has gone never leaves the kernel waiting.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};

use r3map_core::{Backend, Error, Result};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use r3map_pipeline::Buffers;

/// A backend, the runtime that its slow requests run on, and a switch that ends both.
pub(crate) struct Service {
    backend: RwLock<Option<Arc<dyn Backend>>>,
    runtime: Handle,
    waiting: TaskTracker,
    closed: CancellationToken,
    pub(crate) buffers: Buffers,
    /// Zeros to answer with, as long as the longest request. Never written, so it takes no memory.
    pub(crate) zeroes: Vec<u8>,
    /// Whether the last write was done at once: the guess for the next one. A write's bytes are the kernel's until the
    /// request handler returns, so one that will wait needs a copy first, and one that will not is better without.
    writes_are_prompt: AtomicBool,
    /// Why the last `fsync` that failed did: the kernel passes on only a number.
    failed_flush: Mutex<Option<Error>>,
}

impl Service {
    /// Serves `backend`, once there is one, with slow requests on `runtime`; requests are at most `max_request` bytes long, and `keep`
    /// buffers of that size are kept at hand.
    pub(crate) fn new(backend: Option<Arc<dyn Backend>>, runtime: Handle, max_request: usize, keep: usize) -> Self {
        Self {
            backend: RwLock::new(backend),
            runtime,
            waiting: TaskTracker::new(),
            closed: CancellationToken::new(),
            buffers: Buffers::new(keep),
            zeroes: vec![0; max_request],
            writes_are_prompt: AtomicBool::new(true),
            failed_flush: Mutex::default(),
        }
    }

    /// Serves `backend` from now on.
    pub(crate) fn bind(&self, backend: Arc<dyn Backend>) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = Some(backend);
    }

    /// The backend; none before there is one, and once closed.
    pub(crate) fn backend(&self) -> Option<Arc<dyn Backend>> {
        self.backend.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Runs `request` to its end; whether that was at once.
    pub(crate) fn run(&self, request: impl Future<Output = ()> + Send + 'static) -> bool {
        let mut request = Box::pin(request);
        match self.poll_once(request.as_mut()) {
            Some(Poll::Ready(())) => true,
            Some(Poll::Pending) => {
                let request = self.closed.clone().run_until_cancelled_owned(request);
                self.waiting.spawn_on(request, &self.runtime);
                false
            }
            None => false,
        }
    }

    /// Runs a write whose bytes are borrowed, if it is done at once; `None` if it has to be made again with a copy.
    /// Making it again is what the contract of a dropped write allows.
    pub(crate) fn write_now(&self, backend: &dyn Backend, offset: u64, data: &[u8]) -> Option<Result<()>> {
        if !self.writes_are_prompt.load(Relaxed) {
            return None;
        }
        match self.poll_once(backend.write_at(offset, data).as_mut()) {
            Some(Poll::Ready(done)) => Some(done),
            Some(Poll::Pending) | None => None,
        }
    }

    /// Runs a write that owns its bytes, and remembers for the next one whether it had to.
    pub(crate) fn run_write(&self, request: impl Future<Output = ()> + Send + 'static) {
        let prompt = self.run(request);
        self.writes_are_prompt.store(prompt, Relaxed);
    }

    /// Remembers why an `fsync` failed.
    pub(crate) fn flush_failed(&self, error: &Error) {
        *self.failed_flush.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
    }

    /// Why one has failed since [`Self::forget_failed_flush`].
    pub(crate) fn failed_flush(&self) -> Option<Error> {
        self.failed_flush.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn forget_failed_flush(&self) {
        *self.failed_flush.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// From now on there is no backend, and requests that wait are given up: each answers with an error.
    pub(crate) fn close(&self) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.closed.cancel();
        self.waiting.close();
    }

    /// Waits until no request waits any more. Only after [`Self::close`].
    pub(crate) async fn drained(&self) {
        self.waiting.wait().await;
    }

    /// Polls once, inside the runtime so that timers and sockets can be used; `None` if it panicked.
    fn poll_once<T>(&self, future: Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Option<Poll<T>> {
        let _inside = self.runtime.enter();
        // A panic must not end a thread that takes requests: with the last one gone the file would hang.
        catch_unwind(AssertUnwindSafe(|| future.poll(&mut Context::from_waker(Waker::noop()))))
            .inspect_err(|_| tracing::error!("the backend panicked; its request is answered with EIO"))
            .ok()
    }
}
