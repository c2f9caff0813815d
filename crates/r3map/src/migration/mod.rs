//! Moving regions between hosts while an application uses them.
//!
//! A [`Migration`] says what matters to both sides. On the host that has the regions, [`Migration::seed`] offers what
//! mounts show; on the host that wants them, [`Migration::leech`] copies them, and
//! [`finalize`](r3map_migrate::Leecher::finalize) has the application change sides. Where bytes go and what shows them is
//! a [`Place`] for each region. Everything runs on the [engine](crate::engine). What the two sides promise each other is in
//! [`r3map_migrate::protocol`].

mod carry;
mod ledger;
mod memory;
mod place;
mod sources;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_migrate::protocol::Description;
use r3map_migrate::{LeecherParts, SeederParts};
use r3map_pipeline::Priority;

use crate::{Listener, Registry, Uri};

pub use r3map_migrate::protocol::MigrationId;
pub use r3map_migrate::{
    Downtime, Fencing, FinalizeError, Former, Guarded, Hooks, Ledger, Leecher, LeecherSettings, Owed, Peer, Precopy,
    PullPhase, PullProgress, Pulling, Report, Running, Secret, Seeder, SeederPhase, SeederProgress, Source, Standing,
    Unconverged, Unsettled, Verdict,
};

pub use carry::{Carry, LeechOptions, SeedOptions};
pub use ledger::FileLedger;
pub(crate) use memory::SliceSource;
use place::Survived;
pub use place::{Arrived, CacheFacts, Landing, Place, describe_cache, open_cache};
#[cfg(feature = "block")]
pub(crate) use sources::BlockSource;
pub(crate) use sources::{FileSource, Syncing};

/// What matters to a migration, on either side.
///
/// ```
/// # fn main() -> r3map::Result<()> {
/// use r3map::migration::{Migration, Place};
/// use r3map::{Mount, OpenOptions, Registry};
///
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let registry = Registry::standard();
/// // On the host that has it:
/// let memory = registry.open(&"memory:?size=1MiB".parse()?, &OpenOptions::default()).await?;
/// let mut there = Mount::managed(memory).slice().await?;
/// there.write_at(4096, b"hello")?;
/// let seeding = Migration::new()
///     .seed(&registry, &["grpc://127.0.0.1:0".parse()?], vec![("state".into(), there.source())])
///     .await?;
///
/// // On the host that wants it:
/// let leecher = Migration::new().leech(&registry, &seeding.uris()[0].parse()?, vec![Place::slice()]).await?;
/// leecher.ready().await?;
/// let running = leecher.finalize().await.map_err(|left| left.error)?;
/// let here = running.regions()[0].take_slice().expect("it is a slice");
/// let mut bytes = [0; 5];
/// here.read_at(4096, &mut bytes)?;
/// assert_eq!(&bytes, b"hello");
/// println!("it took {}", running.pulled().await?.downtime);
/// # Ok(()) })
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Migration {
    hooks: Hooks,
    secret: Option<Secret>,
    open_to_go: bool,
    ledger: Option<Arc<dyn Ledger>>,
    settings: LeecherSettings,
    priorities: Vec<Priority>,
    /// Of a server that cannot tell.
    go: LeechOptions,
    identity: Option<String>,
    lease: Option<Duration>,
    fencing: Option<Fencing>,
    limit: Option<Duration>,
}

impl Migration {
    /// With nothing chosen.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With these hooks for the application.
    #[must_use]
    pub fn hooks(mut self, hooks: Hooks) -> Self {
        self.hooks = hooks;
        self
    }

    /// Only who knows `secret` may read the regions and take them; as a leecher, this is what is shown. Programs in Go cannot
    /// show one, and are kept out too: see [`Self::open_to_go`].
    #[must_use]
    pub fn secret(mut self, secret: impl Into<Vec<u8>>) -> Self {
        self.secret = Some(Secret::new(secret));
        self
    }

    /// As a seeder with a [secret](Self::secret), lets programs in Go in all the same: whoever can connect can then read the
    /// region, and take it away, through their service. Without a secret they are let in anyway. They never are where
    /// several regions move as one, which their protocol cannot do.
    #[must_use]
    pub fn open_to_go(mut self, open: bool) -> Self {
        self.open_to_go = open;
        self
    }

    /// With what must survive the process written down in the file `path`: who owns the regions.
    #[must_use]
    pub fn ledger(mut self, path: impl AsRef<Path>) -> Self {
        self.ledger = Some(Arc::new(FileLedger::new(path)));
        self
    }

    /// As a leecher, with these settings.
    #[must_use]
    pub fn settings(mut self, settings: LeecherSettings) -> Self {
        self.settings = settings;
        self
    }

    /// As a leecher, with these chunks of the regions first.
    #[must_use]
    pub fn priorities(mut self, priorities: Vec<Priority>) -> Self {
        self.priorities = priorities;
        self
    }

    /// As a leecher of a Go seeder, with what it does not tell.
    #[must_use]
    pub fn go(mut self, options: LeechOptions) -> Self {
        self.go = options;
        self
    }

