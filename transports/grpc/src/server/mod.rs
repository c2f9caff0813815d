//! A region for others: any backend, over TCP and Unix sockets, as both services.
//!
//! `Server` owns what runs: listeners and connections. `session` is one connection, `region` and `go` are the two
//! services, `budget` bounds memory, `fence` orders the writes of a client that connects again.

mod budget;
mod fence;
mod go;
mod listener;
mod migration;
mod region;
mod session;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Geometry, Operation, Result};
use r3map_pipeline::Losses;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::seeding::Seeding;
use crate::target::Target;
use budget::Budget;
use fence::Fences;
use listener::Listener;
use migration::Seeder;

/// The limit on a request of the Go programs.
const DEFAULT_MAX_REQUEST: u64 = 32 << 20;

/// How a [`Server`] serves. Plain data.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Refuse writes, also where the backend would take them. No.
    pub read_only: bool,
    /// The chunk size that clients are told. The backend's own where it has one, else 64 KiB. Zeros are left out and
    /// checksums are made chunk by chunk; requests need not be whole chunks unless the backend says so.
    pub chunk_size: Option<ChunkSize>,
    /// The most bytes in one request; longer ones are refused before anything is allocated. 32 MiB.
    pub max_request: u64,
    /// The most bytes of data in requests and replies that are in memory at once, over all connections; more requests
    /// wait. At least `max_request`. One connection gets a quarter of it, and the more is taken, the less the others get:
    /// so clients that never read their replies do not hold up those who do. 256 MiB. Beside it, each connection may fill
    /// its HTTP/2 window of 16 MiB.
    pub in_flight: u64,
    /// The most connections at once; more wait. 256.
    pub connections: NonZeroUsize,
    /// How long a client may be silent that connects or has begun a request; after sixty times as long the request must be
    /// there, however slowly it came. 30 s.
    pub patience: Duration,
    /// What stays the same for as long as the region's bytes live: a path, a name, an id. Clients that connect again
    /// refuse a region of another identity. `None` takes the backend's own; where that has none either, the bytes count
    /// as ending with this server (memory), and its clients refuse every later one, which cannot have what they wrote.
    pub identity: Option<String>,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            read_only: false,
            chunk_size: None,
            max_request: DEFAULT_MAX_REQUEST,
            in_flight: 256 << 20,
            connections: NonZeroUsize::new(256).unwrap_or(NonZeroUsize::MIN),
            patience: Duration::from_secs(30),
            identity: None,
        }
    }
}

/// Serves a backend. Dropping it ends everything at once, in the middle of requests; [`Server::close`] lets them end.
#[derive(Debug)]
pub struct Server {
    site: Arc<Site>,
    tasks: TaskTracker,
    /// Listeners end, and connections when they are idle.
    closing: CancellationToken,
    /// Everything ends.
    ending: CancellationToken,
}

/// Everything that is served.
#[derive(Debug)]
pub(crate) struct Site {
    /// At least one.
    regions: Vec<Arc<Shared>>,
    seeder: Option<Seeder>,
    connections: Arc<Semaphore>,
}

