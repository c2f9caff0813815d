//! What the tests share: devices over regions that count and fail as they are told, and programs with limits.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_block::{BlockDevice, BlockSettings, Kind};
use r3map_core::{Backend, Result};
use r3map_testkit::process::Process;
use rustix::fs::OFlags;

/// How long anything may take that takes no time on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// What serves backends by itself.
pub(crate) const KINDS: [Kind; 2] = [Kind::Ublk, Kind::Nbd];

/// Does the same with a device of each kind, at once: for what mostly waits.
pub(crate) async fn each_kind(work: impl AsyncFn(Kind)) {
    let [one, other] = KINDS;
    tokio::join!(work(one), work(other));
}

/// A device over `backend`, or why not.
pub(crate) async fn try_device(kind: Kind, backend: Arc<dyn Backend>, settings: BlockSettings) -> Result<BlockDevice> {
    r3map_testkit::deadline(SOON, "making a device", BlockDevice::open(kind, backend, settings)).await
}

/// A device over `backend`.
pub(crate) async fn device(kind: Kind, backend: Arc<dyn Backend>) -> BlockDevice {
    try_device(kind, backend, BlockSettings::default()).await.unwrap()
}

/// Ends a device, which must work.
pub(crate) async fn unmount(device: BlockDevice) {
    r3map_testkit::deadline(SOON, "unmounting", device.unmount()).await.unwrap();
}

/// Runs a program to its good end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let mut process = Process::start(Command::new(program).args(arguments));
    let status = process.wait(SOON);
    let said = [process.stdout().join("\n"), process.stderr().join("\n")].join("\n");
    assert!(status.success(), "{program} {arguments:?}: {status}\n{said}");
    said
}

/// Blocking work, as an application does it, off the runtime.
pub(crate) async fn app<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    r3map_testkit::deadline(SOON * 2, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}

/// Opens a device past the kernel's cache; requests must be whole, aligned blocks.
pub(crate) fn open_direct(path: &Path, more: OFlags) -> File {
    let flags = (OFlags::DIRECT | more).bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

/// A buffer whose part from the returned place on is aligned for [`open_direct`].
pub(crate) fn aligned(len: usize) -> (Vec<u8>, usize) {
    const BLOCK: usize = 4096;
    let buffer = vec![0; len + BLOCK];
    let place = buffer.as_ptr().align_offset(BLOCK);
    (buffer, place)
}

/// The path as an argument.
pub(crate) fn name(path: &Path) -> String {
    path.to_str().expect("plain names").to_owned()
}

/// Waits until `holds`, which must come true by itself.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < end, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A file system of a device, mounted on a folder. Dropping it unmounts it.
pub(crate) struct Mounted {
    folder: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(device: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-t", "ext4", "-o", "discard", &name(device), &name(folder.path())]);
        Self { folder }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    pub(crate) fn unmount(self) {
        run("umount", &[&name(self.folder.path())]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.folder.path(), rustix::mount::UnmountFlags::DETACH);
    }
}
