//! What a client learns about a region when it connects, and whether it is still the same region when it connects
//! again.

use bytes::Bytes;
use r3map_core::{ChunkSize, Error, ErrorKind, Geometry, MAX_REGION_SIZE, Operation, Result};
use tonic::Code;

use crate::client::link::{CallError, Link};
use crate::client::{ClientSettings, GoRegion, GoRequests};
use crate::message;
use crate::proto::{go, region};
use crate::target::Target;
use crate::{VERSION, path};

/// Room for a reply that carries no data.
pub(crate) const SMALL: usize = 64 << 10;
/// The longest request that is worth sending, unless a chunk is longer: beyond it only memory is lost.
const LONGEST: u64 = 32 << 20;
/// The longest message that the Go programs take, less the fields beside the data.
const GO_LONGEST: u64 = (4 << 20) - 32;

/// What a server said about its region, or the user where it cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) protocol: Protocol,
    pub(crate) geometry: Geometry,
    pub(crate) whole_chunks: bool,
    pub(crate) read_only: bool,
    /// The most bytes in one request.
    pub(crate) max_request: u64,
    pub(crate) trim: bool,
    pub(crate) write_zeroes: bool,
    pub(crate) extents: bool,
    region: Bytes,
}

/// Which service the server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Ours; with the most ranges in one read.
    Region { max_ranges: usize },
    /// That of the Go programs.
    Go,
}

/// Asks the server what it is. `id` names the link, `epoch` counts its connections; `settings` have what the user says
/// about a Go server's region.
///
/// # Errors
/// `InvalidInput` for another version, for a server that has neither service, and for a Go server of which the user
/// told nothing or too large a size; otherwise as the call.
pub(crate) async fn describe(link: &Link, id: [u8; 16], epoch: u64, settings: &ClientSettings) -> Result<Facts> {
    match ask(link, Bytes::copy_from_slice(&id), epoch).await {
        Ok(reply) => Facts::new(&reply, link.target()),
        Err(CallError::Status(status)) if status.code() == Code::Unimplemented => probe(link, settings).await,
        Err(error) => Err(error.into_error(Operation::Open, link.target())),
    }
}

async fn ask(link: &Link, id: Bytes, epoch: u64) -> Result<region::DescribeReply, CallError> {
    let (major, minor) = VERSION;
    let request = region::DescribeRequest { major, minor, link: id, epoch };
    let reply = link.call(path::DESCRIBE, message::encode(&request), SMALL).await?;
    message::decode(reply.into_bytes()).map_err(|why| CallError::Malformed(format!("answered with {}", why.0)))
}

/// Reads the last chunk from a Go server, as a Go client would, to see that it is one and has the size.
pub(super) async fn probe(link: &Link, settings: &ClientSettings) -> Result<Facts> {
    let target = link.target();
    let Some(GoRegion { size, chunk_size, requests }) = settings.go else {
        let message = format!(
            "{target} speaks only the protocol of the Go programs, which does not tell the region's size: pass --size"
        );
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    };
    let geometry = Geometry::new(size, chunk_size)?;
    if requests == GoRequests::OneChunk && chunk_size.bytes() > GO_LONGEST {
        let message = format!(
            "a chunk of {chunk_size} does not fit a message of the Go programs, which has less than 4 MiB: give both sides a \
             smaller chunk size, or let the server cut requests into chunks (`chunking=server`)"
        );
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    }
    let facts = Facts {
        protocol: Protocol::Go,
        geometry,
        whole_chunks: requests == GoRequests::OneChunk,
        read_only: settings.go_seeder,
        max_request: if requests == GoRequests::OneChunk { chunk_size.bytes() } else { GO_LONGEST },
        trim: false,
        write_zeroes: false,
        extents: false,
        region: Bytes::new(),
    };
    let last = geometry.chunk_range(geometry.chunk_count() - 1);
    let (offset, len) = (last.start, (last.end - last.start).min(GO_LONGEST));
    let args = go::ReadAtArgs { length: i32::try_from(len).unwrap_or(i32::MAX), off: offset.cast_signed() };
    match link.call(settings.go_read(), message::encode(&args), SMALL + args.length as usize).await {
        Ok(_) => Ok(facts),
        Err(CallError::Status(status)) if status.code() == Code::Unimplemented => {
            let message = format!("{target} speaks gRPC, but serves no r3map region");
            Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message))
        }
        Err(error) => {
            let error = error.into_error(Operation::Open, target);
            Err(error.context("the region's last chunk cannot be read").at(offset, len))
        }
    }
}

