//! Asking a file system that this very process serves (FUSE), so that the process can still be killed.
//!
//! The kernel gives up on a server when the last descriptor of its device is closed. A thread that waits for its own
//! process's server cannot be killed before it is answered, and keeps the process's table of descriptors alive: if the
//! process is killed then, the thread waits for the server, and the end of the server for the thread, for ever. Here
//! such calls are made on a thread with a table of its own, in which the device is not.
//!
//! What a program does with the file itself is out of reach: only these calls, which a server makes by its own.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use libc::{c_long, c_uint};
use rustix::mount::UnmountFlags;

/// Opens a file for reading, and closes it.
///
/// # Errors
/// As `open(2)`, and if no thread can be started.
pub fn open(path: &Path) -> io::Result<()> {
    apart(None, || File::open(path).map(drop))
}

/// The same for a mount that is on no path, of which there is only a descriptor: its root, or `entry` in it.
///
/// # Errors
/// As [`open`]; where `/proc` is not there.
pub fn open_detached(mount: BorrowedFd<'_>, entry: Option<&OsStr>) -> io::Result<()> {
    let mut path = PathBuf::from(format!("/proc/thread-self/fd/{}", mount.as_raw_fd()));
    path.extend(entry);
    apart(Some(mount), || File::open(path).map(drop))
}

/// `fsync(2)` of the file on a path.
///
/// # Errors
/// As `open(2)` and `fsync(2)`, and if no thread can be started.
pub fn sync(path: &Path) -> io::Result<()> {
    apart(None, || File::open(path)?.sync_all())
}

/// `fsync(2)` of an open file.
///
/// # Errors
/// As `fsync(2)`, and if no thread can be started.
pub fn sync_file(file: &File) -> io::Result<()> {
    apart(Some(file.as_fd()), || file.sync_all())
}

/// `umount2(2)`, which writes what is left and waits for that.
///
/// # Errors
/// As `umount2(2)`, and if no thread can be started.
pub fn unmount(path: &Path, flags: UnmountFlags) -> io::Result<()> {
    apart(None, || Ok(rustix::mount::unmount(path, flags)?))
}

/// Does `work` on a thread whose table of descriptors has nothing but the standard streams and `kept`, and waits for it.
/// Where the kernel cannot do that (before 5.9), `work` is done all the same.
fn apart(kept: Option<BorrowedFd<'_>>, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let kept = kept.map(|kept| kept.as_raw_fd().unsigned_abs());
    std::thread::scope(|scope| {
        let alone = move || {
            leave_table(kept);
            work()
        };
        let thread = std::thread::Builder::new().name("r3map-apart".into()).spawn_scoped(scope, alone)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Does `work` on such a thread, which goes on by itself. What `work` owns must have no descriptor: it is not in that
/// thread's table.
pub(crate) fn start(work: impl FnOnce() + Send + 'static) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name("r3map-apart".into()).spawn(move || {
        leave_table(None);
        work();
    })
}

/// Gives the calling thread its own copy of the table of descriptors, and closes in it all but the standard streams and
/// `kept`.
fn leave_table(kept: Option<c_uint>) {
    /// `CLOSE_RANGE_UNSHARE`: copy the table first, and of that only what stays open.
    const UNSHARE: c_uint = 2;
    const FIRST: c_uint = 3;
    let close = |first: c_uint, last: c_uint| {
        if first <= last {
            // SAFETY: the call takes three numbers. What it closes it closes in this thread's own copy of the table;
            // the thread owns no descriptors, and does not use any that was opened before, but `kept`.
            let _ = unsafe { libc::syscall(libc::SYS_close_range, first as c_long, last as c_long, UNSHARE as c_long) };
        }
    };
    match kept {
        Some(kept) if kept >= FIRST => {
            close(kept + 1, c_uint::MAX);
            close(FIRST, kept - 1);
        }
        _ => close(FIRST, c_uint::MAX),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn open_files() -> usize {
        std::fs::read_dir("/proc/thread-self/fd").expect("there is a /proc").count()
    }

    #[test]
    fn the_thread_has_a_table_of_its_own_and_ours_is_untouched() {
        let dir = tempfile::tempdir().expect("there is room");
        let path = dir.path().join("file");
        let mut file = File::create(&path).expect("there is room");
        apart(None, || {
            assert_eq!(open_files(), 4, "the standard streams, and the folder that is read");
            assert!(file.metadata().is_err(), "this one is not among them");
            Ok(())
        })
        .expect("it works");
        apart(Some(file.as_fd()), || {
            assert_eq!(open_files(), 5);
            file.metadata().map(drop)
        })
        .expect("it is kept");
        file.write_all(b"still open").expect("our own table is as it was");
        open(&path).expect("it is there");
        sync(&path).expect("it can be synced");
        sync_file(&file).expect("so can this");
        let folder = File::open(dir.path()).expect("it is there");
        open_detached(folder.as_fd(), None).expect("it is what the descriptor is of");
        open_detached(folder.as_fd(), Some(OsStr::new("file"))).expect("it is in there");
        assert!(open_detached(folder.as_fd(), Some(OsStr::new("absent"))).is_err());
        assert!(open(&dir.path().join("absent")).is_err());
        assert!(unmount(&path, UnmountFlags::empty()).is_err(), "nothing is mounted there");
    }
}
