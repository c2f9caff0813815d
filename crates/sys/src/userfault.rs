//! userfaultfd(2): telling this process about pages that are missing, and letting it fill them.
//!
//! Works in addresses; [`crate::Pager`] turns them into offsets and says why each call is sound.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

use crate::abi;
use crate::mapping::Protection;

/// Whose accesses to a missing page wait until it is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultScope {
    /// Everybody's: the program's own instructions, and the kernel when it works for the program (`read(2)` into the
    /// mapping, `write(2)` from it).
    UserAndKernel,
    /// Only the program's own instructions. A system call that is given a missing page fails with EFAULT, so that
    /// such buffers must be touched first, or copied through other memory.
    UserOnly,
}

/// Which [`FaultScope`] will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScopeWanted {
    /// The widest that the kernel grants this process; ask which it is afterwards.
    #[default]
    Widest,
    /// [`FaultScope::UserAndKernel`], or an error.
    UserAndKernel,
    /// [`FaultScope::UserOnly`], which needs no privilege.
    UserOnly,
}

const BASE_FLAGS: UserfaultfdFlags = UserfaultfdFlags::CLOEXEC.union(UserfaultfdFlags::NONBLOCK);
const USER_ONLY: UserfaultfdFlags = BASE_FLAGS.union(UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY));

/// What a kernel must be able to do, and what to call it when it is not.
const FEATURES: [(u32, &str); 3] = [
    (raw::UFFD_FEATURE_POISON, "UFFD_FEATURE_POISON (Linux 6.6)"),
    (raw::UFFD_FEATURE_WP_UNPOPULATED, "UFFD_FEATURE_WP_UNPOPULATED (Linux 6.4)"),
    (raw::UFFD_FEATURE_WP_ASYNC, "UFFD_FEATURE_WP_ASYNC (Linux 6.7)"),
];

/// A userfaultfd whose features are agreed.
pub(crate) fn open(wanted: ScopeWanted, protection: Protection) -> io::Result<(OwnedFd, FaultScope)> {
    let (fd, scope) = create(wanted)?;
    let needed = match protection {
        Protection::ReadOnly => &FEATURES[..1],
        Protection::Tracked => &FEATURES[..],
    };
    let bits = needed.iter().fold(0, |bits, (bit, _)| bits | u64::from(*bit));
    match handshake(&fd, bits) {
        Ok(_) => Ok((fd, scope)),
        // The agreement is made once per descriptor, so that asking what there is takes another one.
        Err(Errno::INVAL) => Err(missing_features(needed, handshake(&create(wanted)?.0, 0).unwrap_or(0))),
        Err(other) => Err(other.into()),
    }
}

fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = raw::uffdio_api { api: raw::UFFD_API.into(), features, ioctls: 0 };
    // SAFETY: UFFDIO_API takes this struct, and there are no addresses in it.
    unsafe { abi::call::<{ abi::UFFDIO_API }, _>(fd, &mut api) }?;
    Ok(api.features)
}

fn missing_features(needed: &[(u32, &str)], present: u64) -> io::Error {
    let names: Vec<_> =
        needed.iter().filter(|(bit, _)| present & u64::from(*bit) == 0).map(|(_, name)| *name).collect();
    let text = format!("this kernel's userfaultfd lacks {}", names.join(", "));
    io::Error::new(io::ErrorKind::Unsupported, text)
}

fn create(wanted: ScopeWanted) -> io::Result<(OwnedFd, FaultScope)> {
    if wanted != ScopeWanted::UserOnly {
        match create_privileged() {
            Ok(fd) => return Ok((fd, FaultScope::UserAndKernel)),
            Err(Errno::PERM) if wanted == ScopeWanted::Widest => {}
            Err(error) => return Err(explain(error, FaultScope::UserAndKernel)),
        }
    }
    match by_syscall(USER_ONLY) {
        Ok(fd) => Ok((fd, FaultScope::UserOnly)),
        Err(error) => Err(explain(error, FaultScope::UserOnly)),
    }
}

fn create_privileged() -> Result<OwnedFd, Errno> {
    match by_syscall(BASE_FLAGS) {
        Err(Errno::PERM) => by_device().ok_or(Errno::PERM),
        other => other,
    }
}