impl Facts {
    /// What the region is, where the server says it.
    pub(crate) fn identity(&self) -> Option<&[u8]> {
        (!self.region.is_empty()).then_some(&self.region[..])
    }

    fn new(reply: &region::DescribeReply, target: &Target) -> Result<Self> {
        let refuse = |message| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        let (major, minor) = VERSION;
        if reply.major != major {
            return refuse(format!(
                "{target} speaks version {}.{} of the r3map protocol and this program version {major}.{minor}: use \
                 programs of the same major version on both sides",
                reply.major, reply.minor
            ));
        }
        let chunk = ChunkSize::new(reply.chunk_size.into());
        let (Ok(chunk), 1..=MAX_REGION_SIZE, 1.., 1..) = (chunk, reply.size, reply.max_request, reply.max_ranges)
        else {
            let message = format!("{target} describes a region that cannot be: {reply:?}");
            return Err(Error::new(ErrorKind::Corrupt, Operation::Open, message));
        };
        Ok(Self {
            protocol: Protocol::Region { max_ranges: reply.max_ranges as usize },
            geometry: Geometry::new(reply.size, chunk)?,
            whole_chunks: reply.whole_chunks,
            read_only: reply.read_only,
            max_request: reply.max_request.min(LONGEST.max(chunk.bytes())),
            trim: reply.trim,
            write_zeroes: reply.write_zeroes,
            extents: reply.extents,
            region: reply.region.clone(),
        })
    }

    /// Whether the server has our own service.
    pub(crate) fn is_ours(&self) -> bool {
        self.protocol != Protocol::Go
    }

    /// Checks that `now` describes the region that this describes.
    ///
    /// # Errors
    /// `Conflict` if not.
    pub(crate) fn same_region(&self, now: &Self, target: &Target) -> Result<()> {
        let (size, chunk) = (self.geometry.size(), self.geometry.chunk_size());
        let (size_now, chunk_now) = (now.geometry.size(), now.geometry.chunk_size());
        let what = if size != size_now {
            format!("has {size_now} bytes where it had {size}")
        } else if chunk != chunk_now {
            format!("has chunks of {chunk_now} where it had {chunk}")
        } else if (self.is_ours(), &self.region) != (now.is_ours(), &now.region) {
            "is not the one that was there before".to_owned()
        } else {
            return Ok(());
        };
        let message = format!("the region that {target} serves now {what}: open it anew");
        Err(Error::new(ErrorKind::Conflict, Operation::Open, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> region::DescribeReply {
        region::DescribeReply {
            major: 1,
            size: 1 << 40,
            chunk_size: 64 << 10,
            max_request: u64::MAX,
            max_ranges: 1,
            ..region::DescribeReply::default()
        }
    }

    fn facts(reply: &region::DescribeReply) -> Facts {
        Facts::new(reply, &"host:1".parse().unwrap()).unwrap()
    }

    #[test]
    fn requests_are_no_longer_than_either_side_wants_but_hold_a_whole_chunk() {
        assert_eq!(facts(&reply()).max_request, LONGEST);
        assert_eq!(facts(&region::DescribeReply { max_request: 5, ..reply() }).max_request, 5);
        let chunk = region::DescribeReply { chunk_size: 64 << 20, whole_chunks: true, ..reply() };
        assert_eq!(facts(&chunk).max_request, 64 << 20);
    }
}
