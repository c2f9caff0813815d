//! A span of anonymous memory as the kernel sees it: addresses, not bytes. Who may look at the bytes is decided by its
//! users.

use std::ffi::c_void;
use std::io;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munlock, munmap};
use rustix::process::{Pid, getpid};

use crate::PAGE_SIZE;
use crate::mapping::Protection;

/// Private anonymous pages, unmapped when dropped. A forked child has none of them: there it does nothing.
#[derive(Debug)]
pub(crate) struct Span {
    base: NonNull<u8>,
    len: usize,
    owner: Pid,
}

// SAFETY: a span is only addresses; every access to the bytes behind them has its own reason.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// Maps at least `len` bytes, rounded up to whole pages, without reserving swap for them, and keeps them from being
    /// inherited over fork, merged with equal pages, or backed by huge pages. Nobody may touch them before
    /// [`Self::allow`].
    ///
    /// A program that has called `mlockall(MCL_FUTURE)` gets all new memory filled with zeros at once: not this, which
    /// starts without access (the kernel then fills nothing) and is unlocked before it gets any.
    pub(crate) fn new(len: u64) -> io::Result<Self> {
        Self::aligned(len, 1)
    }

    /// The same at an address that is a multiple of `align`, a power of two.
    pub(crate) fn aligned(len: u64, align: usize) -> io::Result<Self> {
        let len = round_up(len)?;
        // The kernel aligns to pages, and lays new mappings below the last: the highest place lets them join up.
        let room = if align > PAGE_SIZE as usize { align } else { 0 };
        let mut span = Self::anonymous(len.checked_add(room).ok_or(io::ErrorKind::OutOfMemory)?)?;
        if room > 0 {
            let last = span.base.addr().get() + room;
            span.narrow(last / align * align - span.base.addr().get(), len)?;
        }
        // SAFETY: the pages are this span's own, and whether they are locked changes no byte.
        unsafe { munlock(span.base.as_ptr().cast(), len) }?;
        span.advise(0, len, Advice::LinuxDontFork)?;
        span.keep_single()?;
        Ok(span)
    }

    fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), flags) };
        let base = base.map_err(|error| cannot_map(len, error))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered with a null address"))?;
        Ok(Self { base, len, owner: getpid() })
    }

    /// Unmaps all but `len` bytes from `start` on, which lie inside.
    fn narrow(&mut self, start: usize, len: usize) -> io::Result<()> {
        let end = start + len;
        for (offset, len) in [(end, self.len - end), (0, start)].into_iter().filter(|(_, len)| *len > 0) {
            // SAFETY: the pages are this span's own, and nobody has been let at them yet.
            unsafe { munmap(self.base.as_ptr().wrapping_add(offset).cast(), len) }?;
        }
        // SAFETY: `start` lies inside the mapping.
        self.base = unsafe { self.base.add(start) };
        self.len = len;
        Ok(())
    }

    /// Backs the pages with huge ones, where the kernel has them to give. Kernels that are built without answer EINVAL.
    pub(crate) fn prefer_huge(&self) {
        let _ = self.advise(0, self.len, Advice::LinuxHugepage);
    }

    /// Lets the program use the pages.
    pub(crate) fn allow(&self, protection: Protection) -> io::Result<()> {
        self.allow_in(0, self.len(), protection)
    }

    /// The same for some of them, which are whole.
    pub(crate) fn allow_in(&self, offset: u64, len: u64, protection: Protection) -> io::Result<()> {
        let flags = match protection {
            Protection::ReadOnly => MprotectFlags::READ,
            Protection::Tracked => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        let (offset, len) = self.inside(offset, len)?;
        self.protect(offset, len, flags)
    }

    /// Huge pages and merged pages would be split and copied at the first write-protected page; kernels that are built
    /// without either answer EINVAL, and there is nothing to keep away then.
    fn keep_single(&self) -> io::Result<()> {
        for advice in [Advice::LinuxNoHugepage, Advice::LinuxUnmergeable] {
            match self.advise(0, self.len, advice) {
                Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// The address of the first byte, as the kernel's interfaces want it.
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    /// The length in bytes: whole pages.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether this process is the one that mapped it, and not a forked child.
    pub(crate) fn is_ours(&self) -> bool {
        getpid() == self.owner
    }

    /// Forgets whole pages: they are missing afterwards.
    ///
    /// # Safety
    /// Nobody has seen what the pages hold, or may go on seeing it.
    pub(crate) unsafe fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (offset, len) = self.inside(offset, len)?;
        self.advise(offset, len, Advice::LinuxDontNeed)
    }

    /// Makes every later access a segmentation fault.
    pub(crate) fn forbid(&self) -> io::Result<()> {
        self.protect(0, self.len, MprotectFlags::empty())
    }

    fn protect(&self, offset: usize, len: usize, flags: MprotectFlags) -> io::Result<()> {
        let start = self.base.as_ptr().wrapping_add(offset).cast();
        // SAFETY: the pages are this span's own. No byte changes; what is no longer allowed fails loudly.
        Ok(unsafe { mprotect(start, len, flags) }?)
    }

    /// Copies bytes out without touching them from user space: see [`crate::Pager::read`].
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (offset, len) = self.inside(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < len {
            let local = libc::iovec { iov_base: buf[done..].as_mut_ptr().cast(), iov_len: len - done };
            let remote = self.iovec(offset + done, len - done);
            // SAFETY: `local` is the exclusively borrowed rest of `buf`; `remote` lies inside this span, and the kernel
            // checks it anyway.
            let copied = unsafe { libc::process_vm_readv(self.owner.as_raw_nonzero().get(), &local, 1, &remote, 1, 0) };
            done += progress(copied)?;
        }
        Ok(())
    }

    /// Copies bytes in the same way.
    ///
    /// # Safety
    /// No view of these bytes is live.
    pub(crate) unsafe fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (offset, len) = self.inside(offset, bytes.len() as u64)?;
        let mut done = 0;
        while done < len {
            let local = libc::iovec { iov_base: bytes[done..].as_ptr().cast_mut().cast(), iov_len: len - done };
            let remote = self.iovec(offset + done, len - done);
            // SAFETY: `local` is only read; `remote` lies inside this span, where the caller lets us write.
            let copied =
                unsafe { libc::process_vm_writev(self.owner.as_raw_nonzero().get(), &local, 1, &remote, 1, 0) };
            done += progress(copied)?;
        }
        Ok(())
    }

    fn iovec(&self, offset: usize, len: usize) -> libc::iovec {
        libc::iovec { iov_base: self.base.as_ptr().wrapping_add(offset).cast(), iov_len: len }
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        let start: *mut c_void = self.base.as_ptr().wrapping_add(offset).cast();
        // SAFETY: the pages are this span's own. Of the advice given here only `LinuxDontNeed` changes what they hold,
        // and that is given in `discard` alone, whose caller answers for it.
        Ok(unsafe { madvise(start, len, advice) }?)
    }

    /// A range as addresses count them, if it lies inside.
    pub(crate) fn inside(&self, offset: u64, len: u64) -> io::Result<(usize, usize)> {
        match offset.checked_add(len) {
            // Both fit: they are at most the length, which is a usize.
            Some(end) if end <= self.len() => Ok((offset as usize, len as usize)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "past the end of the mapping")),
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.is_ours() {
            // SAFETY: the pages are this span's own, and whoever borrowed bytes of them borrowed the span.
            let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}

fn round_up(len: u64) -> io::Result<usize> {
    let rounded = len.checked_next_multiple_of(PAGE_SIZE).and_then(|len| usize::try_from(len).ok());
    match rounded {
        Some(len) if len > 0 => Ok(len),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{len} bytes cannot be mapped"))),
    }
}

fn cannot_map(len: usize, error: rustix::io::Errno) -> io::Error {
    let hint = "more than the address space, RLIMIT_AS or (where vm.overcommit_memory is 2) the commit limit allows";
    match error {
        rustix::io::Errno::NOMEM => {
            io::Error::new(io::ErrorKind::OutOfMemory, format!("cannot map {len} bytes of memory: {hint}"))
        }
        other => other.into(),
    }
}

fn progress(copied: isize) -> io::Result<usize> {
    match usize::try_from(copied) {
        Ok(0) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Ok(copied) => Ok(copied),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
