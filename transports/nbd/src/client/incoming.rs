//! The receiving half of a connection: replies, chunk by chunk, each into the buffer of whoever asked.
//!
//! Nobody owns this half. Whoever is polled and has its lock goes on where the last one stopped: the connection's driver
//! waits for headers, and a long chunk of data is received by the very call that asked for it, straight into its buffer.
//! So data is not copied, and there is no task per request. Short chunks are taken out of one buffer, many per system
//! call, by whoever is there ("spilled"), and so are long ones whose call does not come for them.
//!
//! ```text
//! Header ──short chunk, all of it buffered──► (spilled) ──► Header
//!    │───control chunk──► Control ──────────────────────► Header
//!    └───long chunk──► Data ── its call, straight ──────► Header
//!                        │──── call dropped: discarded ──► Header
//!                        └──── call asleep: spilled ─────► Header
//! ```

use std::mem;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use crate::client::calls::{Calls, Failure, Spilled, Violation};
use crate::client::ending::Ending;
use crate::stream::Reading;
use crate::wire::{Chunk, ChunkHeader, ChunkType, Framing, ReplyHeader};

/// The buffer for headers and short chunks.
const BUFFER: usize = 32 << 10;
/// How much of it is filled at once where chunks are long: what of them gets into it must be copied.
const PEEK: usize = 2 << 10;
/// How much of a long chunk that nobody takes is received at once.
const SPILL: usize = 1 << 20;

/// The receiving half.
pub(crate) struct Incoming {
    stream: Reading,
    ending: Ending,
    framing: Framing,
    /// The most data in a chunk.
    max_data: u32,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    /// Whether the last chunk of data was a long one.
    long: bool,
    received: u64,
}

enum State {
    Header,
    Control(ChunkHeader, Vec<u8>),
    Data(Data),
}

/// A chunk of data that is arriving.
struct Data {
    cookie: u64,
    /// Where in the caller's buffer the rest of it goes.
    at: usize,
    left: usize,
    /// Whether its reply ends with it.
    last: bool,
    /// Whether it is received for a call that does not come for it.
    taken_over: bool,
}

/// The call that polls, and where its bytes go.
pub(crate) struct Owner<'a, 'c> {
    pub(crate) cookie: u64,
    pub(crate) buf: &'a mut [u8],
    pub(crate) context: &'a mut Context<'c>,
}

type Shared = Mutex<Calls>;

