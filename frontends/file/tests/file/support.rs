//! A mount for a test, with a runtime of its own so that the test itself may use plain blocking file calls.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, Result};
use r3map_file::{FileMount, FileSettings};
use r3map_local::Memory;
use r3map_testkit::faults::Faults;
use r3map_testkit::{deadline, fill, skip};
use rustix::fs::OFlags;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// No single step of a test needs a tenth of this, even on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Whether this machine can mount FUSE here and now; says so if not.
pub(crate) fn fuse() -> bool {
    let here =
        rustix::process::geteuid().is_root() && OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
    if !here {
        skip("mounting FUSE needs root and /dev/fuse");
    }
    here
}

/// Returns from the test, with a word why, unless FUSE works here.
macro_rules! need_fuse {
    () => {
        if !crate::support::fuse() {
            return;
        }
    };
}
pub(crate) use need_fuse;

/// A temporary directory and a runtime with two threads.
pub(crate) struct World {
    pub(crate) runtime: Runtime,
    pub(crate) home: TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::at(TempDir::with_prefix("r3map-test-").unwrap())
    }

    /// For a child that is killed: what it cannot remove is removed with the directory that `path` is in.
    pub(crate) fn beside(path: &str) -> Self {
        Self::at(TempDir::new_in(Path::new(path).parent().unwrap()).unwrap())
    }

    fn at(home: TempDir) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { runtime, home }
    }

    pub(crate) fn path(&self) -> PathBuf {
        fs::canonicalize(self.home.path()).unwrap().join("region")
    }

    /// Waits for a future, not for ever.
    pub(crate) fn wait<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(deadline(LIMIT, what, future))
    }

    /// Waits until something holds, not for ever.
    pub(crate) fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        self.wait(what, async {
            while !holds() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }

    pub(crate) fn try_mount(&self, backend: Arc<dyn Backend>, settings: FileSettings) -> Result<FileMount> {
        self.wait("mounting", FileMount::open(backend, self.path(), settings))
    }

    pub(crate) fn mount(&self, backend: Arc<dyn Backend>, settings: FileSettings) -> FileMount {
        self.try_mount(backend, settings).unwrap()
    }

    pub(crate) fn unmount(&self, mount: &FileMount) {
        self.wait("unmounting", mount.unmount()).unwrap();
    }
}

/// A region in memory that holds the fill of `seed`.
pub(crate) fn filled(size: u64, seed: u64) -> Arc<Memory> {
    let memory = Memory::new(size).unwrap();
    memory.write_now(0, &fill::bytes(0, usize::try_from(size).unwrap(), seed)).unwrap();
    Arc::new(memory)
}

/// The same behind faults, with nothing wrong yet.
pub(crate) fn faulty(size: u64, seed: u64) -> Arc<Faults> {
    Faults::new(filled(size, seed))
}

/// What a region in memory holds.
pub(crate) fn content(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.size()).unwrap()];
    memory.read_now(0, &mut bytes).unwrap();
    bytes
}

pub(crate) fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Opened so that the kernel does not cache.
pub(crate) fn open_direct(path: &Path) -> File {
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// The errno of a failure.
pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&result.unwrap_err()).unwrap()
}
