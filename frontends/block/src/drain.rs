//! The end of a service that is to lose nothing: what is under way is waited for, what comes meanwhile waits, and the
//! backend flushes before anybody is sent away. It knows nothing of devices.

use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_pipeline::{Closed, Gate, WhenClosed};
use tokio::runtime::Handle;
use tokio::time::timeout;

/// In front of the backend that a device is served from.
pub(crate) struct Drain {
    gate: Arc<Gate>,
    runtime: Handle,
}

impl Drain {
    pub(crate) fn new(backend: Arc<dyn Backend>, runtime: Handle) -> Self {
        Self { gate: Arc::new(Gate::new(backend, WhenClosed::Wait)), runtime }
    }

    /// What is to be served.
    pub(crate) fn backend(&self) -> Arc<dyn Backend> {
        self.gate.clone()
    }

    /// Ends the service by `close` when all that is under way is answered, and flushed if that is wanted; what comes
    /// meanwhile waits, and gets errors then. Blocks, for two times `limit` at most.
    ///
    /// # Errors
    /// What is not done within `limit`, or the backend's answer to the flush. The service goes on as before then, unless
    /// it is to end `anyway`: what is under way gets errors in that case.
    pub(crate) fn end(&self, anyway: bool, flushes: bool, limit: Duration, close: impl Fn()) -> Result<()> {
        let late = |operation, what: &str| {
            let message = format!("{what} was not done within {} s", limit.as_secs_f32());
            Error::new(ErrorKind::Unavailable, operation, message)
        };
        self.runtime.block_on(async {
            let closed = timeout(limit, self.gate.close()).await;
            let closed = closed.map_err(|_| late(Operation::Close, "what others ask the device for"));
            match &closed {
                Err(error) if !anyway => return Err(error.clone()),
                Err(_) => close(),
                Ok(_) => {}
            }
            let flushed = match flushes {
                true => timeout(limit, self.gate.inner().flush())
                    .await
                    .unwrap_or_else(|_| Err(late(Operation::Flush, "the backend's flush"))),
                false => Ok(()),
            };
            if flushed.is_err() && !anyway {
                return flushed;
            }
            close();
            // What waits at the gate is given up with the service, and does not pass it first.
            closed.map(Closed::forever).and(flushed)
        })
    }
}
