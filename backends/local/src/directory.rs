//! A region in a directory: one file per chunk, named by the chunk's offset in decimal, as the Go programs do.
//!
//! Two files beside the chunks say what the directory is: a [manifest] with the region's and the chunks' size, and a
//! [table] of the chunks that exist. A chunk that was never written has no file and reads as zeros; one that was written
//! and is gone, cut or extended is an error, never zeros. The table's file says what a kill and a loss of power leave.

mod chunks;
mod handles;
mod manifest;
mod table;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{
    Access, Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, Extents, Geometry, Operation, RangeLock,
    Result, Trim, WriteZeroes, check_range,
};

use crate::opened::{Purpose, fault, may_write, parent, refusal, sync_directory};
use crate::window::Zeroing;
use chunks::Chunks;
use table::Table;

/// How a chunk directory is opened.
#[derive(Debug, Clone)]
pub struct DirectorySettings {
    /// The region's size in bytes. Default: that of the directory; needed to make one.
    pub size: Option<u64>,
    /// The size of its chunks. Default: that of the directory, or [`ChunkSize::DEFAULT`] for a new one.
    pub chunk_size: Option<ChunkSize>,
    /// Make the directory if it is not there, and make it a chunk directory if it is empty or has nothing but chunks in
    /// it (a directory that a Go program wrote). Default: no.
    pub create: bool,
    /// Do not write, and share the directory with other readers. Default: no.
    pub read_only: bool,
    /// Chunk files that may be open at once. Default: 256. Fewer make more calls open and close files; each takes one of
    /// the process's file descriptors.
    pub max_open_files: NonZeroUsize,
}

impl Default for DirectorySettings {
    fn default() -> Self {
        let max_open_files = NonZeroUsize::MIN.saturating_add(255);
        Self { size: None, chunk_size: None, create: false, read_only: false, max_open_files }
    }
}

/// A directory of chunk files. Takes whole chunks only. Must be used within a tokio runtime.
///
/// The directory is locked against other users (`flock` on the table of chunks). `flush` is `fsync` of every file that
/// was written, of the directory and of the table; as with [`File`](crate::File), a failure of that is given again until
/// the directory is opened anew.
#[derive(Debug)]
pub struct Directory {
    chunks: Arc<Chunks>,
    /// Chunks in use.
    in_use: RangeLock,
}

impl Directory {
    /// Opens the chunk directory at `path`. Blocks for as long as the file system takes; if the machine has lost power
    /// since it was open last, chunks that were not flushed are looked for.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` if it is not a chunk directory, has another region or chunk size than `settings` ask
    /// for, or cannot be made one; `Conflict` if it is in use; `Corrupt` if manifest, table or chunks to be taken over are
    /// damaged; `Denied`.
    pub fn open(path: impl AsRef<Path>, settings: &DirectorySettings) -> Result<Self> {
        let path = path.as_ref();
        if settings.create && !settings.read_only {
            make_directory(path, settings)?;
        }
        Self::existing(path, settings, Purpose::of(settings.read_only))
    }

    /// Opens the chunk directory at `path` read-only to see what it is: it is not locked, so that nobody is kept out, and
    /// one that somebody writes can be looked at too. What is read then may be half written.
    ///
    /// # Errors
    /// As [`Self::open`], but for `Conflict`.
    pub fn look(path: impl AsRef<Path>, size: Option<u64>, chunk_size: Option<ChunkSize>) -> Result<Self> {
        let settings = DirectorySettings { size, chunk_size, read_only: true, ..DirectorySettings::default() };
        Self::existing(path.as_ref(), &settings, Purpose::Look)
    }

    fn existing(path: &Path, settings: &DirectorySettings, purpose: Purpose) -> Result<Self> {
        let directory = open_directory(path)?;
        let (geometry, table) = match manifest::read(path)? {
            Some(found) => {
                manifest::check(path, found, settings.size, settings.chunk_size)?;
                let is_whole = |chunk| chunks::is_whole(&directory, &found, chunk);
                (found, Table::open(path, found.chunk_count(), purpose, is_whole)?)
            }
            None => create(path, settings)?,
        };
        let chunks = Chunks::new(path, geometry, directory, table, settings.max_open_files, settings.read_only);
        Ok(Self { chunks: Arc::new(chunks), in_use: RangeLock::new() })
    }

    /// Whether this process may write the region, whether or not it was opened for that.
    #[must_use]
    pub fn may_be_written(&self) -> bool {
        may_write(&self.chunks.path) && self.chunks.table.may_be_written()
    }

    /// The region's size and that of its chunks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.chunks.geometry
    }

    /// Runs `work` on a thread that may wait for the disk, while nobody else uses the chunks that `bytes` touch. A caller
    /// that goes away leaves it running, and the chunks in use until it has ended.
    async fn hop<T: Send + 'static>(
        &self,
        operation: Operation,
        bytes: &Range<u64>,
        work: impl FnOnce(&Chunks) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let guard = self.in_use.lock(self.chunks.geometry.chunks_touched(bytes)).await;
        let chunks = self.chunks.clone();
        let run = move || {
            let result = work(&chunks);
            drop(guard);
            result
        };
        match tokio::task::spawn_blocking(run).await {
            Ok(result) => result,
            Err(lost) if lost.is_panic() => std::panic::resume_unwind(lost.into_panic()),
            Err(_) => Err(Error::new(ErrorKind::Cancelled, operation, "the runtime is shutting down")),
        }
    }

    /// Checks a request, and gives its range.
    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<Range<u64>> {
        check_range(operation, self.size(), offset, len)?;
        if self.chunks.read_only && !matches!(operation, Operation::Read | Operation::Extents) {
            let message = format!("{} was opened read-only", self.chunks.path.display());
            return Err(Error::new(ErrorKind::Denied, operation, message).at(offset, len));
        }
        Ok(offset..offset + len)
    }

    fn check_whole(&self, operation: Operation, offset: u64, len: u64) -> Result<Range<u64>> {
        let bytes = self.check(operation, offset, len)?;
        if !bytes.is_empty() && !self.chunks.geometry.is_whole_chunks(&bytes) {
            let chunk = self.chunks.geometry.chunk_size();
            let message = format!("a chunk directory takes whole chunks of {chunk} only");
            return Err(Error::new(ErrorKind::InvalidInput, operation, message).at(offset, len));
        }
        Ok(bytes)
    }
}

