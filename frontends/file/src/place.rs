//! The place that a mount lies on: found, judged, made where it is missing, cleared of a mount that a killed process
//! left behind, and removed again if it was made here.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::kernel::{Unmount, shown, unmount};
use crate::mountinfo::{Mounted, mounted_on, one_line};
use crate::settings::Show;
use r3map_pipeline::blocking::within;

/// How long a path may take to say what it is. A mount whose process hangs takes for ever.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// How many dead mounts may lie on top of each other.
const DEAD_MOUNTS: usize = 16;

/// An empty file or directory that is reserved for one mount.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// Device and inode of what was made here.
    made: Option<(u64, u64)>,
    /// Held until the mount is there, so that two processes cannot mount on the same path.
    _reserved: File,
}

/// What is removed after unmounting.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Place {
    /// Reserves `path` for a mount that shows `show`. Blocks for as long as the path takes to answer, at most some
    /// seconds.
    ///
    /// # Errors
    /// `Conflict` if something is mounted there and alive or another process is just mounting there, `InvalidInput` if
    /// it is not empty or not of the right kind, `NotFound` if its directory does not exist.
    pub(crate) fn reserve(path: &Path, show: &Show) -> Result<Self> {
        let path = absolute(path)?;
        clear_dead_mounts(&path)?;
        let fresh = look(&path)?.is_none() && make(&path, show)?;
        let found = look(&path)?.ok_or_else(|| conflict(&path, "was removed by somebody else"))?;
        // What another process has mounted there meanwhile is not empty either, and is the better explanation.
        check_kind(&path, &found, show).or_else(|error| refuse_mounted(&path).and(Err(error)))?;
        let reserved = lock(&path)?;
        // Whoever held the lock before may have mounted on it meanwhile.
        refuse_mounted(&path)?;
        Ok(Self { path, made: fresh.then(|| (found.dev(), found.ino())), _reserved: reserved })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is to be removed after unmounting.
    pub(crate) fn made(&self) -> Made {
        Made { path: self.path.clone(), identity: self.made }
    }
}

impl Made {
    /// Removes the placeholder if it was made here and is still the same empty file or directory.
    pub(crate) fn remove(&self) {
        let Some(identity) = self.identity else { return };
        let Ok(found) = fs::symlink_metadata(&self.path) else { return };
        if (found.dev(), found.ino()) != identity {
            return;
        }
        let removed = match found.is_dir() {
            true => fs::remove_dir(&self.path),
            false if found.len() == 0 => fs::remove_file(&self.path),
            false => return,
        };
        if let Err(error) = removed {
            tracing::warn!(%error, path = %shown(&self.path), "the placeholder cannot be removed");
        }
    }
}

/// The path with every directory resolved. Its last part is looked at only if it is a symbolic link, because a dead
/// mount there answers nothing.
fn absolute(path: &Path) -> Result<PathBuf> {
    let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
        return resolve(path);
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let absolute = resolve(parent)?.join(name);
    match fs::read_link(&absolute) {
        Ok(_) => resolve(&absolute),
        Err(_) => Ok(absolute),
    }
}

fn resolve(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path)
        .map_err(|error| Error::from_io(Operation::Mount, format!("{} cannot be mounted on", shown(path)), error))
}

/// What is at the path; none if nothing is.
fn look(path: &Path) -> Result<Option<Metadata>> {
    match probe(path)? {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::from_io(Operation::Mount, format!("{} cannot be mounted on", shown(path)), error)),
    }
}

fn probe(path: &Path) -> Result<io::Result<Metadata>> {
    answer(path, |path| fs::symlink_metadata(path))
}

/// What `ask` says of a path, if that is answered at all.
fn answer<T: Send + 'static>(
    path: &Path,
    ask: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> Result<io::Result<T>> {
    let asked = path.to_owned();
    within(PROBE_LIMIT, "the answer", move || Ok(ask(&asked)))
        .map_err(|_| conflict(path, "does not answer: what is mounted there hangs, end it first (`umount -f -l`)"))
}

/// Takes mounts of ours off the path whose process is gone. Anything else that is mounted there is refused.
fn clear_dead_mounts(path: &Path) -> Result<()> {
    for _ in 0..DEAD_MOUNTS {
        let Some(mounted) = mounted_on(path)? else { return Ok(()) };
        if !is_dead(path)? {
            return Err(taken(path, &mounted));
        }
        if !mounted.is_ours() {
            let message = format!("has a dead {} mount on it: unmount it first (`umount -l`)", mounted.kind);
            return Err(conflict(path, &message));
        }
        tracing::warn!(path = %shown(path), "taking over from a mount whose process is gone");
        unmount(path, Unmount::Detach)?;
    }
    refuse_mounted(path)
}

/// Whether the process that serves a mount is gone: the kernel then answers everything with `ENOTCONN`.
pub(crate) fn is_dead(path: &Path) -> Result<bool> {
    let dead = |error: io::Error| error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error());
    // Not `stat`, which the kernel answers by itself for a while after the process is gone.
    Ok(answer(path, |path| Ok(rustix::fs::statfs(path)?))?.is_err_and(dead))
}

fn refuse_mounted(path: &Path) -> Result<()> {
    match mounted_on(path)? {
        Some(mounted) => Err(taken(path, &mounted)),
        None => Ok(()),
    }
}

