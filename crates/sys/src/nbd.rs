//! The ioctls of a kernel NBD device, and joining a netlink multicast group.
//!
//! Source: `include/uapi/linux/nbd.h`, `drivers/block/nbd.c`. It knows nothing of the protocol on the socket; which calls
//! to make in which order is `transports/nbd`'s business.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use linux_raw_sys::ioctl as raw;
use rustix::ioctl::Opcode;

use crate::abi;

/// The block major number of NBD devices (`Documentation/admin-guide/devices.txt`).
const MAJOR: u32 = 43;

/// An open NBD device, for setting it up with ioctls.
#[derive(Debug)]
pub struct NbdDevice(File);

impl NbdDevice {
    /// Opens a device node such as `/dev/nbd0`.
    ///
    /// # Errors
    /// As opening a file; `InvalidInput` if it is something else than an NBD device.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let facts = file.metadata()?;
        if !facts.file_type().is_block_device() || rustix::fs::major(facts.rdev()) != MAJOR {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no NBD device"));
        }
        Ok(Self(file))
    }

    /// Gives the device a connection, more than one where the kernel can. The kernel keeps a reference of its own.
    ///
    /// # Errors
    /// `EBUSY` if somebody else is setting the device up or has it, `EINVAL` for what is no stream socket, `EPERM`
    /// without `CAP_SYS_ADMIN`.
    pub fn set_socket(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let fd = usize::try_from(socket.as_raw_fd()).expect("a borrowed descriptor is not negative");
        self.call::<{ raw::NBD_SET_SOCK }>(fd)
    }

    /// Sets the block size in bytes: a power of two from 512 to the size of a page.
    ///
    /// # Errors
    /// `EINVAL` for any other.
    pub fn set_block_size(&self, bytes: usize) -> io::Result<()> {
        self.call::<{ raw::NBD_SET_BLKSIZE }>(bytes)
    }

    /// Sets the size in blocks.
    ///
    /// # Errors
    /// `EINVAL` if that overflows.
    pub fn set_size_in_blocks(&self, blocks: usize) -> io::Result<()> {
        self.call::<{ raw::NBD_SET_SIZE_BLOCKS }>(blocks)
    }

    /// Sets how many seconds a request may take; 0 is without limit.
    ///
    /// # Errors
    /// Only for lack of privilege.
    pub fn set_timeout(&self, seconds: usize) -> io::Result<()> {
        self.call::<{ raw::NBD_SET_TIMEOUT }>(seconds)
    }

    /// Sets the transmission flags that the server gave.
    ///
    /// # Errors
    /// Only for lack of privilege.
    pub fn set_flags(&self, flags: u16) -> io::Result<()> {
        self.call::<{ raw::NBD_SET_FLAGS }>(flags.into())
    }

    /// Serves the device. Blocks until it is disconnected, the server goes away or a request times out; all requests
    /// that are under way fail then.
    ///
    /// # Errors
    /// `ETIMEDOUT` after a time-out, `EBUSY` if it is served already, `EINVAL` without a socket.
    pub fn serve(&self) -> io::Result<()> {
        self.call::<{ raw::NBD_DO_IT }>(0)
    }

    /// Tells the server that this is the end, so that [`Self::serve`] returns.
    ///
    /// # Errors
    /// `EINVAL` without a socket.
    pub fn disconnect(&self) -> io::Result<()> {
        self.call::<{ raw::NBD_DISCONNECT }>(0)
    }

    /// Takes the connections away and forgets the size. All requests that are under way fail.
    ///
    /// # Errors
    /// Only for lack of privilege.
    pub fn clear(&self) -> io::Result<()> {
        self.call::<{ raw::NBD_CLEAR_SOCK }>(0)
    }

    fn call<const OPCODE: Opcode>(&self, argument: usize) -> io::Result<()> {
        // SAFETY: every ioctl of an NBD device takes an integer, never an address, and this is such a device: `open`
        // has looked. A descriptor given by number is only referenced by the kernel.
        unsafe { abi::call_with_integer::<OPCODE>(&self.0, argument) }?;
        Ok(())
    }
}

/// Has a netlink socket receive what the kernel sends to a multicast group, which may be past the 32 that `bind` can
/// name.
///
/// # Errors
/// `EINVAL` for a group that there is not, `ENOPROTOOPT` if it is no netlink socket.
pub fn join_netlink_group(socket: impl AsFd, group: u32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<u32>()).expect("four fits");
    // SAFETY: the option takes a u32, which lives for the whole call, and its length is given.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            std::ptr::from_ref(&group).cast(),
            length,
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nbd_devices_are_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for other in [file.path(), Path::new("/dev/null")] {
            let error = NbdDevice::open(other).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}", other.display());
        }
        assert_eq!(NbdDevice::open(Path::new("/no/such/device")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_group_is_joined_on_netlink_sockets_only() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
        let flags = SocketFlags::CLOEXEC;
        let generic = Some(netlink::GENERIC);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, generic).unwrap();
        // The first group of the generic protocol is the controller's own.
        join_netlink_group(&socket, 16).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(join_netlink_group(&tcp, 16).is_err());
    }
}
