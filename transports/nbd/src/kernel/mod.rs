//! The kernel's own NBD client: a connected socket becomes a block device, `/dev/nbdN`.
//!
//! [`connect()`] does the handshake before, and [`crate::Server::serve_export`] does without: the kernel speaks only the
//! transmission phase, with simple replies and without TLS. By generic netlink the kernel owns the device, which lives on when the process ends, and can be given new
//! sockets; by ioctl a thread of this process serves it, and it ends with the process.
//!
//! ```text
//!                 attach                      detach, or all links dead for dead_connection_timeout
//!   free ────────────────────► attached ─────────────────────────────────────────────► free
//!                              │      ▲
//!                  server dies │      │ take_over (netlink): requests go on
//!                              ▼      │
//!                              waiting: requests wait for at most dead_connection_timeout, then fail
//! ```
//!
//! A request that was under way when the server died fails, or goes to another connection, only when `request_timeout`
//! has passed: so readers get an error after at most `request_timeout` + `dead_connection_timeout`. By ioctl they get it at
//! once when no connection is left.
//!
//! Calls block; in async code call them on a thread for blocking. Detaching first writes what the kernel holds, which takes
//! as long as the server takes: who cannot wait for that disconnects.

mod attributes;
mod connect;
mod ioctl;
mod netlink;
mod ready;
mod sysfs;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, shutdown, sockopt};

use crate::stream::milliseconds;
use crate::wire::{Command, CommandFlags, Framing, Request as WireRequest, TransmissionFlags};
pub use connect::connect;
use ioctl::Serving;
pub use netlink::DeadLinks;
use netlink::{Control, Request};
use ready::Waiter;

/// What a block device's size is counted in, in bytes.
pub const SECTOR: u64 = 512;

/// The largest block size in bytes that every kernel takes.
const LARGEST_BLOCK: u32 = 4096;

/// What stands for no limit on a request: over three weeks, the longest time that the kernel counts correctly on every
/// machine, in ticks as in milliseconds. Nothing does not: the kernel then keeps the 30 s of any block device in mind, and
/// with several connections ends each on which a request takes longer (`nbd_xmit_timeout`).
const NO_LIMIT: Duration = Duration::from_secs(i32::MAX as u64 / 1000);

/// The longest [`Settings::identifier`] in bytes.
pub const LONGEST_IDENTIFIER: usize = 200;

/// What the server said of the export that becomes a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// The size in bytes: a multiple of `block_size`.
    pub size: u64,
    /// The unit of requests in bytes: a power of two from 512 to 4096. See [`block_size`].
    pub block_size: u32,
    /// What the server can do.
    pub flags: TransmissionFlags,
}

/// The largest block size in bytes that a device of this size can have: requests are fewest then. Nothing if the size
/// is no multiple of [`SECTOR`]: no block device can be of that size.
#[must_use]
pub fn block_size(size: u64) -> Option<u32> {
    let fits = |block: &u32| size.is_multiple_of(u64::from(*block));
    [4096, 2048, 1024, 512].into_iter().find(fits)
}

/// How the kernel is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Interface {
    /// By netlink where the kernel has it, by ioctl otherwise.
    #[default]
    Auto,
    /// By netlink (Linux 4.12).
    Netlink,
    /// By ioctl.
    Ioctl,
}

/// How to learn that a device is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Readiness {
    /// By looking again and again.
    #[default]
    Polling,
    /// By the kernel's events.
    Events,
}

/// How to attach a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How the kernel is spoken to.
    pub interface: Interface,
    /// Which device; by default one that is free.
    pub device: Option<u32>,
    /// How long a request may take before its connection counts as dead; whole seconds, rounded up; `None` is without
    /// limit (of three weeks, to be exact). A server that is slower than this loses the connection, and the request goes to
    /// another one: let it be longer than the server ever takes, because a write that the server has not given up by then
    /// may land after later ones. Without a limit, what was under way on a connection that died waits until the device is
    /// detached, or by ioctl until all of them are dead. [default: 60 s]
    pub request_timeout: Option<Duration>,
    /// How long requests wait for [`take_over`] when all connections are dead; whole seconds, rounded up. Netlink only.
    /// [default: 0: they fail at once]
    pub dead_connection_timeout: Duration,
    /// A name of what is behind the device: only who knows it can take the device over. Netlink, Linux 5.14; older
    /// kernels ignore it. At most [`LONGEST_IDENTIFIER`] bytes.
    pub identifier: Option<String>,
    /// How to learn that the device is ready.
    pub readiness: Readiness,
    /// How long it may take to be ready. [default: 10 s]
    pub ready_limit: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interface: Interface::Auto,
            device: None,
            request_timeout: Some(Duration::from_secs(60)),
            dead_connection_timeout: Duration::ZERO,
            identifier: None,
            readiness: Readiness::default(),
            ready_limit: Duration::from_secs(10),
        }
    }
}

