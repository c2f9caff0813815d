//! A mount that is made before there is a region to show: what takes time is done in advance, and showing it is little more
//! than one call to the kernel. Until then it is on no path, so that nobody can open it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use r3map_core::{Backend, ChunkSize, Error, Operation, Result};
use r3map_sys::apart;
use tokio::runtime::Handle;

use crate::FileMount;
use crate::filesystem::Shape;
use crate::kernel::{self, Options};
use crate::mount::{FIRST_ANSWER_LIMIT, Mounted};
use crate::place::Place;
use crate::session::Session;
use crate::settings::{FileSettings, Show};
use r3map_pipeline::blocking::{off_runtime, within};

/// A file that will be shown, served already but on no path: neither its name is there nor anything that could be read.
/// Nothing is left of it when it is dropped or its process is killed.
///
/// Ordinary users, who mount by `fusermount3`, and kernels before 5.2 cannot do this in advance. For them everything is
/// done by [`Self::show`].
#[derive(Debug)]
pub struct PreparedMount {
    settings: FileSettings,
    shape: Shape,
    detached: Option<Detached>,
}

/// A file system that is served, on no path.
pub(crate) struct Detached {
    /// With the last descriptor of it that is closed it ends, unless it is on a path then.
    pub(crate) mount: Arc<OwnedFd>,
    pub(crate) session: Session,
    device: String,
}

impl std::fmt::Debug for Detached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detached").field("device", &self.device).finish_non_exhaustive()
    }
}

impl FileMount {
    /// Does in advance what can be done to show a region of `size` bytes, which suits chunks of `chunk`. Works on the
    /// runtime as [`Self::open`] does.
    ///
    /// # Errors
    /// `InvalidInput` for bad settings. Whether it can be shown on a path is for [`Self::check`] to say.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn prepare(size: u64, chunk: ChunkSize, settings: FileSettings) -> Result<PreparedMount> {
        settings.validate()?;
        let (shape, runtime) = (Shape { size, chunk }, Handle::current());
        off_runtime(move || {
            let detached = Detached::new(shape, &settings, runtime);
            let detached = detached.inspect_err(|error| tracing::debug!(%error, "it will be mounted when it is shown"));
            Ok(PreparedMount { settings, shape, detached: detached.ok() })
        })
        .await
    }
}

impl PreparedMount {
    /// Shows `backend` on `path`, as [`FileMount::open`] does. The less is left to do, the better the backend is what was
    /// expected.
    ///
    /// # Errors
    /// As [`FileMount::open`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn show(self, backend: Arc<dyn Backend>, path: impl AsRef<Path>) -> Result<FileMount> {
        let Self { settings: expected, shape, detached } = self;
        let settings = expected.clone().fit(&*backend)?;
        let as_expected = settings == expected && Shape::of(&*backend) == shape;
        let (path, runtime) = (path.as_ref().to_owned(), Handle::current());
        off_runtime(move || {
            if let Some(detached) = detached.filter(|_| as_expected) {
                match detached.attach(backend.clone(), Place::reserve(&path, &settings.show)?, &settings.show) {
                    Ok(mounted) => return Ok(mounted.into()),
                    Err(error) => tracing::debug!(%error, "it is mounted anew"),
                }
            }
            Mounted::mount(backend, &path, &settings, runtime).map(FileMount::from)
        })
        .await
    }
}

impl Detached {
    pub(crate) fn new(shape: Shape, settings: &FileSettings, runtime: Handle) -> Result<Self> {
        let cannot = |error| Error::from_io(Operation::Mount, "it cannot be mounted without a path", error);
        let entry = match &settings.show {
            Show::File => None,
            Show::Entry(name) => Some(name.clone()),
        };
        let made = kernel::detached(&Options::of(settings), entry.is_some()).map_err(|errno| cannot(errno.into()))?;
        let (mount, session) = (Arc::new(made.mount), Session::start(made.channel, shape, None, runtime, settings)?);
        let asked = mount.clone();
        // For the reasons that a mount on a path is opened for.
        let open = move || apart::open_detached(asked.as_fd(), entry.as_deref()).map_err(cannot);
        within(FIRST_ANSWER_LIMIT, "the first answer", open)?;
        let device = kernel::device_of(mount.as_fd()).map_err(|errno| cannot(errno.into()))?;
        kernel::raise_read_ahead(&device, settings.read_ahead);
        Ok(Self { mount, session, device })
    }

    fn attach(self, backend: Arc<dyn Backend>, place: Place, show: &Show) -> Result<Mounted> {
        self.session.bind(backend);
        kernel::attach(self.mount.as_fd(), place.path()).inspect_err(|_| place.made().remove())?;
        Ok(Mounted::new(&place, self.session, self.device, show))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use r3map_testkit::store::Store;
    use r3map_testkit::{deadline, fill, skip};
    use rustix::io::Errno;

    use super::*;

    const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

    /// What is read of a mount for which there is only a descriptor.
    async fn read(detached: &Detached) -> std::io::Result<Vec<u8>> {
        let path = format!("/proc/self/fd/{}", detached.mount.as_raw_fd());
        tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            OpenOptions::new().read(true).open(path)?.read_to_end(&mut bytes).map(|_| bytes)
        })
        .await
        .expect("it ends")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn before_there_is_a_region_nothing_can_be_read_and_nothing_of_that_is_remembered() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            return skip("mounting FUSE without a path needs root and /dev/fuse");
        }
        let preparing = FileMount::prepare(300_001, ChunkSize::DEFAULT, FileSettings::default());
        let prepared = deadline(LIMIT, "preparing", preparing).await.unwrap();
        let detached = prepared.detached.expect("root can mount without a path");
        let error = deadline(LIMIT, "an answer", read(&detached)).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));
        detached.session.bind(Arc::new(Store::new(300_001).filled(1)));
        let found = deadline(LIMIT, "the bytes", read(&detached)).await.unwrap();
        assert_eq!(found.len(), 300_001);
        fill::check(&found, 0, 1).unwrap();
        let Detached { mount, session, .. } = detached;
        assert!(!session.has_ended());
        drop(mount);
        deadline(LIMIT, "its end", session.ended()).await;
    }
}
