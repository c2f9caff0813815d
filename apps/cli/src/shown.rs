//! What a region is shown as: a file, or a block device and perhaps a symbolic link to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use r3map::migration::{Arrived, Source};
use r3map::{BlockMount, Mount, PathMount, Region};

use crate::args::As;
use crate::output::Output;

/// A region that is shown.
pub(crate) enum Shown {
    /// As a file.
    File(PathMount),
    /// As a block device.
    Block(BlockMount),
}

impl Shown {
    /// Shows it, a file at `path`; the settings say where the link to a device is.
    pub(crate) async fn open(mount: Mount, r#as: As, path: Option<PathBuf>, output: Output) -> Result<Self> {
        if r#as == As::File {
            let path = path.context("a file needs a PATH")?;
            return Ok(Self::File(mount.path(path).await?));
        }
        let block = mount.block().await?;
        tell_refused(&block, output);
        Ok(Self::Block(block))
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Self::File(file) => View::File(file),
            Self::Block(block) => View::Block(block),
        }
    }
}

/// Says why the device is not of a better kind.
pub(crate) fn tell_refused(block: &BlockMount, output: Output) {
    for better in block.refused() {
        output.note(&better.kind.to_string(), better.error.message());
    }
}

/// The same, where somebody else has it.
#[derive(Clone, Copy)]
pub(crate) enum View<'a> {
    /// As a file.
    File(&'a PathMount),
    /// As a block device.
    Block(&'a BlockMount),
}

impl<'a> View<'a> {
    /// Of a region that has arrived, if it is one of the two.
    pub(crate) fn arrived(region: &'a Arrived) -> Option<Self> {
        region.path().map(View::File).or_else(|| region.block().map(View::Block))
    }

    /// Where it is.
    pub(crate) fn path(self) -> &'a Path {
        match self {
            Self::File(file) => file.path(),
            Self::Block(block) => block.path(),
        }
    }

    /// The symbolic link to it, if there is one.
    pub(crate) fn link(self) -> Option<&'a Path> {
        match self {
            Self::File(_) => None,
            Self::Block(block) => block.link(),
        }
    }

    /// What it is, in one word.
    pub(crate) fn word(self) -> String {
        match self {
            Self::File(_) => "file".to_owned(),
            Self::Block(block) => block.kind().to_string(),
        }
    }

    pub(crate) fn region(self) -> &'a Region {
        match self {
            Self::File(file) => file.region(),
            Self::Block(block) => block.region(),
        }
    }

    /// The region as one that can leave.
    pub(crate) fn source(self) -> r3map::Result<Arc<dyn Source>> {
        match self {
            Self::File(file) => file.source(),
            Self::Block(block) => block.source(),
        }
    }

    /// Returns when somebody else has unmounted or removed it.
    pub(crate) async fn gone(self) {
        match self {
            Self::File(file) => file.unmounted().await,
            Self::Block(block) => block.gone().await,
        }
    }

    /// Unmounts or removes it, and stores everything.
    pub(crate) async fn close(self) -> r3map::Result<()> {
        match self {
            Self::File(file) => file.close().await,
            Self::Block(block) => block.close().await,
        }
    }

    /// Whether an error of [`Self::close`] says that it is in use.
    pub(crate) fn is_busy(self, error: &r3map::Error) -> bool {
        match self {
            Self::File(_) => PathMount::is_busy(error),
            Self::Block(_) => BlockMount::is_busy(error),
        }
    }

    /// Ends it without storing anything more.
    pub(crate) async fn abandon(self) {
        match self {
            Self::File(file) => file.abandon().await,
            Self::Block(block) => block.abandon().await,
        }
    }
}