/// An attached device. Dropping it detaches it, without a word if that fails; see [`Self::detach`] and [`Self::keep`].
#[derive(Debug)]
pub struct Device {
    index: u32,
    /// The thread that serves it, by ioctl.
    serving: Option<Serving>,
    /// Whether dropping this shall do anything.
    ours: bool,
}

/// Makes a block device of connections on which transmission with simple replies has begun, all of one export. Where that
/// fails, the server is told goodbye on each.
///
/// # Errors
/// `NotFound` if the kernel has no NBD client loaded or no such device; `Denied` without `CAP_SYS_ADMIN`; `Conflict` if
/// the device is in use, or all are; `InvalidInput` for sizes that no block device can have, several connections
/// without [`TransmissionFlags::CAN_MULTI_CONN`], or an identifier too long; `Unavailable` if it does not get ready.
pub fn attach(sockets: Vec<OwnedFd>, disk: Disk, settings: &Settings) -> Result<Device> {
    let sockets = Arc::new(sockets);
    attach_to(&sockets, disk, settings).inspect_err(|_| part(&sockets))
}

fn attach_to(sockets: &Arc<Vec<OwnedFd>>, disk: Disk, settings: &Settings) -> Result<Device> {
    check(sockets, disk, settings)?;
    limit_delivery(sockets, settings);
    let waiter = Waiter::new(settings.readiness).map_err(|error| explain(settings.device, error))?;
    let device = match settings.interface {
        Interface::Ioctl => by_ioctl(sockets.clone(), disk, settings)?,
        Interface::Netlink => by_netlink(open()?, sockets, disk, settings)?,
        Interface::Auto => match Control::open() {
            Ok(control) => by_netlink(control, sockets, disk, settings)?,
            Err(_) => by_ioctl(sockets.clone(), disk, settings)?,
        },
    };
    let ready = waiter.wait(device.index, disk.size, settings.ready_limit);
    ready.map_err(|error| explain(Some(device.index), error))?;
    Ok(device)
}

/// Gives an attached device new connections to the same export in place of dead ones, so that its requests go on: how a
/// restarted server takes its device over. The settings that are used are the identifier and the two time-outs; where
/// [`Settings::dead_connection_timeout`] is zero, the device keeps its own. Where it is refused, the connections are ended
/// and the device is as it was.
///
/// # Errors
/// `NotFound` if it is not attached (any more) or has another identifier; `Conflict` if its connections live, or if that
/// cannot be told because another program attached it without a time-out and there is no debugfs; otherwise as [`attach`].
pub fn take_over(index: u32, sockets: Vec<OwnedFd>, disk: Disk, settings: &Settings) -> Result<Device> {
    let control = check_take_over(index, &sockets, disk, settings).inspect_err(|_| part(&sockets));
    // The kernel may have taken some although it is refused: without a word, or before something else went wrong. Nobody
    // would know that it serves the device over them; and it may be sending on them, so that there is no place for a word.
    give(&mut control?, index, &sockets, settings).inspect_err(|_| cut(&sockets))?;
    Ok(Device { index, serving: None, ours: true })
}

fn check_take_over(index: u32, sockets: &[OwnedFd], disk: Disk, settings: &Settings) -> Result<Control> {
    check(sockets, disk, settings)?;
    if !sysfs::is_attached(index) {
        return Err(error(ErrorKind::NotFound, format!("{} is not attached", sysfs::node(index).display())));
    }
    let size = sysfs::size(index);
    if size != Some(disk.size) {
        let what = format!("{} has another size ({size:?} bytes)", sysfs::node(index).display());
        return Err(error(ErrorKind::InvalidInput, what));
    }
    limit_delivery(sockets, settings);
    open()
}

