//! A region at a server, as a backend.
//!
//! `Client` cuts requests to what the server takes and gives out what comes back; `calls` has the two protocols, `links`
//! the connections.

mod calls;
mod facts;
mod link;
mod links;
mod reply;
mod seeder;
mod unflushed;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, FuturesOrdered, TryStreamExt};
use r3map_core::{
    Access, Activity, Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, Extents, Operation, Piece,
    RangeGuard, RangeLock, ReadMany, ReadOp, ReadPieces, Result, Trim, WriteZeroes, check_range,
};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::pass::Pass;
use crate::path;
use crate::target::Target;
use calls::Calls;
use facts::{Facts, Protocol};
use link::WINDOW;
use reply::Reply;

pub(crate) use links::random;
pub use seeder::SeederClient;

/// Requests of one call that are under way at once, where the call is too long for one request: at least this many, and
/// so many more as make up the same bytes where they are short.
const PARTS_IN_FLIGHT: u64 = 4;
/// But never more than this, for one call of many.
const MOST_PARTS_IN_FLIGHT: u64 = 256;
/// The most bytes in a part of a call that is cut: enough to fill a pipe, four times, and not much memory.
const PART: u64 = 4 << 20;
/// The most bytes that reads ask for beyond the part that each is given now: half of what a connection lets a server send
/// before any of it is taken, so that there is always a way for what is taken first.
const AHEAD: usize = WINDOW as usize / 2;

/// How a [`Client`] connects. Plain data.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// How long connecting may take in all: the name, the socket, and the server's first answer. 10 s.
    pub connect_timeout: Duration,
    /// When nothing was received for so long, the server is asked for a sign of life; when that does not come for as
    /// long again, the connection is given up and its calls fail. 5 s. Go servers, which do not stand for it, are left
    /// to TCP, which notices a host that is gone within 30 s, but not a program that hangs.
    pub keep_alive: Duration,
    /// Connections for reads. One; more help where one processor's work for a connection, or one connection's share of
    /// a long line, is what limits.
    pub connections: NonZeroUsize,
    /// What a Go server cannot tell. Without it a Go server is refused; with it other servers are not affected.
    pub go: Option<GoRegion>,
    /// Which of a server's regions. The first.
    pub region: u32,
    /// Whether a Go server is a seeder, which has another service. No.
    pub go_seeder: bool,
}

impl ClientSettings {
    /// How a Go server is read.
    fn go_read(&self) -> &'static str {
        if self.go_seeder { path::GO_SEEDER_READ_AT } else { path::GO_READ_AT }
    }
}

/// The region of a server that speaks only the Go programs' protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoRegion {
    /// Its size in bytes. The Go server must have been told the same.
    pub size: u64,
    /// Its chunk size. Likewise.
    pub chunk_size: ChunkSize,
    /// Which requests it takes.
    pub requests: GoRequests,
}

/// Which requests a Go server takes. It depends on how it was started, which it does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GoRequests {
    /// Those of exactly one chunk: right for every Go server. One that keeps its region in a directory of chunks takes a
    /// request for one to the chunk that begins at its offset, whatever its length, and where none begins answers with
    /// zeros. Costs one request for each chunk.
    #[default]
    OneChunk,
    /// Any: for a server that was started with `-chunking`, or keeps its region in a file or in memory. On any other,
    /// bytes are lost without an error.
    Any,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            keep_alive: Duration::from_secs(5),
            connections: NonZeroUsize::MIN,
            go: None,
            region: 0,
            go_seeder: false,
        }
    }
}

/// A region at a server. Reads of any length are cut to what the server takes; each byte that is given out agreed with
/// its checksum (except from a Go server, which sends none).
///
/// It connects again by itself when a call finds no connection. Calls that were under way when a connection broke fail
/// with `Unavailable`: whether a write among them was done is unknown. What a call does is never overtaken: a write
/// that was given up (its future dropped) goes on in the background, and later writes to the same bytes wait for its
/// end; over a new connection the server first ends what is left of the old one.
///
/// `flush` fails with `Conflict`, once, when the server restarted since writes that it is to make durable: these may
/// be lost and must be written again. A Go server cannot tell that it restarted, so there every lost connection counts.
///
/// A server that comes back with another region (size, chunk size, or identity) is refused with `Conflict`.
#[derive(Debug)]
pub struct Client {
    calls: Arc<Calls>,
    facts: Facts,
    writes: RangeLock,
    /// [`AHEAD`].
    ahead: Semaphore,
}

