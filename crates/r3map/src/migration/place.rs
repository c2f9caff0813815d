//! Where a region goes, and what shows it there.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
#[cfg(feature = "block")]
use r3map_block::Kind;
use r3map_core::{Backend, Error, ErrorKind, Geometry, Operation, Result};
use r3map_file::PreparedMount;
use r3map_local::{CacheFile, Memory, Stored};
use r3map_migrate::protocol::Description;
use r3map_migrate::{Arrival, Fencing, Guarded, Shown, Source, Target};
use r3map_pipeline::{
    Cached, CachedParts, CachedSettings, Local, Progress, PullSettings, Recorded, Retry, StateRecord, Workers, Writes,
};
#[cfg(feature = "block")]
use r3map_pipeline::{Gate, WhenClosed};
use r3map_slice::{Prepared, ScopeWanted, SliceHandle, SliceParts, SliceSettings};
use tokio::sync::watch;

use super::{FileSource, SliceSource, Syncing};
#[cfg(feature = "block")]
use crate::mount::{BlockMount, Plan};
use crate::mount::{FileMount, PathMount, Region, SliceMount};
use crate::{Cache, Settings};

/// What a region that arrives is shown as.
#[derive(Debug, Clone)]
enum Show {
    Slice,
    Path(PathBuf),
    File,
    #[cfg(feature = "block")]
    Block(Option<Kind>),
}

/// A place for a region that arrives.
#[derive(Debug, Clone)]
pub struct Place {
    show: Show,
    settings: Settings,
}

impl Place {
    /// As memory of this process.
    #[must_use]
    pub fn slice() -> Self {
        Self { show: Show::Slice, settings: Settings::default() }
    }

    /// As the file `path`.
    #[must_use]
    pub fn path(path: impl AsRef<Path>) -> Self {
        Self { show: Show::Path(path.as_ref().to_owned()), settings: Settings::default() }
    }

    /// As an opened file that is on no path.
    #[must_use]
    pub fn file() -> Self {
        Self { show: Show::File, settings: Settings::default() }
    }

    /// As a block device of this kind, or of the best that works. Needs root; the region's size must be whole sectors.
    #[cfg(feature = "block")]
    #[must_use]
    pub fn block(kind: Option<Kind>) -> Self {
        Self { show: Show::Block(kind), settings: Settings::default() }
    }

    /// With its bytes in `cache`. Memory by default; a slice has no other.
    #[must_use]
    pub fn cache(mut self, cache: Cache) -> Self {
        self.settings.cache = cache;
        self
    }

    /// With these settings; of them the cache and those of files and devices matter.
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }
}

/// A place that is made for one region, and not shown yet.
pub struct Landing {
    name: String,
    settings: Settings,
    bytes: Bytes,
}

enum Bytes {
    Mapping(Prepared),
    Elsewhere { local: Arc<dyn Local>, record: Option<Arc<dyn StateRecord>>, front: Front },
}

/// What shows bytes that are not in a mapping.
enum Front {
    Path(PathBuf, Box<PreparedMount>),
    File,
    #[cfg(feature = "block")]
    Block(Plan),
}

/// What is known of what survived in cache files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survived {
    /// It is of the migration that is gone on with.
    Ours,
    /// It is of one that is over: another host has all of it.
    Old,
    /// Nothing is.
    Unknown,
}

/// Makes the places for what a seeder describes.
pub(super) async fn prepare(places: Vec<Place>, description: &Description, survived: Survived) -> Result<Vec<Landing>> {
    for place in &places {
        // It would be a pity to find out when everything has been copied and the application has stopped.
        if let Show::Path(path) = &place.show {
            PathMount::check(path, &place.settings, true).await?;
        }
    }
    if places.len() != description.regions.len() {
        let message =
            format!("{} regions are seeded, and there are {} places", description.regions.len(), places.len());
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    }
    let mut landings = Vec::new();
    for (place, facts) in places.into_iter().zip(&description.regions) {
        landings.push(Landing::new(place, &facts.name, facts.geometry()?, survived).await?);
    }
    Ok(landings)
}

/// How a cache file that a migration fills begins to say whose bytes it holds.
const MIGRATED: &str = "migrated ";

/// Whose bytes a cache file that a migration fills holds.
fn cache_identity(name: &str) -> String {
    format!("{MIGRATED}{name}")
}

