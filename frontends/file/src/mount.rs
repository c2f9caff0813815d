//! A region shown on a path, from mounting to unmounting.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_sys::apart;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::filesystem::Shape;
use crate::flusher::Flusher;
use crate::kernel::{self, Options, Unmount, shown, unmount, unmount_now, with_a_moment};
use crate::mountinfo::mounted_on;
use crate::place::{Made, Place, is_dead};
use crate::session::Session;
use crate::settings::{FileSettings, Show};
use r3map_pipeline::blocking::{off_runtime, spawn, within};

/// How long the kernel may take for the first answer of a new mount.
pub(crate) const FIRST_ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A region that is mounted as a file.
///
/// Dropping it detaches it as [`Self::detach`] does and waits until that is done, except inside a single-threaded
/// runtime, which the backend may need; there it happens in the background.
pub struct FileMount {
    mounted: Arc<Mounted>,
}

/// What a thread needs to unmount.
pub(crate) struct Mounted {
    pub(crate) session: Session,
    /// What is mounted on.
    point: PathBuf,
    /// `MAJOR:MINOR`, to tell our mount from one that somebody put over it.
    device: String,
    /// The path of the file itself.
    file: PathBuf,
    made: Made,
    gone: AtomicBool,
    /// Held by whoever unmounts: a second one would find the path empty, or somebody else's mount on it.
    leaving: Mutex<()>,
}

impl FileMount {
    /// Shows `backend` on `path`, and serves it on threads of its own; requests for which the backend must wait run on
    /// the tokio runtime that this is called in. Never touch the file with blocking calls from a thread that this
    /// runtime needs to make progress: on a single-threaded one, use `spawn_blocking` or `tokio::fs`. What
    /// [`OpenedFile`](crate::OpenedFile) says about being killed concerns threads of this process that use the file.
    ///
    /// Where a killed process left its mount behind on the path, that is removed first. What does not exist is made,
    /// and removed again when it is unmounted.
    ///
    /// Dropping the future may leave it mounted for a moment; it is then unmounted in the background.
    ///
    /// # Errors
    /// `InvalidInput` for bad settings, a backend that takes only whole chunks, and a path that cannot be mounted on, `Conflict` if something that lives is
    /// mounted on it, `Unavailable` where the system has no FUSE, `NotFound` where the path's directory or
    /// `fusermount3` is missing, `Denied` where the user may not.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn open(backend: Arc<dyn Backend>, path: impl AsRef<Path>, settings: FileSettings) -> Result<Self> {
        let settings = settings.fit(&*backend)?;
        let (path, runtime) = (path.as_ref().to_owned(), Handle::current());
        off_runtime(move || Mounted::mount(backend, &path, &settings, runtime).map(Self::from)).await
    }

    /// Whether something can be shown on `path` now, as far as that can be known without mounting. Nothing is left of
    /// it, except that a mount which a killed process left behind there is removed.
    ///
    /// # Errors
    /// Those of [`Self::open`] that are about the settings and the path.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn check(path: impl AsRef<Path>, settings: FileSettings) -> Result<()> {
        settings.validate()?;
        let path = path.as_ref().to_owned();
        off_runtime(move || Place::reserve(&path, &settings.show).map(|place| place.made().remove())).await
    }

    /// The path of the file, with symbolic links resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mounted.file
    }

    /// Makes the kernel forget what it has cached of a range of bytes, in files and in mappings, because the region has
    /// changed there other than through this file: call it after the change. What an application wrote to a shared
    /// mapping and the kernel has not yet handed over is written to the backend first, over the change.
    ///
    /// # Errors
    /// `InvalidInput` past the end; otherwise if the kernel does not answer.
    pub async fn invalidate(&self, range: Range<u64>) -> Result<()> {
        self.mounted.session.invalidate(range).await
    }

    /// Returns when the file is not mounted any more, by whoever it was unmounted (`umount`, `fusermount3 -u`).
    pub async fn unmounted(&self) {
        self.mounted.session.ended().await;
    }

    /// Hands over what the kernel still holds, and flushes the backend, however long that takes.
    ///
    /// Dropping the future does not stop it.
    ///
    /// # Errors
    /// What the backend answers to the writes and the flush.
    pub async fn flush(&self) -> Result<()> {
        self.flusher().flush().await
    }

    /// Does the same for somebody who does not have the mount. Once it is unmounted, that flushes the backend alone.
    #[must_use]
    pub fn flusher(&self) -> Flusher {
        let mounted = self.mounted.clone();
        Flusher::new(move || mounted.flush())
    }

    /// Hands over what the kernel still holds, flushes the backend, and unmounts if nobody uses the file. Does nothing
    /// if it is unmounted already, apart from the flush.
    ///
    /// Dropping the future does not stop it.
    ///
    /// # Errors
    /// `Conflict` if the file is in use, `Unavailable` if the backend does not take what is left within
    /// [`FileSettings::unmount_limit`], and whatever the backend answers to the writes and the flush. Unless only the
    /// last flush failed the file is still mounted then and works as before: call it again, or [`Self::detach`].
    pub async fn unmount(&self) -> Result<()> {
        let mounted = self.mounted.clone();
        off_runtime(move || mounted.leave(false)).await
    }

    /// The same, but unmounts in any case: whoever still has the file open gets errors from then on (`ENOTCONN`).
    ///
    /// # Errors
    /// As [`Self::unmount`], but never `Conflict`; it is unmounted all the same, and the error says that something may
    /// not have been stored.
    pub async fn detach(&self) -> Result<()> {
        let mounted = self.mounted.clone();
        off_runtime(move || mounted.leave(true)).await
    }

    /// Unmounts without storing anything more, also while the backend does not answer: requests that wait for it get an
    /// error, and so does whoever has the file open from then on.
    ///
    /// Dropping the future does not stop it.
    ///
    /// # Errors
    /// If it cannot be unmounted.
    pub async fn abandon(&self) -> Result<()> {
        let mounted = self.mounted.clone();
        off_runtime(move || mounted.abandon()).await
    }
}