impl Client {
    /// Connects to a server and asks what region it has.
    ///
    /// The connections are driven by tasks on the current tokio runtime, now and after they broke; calls may be made
    /// from any thread. That runtime must never wait for memory that this region fills: if its threads can fault on a
    /// slice that is mapped from this client, use a runtime of its own.
    ///
    /// # Errors
    /// `Unavailable` if nobody answers (in time), naming the target; `InvalidInput` for a server of another major
    /// version, one that serves no region, or a Go server without [`ClientSettings::go`]; `Corrupt` for one that
    /// speaks something else.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(target: Target, settings: ClientSettings) -> Result<Self> {
        Self::with(target, settings, Arc::default()).await
    }

    /// The same, with something to show.
    async fn with(target: Target, settings: ClientSettings, pass: Arc<Pass>) -> Result<Self> {
        crate::heap::keep();
        let (calls, facts) = Calls::open(target, settings, pass).await?;
        Ok(Self { calls: Arc::new(calls), facts, writes: RangeLock::new(), ahead: Semaphore::new(AHEAD) })
    }

    /// Where the server is.
    #[must_use]
    pub fn target(&self) -> &Target {
        self.calls.target()
    }

    /// The most bytes of a part of a call.
    fn longest_part(&self) -> u64 {
        self.facts.max_request.min(PART.max(self.facts.geometry.chunk_size().bytes()))
    }

    fn parts_in_flight(&self) -> usize {
        let fill = (PARTS_IN_FLIGHT * PART / self.longest_part()).clamp(PARTS_IN_FLIGHT, MOST_PARTS_IN_FLIGHT);
        usize::try_from(fill).unwrap_or(usize::MAX)
    }

    /// Cuts a range into what fits one request, at multiples of the chunk size where that is possible.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + Send + use<> {
        let (chunk, limit) = (self.facts.geometry.chunk_size().bytes(), self.longest_part());
        let unit = if limit >= chunk { chunk } else { 1 };
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            at = range.end.min((start + limit) / unit * unit);
            (start < range.end).then_some(start..at)
        })
    }

    /// Asks for a range. The reply is only beginning to arrive; `room` is for it where it comes before its turn.
    async fn fetch<R>(&self, part: Range<u64>, room: R) -> Result<((u64, u64), Reply, R)> {
        let range = (part.start, part.end - part.start);
        let reply = self.calls.read(&[range]).await;
        Ok((range, reply.map_err(|error| error.at(range.0, range.1))?, room))
    }

    /// Room for a part that comes before its turn, if there is some now.
    fn room_ahead(&self, part: &Range<u64>) -> Option<SemaphorePermit<'_>> {
        self.ahead.try_acquire_many(u32::try_from(part.end - part.start).ok()?).ok()
    }

    /// Calls something that changes `range`, to its end even if the caller does not wait for it.
    async fn change<F>(&self, guard: Arc<RangeGuard>, call: F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let call = async move {
            let result = call.await;
            drop(guard);
            result
        };
        self.calls.to_the_end(call).await
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.size(), offset, len)
    }

    /// Checks what reads or writes bytes. A server of ours would refuse parts of chunks where it cannot have them, but not
    /// one of the Go programs.
    fn check_transfer(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        self.check(operation, offset, len)?;
        match len == 0 || !self.facts.whole_chunks || self.facts.geometry.is_whole_chunks(&(offset..offset + len)) {
            true => Ok(()),
            false => {
                let message = format!("not whole chunks of {}", self.facts.geometry.chunk_size());
                Err(Error::new(ErrorKind::InvalidInput, operation, message).at(offset, len))
            }
        }
    }

    /// The same for what changes something.
    fn check_change(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        self.check(operation, offset, len)?;
        match self.facts.read_only {
            true => {
                let message = format!("{} serves the region read-only", self.target());
                Err(Error::new(ErrorKind::Denied, operation, message).at(offset, len))
            }
            false => Ok(()),
        }
    }
}

fn fill(buf: &mut [u8], start: u64) -> impl for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send + use<'_> {
    move |offset, piece| {
        let at = usize::try_from(offset - start).unwrap_or(usize::MAX);
        match piece {
            Piece::Data(bytes) => buf[at..at + bytes.len()].copy_from_slice(bytes),
            Piece::Zeroes(len) => buf[at..at + usize::try_from(len).unwrap_or(usize::MAX)].fill(0),
        }
        Ok(())
    }
}

