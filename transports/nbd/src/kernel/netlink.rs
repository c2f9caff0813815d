//! The kernel's NBD client by generic netlink: the family `nbd` (`include/uapi/linux/nbd-netlink.h`, Linux 4.12).
//!
//! A device that is attached this way needs no process: the kernel owns the sockets. Calls block, for a bounded time.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use r3map_sys::nbd::join_netlink_group;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with};

use super::attributes::{Attributes, Incoming, attributes, find, messages, take_u16, take_u32, text};

/// How long the kernel may take to answer. A disconnect waits for requests that are under way.
const LIMIT: Duration = Duration::from_secs(60);

/// More than any answer: the kernel sends at most a page, or 8 KiB.
const BUFFER: usize = 32 << 10;

/// The family that knows the families: its number, command and attributes (`include/uapi/linux/genetlink.h`).
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;

const NBD_GENL_FAMILY_NAME: &str = "nbd";
const NBD_GENL_MCAST_GROUP_NAME: &[u8] = b"nbd_mc_group";
const NBD_GENL_VERSION: u8 = 1;

const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_CMD_RECONFIGURE: u8 = 3;
const NBD_CMD_LINK_DEAD: u8 = 4;

const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_TIMEOUT: u16 = 4;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const NBD_ATTR_BACKEND_IDENTIFIER: u16 = 10;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// What the kernel is told about a device; all may be left as it is in [`Control::reconfigure`].
#[derive(Debug, Default)]
pub(crate) struct Request<'a> {
    pub(crate) sockets: &'a [OwnedFd],
    pub(crate) size: Option<u64>,
    pub(crate) block_size: Option<u64>,
    pub(crate) flags: Option<u16>,
    pub(crate) timeout: Option<u64>,
    pub(crate) dead_timeout: Option<u64>,
    pub(crate) identifier: Option<&'a str>,
}

impl Request<'_> {
    fn attributes(&self) -> Attributes {
        let mut all = Attributes::default();
        if !self.sockets.is_empty() {
            let mut sockets = Attributes::default();
            for socket in self.sockets {
                let fd = u32::try_from(socket.as_raw_fd()).expect("an owned descriptor is not negative");
                sockets = sockets.nested(NBD_SOCK_ITEM, &Attributes::default().u32(NBD_SOCK_FD, fd));
            }
            all = all.nested(NBD_ATTR_SOCKETS, &sockets);
        }
        let numbers = [
            (NBD_ATTR_SIZE_BYTES, self.size),
            (NBD_ATTR_BLOCK_SIZE_BYTES, self.block_size),
            (NBD_ATTR_SERVER_FLAGS, self.flags.map(u64::from)),
            (NBD_ATTR_TIMEOUT, self.timeout),
            (NBD_ATTR_DEAD_CONN_TIMEOUT, self.dead_timeout),
        ];
        for (kind, value) in numbers {
            if let Some(value) = value {
                all = all.u64(kind, value);
            }
        }
        match self.identifier {
            Some(identifier) => all.text(NBD_ATTR_BACKEND_IDENTIFIER, identifier),
            None => all,
        }
    }
}

/// A conversation with the family `nbd`.
#[derive(Debug)]
pub(crate) struct Control {
    socket: OwnedFd,
    family: u16,
    /// The group that is told of dead connections.
    group: Option<u32>,
    sequence: u32,
}