    /// As a seeder, with a name that stays the same for as long as the regions' bytes live, so that leechers know them
    /// again when it is started anew. Without one they end with the process.
    #[must_use]
    pub fn identity(mut self, identity: Option<String>) -> Self {
        self.identity = identity;
        self
    }

    /// As a seeder, with this limit to how long a leecher that copies may be silent before the seeder stops to record for
    /// it: see [`SeederParts::lease`](r3map_migrate::SeederParts::lease). Default 5 minutes.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// With this limit to how long each hook, and each call to what shows the regions, may take: see
    /// [`SeederParts::limit`](r3map_migrate::SeederParts::limit). Default 30 s. Where it is longer on the seeder, the leecher's
    /// [`handover_timeout`](LeecherSettings::handover_timeout) is to be longer than both together.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// As a seeder, with writing ended so firmly at the handover. By default an application that a hook suspends is trusted,
    /// and memory of one that nobody suspends is fenced strictly, which costs it 20 ms of downtime for each GiB.
    #[must_use]
    pub fn fencing(mut self, fencing: Fencing) -> Self {
        self.fencing = Some(fencing);
        self
    }

    /// Offers regions, each with a name, at `uris`.
    ///
    /// # Errors
    /// As [`Seeder::new`] and [`Registry::listen`].
    pub async fn seed(
        self,
        registry: &Registry,
        uris: &[Uri],
        regions: Vec<(String, Arc<dyn Source>)>,
    ) -> Result<Seeding> {
        let parts = self.seeder_parts();
        let seeder = crate::engine::run(async move { Seeder::new(regions, parts).await }).await?;
        self.listen(registry, uris, seeder, None).await
    }

    /// Finds out whether regions could be offered at `uri` as things are: to know it before they are there.
    ///
    /// # Errors
    /// As [`Registry::listen`].
    pub async fn can_seed(registry: &Registry, uri: &Uri) -> Result<()> {
        let (carry, uri) = (registry.carry(uri)?, uri.clone());
        crate::engine::run(async move { carry.can_seed(&uri).await }).await
    }

    /// Offers the regions that have arrived here to the next leecher, once nothing is missing. The application runs on,
    /// in the same memory and files. An error ends the regions; with no `uris` here and [`Seeding::listen`] afterwards, an
    /// address that is taken ends nothing.
    ///
    /// # Errors
    /// As [`Leecher::release`] and [`Registry::listen`].
    pub async fn release(
        self,
        registry: &Registry,
        uris: &[Uri],
        running: Leecher<Running<Arrived>>,
    ) -> Result<(Vec<Arc<Arrived>>, Seeding)> {
        let parts = self.seeder_parts();
        let names = running.regions().iter().map(|region| region.name().to_owned()).collect();
        let (regions, seeder, former) = crate::engine::run(async move { running.release(names, parts).await }).await?;
        Ok((regions, self.listen(registry, uris, seeder, Some(former)).await?))
    }

    fn seeder_parts(&self) -> SeederParts {
        SeederParts {
            hooks: self.hooks.clone(),
            secret: self.secret.clone(),
            ledger: self.ledger.clone(),
            lease: self.lease,
            fencing: self.fencing,
            limit: self.limit,
            ..SeederParts::default()
        }
    }

    async fn listen(
        self,
        registry: &Registry,
        uris: &[Uri],
        seeder: Seeder,
        former: Option<Former>,
    ) -> Result<Seeding> {
        let options = SeedOptions { identity: self.identity, open_to_go: self.open_to_go };
        let mut seeding = Seeding { seeder, former, options, listeners: Vec::new() };
        for uri in uris {
            seeding.listen(registry, uri).await?;
        }
        Ok(seeding)
    }

    /// Copies what is seeded at `uri` to `places`, one for each region in the seeder's order. The application runs on
    /// over there. Where the ledger says that this was done before, by a process that was killed, it goes on with what the
    /// places' cache files have, as long as the seeder still records for it; otherwise everything is copied.
    ///
    /// # Errors
    /// As [`Leecher::start`] and [`Leecher::go_on`]; `Conflict` where the ledger says that the regions were asked for:
    /// [`Self::resume`] goes on with that. Likewise where it says that they are here, or that somebody may still need
    /// what is here, or where it says nothing and a cache file has bytes of its own: their bytes would be lost.
    pub async fn leech(self, registry: &Registry, uri: &Uri, places: Vec<Place>) -> Result<Leecher<Pulling<Landing>>> {
        let standing = self.standing()?;
        let refused = match standing {
            None | Some(Standing::Gone { .. } | Standing::Pulling { .. }) => None,
            Some(Standing::Asking { .. } | Standing::Arrived { .. }) => {
                Some("a migration to here was under way: resume it, or remove its ledger")
            }
            Some(Standing::Owner { .. }) => Some("the regions are here already, as the ledger says: seed them"),
            Some(Standing::HandedOver { .. }) => Some(
                "the regions were handed over from here, and may be missed there still: seed them until they have gone",
            ),
        };
        if let Some(message) = refused {
            return Err(Error::new(ErrorKind::Conflict, Operation::Open, message));
        }
        let peer = self.connect(registry, uri).await?;
        let (parts, settings, id) = (self.leecher_parts(), self.settings.clone(), fresh_id());
        crate::engine::run(async move {
            let survived = match &standing {
                Some(Standing::Pulling { .. }) => Survived::Ours,
                Some(_) => Survived::Old,
                None => Survived::Unknown,
            };
            let landings = async move |description: &Description| place::prepare(places, description, survived).await;
            match standing.filter(|_| survived == Survived::Ours) {
                Some(standing) => Leecher::go_on(peer, &standing, landings, settings, parts).await,
                None => Leecher::start(peer, id, landings, settings, parts).await,
            }
        })
        .await
    }