fn by_syscall(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    // SAFETY: a new descriptor changes no memory; what is done with it later has its own reasons.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// The device lets its file permissions decide instead of a capability.
fn by_device() -> Option<OwnedFd> {
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = BASE_FLAGS.bits() as usize;
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value.
    let fd = unsafe { abi::call_with_integer::<{ abi::USERFAULTFD_IOC_NEW }>(&device, flags) }.ok()?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn explain(error: Errno, scope: FaultScope) -> io::Error {
    let (kind, text) = match (error, scope) {
        (Errno::PERM, FaultScope::UserAndKernel) => (
            io::ErrorKind::PermissionDenied,
            "this process may not handle the kernel's page faults: set the sysctl vm.unprivileged_userfaultfd to 1, \
             let it read and write /dev/userfaultfd, give it CAP_SYS_PTRACE, or make do with user-only faults",
        ),
        (Errno::PERM, FaultScope::UserOnly) => (
            io::ErrorKind::PermissionDenied,
            "userfaultfd is forbidden here, even for user-only faults: set the sysctl vm.unprivileged_userfaultfd to 1, \
             let this process read and write /dev/userfaultfd, give it CAP_SYS_PTRACE, or loosen its seccomp filter",
        ),
        (Errno::NOSYS, _) => (io::ErrorKind::Unsupported, "this kernel was built without CONFIG_USERFAULTFD"),
        (Errno::INVAL, _) => (io::ErrorKind::Unsupported, "this kernel has no user-only userfaultfd (Linux 5.11)"),
        (other, _) => return other.into(),
    };
    io::Error::new(kind, text)
}

/// Watches the pages at `address` for missing ones and, if `protection` tracks, for writes.
///
/// # Safety
/// The pages are the caller's own.
pub(crate) unsafe fn register(fd: impl AsFd, address: u64, len: u64, protection: Protection) -> io::Result<()> {
    let mode = match protection {
        Protection::ReadOnly => raw::UFFDIO_REGISTER_MODE_MISSING,
        Protection::Tracked => raw::UFFDIO_REGISTER_MODE_MISSING | raw::UFFDIO_REGISTER_MODE_WP,
    };
    let range = raw::uffdio_range { start: address, len };
    let mut register = raw::uffdio_register { range, mode: mode.into(), ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes this struct; the caller owns the pages.
    unsafe { abi::call::<{ abi::UFFDIO_REGISTER }, _>(fd, &mut register) }?;
    let needed = (1 << raw::_UFFDIO_COPY) | (1 << raw::_UFFDIO_ZEROPAGE) | (1 << raw::_UFFDIO_WAKE);
    if register.ioctls & needed != needed {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel cannot fill pages of anonymous memory"));
    }
    Ok(())
}

/// How far a fill came before it stopped: whole pages in bytes, and why it stopped.
pub(crate) struct Filled {
    pub(crate) bytes: u64,
    pub(crate) stopped: Option<Errno>,
}

impl Filled {
    /// Reads the kernel's answer: a negative count is an errno, and a short count says nothing about why.
    fn new(outcome: Result<i32, Errno>, count: i64) -> Self {
        match (outcome, u64::try_from(count)) {
            (Ok(_), Ok(bytes)) => Self { bytes, stopped: None },
            (Err(Errno::AGAIN), Ok(bytes)) => Self { bytes, stopped: Some(Errno::AGAIN) },
            (Err(error), _) => Self { bytes: 0, stopped: Some(error) },
            (Ok(_), Err(_)) => Self { bytes: 0, stopped: Some(Errno::IO) },
        }
    }
}

/// Fills missing pages with copies of `bytes` (whole pages) and wakes who waits for them; never changes a page that is
/// there. With `protect` they start write-protected: not written.
///
/// # Safety
/// The pages are the caller's own.
pub(crate) unsafe fn copy(fd: impl AsFd, address: u64, bytes: &[u8], protect: bool) -> Filled {
    let mode = if protect { raw::UFFDIO_COPY_MODE_WP } else { 0 };
    let mut copy = raw::uffdio_copy {
        dst: address,
        src: bytes.as_ptr().expose_provenance() as u64,
        len: bytes.len() as u64,
        mode: mode.into(),
        copy: 0,
    };
    // SAFETY: UFFDIO_COPY takes this struct; it reads `bytes`, and the caller owns the pages at `address`.
    let outcome = unsafe { abi::call::<{ abi::UFFDIO_COPY }, _>(fd, &mut copy) };
    Filled::new(outcome, copy.copy)
}

/// Fills missing pages with the shared page of zeros, and lets those who wait for them sleep on.
///
/// # Safety
/// The pages are the caller's own.
pub(crate) unsafe fn zero(fd: impl AsFd, address: u64, len: u64) -> Filled {
    let range = raw::uffdio_range { start: address, len };
    let mut zero = raw::uffdio_zeropage { range, mode: raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE.into(), zeropage: 0 };
    // SAFETY: UFFDIO_ZEROPAGE takes this struct; the caller owns the pages.
    let outcome = unsafe { abi::call::<{ abi::UFFDIO_ZEROPAGE }, _>(fd, &mut zero) };
    Filled::new(outcome, zero.zeropage)
}

/// Makes missing pages raise SIGBUS, and wakes who waits for them.
///
/// # Safety
/// The pages are the caller's own.
pub(crate) unsafe fn poison(fd: impl AsFd, address: u64, len: u64) -> Filled {
    let mut poison = raw::uffdio_poison { range: raw::uffdio_range { start: address, len }, mode: 0, updated: 0 };
    // SAFETY: UFFDIO_POISON takes this struct; the caller owns the pages.
    let outcome = unsafe { abi::call::<{ abi::UFFDIO_POISON }, _>(fd, &mut poison) };
    Filled::new(outcome, poison.updated)
}

/// Lets who waits for these pages try again.
pub(crate) fn wake(fd: impl AsFd, address: u64, len: u64) -> io::Result<()> {
    let mut range = raw::uffdio_range { start: address, len };
    // SAFETY: UFFDIO_WAKE takes this struct, and changes no memory.
    unsafe { abi::call::<{ abi::UFFDIO_WAKE }, _>(fd, &mut range) }?;
    Ok(())
}