impl Control {
    /// Finds the family.
    ///
    /// # Errors
    /// `NotFound` if the module is not loaded or too old.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::GENERIC))?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        let mut this = Self { socket, family: GENL_ID_CTRL, group: None, sequence: 0 };
        let request = Attributes::default().text(CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME);
        let found = this.ask(CTRL_CMD_GETFAMILY, request)?.ok_or(Errno::NOENT)?;
        this.family = take_u16(find(&found, CTRL_ATTR_FAMILY_ID)?, 0)?;
        this.group = find_group(&found)?;
        Ok(this)
    }

    /// Attaches a device: `index`, or one that is free. Gives back which.
    ///
    /// # Errors
    /// `EBUSY` if it is in use, `EPERM` without `CAP_SYS_ADMIN`, `EINVAL` for no stream sockets, `ENOMEM`.
    pub(crate) fn connect(&mut self, index: Option<u32>, request: &Request<'_>) -> io::Result<u32> {
        let mut attributes = request.attributes();
        if let Some(index) = index {
            attributes = attributes.u32(NBD_ATTR_INDEX, index);
        }
        let reply = self.ask(NBD_CMD_CONNECT, attributes)?;
        take_u32(find(&reply.unwrap_or_default(), NBD_ATTR_INDEX)?, 0)
    }

    /// Gives a device new sockets in place of dead ones, and other settings. Sockets for which there is no dead one are
    /// left alone, without a word.
    ///
    /// # Errors
    /// `EINVAL` if it is not attached or has another identifier.
    pub(crate) fn reconfigure(&mut self, index: u32, request: &Request<'_>) -> io::Result<()> {
        self.ask(NBD_CMD_RECONFIGURE, request.attributes().u32(NBD_ATTR_INDEX, index))?;
        Ok(())
    }

    /// Detaches a device. Nothing happens if it is not attached.
    ///
    /// # Errors
    /// `EINVAL` if there is no such device.
    pub(crate) fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.ask(NBD_CMD_DISCONNECT, Attributes::default().u32(NBD_ATTR_INDEX, index))?;
        Ok(())
    }

    /// Asks to be told of dead connections.
    ///
    /// # Errors
    /// `Unsupported` if the kernel has no such group.
    pub(crate) fn listen(self) -> io::Result<DeadLinks> {
        let Some(group) = self.group else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel does not tell of dead connections"));
        };
        join_netlink_group(&self.socket, group)?;
        Ok(DeadLinks { socket: self.socket })
    }

    /// Sends a request and waits for its end; gives back the attributes of the answer, if there was one.
    fn ask(&mut self, command: u8, attributes: Attributes) -> io::Result<Option<Vec<u8>>> {
        self.sequence += 1;
        let message = attributes.into_message(self.family, command, NBD_GENL_VERSION, self.sequence);
        send(&self.socket, &message, SendFlags::empty())?;
        let end = Instant::now() + LIMIT;
        let mut answer = None;
        loop {
            let datagram = receive(&self.socket, end)?.ok_or(Errno::TIMEDOUT)?;
            for message in messages(&datagram)? {
                match message {
                    Incoming::Verdict { sequence, errno } if sequence == self.sequence => {
                        return if errno == 0 { Ok(answer) } else { Err(io::Error::from_raw_os_error(errno)) };
                    }
                    Incoming::Family { attributes, .. } => answer = Some(attributes.to_vec()),
                    _ => {}
                }
            }
        }
    }
}

/// What the kernel tells of connections that die.
#[derive(Debug)]
pub struct DeadLinks {
    socket: OwnedFd,
}

impl DeadLinks {
    /// The index of the next device of which a connection has died, if that happens within `limit`.
    ///
    /// # Errors
    /// When the kernel had more to tell than was listened to (`ENOBUFS`), or nonsense.
    pub fn next(&self, limit: Duration) -> io::Result<Option<u32>> {
        let end = Instant::now() + limit;
        while let Some(datagram) = receive(&self.socket, end)? {
            for message in messages(&datagram)? {
                if let Incoming::Family { command: NBD_CMD_LINK_DEAD, attributes } = message {
                    return Ok(Some(take_u32(find(attributes, NBD_ATTR_INDEX)?, 0)?));
                }
            }
        }
        Ok(None)
    }
}

fn find_group(family: &[u8]) -> io::Result<Option<u32>> {
    let Ok(groups) = find(family, CTRL_ATTR_MCAST_GROUPS) else { return Ok(None) };
    for (_, group) in attributes(groups)? {
        if text(find(group, CTRL_ATTR_MCAST_GRP_NAME)?) == NBD_GENL_MCAST_GROUP_NAME {
            return Ok(Some(take_u32(find(group, CTRL_ATTR_MCAST_GRP_ID)?, 0)?));
        }
    }
    Ok(None)
}

/// A datagram, if one comes before `end`.
pub(super) fn receive(socket: &OwnedFd, end: Instant) -> io::Result<Option<Vec<u8>>> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let limit = left.try_into().map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let mut buffer = vec![0; BUFFER];
        let (length, _) = recv(socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
        buffer.truncate(length);
        return Ok(Some(buffer));
    }
}
