//! What `r3map mount` shows a region as: a file, or a block device and perhaps a symbolic link to it.

use std::fs::{read_link, remove_file};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use r3map::{BlockMount, Mount, PathMount, Region};

use crate::args::As;
use crate::output::Output;

/// A region that is shown.
pub(crate) enum Shown {
    /// As a file.
    File(PathMount),
    /// As a block device.
    Block(BlockMount, Option<Link>),
}

impl Shown {
    /// Shows it.
    pub(crate) async fn open(mount: Mount, r#as: As, path: Option<PathBuf>, output: Output) -> Result<Self> {
        if r#as == As::File {
            let path = path.context("a file needs a PATH")?;
            return Ok(Self::File(mount.path(path).await?));
        }
        if let Some(path) = &path {
            Link::check(path)?;
        }
        let block = mount.block().await?;
        for better in block.refused() {
            output.note(&better.kind.to_string(), better.error.message());
        }
        let link = path.map(|path| Link::make(block.path(), path)).transpose()?;
        Ok(Self::Block(block, link))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Block(block, _) => block.path(),
        }
    }

    /// The symbolic link to it, if there is one.
    pub(crate) fn link(&self) -> Option<&Path> {
        match self {
            Self::Block(_, Some(link)) => Some(&link.path),
            Self::File(_) | Self::Block(..) => None,
        }
    }

    /// What it is, in one word.
    pub(crate) fn word(&self) -> String {
        match self {
            Self::File(_) => "file".to_owned(),
            Self::Block(block, _) => block.kind().to_string(),
        }
    }

    pub(crate) fn region(&self) -> &Region {
        match self {
            Self::File(file) => file.region(),
            Self::Block(block, _) => block.region(),
        }
    }

    /// Returns when somebody else has unmounted or removed it.
    pub(crate) async fn gone(&self) {
        match self {
            Self::File(file) => file.unmounted().await,
            Self::Block(block, _) => block.gone().await,
        }
    }

    /// Unmounts or removes it, and stores everything.
    pub(crate) async fn close(&self) -> r3map::Result<()> {
        match self {
            Self::File(file) => file.close().await,
            Self::Block(block, _) => block.close().await,
        }
    }

    /// Whether an error of [`Self::close`] says that it is in use.
    pub(crate) fn is_busy(&self, error: &r3map::Error) -> bool {
        match self {
            Self::File(_) => PathMount::is_busy(error),
            Self::Block(..) => BlockMount::is_busy(error),
        }
    }

    /// Ends it without storing anything more.
    pub(crate) async fn abandon(&self) {
        match self {
            Self::File(file) => file.abandon().await,
            Self::Block(block, _) => block.abandon().await,
        }
    }
}

/// A symbolic link to a device. Dropping it removes it, if it is still the same one.
pub(crate) struct Link {
    path: PathBuf,
    identity: Identity,
}

/// What tells a link from another one that somebody made in its place: its number may be used again, but not within the
/// same instant.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> std::io::Result<Identity> {
    path.symlink_metadata().map(|found| (found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
}

impl Link {
    /// Whether a link can be made at `path`: where nothing is, or a link to a device that a killed process left behind.
    fn check(path: &Path) -> Result<()> {
        match read_link(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Ok(target) if is_left_over(&target) => Ok(()),
            _ => bail!("{} exists already; the link to the device needs a place of its own", path.display()),
        }
    }

    fn make(device: &Path, path: PathBuf) -> Result<Self> {
        // What was left behind may lead to where the new device is.
        if read_link(&path).ok().as_deref() != Some(device) {
            Self::check(&path)?;
        }
        let _ = remove_file(&path); // what a killed process left behind
        let made = symlink(device, &path).and_then(|()| identity(&path));
        let identity = made.with_context(|| format!("the link {} cannot be made", path.display()))?;
        Ok(Self { path, identity })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Somebody else may have removed it already, and put something else there.
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = remove_file(&self.path);
        }
    }
}

/// Whether a link leads to a device as we make them, that is none any more: the nodes of some kinds stay.
fn is_left_over(target: &Path) -> bool {
    let Some(name) = target.file_name().filter(|_| is_ours(target)) else { return false };
    match std::fs::read_to_string(Path::new("/sys/block").join(name).join("size")) {
        Ok(sectors) => sectors.trim() == "0",
        Err(_) => true,
    }
}

/// Whether a link leads to a device as we make them.
fn is_ours(target: &Path) -> bool {
    let name = target.strip_prefix("/dev").ok().and_then(Path::to_str).unwrap_or_default();
    ["ublkb", "nbd", "loop"]
        .iter()
        .any(|kind| name.strip_prefix(kind).is_some_and(|number| number.parse::<u32>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_put_only_where_it_harms_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let link = Link::make(Path::new("/dev/ublkb4000000"), path.clone()).unwrap();
        assert_eq!(read_link(&path).unwrap(), Path::new("/dev/ublkb4000000"));
        std::mem::forget(link); // as after kill -9
        drop(Link::make(Path::new("/dev/loop4000000"), path.clone()).unwrap());
        assert!(path.symlink_metadata().is_err());
        let link = Link::make(Path::new("/dev/loop4000000"), path.clone()).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        drop(link);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert!(Link::make(Path::new("/dev/loop4000000"), path.clone()).is_err());
        std::fs::remove_file(&path).unwrap();
        symlink("/dev/null", &path).unwrap();
        assert!(Link::check(&path).is_err(), "that is somebody else's");
    }

    #[test]
    fn devices_of_ours_are_known() {
        for (target, ours) in [("/dev/ublkb0", true), ("/dev/nbd15", true), ("/dev/sda", false), ("/dev/loopx", false)]
        {
            assert_eq!(is_ours(Path::new(target)), ours, "{target}");
        }
    }
}
