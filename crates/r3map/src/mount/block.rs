//! Mounts that are shown as a block device: which kind, and on what it stands.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use r3map_block::{BlockDevice, BlockSettings, FileMapping, Keep, Kind, check};
use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
#[cfg(feature = "file")]
use r3map_file::FileMount as Fuse;

use super::Mount;
use super::link::Link;
use super::region::{self, Region};
use crate::Cache;
#[cfg(all(feature = "file", feature = "slice"))]
use crate::Settings;
#[cfg(all(feature = "file", feature = "slice"))]
use crate::migration::BlockSource;
use crate::settings::{BlockOptions, Kept};

impl Mount {
    /// Shows the region as a block device, a node in `/dev`: of the kind that [`BlockOptions`] asks
    /// for, or of the best that works here. Needs root. The region's size must be whole sectors.
    ///
    /// # Errors
    /// What the settings, the cache, the remote or the kernel object to, in one line; where no kind works, why each does
    /// not.
    pub async fn block(self) -> Result<BlockMount> {
        crate::engine::run(open(self)).await
    }
}

/// A kind of device that does not work here, and why.
#[derive(Debug, Clone)]
pub struct Refused {
    /// The kind.
    pub kind: Kind,
    /// What is missing.
    pub error: Error,
}

async fn open(mount: Mount) -> Result<BlockMount> {
    let (options, settings) = (&mount.settings.block, block_settings(&mount)?);
    let plan = Plan::new(options.kind, settings, options.link.clone(), mount.remote.size())?;
    plan.show(region::build(mount).await?).await
}

/// How a region is to be shown: checked, as far as that is possible before it is there.
pub(crate) struct Plan {
    kinds: Vec<Kind>,
    settings: BlockSettings,
    link: Option<PathBuf>,
    refused: Vec<Refused>,
}

impl Plan {
    fn new(wanted: Option<Kind>, settings: BlockSettings, link: Option<PathBuf>, size: u64) -> Result<Self> {
        link.as_deref().map_or(Ok(()), Link::check)?;
        let mut refused = Vec::new();
        let kinds = wanted.map_or(Kind::ALL.to_vec(), |kind| vec![kind]);
        let settings = settings.fit_size(size)?;
        let works = |kind: &Kind| check(*kind).map_err(|error| refused.push(Refused { kind: *kind, error })).is_ok();
        let kinds: Vec<_> = kinds.into_iter().filter(works).collect();
        if kinds.is_empty() {
            return Err(none_works(&refused));
        }
        Ok(Self { kinds, settings, link, refused })
    }

    /// For a region of `size` bytes that a migration brings; `kind` goes before that of the settings.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub(crate) fn arriving(kind: Option<Kind>, settings: &Settings, size: u64) -> Result<Self> {
        if settings.block.keep.is_some() {
            let message = "a device that arrives cannot be kept: what it has not pulled yet dies with the process";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
        }
        let device = device_settings(&settings.block, settings.read_only, None);
        Self::new(kind.or(settings.block.kind), device, settings.block.link.clone(), size)
    }

    /// Shows it as the best kind that works. Runs on the engine.
    pub(crate) async fn show(mut self, region: Region) -> Result<BlockMount> {
        for kind in self.kinds {
            match Shown::open(kind, region.backend(), &self.settings).await {
                Ok(shown) => {
                    let link = self.link.map(|link| Link::make(shown.device.path(), link)).transpose();
                    let link = link.map_err(|error| given_up(&region, error))?;
                    return Ok(BlockMount { link, shown, region, refused: self.refused });
                }
                Err(error) if error.kind() == ErrorKind::InvalidInput => return Err(given_up(&region, error)),
                Err(error) => self.refused.push(Refused { kind, error }),
            }
        }
        Err(given_up(&region, none_works(&self.refused)))
    }
}

/// A mount that could not be shown has nothing to store; its error is the one to tell.
fn given_up(region: &Region, error: Error) -> Error {
    region.abandon();
    error
}

fn none_works(refused: &[Refused]) -> Error {
    if let [only] = refused {
        return only.error.clone();
    }
    let reasons: Vec<_> =
        refused.iter().map(|Refused { kind, error }| format!("{kind}: {}", error.message())).collect();
    let message = format!("no kind of block device works here: {}", reasons.join("; "));
    Error::new(refused.first().map_or(ErrorKind::NotFound, |first| first.error.kind()), Operation::Mount, message)
}

