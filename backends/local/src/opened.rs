//! Opening files and block devices for exactly one writer, with errors that say what is wrong.
//!
//! It neither reads nor writes a region's bytes.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::fs::{Access, AtFlags, CWD, FlockOperation, OFlags, SeekFrom, accessat, flock, seek};

/// What a file or block device is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// By its only user.
    Write,
    /// Together with other readers.
    Read,
    /// To see what it is, whoever uses it: without a lock.
    Look,
}

impl Purpose {
    pub(crate) fn of(read_only: bool) -> Self {
        if read_only { Self::Read } else { Self::Write }
    }
}

/// A file or block device that is open and locked: exclusively by whoever writes, or together with other readers. The
/// lock is advisory (`flock`), holds between processes and within one, and goes with the descriptor.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: fs::File,
    pub(crate) path: PathBuf,
    pub(crate) is_device: bool,
}

impl Opened {
    /// Opens what exists.
    pub(crate) fn existing(path: &Path, purpose: Purpose) -> Result<Self> {
        let write = purpose == Purpose::Write;
        // Without O_NONBLOCK a FIFO would wait here for its other end; it means nothing to files and block devices.
        let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        if write && fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) {
            // Refuses a device that is mounted or otherwise in use by the kernel.
            flags |= OFlags::EXCL;
        }
        let flags = flags.bits().cast_signed();
        let file = fs::OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
        let file = file.map_err(|error| fault(Operation::Open, path, "cannot open", error))?;
        let kind = metadata(&file, path)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "is a directory, not a file" } else { "is no file and no block device" };
            return Err(refusal(ErrorKind::InvalidInput, path, what));
        }
        let opened = Self { file, path: path.to_owned(), is_device: kind.is_block_device() };
        opened.lock(purpose)?;
        Ok(opened)
    }

    /// Makes a new, empty file that only `mode` (as in `chmod`, before the umask) may use. `None` if something is there
    /// already.
    pub(crate) fn new(path: &Path, mode: u32) -> Result<Option<Self>> {
        let file = match fs::OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => return Err(fault(Operation::Open, path, "cannot create", error)),
        };
        let opened = Self { file, path: path.to_owned(), is_device: false };
        opened.lock(Purpose::Write)?;
        Ok(Some(opened))
    }

    fn lock(&self, purpose: Purpose) -> Result<()> {
        let (operation, what) = match purpose {
            Purpose::Write => (FlockOperation::NonBlockingLockExclusive, "is in use by someone else"),
            Purpose::Read => (FlockOperation::NonBlockingLockShared, "is being written by someone else"),
            Purpose::Look => return Ok(()),
        };
        match flock(&self.file, operation) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = format!("{what}: end that first, or use it through its server");
                Err(refusal(ErrorKind::Conflict, &self.path, what))
            }
            Err(error) => Err(self.fault(Operation::Open, "cannot lock", error.into())),
        }
    }

    /// The size in bytes, now.
    pub(crate) fn size(&self) -> io::Result<u64> {
        match self.is_device {
            true => Ok(seek(&self.file, SeekFrom::End(0))?),
            false => Ok(self.file.metadata()?.len()),
        }
    }

    /// Whether this process may write it, as far as can be told without opening it for that.
    pub(crate) fn may_be_written(&self) -> bool {
        may_write(&self.path) && !(self.is_device && is_read_only_device(&self.file))
    }

    /// Fails with `UnexpectedEof` if a file has become shorter than `len`. A device cannot.
    pub(crate) fn check_not_cut(&self, len: u64) -> io::Result<()> {
        match self.is_device || self.file.metadata()?.len() >= len {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Makes a new file's size, and its name in its directory, durable.
    pub(crate) fn sync_name(&self) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| sync_directory(parent(&self.path)))
            .map_err(|error| self.fault(Operation::Open, "cannot make durable", error))
    }

    /// What went wrong with this file.
    pub(crate) fn fault(&self, operation: Operation, what: &str, error: io::Error) -> Error {
        fault(operation, &self.path, what, error)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Closing is not enough where somebody has a copy of the descriptor: a process that this one has forked, until it
        // runs another program.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// What the system said about the file at `path`, in one line.
pub(crate) fn fault(operation: Operation, path: &Path, what: &str, error: io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => "the file is shorter than the region: it was truncated",
        _ => what,
    };
    Error::from_io(operation, format!("{}: {what}", path.display()), error)
}

/// Why the file at `path` is not opened.
pub(crate) fn refusal(kind: ErrorKind, path: &Path, what: impl std::fmt::Display) -> Error {
    Error::new(kind, Operation::Open, format!("{} {what}", path.display()))
}

pub(crate) fn metadata(file: &fs::File, path: &Path) -> Result<fs::Metadata> {
    file.metadata().map_err(|error| fault(Operation::Open, path, "cannot look at", error))
}

/// Whether this process has the right to write what is at `path`, and its file system can be written.
pub(crate) fn may_write(path: &Path) -> bool {
    accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

/// A device's own switch is none of its name's rights.
fn is_read_only_device(device: &fs::File) -> bool {
    let Ok(found) = device.metadata() else { return false };
    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    fs::read(format!("/sys/dev/block/{major}:{minor}/ro")).is_ok_and(|says| says.starts_with(b"1"))
}

/// The directory that holds the name `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    fs::File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_goes_even_if_a_copy_of_the_descriptor_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let opened = Opened::existing(file.path(), Purpose::Write).unwrap();
        let copy = opened.file.try_clone().unwrap();
        assert_eq!(Opened::existing(file.path(), Purpose::Read).unwrap_err().kind(), ErrorKind::Conflict);
        drop(opened);
        Opened::existing(file.path(), Purpose::Write).unwrap();
        drop(copy);
    }
}
