//! Numbers and shapes of the kernel's interfaces, checked against the shapes that its headers give.
//!
//! Sources: `include/uapi/linux/userfaultfd.h`, `include/uapi/linux/fs.h` and `include/uapi/linux/sockios.h`.

use std::ffi::{c_int, c_void};
use std::os::fd::AsFd;

use linux_raw_sys::general as raw;
use rustix::io;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, opcode};

const UFFD: u8 = 0xaa;

pub(crate) const UFFDIO_API: Opcode = opcode::read_write::<raw::uffdio_api>(UFFD, 0x3f);
pub(crate) const UFFDIO_REGISTER: Opcode = opcode::read_write::<raw::uffdio_register>(UFFD, 0x00);
pub(crate) const UFFDIO_WAKE: Opcode = opcode::read::<raw::uffdio_range>(UFFD, 0x02);
pub(crate) const UFFDIO_COPY: Opcode = opcode::read_write::<raw::uffdio_copy>(UFFD, 0x03);
pub(crate) const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<raw::uffdio_zeropage>(UFFD, 0x04);
pub(crate) const UFFDIO_POISON: Opcode = opcode::read_write::<raw::uffdio_poison>(UFFD, 0x08);
pub(crate) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(UFFD, 0x00);
/// The kernel has one number for it and for what terminals call TIOCOUTQ.
pub(crate) const SIOCOUTQ: Opcode = linux_raw_sys::ioctl::TIOCOUTQ;
pub(crate) const PAGEMAP_SCAN: Opcode = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);

const _: () = {
    assert!(size_of::<raw::uffd_msg>() == 32);
    assert!(size_of::<raw::uffdio_api>() == 24);
    assert!(size_of::<raw::uffdio_range>() == 16);
    assert!(size_of::<raw::uffdio_register>() == 32);
    assert!(size_of::<raw::uffdio_copy>() == 40);
    assert!(size_of::<raw::uffdio_zeropage>() == 32);
    assert!(size_of::<raw::uffdio_poison>() == 32);
    assert!(size_of::<raw::page_region>() == 24);
    assert!(size_of::<raw::pm_scan_arg>() == 96);
};

/// An ioctl with a pointer to a struct that the kernel reads and writes.
struct Struct<'a, const OPCODE: Opcode, T>(&'a mut T);

// SAFETY: the pointer is to a live, exclusively borrowed `T` for the whole call; that `T` is what OPCODE takes is the
// promise of `call`'s caller. The output is only the returned integer.
unsafe impl<const OPCODE: Opcode, T> Ioctl for Struct<'_, OPCODE, T> {
    type Output = c_int;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> io::Result<c_int> {
        Ok(out)
    }
}

/// Calls an ioctl that takes a `T`; the kernel may have changed `argument` even if it fails.
///
/// # Safety
/// `T` is what `OPCODE` takes on `fd`, and whatever addresses are in `argument` may be read or written as the ioctl
/// does.
pub(crate) unsafe fn call<const OPCODE: Opcode, T>(fd: impl AsFd, argument: &mut T) -> io::Result<c_int> {
    // SAFETY: forwarded to the caller.
    unsafe { ioctl::ioctl(fd, Struct::<OPCODE, T>(argument)) }
}

/// An ioctl with an integer in place of the pointer, that returns an integer.
struct Integer<const OPCODE: Opcode>(usize);

// SAFETY: nothing is pointed to.
unsafe impl<const OPCODE: Opcode> Ioctl for Integer<OPCODE> {
    type Output = c_int;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> io::Result<c_int> {
        Ok(out)
    }
}

/// Calls an ioctl that takes an integer.
///
/// # Safety
/// `OPCODE` takes an integer on `fd`, not an address.
pub(crate) unsafe fn call_with_integer<const OPCODE: Opcode>(fd: impl AsFd, argument: usize) -> io::Result<c_int> {
    // SAFETY: forwarded to the caller.
    unsafe { ioctl::ioctl(fd, Integer::<OPCODE>(argument)) }
}
