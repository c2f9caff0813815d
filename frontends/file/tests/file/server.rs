//! A file that is served by a process of its own. A process must not map shared and writable what it serves itself, so
//! this is for the tests that do so; what the region holds can be looked at in a plain file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use r3map_file::{Caching, FileMount, FileSettings};
use r3map_local::File as FileBackend;
use r3map_testkit::process::Process;
use r3map_testkit::{crash, fill};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use tempfile::TempDir;

use crate::support::{LIMIT, World, need_fuse, open};

/// A child that serves; it ends when the file is unmounted, and is killed when this is dropped.
pub(crate) struct Server {
    process: Mutex<Process>,
    home: TempDir,
}

impl Server {
    /// Serves an empty region of `size` bytes.
    pub(crate) fn start(size: u64, caching: Caching) -> Self {
        let home = TempDir::with_prefix("r3map-test-").unwrap();
        File::create(home.path().join("stored")).unwrap().set_len(size).unwrap();
        let role = format!("{caching:?}");
        let process = crash::child("server::serves_until_it_is_unmounted", &role, home.path().to_str().unwrap());
        let server = Self { process: Mutex::new(process), home };
        server.process().wait_for_line(LIMIT, "serving");
        server
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.home.path().join("region")
    }

    /// Unmounts, and says what the region holds then.
    pub(crate) fn end(self) -> Vec<u8> {
        let (begun, unmount) = (Instant::now(), || unmount(self.path(), UnmountFlags::empty()));
        // A child that another test starts has open what this process has, until it runs a program of its own.
        while let Err(error) = unmount() {
            assert!(error == Errno::BUSY && begun.elapsed() < LIMIT, "{error}");
            thread::sleep(Duration::from_millis(10));
        }
        self.process().wait_for_line(LIMIT, "stored");
        fs::read(self.home.path().join("stored")).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process().kill();
        // Nothing lies there if it ended well.
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }
}

fn serve(home: &Path, caching: Caching) {
    let world = World::beside(home.join("stored").to_str().unwrap());
    let settings = FileSettings { caching, ..FileSettings::default() };
    let mount = world.wait("mounting", async {
        let backend = FileBackend::open(home.join("stored"), &r3map_local::FileSettings::default()).unwrap();
        FileMount::open(Arc::new(backend), home.join("region"), settings).await.unwrap()
    });
    crash::reached("serving");
    world.runtime.block_on(mount.unmounted());
    world.unmount(&mount);
    crash::reached("stored");
}

#[test]
fn serves_until_it_is_unmounted() {
    for caching in [Caching::Keep, Caching::UntilOpened, Caching::Never] {
        if let Some(home) = crash::role(&format!("{caching:?}")) {
            return serve(Path::new(&home), caching);
        }
    }
    need_fuse!();
    let server = Server::start(10_001, Caching::Keep);
    std::os::unix::fs::FileExt::write_all_at(&open(&server.path()), &fill::bytes(0, 10_001, 1), 0).unwrap();
    fill::check(&server.end(), 0, 1).unwrap();
}
