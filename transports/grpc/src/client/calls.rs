//! The calls of both protocols: from arguments to messages, and from replies to results.
//!
//! It does not cut requests; whoever calls keeps to what the server takes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use r3map_core::{Error, ErrorKind, Extent, ExtentKind, Operation, Result};
use tokio::runtime::Handle;
use tokio::sync::Mutex;

use crate::client::ClientSettings;
use crate::client::facts::{Facts, Protocol, SMALL};
use crate::client::links::{Links, OpenLink};
use crate::client::reply::Reply;
use crate::client::unflushed::{Mark, Unflushed};
use crate::message::{self, Malformed};
use crate::pass::Pass;
use crate::proto::{go, region};
use crate::rope::Rope;
use crate::target::Target;
use crate::{path, sum};

/// Calls to one server.
#[derive(Debug)]
pub(crate) struct Calls {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    links: Links,
    protocol: Protocol,
    unflushed: Unflushed,
    /// Held by the one sync of a Go server that is under way.
    syncing: Arc<Mutex<()>>,
}

impl Calls {
    pub(crate) async fn open(target: Target, settings: ClientSettings, pass: Arc<Pass>) -> Result<(Self, Facts)> {
        let (links, facts) = Links::open(target, settings, pass).await?;
        let shared =
            Shared { links, protocol: facts.protocol, unflushed: Unflushed::default(), syncing: Arc::default() };
        Ok((Self { shared: Arc::new(shared) }, facts))
    }

    pub(crate) fn target(&self) -> &Target {
        self.shared.links.target()
    }

    /// Bytes that have moved so far.
    pub(crate) fn moved(&self) -> u64 {
        self.shared.links.moved()
    }

    /// Reads ranges (offset and length). A Go server takes one.
    pub(crate) async fn read(&self, ranges: &[(u64, u64)]) -> Result<Reply> {
        match (self.shared.protocol, ranges) {
            (Protocol::Go, &[(offset, len)]) => self.shared.go_read(offset, len).await,
            (Protocol::Go, _) => Err(Error::new(ErrorKind::InvalidInput, Operation::Read, "one range at a time")),
            (Protocol::Region { .. }, _) => self.shared.region_read(ranges).await,
        }
    }

    /// Writes. The bytes are copied at once, so that the call does not end with the caller's buffer.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> impl Future<Output = Result<()>> + Send + use<> {
        let (shared, bytes) = (self.shared.clone(), Bytes::copy_from_slice(bytes));
        let len = bytes.len() as u64;
        async move {
            let result = match shared.protocol {
                Protocol::Region { .. } => shared.region_write(offset, bytes).await,
                Protocol::Go => shared.go_write(offset, bytes).await,
            };
            result.map_err(|error| error.at(offset, len))
        }
    }

    /// Trims or writes zeros.
    pub(crate) fn release(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let shared = self.shared.clone();
        let path = if operation == Operation::Trim { path::TRIM } else { path::WRITE_ZEROES };
        async move {
            let link = shared.links.first(operation).await?;
            let request = message::encode(&range_request(offset, length));
            let reply: Result<region::WriteReply> = shared.small(&link, operation, path, request).await;
            shared.written(operation, reply).map_err(|error| error.at(offset, length))
        }
    }

    pub(crate) async fn flush(&self) -> Result<()> {
        match self.shared.protocol {
            Protocol::Region { .. } => self.shared.flush().await,
            Protocol::Go => self.go_sync().await,
        }
    }

    /// Syncs a Go server, one call at a time and each to its end: the server tells of a loss once, and all are to hear of it
    /// who have asked by then, or whoever asks next where nobody waits.
    async fn go_sync(&self) -> Result<()> {
        let shared = self.shared.clone();
        let reports = shared.unflushed.reports();
        let turn = shared.syncing.clone().lock_owned().await;
        let mark = shared.unflushed.mark();
        let syncing = async move {
            let synced = shared.go_sync().await;
            if synced.as_ref().is_err_and(|error| !error.kind().is_retryable()) {
                shared.unflushed.lost();
            }
            drop(turn);
            synced
        };
        let synced = self.to_the_end(syncing).await;
        self.shared.go_synced(&mark, reports, synced)
    }

    pub(crate) async fn extents(&self, offset: u64, length: u64) -> Result<Vec<Extent>> {
        let link = self.shared.links.first(Operation::Extents).await?;
        let request = message::encode(&range_request(offset, length));
        let reply: region::ExtentsReply = self.shared.small(&link, Operation::Extents, path::EXTENTS, request).await?;
        extents(&reply, offset, length).ok_or_else(|| {
            let message = format!("{} answered with extents that do not fit the request", self.target());
            Error::new(ErrorKind::Corrupt, Operation::Extents, message).at(offset, length)
        })
    }

    /// Polls `call`, and lets it go on in the background if the future that this returns is dropped before its end.
    pub(crate) fn to_the_end<T: Send + 'static>(&self, call: impl Future<Output = T> + Send + 'static) -> ToTheEnd<T> {
        ToTheEnd { call: Some(Box::pin(call)), runtime: self.shared.links.runtime().clone() }
    }
}