/// Has the kernel take new connections in place of dead ones.
fn give(control: &mut Control, index: u32, sockets: &[OwnedFd], settings: &Settings) -> Result<()> {
    // The size is left as it is: setting it, even to the same, would have the kernel forget what it knows of the device.
    // The connections come first, and alone: the kernel would set time-outs whether or not it takes a connection. Only
    // where there is none one comes with them, which is never over, because it shows what was taken.
    let identifier = settings.identifier.as_deref();
    let unlimited = sysfs::is_unlimited(index);
    let timeout = unlimited.then_some(NO_LIMIT.as_secs());
    let given = control.reconfigure(index, &Request { sockets, identifier, timeout, ..Request::default() });
    let taken: Vec<_> = sockets.iter().filter(|socket| is_taken(socket)).collect();
    if unlimited && taken.is_empty() {
        let none = Request { timeout: Some(0), identifier, ..Request::default() };
        control.reconfigure(index, &none).map_err(|io| explain_take_over(index, io))?;
    }
    given.map_err(|io| explain_take_over(index, io))?;
    if taken.is_empty() {
        let node = sysfs::node(index);
        let what = format!(
            "{0} is served: its connections live; or it was attached without a time-out, and whether they do cannot be \
             told without /sys/kernel/debug: then detach it (r3map nbd detach {0}) and attach it again",
            node.display()
        );
        return Err(error(ErrorKind::Conflict, what));
    }
    let mut limits = timeouts(settings);
    // Set to zero it would fail whoever waits at a later take-over.
    limits.dead_timeout = limits.dead_timeout.filter(|seconds| *seconds > 0);
    control.reconfigure(index, &limits).map_err(|io| explain_take_over(index, io))?;
    for socket in taken {
        // The kernel's client gave it the limit of before.
        let limit = Duration::from_secs(request_seconds(settings));
        let _ = sockopt::set_socket_timeout(socket, sockopt::Timeout::Send, Some(limit));
    }
    Ok(())
}

/// Ends connections that nobody is to use any more, with the word that the protocol wants.
fn part(sockets: &[OwnedFd]) {
    let (flags, command) = (CommandFlags::empty(), Command::Disconnect);
    let request = WireRequest { flags, command, cookie: 0, offset: 0, length: 0 };
    let mut goodbye = Vec::new();
    request.encode(Framing::Simple, &mut goodbye).expect("nothing is short enough for any framing");
    for socket in sockets {
        // Where that fails the server has gone itself.
        let _ = rustix::net::send(socket, &goodbye, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
    cut(sockets);
}

fn cut(sockets: &[OwnedFd]) {
    for socket in sockets {
        let _ = shutdown(socket, Shutdown::Both);
    }
}

/// Has TCP give up what it could not deliver when the request's time is over and it is made elsewhere: once the way to
/// the server works again, nothing old must arrive there. Without a limit nothing is made elsewhere.
fn limit_delivery(sockets: &[OwnedFd], settings: &Settings) {
    let limit = settings.request_timeout.map_or(0, milliseconds);
    for socket in sockets {
        // Only TCP has it.
        let _ = sockopt::set_tcp_user_timeout(socket, limit);
    }
}

/// Whether the kernel's client has taken a socket: it says so in no other way than by setting the time-out for sending to
/// that of requests.
fn is_taken(socket: &OwnedFd) -> bool {
    sockopt::socket_timeout(socket, sockopt::Timeout::Send).is_ok_and(|timeout| timeout.is_some())
}

/// The attached device whose backend has this name, if there is one.
#[must_use]
pub fn find(identifier: &str) -> Option<u32> {
    let is_it = |index: &u32| sysfs::identifier(*index).as_deref() == Some(identifier) && sysfs::is_attached(*index);
    sysfs::devices().into_iter().find(is_it)
}

/// Whether the kernel has an NBD client that can be spoken to by netlink.
///
/// # Errors
/// `NotFound` if not, saying what to do.
pub fn probe() -> Result<()> {
    open().map(drop)
}

/// The index of a device node: `/dev/nbd3` is 3.
///
/// # Errors
/// `InvalidInput` for anything else.
pub fn index_of(path: &Path) -> Result<u32> {
    let what = || error(ErrorKind::InvalidInput, format!("{} is no NBD device: /dev/nbdN is wanted", path.display()));
    sysfs::index_of(path).ok_or_else(what)
}

/// Asks to be told when connections of attached devices die.
///
/// # Errors
/// As [`attach`]; `InvalidInput` if the kernel cannot.
pub fn dead_links() -> Result<DeadLinks> {
    open()?.listen().map_err(|error| explain(None, error))
}

/// Whether a device is attached. One that was detached while somebody had it open still is, until that is closed.
///
/// # Errors
/// `NotFound` if there is no such device, or no NBD client in the kernel.
pub fn is_attached(index: u32) -> Result<bool> {
    // Netlink's status takes any device that somebody has open for attached.
    match sysfs::size(index) {
        Some(_) => Ok(sysfs::is_attached(index)),
        None => Err(explain(Some(index), Errno::NOENT.into())),
    }
}

/// Detaches a device, whoever attached it: everything written to it is flushed first, and nobody can mount it in between.
/// With `force` also if it is in use, mounted for example; its user then gets errors, as anybody does who merely has it open.
///
/// # Errors
/// `NotFound` if it is not attached; `Conflict` if it is in use; the error of the flush, when the device has been
/// detached nevertheless.
pub fn detach(index: u32, force: bool) -> Result<()> {
    if !is_attached(index)? {
        return Err(error(ErrorKind::NotFound, format!("{} is not attached", sysfs::node(index).display())));
    }
    // Held until it is detached.
    let held = hold(index, force)?;
    let flushed = flush(index, held.as_ref());
    disconnect(index)?;
    flushed
}

impl Device {
    /// Its index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its node: `/dev/nbdN`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        sysfs::node(self.index)
    }

    /// How the kernel is spoken to: never [`Interface::Auto`].
    #[must_use]
    pub fn interface(&self) -> Interface {
        if self.serving.is_some() { Interface::Ioctl } else { Interface::Netlink }
    }

    /// Whether the kernel still has it attached.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.serving.as_ref().map_or_else(|| sysfs::is_attached(self.index), Serving::is_alive)
    }

    /// Flushes and detaches it; nobody can mount it in between.
    ///
    /// # Errors
    /// `Conflict` if it is in use, mounted for example: it stays attached, and is given back. The error of the flush, when
    /// it has been detached nevertheless.
    pub fn detach(mut self) -> std::result::Result<(), (Error, Option<Self>)> {
        let held = match hold(self.index, false) {
            Ok(held) => held,
            Err(error) => return Err((error, Some(self))),
        };
        let flushed = flush(self.index, held.as_ref());
        let detached = self.disconnect();
        self.ours = false;
        detached.and(flushed).map_err(|error| (error, None))
    }

    /// Detaches it as it is: what the kernel still holds of what was written is lost. For who has flushed it, and has it
    /// open exclusively (`O_EXCL`), so that nobody can mount it in between. Does nothing if it is not attached.
    ///
    /// # Errors
    /// `Unavailable` if the kernel does not let go in time, because the server does not answer what is under way. This can be
    /// called again.
    pub fn disconnect(&mut self) -> Result<()> {
        match &mut self.serving {
            Some(serving) => serving.stop().map_err(|error| explain(Some(self.index), error))?,
            None if sysfs::is_attached(self.index) => disconnect(self.index)?,
            None => {}
        }
        self.ours = false;
        Ok(())
    }

    /// Leaves it attached for good, without a process: what a server in another process and a netlink device allow.
    ///
    /// # Errors
    /// `InvalidInput` if a thread of this process serves it (by ioctl): the device then is detached.
    pub fn keep(mut self) -> Result<()> {
        if self.serving.is_some() {
            return Err(error(ErrorKind::InvalidInput, "by ioctl a device ends with its process; use netlink"));
        }
        self.ours = false;
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.ours {
            let held = hold(self.index, true).unwrap_or_default();
            let _ = flush(self.index, held.as_ref());
            let _ = self.disconnect();
        }
    }
}