    /// Goes on with a migration to here whose process was killed after it had asked for the regions, as the ledger says.
    /// Nothing where they have not left the seeder: [`Self::leech`] goes on then.
    ///
    /// # Errors
    /// As [`Leecher::resume`].
    pub async fn resume(
        self,
        registry: &Registry,
        uri: &Uri,
        places: Vec<Place>,
    ) -> Result<Option<Leecher<Running<Arrived>>>> {
        let nothing =
            || Error::new(ErrorKind::InvalidInput, Operation::Open, "the ledger knows of no migration to here");
        let standing = self.standing()?.ok_or_else(nothing)?;
        let peer = self.connect(registry, uri).await?;
        let (parts, settings) = (self.leecher_parts(), self.settings.clone());
        crate::engine::run(async move {
            let landings =
                async move |description: &Description| place::prepare(places, description, Survived::Ours).await;
            Leecher::<Pulling<Landing>>::resume(peer, &standing, landings, settings, parts).await
        })
        .await
    }

    /// What the ledger says, if there is one and it says anything.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn standing(&self) -> Result<Option<Standing>> {
        self.ledger.as_ref().map_or(Ok(None), |ledger| ledger.load())
    }

    /// Writes into the ledger that regions which were handed over are here again, before they are seeded. **Only for
    /// somebody who knows that the leecher does not run and never will**: see [`Seeder::take_back`].
    ///
    /// # Errors
    /// `Conflict` if the ledger does not say that they were handed over; when it cannot be read or written.
    pub fn take_back(&self) -> Result<()> {
        match (&self.ledger, self.standing()?) {
            (Some(ledger), Some(Standing::HandedOver { id, epoch, .. })) => {
                ledger.save(&Standing::Owner { epoch: epoch.saturating_add(1), revoked: Some(id) })
            }
            _ => Err(Error::new(ErrorKind::Conflict, Operation::Open, "nothing was handed over")),
        }
    }

    async fn connect(&self, registry: &Registry, uri: &Uri) -> Result<Arc<dyn Peer>> {
        let (carry, uri) = (registry.carry(uri)?, uri.clone());
        let options = LeechOptions { secret: self.secret.clone(), ..self.go.clone() };
        crate::engine::run(async move { carry.leech(&uri, &options).await }).await
    }

    fn leecher_parts(&self) -> LeecherParts {
        let (hooks, priorities, ledger) = (self.hooks.clone(), self.priorities.clone(), self.ledger.clone());
        LeecherParts { hooks, priorities, ledger, limit: self.limit }
    }
}

fn fresh_id() -> MigrationId {
    let (mut id, mut filled) = ([0; 16], 0);
    while filled < id.len() {
        filled += rustix::rand::getrandom(&mut id[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    MigrationId(id)
}

/// Regions that are offered. Dropping it stops that, in the middle of whatever a leecher is doing.
pub struct Seeding {
    seeder: Seeder,
    former: Option<Former>,
    options: SeedOptions,
    listeners: Vec<Box<dyn Listener>>,
}

impl Seeding {
    /// Offers them at one more place, and says where leechers find it.
    ///
    /// # Errors
    /// As [`Registry::listen`]. What is offered elsewhere goes on.
    pub async fn listen(&mut self, registry: &Registry, uri: &Uri) -> Result<String> {
        let (carry, uri, seeder) = (registry.carry(uri)?, uri.clone(), self.seeder.clone());
        let options = self.options.clone();
        let listener = crate::engine::run(async move { carry.seed(&uri, seeder, &options).await }).await?;
        let uri = listener.uri();
        self.listeners.push(listener);
        Ok(uri)
    }

    /// Where leechers find it.
    #[must_use]
    pub fn uris(&self) -> Vec<String> {
        self.listeners.iter().map(|listener| listener.uri()).collect()
    }

    /// What it is doing, and who owns the regions.
    #[must_use]
    pub fn seeder(&self) -> &Seeder {
        &self.seeder
    }

    /// Where the regions came from, if they were [released](Migration::release). It is told that everything arrived for as
    /// long as a [`Seeder`] of these lives.
    #[must_use]
    pub fn former(&self) -> Option<Former> {
        self.former.clone()
    }

    /// Takes no new requests, finishes those in flight, and ends.
    ///
    /// # Errors
    /// When requests had to be given up.
    pub async fn close(self) -> Result<()> {
        let mut done = Ok(());
        for listener in self.listeners {
            done = done.and(listener.shutdown().await);
        }
        done
    }
}