impl Landing {
    async fn new(place: Place, name: &str, geometry: Geometry, survived: Survived) -> Result<Self> {
        let Place { show, settings } = place;
        let front = match show {
            Show::Slice => None,
            Show::Path(path) => {
                // Served already, so that it takes no time when the application waits, and on no path.
                let prepared = PathMount::prepare(&geometry, &settings).await?;
                Some(Front::Path(path, Box::new(prepared)))
            }
            Show::File => Some(Front::File),
            #[cfg(feature = "block")]
            Show::Block(kind) => Some(Front::Block(Plan::arriving(kind, &settings, geometry.size())?)),
        };
        let bytes = match (front, &settings.cache) {
            (None, Cache::Memory) => Bytes::Mapping(Prepared::new(geometry.size(), ScopeWanted::default())?),
            (None, Cache::File(_)) => {
                let message = "a slice that arrives has its bytes in memory, and no cache file";
                return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
            }
            (Some(front), Cache::Memory) => {
                let memory = Arc::new(Memory::new(geometry.size())?);
                Bytes::Elsewhere { local: Arc::new(Stored::memory(memory)), record: None, front }
            }
            (Some(front), Cache::File(path)) => {
                let file = Arc::new(take_cache(path, name, geometry, survived)?);
                Bytes::Elsewhere { local: file.clone(), record: Some(file), front }
            }
        };
        Ok(Self { name: name.to_owned(), settings, bytes })
    }
}

fn take_cache(path: &Path, name: &str, geometry: Geometry, survived: Survived) -> Result<CacheFile> {
    let identity = cache_identity(name);
    let found = path.exists();
    let file = CacheFile::open(path, &identity, geometry)?;
    if survived == Survived::Ours || !found {
        return Ok(file);
    }
    if survived == Survived::Unknown && has_own_bytes(&file)? {
        let message = format!(
            "{} holds a region that may be nowhere else: name the ledger that speaks of it, or remove the file if nothing \
             of it is wanted",
            path.display()
        );
        return Err(Error::new(ErrorKind::Conflict, Operation::Open, message));
    }
    // It is a cache of this region, left by a migration that came to nothing: what is in it may be of yesterday.
    drop(file);
    let removed = std::fs::remove_file(path);
    removed.map_err(|error| Error::from_io(Operation::Open, format!("{} cannot be emptied", path.display()), error))?;
    CacheFile::open(path, &identity, geometry)
}

/// Whether it has what no seeder has: what the application has written here, or all of a region that has arrived.
fn has_own_bytes(file: &CacheFile) -> Result<bool> {
    let mut own = false;
    file.load(&mut |_, state| own |= state == Recorded::Dirty)?;
    Ok(own)
}

/// How many blocks are recorded at a time: whoever writes to the region waits meanwhile.
const RECORDED_AT_A_TIME: u64 = 1 << 20;

/// Has all of a region that is here as a whole count as its own bytes, durably: after a loss of power, what was only pulled
/// is forgotten, because it could be pulled again.
async fn keep_all(record: &dyn StateRecord, geometry: &Geometry) -> Result<()> {
    let blocks = geometry.block_count();
    let mut at = 0;
    while at < blocks {
        let end = blocks.min(at + RECORDED_AT_A_TIME);
        record.record(at..end, Recorded::Dirty)?;
        at = end;
        tokio::task::yield_now().await;
    }
    record.checkpoint().await
}

/// What a cache file that a migration has filled holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheFacts {
    /// What the seeder called the region.
    pub name: String,
    /// What stays the same for as long as its bytes live in this file, for [`Migration::identity`](super::Migration::identity).
    pub identity: String,
}

/// Says what a cache file holds that a migration has filled, also while it is in use.
///
/// # Errors
/// As [`CacheFile::describe`]; `InvalidInput` if it is the cache of a mount.
pub fn describe_cache(path: impl AsRef<Path>) -> Result<CacheFacts> {
    let path = path.as_ref();
    let (whose, _) = CacheFile::describe(path)?;
    let Some(name) = whose.strip_prefix(MIGRATED) else {
        let message = format!("{} is the cache of a mount, and holds no region of its own", path.display());
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    };
    let place = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    Ok(CacheFacts { name: name.to_owned(), identity: format!("{whose} in {}", place.display()) })
}