fn block_settings(mount: &Mount) -> Result<BlockSettings> {
    let options = &mount.settings.block;
    let keep = options.keep.map(|Kept { id, meanwhile }| keep_region(mount, id, meanwhile)).transpose()?;
    if keep.is_some() && options.kind != Some(Kind::Ublk) {
        let message = "only ublk devices can be kept; ask for that kind";
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
    }
    let read_only = mount.settings.read_only || mount.remote.capabilities().read_only;
    Ok(device_settings(options, read_only, keep))
}

fn device_settings(options: &BlockOptions, read_only: bool, keep: Option<Keep>) -> BlockSettings {
    let default = BlockSettings::default();
    BlockSettings {
        read_only,
        logical_block_size: options.logical_block_size.unwrap_or(default.logical_block_size),
        queues: options.queues,
        depth: options.depth.unwrap_or(default.depth),
        keep,
        ..default
    }
}

fn keep_region(mount: &Mount, id: u32, meanwhile: r3map_block::Meanwhile) -> Result<Keep> {
    let region = mount.identity.clone().ok_or_else(|| {
        let message = "a device that is kept must know whose it is; give the region a name with `identity`";
        Error::new(ErrorKind::InvalidInput, Operation::Mount, message)
    })?;
    // Its users would go on as if nothing had happened, without what they have written.
    if mount.managed && mount.settings.cache == Cache::Memory {
        let message = "what a mount has in memory and not pushed dies with the process, and a kept device would go on \
                       without it: use a cache file, or a direct mount";
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
    }
    Ok(Keep { id, region, meanwhile })
}

/// A device, and what it stands on. In this order it is dropped.
struct Shown {
    device: Arc<BlockDevice>,
    #[cfg(feature = "file")]
    below: Option<Below>,
}

/// The file under a loop device, and the folder that it is in.
#[cfg(feature = "file")]
struct Below {
    file: Fuse,
    _folder: tempfile::TempDir,
}

impl Shown {
    async fn open(kind: Kind, backend: Arc<dyn Backend>, settings: &BlockSettings) -> Result<Self> {
        match kind {
            Kind::Loop => Self::over_file(backend, settings).await,
            Kind::Ublk | Kind::Nbd => Ok(Self::new(BlockDevice::open(kind, backend, settings.clone()).await?)),
        }
    }

    fn new(device: BlockDevice) -> Self {
        Self {
            device: Arc::new(device),
            #[cfg(feature = "file")]
            below: None,
        }
    }

    #[cfg(feature = "file")]
    async fn over_file(backend: Arc<dyn Backend>, settings: &BlockSettings) -> Result<Self> {
        let cannot =
            |error| Error::from_io(Operation::Mount, "there is no folder for the file under the device", error);
        let folder = tempfile::Builder::new().prefix("r3map-").tempdir().map_err(cannot)?;
        let file_settings = r3map_file::FileSettings { read_only: settings.read_only, ..Default::default() };
        let file = Fuse::open(backend, folder.path().join("region"), file_settings).await?;
        let device = BlockDevice::over_file(file.path(), settings.clone()).await?;
        Ok(Self { device: Arc::new(device), below: Some(Below { file, _folder: folder }) })
    }

    #[cfg(not(feature = "file"))]
    async fn over_file(_: Arc<dyn Backend>, _: &BlockSettings) -> Result<Self> {
        let message = "a loop device needs the file frontend, which this program was built without";
        Err(Error::new(ErrorKind::NotFound, Operation::Mount, message))
    }

    async fn unmount(&self) -> Result<()> {
        self.device.unmount().await?;
        #[cfg(feature = "file")]
        if let Some(below) = &self.below {
            below.file.unmount().await?;
        }
        Ok(())
    }

    async fn abandon(&self) {
        self.device.abandon().await;
        #[cfg(feature = "file")]
        if let Some(below) = &self.below {
            let _ = below.file.detach().await; // its error is that nothing was stored, which is what was asked for
        }
    }
}

