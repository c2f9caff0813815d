//! Our own service: each method from its message to its reply.

use bytes::Bytes;
use futures_util::future::try_join_all;
use r3map_core::{
    Access, Error, ErrorKind, ExtentKind, Geometry, Operation, Piece, ReadOp, Result, check_range, is_zero,
};
use tonic::Status;

use crate::message;
use crate::proto::region;
use crate::rope::Rope;
use crate::server::Shared;
use crate::server::budget::{Buffer, Room, Share, room};
use crate::server::session::Session;
use crate::{VERSION, status, sum};

/// Ranges in one read.
const MAX_RANGES: u32 = 1024;
/// Extents in one reply.
const MAX_EXTENTS: usize = 2048;

impl Session {
    pub(crate) async fn describe(&self, request: region::DescribeRequest) -> Result<Rope, Status> {
        if !request.link.is_empty() {
            let link = request.link.as_ref().try_into();
            let link = link.map_err(|_| Status::invalid_argument("a link's name has 16 bytes"))?;
            self.shared.fences.join(link, request.epoch, &self.gate).await?;
        }
        Ok(message::encode(&self.shared.description()))
    }

    pub(crate) async fn read(&self, request: region::ReadRequest) -> Result<Rope, Status> {
        answer(self.shared.read(&request.ranges, &self.room).await)
    }

    pub(crate) async fn write(&self, (head, data): (region::WriteRequest, Buffer)) -> Result<Rope, Status> {
        let bytes = data.used();
        if sum::write(head.offset, bytes) != head.crc32c {
            return Err(Status::data_loss("the checksum does not agree with the bytes, nothing was written"));
        }
        answer(self.shared.check_change(Operation::Write, head.offset, bytes.len() as u64))?;
        let _passing = self.gate.pass().await?;
        let written = self.shared.written();
        answer(self.shared.backend.write_at(head.offset, bytes).await.map(|()| written))
    }

    pub(crate) async fn flush(&self, _: region::FlushRequest) -> Result<Rope, Status> {
        let instance = self.shared.losses.flush().await.map(|losses| self.shared.instance(losses));
        answer(instance.map(|instance| message::encode(&region::FlushReply { instance })))
    }

    pub(crate) async fn trim(&self, request: region::RangeRequest) -> Result<Rope, Status> {
        let (offset, length) = place(&request)?;
        answer(self.shared.check_range(Operation::Trim, offset, length))?;
        let Some(trim) = self.shared.backend.capabilities().trim else { return Err(unable()) };
        let _passing = self.gate.pass().await?;
        let written = self.shared.written();
        answer(trim.trim(offset, length).await.map(|()| written))
    }

    pub(crate) async fn write_zeroes(&self, request: region::RangeRequest) -> Result<Rope, Status> {
        let (offset, length) = place(&request)?;
        answer(self.shared.check_range(Operation::WriteZeroes, offset, length))?;
        let Some(zeroes) = self.shared.backend.capabilities().write_zeroes else { return Err(unable()) };
        let _passing = self.gate.pass().await?;
        let written = self.shared.written();
        answer(zeroes.write_zeroes(offset, length).await.map(|()| written))
    }

    pub(crate) async fn extents(&self, request: region::RangeRequest) -> Result<Rope, Status> {
        let (offset, length) = place(&request)?;
        answer(check_range(Operation::Extents, self.shared.geometry.size(), offset, length))?;
        let Some(extents) = self.shared.backend.capabilities().extents else { return Err(unable()) };
        let found = answer(extents.extents(offset, length).await)?;
        let told = found.into_iter().take(MAX_EXTENTS).map(|extent| region::Extent {
            length: extent.range.end - extent.range.start,
            hole: extent.kind == ExtentKind::Hole,
        });
        let extents: Vec<_> = told.collect();
        let crc32c = sum::extents(offset, length, &extents);
        Ok(message::encode(&region::ExtentsReply { extents, crc32c }))
    }
}

/// The offset and the length, if that is what was sent.
fn place(request: &region::RangeRequest) -> Result<(u64, u64), Status> {
    let &region::RangeRequest { offset, length, crc32c } = request;
    match sum::range(offset, length) == crc32c {
        true => Ok((offset, length)),
        false => Err(Status::data_loss("the checksum does not agree with the range, nothing was done")),
    }
}

