//! The connections of a client: opens them when they are needed, again after they broke, and makes sure that what is
//! behind them is still the same region.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, Shared};
use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::client::ClientSettings;
use crate::client::facts::Facts;
use crate::client::handshake::{Handshake, Tls};
use crate::client::link::{Link, lock};
use crate::client::unflushed::Unflushed;
use crate::stream::{Duplex, Stream, Vanished};
use crate::tls;
use crate::uri::{NbdUri, VerifyPeer};
use crate::wire::TransmissionFlags;

/// How long a connection beyond the first is not tried again after it failed: servers may take only so many.
const PAUSE: Duration = Duration::from_secs(30);

/// How many times the limit on silence TCP waits for a server that has vanished. After a break that is shorter it still
/// hears that this side has closed, and so this side whether it has done what was under way: nobody need wait for that
/// as long as for one that is gone.
const TCP_WAITS: u32 = 2;

/// A client's connections.
#[derive(Debug)]
pub(crate) struct Links {
    opener: Arc<Opener>,
    /// More than one only where the server shares its cache between connections.
    slots: Vec<Slot>,
}

#[derive(Debug, Default)]
struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The connection, or the attempt to open it that everyone waits for.
    opening: Option<Opening>,
    /// When it was last tried.
    tried: Option<Instant>,
}

type Opening = Shared<BoxFuture<'static, Result<Arc<Link>>>>;

/// Where connections come from.
pub(crate) enum Source {
    /// A server that can be called again.
    Server(NbdUri, Option<Tls>),
    /// This stream, once.
    Stream(Mutex<Option<Box<dyn Duplex>>>, String),
}

#[derive(Debug)]
pub(crate) struct Opener {
    source: Source,
    settings: ClientSettings,
    runtime: Handle,
    facts: OnceLock<Facts>,
    unflushed: Arc<Unflushed>,
    /// What moved over connections that are no more.
    moved: AtomicU64,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server(uri, _) => f.debug_tuple("Server").field(uri).finish(),
            Self::Stream(..) => f.debug_tuple("Stream").finish_non_exhaustive(),
        }
    }
}

/// Whether a server must prove who it is.
fn verify(peer: VerifyPeer) -> Result<bool> {
    match peer {
        VerifyPeer::No => Ok(false),
        VerifyPeer::Yes => Ok(true),
        VerifyPeer::IfShown => {
            let message = "tls-verify-peer=optional is for a listener: servers always show a certificate";
            Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message))
        }
    }
}

impl Source {
    /// A server, with the certificates that its URI names.
    ///
    /// # Errors
    /// As [`tls::client_config`].
    pub(crate) fn server(uri: NbdUri) -> Result<Self> {
        let tls = match &uri.tls {
            None => None,
            Some(options) => Some(Tls {
                config: tls::client_config(options.certificates.as_deref(), verify(options.verify_peer)?)?,
                name: tls::server_name(uri.tls_name())?,
                optional: options.optional,
            }),
        };
        Ok(Self::Server(uri, tls))
    }

    pub(crate) fn stream(stream: Box<dyn Duplex>, export: String) -> Self {
        Self::Stream(Mutex::new(Some(stream)), export)
    }

    pub(crate) fn export(&self) -> &str {
        match self {
            Self::Server(uri, _) => &uri.export,
            Self::Stream(_, export) => export,
        }
    }

    /// Connects, as far as the end of TLS. Over TCP a server that vanishes is given up as `vanished` says.
    pub(crate) async fn greet(&self, vanished: Vanished) -> Result<Handshake<'_>> {
        match self {
            Self::Server(uri, tls) => {
                let stream = Stream::connect(&uri.address, vanished).await?;
                Handshake::begin(stream, &uri.address, tls.as_ref()).await
            }
            Self::Stream(stream, _) => {
                let stream = lock(stream).take().ok_or_else(|| {
                    Error::new(
                        ErrorKind::Unavailable,
                        Operation::Open,
                        "the connection is lost, and cannot be made again",
                    )
                })?;
                Handshake::begin(Stream::Other(stream), &"the server", None).await
            }
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server(uri, _) => uri.address.fmt(f),
            Self::Stream(..) => f.write_str("the server"),
        }
    }
}

impl Links {
    /// Opens the first connection.
    ///
    /// # Errors
    /// As [`crate::Client::connect`].
    pub(crate) async fn open(source: Source, settings: ClientSettings) -> Result<Self> {
        let connections = settings.connections.get();
        let opener = Arc::new(Opener {
            source,
            settings,
            runtime: Handle::current(),
            facts: OnceLock::new(),
            unflushed: Arc::default(),
            moved: AtomicU64::new(0),
        });
        let mut links = Self { opener, slots: vec![Slot::default()] };
        links.any(Operation::Open).await?;
        if links.facts().has(TransmissionFlags::CAN_MULTI_CONN) && matches!(links.opener.source, Source::Server(..)) {
            links.slots.resize_with(connections, Slot::default);
        }
        Ok(links)
    }

