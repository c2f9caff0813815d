//! Where a slice's background work runs.

use std::num::NonZeroUsize;

use r3map_core::{Error, Operation, Result};
use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime of the slice's own, or the handle of somebody else's.
#[derive(Debug)]
pub(crate) struct Background {
    handle: Handle,
    own: Option<Runtime>,
}

impl Background {
    pub(crate) fn new(given: Option<Handle>, workers: NonZeroUsize) -> Result<Self> {
        if let Some(handle) = given {
            return Ok(Self { handle, own: None });
        }
        let mut builder = Builder::new_multi_thread();
        let own = builder.worker_threads(workers.get()).thread_name("r3map-slice").enable_all().build();
        let own = own.map_err(|error| Error::from_io(Operation::Mount, "cannot start the slice's runtime", error))?;
        Ok(Self { handle: own.handle().clone(), own: Some(own) })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Does not wait for what still runs, so that a slice can be dropped in asynchronous code too.
        if let Some(runtime) = self.own.take() {
            runtime.shutdown_background();
        }
    }
}