/// Opens a cache file that a migration has filled, as a region of its own: from then on no migration goes on with it.
///
/// # Errors
/// As [`describe_cache`] and [`CacheFile::open`]; `Conflict` if something is missing.
pub async fn open_cache(path: impl AsRef<Path>) -> Result<(Arc<dyn Backend>, CacheFacts)> {
    let path = path.as_ref().to_owned();
    crate::engine::run(async move {
        let facts = describe_cache(&path)?;
        let (identity, geometry) = CacheFile::describe(&path)?;
        let file = Arc::new(CacheFile::open(&path, &identity, geometry)?);
        let settings = CachedSettings {
            chunk_size: geometry.chunk_size(),
            pull: PullSettings { workers: Workers::Off, ..PullSettings::default() },
            writes: Writes::Kept,
            ..CachedSettings::default()
        };
        let parts = CachedParts { record: Some(file.clone()), ..CachedParts::default() };
        let cached = Cached::open(file.clone(), Arc::new(Nowhere(geometry.size())), settings, parts).await?;
        if !cached.is_local(&(0..geometry.size())) {
            let message = format!("{} does not hold all of its region: go on with the leech", path.display());
            return Err(Error::new(ErrorKind::Conflict, Operation::Open, message));
        }
        keep_all(&*file, &geometry).await?;
        Ok((cached as Arc<dyn Backend>, facts))
    })
    .await
}

/// Where what is missing does not come from.
struct Nowhere(u64);

