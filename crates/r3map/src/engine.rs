//! The runtime that all of r3map's own work runs on.
//!
//! A thread that touches mapped memory may sleep until a chunk has arrived. If the task that receives that chunk were
//! to run on the same thread, nobody would ever wake up; so connections, pullers, pushers and fault handlers live here,
//! on threads that never touch a mapping, whatever runtime (or none) the program itself uses.

use std::future::Future;
use std::sync::LazyLock;

use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::runtime::{Builder, Handle, Runtime};

static ENGINE: LazyLock<Runtime> = LazyLock::new(|| {
    let built = Builder::new_multi_thread().enable_all().thread_name("r3map-engine").build();
    built.expect("the system has room for a few threads")
});

/// A handle to the engine, for what must be created on it (a connection that will feed a mapping).
///
/// # Panics
/// On the first use in a process, if the operating system gives it no threads.
#[must_use]
pub fn handle() -> Handle {
    ENGINE.handle().clone()
}

/// Runs `work` on the engine and waits for it. Dropping the returned future cancels the work.
///
/// # Errors
/// What `work` returns; `Internal` if it panicked.
pub async fn run<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let task = tokio_util::task::AbortOnDropHandle::new(handle().spawn(work));
    task.await.unwrap_or_else(|error| {
        Err(Error::new(ErrorKind::Internal, Operation::Open, "a background task died").with_source(error))
    })
}
