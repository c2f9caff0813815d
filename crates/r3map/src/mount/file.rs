//! Mounts that are shown as a file: on a path, or as an opened file.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, absolute};
#[cfg(feature = "slice")]
use std::sync::Arc;

#[cfg(feature = "slice")]
use r3map_core::Geometry;
use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_file::{Caching, FileMount as Fuse, FileSettings, OpenedFile, Show};
#[cfg(feature = "slice")]
use r3map_file::{Flusher, PreparedMount};

use super::Mount;
use super::region::{self, Region};
#[cfg(feature = "slice")]
use crate::migration::{FileSource, Syncing};
use crate::{Cache, Settings};

impl Mount {
    /// Shows the region as the file `path`, which must not exist yet, or be empty; with
    /// [`FileOptions::entry`](crate::FileOptions::entry) as a file in the directory `path`, likewise. Any program can
    /// read, write and map it. Where a killed process left its mount behind on the path, that is taken over.
    ///
    /// # Errors
    /// What the settings, the cache, the remote or FUSE object to, in one line.
    pub async fn path(self, path: impl AsRef<Path>) -> Result<PathMount> {
        let path = path.as_ref().to_owned();
        crate::engine::run(async move {
            let (settings, managed) = (self.settings.clone(), self.managed);
            // Before anything is made or pulled.
            PathMount::check(&path, &settings, managed).await?;
            PathMount::show(region::build(self).await?, &path, &settings, managed).await
        })
        .await
    }

    /// Opens the region as a file that is on no path.
    ///
    /// # Errors
    /// As [`Self::path`].
    pub async fn file(self) -> Result<FileMount> {
        crate::engine::run(async move {
            let (settings, managed) = (self.settings.clone(), self.managed);
            FileMount::show(region::build(self).await?, &settings, managed).await
        })
        .await
    }
}

impl Region {
    /// A mount that could not be shown has nothing to store; its error is the one to tell.
    fn given_up(&self, error: Error) -> Error {
        self.abandon();
        error
    }
}

fn file_settings(settings: &Settings, managed: bool) -> FileSettings {
    let default = FileSettings::default();
    let caching = match (settings.file.direct_io, managed) {
        (true, _) => Caching::Never,
        (false, true) => Caching::Keep,
        // Others may change the remote: whoever opens the file sees what they have written.
        (false, false) => Caching::UntilOpened,
    };
    FileSettings {
        show: settings.file.entry.clone().map_or(Show::File, Show::Entry),
        source: settings.file.source.clone().unwrap_or(default.source),
        read_only: settings.read_only,
        allow_other: settings.file.allow_other,
        caching,
        ..default
    }
}

/// A region that is a file on a path, or in a directory of its own. Dropping it unmounts, and stores what was written if the remote answers at once;
/// [`close`](Self::close) it to be sure.
pub struct PathMount {
    // In this order they are dropped: what the kernel still holds goes into the region.
    shown: Fuse,
    region: Region,
}

impl PathMount {
    /// Shows a region. Runs on the engine.
    pub(crate) async fn show(region: Region, path: &Path, settings: &Settings, managed: bool) -> Result<Self> {
        match Fuse::open(region.backend(), path, file_settings(settings, managed)).await {
            Ok(shown) => Ok(Self { shown, region }),
            Err(error) => Err(region.given_up(error)),
        }
    }

    /// Whether a region could be shown on the path. Runs on the engine.
    pub(crate) async fn check(path: &Path, settings: &Settings, managed: bool) -> Result<()> {
        if let Cache::File(cache) = &settings.cache
            && absolute(cache).ok().is_some_and(|cache| absolute(path).is_ok_and(|path| path == cache))
        {
            let message = format!("{} cannot be the cache file and show the region too", path.display());
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
        }
        Fuse::check(path, file_settings(settings, managed)).await
    }

    /// Does in advance what can be done to show a region that is to arrive. Runs on the engine.
    #[cfg(feature = "slice")]
    pub(crate) async fn prepare(geometry: &Geometry, settings: &Settings) -> Result<PreparedMount> {
        Fuse::prepare(geometry.size(), geometry.chunk_size(), file_settings(settings, true)).await
    }

    /// Shows a region that has arrived. Runs on the engine.
    #[cfg(feature = "slice")]
    pub(crate) async fn show_prepared(region: Region, path: &Path, prepared: PreparedMount) -> Result<Self> {
        match prepared.show(region.backend(), path).await {
            Ok(shown) => Ok(Self { shown, region }),
            Err(error) => Err(region.given_up(error)),
        }
    }

    /// The region as one that can leave for another host; see [`crate::migration`].
    ///
    /// # Errors
    /// `InvalidInput` unless the mount was made to be [migratable](Mount::migratable).
    #[cfg(feature = "slice")]
    pub fn source(&self) -> Result<Arc<dyn r3map_migrate::Source>> {
        Ok(Arc::new(FileSource { guarded: self.region.guarded()?, sync: self.syncing() }))
    }

