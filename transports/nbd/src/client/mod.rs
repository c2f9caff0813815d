//! An export of a server, as a backend.
//!
//! `Client` cuts requests to what the server takes; `links` has the connections, `link` one of them, `calls` the requests
//! that are under way on it, `incoming` and `outgoing` its two directions.

mod calls;
mod changes;
mod coverage;
mod driver;
mod ending;
pub(crate) mod facts;
mod handshake;
mod incoming;
mod link;
pub(crate) mod links;
mod outgoing;
mod unflushed;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::try_join_all;
use futures_util::stream::{self, TryStreamExt};
use r3map_core::{
    Access, Activity, Backend, Capabilities, Error, ErrorKind, Extent, ExtentKind, Extents, Operation, RangeGuard,
    RangeLock, Result, check_range,
};

use crate::stream::{Duplex, Vanished};
use crate::uri::NbdUri;
use crate::wire::{BlockSizes, Command, CommandFlags, Descriptor, StateFlags, TransmissionFlags};
use calls::{Asked, Failure};
use link::Link;
use links::{Links, Source};
use unflushed::Written;

pub use handshake::{Export, Listed};

/// Requests of one call that are under way at once, where the call is too long for one request.
const PARTS_IN_FLIGHT: usize = 8;
/// All of what flushes are locked by.
const TURN: Range<u64> = 0..1;
/// How often a request is made when its connection breaks under it: once more, at once. What is to be tried for longer
/// is the retry stage's matter.
const ATTEMPTS: usize = 2;

/// How a [`Client`] connects. Plain data.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// How long connecting may take in all: the name, the socket, TLS and the handshake. 10 s.
    pub connect_timeout: Duration,
    /// When requests wait and nothing at all was received or sent for so long, the connection is given up and its calls
    /// fail. 30 s. It must be longer than the server takes for any request; NBD has no other sign of life. Over TCP an
    /// idle connection to a server that has vanished without a word is given up after twice that.
    pub silence: Duration,
    /// The most connections, where the server shares its cache between them (`NBD_FLAG_CAN_MULTI_CONN`); otherwise there
    /// is one. Another one is opened when all are busy. 4. Each costs the server a thread or more.
    pub connections: NonZeroUsize,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            silence: Duration::from_secs(30),
            connections: NonZeroUsize::new(4).expect("4 is not zero"),
        }
    }
}

/// An export of a server. Reads and writes of any length are cut to what the server takes.
///
/// It connects again by itself when a call finds no connection. A request whose connection is closed by the server
/// before it was answered is made once more at once; if that does not work either, or nobody knows what the server still
/// does, the call fails with `Unavailable`. What a call does is never overtaken: a write that was given up (its future
/// dropped) goes on in the background, and later writes to the same bytes wait for its end, over a broken connection
/// until the server's end of it is closed, or for a minute if the server never closes it.
///
/// `flush` fails with `Conflict`, once, when a connection broke after it had acknowledged writes that no other connection
/// makes durable: the server may have restarted, so these may be lost and must be written again. So it does when the server
/// answers a flush of writes with an error, or the connection breaks under it, whatever the connections that the writes
/// were made on: NBD does not say that the next flush would include them. Whoever's flush is under way then is told; where
/// nobody's is, because it was given up, the next.
///
/// A server that comes back with another export (size, abilities) is refused with `Conflict`. One that breaks the
/// protocol's rules is `Corrupt`, and the connection is dropped.
///
/// [`Capabilities::trim`] is `NBD_CMD_WRITE_ZEROES`, which may release storage: NBD's own trim leaves bytes undefined.
/// Where the server has blocks of more than a byte, only whole chunks (of at least 4 KiB) are taken.
#[derive(Debug)]
pub struct Client {
    links: Links,
    changes: RangeLock,
    /// Held as a whole by the flush whose turn it is, until its fate is known.
    flushes: RangeLock,
}

