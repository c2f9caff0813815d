//! Mounting and unmounting: `mount(2)` where the caller may, the set-user-id helper `fusermount3` where not. It turns
//! what the kernel answers into one line that says what to do.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::mountinfo::{FILE_SYSTEM, SUBTYPE, one_line};
use crate::settings::FileSettings;

const DEVICE: &str = "/dev/fuse";
/// The helper of FUSE 3 and, where only that is there, of FUSE 2; they take the same arguments.
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// In which descriptor the helper finds the socket to send the opened device through: its standard input.
const HELPER_SOCKET: (&str, &str) = ("_FUSE_COMMFD", "0");
/// For how long what is in use may still be on its way to being closed.
const MOMENT: Duration = Duration::from_millis(300);

/// What a mount is to be.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) source: String,
    pub(crate) read_only: bool,
    pub(crate) allow_other: bool,
    pub(crate) max_read: u32,
}

impl Options {
    pub(crate) fn of(settings: &FileSettings) -> Self {
        let FileSettings { source, read_only, allow_other, .. } = settings;
        Self {
            source: source.clone(),
            read_only: *read_only,
            allow_other: *allow_other,
            max_read: settings.longest_read(),
        }
    }

    /// Those without a value that the kernel and the helper spell alike. The kernel checks permissions by mode, owner and
    /// group.
    fn flags(&self) -> &'static str {
        if self.allow_other { "default_permissions,allow_other" } else { "default_permissions" }
    }

    /// Those that the kernel and the helper spell alike.
    fn common(&self) -> String {
        format!("{},max_read={}", self.flags(), self.max_read)
    }
}

/// Whether a thread of this process may open a FUSE channel of its own.
pub(crate) fn device_can_be_opened() -> bool {
    open_device().is_ok()
}

/// Mounts on an existing file or directory and gives the channel to the kernel.
///
/// # Errors
/// `Unavailable` where the system has no FUSE, `NotFound` where its helper is missing, `Denied` where the user may not.
pub(crate) fn mount(path: &Path, options: &Options) -> Result<OwnedFd> {
    match mount_directly(path, options) {
        Err(error) if error.kind() == ErrorKind::Denied => mount_by_helper(path, options),
        done => done,
    }
}

fn open_device() -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

fn mount_directly(path: &Path, options: &Options) -> Result<OwnedFd> {
    let device = open_device().map_err(no_device)?;
    let mode = fs::metadata(path).map_err(|error| failed(path, "cannot be mounted on", error))?.mode();
    let data = format!(
        "fd={},rootmode={mode:o},user_id={},group_id={},{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        options.common()
    );
    let data = CString::new(data).map_err(|error| failed(path, "cannot be mounted on", error.into()))?;
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, options.read_only);
    rustix::mount::mount(options.source.as_str(), path, FILE_SYSTEM, flags, data.as_c_str()).map_err(|errno| {
        match errno {
            Errno::NODEV => no_device(errno),
            _ => failed(path, "cannot be mounted on", errno.into()),
        }
    })?;
    Ok(device)
}

/// A file system that the kernel has, and that is on no path. It ends when both descriptors are closed, unless it was
/// [put on a path](attach).
pub(crate) struct Detached {
    /// For who serves it.
    pub(crate) channel: OwnedFd,
    /// Stands for the mount.
    pub(crate) mount: OwnedFd,
}

/// Makes a file system whose root is a regular file or, for `directory`, a directory, and mounts it on no path.
///
/// # Errors
/// Where the caller may not do that himself (there is no helper for it), and before Linux 5.2.
pub(crate) fn detached(options: &Options, directory: bool) -> rustix::io::Result<Detached> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let channel = open_device()?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, value: &str| fsconfig_set_string(context.as_fd(), key, value);
    set("source", &options.source)?;
    set("subtype", SUBTYPE)?;
    set("fd", &channel.as_raw_fd().to_string())?;
    set("rootmode", if directory { "40700" } else { "100600" })?;
    set("user_id", &rustix::process::getuid().as_raw().to_string())?;
    set("group_id", &rustix::process::getgid().as_raw().to_string())?;
    set("max_read", &options.max_read.to_string())?;
    for flag in options.flags().split(',').chain(options.read_only.then_some("ro")) {
        fsconfig_set_flag(context.as_fd(), flag)?;
    }
    fsconfig_create(context.as_fd())?;
    let mut flags =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOATIME;
    flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, options.read_only);
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    Ok(Detached { channel, mount })
}

