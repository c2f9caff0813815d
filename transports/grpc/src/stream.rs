//! A connected socket of either kind, which counts what goes over it, so that somebody can tell whether the peer lives.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use r3map_core::{Error, Result};
use r3map_sys::socket::unacknowledged;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host};

use crate::target::Target;

/// How long a connection may be idle before TCP asks whether the peer is there.
const IDLE_BEFORE_PROBE: Duration = Duration::from_secs(15);
/// How often it asks again, and how many times.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;
/// How long sent bytes may go unacknowledged, in milliseconds, before TCP gives the connection up.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// Bytes that went over a connection so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    received: AtomicU64,
    /// Given to the kernel, which may have them for long.
    sent: AtomicU64,
    /// To ask the kernel with, for as long as the connection is open.
    socket: Mutex<Option<OwnedFd>>,
}

impl Traffic {
    /// Bytes that came.
    pub(crate) fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Bytes that were sent and have arrived, and how many are still under way. Of a connection that is closed nothing is.
    pub(crate) fn delivered(&self) -> (u64, u64) {
        let under_way = self.0.socket().as_ref().map_or(0, |socket| unacknowledged(socket).unwrap_or(0));
        (self.0.sent.load(Ordering::Relaxed).saturating_sub(under_way), under_way)
    }

    fn count_sent(&self, result: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(count)) = result {
            self.0.sent.fetch_add(*count as u64, Ordering::Relaxed);
        }
    }
}

impl Counters {
    fn socket(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Socket,
    traffic: Traffic,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

macro_rules! socket {
    ($stream:expr, $socket:ident => $call:expr) => {
        match &mut $stream.get_mut().socket {
            Socket::Tcp($socket) => $call,
            Socket::Unix($socket) => $call,
        }
    };
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The peer is told of the end when the last descriptor is closed.
        self.traffic.0.socket().take();
    }
}

impl Stream {
    /// Connects, trying each address of a name in turn. Takes as long as the system lets it: limit it from outside.
    ///
    /// # Errors
    /// Names the target. `Unavailable` if nobody answers there now.
    pub(crate) async fn connect(target: &Target) -> Result<Self> {
        let result = match target {
            Target::Tcp { host, port } => connect_any(host, *port).await,
            Target::Unix(path) => UnixStream::connect(path).await.and_then(Self::unix),
        };
        result.map_err(|error| Error::unreachable(target, error))
    }

    /// A handle to the count of what this receives and sends.
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }
}

async fn connect_any(host: &str, port: u16) -> io::Result<Stream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, port)).await?.collect::<Vec<SocketAddr>>() {
        match TcpStream::connect(address).await {
            Ok(stream) => return Stream::tcp(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl Stream {
    /// Sends at once, and notices a peer that is gone without a word.
    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Self> {
        sockopt::set_tcp_nodelay(&stream, true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, IDLE_BEFORE_PROBE)?;
        sockopt::set_tcp_keepintvl(&stream, PROBE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&stream, PROBES)?;
        sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED_MS)?;
        let traffic = watched(&stream)?;
        Ok(Self { socket: Socket::Tcp(stream), traffic })
    }

    /// Takes a connected Unix socket.
    pub(crate) fn unix(stream: UnixStream) -> io::Result<Self> {
        let traffic = watched(&stream)?;
        Ok(Self { socket: Socket::Unix(stream), traffic })
    }
}

fn watched(socket: &impl AsFd) -> io::Result<Traffic> {
    let socket = Mutex::new(Some(socket.as_fd().try_clone_to_owned()?));
    Ok(Traffic(Arc::new(Counters { socket, ..Counters::default() })))
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = socket!(self.as_mut(), socket => Pin::new(socket).poll_read(context, buf));
        let count = buf.filled().len() - before;
        self.traffic.0.received.fetch_add(count as u64, Ordering::Relaxed);
        result
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = socket!(self.as_mut(), socket => Pin::new(socket).poll_write(context, buf));
        self.traffic.count_sent(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = socket!(self.as_mut(), socket => Pin::new(socket).poll_write_vectored(context, bufs));
        self.traffic.count_sent(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Sockets have no buffer of their own on this side of the kernel.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        socket!(self, socket => Pin::new(socket).poll_shutdown(context))
    }
}