    /// What the first connection said, and all others must.
    pub(crate) fn facts(&self) -> &Facts {
        self.opener.facts.get().expect("an open link has told them")
    }

    /// What the server is called in errors.
    pub(crate) fn peer(&self) -> &(impl std::fmt::Display + use<>) {
        &self.opener.source
    }

    pub(crate) fn unflushed(&self) -> &Unflushed {
        &self.opener.unflushed
    }

    /// Bytes that have moved over all of the connections so far.
    pub(crate) fn moved(&self) -> u64 {
        let last = self.slots.iter().filter_map(Slot::last);
        last.map(|link| link.moved()).sum::<u64>() + self.opener.moved.load(Ordering::Relaxed)
    }

    /// The open connection with the least to do; opens the first one if there is none, and another one in the background
    /// if all are busy.
    ///
    /// # Errors
    /// `Unavailable` if there is no connection and none can be made now; `Conflict` if another region is there now.
    pub(crate) async fn any(&self, operation: Operation) -> Result<Arc<Link>> {
        match self.open_ones().into_iter().map(|link| (link.load(), link)).min_by_key(|(load, _)| *load) {
            Some((0, link)) => Ok(link),
            Some((_, link)) => {
                self.slots.iter().skip(1).find(|slot| slot.begin_if_due(&self.opener));
                Ok(link)
            }
            None => {
                let result = self.slots[0].opening(&self.opener).await;
                result.map_err(|error| Error::new(error.kind(), operation, error.reason()))
            }
        }
    }

    /// The connections that are open, oldest first.
    pub(crate) fn open_ones(&self) -> Vec<Arc<Link>> {
        let mut links: Vec<_> = self.slots.iter().filter_map(Slot::get).collect();
        links.sort_by_key(|link| link.name());
        links
    }
}

impl Slot {
    /// The connection, if there is or was one.
    fn last(&self) -> Option<Arc<Link>> {
        let opening = lock(&self.0).opening.clone()?;
        opening.now_or_never()?.ok()
    }

    /// The connection, if it is open.
    fn get(&self) -> Option<Arc<Link>> {
        self.last().filter(|link| link.is_open())
    }

    /// What is being waited for, or a new attempt if the last one failed or its connection has broken since.
    fn opening(&self, opener: &Arc<Opener>) -> Opening {
        let mut state = lock(&self.0);
        if let Some(opening) = &state.opening {
            match opening.clone().now_or_never() {
                Some(Ok(link)) if !link.is_open() => {}
                Some(Err(_)) => {}
                Some(Ok(_)) | None => return opening.clone(),
            }
        }
        state.begin(opener)
    }

    /// Begins to open a connection if there is none and it was not tried lately. Says whether it does.
    fn begin_if_due(&self, opener: &Arc<Opener>) -> bool {
        let mut state = lock(&self.0);
        let due = state.tried.is_none_or(|tried| tried.elapsed() > PAUSE);
        let idle = match state.opening.clone().map(FutureExt::now_or_never) {
            None => true,
            Some(None) => false,
            Some(Some(result)) => !result.is_ok_and(|link| link.is_open()),
        };
        if due && idle {
            drop(state.begin(opener));
        }
        due && idle
    }
}

impl State {
    fn begin(&mut self, opener: &Arc<Opener>) -> Opening {
        self.tried = Some(Instant::now());
        if let Some(Some(Ok(link))) = self.opening.take().map(FutureExt::now_or_never) {
            opener.moved.fetch_add(link.moved(), Ordering::Relaxed);
        }
        let attempt = opener.runtime.spawn(opener.clone().open());
        let opening = attempt.map(|result| result.unwrap_or_else(|_| Err(shut_down()))).boxed().shared();
        self.opening.insert(opening).clone()
    }
}

impl Opener {
    async fn open(self: Arc<Self>) -> Result<Arc<Link>> {
        let limit = self.settings.connect_timeout;
        in_time(limit, &self.source, self.open_unlimited()).await
    }

    async fn open_unlimited(&self) -> Result<Arc<Link>> {
        let silence = self.settings.silence;
        let vanished = Vanished::Within(silence.saturating_mul(TCP_WAITS));
        let (stream, facts) = self.source.greet(vanished).await?.go(self.source.export()).await?;
        self.facts.get_or_init(|| facts.clone()).same_region(&facts, &self.source)?;
        Ok(Arc::new(Link::new(stream, &facts, self.unflushed.clone(), silence, &self.runtime)))
    }
}

/// Limits something that waits for a server.
pub(crate) async fn in_time<T>(
    limit: Duration,
    peer: &(dyn std::fmt::Display + Sync),
    waiting: impl Future<Output = Result<T>>,
) -> Result<T> {
    let message = format!("{peer} does not answer within {} s", limit.as_secs_f32());
    let late = |_| Err(Error::new(ErrorKind::Unavailable, Operation::Open, message));
    tokio::time::timeout(limit, waiting).await.unwrap_or_else(late)
}

fn shut_down() -> Error {
    Error::new(ErrorKind::Cancelled, Operation::Open, "the runtime that the client was connected on has shut down")
}