fn by_netlink(mut control: Control, sockets: &[OwnedFd], disk: Disk, settings: &Settings) -> Result<Device> {
    let request = Request {
        sockets,
        size: Some(disk.size),
        block_size: Some(disk.block_size.into()),
        flags: Some(disk.flags.bits()),
        ..timeouts(settings)
    };
    match control.connect(settings.device, &request) {
        Ok(index) => Ok(Device { index, serving: None, ours: true }),
        Err(error) => Err(explain(settings.device, error)),
    }
}

fn by_ioctl(sockets: Arc<Vec<OwnedFd>>, disk: Disk, settings: &Settings) -> Result<Device> {
    match Serving::start(settings.device, sockets, disk, request_seconds(settings)) {
        Ok((index, serving)) => Ok(Device { index, serving: Some(serving), ours: true }),
        Err(error) => Err(explain(settings.device, error)),
    }
}

fn timeouts(settings: &Settings) -> Request<'_> {
    Request {
        timeout: Some(request_seconds(settings)),
        dead_timeout: Some(seconds(settings.dead_connection_timeout)),
        identifier: settings.identifier.as_deref(),
        ..Request::default()
    }
}

/// How long a request may take: never nothing, which would not mean what it says; see [`NO_LIMIT`].
fn request_seconds(settings: &Settings) -> u64 {
    seconds(settings.request_timeout.unwrap_or(NO_LIMIT)).clamp(1, NO_LIMIT.as_secs())
}

/// Whole seconds, which is what the kernel counts in; never fewer than asked for.
fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

