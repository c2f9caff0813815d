//! A byte stream to a peer: TCP, a Unix socket, whatever the caller brings, and TLS over each.
//!
//! It connects and sets socket options; it knows nothing of the protocol.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use r3map_core::{Error, Result};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio_rustls::client::TlsStream;

use crate::eager::Eager;
use crate::uri::Address;

/// How often TCP asks whether an idle peer is there, before the peer is given up: the first time after half of the limit.
const PROBES: u32 = 3;
/// The least and the most that Linux takes for the times between, in whole seconds.
const PROBE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(32_767)];

/// Any byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// A connection to a server.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Other(Box<dyn Duplex>),
    Tls(Box<TlsStream<Stream>>),
}

/// The half that is read.
pub(crate) type Reading = Box<dyn AsyncRead + Send + Unpin>;
/// The half that is written.
pub(crate) type Writing = Box<dyn AsyncWrite + Send + Unpin>;

impl Stream {
    /// Connects, trying each address of a name in turn. Takes as long as the system lets it: limit it from outside.
    ///
    /// # Errors
    /// Names the address. `Unavailable` if nobody answers there now.
    pub(crate) async fn connect(address: &Address, vanished: Vanished) -> Result<Self> {
        let result = match address {
            Address::Tcp { host, port } => connect_any(host, *port, vanished).await,
            Address::Unix(path) => UnixStream::connect(path).await.map(Self::Unix),
        };
        result.map_err(|error| Error::unreachable(address, error))
    }

    /// The socket itself, for somebody else to go on with; nothing if bytes go through this process (TLS).
    ///
    /// # Errors
    /// When the runtime does not let go of it.
    pub(crate) fn into_socket(self) -> io::Result<Option<OwnedFd>> {
        match self {
            Self::Tcp(stream) => Ok(Some(stream.into_std()?.into())),
            Self::Unix(stream) => Ok(Some(stream.into_std()?.into())),
            Self::Other(_) | Self::Tls(_) => Ok(None),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// To ask the kernel with what has arrived at the other side, where it is a socket.
    pub(crate) fn socket(&self) -> Option<OwnedFd> {
        match self {
            Self::Tcp(stream) => stream.as_fd().try_clone_to_owned().ok(),
            Self::Unix(stream) => stream.as_fd().try_clone_to_owned().ok(),
            Self::Tls(stream) => stream.get_ref().0.socket(),
            Self::Other(_) => None,
        }
    }

    /// Both halves, for use from different tasks.
    pub(crate) fn split(self) -> (Reading, Writing) {
        match self {
            Self::Tcp(stream) => {
                let (reading, writing) = stream.into_split();
                (Box::new(Eager::new(reading)), Box::new(writing))
            }
            Self::Unix(stream) => {
                let (reading, writing) = stream.into_split();
                (Box::new(Eager::new(reading)), Box::new(writing))
            }
            other => {
                let (reading, writing) = tokio::io::split(other);
                (Box::new(reading), Box::new(writing))
            }
        }
    }
}

async fn connect_any(host: &str, port: u16, vanished: Vanished) -> io::Result<Stream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, port)).await?.collect::<Vec<SocketAddr>>() {
        match TcpStream::connect(address).await {
            Ok(stream) => return options(stream, vanished).map(Stream::Tcp),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// When TCP gives up a peer that is gone without a word: it lost its power, or the way to it is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Vanished {
    /// So long after it last took what was sent, or answered whether it is there. One that is there, and takes nothing
    /// for so long, is given up too: TCP does not tell them apart.
    Within(Duration),
    /// So long after it was last heard of, while nothing is under way to it. For what is, whoever waits for the answer
    /// has a limit of their own.
    WhenIdle(Duration),
}

/// Sends at once, and notices a peer that has vanished.
pub(crate) fn options(stream: TcpStream, vanished: Vanished) -> io::Result<TcpStream> {
    let (Vanished::Within(limit) | Vanished::WhenIdle(limit)) = vanished;
    let [least, most] = PROBE;
    sockopt::set_tcp_nodelay(&stream, true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, (limit / 2).clamp(least, most))?;
    sockopt::set_tcp_keepintvl(&stream, (limit / 2 / PROBES).clamp(least, most))?;
    sockopt::set_tcp_keepcnt(&stream, PROBES)?;
    if let Vanished::Within(limit) = vanished {
        sockopt::set_tcp_user_timeout(&stream, milliseconds(limit))?;
    }
    Ok(stream)
}

/// A limit as TCP wants it: never nothing, which would be the system's own, a quarter of an hour or more.
pub(crate) fn milliseconds(limit: Duration) -> u32 {
    i32::try_from(limit.as_millis()).map_or(i32::MAX.unsigned_abs(), i32::unsigned_abs).max(1)
}

macro_rules! each {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream.get_mut() {
            Stream::Tcp($inner) => $call,
            Stream::Unix($inner) => $call,
            Stream::Other($inner) => $call,
            Stream::Tls($inner) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_read(context, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write(context, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, inner => Pin::new(inner).poll_write_vectored(context, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(inner) => inner.is_write_vectored(),
            Self::Unix(inner) => inner.is_write_vectored(),
            Self::Other(inner) => inner.is_write_vectored(),
            Self::Tls(inner) => inner.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, inner => Pin::new(inner).poll_shutdown(context))
    }
}