    /// Has the kernel hand over what it holds, from now on whenever it is called.
    #[cfg(feature = "slice")]
    pub(crate) fn syncing(&self) -> Syncing {
        syncing(self.shown.flusher())
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shown.path()
    }

    /// What the mount stands on.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Hands over what the kernel still holds of mappings, and makes everything that was written durable.
    ///
    /// # Errors
    /// What could not be stored; it stays to be stored by the next flush.
    pub async fn flush(&self) -> Result<()> {
        self.shown.flush().await
    }

    /// Makes the kernel forget what it has cached of a range of bytes, because the region changed underneath.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub async fn invalidate(&self, range: Range<u64>) -> Result<()> {
        self.shown.invalidate(range).await
    }

    /// Returns when the file is not mounted any more, by whoever unmounted it.
    pub async fn unmounted(&self) {
        self.shown.unmounted().await;
    }

    /// Unmounts, stores everything, and ends the mount. Can be called again after an error; what is still mounted then
    /// is unmounted by [`abandon`](Self::abandon), or when this is dropped.
    ///
    /// # Errors
    /// One that [`is_busy`](Self::is_busy) while the file is in use; what could not be stored.
    pub async fn close(&self) -> Result<()> {
        // How long storing may take is for the retry stage to say, which counts silence; unmounting has a time-out of its
        // own, in which there must be little left to do.
        self.shown.flush().await?;
        // What the kernel holds of mappings is told of once if it could not be handed over, and never by the region.
        self.shown.unmount().await?;
        self.region.close().await
    }

    /// Whether an error of [`close`](Self::close) says that the file is in use, or was written to meanwhile: it is worth
    /// to call it again.
    #[must_use]
    pub fn is_busy(error: &Error) -> bool {
        // A remote that has become another one is a conflict too, but in a write or a flush.
        error.kind() == ErrorKind::Conflict && error.operation() == Operation::Close
    }

    /// Unmounts whoever still uses the file, and ends the mount without storing anything more.
    pub async fn abandon(&self) {
        self.region.abandon();
        if let Err(error) = self.shown.abandon().await {
            tracing::warn!(%error, "the file cannot be unmounted");
        }
    }
}

/// A region that is an opened file. Dropping it stores what was written if the remote answers at once;
/// [`close`](Self::close) it to be sure.
pub struct FileMount {
    opened: OpenedFile,
    region: Region,
}

impl FileMount {
    /// Shows a region. Runs on the engine.
    pub(crate) async fn show(region: Region, settings: &Settings, managed: bool) -> Result<Self> {
        match OpenedFile::open(region.backend(), file_settings(settings, managed)).await {
            Ok(opened) => Ok(Self { opened, region }),
            Err(error) => Err(region.given_up(error)),
        }
    }

    /// The region as one that can leave for another host; see [`crate::migration`].
    ///
    /// # Errors
    /// `InvalidInput` unless the mount was made to be [migratable](Mount::migratable).
    #[cfg(feature = "slice")]
    pub fn source(&self) -> Result<Arc<dyn r3map_migrate::Source>> {
        Ok(Arc::new(FileSource { guarded: self.region.guarded()?, sync: self.syncing() }))
    }

    /// Has the kernel hand over what it holds, from now on whenever it is called.
    #[cfg(feature = "slice")]
    pub(crate) fn syncing(&self) -> Syncing {
        syncing(self.opened.flusher())
    }

    /// The file. Use it from threads that may wait: a read can take as long as the remote.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.opened
    }

    /// What the mount stands on.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Hands over what the kernel still holds of mappings, and makes everything that was written durable.
    ///
    /// # Errors
    /// What could not be stored; it stays to be stored by the next flush.
    pub async fn flush(&self) -> Result<()> {
        self.opened.flusher().flush().await
    }

    /// Makes the kernel forget what it has cached of a range of bytes, because the region changed underneath.
    ///
    /// # Errors
    /// If the kernel does not answer.
    pub async fn invalidate(&self, range: Range<u64>) -> Result<()> {
        self.opened.invalidate(range).await
    }

    /// Closes the file, stores everything, and ends the mount.
    ///
    /// # Errors
    /// What could not be stored.
    pub async fn close(self) -> Result<()> {
        let Self { opened, region } = self;
        // As for a file on a path: closing has a time-out of its own, in which there must be little left to do.
        let flushed = opened.flusher().flush().await;
        let handed_over = opened.close().await;
        region.close().await.and(flushed).and(handed_over)
    }

    /// Closes the file and ends the mount without storing anything more.
    pub async fn abandon(self) {
        let Self { opened, region } = self;
        region.abandon();
        if let Err(error) = opened.abandon().await {
            tracing::warn!(%error, "the file was not closed in an orderly way");
        }
    }
}

/// A file's flush, as often as it is asked for.
#[cfg(feature = "slice")]
fn syncing(flusher: Flusher) -> Syncing {
    Arc::new(move || {
        let flusher = flusher.clone();
        Box::pin(async move { flusher.flush().await })
    })
}