impl Shared {
    fn description(&self) -> region::DescribeReply {
        let (major, minor) = VERSION;
        let capabilities = self.backend.capabilities();
        region::DescribeReply {
            major,
            minor,
            instance: self.instance(self.losses.count()),
            region: self.region.clone(),
            size: self.geometry.size(),
            chunk_size: u32::try_from(self.geometry.chunk_size().bytes()).unwrap_or(u32::MAX),
            whole_chunks: capabilities.access != Access::Any,
            read_only: self.read_only,
            max_request: self.max_request,
            max_ranges: MAX_RANGES,
            trim: capabilities.trim.is_some() && !self.read_only,
            write_zeroes: capabilities.write_zeroes.is_some() && !self.read_only,
            extents: capabilities.extents.is_some(),
        }
    }

    /// The answer to a change that is about to be made: what is lost while it is under way may be it.
    fn written(&self) -> Rope {
        message::encode(&region::WriteReply { instance: self.instance(self.losses.count()) })
    }

    /// Checks a range that is about to be changed.
    fn check_range(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.geometry.size(), offset, len)?;
        match self.read_only {
            true => Err(Error::new(ErrorKind::Denied, operation, "the region is served read-only").at(offset, len)),
            false => Ok(()),
        }
    }

    /// Checks a write, whose length is limited besides.
    pub(crate) fn check_change(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        self.check_range(operation, offset, len)?;
        self.check_length(operation, offset, len)
    }

    pub(crate) fn check_length(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        match len > self.max_request {
            true => {
                let message = format!("longer than the largest request, {} bytes", self.max_request);
                Err(Error::new(ErrorKind::InvalidInput, operation, message).at(offset, len))
            }
            false => Ok(()),
        }
    }

    async fn read(&self, ranges: &[region::Range], own: &Room) -> Result<Rope> {
        self.check_ranges(ranges)?;
        // Each has a buffer of its own, so what they need may be more than one range as long as all of them would.
        let share = own.share(ranges.iter().map(|range| room(range.length)).sum()).await;
        let found = match self.backend.capabilities().pieces {
            Some(_) => try_join_all(ranges.iter().map(|range| self.read_pieces(range, &share))).await?,
            None => self.read_whole(ranges, &share).await?,
        };
        let mut reply = region::ReadReply::default();
        let mut data = Rope::default();
        for (runs, bytes) in found {
            reply.runs.extend(runs);
            data.append(bytes);
        }
        reply.crc32c = sum::runs(ranges.iter().map(|range| (range.offset, range.length)), &reply.runs);
        Ok(message::encode_bulk(&reply, data))
    }

    fn check_ranges(&self, ranges: &[region::Range]) -> Result<()> {
        if ranges.len() > MAX_RANGES as usize {
            let message = format!("more than {MAX_RANGES} ranges in one read");
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Read, message));
        }
        let mut total = 0u64;
        for &region::Range { offset, length } in ranges {
            check_range(Operation::Read, self.geometry.size(), offset, length)?;
            total = total.saturating_add(length);
            self.check_length(Operation::Read, offset, total)?;
        }
        Ok(())
    }

    /// Reads a range from a backend that lends its bytes, and knows zeros.
    async fn read_pieces(&self, range: &region::Range, share: &Share) -> Result<(Vec<region::Run>, Rope)> {
        let Some(pieces) = self.backend.capabilities().pieces else { return Ok(Default::default()) };
        let mut runs = Runs::new(self.geometry, range.offset, range.length, share.clone());
        let mut add = |_: u64, piece: Piece<'_>| {
            runs.piece(piece);
            Ok(())
        };
        pieces.read_pieces(range.offset, range.length, &mut add).await?;
        Ok(runs.finish())
    }

    /// Reads ranges from a backend that fills buffers.
    async fn read_whole(&self, ranges: &[region::Range], share: &Share) -> Result<Vec<(Vec<region::Run>, Rope)>> {
        let len = |range: &region::Range| usize::try_from(range.length).unwrap_or(usize::MAX);
        let mut buffers: Vec<Buffer> = ranges.iter().map(|range| share.buffer(len(range))).collect();
        let pairs = ranges.iter().zip(&mut buffers);
        let mut reads: Vec<_> =
            pairs.map(|(range, buffer)| ReadOp { offset: range.offset, buf: buffer.first(len(range)) }).collect();
        match self.backend.capabilities().read_many {
            Some(many) if reads.len() > 1 => many.read_many(&mut reads).await?,
            _ => {
                try_join_all(reads.into_iter().map(|read| self.backend.read_at(read.offset, read.buf))).await?;
            }
        }
        let found = ranges.iter().zip(buffers);
        Ok(found.map(|(range, buffer)| runs_of(self.geometry, range.offset, &buffer.freeze())).collect())
    }
}

