//! A mapping as the local side of a cached region: pulled bytes are installed as pages, and what the application writes
//! is found by scanning.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{BLOCK_SIZE, Backend, Error, ErrorKind, Operation, Piece, RangeLock, Result, check_range};
use r3map_pipeline::{InstallNow, Local, Written};
use r3map_sys::{Install, Pager, Protection};

use crate::server::note_install;

/// The pages behind a slice. Every call is a system call or two and waits for nobody.
///
/// Writing to pages that are there is refused for as long as the application has views of them; filling missing ones
/// is not.
#[derive(Debug)]
pub(crate) struct Pages {
    pager: Arc<Pager>,
    /// Pages that are being written to by a call: two writes that overlap must not mix inside a page.
    writing: RangeLock,
}

impl Pages {
    pub(crate) fn new(pager: Arc<Pager>) -> Self {
        Self { pager, writing: RangeLock::new() }
    }
}

#[async_trait]
impl Backend for Pages {
    fn size(&self) -> u64 {
        self.pager.len()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.pager.read(offset, buf).map_err(|error| failed(Operation::Read, error).at(offset, len))
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        check_range(Operation::Write, self.size(), offset, len)?;
        let pages = offset / BLOCK_SIZE * BLOCK_SIZE..(offset + len).next_multiple_of(BLOCK_SIZE);
        let _writing = self.writing.lock(pages).await;
        self.pager.write(offset, buf).map_err(|error| failed(Operation::Write, error).at(offset, len))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Local for Pages {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        InstallNow::install_now(self, offset, Piece::Data(bytes))
    }

    fn install_now(&self) -> Option<&dyn InstallNow> {
        Some(self)
    }

    fn written(&self) -> Option<&dyn Written> {
        (self.pager.protection() == Protection::Tracked).then_some(self)
    }
}

impl InstallNow for Pages {
    fn install_now(&self, offset: u64, piece: Piece<'_>) -> Result<()> {
        note_install();
        let installed = match piece {
            Piece::Data(bytes) => self.pager.install(offset, bytes, Install::Clean),
            Piece::Zeroes(len) => self.pager.install_zeroes(offset, len),
        };
        installed.map_err(|error| failed(Operation::Write, error).at(offset, piece.len()))
    }
}

impl Written for Pages {
    fn collect(&self, valid: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> Result<()> {
        let (offset, len) = (valid.start, valid.end - valid.start);
        self.pager.collect(valid, found).map_err(|error| {
            Error::from_io(Operation::Flush, "cannot ask which pages were written", error).at(offset, len)
        })
    }
}

fn failed(operation: Operation, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Error::new(ErrorKind::Denied, operation, error.to_string()),
        _ => Error::from_io(operation, "the mapped memory cannot be used", error),
    }
}
