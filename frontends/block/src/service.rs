//! Runs requests against the backend: at once on the thread that took the request from the kernel where the backend
//! answers at once, as a task of the runtime where it does not. It knows nothing of what a request is.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll, Waker};

use r3map_core::Backend;
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
}

impl Service {
    /// Serves `backend` with slow requests on `runtime`; requests that move bytes are at most `max_request` long, and
    /// `keep` buffers are kept at hand.
    pub(crate) fn new(backend: Arc<dyn Backend>, runtime: Handle, max_request: u32, keep: usize) -> Self {
        Self {
            backend: RwLock::new(Some(backend)),
            runtime,
            waiting: TaskTracker::new(),
            closed: CancellationToken::new(),
            buffers: Buffers::new(keep),
            zeroes: vec![0; max_request as usize],
        }
    }

    /// The backend; none once closed.
    pub(crate) fn backend(&self) -> Option<Arc<dyn Backend>> {
        self.backend.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Runs `request` to its end. A request that panics or is given up is dropped, and its reply with it.
    pub(crate) fn run(&self, request: impl Future<Output = ()> + Send + 'static) {
        let mut request = Box::pin(request);
        // A panic must not end the thread that serves a queue.
        let polled = {
            let _timers_and_sockets = self.runtime.enter();
            catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(&mut Context::from_waker(Waker::noop()))))
        };
        match polled {
            Ok(Poll::Ready(())) => {}
            // The task polls it again at once, with a waker that does something.
            Ok(Poll::Pending) => {
                let request = self.closed.clone().run_until_cancelled_owned(request);
                self.waiting.spawn_on(request, &self.runtime);
            }
            Err(_panic) => tracing::error!("the backend panicked; its request is answered with an error"),
        }
    }

    /// From now on there is no backend, and requests that wait are given up: each is answered with an error.
    pub(crate) fn close(&self) {
        *self.backend.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.closed.cancel();
        self.waiting.close();
    }

    /// Waits until no request waits any more. Only after [`Self::close`].
    pub(crate) async fn drained(&self) {
        self.waiting.wait().await;
    }
}
