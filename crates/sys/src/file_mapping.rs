//! A file that is mapped into memory, as programs do that know nothing of us: for whoever has to see what they see.
//! Bytes go in and out by copies, and never as slices: other processes may change the file at any time.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, MprotectFlags, MsyncFlags, ProtFlags, mmap, mprotect, msync, munmap};
use rustix::process::getpid;

/// Who sees what is written to a [`FileMapping`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The file and everybody who reads it.
    Shared,
    /// Only this mapping.
    Private,
}

/// The first bytes of a file, mapped. Dropping it hands over what was written, and unmaps.
///
/// A process must not use shared, writable mappings of a file that it serves itself (through FUSE): while the kernel
/// waits for such a page, it may keep the process's whole address space locked, and the threads that serve with it.
#[derive(Debug)]
pub struct FileMapping {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: it is only addresses; what is behind them is touched by the kernel alone, which needs no order of threads.
unsafe impl Send for FileMapping {}
// SAFETY: as above.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps the first `len` bytes of `file`, which must be open for reading, and for writing too if what is written is
    /// shared and `writable`.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub fn new(file: &File, len: usize, sharing: Sharing, writable: bool) -> io::Result<Self> {
        let flags = match sharing {
            Sharing::Shared => MapFlags::SHARED,
            Sharing::Private => MapFlags::PRIVATE,
        };
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let base = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, file, 0) }?;
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mmap answered with a null address"))?;
        let mapping = Self { base, len };
        if writable {
            // SAFETY: the pages are this mapping's own, and nobody has a view of them.
            unsafe { mprotect(base.as_ptr(), len, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        }
        Ok(mapping)
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes out, through page faults like any access; where that would be a SIGBUS, it is an error.
    ///
    /// # Errors
    /// `InvalidInput` past the end, EFAULT for what the file does not give.
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> io::Result<()> {
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let remote = self.part(offset, buf.len())?;
        // SAFETY: `local` is exclusively borrowed; `remote` lies inside the mapping.
        whole(buf.len(), || unsafe {
            libc::process_vm_readv(getpid().as_raw_nonzero().get(), &local, 1, &remote, 1, 0)
        })
    }

    /// Copies bytes in, in the same way.
    ///
    /// # Errors
    /// As [`Self::read`], also if it is not writable.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = self.part(offset, bytes.len())?;
        // SAFETY: `local` is only read; `remote` lies inside the mapping, of which nobody has a view.
        whole(bytes.len(), || unsafe {
            libc::process_vm_writev(getpid().as_raw_nonzero().get(), &local, 1, &remote, 1, 0)
        })
    }

    /// Hands what was written over to the file, and waits until it is durable there.
    ///
    /// # Errors
    /// As `msync(2)`.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: it changes no byte of the mapping.
        Ok(unsafe { msync(self.base.as_ptr(), self.len, MsyncFlags::SYNC) }?)
    }

    fn part(&self, offset: usize, len: usize) -> io::Result<libc::iovec> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => {
                Ok(libc::iovec { iov_base: self.base.as_ptr().wrapping_byte_add(offset), iov_len: len })
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "past the end of the mapping")),
        }
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // Unmapping dirty pages of a FUSE file writes them while the address space is locked, for all threads. Errors are
        // for those who ask by `sync`.
        let _ = self.sync();
        // SAFETY: nothing refers to the pages any more. It fails only for ranges that are no mapping.
        let _ = unsafe { munmap(self.base.as_ptr(), self.len) };
    }
}

/// The kernel stops at the first page that it cannot have.
fn whole(len: usize, copy: impl FnOnce() -> isize) -> io::Result<()> {
    match usize::try_from(copy()) {
        Ok(copied) if copied == len => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn shared_writes_reach_the_file_and_private_ones_do_not() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        let shared = FileMapping::new(&file, 5000, Sharing::Shared, true).unwrap();
        let private = FileMapping::new(&file, 5000, Sharing::Private, true).unwrap();
        shared.write(4090, b"over the border").unwrap();
        private.write(0, b"mine").unwrap();
        shared.sync().unwrap();
        let mut seen = [0; 15];
        file.read_exact_at(&mut seen, 4090).unwrap();
        assert_eq!(&seen, b"over the border");
        private.read(4090, &mut seen).unwrap();
        assert_eq!(&seen, b"over the border");
        file.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [7; 15]);
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let mapping = FileMapping::new(&file, 8192, Sharing::Shared, false).unwrap();
        let mut buf = [1; 8];
        mapping.read(0, &mut buf).unwrap();
        assert_eq!(buf, [0; 8]);
        assert_eq!(mapping.read(4096, &mut buf).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(mapping.write(0, &buf).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(mapping.read(8190, &mut buf).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