impl Client {
    /// Connects to a server and begins with the export that the URI names.
    ///
    /// The connections are driven by tasks on the current tokio runtime, now and after they broke; calls may be made
    /// from any thread. That runtime must never wait for memory that this region fills: if its threads can fault on a
    /// slice that is mapped from this client, use a runtime of its own.
    ///
    /// # Errors
    /// `Unavailable` if nobody answers (in time); `NotFound` if there is no such export; `Denied` where TLS or the
    /// server's rules are in the way; `InvalidInput` for what is no NBD server of today, or an export that is no region;
    /// `Corrupt` for one that breaks the protocol's rules. Each names the server.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(uri: NbdUri, settings: ClientSettings) -> Result<Self> {
        Self::open(Source::server(uri)?, settings).await
    }

    /// As [`Self::connect`], over a byte stream of any kind, with one connection that is not made again.
    ///
    /// # Errors
    /// As [`Self::connect`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn over(stream: impl Duplex + 'static, export: &str, settings: ClientSettings) -> Result<Self> {
        Self::open(Source::stream(Box::new(stream), export.to_owned()), settings).await
    }

    async fn open(source: Source, settings: ClientSettings) -> Result<Self> {
        Ok(Self { links: Links::open(source, settings).await?, changes: RangeLock::new(), flushes: RangeLock::new() })
    }

    /// Names the exports of a server, with what it says about each. The URI's own export does not matter.
    ///
    /// # Errors
    /// As [`Self::connect`]; `Denied` or `InvalidInput` if the server does not tell.
    pub async fn list(uri: NbdUri, settings: &ClientSettings) -> Result<Vec<Listed>> {
        let source = Source::server(uri)?;
        let vanished = Vanished::Within(settings.connect_timeout);
        let listing = async { source.greet(vanished).await?.list().await };
        links::in_time(settings.connect_timeout, &source, listing).await
    }

    /// What the server says can be done with the export.
    #[must_use]
    pub fn flags(&self) -> TransmissionFlags {
        self.links.facts().flags
    }

    /// The server's size constraints, if it has any.
    #[must_use]
    pub fn block_sizes(&self) -> Option<BlockSizes> {
        self.links.facts().blocks
    }

    /// Cuts a range into what fits one request, at multiples of the limit where that is possible.
    fn parts(&self, range: Range<u64>, limit: u64) -> impl Iterator<Item = Range<u64>> + Send + use<> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = at;
            at = range.end.min((start + limit) / limit * limit);
            (start < range.end).then_some(start..at)
        })
    }

    /// The unit in bytes of what can be read and written.
    fn unit(&self) -> u64 {
        match self.links.facts().access() {
            Access::Any => 1,
            Access::WholeChunks(chunk) => chunk.bytes(),
        }
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.size(), offset, len)?;
        // Where the server has blocks, requests are whole chunks.
        let unit = self.unit();
        let whole = offset.is_multiple_of(unit) && (len.is_multiple_of(unit) || offset + len == self.size());
        let moves = matches!(operation, Operation::Read | Operation::Write);
        match whole || !moves || len == 0 {
            true => Ok(()),
            false => {
                let message = format!("{} takes whole chunks of {unit} bytes only", self.links.peer());
                Err(Error::new(ErrorKind::InvalidInput, operation, message).at(offset, len))
            }
        }
    }

    fn failed(&self, operation: Operation, failure: Failure) -> Error {
        failure.into_error(operation, self.links.peer())
    }

    /// Does one read that the server takes.
    async fn fetch(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut attempt = 1;
        loop {
            let link = self.links.any(Operation::Read).await?;
            match link.read(offset, buf).await {
                Err(Failure::Closed(_) | Failure::GivenUp(_)) if attempt < ATTEMPTS => attempt += 1,
                result => return result.map_err(|failure| self.failed(Operation::Read, failure)),
            }
        }
    }
}

#[async_trait]
impl Backend for Client {
    fn size(&self) -> u64 {
        self.links.facts().size
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let facts = self.links.facts();
        let zeroes = facts.has(TransmissionFlags::SEND_WRITE_ZEROES);
        Capabilities {
            read_only: facts.has(TransmissionFlags::READ_ONLY),
            access: facts.access(),
            preferred_chunk: facts.preferred(),
            trim: zeroes.then_some(self),
            write_zeroes: zeroes.then_some(self),
            extents: facts.allocation.is_some().then_some(self),
            activity: Some(self),
            ..Capabilities::default()
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.check(Operation::Read, offset, len)?;
        let limit = self.links.facts().longest();
        if len <= limit {
            return if len == 0 {
                Ok(())
            } else {
                self.fetch(offset, buf).await.map_err(|error| error.at(offset, len))
            };
        }
        let mut rest = buf;
        let parts: Vec<_> = self
            .parts(offset..offset + len, limit)
            .map(|part| {
                let (head, tail) = std::mem::take(&mut rest).split_at_mut(index(part.end - part.start));
                rest = tail;
                Ok((part.start, head))
            })
            .collect();
        let reads = stream::iter(parts).try_for_each_concurrent(PARTS_IN_FLIGHT, |(at, part)| self.fetch(at, part));
        reads.await.map_err(|error| error.at(offset, len))
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        let facts = self.links.facts();
        if facts.has(TransmissionFlags::READ_ONLY) || !facts.has(TransmissionFlags::SEND_FLUSH) {
            // Such a server has no cache that it could flush.
            return Ok(());
        }
        let unflushed = self.links.unflushed();
        let reports = unflushed.reports();
        let (turn, waited) = self.turn().await;
        let mark = unflushed.mark();
        if waited && mark.is_empty() && unflushed.reports() == reports {
            return Ok(()); // another's has flushed all of it
        }
        let asked = self.to_flush(&mark).await?;
        let why = match try_join_all(asked.iter().map(|link| self.flush_on(link, &turn))).await {
            Ok(_) => {
                unflushed.settled(&mark);
                let covered = mark.iter().all(|written| asked.iter().any(|link| self.covers(link, written)));
                match covered {
                    true if unflushed.reports() == reports => return Ok(()),
                    true => "another flush has failed".to_owned(),
                    false => "the connection broke since then, or a flush has failed".to_owned(),
                }
            }
            Err(failure @ Failure::Refused(..)) if failure.loses() && !mark.is_empty() => {
                unflushed.settled(&mark);
                failure.says().1
            }
            Err(failure) => return Err(self.failed(Operation::Flush, failure)),
        };
        unflushed.report();
        let message =
            format!("{}: {why}: what was written since the last flush may be lost, write it again", self.links.peer());
        Err(Error::new(ErrorKind::Conflict, Operation::Flush, message))
    }
}

impl Client {
    /// The right to flush, and whether it had to be waited for. One has it at a time: a server tells of a loss once, and all are
    /// to hear of it who have asked by then.
    async fn turn(&self) -> (Arc<RangeGuard>, bool) {
        match self.flushes.try_lock(TURN) {
            Some(turn) => (Arc::new(turn), false),
            None => (Arc::new(self.flushes.lock(TURN).await), true),
        }
    }

