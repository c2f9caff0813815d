//! From a server's name to connections that the kernel can go on with: the handshake, and what it says of the export.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};

use super::{Disk, LARGEST_BLOCK, SECTOR, block_size, part};
use crate::client::facts::Facts;
use crate::client::links::{Source, in_time};
use crate::stream::Vanished;
use crate::uri::{Address, NbdUri};
use crate::wire::TransmissionFlags;

/// The longest request in bytes that the kernel makes by itself: `max_sectors_kb` of its queue, which root may raise.
const LONGEST_REQUEST: u32 = 128 << 10;

/// How long a server that has vanished without a word is not missed on an idle connection.
const SILENCE: Duration = Duration::from_secs(30);

/// Connects to a server as often as is wanted, and as the server allows ([`TransmissionFlags::CAN_MULTI_CONN`]), and
/// begins transmission with simple replies on each. Where that comes to nothing, the server is told goodbye.
///
/// # Errors
/// As [`crate::Client::connect`]; `InvalidInput` where the server has TLS, which the kernel does not speak, and for an
/// export that is no block device: a size that is no multiple of 512, blocks of more than 4096.
///
/// # Panics
/// Outside a tokio runtime.
pub async fn connect(uri: NbdUri, connections: NonZeroUsize, limit: Duration) -> Result<(Vec<OwnedFd>, Disk)> {
    if uri.tls.is_some() {
        let what =
            format!("{}: the kernel does not speak TLS; a mount does: r3map mount nbds://… --as block", uri.address);
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, what));
    }
    let peer = uri.address.clone();
    let source = Source::server(uri)?;
    let mut sockets = Vec::new();
    match connect_all(&source, &peer, connections, limit, &mut sockets).await {
        Ok(disk) => Ok((sockets, disk)),
        Err(why) => {
            part(&sockets);
            Err(why)
        }
    }
}

async fn connect_all(
    source: &Source,
    peer: &Address,
    connections: NonZeroUsize,
    limit: Duration,
    sockets: &mut Vec<OwnedFd>,
) -> Result<Disk> {
    let (first, facts) = in_time(limit, peer, one(source)).await?;
    sockets.push(first);
    let disk = disk(&facts, peer)?;
    let wanted = if facts.has(TransmissionFlags::CAN_MULTI_CONN) { connections.get() } else { 1 };
    while sockets.len() < wanted {
        let (socket, other) = in_time(limit, peer, one(source)).await?;
        sockets.push(socket);
        facts.same_region(&other, source)?;
    }
    Ok(disk)
}

async fn one(source: &Source) -> Result<(OwnedFd, Facts)> {
    let (stream, facts) = source.greet(Vanished::WhenIdle(SILENCE)).await?.go_plainly(source.export()).await?;
    let failed = |error| Error::from_io(Operation::Open, "the connection cannot be handed over", error);
    let socket = stream.into_socket().map_err(failed)?.expect("a plain connection is a socket");
    Ok((socket, facts))
}

/// The block device that an export makes.
fn disk(facts: &Facts, peer: &dyn std::fmt::Display) -> Result<Disk> {
    let refuse = |what: String| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, format!("{peer}: {what}")));
    let Some(block_size) = block_size(facts.size) else {
        return refuse(format!("the export has {} bytes: a block device has a multiple of {SECTOR}", facts.size));
    };
    if facts.minimum() > LARGEST_BLOCK.min(block_size).into() {
        return refuse(format!("the export has blocks of {} bytes: too large for the kernel", facts.minimum()));
    }
    if facts.longest() < LONGEST_REQUEST.into() {
        return refuse(format!("the server takes only {} bytes at once: too few for the kernel", facts.longest()));
    }
    Ok(Disk { size: facts.size, block_size, flags: facts.flags })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BlockSizes, Framing};

    fn facts(size: u64, blocks: Option<BlockSizes>) -> Facts {
        Facts { size, flags: TransmissionFlags::HAS_FLAGS, framing: Framing::Simple, allocation: None, blocks }
    }

    #[test]
    fn an_export_becomes_the_device_with_the_largest_blocks() {
        for (size, block) in [(1 << 20, 4096), (4096 + 512, 512), (4096 + 1024, 1024), (512, 512)] {
            let made = disk(&facts(size, None), &"x").unwrap();
            assert_eq!((made.size, made.block_size), (size, block));
        }
    }

    #[test]
    fn what_is_no_block_device_is_refused() {
        let sizes = |minimum, maximum| Some(BlockSizes { minimum, preferred: 4096.max(minimum), maximum });
        for (wrong, why) in [
            (facts(1000, None), "multiple of 512"),
            (facts(4096 * 3, sizes(8192, 1 << 25)), "too large"),
            (facts(512 * 9, sizes(4096, 1 << 25)), "too large"),
            (facts(1 << 20, sizes(1, 64 << 10)), "too few"),
        ] {
            let error = disk(&wrong, &"x").unwrap_err();
            assert!(error.message().contains(why), "{error}");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
}