#[async_trait]
impl Backend for Nowhere {
    fn size(&self) -> u64 {
        self.0
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let message = "this part of the region never arrived";
        Err(Error::new(ErrorKind::NotFound, Operation::Read, message).at(offset, buf.len() as u64))
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let message = "what is written is kept here";
        Err(Error::new(ErrorKind::Internal, Operation::Write, message).at(offset, buf.len() as u64))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Target for Landing {
    type Shown = Arrived;

    fn local(&self) -> Arc<dyn Local> {
        match &self.bytes {
            Bytes::Mapping(prepared) => prepared.local(),
            Bytes::Elsewhere { local, .. } => local.clone(),
        }
    }

    fn record(&self) -> Option<Arc<dyn StateRecord>> {
        match &self.bytes {
            Bytes::Mapping(_) => None,
            Bytes::Elsewhere { record, .. } => record.clone(),
        }
    }

    fn forget(&mut self, bytes: std::ops::Range<u64>) -> Result<()> {
        match &mut self.bytes {
            Bytes::Mapping(prepared) => prepared.forget(bytes),
            Bytes::Elsewhere { .. } => Ok(()),
        }
    }

    async fn show(self, arrival: Arrival) -> Result<Arrived> {
        crate::engine::run(async move {
            let Self { name, settings, bytes } = self;
            let geometry = arrival.geometry;
            match bytes {
                Bytes::Mapping(prepared) => show_slice(name, prepared, arrival),
                Bytes::Elsewhere { local, record, front } => {
                    let retry = arrival.remote.clone();
                    let (cached, guarded) = open_local(local, record.clone(), arrival).await?;
                    let arrived = match front {
                        Front::Path(path, prepared) => {
                            show_file(name, cached, guarded, retry, async |region| {
                                let mount = PathMount::show_prepared(region, &path, *prepared).await?;
                                Ok((mount.syncing(), Kept::Path(mount)))
                            })
                            .await?
                        }
                        Front::File => {
                            show_file(name, cached, guarded, retry, async |region| {
                                let mount = FileMount::show(region, &settings, true).await?;
                                Ok((mount.syncing(), Kept::File(mount)))
                            })
                            .await?
                        }
                        #[cfg(feature = "block")]
                        Front::Block(plan) => show_block(name, plan, cached, guarded, retry).await?,
                    };
                    Ok(Arrived { record: record.map(|record| (record, geometry)), ..arrived })
                }
            }
        })
        .await
    }
}

/// Memory that nobody has a view of needs no fence.
fn show_slice(name: String, prepared: Prepared, arrival: Arrival) -> Result<Arrived> {
    let settings = SliceSettings { region: arrival.settings(), ..SliceSettings::default() };
    let parts = SliceParts { region: arrival.parts(), runtime: Some(crate::engine::handle()) };
    let slice = prepared.open(arrival.remote.clone(), settings, parts)?;
    let handle = slice.handle();
    let region = Region::arrived_in_memory(handle.clone(), arrival.remote);
    let mount = SliceMount::new(slice, region.clone());
    let kept = Kept::Slice(Mutex::new(Some(mount)), handle.clone());
    Ok(Arrived { name, region, source: Arc::new(SliceSource::new(handle)), kept, record: None })
}

async fn open_local(
    local: Arc<dyn Local>,
    record: Option<Arc<dyn StateRecord>>,
    arrival: Arrival,
) -> Result<(Arc<Cached>, Arc<Guarded>)> {
    let parts = CachedParts { record, ..arrival.parts() };
    let cached = Cached::open(local, arrival.remote.clone(), arrival.settings(), parts).await?;
    let guarded = Arc::new(Guarded::new(cached.clone(), arrival.geometry.chunk_size())?);
    Ok((cached, guarded))
}

/// Shows a file, on a path or opened: `show` says which.
async fn show_file(
    name: String,
    cached: Arc<Cached>,
    guarded: Arc<Guarded>,
    retry: Arc<Retry>,
    show: impl AsyncFnOnce(Region) -> Result<(Syncing, Kept)>,
) -> Result<Arrived> {
    guarded.fence(Fencing::Strict).await?;
    let region = Region::arrived(cached, guarded.clone(), guarded.front(), retry);
    let (sync, kept) = show(region.clone()).await?;
    let source = Arc::new(FileSource { guarded, sync });
    Ok(Arrived { name, region, source, kept, record: None })
}

/// Only changes are fenced off: the kernel reads a device when it appears.
#[cfg(feature = "block")]
async fn show_block(
    name: String,
    plan: Plan,
    cached: Arc<Cached>,
    guarded: Arc<Guarded>,
    retry: Arc<Retry>,
) -> Result<Arrived> {
    let gate = Arc::new(Gate::new(guarded.front(), WhenClosed::FailChanges));
    let arriving = gate.close().await;
    let region = Region::arrived(cached, guarded, gate, retry);
    let mount = plan.show(region.clone()).await?;
    let source = Arc::new(mount.leaving(Some(arriving))?);
    Ok(Arrived { name, region, source, kept: Kept::Block(mount), record: None })
}

enum Kept {
    Slice(Mutex<Option<SliceMount>>, SliceHandle),
    Path(PathMount),
    File(FileMount),
    #[cfg(feature = "block")]
    Block(BlockMount),
}

/// A region that has arrived, and what shows it.
pub struct Arrived {
    name: String,
    region: Region,
    source: Arc<dyn Source>,
    kept: Kept,
    /// Where it is written down what is here, if that outlives the process.
    record: Option<(Arc<dyn StateRecord>, Geometry)>,
}

impl Arrived {
    /// What the seeder calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it stands on.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The memory, for whoever asks first, if it is memory. It is to be kept: when it is dropped the region ends, also
    /// for the next leecher.
    #[must_use]
    pub fn take_slice(&self) -> Option<SliceMount> {
        match &self.kept {
            Kept::Slice(slice, _) => slice.lock().unwrap_or_else(PoisonError::into_inner).take(),
            _ => None,
        }
    }

    /// The mount, if it is on a path.
    #[must_use]
    pub fn path(&self) -> Option<&PathMount> {
        match &self.kept {
            Kept::Path(mount) => Some(mount),
            _ => None,
        }
    }

    /// The mount, if it is a block device; [`BlockMount::path`] is the device.
    #[cfg(feature = "block")]
    #[must_use]
    pub fn block(&self) -> Option<&BlockMount> {
        match &self.kept {
            Kept::Block(mount) => Some(mount),
            _ => None,
        }
    }

    /// The mount, if it is an opened file.
    #[must_use]
    pub fn file(&self) -> Option<&FileMount> {
        match &self.kept {
            Kept::File(mount) => Some(mount),
            _ => None,
        }
    }
}

#[async_trait]
impl Shown for Arrived {
    fn source(&self) -> Arc<dyn Source> {
        self.source.clone()
    }

    async fn pulled(&self) -> Result<()> {
        self.region.pulled().await
    }

    async fn keep(&self) -> Result<()> {
        match &self.record {
            Some((record, geometry)) => keep_all(&**record, geometry).await,
            None => Ok(()),
        }
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        match (&self.kept, self.region.progress()) {
            (Kept::Slice(_, handle), _) => handle.progress(),
            (_, Some(progress)) => progress,
            // A region that has arrived always has a local copy.
            (_, None) => watch::channel(Progress::default()).1,
        }
    }
}