fn disconnect(index: u32) -> Result<()> {
    match Control::open() {
        Ok(mut control) => control.disconnect(index).map_err(|error| explain(Some(index), error)),
        Err(_) => {
            let device = r3map_sys::nbd::NbdDevice::open(&sysfs::node(index));
            device.and_then(|device| device.disconnect()).map_err(|error| explain(Some(index), error))
        }
    }
}

/// Opens a device so that nobody can mount it meanwhile; with `force`, where somebody has, in the ordinary way. Nothing if
/// it cannot be opened at all.
///
/// # Errors
/// `Conflict` if it is mounted or otherwise claimed.
fn hold(index: u32, force: bool) -> Result<Option<File>> {
    // For a block device O_EXCL without O_CREAT means: fail if it is mounted or otherwise claimed (open(2)).
    match open_node(index, OFlags::EXCL) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => {
            if force {
                Ok(open_node(index, OFlags::empty()).ok())
            } else {
                Err(explain(Some(index), error))
            }
        }
        // This process lacks something; the device may be full of what was not written yet.
        Err(error)
            if !force && matches!(Errno::from_io_error(&error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM)) =>
        {
            Err(explain(Some(index), error))
        }
        opened => Ok(opened.ok()),
    }
}

fn open_node(index: u32, flags: OFlags) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(sysfs::node(index))
}

/// Has everything that was written to the device reach the server.
fn flush(index: u32, held: Option<&File>) -> Result<()> {
    let Some(device) = held else {
        let what = format!("{} cannot be opened, so that it was not flushed", sysfs::node(index).display());
        return Err(error(ErrorKind::Unavailable, what));
    };
    device.sync_all().map_err(|error| explain(Some(index), error))
}

fn check(sockets: &[OwnedFd], disk: Disk, settings: &Settings) -> Result<()> {
    let Disk { size, block_size: block, flags } = disk;
    let wrong = if sockets.is_empty() {
        "there is no connection"
    } else if sockets.len() > 1 && !flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
        "the server does not allow several connections"
    } else if !block.is_power_of_two() || !(512..=LARGEST_BLOCK).contains(&block) {
        "a block is a power of two from 512 to 4096 bytes"
    } else if size == 0 || !size.is_multiple_of(block.into()) {
        "the size is no multiple of the block: a block device has whole blocks of at least 512 bytes"
    } else if settings
        .identifier
        .as_ref()
        .is_some_and(|name| name.len() > LONGEST_IDENTIFIER || name.contains(['\0', '\n']))
    {
        "an identifier is one line of at most 200 bytes"
    } else {
        return Ok(());
    };
    Err(error(ErrorKind::InvalidInput, wrong))
}

fn open() -> Result<Control> {
    Control::open().map_err(|io| match Errno::from_io_error(&io) {
        Some(Errno::NOENT | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => {
            error(ErrorKind::NotFound, "the kernel's NBD client is not there; load it with: modprobe nbd")
        }
        _ => explain(None, io),
    })
}

/// Says what an errno of the kernel means here, and what to do.
fn explain(device: Option<u32>, io: io::Error) -> Error {
    let name = device.map_or_else(|| "an NBD device".to_owned(), |index| sysfs::node(index).display().to_string());
    let no_devices = sysfs::devices().is_empty();
    match Errno::from_io_error(&io) {
        Some(Errno::NOENT) if no_devices => {
            error(ErrorKind::NotFound, "the kernel's NBD client is not there; load it with: modprobe nbd")
        }
        Some(Errno::NOENT | Errno::NODEV | Errno::NXIO) => error(ErrorKind::NotFound, format!("there is no {name}")),
        Some(Errno::PERM | Errno::ACCESS) => {
            error(ErrorKind::Denied, format!("{name}: this needs root (CAP_SYS_ADMIN)"))
        }
        Some(Errno::BUSY) if device.is_some() => error(ErrorKind::Conflict, format!("{name} is in use")),
        Some(Errno::BUSY) => {
            error(ErrorKind::Conflict, "all NBD devices are in use; modprobe nbd nbds_max=… makes more")
        }
        _ if io.kind() == io::ErrorKind::TimedOut => error(ErrorKind::Unavailable, name).with_source(io),
        _ => Error::from_io(Operation::Mount, name, io),
    }
}

fn explain_take_over(index: u32, io: io::Error) -> Error {
    let name = sysfs::node(index);
    match Errno::from_io_error(&io) {
        Some(Errno::INVAL) => {
            let what = format!("{} is not attached any more, or belongs to another backend", name.display());
            error(ErrorKind::NotFound, what)
        }
        _ => explain(Some(index), io),
    }
}

fn error(kind: ErrorKind, what: impl fmt::Display) -> Error {
    Error::new(kind, Operation::Mount, what.to_string())
}
