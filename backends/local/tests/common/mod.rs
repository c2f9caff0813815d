//! What several of the tests here need.
#![allow(dead_code, reason = "each test uses some of it")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use r3map_core::{Error, ErrorKind};
use tempfile::TempDir;

/// A path that nothing has yet.
pub(crate) fn fresh(dir: &TempDir) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    dir.path().join(format!("region-{}", COUNT.fetch_add(1, Ordering::Relaxed)))
}

/// Somewhere where `fdatasync` costs nothing, if there is such a place.
pub(crate) fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

/// One line of the given kind with the given words.
pub(crate) fn assert_says<T: std::fmt::Debug>(result: Result<T, Error>, kind: ErrorKind, words: &str) {
    let error = result.unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    assert!(text.contains(words) && !text.contains('\n'), "{text}");
}

/// What a command prints, if it succeeds. It does not take long, whatever the machine is doing otherwise.
pub(crate) fn run(command: &str, arguments: &[&OsStr]) -> Option<String> {
    let output = Command::new("timeout").args(["--kill-after=5", "20", command]).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A file system of its own of a few megabytes.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    /// `None` where it cannot be had.
    pub(crate) fn new(megabytes: u32) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let size = format!("size={megabytes}m");
        let options = ["-t", "tmpfs", "-o", &size, "tmpfs"].map(OsStr::new);
        run("mount", &[&options[..], &[dir.path().as_os_str()]].concat())?;
        Some(Self(dir))
    }

    /// The same with ext4, which finds room for what was written only later.
    pub(crate) fn ext4(megabytes: u64) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(megabytes << 20).unwrap();
        let (image, mount_point) = (image.path().as_os_str(), dir.path().as_os_str());
        run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image])?;
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, mount_point])?;
        Some(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l".as_ref(), self.path().as_os_str()]);
    }
}
