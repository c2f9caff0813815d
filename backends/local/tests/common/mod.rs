//! What several of the tests here need.
#![allow(dead_code, reason = "each test uses some of it")]

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

/// A file system of its own of a few megabytes.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    /// `None` where it cannot be had.
    pub(crate) fn new(megabytes: u32) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
