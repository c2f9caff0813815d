//! A region as an open file without a path: for a program that wants a descriptor to read, write or map, or to hand on.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_sys::apart;
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::filesystem::Shape;
use crate::flusher::Flusher;
use crate::mount::{Mounted, wait_outside_runtime};
use crate::prepared::Detached;
use crate::session::Session;
use crate::settings::{FileSettings, Show};
use r3map_pipeline::blocking::{off_runtime, spawn, within};

const CANNOT_FLUSH: &str = "what was written to the opened file cannot be flushed";

/// A region that is open as a file. It is on no path, so nothing is left behind even when the process is killed; other
/// processes reach it through `/proc/PID/fd/N`.
///
/// A thread of this process that is inside a read, write or fsync of the file when the process is killed waits for an
/// answer that nobody gives any more, and the process is not gone before its connection in
/// `/sys/fs/fuse/connections` is aborted (by root, or by a reboot). To be safe from that, let another process use the
/// file. Above all do not store to shared mappings of it in this process: see [the crate](crate).
///
/// Dropping it flushes and ends it, like [`Self::close`].
pub struct OpenedFile {
    open: Option<Open>,
}

struct Open {
    file: Arc<File>,
    session: Arc<Session>,
}

impl OpenedFile {
    /// Opens `backend` as a file, for writing unless it is read-only. Of the settings, what concerns the path does not
    /// matter. The rest is as for [`FileMount::open`](crate::FileMount::open), also the runtime.
    ///
    /// # Errors
    /// As [`FileMount::open`](crate::FileMount::open).
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn open(backend: Arc<dyn Backend>, settings: FileSettings) -> Result<Self> {
        let settings = FileSettings { show: Show::File, ..settings }.fit(&*backend)?;
        let runtime = Handle::current();
        let open = off_runtime(move || Open::start(backend, &settings, runtime)).await?;
        Ok(Self { open: Some(open) })
    }

    /// As [`FileMount::invalidate`](crate::FileMount::invalidate).
    ///
    /// # Errors
    /// As [`FileMount::invalidate`](crate::FileMount::invalidate).
    pub async fn invalidate(&self, range: Range<u64>) -> Result<()> {
        self.get().session.invalidate(range).await
    }

    /// Flushes the file, also for somebody who does not have it. Unlike `fsync` in this process, it does not keep the
    /// process from being killed.
    #[must_use]
    pub fn flusher(&self) -> Flusher {
        let (file, session) = (Arc::downgrade(&self.get().file), self.get().session.clone());
        Flusher::new(move || {
            let closed = || Error::new(ErrorKind::NotFound, Operation::Flush, "the opened file was closed");
            let file = file.upgrade().ok_or_else(closed)?;
            session.synced(|| apart::sync_file(&file), CANNOT_FLUSH)
        })
    }

    /// Hands over what the kernel still holds, flushes the backend, and closes the file. Clones of the descriptor and
    /// mappings get errors from then on. Where there may be much to hand over, [flush](Self::flusher) it first, which
    /// has no limit.
    ///
    /// # Errors
    /// Whatever the backend answers to the last writes and the flush, `Unavailable` if it does not take them within
    /// [`FileSettings::unmount_limit`]; it is closed all the same.
    pub async fn close(mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => off_runtime(move || open.close()).await,
            None => Ok(()),
        }
    }

    /// Closes the file without storing anything more, also while the backend does not answer: requests that wait for it get
    /// an error, and so does whoever has a clone or a mapping of it from then on.
    ///
    /// # Errors
    /// If a request does not end that was given up.
    pub async fn abandon(mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => off_runtime(move || open.abandon()).await,
            None => Ok(()),
        }
    }

    fn get(&self) -> &Open {
        self.open.as_ref().expect("it is taken only by what consumes it")
    }
}

impl Open {
    /// On no path at all, so that a process which is killed meanwhile leaves nothing; or for a moment on one, where the
    /// kernel or the user's rights ask for that.
    fn start(backend: Arc<dyn Backend>, settings: &FileSettings, runtime: Handle) -> Result<Self> {
        let detached = Detached::new(Shape::of(&*backend), settings, runtime.clone());
        let opened = detached.and_then(|Detached { mount, session, .. }| {
            session.bind(backend.clone());
            let file = open(Path::new(&format!("/proc/self/fd/{}", mount.as_raw_fd())), settings)?;
            Ok(Self { file: Arc::new(file), session: Arc::new(session) })
        });
        match opened {
            Ok(opened) => Ok(opened),
            Err(error) => {
                tracing::debug!(%error, "it is mounted on a path for a moment");
                Self::start_on_a_path(backend, settings, runtime)
            }
        }
    }

    fn start_on_a_path(backend: Arc<dyn Backend>, settings: &FileSettings, runtime: Handle) -> Result<Self> {
        let directory = TempDir::with_prefix("r3map-").map_err(cannot_open)?;
        let mounted = Mounted::mount(backend, &directory.path().join("region"), settings, runtime)?;
        let opened = open(mounted.file(), settings);
        mounted.hide()?;
        Ok(Self { file: Arc::new(opened?), session: Arc::new(mounted.session) })
    }

    /// Blocks, not for ever.
    fn abandon(self) -> Result<()> {
        // First: closing the file would wait for what it could not hand over.
        self.session.abandon();
        drop(self.file);
        self.session.give_up()
    }

    /// Blocks, not for ever.
    fn close(self) -> Result<()> {
        let (file, session) = (self.file.clone(), self.session.clone());
        let sync = move || session.synced(|| apart::sync_file(&file), CANNOT_FLUSH);
        let synced = within(self.session.limit(), "handing over what the kernel holds", sync);
        if synced.is_err() {
            // What could not be handed over is an error now: closing the file would wait for it. The backend was asked.
            self.session.abandon();
        }
        drop(self.file);
        synced.and(self.session.settle())
    }
}

fn open(path: &Path, settings: &FileSettings) -> Result<File> {
    OpenOptions::new().read(true).write(!settings.read_only).open(path).map_err(cannot_open)
}

fn cannot_open(error: io::Error) -> Error {
    Error::from_io(Operation::Open, "the region cannot be opened as a file", error)
}

impl Deref for OpenedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.get().file
    }
}

impl AsFd for OpenedFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get().file.as_fd()
    }
}

impl Drop for OpenedFile {
    fn drop(&mut self) {
        let Some(open) = self.open.take() else { return };
        let closing = spawn(move || {
            if let Err(error) = open.close() {
                tracing::error!(%error, "closing failed");
            }
        });
        if let Ok(closing) = closing {
            wait_outside_runtime(|| {
                let _ = closing.join();
            });
        }
    }
}
