//! A device as programs see it: its node in `/dev`, and the kernel's knobs for it. It does not matter who serves it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_sys::{FileMapping, Sharing};
use rustix::fs::OFlags;

/// How often it is looked whether something has happened.
const TICK: Duration = Duration::from_millis(5);

/// A block device.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    name: String,
    path: PathBuf,
    size: u64,
    read_only: bool,
}

impl Node {
    /// The device `/dev/NAME`, which holds `size` bytes; waits until it is there, at most for `limit`.
    pub(crate) fn wait(name: String, size: u64, read_only: bool, limit: Duration) -> Result<Self> {
        let path = Path::new("/dev").join(&name);
        let is_there = || path.metadata().is_ok_and(|found| found.file_type().is_block_device());
        if !until(limit, is_there) {
            let message = format!(
                "the kernel has the device {name}, but {} does not appear; mount devtmpfs on /dev",
                path.display()
            );
            return Err(Error::new(ErrorKind::NotFound, Operation::Mount, message));
        }
        Ok(Self { name, path, size, read_only })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the kernel still has it.
    pub(crate) fn exists(&self) -> bool {
        self.has("size")
    }

    /// Whether the kernel shows such a knob.
    pub(crate) fn has(&self, knob: &str) -> bool {
        self.knob(knob).exists()
    }

    /// Opens it; for writing too unless it is read-only.
    pub(crate) fn open(&self) -> Result<File> {
        self.open_with(OFlags::empty())
    }

    /// Opens it so that nobody can mount it meanwhile.
    ///
    /// # Errors
    /// `Conflict` if it is mounted, or claimed in another way.
    pub(crate) fn claim(&self) -> Result<File> {
        self.open_with(OFlags::EXCL)
    }

    fn open_with(&self, flags: OFlags) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(!self.read_only).custom_flags(flags.bits().cast_signed());
        options.open(&self.path).map_err(|error| {
            if error.kind() == io::ErrorKind::ResourceBusy {
                return self.in_use();
            }
            Error::from_io(Operation::Close, format!("{} cannot be opened", self.path.display()), error)
        })
    }

    /// What is said to who would detach it while it is mounted, or claimed in another way.
    pub(crate) fn in_use(&self) -> Error {
        let message = format!("{} is in use; unmount what is on it", self.path.display());
        Error::new(ErrorKind::Conflict, Operation::Close, message)
    }

    /// Maps all of it.
    pub(crate) fn map(&self) -> Result<FileMapping> {
        let cannot = |error| Error::from_io(Operation::Mount, "the device cannot be mapped", error);
        let len = usize::try_from(self.size).map_err(|error| cannot(io::Error::other(error)))?;
        FileMapping::new(&self.open()?, len, Sharing::Shared, !self.read_only).map_err(cannot)
    }

    /// Writes what the kernel has cached of it, and makes it durable.
    pub(crate) fn sync(&self) -> Result<()> {
        let cannot = |error| Error::from_io(Operation::Flush, "what was written cannot be flushed", error);
        self.open()?.sync_all().map_err(cannot)
    }

    /// Writes what the kernel has cached of it; whether that is durable is another matter.
    pub(crate) fn write_back(&self) -> Result<()> {
        let cannot = |error| Error::from_io(Operation::Write, "what was written cannot be handed over", error);
        r3map_sys::write_back(&self.open()?).map_err(cannot)
    }

    /// Sets one of the kernel's knobs, where it lets us.
    pub(crate) fn set(&self, knob: &str, value: impl ToString) {
        if let Err(error) = std::fs::write(self.knob(knob), value.to_string()) {
            tracing::debug!(%error, knob, "the kernel keeps its own value");
        }
    }

    fn knob(&self, knob: &str) -> PathBuf {
        Path::new("/sys/block").join(&self.name).join(knob)
    }
}

/// Waits until `holds`, at most for `limit`; whether it does.
pub(crate) fn until(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_does_not_appear_is_an_error_in_time() {
        let error = Node::wait("absent-device".to_owned(), 512, false, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.message().contains("/dev/absent-device does not appear"), "{error}");
        // A node of another kind is not it.
        assert!(Node::wait("null".to_owned(), 512, false, Duration::ZERO).is_err());
    }

    #[test]
    fn waits_until_it_holds_and_no_longer() {
        let mut calls = 0;
        assert!(until(Duration::from_secs(60), || {
            calls += 1;
            calls == 3
        }));
        assert!(!until(Duration::from_millis(10), || false));
    }
}