/// Cuts bytes at `offset` into runs, and leaves zeros out.
fn runs_of(geometry: Geometry, offset: u64, bytes: &Bytes) -> (Vec<region::Run>, Rope) {
    let (mut runs, mut data) = (Vec::new(), Rope::default());
    let mut at = 0;
    for (_, chunk) in geometry.split(offset..offset + bytes.len() as u64) {
        let length = chunk.end - chunk.start;
        let part = bytes.slice(at..at + usize::try_from(length).unwrap_or(usize::MAX));
        at += part.len();
        if is_zero(&part) {
            push_zeroes(&mut runs, length);
        } else {
            runs.push(region::Run { length, crc32c: Some(crc_fast::crc32_iscsi(&part)) });
            data.push(part);
        }
    }
    (runs, data)
}

fn push_zeroes(runs: &mut Vec<region::Run>, length: u64) {
    match runs.last_mut() {
        Some(last) if last.crc32c.is_none() => last.length += length,
        _ => runs.push(region::Run { length, crc32c: None }),
    }
}

/// Runs that are made from pieces as they are lent.
struct Runs {
    geometry: Geometry,
    at: u64,
    end: u64,
    runs: Vec<region::Run>,
    /// From the first byte on that is not zero.
    data: Option<Buffer>,
    share: Share,
    /// Where the current chunk's bytes begin in `data`.
    chunk: usize,
    /// Zeros of the current chunk that come before its bytes.
    zeros: u64,
}

impl Runs {
    fn new(geometry: Geometry, offset: u64, length: u64, share: Share) -> Self {
        Self { geometry, at: offset, end: offset + length, runs: Vec::new(), data: None, share, chunk: 0, zeros: 0 }
    }

    /// Adds the next bytes.
    fn piece(&mut self, mut piece: Piece<'_>) {
        while !piece.is_empty() && self.at < self.end {
            let chunk_end = self.geometry.chunk_range(self.geometry.chunk_at(self.at)).end.min(self.end);
            let (now, later) = cut(piece, chunk_end - self.at);
            self.part(now);
            self.at += now.len();
            if self.at == chunk_end {
                self.end_chunk();
            }
            piece = later;
        }
    }

    /// Adds bytes of the current chunk.
    fn part(&mut self, piece: Piece<'_>) {
        match (piece, &mut self.data) {
            (Piece::Zeroes(len), Some(data)) if data.used().len() > self.chunk => data.push_zeros(length(len)),
            (Piece::Zeroes(len), _) => self.zeros += len,
            (Piece::Data(bytes), data) => {
                let data = data.get_or_insert_with(|| self.share.buffer(length(self.end - self.at + self.zeros)));
                data.push_zeros(length(std::mem::take(&mut self.zeros)));
                data.push(bytes);
            }
        }
    }

    fn end_chunk(&mut self) {
        let used = self.data.as_ref().map_or(&[][..], Buffer::used);
        let bytes = &used[self.chunk..];
        let length = std::mem::take(&mut self.zeros) + bytes.len() as u64;
        if !is_zero(bytes) {
            self.runs.push(region::Run { length, crc32c: Some(crc_fast::crc32_iscsi(bytes)) });
            self.chunk = used.len();
            return;
        }
        push_zeroes(&mut self.runs, length);
        if let Some(data) = &mut self.data {
            data.truncate(self.chunk);
        }
    }

