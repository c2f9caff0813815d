//! Calls into the kernel that may take as long as a backend does, or for ever (a path whose file system does not answer),
//! each on a thread of its own, so that nobody waits for ever: not the caller, and not a runtime that is shutting down.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::sync::oneshot;

/// Does `work` and waits for it from a task. Dropping the future leaves the work running.
///
/// # Errors
/// What `work` answers; `Internal` if it panics; where no thread can be started.
pub async fn off_runtime<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (done, waiting) = oneshot::channel();
    spawn(move || {
        // The caller has given up if nobody listens.
        let _ = done.send(work());
    })?;
    waiting.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, Operation::Mount, "a helper thread panicked")))
}

/// Does `work` and waits at most `limit` for it; `what` says in the error what did not happen. The work goes on.
///
/// # Errors
/// What `work` answers; `Unavailable` when the time is over; where no thread can be started.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, waiting) = mpsc::sync_channel(1);
    spawn(move || {
        let _ = done.send(work());
    })?;
    waiting.recv_timeout(limit).unwrap_or_else(|_| {
        let message = format!("{what} did not end within {} s", limit.as_secs_f32());
        Err(Error::new(ErrorKind::Unavailable, Operation::Mount, message))
    })
}

/// Starts a thread for `work`.
///
/// # Errors
/// Where none can be started.
pub fn spawn(work: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>> {
    thread::Builder::new()
        .name("r3map-kernel".to_owned())
        .spawn(work)
        .map_err(|error| Error::from_io(Operation::Mount, "no thread can be started", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_no_longer_than_it_may() {
        let (release, held) = mpsc::channel::<()>();
        let error = within(Duration::from_millis(10), "the answer", move || {
            let _ = held.recv();
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().starts_with("the answer did not end"), "{error}");
        drop(release);
        assert_eq!(within(Duration::from_secs(60), "it", || Ok(7)).unwrap(), 7);
    }
}
