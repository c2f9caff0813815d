//! Work that goes on in the background, for callers that await and for callers that block.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// Work on a slice's own runtime. Await it from any runtime, or block on it with [`Task::wait`]. It goes on if this is
/// dropped.
#[derive(Debug)]
#[must_use = "the work goes on in the background, but only its result says whether it succeeded"]
pub struct Task<T> {
    handle: JoinHandle<Result<T>>,
    operation: Operation,
}

impl<T: Send + 'static> Task<T> {
    pub(crate) fn spawn(
        runtime: &Handle,
        operation: Operation,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Self {
        Self { handle: runtime.spawn(work), operation }
    }

    /// Blocks this thread until the work is done. For programs without a runtime; in an asynchronous one, await the
    /// task instead, or its worker threads are kept from other work.
    ///
    /// # Errors
    /// What the work fails with.
    pub fn wait(self) -> Result<T> {
        block_on(self)
    }
}

impl<T> Future for Task<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let operation = self.operation;
        Pin::new(&mut self.handle)
            .poll(context)
            .map(|joined| joined.unwrap_or_else(|error| Err(ended(operation, error))))
    }
}

/// What a task without a result answers with.
fn ended(operation: Operation, error: tokio::task::JoinError) -> Error {
    let (kind, text) = match error.is_cancelled() {
        true => (ErrorKind::Cancelled, "the slice's runtime was shut down"),
        false => (ErrorKind::Internal, "the work panicked"),
    };
    Error::new(kind, operation, text).with_source(error)
}

/// Wakes a thread that is parked in [`block_on`].
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Polls a future on this thread until it is done, without any runtime.
pub(crate) fn block_on<F: Future + Unpin>(mut future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match Pin::new(&mut future).poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}
