//! The mounted file as a backend again, through each way that programs have to reach it, so that the conformance suite
//! and the random model can be run against the whole of it: kernel, FUSE and all.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, Error, ErrorKind, Extent, ExtentKind, Extents, Operation, Result, Trim, WriteZeroes,
    check_range,
};
use r3map_file::Caching;
use r3map_sys::{FileMapping, Sharing};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use tokio::task::block_in_place;

use crate::server::Server;
use crate::support::open;

/// How a program reaches the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// `pread` and `pwrite`.
    Calls,
    /// A shared mapping.
    Mapping,
    /// Writes by one, reads by the other, alternating.
    Both,
}

/// An empty region that another process serves, reached as programs do. Calls block, so it needs a runtime with threads.
pub(crate) struct Region {
    way: Way,
    size: u64,
    // Dropped in this order: nothing is unmounted that is in use.
    mapping: FileMapping,
    file: File,
    _server: Server,
}

impl Region {
    pub(crate) fn new(size: u64, way: Way, caching: Caching) -> Arc<Self> {
        let server = block_in_place(|| Server::start(size, caching));
        let file = open(&server.path());
        let mapping = FileMapping::new(&file, place(size), Sharing::Shared, true).unwrap();
        Arc::new(Self { way, size, mapping, file, _server: server })
    }

    fn reads_by_mapping(&self, offset: u64) -> bool {
        self.way == Way::Mapping || self.way == Way::Both && offset % 7 < 3
    }

    fn writes_by_mapping(&self, offset: u64) -> bool {
        self.way == Way::Mapping || self.way == Way::Both && offset % 5 < 3
    }

    fn allocate(&self, operation: Operation, flags: FallocateFlags, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.size, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        block_in_place(|| fallocate(&self.file, flags, offset, len)).map_err(|error| failed(operation, error.into()))
    }
}

fn failed(operation: Operation, error: std::io::Error) -> Error {
    Error::from_io(operation, "the mounted file", error)
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

#[async_trait]
impl Backend for Region {
    fn size(&self) -> u64 {
        self.size
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { trim: Some(self), write_zeroes: Some(self), extents: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(Operation::Read, self.size, offset, buf.len() as u64)?;
        let read = block_in_place(|| match self.reads_by_mapping(offset) {
            true => self.mapping.read(place(offset), buf),
            false => self.file.read_exact_at(buf, offset),
        });
        read.map_err(|error| failed(Operation::Read, error))
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(Operation::Write, self.size, offset, buf.len() as u64)?;
        let written = block_in_place(|| match self.writes_by_mapping(offset) {
            true => self.mapping.write(place(offset), buf),
            false => self.file.write_all_at(buf, offset),
        });
        written.map_err(|error| failed(Operation::Write, error))
    }

    async fn flush(&self) -> Result<()> {
        block_in_place(|| self.file.sync_all()).map_err(|error| failed(Operation::Flush, error))
    }
}

#[async_trait]
impl Trim for Region {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.allocate(Operation::Trim, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }
}

#[async_trait]
impl WriteZeroes for Region {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.allocate(Operation::WriteZeroes, FallocateFlags::ZERO_RANGE, offset, len)
    }
}

#[async_trait]
impl Extents for Region {
    /// The one extent that starts at `offset`.
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.size, offset, len)?;
        if len == 0 {
            return Ok(vec![]);
        }
        let ask = |to| block_in_place(|| seek(&self.file, to));
        let (kind, end) = match ask(SeekFrom::Data(offset)) {
            Ok(at) if at == offset => (ExtentKind::Data, ask(SeekFrom::Hole(offset))),
            Err(Errno::NXIO) => (ExtentKind::Hole, Ok(self.size)),
            next => (ExtentKind::Hole, next),
        };
        let end = end.map_err(|error| failed(Operation::Extents, error.into()))?;
        if end <= offset {
            return Err(Error::new(ErrorKind::Internal, Operation::Extents, "an extent without bytes"));
        }
        Ok(vec![Extent { range: offset..end.min(offset + len), kind }])
    }
}
