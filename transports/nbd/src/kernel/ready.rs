//! Waiting until an attached device can be used: its node is there and has its size.
//!
//! By looking again and again, or by the events that the kernel sends when a device changes (what udev listens to;
//! `Documentation/ABI/testing/sysfs-uevent`, `lib/kobject_uevent.c`). No udev daemon is needed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

use super::Readiness;
use super::netlink::receive;
use super::sysfs;

/// How often a device is looked at.
const POLL: Duration = Duration::from_millis(5);

/// The multicast group of the kernel's own events, as a bit.
const KERNEL_EVENTS: u32 = 1;

/// How to learn of it. Made before the device is attached, so that no event is missed.
pub(super) enum Waiter {
    Polling,
    Events(OwnedFd),
}

impl Waiter {
    pub(super) fn new(readiness: Readiness) -> io::Result<Self> {
        match readiness {
            Readiness::Polling => Ok(Self::Polling),
            Readiness::Events => {
                let flags = SocketFlags::CLOEXEC;
                let protocol = Some(netlink::KOBJECT_UEVENT);
                let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
                bind(&socket, &SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
                Ok(Self::Events(socket))
            }
        }
    }

    /// Waits until the device has `size` bytes and can be opened.
    ///
    /// # Errors
    /// `TimedOut` if that is not so after `limit`.
    pub(super) fn wait(&self, index: u32, size: u64, limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        while !is_ready(index, size) {
            if Instant::now() >= end {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("it was not ready after {limit:?}")));
            }
            self.pause(index, end)?;
        }
        Ok(())
    }

    fn pause(&self, index: u32, end: Instant) -> io::Result<()> {
        match self {
            Self::Polling => std::thread::sleep(POLL),
            Self::Events(socket) => while is_of_others(receive(socket, end), index)? {},
        }
        Ok(())
    }
}

/// Whether what was received is an event about something else than a device.
fn is_of_others(received: io::Result<Option<Vec<u8>>>, index: u32) -> io::Result<bool> {
    match received {
        Ok(event) => Ok(event.is_some_and(|event| !is_about(&event, index))),
        // There were more events than the socket holds, and it may have been among those that are lost.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_ready(index: u32, size: u64) -> bool {
    sysfs::size(index) == Some(size) && sysfs::is_attached(index) && std::fs::File::open(sysfs::node(index)).is_ok()
}

/// Whether an event is about a device: it begins with `ACTION@/devices/virtual/block/nbdN` and a zero.
fn is_about(event: &[u8], index: u32) -> bool {
    let header = event.split(|byte| *byte == 0).next().unwrap_or_default();
    header.ends_with(format!("/block/nbd{index}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart() {
        let event = b"change@/devices/virtual/block/nbd1\0ACTION=change\0DEVPATH=/devices/virtual/block/nbd2\0";
        assert!(is_about(event, 1));
        assert!(!is_about(event, 2) && !is_about(event, 11) && !is_about(b"", 1));
        assert!(!is_about(b"add@/devices/virtual/block/nbd1/nbd1p1\0", 1));
    }

    #[test]
    fn events_that_were_lost_are_a_reason_to_look() {
        assert!(is_of_others(Ok(Some(b"change@/devices/virtual/block/nbd2\0".to_vec())), 1).unwrap());
        assert!(!is_of_others(Ok(Some(b"change@/devices/virtual/block/nbd1\0".to_vec())), 1).unwrap());
        assert!(!is_of_others(Ok(None), 1).unwrap(), "its time is over");
        assert!(!is_of_others(Err(Errno::NOBUFS.into()), 1).unwrap());
        assert!(is_of_others(Err(Errno::NOMEM.into()), 1).is_err());
    }

    #[test]
    fn what_never_comes_is_not_waited_for_for_ever() {
        for readiness in [Readiness::Polling, Readiness::Events] {
            let waiter = Waiter::new(readiness).unwrap();
            let error = waiter.wait(u32::MAX, 512, Duration::from_millis(20)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{readiness:?}");
        }
    }
}