    fn finish(self) -> (Vec<region::Run>, Rope) {
        (self.runs, self.data.map_or_else(Rope::default, |data| data.freeze().into()))
    }
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The first `len` bytes of a piece (or all), and the rest.
fn cut(piece: Piece<'_>, len: u64) -> (Piece<'_>, Piece<'_>) {
    match piece {
        Piece::Zeroes(all) => (Piece::Zeroes(all.min(len)), Piece::Zeroes(all - all.min(len))),
        Piece::Data(bytes) => {
            let (now, later) = bytes.split_at(bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX)));
            (Piece::Data(now), Piece::Data(later))
        }
    }
}

fn unable() -> Status {
    Status::unimplemented("the region's backend cannot do that")
}

/// A status for an error of ours.
pub(crate) fn answer<T>(result: Result<T>) -> Result<T, Status> {
    result.map_err(|error| status::from_error(&error))
}

#[cfg(test)]
mod tests {
    use r3map_core::ChunkSize;

    use super::*;
    use crate::server::budget::Budget;

    const CHUNK: usize = 4096;

    async fn share() -> Share {
        Budget::new(1 << 20, 1 << 20).room().share(1 << 20).await
    }

    fn geometry(size: usize) -> Geometry {
        Geometry::new(size as u64, ChunkSize::MIN).unwrap()
    }

    /// Two chunks of data around one of zeros, and a last one that is short and zero but for its end.
    fn content() -> Vec<u8> {
        let mut bytes: Vec<u8> = (1..=251).cycle().take(3 * CHUNK + 1000).collect();
        bytes[CHUNK..2 * CHUNK].fill(0);
        bytes[3 * CHUNK..].fill(0);
        *bytes.last_mut().unwrap() = 7;
        bytes
    }

    fn expected(bytes: &[u8]) -> (Vec<region::Run>, Vec<u8>) {
        let data = [&bytes[..CHUNK], &bytes[2 * CHUNK..]].concat();
        let run = |part: &[u8]| region::Run { length: part.len() as u64, crc32c: Some(crc_fast::crc32_iscsi(part)) };
        let zeros = region::Run { length: CHUNK as u64, crc32c: None };
        let runs = vec![run(&bytes[..CHUNK]), zeros, run(&bytes[2 * CHUNK..3 * CHUNK]), run(&bytes[3 * CHUNK..])];
        (runs, data)
    }

    #[test]
    fn whole_bytes_become_runs_without_zero_chunks() {
        let bytes = content();
        let (runs, data) = runs_of(geometry(bytes.len()), 0, &Bytes::from(bytes.clone()));
        assert_eq!((runs, data.into_bytes().to_vec()), expected(&bytes));
    }

    #[tokio::test]
    async fn pieces_of_any_size_become_the_same_runs() {
        let bytes = content();
        for step in [1, 1000, CHUNK, CHUNK + 1, bytes.len()] {
            let mut runs = Runs::new(geometry(bytes.len()), 0, bytes.len() as u64, share().await);
            for part in bytes.chunks(step) {
                match is_zero(part) {
                    true => runs.piece(Piece::Zeroes(part.len() as u64)),
                    false => runs.piece(Piece::Data(part)),
                }
            }
            let (runs, data) = runs.finish();
            assert_eq!((runs, data.into_bytes().to_vec()), expected(&bytes), "in steps of {step}");
        }
    }

    #[tokio::test]
    async fn runs_are_cut_at_chunks_of_the_region_and_long_zeros_are_one() {
        let size = 10 * CHUNK;
        let mut runs = Runs::new(geometry(size), 100, (size - 100) as u64, share().await);
        runs.piece(Piece::Zeroes((size - 101) as u64));
        runs.piece(Piece::Data(b"x"));
        let (runs, data) = runs.finish();
        let data = data.into_bytes();
        let lengths: Vec<_> = runs.iter().map(|run| (run.length, run.crc32c.is_some())).collect();
        assert_eq!(lengths, [((9 * CHUNK - 100) as u64, false), (CHUNK as u64, true)]);
        assert_eq!((data.len(), data[CHUNK - 1]), (CHUNK, b'x'));
    }
}
