//! Symbolic links to devices, whose names nobody knows beforehand.

use std::fs::{read_link, remove_file};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use r3map_core::{Error, ErrorKind, Operation, Result};

/// A symbolic link to a device. Dropping it removes it, if it is still the same one.
pub(crate) struct Link {
    path: PathBuf,
    identity: Identity,
}

/// What tells a link from another one that somebody made in its place: its number may be used again, but not within the
/// same instant.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> io::Result<Identity> {
    path.symlink_metadata().map(|found| (found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
}

impl Link {
    /// Whether a link can be made at `path`: where nothing is, or a link to a device that a killed process left behind.
    pub(crate) fn check(path: &Path) -> Result<()> {
        match read_link(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(target) if is_left_over(&target) => Ok(()),
            _ => {
                let message =
                    format!("{} exists already; the link to the device needs a place of its own", path.display());
                Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message))
            }
        }
    }

    /// Makes a link to `device`.
    pub(crate) fn make(device: &Path, path: PathBuf) -> Result<Self> {
        // What was left behind may lead to where the new device is.
        if read_link(&path).ok().as_deref() != Some(device) {
            Self::check(&path)?;
        }
        let _ = remove_file(&path); // what a killed process left behind
        let made = symlink(device, &path).and_then(|()| identity(&path));
        let identity = made.map_err(|error| {
            Error::from_io(Operation::Mount, format!("the link {} cannot be made", path.display()), error)
        })?;
        Ok(Self { path, identity })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
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