impl From<Mounted> for FileMount {
    fn from(mounted: Mounted) -> Self {
        Self { mounted: Arc::new(mounted) }
    }
}

impl Drop for FileMount {
    fn drop(&mut self) {
        if self.mounted.gone.load(Relaxed) {
            return;
        }
        let mounted = self.mounted.clone();
        let leaving = spawn(move || {
            if let Err(error) = mounted.leave(true) {
                tracing::error!(%error, "unmounting failed");
            }
        });
        if let Ok(leaving) = leaving {
            wait_outside_runtime(|| {
                let _ = leaving.join();
            });
        }
    }
}

/// Waits where that does not stop a runtime that may be needed for what is waited for.
pub(crate) fn wait_outside_runtime(wait: impl FnOnce()) {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Err(_) => wait(),
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        Ok(_) => {}
    }
}

impl Mounted {
    /// Mounts and serves. Blocks.
    pub(crate) fn mount(
        backend: Arc<dyn Backend>,
        path: &Path,
        settings: &FileSettings,
        runtime: Handle,
    ) -> Result<Self> {
        let place = Place::reserve(path, &settings.show)?;
        Self::mount_on(&place, backend, settings, runtime).inspect_err(|_| {
            // Nothing of a failed attempt stays behind.
            let ours = mounted_on(place.path()).is_ok_and(|found| found.is_some_and(|found| found.is_ours()));
            if !ours || unmount(place.path(), Unmount::Abort).is_ok() {
                place.made().remove();
            }
        })
    }

    fn mount_on(place: &Place, backend: Arc<dyn Backend>, settings: &FileSettings, runtime: Handle) -> Result<Self> {
        let channel = kernel::mount(place.path(), &Options::of(settings))?;
        let session = Session::start(channel, Shape::of(&*backend), Some(backend), runtime, settings)?;
        let device = answering_device(place.path(), &file_on(place, &settings.show))?;
        kernel::raise_read_ahead(&device, settings.read_ahead);
        Ok(Self::new(place, session, device, &settings.show))
    }

    /// What is mounted on the place.
    pub(crate) fn new(place: &Place, session: Session, device: String, show: &Show) -> Self {
        let (point, file) = (place.path().to_owned(), file_on(place, show));
        Self {
            session,
            point,
            device,
            file,
            made: place.made(),
            gone: AtomicBool::new(false),
            leaving: Mutex::default(),
        }
    }