/// A region that is a block device. Dropping it detaches the device, and stores what was written if the remote answers at
/// once; [`close`](Self::close) it to be sure.
///
/// Do not store to a shared mapping of the device, or read from it without end, on a thread that r3map itself needs: use
/// threads of your own.
pub struct BlockMount {
    // In this order they are dropped: what the kernel still holds goes into the region.
    link: Option<Link>,
    shown: Shown,
    region: Region,
    refused: Vec<Refused>,
}

impl BlockMount {
    /// The device's node, for instance `/dev/ublkb0`.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shown.device.path()
    }

    /// The symbolic link to it, if one was [asked for](BlockOptions::link).
    #[must_use]
    pub fn link(&self) -> Option<&Path> {
        self.link.as_ref().map(Link::path)
    }

    /// What kind of device it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.shown.device.kind()
    }

    /// The better kinds, and why they do not work here.
    #[must_use]
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// What the mount stands on.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// The region as one that can leave for another host; see [`crate::migration`]. What a file system on the device holds
    /// is not the device's: it is the application's to freeze it (`fsfreeze`) or to unmount it when it is suspended.
    ///
    /// # Errors
    /// `InvalidInput` unless the mount was made to be [migratable](Mount::migratable).
    #[cfg(all(feature = "file", feature = "slice"))]
    pub fn source(&self) -> Result<Arc<dyn r3map_migrate::Source>> {
        Ok(Arc::new(self.leaving(None)?))
    }

    /// The same, where a region that has just arrived is kept from being changed by `arriving`.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub(crate) fn leaving(&self, arriving: Option<r3map_pipeline::Closed>) -> Result<BlockSource> {
        Ok(BlockSource::new(self.region.guarded()?, Arc::downgrade(&self.shown.device), arriving))
    }

    /// Opens the device.
    ///
    /// # Errors
    /// If the kernel does not let us.
    pub async fn file(&self) -> Result<File> {
        self.shown.device.open_file().await
    }

    /// Maps the whole device into memory, shared with everybody who uses it. A loop device must not be mapped by the
    /// process that serves it, which is this one: use another kind, or [`Mount::slice`].
    ///
    /// # Errors
    /// `InvalidInput` for a loop device; as `mmap(2)`.
    pub async fn map(&self) -> Result<FileMapping> {
        if self.kind() == Kind::Loop {
            let message = "a loop device cannot be mapped by the process that serves its file; use a slice";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
        }
        self.shown.device.map().await
    }

    /// Writes what the kernel has cached, and makes everything that was written durable.
    ///
    /// # Errors
    /// What could not be stored.
    pub async fn flush(&self) -> Result<()> {
        self.shown.device.sync().await
    }

    /// Returns when the device is gone because somebody else has removed it. Of a loop device it is not known: it never
    /// returns.
    pub async fn gone(&self) {
        self.shown.device.gone().await;
    }

    /// Removes the device, stores everything, and ends the mount. Can be called again after an error; what is still there
    /// then is removed by [`abandon`](Self::abandon), or when this is dropped.
    ///
    /// # Errors
    /// One that [`is_busy`](Self::is_busy) while the device is in use; what could not be stored.
    pub async fn close(&self) -> Result<()> {
        // How long storing may take is for the retry stage to say, which counts silence; removing has a time-out of its
        // own, in which there must be little left to do.
        if self.shown.device.is_there() {
            self.flush().await?;
        }
        self.shown.unmount().await?;
        self.region.close().await
    }

    /// Whether an error of [`close`](Self::close) says that the device is in use: it is worth to call it again.
    #[must_use]
    pub fn is_busy(error: &Error) -> bool {
        error.kind() == ErrorKind::Conflict && error.operation() == Operation::Close
    }

    /// Removes the device from whoever still uses it, and ends the mount without storing anything more.
    pub async fn abandon(&self) {
        self.region.abandon();
        self.shown.abandon().await;
    }
}

/// Removes a device that was kept when its process died: whatever waits for it gets errors. Blocks.
///
/// # Errors
/// `InvalidInput` for a path that is no such device, `NotFound` if there is none, `Denied` if it is not r3map's, `Conflict`
/// if it is being served.
pub fn remove_device(device: impl Into<PathBuf>) -> Result<()> {
    r3map_block::remove(&device.into())
}