fn make_directory(path: &Path, settings: &DirectorySettings) -> Result<()> {
    if settings.size.is_none() && !path.exists() {
        return Err(refusal(ErrorKind::InvalidInput, path, "does not exist; to make it, say of what size"));
    }
    let made = match fs::create_dir(path) {
        Ok(()) => sync_directory(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    made.map_err(|error| fault(Operation::Open, path, "cannot make the directory", error))
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| fault(Operation::Open, path, "cannot open the directory", error.into()))
}

/// Makes a directory that has no manifest a chunk directory. The manifest comes last: without it, nothing counts.
fn create(path: &Path, settings: &DirectorySettings) -> Result<(Geometry, Table)> {
    let refuse = |what: &str| Err(refusal(ErrorKind::InvalidInput, path, what));
    if !settings.create || settings.read_only {
        return refuse("is not a chunk directory; to make it one, give --create and a size");
    }
    let Some(size) = settings.size else {
        return refuse("is not a chunk directory; to make it one, say of what size");
    };
    let geometry = Geometry::new(size, settings.chunk_size.unwrap_or_default())?;
    let existing = existing_chunks(path, &geometry)?;
    let table = Table::create(path, geometry.chunk_count(), &existing)?;
    manifest::write(path, geometry)?;
    Ok((geometry, table))
}

/// The chunks in a directory that has no manifest.
fn existing_chunks(path: &Path, geometry: &Geometry) -> Result<Vec<u64>> {
    let fault = |error| fault(Operation::Open, path, "cannot list the directory", error);
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') || name == "lost+found" {
            continue;
        }
        let size = entry.metadata().map_err(fault)?;
        found.push(existing_chunk(path, geometry, &name, size.is_file().then_some(size.len()))?);
    }
    Ok(found)
}

fn existing_chunk(path: &Path, geometry: &Geometry, name: &str, size: Option<u64>) -> Result<u64> {
    let refuse = |kind, what: String| Err(refusal(kind, path, what));
    let (Some(offset), Some(size)) = (table::offset(name), size) else {
        let what = format!("has other things in it ({name:?}); chunks need a directory of their own");
        return refuse(ErrorKind::InvalidInput, what);
    };
    let chunk = geometry.chunk_at(offset);
    let range = geometry.chunk_range(chunk);
    if offset >= geometry.size() || range.start != offset {
        let what = format!("has a chunk at {offset}, which this region does not have");
        return refuse(ErrorKind::InvalidInput, what);
    }
    if range.end - range.start != size {
        let what = format!("has a chunk at {offset} of {size} bytes, not {}", range.end - range.start);
        return refuse(ErrorKind::Corrupt, what);
    }
    Ok(chunk)
}

#[async_trait]
impl Backend for Directory {
    fn size(&self) -> u64 {
        self.chunks.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let chunk = self.chunks.geometry.chunk_size();
        Capabilities {
            read_only: self.chunks.read_only,
            access: Access::WholeChunks(chunk),
            preferred_chunk: Some(chunk),
            trim: Some(self),
            write_zeroes: Some(self),
            extents: Some(self),
            ..Capabilities::default()
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let bytes = self.check_whole(Operation::Read, offset, buf.len() as u64)?;
        let len = buf.len();
        let read = move |chunks: &Chunks| {
            let mut read = vec![0; len];
            chunks.read(offset..offset + len as u64, &mut read)?;
            Ok(read)
        };
        buf.copy_from_slice(&self.hop(Operation::Read, &bytes, read).await?);
        Ok(())
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let bytes = self.check_whole(Operation::Write, offset, buf.len() as u64)?;
        let (written, range) = (buf.to_vec(), bytes.clone());
        self.hop(Operation::Write, &bytes, move |chunks| chunks.write(range, &written)).await
    }

    async fn flush(&self) -> Result<()> {
        match self.chunks.read_only || self.chunks.durability.is_durable() {
            true => Ok(()),
            false => self.hop(Operation::Flush, &(0..0), Chunks::flush).await,
        }
    }
}

#[async_trait]
impl Trim for Directory {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let bytes = self.check(Operation::Trim, offset, len)?;
        self.hop(Operation::Trim, &bytes.clone(), move |chunks| chunks.trim(bytes)).await
    }
}

#[async_trait]
impl WriteZeroes for Directory {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let bytes = self.check(Operation::WriteZeroes, offset, len)?;
        let zero = |bytes| move |chunks: &Chunks| chunks.zero(Operation::WriteZeroes, bytes, Zeroing::Keep);
        self.hop(Operation::WriteZeroes, &bytes.clone(), zero(bytes)).await
    }
}

#[async_trait]
impl Extents for Directory {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let bytes = self.check(Operation::Extents, offset, len)?;
        if bytes.is_empty() {
            return Ok(Vec::new());
        }
        self.hop(Operation::Extents, &(0..0), move |chunks| chunks.extents(bytes)).await
    }
}