    /// The connections to flush for what there is at `mark`: the oldest, which covers most, and those with something of
    /// their own that it does not cover.
    async fn to_flush(&self, mark: &[Written]) -> Result<Vec<Arc<Link>>> {
        let some = self.links.any(Operation::Flush).await?;
        let mut open = self.links.open_ones();
        if open.is_empty() {
            // It broke meanwhile, and will say so.
            open.push(some);
        }
        let oldest = open[0].clone();
        let left =
            |link: &Link| mark.iter().any(|written| written.link == link.name() && !self.covers(&oldest, written));
        open.retain(|link| link.name() == oldest.name() || left(link));
        Ok(open)
    }

    /// Whether a flush on a connection makes what was written durable.
    fn covers(&self, link: &Link, written: &Written) -> bool {
        written.covered_by(link.name(), self.links.facts().has(TransmissionFlags::CAN_MULTI_CONN))
    }

    async fn flush_on(&self, link: &Link, turn: &Arc<RangeGuard>) -> Result<(), Failure> {
        let asked = Asked { command: Command::Flush, offset: 0, length: 0 };
        link.request(asked, CommandFlags::empty(), &[], Some(turn.clone())).await.map(|_| ())
    }
}

impl Activity for Client {
    fn moved(&self) -> u64 {
        self.links.moved()
    }
}

#[async_trait]
impl Extents for Client {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.size(), offset, len)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        let unit = self.links.facts().minimum();
        let start = offset / unit * unit;
        let length = ((offset + len).next_multiple_of(unit) - start).min(self.links.facts().longest_range());
        let asked = Asked { command: Command::BlockStatus, offset: start, length };
        let mut attempt = 1;
        let reply = loop {
            let link = self.links.any(Operation::Extents).await?;
            match link.request(asked, CommandFlags::empty(), &[], None).await {
                Err(Failure::Closed(_) | Failure::GivenUp(_)) if attempt < ATTEMPTS => attempt += 1,
                result => break result,
            }
        };
        match reply {
            Ok(reply) => Ok(extents(&reply.extents, start, &(offset..offset + len))),
            Err(failure) => Err(self.failed(Operation::Extents, failure).at(offset, len)),
        }
    }
}

/// What a server says from `start` on, cut to `range`, which begins less than a block behind that.
fn extents(said: &[Descriptor], start: u64, range: &Range<u64>) -> Vec<Extent> {
    let mut at = start;
    let mut extents: Vec<Extent> = Vec::with_capacity(said.len());
    for Descriptor { length, flags } in said {
        let end = at.saturating_add(*length);
        let cut = at.max(range.start)..end.min(range.end);
        at = end;
        // What is only not stored may hold anything; what reads as zeros need not be read.
        let zero = StateFlags::from_bits_retain(*flags).contains(StateFlags::ZERO);
        let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
        match extents.last_mut() {
            _ if cut.is_empty() => {}
            Some(last) if last.kind == kind => last.range.end = cut.end,
            _ => extents.push(Extent { range: cut, kind }),
        }
    }
    extents
}

fn index(length: u64) -> usize {
    usize::try_from(length).expect("a part of what is in memory fits into memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_cut_and_joined() {
        let data = |length| Descriptor { length, flags: StateFlags::HOLE.bits() };
        let zero = |length| Descriptor { length, flags: (StateFlags::HOLE | StateFlags::ZERO).bits() };
        let extent = |range, kind| Extent { range, kind };
        assert_eq!(
            extents(&[data(10), data(5), zero(5), zero(100)], 100, &(103..125)),
            [extent(103..115, ExtentKind::Data), extent(115..125, ExtentKind::Hole)]
        );
        assert_eq!(extents(&[zero(4), data(u64::MAX)], 100, &(104..105)), [extent(104..105, ExtentKind::Data)]);
    }
}