impl Shared {
    async fn region_read(&self, ranges: &[(u64, u64)]) -> Result<Reply> {
        let ranges: Vec<_> = ranges.iter().map(|&(offset, length)| region::Range { offset, length }).collect();
        let asked: u64 = ranges.iter().map(|range| range.length).sum();
        // A run of at most 20 bytes for every 4 KiB and at each end of every range.
        let rest = SMALL + usize::try_from(asked / 64).unwrap_or(usize::MAX) + 64 * ranges.len();
        let request = message::encode(&region::ReadRequest { ranges });
        let open = self.links.next(Operation::Read).await?;
        let arriving = open.link.start(path::READ, request).await;
        let arriving = arriving.map_err(|error| error.into_error(Operation::Read, self.links.target()))?;
        Ok(Reply::region(open, arriving, asked, rest))
    }

    async fn go_read(&self, offset: u64, len: u64) -> Result<Reply> {
        let length = i32::try_from(len).unwrap_or(i32::MAX);
        let request = message::encode(&go::ReadAtArgs { length, off: offset.cast_signed() });
        let open = self.links.next(Operation::Read).await?;
        let arriving = open.link.start(self.links.go_read(), request).await;
        let arriving = arriving.map_err(|error| error.into_error(Operation::Read, self.links.target()))?;
        Ok(Reply::go(open, arriving, len))
    }

    /// A call whose reply carries no data.
    async fn small<M: prost::Message + Default>(
        &self,
        open: &OpenLink,
        operation: Operation,
        path: &'static str,
        request: Rope,
    ) -> Result<M> {
        let reply = open.link.call(path, request, SMALL).await;
        let reply = reply.map_err(|error| error.into_error(operation, self.links.target()))?;
        message::decode(reply.into_bytes()).map_err(|why| self.malformed(operation, why))
    }

    async fn region_write(&self, offset: u64, bytes: Bytes) -> Result<()> {
        let link = self.links.first(Operation::Write).await?;
        let head = region::WriteRequest { offset, crc32c: sum::write(offset, &bytes), data: Bytes::new() };
        let request = message::encode_bulk(&head, bytes.into());
        let reply: Result<region::WriteReply> = self.small(&link, Operation::Write, path::WRITE, request).await;
        self.written(Operation::Write, reply)
    }

    fn written(&self, operation: Operation, reply: Result<region::WriteReply>) -> Result<()> {
        let instance = self.instance(operation, &reply?.instance)?;
        self.unflushed.written(instance);
        Ok(())
    }

