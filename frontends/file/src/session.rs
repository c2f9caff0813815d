//! One connection to the kernel: the threads that take requests, and how it starts, is told of changes, and ends. It
//! knows no paths; `mount` and `opened` do.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{Config, INodeNo, Notifier, SessionACL};
use r3map_core::{Backend, Error, ErrorKind, Operation, Result, check_range};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::filesystem::{RegionFile, Shape, file_ino};
use crate::kernel::device_can_be_opened;
use crate::service::Service;
use crate::settings::FileSettings;
use r3map_pipeline::blocking::{off_runtime, spawn, within};

/// A file system that is being served.
pub(crate) struct Session {
    /// Nothing was written before there is one.
    backend: OnceLock<Arc<dyn Backend>>,
    size: u64,
    service: Arc<Service>,
    notifier: Notifier,
    file: INodeNo,
    read_only: bool,
    limit: Duration,
    /// Nobody is to wait for the backend any more.
    given_up: CancellationToken,
    ended: watch::Receiver<bool>,
}

impl Session {
    /// Answers the kernel's first request on `channel` and starts to serve `backend`, which has this shape. Without one,
    /// whoever wants to read or write gets an error until [one is there](Self::bind). Blocks until that is done.
    ///
    /// # Errors
    /// If the kernel and this program do not agree, or no threads can be started.
    pub(crate) fn start(
        channel: OwnedFd,
        shape: Shape,
        backend: Option<Arc<dyn Backend>>,
        runtime: Handle,
        settings: &FileSettings,
    ) -> Result<Self> {
        let threads = settings.thread_count();
        let longest = settings.max_request as usize;
        let service = Arc::new(Service::new(backend.clone(), runtime, longest, threads * 2));
        let file_system = RegionFile::new(service.clone(), shape, settings.clone());
        let served = fuser::Session::from_fd(file_system, channel, SessionACL::All, config(threads)).map_err(failed)?;
        let notifier = served.notifier();
        let ended = serve(served)?;
        let file = file_ino(&settings.show);
        let (read_only, limit) = (settings.read_only, settings.unmount_limit);
        let (backend, given_up) = (backend.map_or_else(OnceLock::new, OnceLock::from), CancellationToken::new());
        Ok(Self { backend, size: shape.size, service, notifier, file, read_only, limit, given_up, ended })
    }

    /// Serves `backend` from now on, which has the shape that was told. Only where there is none yet.
    pub(crate) fn bind(&self, backend: Arc<dyn Backend>) {
        if self.backend.set(backend.clone()).is_ok() {
            self.service.bind(backend);
        }
    }

    /// How long an end may take.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// Whether the kernel has let go.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits until the kernel has let go.
    pub(crate) async fn ended(&self) {
        // An error says that the thread that would tell is gone, and with it the session.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Makes the kernel forget what it has cached of a range.
    pub(crate) async fn invalidate(&self, range: Range<u64>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        check_range(Operation::Read, self.size, range.start, len)?;
        if len == 0 || self.has_ended() {
            return Ok(());
        }
        let (notifier, file) = (self.notifier.clone(), self.file);
        let (start, len) = (signed(range.start), signed(len));
        // The kernel waits for reads of these pages that are under way, which may be a while.
        off_runtime(move || notifier.inval_inode(file, start, len).map_err(failed)).await
    }

    /// Ends the service: from now on requests, and those that wait, are answered with an error.
    pub(crate) fn close(&self) {
        self.service.close();
    }

    /// The same, and nobody waits for the backend's flush any more.
    pub(crate) fn abandon(&self) {
        self.given_up.cancel();
        self.close();
    }

    /// [`Self::close`], and waits for what is left of the requests that were given up. Blocks, at most for the limit; not
    /// to be called on a thread of the runtime.
    pub(crate) fn give_up(&self) -> Result<()> {
        self.close();
        let service = self.service.clone();
        self.wait_for("the requests that were given up", async move {
            service.drained().await;
            Ok(())
        })
    }

    /// After the last request: the same, and flushes the backend.
    pub(crate) fn settle(&self) -> Result<()> {
        self.give_up()?;
        self.flush()
    }

    /// Has the kernel hand over what mappings wrote, and the backend flush it, by `sync`. The kernel says only that
    /// something went wrong; if the backend can say what, that is the error.
    pub(crate) fn synced(&self, sync: impl FnOnce() -> std::io::Result<()>, what: &str) -> Result<()> {
        self.service.forget_failed_flush();
        sync().or_else(|error| match self.service.failed_flush() {
            // Asking again could take as long again as a remote is waited for.
            Some(why) => Err(why),
            None => self.flush().and(Err(Error::from_io(Operation::Flush, what, error))),
        })
    }

    /// Flushes the backend. Blocks without a limit; not to be called on a thread of the runtime.
    pub(crate) fn flush_patiently(&self) -> Result<()> {
        self.service.runtime().block_on(self.flushing())
    }

    fn flush(&self) -> Result<()> {
        self.wait_for("the backend's flush", self.flushing())
    }

    /// Flushes the backend, if anything can have been written to it, unless that is given up.
    fn flushing(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let backend = self.backend.get().filter(|_| !self.read_only).cloned();
        let given_up = self.given_up.clone();
        async move {
            let Some(backend) = backend else { return Ok(()) };
            let flushed = given_up.run_until_cancelled(backend.flush()).await;
            flushed.unwrap_or_else(|| Err(Error::new(ErrorKind::Cancelled, Operation::Flush, "the file was given up")))
        }
    }

    fn wait_for(&self, what: &str, future: impl Future<Output = Result<()>> + Send + 'static) -> Result<()> {
        let runtime = self.service.runtime().clone();
        within(self.limit, what, move || runtime.block_on(future))
    }
}

fn config(threads: usize) -> Config {
    let mut config = Config::default();
    config.n_threads = Some(threads);
    // A channel for each thread saves them from queueing for one; opening it takes permission that users of the helper
    // may not have.
    config.clone_fd = device_can_be_opened();
    config
}

/// Serves on threads of its own; the receiver turns true when they have ended.
fn serve(session: fuser::Session<RegionFile>) -> Result<watch::Receiver<bool>> {
    let (end, ended) = watch::channel(false);
    spawn(move || {
        // Inherited by the threads that take requests. Reclaiming memory must not wait for them when they themselves
        // ask for memory (a loop device or swap on this file); needs CAP_SYS_RESOURCE, and is only a help.
        let _ = rustix::process::configure_io_flusher_behavior(true);
        if let Err(error) = session.run() {
            tracing::error!(%error, "the FUSE session failed");
        }
        end.send_replace(true);
    })?;
    Ok(ended)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn failed(error: std::io::Error) -> Error {
    Error::from_io(Operation::Mount, "the kernel's FUSE does not work with this program", error)
}