fn lock(calls: &Shared) -> MutexGuard<'_, Calls> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Incoming {
    pub(crate) fn new(stream: Reading, ending: Ending, framing: Framing, max_data: u32) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        let state = State::Header;
        Self { stream, ending, framing, max_data, buffer, start: 0, end: 0, state, long: false, received: 0 }
    }

    /// How many bytes have come so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Lets go of the stream: the other side is told when both halves are.
    pub(crate) fn release(&mut self) {
        self.stream = Box::new(tokio::io::empty());
    }

    /// The request whose call should come and receive now.
    pub(crate) fn awaited(&self) -> Option<u64> {
        match &self.state {
            State::Data(Data { cookie, taken_over: false, .. }) => Some(*cookie),
            _ => None,
        }
    }

    /// Its call does not come: the driver does its work.
    pub(crate) fn take_over(&mut self) {
        if let State::Data(data) = &mut self.state {
            data.taken_over = true;
        }
    }

    /// Receives as long as there is something, and it is the poller's turn. `driver` is woken when more headers come,
    /// the owner when more of its data comes. `Ready(Ok)` says that it is somebody else's turn now, who has been told.
    ///
    /// # Errors
    /// Why the connection is broken.
    pub(crate) fn poll(
        &mut self,
        driver: &mut Context<'_>,
        calls: &Shared,
        mut owner: Option<Owner<'_, '_>>,
    ) -> Poll<Result<(), Failure>> {
        loop {
            let buffered = self.end - self.start;
            match &mut self.state {
                State::Header => ready!(self.poll_header(driver, calls, owner.as_ref().map(|owner| owner.cookie)))?,
                State::Control(..) => ready!(self.poll_control(driver, calls))?,
                State::Data(data) if data.left == 0 => {
                    let (cookie, last) = (data.cookie, data.last);
                    self.state = State::Header;
                    if last {
                        lock(calls).finish(cookie).map_err(Failure::Corrupt)?;
                    }
                }
                State::Data(data) => match &mut owner {
                    Some(owner) if owner.cookie == data.cookie => ready!(self.poll_owner(owner))?,
                    _ if data.left <= buffered => self.spill_buffered(calls),
                    _ if data.left <= BUFFER => ready!(self.fill(driver, BUFFER))?,
                    _ if data.taken_over || !lock(calls).is_wanted(data.cookie) => {
                        ready!(self.poll_orphan(driver, calls))?;
                    }
                    _ => return Poll::Ready(Ok(())),
                },
            }
        }
    }

    fn poll_header(
        &mut self,
        driver: &mut Context<'_>,
        calls: &Shared,
        owner: Option<u64>,
    ) -> Poll<Result<(), Failure>> {
        let malformed = |why: crate::wire::Malformed| Failure::Corrupt(format!("what is no reply: {why}"));
        let Some(header) =
            ReplyHeader::decode(self.framing, self.max_data, &self.buffer[self.start..self.end]).map_err(malformed)?
        else {
            return self.fill(driver, if self.long { PEEK } else { BUFFER });
        };
        // The place of a chunk's data comes first in its payload: wait for that too.
        let data = matches!(header, ReplyHeader::Chunk(ChunkHeader { kind: ChunkType::Data, .. }));
        let length = header.len() + if data { 8 } else { 0 };
        if self.end - self.start < length {
            return self.fill(driver, if self.long { PEEK } else { BUFFER });
        }
        let place =
            self.buffer[self.start + header.len()..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        self.start += length;
        self.begin(header, place, calls, owner).map_err(Failure::Corrupt)?;
        Poll::Ready(Ok(()))
    }

    fn begin(&mut self, header: ReplyHeader, place: u64, calls: &Shared, owner: Option<u64>) -> Result<(), Violation> {
        let mut calls = lock(calls);
        let (cookie, offset_at, length, last) = match header {
            ReplyHeader::Simple(reply) => {
                match calls.simple(reply.cookie, reply.error, self.framing != Framing::Simple)? {
                    None => return Ok(()),
                    Some(length) => {
                        let offset = calls.asked_offset(reply.cookie)?;
                        (reply.cookie, calls.data(reply.cookie, offset, length)?, length, true)
                    }
                }
            }
            ReplyHeader::Chunk(chunk) => {
                calls.check_offset(chunk.cookie, chunk.offset)?;
                if chunk.kind != ChunkType::Data {
                    self.state = State::Control(chunk, Vec::with_capacity(chunk.length as usize));
                    return Ok(());
                }
                let length = u64::from(chunk.length) - 8;
                (chunk.cookie, calls.data(chunk.cookie, place, length)?, length, chunk.is_last())
            }
        };
        let left = usize::try_from(length).map_err(|_| "more than fits into memory")?;
        self.long = left > BUFFER;
        if self.long && owner != Some(cookie) {
            calls.wake(cookie);
        }
        self.state = State::Data(Data { cookie, at: offset_at, left, last, taken_over: false });
        Ok(())
    }

    fn poll_control(&mut self, driver: &mut Context<'_>, calls: &Shared) -> Poll<Result<(), Failure>> {
        let State::Control(header, payload) = &mut self.state else { return Poll::Ready(Ok(())) };
        let missing = header.length as usize - payload.len();
        let there = missing.min(self.end - self.start);
        payload.extend_from_slice(&self.buffer[self.start..self.start + there]);
        self.start += there;
        if there < missing {
            return self.fill(driver, BUFFER);
        }
        let (header, payload) = (*header, mem::take(payload));
        self.state = State::Header;
        Poll::Ready(control(header, &payload, &mut lock(calls)).map_err(Failure::Corrupt))
    }

    /// Receives into the owner's buffer.
    fn poll_owner(&mut self, owner: &mut Owner<'_, '_>) -> Poll<Result<(), Failure>> {
        let State::Data(data) = &mut self.state else { return Poll::Ready(Ok(())) };
        let rest = &mut owner.buf[data.at..data.at + data.left];
        let buffered = rest.len().min(self.end - self.start);
        if buffered > 0 {
            rest[..buffered].copy_from_slice(&self.buffer[self.start..self.start + buffered]);
            self.start += buffered;
            data.at += buffered;
            data.left -= buffered;
            return Poll::Ready(Ok(()));
        }
        let mut into = ReadBuf::new(rest);
        let count = ready!(receive(&mut self.stream, &self.ending, owner.context, &mut into))?;
        data.at += count;
        data.left -= count;
        self.received += count as u64;
        Poll::Ready(Ok(()))
    }

    fn spill_buffered(&mut self, calls: &Shared) {
        let State::Data(data) = &mut self.state else { return };
        let bytes = &self.buffer[self.start..self.start + data.left];
        let mut calls = lock(calls);
        if calls.is_wanted(data.cookie) {
            calls.spill(data.cookie, data.at, Spilled::Bytes(bytes.to_vec()));
        }
        self.start += data.left;
        data.left = 0;
    }

    /// Receives a part of a long chunk for a call that does not come for it, or that nobody wants.
    fn poll_orphan(&mut self, driver: &mut Context<'_>, calls: &Shared) -> Poll<Result<(), Failure>> {
        let State::Data(data) = &mut self.state else { return Poll::Ready(Ok(())) };
        let mut bytes = vec![0; data.left.min(SPILL)];
        let buffered = bytes.len().min(self.end - self.start);
        let count = if buffered > 0 {
            bytes[..buffered].copy_from_slice(&self.buffer[self.start..self.start + buffered]);
            self.start += buffered;
            buffered
        } else {
            let count = ready!(receive(&mut self.stream, &self.ending, driver, &mut ReadBuf::new(&mut bytes)))?;
            self.received += count as u64;
            count
        };
        bytes.truncate(count);
        lock(calls).spill(data.cookie, data.at, Spilled::Bytes(bytes));
        data.at += count;
        data.left -= count;
        Poll::Ready(Ok(()))
    }

    /// Receives into the buffer, up to `limit` bytes in it.
    fn fill(&mut self, context: &mut Context<'_>, limit: usize) -> Poll<Result<(), Failure>> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let limit = limit.max(self.end + 1).min(self.buffer.len());
        let mut into = ReadBuf::new(&mut self.buffer[self.end..limit]);
        let count = ready!(receive(&mut self.stream, &self.ending, context, &mut into))?;
        self.end += count;
        self.received += count as u64;
        Poll::Ready(Ok(()))
    }

    /// Receives and forgets, until the other side has closed: then nothing more happens there. Never ready where this
    /// side's system gave the connection up, and nobody will know.
    pub(crate) fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            self.start = 0;
            self.end = 0;
            if ready!(self.fill(context, BUFFER)).is_err() {
                return if self.ending.is_ours() { Poll::Pending } else { Poll::Ready(()) };
            }
        }
    }
}

/// What a chunk without data says.
fn control(header: ChunkHeader, payload: &[u8], calls: &mut Calls) -> Result<(), Violation> {
    let cookie = header.cookie;
    match Chunk::decode(header.kind, payload).map_err(|why| format!("a malformed reply: {why}"))? {
        Chunk::Hole { offset, length } => calls.hole(cookie, offset, length.into())?,
        Chunk::BlockStatus { context, extents } => calls.status(cookie, context, extents)?,
        Chunk::Error { error, message, .. } => calls.error(cookie, error, message)?,
        Chunk::None | Chunk::Data { .. } => {}
    }
    if header.is_last() { calls.finish(cookie) } else { Ok(()) }
}

fn receive(
    stream: &mut Reading,
    ending: &Ending,
    context: &mut Context<'_>,
    into: &mut ReadBuf<'_>,
) -> Poll<Result<usize, Failure>> {
    let before = into.filled().len();
    let result = ready!(Pin::new(stream).poll_read(context, into)).map_err(|error| ending.broken(&error));
    let count = into.filled().len() - before;
    Poll::Ready(match (result, count) {
        (Ok(()), 0) => Err(ending.failure("the server closed it".to_owned())),
        (result, count) => result.map(|()| count),
    })
}