    async fn go_write(&self, offset: u64, bytes: Bytes) -> Result<()> {
        let link = self.links.first(Operation::Write).await?;
        let len = bytes.len();
        let head = go::WriteAtArgs { off: offset.cast_signed(), p: Bytes::new() };
        let request = message::encode_bulk(&head, bytes.into());
        let reply: go::WriteAtReply = self.small(&link, Operation::Write, path::GO_WRITE_AT, request).await?;
        if i64::from(reply.length) != len as i64 {
            let message = format!("{} wrote {} of {len} bytes", self.links.target(), reply.length);
            return Err(Error::new(ErrorKind::Corrupt, Operation::Write, message));
        }
        self.unflushed.written(link.serial);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let mark = self.unflushed.mark();
        let link = self.links.first(Operation::Flush).await?;
        let request = message::encode(&region::FlushRequest {});
        let reply: region::FlushReply = self.small(&link, Operation::Flush, path::FLUSH, request).await?;
        let instance = self.instance(Operation::Flush, &reply.instance)?;
        match self.unflushed.flushed(&mark, instance) {
            true => Ok(()),
            false => Err(self.lost("the server restarted since these writes, or what it serves did")),
        }
    }

    /// Over which connection it was done.
    async fn go_sync(&self) -> Result<u128> {
        let link = self.links.first(Operation::Flush).await?;
        let request = message::encode(&go::SyncArgs {});
        self.small::<go::SyncReply>(&link, Operation::Flush, path::GO_SYNC, request).await?;
        Ok(link.serial)
    }

    /// What an answer of a Go program to a flush means that was asked for after so many `reports`.
    fn go_synced(&self, mark: &Mark, reports: u64, synced: Result<u128>) -> Result<()> {
        match synced {
            Ok(serial) if self.unflushed.flushed(mark, serial) => match self.unflushed.reports() == reports {
                true => Ok(()),
                false => Err(self.lost("another flush of these writes has failed")),
            },
            Ok(_) => {
                self.unflushed.report(mark);
                Err(self.lost("the connection broke since these writes, or a flush of them has failed"))
            }
            Err(error) if error.kind().is_retryable() => Err(error),
            // It syncs a file. What that could not make durable once is not tried again, and the next sync succeeds.
            Err(error) => match self.unflushed.report(mark) {
                true => {
                    let message = format!("{}: these writes may be lost, write them again", error.message());
                    Err(Error::new(ErrorKind::Conflict, Operation::Flush, message))
                }
                false => Err(error),
            },
        }
    }

    fn lost(&self, what: &str) -> Error {
        let message = format!("{}: {what}: they may be lost, write them again", self.links.target());
        Error::new(ErrorKind::Conflict, Operation::Flush, message)
    }

    fn instance(&self, operation: Operation, bytes: &Bytes) -> Result<u128> {
        let bytes = bytes.as_ref().try_into();
        bytes.map(u128::from_be_bytes).map_err(|_| self.malformed(operation, Malformed("no instance of the server")))
    }

    fn malformed(&self, operation: Operation, why: Malformed) -> Error {
        let message = format!("{} answered with {}", self.links.target(), why.0);
        Error::new(ErrorKind::Corrupt, operation, message)
    }
}

fn range_request(offset: u64, length: u64) -> region::RangeRequest {
    region::RangeRequest { offset, length, crc32c: sum::range(offset, length) }
}

fn extents(reply: &region::ExtentsReply, offset: u64, length: u64) -> Option<Vec<Extent>> {
    if reply.crc32c != sum::extents(offset, length, &reply.extents) {
        return None;
    }
    let end = offset + length;
    let mut at = offset;
    let mut extents = Vec::with_capacity(reply.extents.len());
    for extent in &reply.extents {
        let next = at.checked_add(extent.length).filter(|next| (at + 1..=end).contains(next))?;
        let kind = if extent.hole { ExtentKind::Hole } else { ExtentKind::Data };
        extents.push(Extent { range: at..next, kind });
        at = next;
    }
    (at > offset || length == 0).then_some(extents)
}

type Call<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A call that goes on without its caller.
pub(crate) struct ToTheEnd<T: Send + 'static> {
    call: Option<Call<T>>,
    runtime: Handle,
}

impl<T: Send + 'static> Future for ToTheEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(call) = &mut self.call else { return Poll::Pending };
        let result = call.as_mut().poll(context);
        if result.is_ready() {
            self.call = None;
        }
        result
    }
}

impl<T: Send + 'static> Drop for ToTheEnd<T> {
    fn drop(&mut self) {
        if let Some(call) = self.call.take() {
            self.runtime.spawn(call);
        }
    }
}
