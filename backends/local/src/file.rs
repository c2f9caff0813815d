//! A region in a file or on a block device.
//!
//! What `write_at` has returned for survives the process, because the page cache does; what `flush` has returned for
//! survives a loss of power. The file is locked against other writers who lock (`flock`), and is never made longer or
//! shorter: one that somebody cuts while it is open gives errors, not zeros.

use std::path::Path;

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, Extents, Geometry, Operation, Result, Trim,
    WriteZeroes, check_range,
};

use crate::opened::{Opened, Purpose, refusal};
use crate::window::{Window, Zeroing};

/// How an existing file is opened.
#[derive(Debug, Clone, Default)]
pub struct FileSettings {
    /// Do not write, and share the file with other readers. Default: no.
    pub read_only: bool,
    /// The size in bytes that it must have. Default: whatever it has.
    pub size: Option<u64>,
}

/// A file (sparse, where its file system can) or a block device. Must be used within a tokio runtime.
///
/// `flush` is `fdatasync`. If that ever fails, every later `flush` gives the same error until the file is opened anew:
/// Linux forgets which bytes it could not write, so that nothing less is honest.
#[derive(Debug)]
pub struct File {
    window: Window,
    read_only: bool,
}

impl File {
    /// Opens the file or block device at `path`. Blocks for as long as the file system takes.
    ///
    /// # Errors
    /// `NotFound`; `Denied`; `Conflict` if someone else writes it (or reads it, if this is to write);
    /// `InvalidInput` if it is a directory, is empty, or has another size than `settings` ask for.
    pub fn open(path: impl AsRef<Path>, settings: &FileSettings) -> Result<Self> {
        Self::existing(path.as_ref(), settings, Purpose::of(settings.read_only))
    }

    /// Opens what is at `path` read-only to see what it is: it is not locked, so that nobody is kept out, and one that
    /// somebody writes can be looked at too. What is read then may be half written.
    ///
    /// # Errors
    /// As [`Self::open`], but for `Conflict`.
    pub fn look(path: impl AsRef<Path>, size: Option<u64>) -> Result<Self> {
        Self::existing(path.as_ref(), &FileSettings { read_only: true, size }, Purpose::Look)
    }

    fn existing(path: &Path, settings: &FileSettings, purpose: Purpose) -> Result<Self> {
        let opened = Opened::existing(path, purpose)?;
        let size = opened.size().map_err(|error| opened.fault(Operation::Open, "cannot tell its size", error))?;
        check_size(&opened, size, settings.size)?;
        Ok(Self { window: Window::new(opened, 0, size), read_only: settings.read_only })
    }

    /// Whether this process may write the file or device, whether or not it was opened for that.
    #[must_use]
    pub fn may_be_written(&self) -> bool {
        self.window.opened().may_be_written()
    }

    /// Makes a file of `size` bytes at `path` that takes no room yet; durably, its name included. If there is one of
    /// that size already, opens it. Blocks for as long as the file system takes.
    ///
    /// # Errors
    /// As [`Self::open`]; `Exhausted` where the file system takes no file of that size.
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        Geometry::new(size, ChunkSize::DEFAULT)?;
        let Some(opened) = Opened::new(path.as_ref(), 0o666)? else {
            return Self::open(path, &FileSettings { read_only: false, size: Some(size) });
        };
        let sized = opened.file.set_len(size);
        let sized = sized.map_err(|error| opened.fault(Operation::Open, &format!("cannot hold {size} bytes"), error));
        if let Err(error) = sized.and_then(|()| opened.sync_name()) {
            // It is of no use to anyone, and is ours: it was not there before.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        Ok(Self { window: Window::new(opened, 0, size), read_only: false })
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let changes = !matches!(operation, Operation::Read | Operation::Extents);
        if changes && self.read_only {
            let message = format!("{} was opened read-only", self.window.opened().path.display());
            return Err(Error::new(ErrorKind::Denied, operation, message).at(offset, len));
        }
        check_range(operation, self.window.len(), offset, len)
    }
}

fn check_size(opened: &Opened, size: u64, expected: Option<u64>) -> Result<()> {
    let problem = match expected {
        Some(expected) if expected != size => format!("has {size} bytes, not {expected}"),
        _ if size == 0 => "is empty, but a region has at least one byte".into(),
        _ => return Geometry::new(size, ChunkSize::DEFAULT).map(drop),
    };
    Err(refusal(ErrorKind::InvalidInput, &opened.path, problem))
}

#[async_trait]
impl Backend for File {
    fn size(&self) -> u64 {
        self.window.len()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            read_only: self.read_only,
            trim: Some(self),
            write_zeroes: Some(self),
            // A device does not know.
            extents: if self.window.opened().is_device { None } else { Some(self) },
            ..Capabilities::default()
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(Operation::Read, offset, buf.len() as u64)?;
        self.window.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check(Operation::Write, offset, buf.len() as u64)?;
        self.window.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        match self.read_only {
            true => Ok(()),
            false => self.window.flush().await,
        }
    }
}

#[async_trait]
impl Trim for File {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::Trim, offset, len)?;
        self.window.zero(Operation::Trim, offset, len, Zeroing::Release).await
    }
}

#[async_trait]
impl WriteZeroes for File {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check(Operation::WriteZeroes, offset, len)?;
        self.window.zero(Operation::WriteZeroes, offset, len, Zeroing::Keep).await
    }
}

#[async_trait]
impl Extents for File {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(Operation::Extents, offset, len)?;
        match len {
            0 => Ok(Vec::new()),
            _ => self.window.extents(offset, len).await,
        }
    }
}
