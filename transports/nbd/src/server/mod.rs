//! Regions for others: any backends, under names, over any byte stream.
//!
//! `Server` owns what runs: listeners and connections. `haggle` is a connection's handshake, `transmission` its
//! requests, `check` says which of them are refused, `answer` does the others, `lend` some without copying; `export` is what is served, `buffers`
//! bounds memory, of which each connection gets its part, `clock` notices who is too slow, `io` is what was
//! received and is to be sent.
//!
//! The server does not retry, cache or lock: two clients that write to the same bytes disturb each other as on a disk.

mod answer;
mod buffers;
mod check;
mod clock;
mod connection;
mod export;
mod haggle;
mod io;
mod lend;
mod listener;
mod transmission;

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::eager::Eager;
use crate::stream::Vanished;
use crate::uri::Address;
use crate::wire::{DEFAULT_MAX_PAYLOAD, ExportReply, Framing};
use buffers::Pool;
use connection::Connection;
use export::Exports;
use listener::{Accepted, Listener, PAUSE};

pub use export::ServerExport;

/// The smallest limit on a payload: any client may send so much (proto.md, "Size constraints").
const SMALLEST_PAYLOAD: u32 = 64 << 10;

/// Whether a [`Server`] speaks TLS. [`crate::tls::server_config`] makes the configuration.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    /// Never.
    #[default]
    Off,
    /// To clients that ask for it.
    Optional(Arc<ServerConfig>),
    /// To every client: before TLS, everything is refused.
    Required(Arc<ServerConfig>),
}

/// How a [`Server`] serves. Plain data; each field says its default.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// The export that clients get who name none. `None`, the default, takes the first.
    pub default_export: Option<String>,
    /// TLS. Off.
    pub tls: Tls,
    /// The most bytes of data in one request or reply. At least 64 KiB; 32 MiB.
    pub max_payload: u32,
    /// The most bytes of data of one connection's requests and replies that are in memory at once; more requests wait.
    /// At least `max_payload`. 64 MiB.
    pub connection_in_flight: u64,
    /// The same over all connections. At least `connection_in_flight`. The more of it is taken, the less each connection
    /// gets, so that clients that never read their replies hold up no others: about forty of them, if requests are no
    /// longer than a 500th of this. 512 MiB.
    pub in_flight: u64,
    /// The most requests of one connection that are done at once; more wait. 256.
    pub requests: NonZeroUsize,
    /// The most connections at once; more wait to be accepted. 256.
    pub connections: NonZeroUsize,
    /// How long a client may take from connecting to choosing an export. 30 s.
    pub handshake_limit: Duration,
    /// How long a client may leave off in the middle of a request that it sends or a reply that it receives, and how long
    /// one that stops sending without saying goodbye may still wait for answers. Over TCP also how long one keeps its
    /// place that has vanished without a word, also if it was idle. 2 min.
    pub stall_limit: Duration,
    /// How many bytes a second are as good as none: a client that sends a request or receives replies more slowly is
    /// taken for one that has left off. One that does so at half of this rate is sent away after some twice the
    /// `stall_limit`, one that sends a byte now and then after half as long again as the limit. 1 KiB.
    pub least_rate: NonZeroU32,
    /// How long a client may ask for nothing. `None`, the default, is for ever: a mounted device may be idle for days.
    pub idle_limit: Option<Duration>,
}

impl Default for ServerSettings {
    fn default() -> Self {
        let count = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        Self {
            default_export: None,
            tls: Tls::Off,
            max_payload: DEFAULT_MAX_PAYLOAD,
            connection_in_flight: 64 << 20,
            in_flight: 512 << 20,
            requests: count(256),
            connections: count(256),
            handshake_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(120),
            least_rate: NonZeroU32::new(1 << 10).unwrap_or(NonZeroU32::MIN),
            idle_limit: None,
        }
    }
}

impl ServerSettings {
    fn check(&self) -> Result<()> {
        let Self { max_payload, connection_in_flight, in_flight, .. } = *self;
        let wrong = if max_payload < SMALLEST_PAYLOAD {
            format!("a largest payload of {max_payload} bytes is below 64 KiB, which any client may send")
        } else if connection_in_flight < u64::from(max_payload) {
            format!("{connection_in_flight} bytes in flight cannot hold a payload of {max_payload}")
        } else if in_flight < connection_in_flight {
            format!("{in_flight} bytes in flight over all are fewer than the {connection_in_flight} of one connection")
        } else if self.stall_limit.is_zero() || self.idle_limit.is_some_and(|limit| limit.is_zero()) {
            "a time limit of nothing lets nobody do anything".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidInput, Operation::Open, wrong))
    }
}

/// Serves backends. Dropping it ends everything at once, in the middle of requests; [`Server::close`] lets them end.
pub struct Server {
    shared: Arc<Shared>,
    tasks: TaskTracker,
}