#[async_trait]
impl Backend for Client {
    fn size(&self) -> u64 {
        self.facts.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let chunk = self.facts.geometry.chunk_size();
        Capabilities {
            read_only: self.facts.read_only,
            access: if self.facts.whole_chunks { Access::WholeChunks(chunk) } else { Access::Any },
            max_request: None,
            preferred_chunk: Some(chunk),
            identity: self.facts.identity(),
            pieces: Some(self),
            read_many: self.facts.is_ours().then_some(self),
            trim: self.facts.trim.then_some(self),
            write_zeroes: self.facts.write_zeroes.then_some(self),
            extents: self.facts.extents.then_some(self),
            activity: Some(self),
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_pieces(offset, buf.len() as u64, &mut fill(buf, offset)).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.check_transfer(Operation::Write, offset, len)?;
        self.check_change(Operation::Write, offset, len)?;
        let guard = Arc::new(self.writes.lock(offset..offset + len).await);
        stream::iter(self.parts(offset..offset + len).map(Ok))
            .try_for_each_concurrent(self.parts_in_flight(), |part| {
                let at = usize::try_from(part.start - offset).unwrap_or(usize::MAX);
                let bytes = &buf[at..at + usize::try_from(part.end - part.start).unwrap_or(usize::MAX)];
                self.change(guard.clone(), self.calls.write(part.start, bytes))
            })
            .await
    }

    async fn flush(&self) -> Result<()> {
        self.calls.flush().await
    }
}

#[async_trait]
impl ReadPieces for Client {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        self.check_transfer(Operation::Read, offset, len)?;
        let mut parts = self.parts(offset..offset + len).peekable();
        let mut replies = FuturesOrdered::new();
        loop {
            while replies.len() < self.parts_in_flight()
                && let Some(part) = parts.peek()
            {
                let room = self.room_ahead(part);
                if room.is_none() && !replies.is_empty() {
                    break;
                }
                replies.extend(parts.next().map(|part| self.fetch(part, room)));
            }
            let Some((range, reply, _room)) = replies.try_next().await? else { return Ok(()) };
            reply.lend(&[range], visit).await?;
        }
    }
}

#[async_trait]
impl ReadMany for Client {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        for read in reads.iter() {
            self.check_transfer(Operation::Read, read.offset, read.buf.len() as u64)?;
        }
        let mut at = 0;
        while at < reads.len() {
            let end = at + self.batch(&reads[at..]);
            match &mut reads[at..end] {
                [read] => self.read_at(read.offset, read.buf).await?,
                batch => self.read_batch(batch).await?,
            }
            at = end;
        }
        Ok(())
    }
}

impl Client {
    /// How many of the first reads fit one request; one if not even that does, which `read_at` cuts.
    fn batch(&self, reads: &[ReadOp<'_>]) -> usize {
        let Protocol::Region { max_ranges } = self.facts.protocol else { return 1 };
        let mut room = self.facts.max_request;
        let mut count = 0;
        for read in reads.iter().take(max_ranges) {
            match room.checked_sub(read.buf.len() as u64) {
                Some(left) => room = left,
                None => break,
            }
            count += 1;
        }
        count.max(1)
    }

    /// Does reads that fit one request.
    async fn read_batch(&self, batch: &mut [ReadOp<'_>]) -> Result<()> {
        let ranges: Vec<_> = batch.iter().map(|read| (read.offset, read.buf.len() as u64)).collect();
        let reply = self.calls.read(&ranges).await?;
        let (mut current, mut filled) = (0, 0);
        let mut fill = |_: u64, piece: Piece<'_>| {
            let len = usize::try_from(piece.len()).unwrap_or(usize::MAX);
            while filled == batch[current].buf.len() {
                (current, filled) = (current + 1, 0);
            }
            let into = &mut batch[current].buf[filled..filled + len];
            match piece {
                Piece::Data(bytes) => into.copy_from_slice(bytes),
                Piece::Zeroes(_) => into.fill(0),
            }
            filled += len;
            Ok(())
        };
        reply.lend(&ranges, &mut fill).await
    }
}

#[async_trait]
impl Trim for Client {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(Operation::Trim, offset, len)?;
        let guard = Arc::new(self.writes.lock(offset..offset + len).await);
        self.change(guard, self.calls.release(Operation::Trim, offset, len)).await
    }
}

#[async_trait]
impl WriteZeroes for Client {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_change(Operation::WriteZeroes, offset, len)?;
        let guard = Arc::new(self.writes.lock(offset..offset + len).await);
        self.change(guard, self.calls.release(Operation::WriteZeroes, offset, len)).await
    }
}

impl Activity for Client {
    fn moved(&self) -> u64 {
        self.calls.moved()
    }
}

#[async_trait]
impl Extents for Client {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        self.check(Operation::Extents, offset, len)?;
        self.calls.extents(offset, len).await
    }
}
