//! Reading, writing and removing chunks, one file each. Calls block; callers see to it that a chunk is used by one call
//! at a time.

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use r3map_core::{Error, ErrorKind, Extent, ExtentKind, Geometry, Operation, Result, is_zero};
use rustix::fs::{AtFlags, Mode, OFlags, openat, statat, syncfs, unlinkat};
use rustix::io::Errno;

use super::handles::{Handles, Place};
use super::table::{Table, name};
use crate::durability::{Durability, Undurable, sync_data};
use crate::opened::fault;
use crate::window::{Zeroing, zero};

/// From how many files on a flush has the whole file system written back, rather than one file after the other.
const MANY_FILES: u64 = 64;
/// Chunks that one call for extents answers for at most.
const MAX_EXTENT_CHUNKS: u64 = 1 << 16;

/// The chunks of an open directory.
#[derive(Debug)]
pub(super) struct Chunks {
    pub(super) path: PathBuf,
    pub(super) geometry: Geometry,
    pub(super) directory: OwnedFd,
    pub(super) table: Table,
    pub(super) handles: Handles,
    pub(super) durability: Durability,
    pub(super) read_only: bool,
}

/// Whether the file of `chunk` is there and complete.
pub(super) fn is_whole(directory: &OwnedFd, geometry: &Geometry, chunk: u64) -> io::Result<bool> {
    let range = geometry.chunk_range(chunk);
    match statat(directory, name(range.start), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => {
            let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
            Ok(is_file && u64::try_from(stat.st_size).is_ok_and(|size| size == range.end - range.start))
        }
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl Chunks {
    pub(super) fn new(
        path: &Path,
        geometry: Geometry,
        directory: OwnedFd,
        table: Table,
        max_open: NonZeroUsize,
        read_only: bool,
    ) -> Self {
        let (handles, durability) = (Handles::new(max_open), Durability::unknown());
        Self { path: path.to_owned(), geometry, directory, table, handles, durability, read_only }
    }

    /// Reads whole chunks.
    pub(super) fn read(&self, bytes: Range<u64>, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        for (chunk, range) in self.geometry.split(bytes) {
            let part;
            (part, rest) = rest.split_at_mut(length(&range));
            self.read_chunk(chunk, part).map_err(|error| self.broken(Operation::Read, chunk, error))?;
        }
        Ok(())
    }

    fn read_chunk(&self, chunk: u64, buf: &mut [u8]) -> io::Result<()> {
        if !self.is_written(chunk)? {
            buf.fill(0);
            return Ok(());
        }
        let mut place = self.handles.place(chunk);
        self.existing(&mut place, chunk)?.read_exact_at(buf, 0)
    }

    /// Writes whole chunks.
    pub(super) fn write(&self, bytes: Range<u64>, buf: &[u8]) -> Result<()> {
        let mut rest = buf;
        for (chunk, range) in self.geometry.split(bytes) {
            let part;
            (part, rest) = rest.split_at(length(&range));
            self.durability.changed();
            let written = self.write_chunk(chunk, part);
            self.durability.changed();
            written.map_err(|error| self.broken(Operation::Write, chunk, error))?;
        }
        Ok(())
    }

    fn write_chunk(&self, chunk: u64, buf: &[u8]) -> io::Result<()> {
        let mut place = self.handles.place(chunk);
        if !self.is_written(chunk)? {
            return if is_zero(buf) { Ok(()) } else { self.write_new(&mut place, chunk, buf) };
        }
        match self.existing(&mut place, chunk) {
            Ok(file) => file.write_all_at(buf, 0)?,
            // All of it is given, so that what is missing can be had again.
            Err(error) if is_missing(&error) => self.new_file(&mut place, chunk)?.write_all_at(buf, 0)?,
            Err(error) => return Err(error),
        }
        self.table.set_written(chunk)
    }

    fn write_new(&self, place: &mut Place<'_>, chunk: u64, buf: &[u8]) -> io::Result<()> {
        let file = self.new_file(place, chunk)?;
        let written = file.write_all_at(buf, 0).and_then(|()| self.table.set_written(chunk));
        if written.is_err() && !self.is_written(chunk)? {
            // Not to take the room that there is too little of. It does not count, whether this works or not.
            place.close();
            let _ = self.unlink(chunk);
        }
        written
    }

    /// Makes part of a chunk, or all of it, read as zeros; nothing is stored for a chunk that was never written.
    pub(super) fn zero(&self, operation: Operation, bytes: Range<u64>, how: Zeroing) -> Result<()> {
        let fault = |error| fault(operation, &self.path, "cannot tell which chunks exist", error);
        let touched = self.geometry.chunks_touched(&bytes);
        for run in self.table.written_runs(touched).map_err(fault)? {
            let run = self.geometry.chunks_range(&run);
            for (chunk, range) in self.geometry.split(run.start.max(bytes.start)..run.end.min(bytes.end)) {
                self.durability.changed();
                let zeroed = self.zero_chunk(chunk, &range, how);
                self.durability.changed();
                zeroed.map_err(|error| self.broken(operation, chunk, error))?;
            }
        }
        Ok(())
    }

    fn zero_chunk(&self, chunk: u64, range: &Range<u64>, how: Zeroing) -> io::Result<()> {
        let mut place = self.handles.place(chunk);
        let file = self.existing(&mut place, chunk)?;
        let start = self.geometry.chunk_range(chunk).start;
        zero(file, range.start - start, range.end - range.start, how)?;
        self.table.set_written(chunk)
    }

    /// Removes whole chunks, and makes the parts of others read as zeros.
    pub(super) fn trim(&self, bytes: Range<u64>) -> Result<()> {
        let whole = self.geometry.chunks_covered(&bytes);
        let inner = self.geometry.chunks_range(&whole);
        if whole.is_empty() {
            return self.zero(Operation::Trim, bytes, Zeroing::Release);
        }
        self.zero(Operation::Trim, bytes.start..inner.start, Zeroing::Release)?;
        self.zero(Operation::Trim, inner.end..bytes.end, Zeroing::Release)?;
        self.remove(whole)
    }

    fn remove(&self, chunks: Range<u64>) -> Result<()> {
        let fault = |error| fault(Operation::Trim, &self.path, "cannot change which chunks exist", error);
        self.durability.changed();
        self.table.check_not_cut().map_err(fault)?;
        let cleared = self.table.clear(chunks).map_err(|error| match error {
            Undurable::NotYet(error) => fault(error),
            Undurable::Lost(error) => self.durability.lost(fault(error)),
        })?;
        for chunk in cleared.into_iter().flatten() {
            self.handles.close(chunk);
            self.unlink(chunk).map_err(|error| self.broken(Operation::Trim, chunk, error))?;
        }
        self.durability.changed();
        Ok(())
    }

    /// The extents of a range that is not empty: whole chunks are data or holes.
    pub(super) fn extents(&self, bytes: Range<u64>) -> Result<Vec<Extent>> {
        let fault = |error| fault(Operation::Extents, &self.path, "cannot tell which chunks exist", error);
        let mut chunks = self.geometry.chunks_touched(&bytes);
        chunks.end = chunks.end.min(chunks.start + MAX_EXTENT_CHUNKS);
        let bytes = bytes.start..bytes.end.min(self.geometry.chunks_range(&chunks).end);
        let runs = self.table.written_runs(chunks).map_err(fault)?;
        let mut found = Vec::new();
        let mut at = bytes.start;
        for run in runs {
            let run = self.geometry.chunks_range(&run);
            let run = run.start.max(bytes.start)..run.end.min(bytes.end);
            push(&mut found, at..run.start, ExtentKind::Hole);
            at = run.end;
            push(&mut found, run, ExtentKind::Data);
        }
        push(&mut found, at..bytes.end, ExtentKind::Hole);
        Ok(found)
    }

    /// Makes what was written durable: the files, then their names, then that they exist.
    pub(super) fn flush(&self) -> Result<()> {
        let fault = |error| fault(Operation::Flush, &self.path, "cannot make durable", error);
        self.durability.make(|| self.sync(), fault)
    }

    fn sync(&self) -> std::result::Result<(), Undurable> {
        self.table.check_not_cut()?;
        let unflushed = self.table.begin_flush()?;
        self.sync_files(&unflushed)?;
        self.table.set_durable(&unflushed)
    }

    fn sync_files(&self, chunks: &[Range<u64>]) -> std::result::Result<(), Undurable> {
        if chunks.iter().map(|run| run.end - run.start).sum::<u64>() > MANY_FILES {
            return syncfs(&self.directory).map_err(|error| Undurable::Lost(error.into()));
        }
        for chunk in chunks.iter().cloned().flatten() {
            let mut place = self.handles.place(chunk);
            match self.existing(&mut place, chunk) {
                Ok(file) => sync_data(file)?,
                // Trimmed meanwhile.
                Err(_) if !self.is_written(chunk)? => {}
                Err(error) => {
                    let error = self.broken(Operation::Flush, chunk, error);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error.message()).into());
                }
            }
        }
        rustix::fs::fsync(&self.directory).map_err(|error| Undurable::Lost(error.into()))
    }

    /// Whether a chunk exists.
    fn is_written(&self, chunk: u64) -> io::Result<bool> {
        self.table.is_written(chunk)
    }

    /// The open file of a chunk that exists. It is not enough that it was open already: somebody may have removed it.
    fn existing<'a>(&self, place: &'a mut Place<'_>, chunk: u64) -> io::Result<&'a fs::File> {
        let is_linked = |file: &fs::File| file.metadata().is_ok_and(|found| found.nlink() > 0);
        if !place.file().is_some_and(is_linked) {
            let flags = if self.read_only { OFlags::RDONLY } else { OFlags::RDWR };
            place.open(|| self.open(chunk, flags))?;
        }
        let range = self.geometry.chunk_range(chunk);
        match place.file() {
            Some(file) if file.metadata()?.len() == range.end - range.start => Ok(file),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// An empty file for a chunk, whatever was there.
    fn new_file<'a>(&self, place: &'a mut Place<'_>, chunk: u64) -> io::Result<&'a fs::File> {
        place.open(|| self.open(chunk, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC))
    }

    fn open(&self, chunk: u64, flags: OFlags) -> io::Result<fs::File> {
        // A FIFO would wait for its other end, and a link would lead elsewhere.
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd = openat(&self.directory, self.name(chunk), flags, Mode::from_raw_mode(0o666))?;
        Ok(fd.into())
    }

    fn unlink(&self, chunk: u64) -> io::Result<()> {
        match unlinkat(&self.directory, self.name(chunk), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn name(&self, chunk: u64) -> String {
        name(self.geometry.chunk_range(chunk).start)
    }

    fn broken(&self, operation: Operation, chunk: u64, error: io::Error) -> Error {
        let (path, range) = (self.path.join(self.name(chunk)), self.geometry.chunk_range(chunk));
        let corrupt = |what: &str| {
            Error::new(ErrorKind::Corrupt, operation, format!("{}: the chunk's file {what}", path.display()))
        };
        let error = match error.kind() {
            io::ErrorKind::NotFound => corrupt("is gone, though the chunk was written"),
            io::ErrorKind::UnexpectedEof => corrupt("is not as long as the chunk: it was truncated or extended"),
            _ => fault(operation, &path, "input/output failed", error),
        };
        error.at(range.start, range.end - range.start)
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof)
}

fn push(extents: &mut Vec<Extent>, range: Range<u64>, kind: ExtentKind) {
    if !range.is_empty() {
        extents.push(Extent { range, kind });
    }
}

/// The length of a range that fits in memory.
fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}