/// Puts a mount that is on no path on this one.
///
/// # Errors
/// What the kernel answers; the mount is on no path then.
pub(crate) fn attach(mount: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", rustix::fs::CWD, path, flags)
        .map_err(|errno| failed(path, "cannot be mounted on", errno.into()))
}

/// `MAJOR:MINOR` of a mount that is on no path. Whoever serves it is not asked.
pub(crate) fn device_of(mount: BorrowedFd<'_>) -> rustix::io::Result<String> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let facts = statx(mount, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    Ok(format!("{}:{}", facts.stx_dev_major, facts.stx_dev_minor))
}

fn no_device(errno: Errno) -> Error {
    let (kind, message) = match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => (
            ErrorKind::Unavailable,
            "FUSE is not available: load it with `modprobe fuse`, or give the container /dev/fuse".to_owned(),
        ),
        Errno::ACCESS | Errno::PERM => (ErrorKind::Denied, format!("no permission to open {DEVICE}")),
        _ => return Error::from_io(Operation::Mount, format!("{DEVICE} cannot be opened"), errno.into()),
    };
    Error::new(kind, Operation::Mount, message).with_source(errno)
}

fn mount_by_helper(path: &Path, options: &Options) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| failed(path, "cannot be mounted on", error))?;
    let mut list = format!("{},fsname={},subtype={SUBTYPE}", options.common(), escape(&options.source));
    if options.read_only {
        list.push_str(",ro");
    }
    let arguments = [OsStr::new("-o"), OsStr::new(&list), OsStr::new("--"), path.as_os_str()];
    let helper = start_helper(&arguments, Some(theirs.into()))?;
    let received = receive_device(&ours);
    match (finish_helper(helper)?, received) {
        (None, Ok(Some(device))) => Ok(device),
        (Some(complaint), _) => Err(refused(path, &complaint)),
        (None, Ok(None)) => Err(refused(path, "it sent no device")),
        (None, Err(errno)) => Err(failed(path, "cannot be mounted on", errno.into())),
    }
}

/// The helper takes options apart at commas, except after a backslash.
fn escape(source: &str) -> String {
    source.replace('\\', "\\\\").replace(',', "\\,")
}

fn start_helper(arguments: &[&OsStr], socket: Option<OwnedFd>) -> Result<Child> {
    let stdin = || match &socket {
        Some(socket) => socket.try_clone().map(Stdio::from),
        None => Ok(Stdio::null()),
    };
    for helper in HELPERS {
        let mut command = Command::new(helper);
        command.args(arguments).env(HELPER_SOCKET.0, HELPER_SOCKET.1);
        command.stdin(stdin().map_err(helper_failed)?).stdout(Stdio::null()).stderr(Stdio::piped());
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            started => return started.map_err(helper_failed),
        }
    }
    let message = "fusermount3 is missing, which mounts for ordinary users: `apt install fuse3`, or mount as root";
    Err(Error::new(ErrorKind::NotFound, Operation::Mount, message))
}

fn helper_failed(error: io::Error) -> Error {
    Error::from_io(Operation::Mount, "fusermount3 cannot be run", error)
}

/// Waits for the helper; its complaint if it failed.
fn finish_helper(helper: Child) -> Result<Option<String>> {
    let output = helper.wait_with_output().map_err(helper_failed)?;
    let complaint = || {
        let text = String::from_utf8_lossy(&output.stderr);
        text.lines().rfind(|line| !line.is_empty()).unwrap_or("it does not say why").to_owned()
    };
    Ok((!output.status.success()).then(complaint))
}

