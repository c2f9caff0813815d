//! What each request does to the backend and what it answers. Where and when it runs is the service's matter.

use std::ops::Range;
use std::sync::Arc;

use fuser::{Errno, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};
use r3map_core::{Backend, Error, ErrorKind, ExtentKind, Extents, Operation, Piece, ReadPieces, Result};

use crate::service::Service;
use r3map_pipeline::Buffer;

/// `fallocate(2)` modes, from `linux/falloc.h`.
pub(crate) const KEEP_SIZE: i32 = 0x01;
const PUNCH_HOLE: i32 = 0x02;
const ZERO_RANGE: i32 = 0x10;

/// `lseek(2)` whence, from `linux/fs.h`.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// How an error of the backend looks to the application. Logged here, because the application sees only a number.
pub(crate) fn errno(error: &Error) -> Errno {
    tracing::warn!(%error, "request failed");
    Errno::from_i32(error.errno())
}

/// Reads a range that lies inside the region, without a copy where the backend lends it in one piece.
pub(crate) async fn read(service: Arc<Service>, backend: Arc<dyn Backend>, range: Range<u64>, reply: ReplyData) {
    match backend.capabilities().pieces {
        Some(pieces) => read_lent(&service, pieces, range, reply).await,
        None => read_copied(&service, &*backend, range, reply).await,
    }
}

async fn read_copied(service: &Service, backend: &dyn Backend, range: Range<u64>, reply: ReplyData) {
    let mut buffer = service.buffers.take(length(&range));
    match backend.read_at(range.start, &mut buffer).await {
        Ok(()) => reply.data(&buffer),
        Err(error) => reply.error(errno(&error)),
    }
}

async fn read_lent(service: &Service, pieces: &dyn ReadPieces, range: Range<u64>, reply: ReplyData) {
    let mut answer = Answer { service, range: range.clone(), filled: range.start, buffer: None, reply: Some(reply) };
    let lent = pieces.read_pieces(range.start, range.end - range.start, &mut |at, piece| answer.take(at, piece)).await;
    answer.finish(lent);
}

fn length(range: &Range<u64>) -> usize {
    // The kernel counts requests in 32 bits.
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

/// An answer that is put together from lent pieces: given straight to the kernel if there is just one.
struct Answer<'s> {
    service: &'s Service,
    range: Range<u64>,
    filled: u64,
    buffer: Option<Buffer>,
    reply: Option<ReplyData>,
}

impl Answer<'_> {
    fn take(&mut self, at: u64, piece: Piece<'_>) -> Result<()> {
        if at != self.filled || piece.len() > self.range.end - at {
            return Err(self.broken("the backend lent a piece that is not the next one"));
        }
        self.filled += piece.len();
        if piece.len() == self.range.end - self.range.start && self.send_whole(piece) {
            return Ok(());
        }
        self.gather(at, piece);
        Ok(())
    }

    fn send_whole(&mut self, piece: Piece<'_>) -> bool {
        let bytes = match piece {
            Piece::Data(bytes) => Some(bytes),
            Piece::Zeroes(_) => self.service.zeroes.get(..length(&self.range)),
        };
        match (bytes, self.reply.take()) {
            (Some(bytes), Some(reply)) => {
                reply.data(bytes);
                true
            }
            (_, reply) => {
                self.reply = reply;
                false
            }
        }
    }

    fn gather(&mut self, at: u64, piece: Piece<'_>) {
        let place = length(&(self.range.start..at))..length(&(self.range.start..self.filled));
        let len = length(&self.range);
        let buffer = self.buffer.get_or_insert_with(|| self.service.buffers.take(len));
        match piece {
            Piece::Data(bytes) => buffer[place].copy_from_slice(bytes),
            Piece::Zeroes(_) => buffer[place].fill(0),
        }
    }

    fn finish(mut self, lent: Result<()>) {
        let complete = lent.and_then(|()| match self.filled == self.range.end {
            true => Ok(()),
            false => Err(self.broken("the backend lent less than it was asked for")),
        });
        match (self.reply.take(), complete, &self.buffer) {
            (Some(reply), Ok(()), Some(buffer)) => reply.data(buffer),
            (Some(reply), Err(error), _) => reply.error(errno(&error)),
            // Sent already, or (an empty range) nothing was asked for.
            (Some(reply), Ok(()), None) => reply.data(&[]),
            (None, _, _) => {}
        }
    }

    fn broken(&self, message: &str) -> Error {
        Error::new(ErrorKind::Internal, Operation::Read, message)
            .at(self.range.start, self.range.end - self.range.start)
    }
}