fn taken(path: &Path, mounted: &Mounted) -> Error {
    let what = format!("has {} ({}) mounted on it already", one_line(&mounted.source), mounted.kind);
    conflict(path, &what)
}

fn conflict(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Conflict, Operation::Mount, format!("{} {what}", shown(path)))
}

/// Makes an empty file or directory; whether it was made here. If somebody else was faster, what they made is judged
/// like anything else that is there.
fn make(path: &Path, show: &Show) -> Result<bool> {
    let made = match show {
        Show::File => OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop),
        Show::Entry(_) => fs::DirBuilder::new().mode(0o700).create(path),
    };
    match made {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(Error::from_io(Operation::Mount, format!("{} cannot be made", shown(path)), error)),
    }
}

fn check_kind(path: &Path, found: &Metadata, show: &Show) -> Result<()> {
    let refuse =
        |what: &str| Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, format!("{} {what}", shown(path))));
    match show {
        Show::File if found.is_dir() => refuse("is a directory: name a file that does not exist yet, or an empty one"),
        Show::File if !found.is_file() => refuse("is neither a file nor a directory"),
        Show::File if found.len() > 0 => refuse("is a file with something in it, which the mount would hide"),
        Show::Entry(_) if !found.is_dir() => refuse("is not a directory"),
        Show::Entry(_) if !is_empty(path)? => refuse("is a directory with something in it, which the mount would hide"),
        Show::File | Show::Entry(_) => Ok(()),
    }
}

fn is_empty(directory: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(directory)
        .map_err(|error| Error::from_io(Operation::Mount, format!("{} cannot be read", shown(directory)), error))?;
    Ok(entries.next().is_none())
}

/// Locks against other processes that are about to mount; where the file system has no locks, there is no such guard.
fn lock(path: &Path) -> Result<File> {
    let file = File::open(path)
        .map_err(|error| Error::from_io(Operation::Mount, format!("{} cannot be opened", shown(path)), error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(conflict(path, "is locked by another process, which may be mounting on it")),
        _ => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn refused(path: &Path, show: &Show) -> (ErrorKind, String) {
        let error = Place::reserve(path, show).unwrap_err();
        assert!(!error.to_string().contains('\n'));
        (error.kind(), error.to_string())
    }

    fn entry() -> Show {
        Show::Entry("region".into())
    }

    #[test]
    fn makes_what_is_missing_and_removes_only_that() {
        let home = TempDir::new().unwrap();
        for show in [Show::File, entry()] {
            let path = home.path().join("made");
            let place = Place::reserve(&path, &show).unwrap();
            assert_eq!(path.is_dir(), show != Show::File);
            place.made().remove();
            assert!(!path.exists());
        }
        let existing = home.path().join("existing");
        fs::write(&existing, "").unwrap();
        Place::reserve(&existing, &Show::File).unwrap().made().remove();
        assert!(existing.exists());
    }

    #[test]
    fn leaves_alone_what_was_put_in_its_place() {
        let home = TempDir::new().unwrap();
        let path = home.path().join("region");
        let place = Place::reserve(&path, &Show::File).unwrap();
        fs::write(&path, "precious").unwrap();
        place.made().remove();
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::rename(&path, home.path().join("elsewhere")).unwrap();
        fs::write(&path, "").unwrap();
        place.made().remove();
        assert!(path.exists());
    }

    #[test]
    fn refuses_what_a_mount_would_hide() {
        let home = TempDir::new().unwrap();
        let full = home.path().join("full");
        fs::write(&full, "x").unwrap();
        let (kind, message) = refused(&full, &Show::File);
        assert!(kind == ErrorKind::InvalidInput && message.contains("something in it"), "{message}");
        let (kind, message) = refused(home.path(), &Show::File);
        assert!(kind == ErrorKind::InvalidInput && message.contains("is a directory"), "{message}");
        let (kind, message) = refused(home.path(), &entry());
        assert!(kind == ErrorKind::InvalidInput && message.contains("something in it"), "{message}");
        let (kind, message) = refused(&full, &entry());
        assert!(kind == ErrorKind::InvalidInput && message.contains("not a directory"), "{message}");
        assert_eq!(refused(&home.path().join("no/such"), &Show::File).0, ErrorKind::NotFound);
        assert_eq!(refused(Path::new("/dev/null"), &Show::File).0, ErrorKind::InvalidInput);
        assert_eq!(refused(Path::new("/proc"), &Show::File).0, ErrorKind::Conflict);
    }

    #[test]
    fn is_reserved_for_one() {
        let home = TempDir::new().unwrap();
        let path = home.path().join("region");
        let first = Place::reserve(&path, &Show::File).unwrap();
        let (kind, message) = refused(&path, &Show::File);
        assert!(kind == ErrorKind::Conflict && message.contains("is locked"), "{message}");
        drop(first);
        Place::reserve(&path, &Show::File).unwrap();
    }

    #[test]
    fn follows_links_and_resolves_directories() {
        let home = TempDir::new().unwrap();
        let real = fs::canonicalize(home.path()).unwrap().join("real");
        fs::write(&real, "").unwrap();
        std::os::unix::fs::symlink(&real, home.path().join("link")).unwrap();
        assert_eq!(Place::reserve(&home.path().join("link"), &Show::File).unwrap().path(), real);
        let roundabout = home.path().join("../").join(home.path().file_name().unwrap()).join("real");
        assert_eq!(Place::reserve(&roundabout, &Show::File).unwrap().path(), real);
    }
}