/// What all connections share.
pub(crate) struct Shared {
    exports: Exports,
    settings: ServerSettings,
    pool: Arc<Pool>,
    connections: Arc<Semaphore>,
    connected: AtomicUsize,
    /// Listeners end, and connections when what they do is answered.
    closing: CancellationToken,
    /// Everything ends.
    ending: CancellationToken,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("connections", &self.connections()).finish_non_exhaustive()
    }
}

impl Server {
    /// A server that does not listen yet.
    ///
    /// # Errors
    /// `InvalidInput`: no export, two of one name, a name that is too long, a backend that takes whole chunks only,
    /// settings that contradict each other.
    pub fn new(exports: Vec<ServerExport>, settings: ServerSettings) -> Result<Self> {
        settings.check()?;
        let shared = Shared {
            exports: Exports::new(exports, settings.default_export.as_deref(), settings.max_payload)?,
            pool: Pool::new(settings.in_flight, settings.connection_in_flight),
            connections: Arc::new(Semaphore::new(settings.connections.get().min(Semaphore::MAX_PERMITS))),
            connected: AtomicUsize::new(0),
            closing: CancellationToken::new(),
            ending: CancellationToken::new(),
            settings,
        };
        Ok(Self { shared: Arc::new(shared), tasks: TaskTracker::new() })
    }

    /// Listens, also on more than one address, and serves on the current tokio runtime from now on. Returns the address
    /// that it listens on, with the port that the system chose where 0 was given.
    ///
    /// A Unix socket is made with mode 0600. One that a server left behind when it was killed is replaced; one that
    /// somebody listens on is not.
    ///
    /// # Errors
    /// Names the address: `Conflict` if it is in use, `Denied`, `InvalidInput` if it is no address of this host.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn listen(&self, address: &Address) -> Result<Address> {
        let listener = Listener::bind(address).await?;
        let bound = listener.address().clone();
        let accepting = accept_all(listener, self.shared.clone(), self.tasks.clone());
        let closing = self.shared.closing.clone();
        self.tasks.spawn(async move { closing.run_until_cancelled(accepting).await });
        Ok(bound)
    }

    /// Serves one client over a stream that is connected already, from the greeting on, in a task of its own that the
    /// handle is of. Such connections count, but do not wait for others to end.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn serve<S>(&self, stream: S) -> JoinHandle<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let connection = Connection::new(self.shared.clone(), "a stream".to_owned());
        self.tasks.spawn(async move { connection.serve(stream).await })
    }

    /// As [`Server::serve`], for a client that makes no handshake, such as a kernel that was given the other end of a
    /// socket pair: says what the export is, and begins with its first request, in compact headers and simple replies.
    ///
    /// # Errors
    /// `NotFound` if there is no such export.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn serve_export<S>(&self, stream: S, export: &str) -> Result<(ExportReply, JoinHandle<()>)>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(served) = self.shared.exports.find(export).cloned() else {
            let message = format!("there is no export {export:?}");
            return Err(Error::new(ErrorKind::NotFound, Operation::Open, message));
        };
        let facts = ExportReply { size: served.size, flags: served.flags(Framing::Simple, false) };
        let connection = Connection::new(self.shared.clone(), "a stream".to_owned());
        Ok((facts, self.tasks.spawn(async move { connection.transmit_only(stream, served).await })))
    }

    /// How many clients are connected.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connected.load(Ordering::Relaxed)
    }

    /// Stops listening, answers the requests that have arrived, and waits for that, but not longer than `limit`. It does
    /// not flush the backends.
    ///
    /// # Errors
    /// `Cancelled` if requests had to be ended at the limit.
    pub async fn close(self, limit: Duration) -> Result<()> {
        self.shared.closing.cancel();
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_ok() {
            return Ok(());
        }
        self.shared.ending.cancel();
        self.tasks.wait().await;
        let message = format!("requests were still in progress after {} s and were ended", limit.as_secs_f32());
        Err(Error::new(ErrorKind::Cancelled, Operation::Close, message))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closing.cancel();
        self.shared.ending.cancel();
    }
}

/// Serves each connection in a task of its own, for ever.
async fn accept_all(listener: Listener, shared: Arc<Shared>, tasks: TaskTracker) {
    loop {
        let Ok(permit) = shared.connections.clone().acquire_owned().await else { return };
        match listener.accept(Vanished::Within(shared.settings.stall_limit)).await {
            Ok((accepted, peer)) => {
                let connection = Connection::new(shared.clone(), peer);
                tasks.spawn(async move {
                    match accepted {
                        Accepted::Tcp(stream) => connection.serve(Eager::new(stream)).await,
                        Accepted::Unix(stream) => connection.serve(Eager::new(stream)).await,
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection on {}: {error}", listener.address());
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
