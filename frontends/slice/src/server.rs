//! The threads that answer page faults.
//!
//! They never touch the slice, take no lock that a thread may hold while it touches the slice, and write no log. What
//! is at hand is installed by the fault thread itself, at once; what must be waited for is waited for by a task of its
//! own, so that any number of faults are served at the same time.

use std::cell::Cell;
use std::future::Future;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use r3map_core::{Error, Operation, Result};
use r3map_pipeline::Cached;
use r3map_sys::{Event, Fault, PAGE_SIZE, Pager, Woken};
use tokio::runtime::Handle;

use crate::watch::Watch;

/// A demand that is under way.
type Demanded = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

thread_local! {
    static INSTALLS: Cell<u64> = const { Cell::new(0) };
}

/// Notes that this thread has installed pages, and so woken those who wait for them.
pub(crate) fn note_install() {
    INSTALLS.set(INSTALLS.get().wrapping_add(1));
}

/// Running fault threads. Dropping this ends them, and all access to the memory with them.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<Event>,
    pager: Arc<Pager>,
    threads: Vec<JoinHandle<()>>,
}

/// What it takes to answer a fault.
pub(crate) struct Handler {
    pub(crate) pager: Arc<Pager>,
    pub(crate) region: Arc<Cached>,
    pub(crate) runtime: Handle,
    /// How long a page that could not be had stays poisoned before it is asked for anew.
    pub(crate) heal_after: Duration,
}

impl Server {
    pub(crate) fn start(handler: Handler, threads: NonZeroUsize) -> Result<Self> {
        let failed = |error| Error::from_io(Operation::Mount, "cannot start a thread that serves page faults", error);
        let stop = Arc::new(Event::new().map_err(failed)?);
        let mut server = Self { stop: stop.clone(), pager: handler.pager.clone(), threads: Vec::new() };
        let handler = Arc::new(handler);
        for _ in 0..threads.get() {
            let (handler, stop) = (handler.clone(), stop.clone());
            let thread = thread::Builder::new().name("r3map-faults".into()).spawn(move || handler.run(&stop));
            server.threads.push(thread.map_err(failed)?);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.raise();
        // A fault thread catches the panics of what it calls: how it ended tells nothing more.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
        // Who comes now would wait for ever.
        let _ = self.pager.seal();
    }
}

impl Handler {
    fn run(self: &Arc<Self>, stop: &Event) {
        let _timers_and_sockets = self.runtime.enter();
        let (mut watch, mut faults) = (Watch::default(), Vec::new());
        loop {
            match watch.wait(&self.pager, stop, &mut faults) {
                Ok(Woken::Stopped) => return,
                Ok(Woken::Faults) => faults.iter().for_each(|fault| self.serve(*fault)),
                // Nobody would be answered any more: better a segmentation fault than to wait for ever.
                Err(_) => return drop(self.pager.seal()),
            }
        }
    }

    fn serve(self: &Arc<Self>, fault: Fault) {
        let reply = Reply { handler: self.clone(), offset: fault.offset, answered: false };
        let installs = INSTALLS.get();
        match catch_unwind(AssertUnwindSafe(|| self.poll_once(fault.offset))) {
            Ok(Polled::Done(Ok(()))) if INSTALLS.get() != installs => reply.installed(),
            Ok(Polled::Done(outcome)) => reply.give(&outcome),
            Ok(Polled::Pending(demanded)) => drop(self.runtime.spawn(async move { reply.give(&demanded.await) })),
            Err(_panic) => drop(reply),
        }
    }

    fn poll_once(&self, offset: u64) -> Polled {
        let end = (offset + PAGE_SIZE).min(self.pager.len());
        let region = self.region.clone();
        let mut demanded: Demanded = Box::pin(async move { region.demand(offset..end).await });
        // The task that goes on with it polls it again at once, with a waker that does something.
        match demanded.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => Polled::Done(outcome),
            Poll::Pending => Polled::Pending(demanded),
        }
    }
}

enum Polled {
    Done(Result<()>),
    Pending(Demanded),
}

/// The answer that a fault waits for. Dropped without one, it poisons the page: nobody waits for ever.
struct Reply {
    handler: Arc<Handler>,
    offset: u64,
    answered: bool,
}

impl Reply {
    /// What has installed the page has woken those who wait for it.
    fn installed(mut self) {
        self.answered = true;
    }

    /// A page that was to be had is there, mostly because somebody else has installed it and woken everybody. If it is
    /// not, it was dropped behind our back (`madvise`), and what it held is lost: it is poisoned.
    fn give(mut self, outcome: &Result<()>) {
        self.answered =
            outcome.is_ok() && self.is_present() && self.handler.pager.wake(self.offset, self.len()).is_ok();
    }

    fn is_present(&self) -> bool {
        let mut present = false;
        let range = self.offset..self.offset + self.len();
        self.handler.pager.present(range, &mut |_| present = true).is_ok() && present
    }

    fn len(&self) -> u64 {
        PAGE_SIZE.min(self.handler.pager.len() - self.offset)
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let Handler { pager, runtime, heal_after, .. } = &*self.handler;
        if pager.poison(self.offset).is_err() {
            // Only a kernel that is out of memory: the last way to let nobody wait for ever.
            let _ = pager.seal();
        }
        let (pager, heal_after) = (Arc::downgrade(pager), *heal_after);
        runtime.spawn(async move {
            tokio::time::sleep(heal_after).await;
            // A page that cannot be healed now is tried again after the next failure; until then it stays an error.
            pager.upgrade().map(|pager| pager.heal(heal_after))
        });
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::Backend;
    use r3map_local::{Memory, Stored};
    use r3map_pipeline::{CachedParts, CachedSettings};
    use r3map_sys::{Mapping, Protection, ScopeWanted};

    use super::*;

    /// As after somebody's `madvise`: the region has the page, and the memory does not.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_page_that_was_dropped_behind_our_back_is_an_error_and_not_zeros() {
        let size = 3 * PAGE_SIZE;
        let elsewhere = Stored::memory(Arc::new(Memory::new(size).unwrap()));
        let remote = Arc::new(Memory::new(size).unwrap());
        let settings = CachedSettings::default();
        let region = Cached::open(Arc::new(elsewhere), remote, settings, CachedParts::default()).await.unwrap();
        region.write_at(0, &vec![1; 3 * 4096]).await.unwrap();
        let mapping = Mapping::new(size, Protection::Tracked, ScopeWanted::UserAndKernel).unwrap();
        let pager = mapping.pager().clone();
        let handler =
            Handler { pager: pager.clone(), region, runtime: Handle::current(), heal_after: Duration::from_secs(1) };
        let server = Server::start(handler, NonZeroUsize::MIN).unwrap();
        // The kernel reads for us, so that what would be a signal is an error.
        let read = tokio::task::spawn_blocking(move || pager.read(PAGE_SIZE, &mut [0; 8])).await.unwrap();
        assert!(read.is_err());
        drop(server);
    }
}