/// What all connections share of one region.
pub(crate) struct Shared {
    backend: Arc<dyn Backend>,
    /// Of the backend. To clients each is as if this server had been restarted.
    losses: Arc<Losses>,
    geometry: Geometry,
    read_only: bool,
    max_request: u64,
    /// Which server this is, before anything was lost.
    instance: u128,
    region: Bytes,
    budget: Arc<Budget>,
    fences: Fences,
    patience: Duration,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl Server {
    /// A server that does not listen yet.
    ///
    /// # Errors
    /// `InvalidInput` for settings that contradict each other or the backend.
    pub fn new(backend: Arc<dyn Backend>, settings: ServerSettings) -> Result<Self> {
        let budget = Arc::new(Budget::new(settings.in_flight, settings.max_request));
        Ok(Self::with(vec![Arc::new(Shared::new(backend, &settings, budget)?)], None, &settings))
    }

    /// A seeder that does not listen yet: it serves its regions to be read, and takes the calls that have them change
    /// hands. Leechers are told the chunk size of each region by the seeder itself, whatever the settings say; they are
    /// told the [identity](ServerSettings::identity) of the settings, with the region's number behind it.
    ///
    /// # Errors
    /// As [`Self::new`], and for a seeder without regions.
    pub async fn seeding(seeder: Arc<dyn Seeding>, settings: ServerSettings) -> Result<Self> {
        let budget = Arc::new(Budget::new(settings.in_flight, settings.max_request));
        let mut regions = Vec::new();
        for (index, region) in seeder.describe().await?.regions.iter().enumerate() {
            let settings = ServerSettings {
                read_only: true,
                chunk_size: Some(region.chunk_size),
                identity: settings.identity.as_ref().map(|identity| format!("{identity}#{index}")),
                ..settings.clone()
            };
            regions.push(Arc::new(Shared::new(seeder.region(index), &settings, budget.clone())?));
        }
        if regions.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, "a seeder has at least one region"));
        }
        Ok(Self::with(regions, Some(Seeder::new(seeder)), &settings))
    }

    fn with(regions: Vec<Arc<Shared>>, seeder: Option<Seeder>, settings: &ServerSettings) -> Self {
        crate::heap::keep();
        let connections = Arc::new(Semaphore::new(settings.connections.get().min(Semaphore::MAX_PERMITS)));
        let (closing, ending) = (CancellationToken::new(), CancellationToken::new());
        Self { site: Arc::new(Site { regions, seeder, connections }), tasks: TaskTracker::new(), closing, ending }
    }

    /// Listens, also on more than one target, and serves on the current tokio runtime from now on. Returns the target
    /// that it listens on, with the port that the system chose where none was given.
    ///
    /// A Unix socket is made with mode 0600. One that a server left behind when it was killed is replaced; one that
    /// somebody listens on is not.
    ///
    /// # Errors
    /// Names the target: `Conflict` if it is in use, `Denied`, `InvalidInput` if it is no address of this host.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn listen(&self, target: &Target) -> Result<Target> {
        let listener = Listener::bind(target).await?;
        let bound = listener.target().clone();
        let (closing, ending) = (self.closing.clone(), self.ending.clone());
        let accepting = listener.accept_all(self.site.clone(), self.tasks.clone(), closing.clone(), ending.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = accepting => {}
                () = closing.cancelled() => {}
                () = ending.cancelled() => {}
            }
        });
        Ok(bound)
    }

    /// Finds out whether a server could [listen](Self::listen) there, by doing so for a moment and answering nobody.
    ///
    /// # Errors
    /// As [`Self::listen`].
    pub async fn can_listen(target: &Target) -> Result<()> {
        Listener::bind(target).await.map(drop)
    }

    /// Stops listening, lets the requests that are in progress end, and waits for that, but not longer than `limit`.
    /// It does not flush the backend.
    ///
    /// # Errors
    /// `Cancelled` if requests had to be ended at the limit.
    pub async fn close(self, limit: Duration) -> Result<()> {
        self.closing.cancel();
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_ok() {
            return Ok(());
        }
        self.ending.cancel();
        self.tasks.wait().await;
        let message = format!("requests were still in progress after {} s and were ended", limit.as_secs_f32());
        Err(Error::new(ErrorKind::Cancelled, Operation::Close, message))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.cancel();
    }
}

impl Shared {
    fn new(backend: Arc<dyn Backend>, settings: &ServerSettings, budget: Arc<Budget>) -> Result<Self> {
        let geometry = Geometry::new(backend.size(), chunk_size(&*backend, settings)?)?;
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        let limit = backend.capabilities().max_request.unwrap_or(u64::MAX).min(settings.max_request);
        let whole_chunks = backend.capabilities().access != Access::Any;
        if limit == 0 || limit > u64::from(u32::MAX / 2) {
            return invalid(format!("a largest request of {limit} bytes is not between 1 byte and 2 GiB"));
        }
        if whole_chunks && limit < geometry.chunk_size().bytes() {
            let chunk = geometry.chunk_size();
            return invalid(format!("requests of at most {limit} bytes cannot hold a whole chunk of {chunk}"));
        }
        if settings.patience.is_zero() {
            return invalid("patience for no time at all serves nobody".to_owned());
        }
        if settings.in_flight < limit {
            return invalid(format!("{} bytes in flight cannot hold a request of {limit}", settings.in_flight));
        }
        let instance = u128::from_be_bytes(crate::client::random());
        let shared = Shared {
            geometry,
            read_only: settings.read_only || backend.capabilities().read_only,
            max_request: limit,
            region: identity(&*backend, settings).unwrap_or_else(|| name(instance)),
            instance,
            budget,
            fences: Fences::default(),
            patience: settings.patience,
            losses: Losses::new(backend.clone()),
            backend,
        };
        Ok(shared)
    }

    /// Which server this is, now that something was lost so often.
    fn instance(&self, losses: u64) -> Bytes {
        name(self.instance.wrapping_add(losses.into()))
    }
}

fn name(instance: u128) -> Bytes {
    Bytes::copy_from_slice(&instance.to_be_bytes())
}

fn identity(backend: &dyn Backend, settings: &ServerSettings) -> Option<Bytes> {
    let own = || backend.capabilities().identity.map(Bytes::copy_from_slice);
    settings.identity.clone().map(Bytes::from).or_else(own)
}

fn chunk_size(backend: &dyn Backend, settings: &ServerSettings) -> Result<ChunkSize> {
    let capabilities = backend.capabilities();
    match (capabilities.access, settings.chunk_size) {
        (Access::WholeChunks(chunk), Some(told)) if chunk != told => Err(Error::new(
            ErrorKind::InvalidInput,
            Operation::Open,
            format!("the backend takes whole chunks of {chunk}, so clients cannot be told {told}"),
        )),
        (Access::WholeChunks(chunk), _) => Ok(chunk),
        (Access::Any, told) => Ok(told.or(capabilities.preferred_chunk).unwrap_or_default()),
    }
}