/// Writes bytes that the request owns; `sync` makes it wait until they are durable (`O_SYNC`, `O_DSYNC`).
pub(crate) async fn write(backend: Arc<dyn Backend>, offset: u64, data: Buffer, sync: bool, reply: ReplyWrite) {
    let done = backend.write_at(offset, &data).await;
    finish_write(backend, done, data.len(), sync, reply).await;
}

/// Answers a write that is done, after a flush if it was to be durable.
pub(crate) async fn finish_write(
    backend: Arc<dyn Backend>,
    mut done: Result<()>,
    len: usize,
    sync: bool,
    reply: ReplyWrite,
) {
    if sync && done.is_ok() {
        done = backend.flush().await;
    }
    match done {
        Ok(()) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
        Err(error) => reply.error(errno(&error)),
    }
}

/// Makes everything written durable; `failed` is told why it cannot be, before the kernel is told that it cannot.
pub(crate) async fn flush(backend: Arc<dyn Backend>, failed: impl FnOnce(&Error), reply: ReplyEmpty) {
    let done = backend.flush().await;
    if let Err(error) = &done {
        failed(error);
    }
    answer(reply, done);
}

fn answer(reply: ReplyEmpty, done: Result<()>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

/// What an `fallocate` inside the region asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allocate {
    /// Room for data: always there.
    Room,
    /// Release the storage; reads as zeros.
    Punch,
    /// Make it read as zeros.
    Zero,
}

impl Allocate {
    /// The request for an `fallocate(2)` mode; none if it is not one that a region knows.
    pub(crate) fn from_mode(mode: i32) -> Option<Self> {
        match mode & !KEEP_SIZE {
            0 => Some(Self::Room),
            PUNCH_HOLE => Some(Self::Punch),
            ZERO_RANGE => Some(Self::Zero),
            _ => None,
        }
    }

    /// Whether the backend can do it. Both kinds read as zeros afterwards, so either ability serves.
    pub(crate) fn is_possible(self, backend: &dyn Backend) -> bool {
        let can = backend.capabilities();
        self == Self::Room || can.trim.is_some() || can.write_zeroes.is_some()
    }
}

/// Does an `fallocate` that is possible, on a range inside the region.
pub(crate) async fn allocate(backend: Arc<dyn Backend>, what: Allocate, range: Range<u64>, reply: ReplyEmpty) {
    let len = range.end - range.start;
    let can = backend.capabilities();
    let done = match (what, can.trim, can.write_zeroes) {
        _ if len == 0 => Ok(()),
        (Allocate::Punch, Some(trim), _) | (Allocate::Zero, Some(trim), None) => trim.trim(range.start, len).await,
        (Allocate::Zero, _, Some(zero)) | (Allocate::Punch, None, Some(zero)) => {
            zero.write_zeroes(range.start, len).await
        }
        (Allocate::Room, _, _) | (_, None, None) => Ok(()),
    };
    answer(reply, done);
}

/// Finds the next data or hole from an offset inside the region; all is data unless holes are known.
pub(crate) async fn seek(
    backend: Arc<dyn Backend>,
    offset: u64,
    whence: i32,
    holes_are_known: bool,
    reply: ReplyLseek,
) {
    let wanted = match whence {
        SEEK_DATA => ExtentKind::Data,
        SEEK_HOLE => ExtentKind::Hole,
        _ => return reply.error(Errno::EINVAL),
    };
    let extents = backend.capabilities().extents.filter(|_| holes_are_known);
    match find(extents, backend.size(), offset, wanted).await {
        Ok(Some(at)) => reply.offset(i64::try_from(at).unwrap_or(i64::MAX)),
        Ok(None) => reply.error(Errno::ENXIO),
        Err(error) => reply.error(errno(&error)),
    }
}

/// The first offset from `offset` on that is of the wanted kind. The end of the region counts as a hole; without extents
/// everything is data.
async fn find(extents: Option<&dyn Extents>, size: u64, offset: u64, wanted: ExtentKind) -> Result<Option<u64>> {
    let mut at = offset;
    while at < size {
        let next = match extents {
            None => vec![],
            Some(extents) => extents.extents(at, size - at).await?,
        };
        if let Some(found) = next.iter().find(|extent| extent.kind == wanted) {
            return Ok(Some(found.range.start));
        }
        match next.last() {
            Some(last) if last.range.end > at => at = last.range.end,
            Some(_) => return Err(Error::new(ErrorKind::Internal, Operation::Extents, "an answer without progress")),
            None if wanted == ExtentKind::Data => return Ok(Some(at)),
            None => break,
        }
    }
    Ok((wanted == ExtentKind::Hole).then_some(size))
}