    /// Takes it off its path now. Whoever has it open goes on using it.
    pub(crate) fn hide(&self) -> Result<()> {
        unmount(&self.point, Unmount::Detach)?;
        self.gone.store(true, Relaxed);
        self.made.remove();
        Ok(())
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Flushes and unmounts; `anyway` also if that fails or the file is in use. Blocks, not for ever.
    fn leave(self: &Arc<Self>, anyway: bool) -> Result<()> {
        let _leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        // The kernel lets go of what was unmounted a moment later.
        if self.gone.load(Relaxed) {
            return self.finish();
        }
        let is_on_path = self.is_on_path();
        if self.session.has_ended() {
            // By whoever unmounted it, or has ended the connection to the kernel: that leaves a dead mount on the path.
            if is_on_path && !self.is_over() {
                self.unmount(Unmount::Detach)?;
            }
            return self.finish();
        }
        if !is_on_path {
            return if anyway { self.finish() } else { Err(self.out_of_reach()) };
        }
        let synced = self.within_limit("handing over what the kernel holds", Self::sync);
        if synced.is_err() && !anyway {
            return synced;
        }
        // Each attempt by itself: one that went on behind our back could unmount what comes next.
        if let Err(error) = with_a_moment(|| self.unmount(Unmount::Unused)) {
            if !anyway {
                return Err(error);
            }
            self.session.close();
            // The attempt before may have come through after all.
            self.unmount(Unmount::Abort).or_else(|error| if self.is_on_path() { Err(error) } else { Ok(()) })?;
        }
        synced.and(self.finish())
    }

    /// Unmounts without storing anything. Blocks, not for ever.
    fn abandon(self: &Arc<Self>) -> Result<()> {
        // First, so that nobody waits for the backend whom the kernel would wait for, nor whoever is just unmounting.
        self.session.abandon();
        let _leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.gone.load(Relaxed) && self.is_on_path() && !self.is_over() {
            self.unmount(Unmount::Abort)?;
        }
        self.gone.store(true, Relaxed);
        self.made.remove();
        self.session.give_up()
    }

    /// Whether what is on the path cannot be ours, whatever its number.
    fn is_over(&self) -> bool {
        self.session.has_ended() && !is_dead(&self.point).unwrap_or(false)
    }

    fn unmount(self: &Arc<Self>, how: Unmount) -> Result<()> {
        self.within_limit("unmounting", move |mounted| unmount_now(&mounted.point, how))
    }

    fn finish(&self) -> Result<()> {
        self.gone.store(true, Relaxed);
        self.made.remove();
        self.session.settle()
    }

    /// Whether our mount is what lies on the path: not if somebody has unmounted it or mounted something over it.
    fn is_on_path(&self) -> bool {
        mounted_on(&self.point).is_ok_and(|found| found.is_some_and(|found| found.device == self.device))
    }

    fn out_of_reach(&self) -> Error {
        let message = format!("{} was unmounted or covered by somebody else, and is still in use", shown(&self.point));
        Error::new(ErrorKind::Conflict, Operation::Close, message)
    }

    /// As [`Self::sync`]; where it is out of reach, or the kernel holds nothing any more, only the backend can be flushed.
    fn flush(&self) -> Result<()> {
        let is_there = !self.session.has_ended() && self.is_on_path();
        if is_there { self.sync() } else { self.session.flush_patiently() }
    }

    /// Has the kernel hand over what mappings wrote, and the backend flush it. Blocks without a limit.
    fn sync(&self) -> Result<()> {
        let cannot = format!("{} cannot be flushed before unmounting", shown(&self.file));
        self.session.synced(|| apart::sync(&self.file), &cannot)
    }

    fn within_limit(
        self: &Arc<Self>,
        what: &str,
        work: impl FnOnce(&Self) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let mounted = self.clone();
        within(self.session.limit(), what, move || work(&mounted))
    }
}

/// The path of the file itself.
fn file_on(place: &Place, show: &Show) -> PathBuf {
    match show {
        Show::File => place.path().to_owned(),
        Show::Entry(name) => place.path().join(name),
    }
}

/// The device number of the new mount, once the file on it answers.
fn answering_device(point: &Path, file: &Path) -> Result<String> {
    let asked = file.to_owned();
    within(FIRST_ANSWER_LIMIT, "the first answer", move || {
        // Opened and closed once, the kernel knows that it need not tell us of each `close`. Else it would do so for the
        // files that this process has open itself when it is killed, and nobody would be there to answer.
        apart::open(&asked).map_err(|error| {
            Error::from_io(Operation::Mount, format!("{} does not work after mounting", shown(&asked)), error)
        })
    })?;
    match mounted_on(point)? {
        Some(mounted) if mounted.is_ours() => Ok(mounted.device),
        _ => {
            let message = format!("{} was unmounted by somebody else", shown(point));
            Err(Error::new(ErrorKind::Conflict, Operation::Mount, message))
        }
    }
}
