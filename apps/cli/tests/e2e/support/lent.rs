//! A server inside the test: it counts every read, and fails as it is told to.

use std::future::Future;
use std::sync::Arc;

use r3map::{Backend, ListenOptions, Listener, OpenOptions, Registry, Uri};
use r3map_core::Operation;
use r3map_testkit::faults::Faults;

/// Waits for something asynchronous.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("the system has room for a thread").block_on(future)
}

/// A region that this process serves.
pub(crate) struct Lent {
    /// What clients connect to.
    pub(crate) uri: String,
    /// What was asked of it, and what goes wrong with it.
    pub(crate) faults: Arc<Faults>,
    listeners: Vec<Box<dyn Listener>>,
}

impl Lent {
    /// Serves the region with this name on a free port.
    pub(crate) fn new(region: &str) -> Self {
        Self::at("grpc://127.0.0.1:0", open(region)).expect("it can listen")
    }

    /// Serves a region, of which all are the same one, on a place to listen on.
    ///
    /// # Errors
    /// If it cannot listen there yet.
    pub(crate) fn at(place: &str, backend: Arc<dyn Backend>) -> r3map::Result<Self> {
        let faults = Faults::new(backend);
        let options = ListenOptions { identity: Some("lent".to_owned()), ..ListenOptions::default() };
        let listeners = block_on(Registry::standard().listen(&[place.parse()?], faults.clone(), &options))?;
        Ok(Self { uri: listeners[0].uri(), faults, listeners })
    }

    /// Ends it at once, as if its process were killed, and gives the place where it was.
    pub(crate) fn kill(mut self) -> String {
        self.listeners.clear();
        self.uri.clone()
    }

    /// Starts to count anew.
    pub(crate) fn forget(&self) {
        drop(self.faults.take_calls());
    }

    /// Bytes that were read from it so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.faults.bytes(Operation::Read)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        for listener in self.listeners.drain(..) {
            // Clients may be gone already, or not: what counts is that it ends.
            let _ = block_on(listener.shutdown());
        }
    }
}

/// Opens a region by its name.
pub(crate) fn open(region: &str) -> Arc<dyn Backend> {
    let uri: Uri = region.parse().expect("that is a name");
    block_on(Registry::standard().open(&uri, &OpenOptions::default())).expect("the region can be opened")
}