fn receive_device(socket: &UnixStream) -> rustix::io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut into = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(socket.as_fd(), &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut messages = control.drain();
    Ok(messages.find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    }))
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    /// Only if nobody uses it.
    Unused,
    /// Take it off the path now; whoever has it open goes on using it.
    Detach,
    /// Take it off the path, and give an error to whoever has it open, where the user may do that (root).
    Abort,
}

impl Unmount {
    fn flags(self) -> UnmountFlags {
        UnmountFlags::NOFOLLOW
            | match self {
                Self::Unused => UnmountFlags::empty(),
                Self::Detach => UnmountFlags::DETACH,
                Self::Abort => UnmountFlags::DETACH | UnmountFlags::FORCE,
            }
    }
}

/// Unmounts what lies on the path. What is in use is given a moment.
///
/// # Errors
/// `Conflict` if it is in use, `Denied` if the user may not.
pub(crate) fn unmount(path: &Path, how: Unmount) -> Result<()> {
    with_a_moment(|| unmount_now(path, how))
}

/// Tries to unmount, again for a moment while it is in use: a program that has just closed it, or a child that does so as
/// it starts, may not be quite done.
///
/// # Errors
/// Those of the last attempt.
pub(crate) fn with_a_moment(attempt: impl Fn() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::Conflict && begun.elapsed() < MOMENT => thread::sleep(MOMENT / 30),
            result => return result,
        }
    }
}

/// Unmounts what lies on the path, as things are.
///
/// # Errors
/// As [`unmount`].
pub(crate) fn unmount_now(path: &Path, how: Unmount) -> Result<()> {
    let Err(error) = r3map_sys::apart::unmount(path, how.flags()) else { return Ok(()) };
    match Errno::from_io_error(&error) {
        Some(Errno::PERM) => unmount_by_helper(path, how),
        Some(Errno::BUSY) => Err(busy(path)),
        _ => Err(failed(path, "cannot be unmounted", error)),
    }
}

fn unmount_by_helper(path: &Path, how: Unmount) -> Result<()> {
    let flag = OsStr::new(if how == Unmount::Unused { "-u" } else { "-uz" });
    let helper = start_helper(&[flag, OsStr::new("--"), path.as_os_str()], None)?;
    match finish_helper(helper)? {
        None => Ok(()),
        Some(complaint) if complaint.ends_with(": Device or resource busy") => Err(busy(path)),
        Some(complaint) => Err(refused(path, &complaint)),
    }
}

fn busy(path: &Path) -> Error {
    let message = format!("{} is in use: close it in every program (`fuser -vm` lists them)", shown(path));
    Error::new(ErrorKind::Conflict, Operation::Close, message)
}

fn refused(path: &Path, complaint: &str) -> Error {
    let message = format!("fusermount3 refused {}: {}", shown(path), complaint.trim_start_matches("fusermount3: "));
    Error::new(ErrorKind::Denied, Operation::Mount, message)
}

fn failed(path: &Path, what: &str, error: io::Error) -> Error {
    Error::from_io(Operation::Mount, format!("{} {what}", shown(path)), error)
}

/// A path for a message of one line.
pub(crate) fn shown(path: &Path) -> String {
    one_line(path.as_os_str())
}

/// Lets the kernel read ahead by up to `bytes` on this mount (`MAJOR:MINOR`); only root may, others keep the default.
pub(crate) fn raise_read_ahead(device: &str, bytes: u32) {
    let knob = OsString::from(format!("/sys/class/bdi/{device}/read_ahead_kb"));
    if let Err(error) = fs::write(&knob, (bytes / 1024).to_string()) {
        tracing::debug!(%error, "read-ahead stays at the kernel's default");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_to_do() {
        let error = no_device(Errno::NOENT);
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().contains("modprobe fuse"), "{error}");
        assert_eq!(no_device(Errno::ACCESS).kind(), ErrorKind::Denied);
        let error = busy(Path::new("/tmp/a\nb"));
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.message().starts_with("/tmp/a b is in use"), "{error}");
    }

    #[test]
    fn options_survive_the_helper() {
        assert_eq!(escape("memory:?a,b\\c"), "memory:?a\\,b\\\\c");
    }
}
