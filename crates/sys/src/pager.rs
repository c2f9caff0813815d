//! The side of a mapping that works behind the application's back: it learns of missing pages, fills or poisons them,
//! finds out which were written, and copies bytes out.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use linux_raw_sys::general as raw;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::mapping::Protection;
use crate::pagemap::{Find, Pagemap};
use crate::span::Span;
use crate::userfault::{self, FaultScope, Filled, ScopeWanted};
use crate::{Event, PAGE_SIZE};

/// How many faults one read takes from the kernel.
const BATCH: usize = 64;
const MESSAGE: usize = size_of::<raw::uffd_msg>();
/// How many bytes have their protection changed at a time. It takes some 20 ms for a GiB, and meanwhile nobody in the
/// process can map memory, and the kernel reads nothing of it for [`Pager::read`].
const PROTECT_STEP: usize = 8 << 20;

/// An access to a missing page, which waits until it is filled or poisoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The first byte of the page, as an offset in the mapping.
    pub offset: u64,
    /// Whether the access is a write.
    pub write: bool,
}

/// Why [`Pager::wait`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// There are faults (or there were: others may have taken them).
    Faults,
    /// The event was raised.
    Stopped,
}

/// What a filled page counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Install {
    /// As not written: [`Pager::collect`] finds it once the application writes to it.
    Clean,
    /// As written.
    Written,
}

/// Fills, poisons, scans and reads the pages of a [`crate::Mapping`]. All calls may run at once from many threads.
///
/// Offsets count from the mapping's start. Ranges of pages start at a multiple of [`PAGE_SIZE`] and end at one or at
/// the mapping's end; others are `InvalidInput`.
#[derive(Debug)]
pub struct Pager {
    // Dropped in this order: after the userfaultfd is closed missing pages would read as zeros, so the memory goes first.
    span: Span,
    uffd: OwnedFd,
    pagemap: Pagemap,
    len: u64,
    protection: Protection,
    scope: FaultScope,
    /// The poisoned pages, and since when. Filling holds this for reading, so that no page is filled while it is being
    /// poisoned or healed.
    poisoned: RwLock<BTreeMap<u64, Instant>>,
    shared: AtomicBool,
    /// All access has ended. Held while the protection of some of the memory is changed.
    sealed: Mutex<bool>,
}

impl Pager {
    pub(crate) fn new(len: u64, protection: Protection, wanted: ScopeWanted) -> io::Result<Self> {
        if rustix::param::page_size() as u64 != PAGE_SIZE {
            let text = format!("pages of {} bytes are not supported, only of {PAGE_SIZE}", rustix::param::page_size());
            return Err(io::Error::new(io::ErrorKind::Unsupported, text));
        }
        let (uffd, scope) = userfault::open(wanted, protection)?;
        let span = Span::new(len)?;
        // SAFETY: the span was just made and is ours.
        unsafe { userfault::register(&uffd, span.address(), span.len(), protection) }?;
        // Only now: whoever touches a page from here on is waited for.
        span.allow(protection)?;
        let (poisoned, shared, sealed) = (RwLock::default(), AtomicBool::new(false), Mutex::default());
        Ok(Self { span, uffd, pagemap: Pagemap::open()?, len, protection, scope, poisoned, shared, sealed })
    }

    /// The length in bytes, as it was asked for.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping never is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What the application may do with the memory.
    #[must_use]
    pub fn protection(&self) -> Protection {
        self.protection
    }

    /// Whose faults are served.
    #[must_use]
    pub fn scope(&self) -> FaultScope {
        self.scope
    }

    /// Whether this is the process that made the mapping: a forked child has neither the memory nor the threads, and
    /// must let go of it without waiting for anybody.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.span.is_ours()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.span.base().as_ptr()
    }

    pub(crate) fn set_shared(&self) {
        self.shared.store(true, Ordering::Release);
    }

    /// Waits for faults or for `stop`, and puts the faults into `faults`, which it clears.
    ///
    /// # Errors
    /// When the kernel does not answer; nothing more can be served then.
    pub fn wait(&self, stop: &Event, faults: &mut Vec<Fault>) -> io::Result<Woken> {
        faults.clear();
        let mut fds = [PollFd::new(&self.uffd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => return Ok(Woken::Faults),
            other => other?,
        };
        if !fds[1].revents().is_empty() {
            return Ok(Woken::Stopped);
        }
        self.take(faults)?;
        Ok(Woken::Faults)
    }

    /// Puts the faults that are there now into `faults`, which it clears, and waits for none.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn take(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        faults.clear();
        let mut messages = [0; BATCH * MESSAGE];
        let len = match rustix::io::read(&self.uffd, &mut messages) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            other => other?,
        };
        faults.extend(messages[..len].chunks_exact(MESSAGE).filter_map(|message| self.fault(message)));
        Ok(())
    }

    /// `struct uffd_msg`: the event in the first byte; for a page fault the flags at 8 and the address at 16.
    fn fault(&self, message: &[u8]) -> Option<Fault> {
        if u32::from(message[0]) != raw::UFFD_EVENT_PAGEFAULT {
            return None;
        }
        let word = |at: usize| message[at..at + 8].try_into().map(u64::from_ne_bytes).unwrap_or_default();
        let (flags, address) = (word(8), word(16));
        let offset = address.checked_sub(self.span.address())? & !(PAGE_SIZE - 1);
        Some(Fault { offset, write: flags & u64::from(raw::UFFD_PAGEFAULT_FLAG_WRITE) != 0 })
    }

    /// Fills missing pages with `bytes` and wakes who waits for them. Pages that are there stay as they are; poisoned
    /// ones are healed. `bytes` may end inside the mapping's last page.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole pages; `OutOfMemory`. Some of the pages may be filled then.
    pub fn install(&self, offset: u64, bytes: &[u8], install: Install) -> io::Result<()> {
        self.check_pages(offset, bytes.len() as u64)?;
        let _healthy = self.healthy(offset, bytes.len() as u64)?;
        self.fill(offset, bytes, install, &mut |_, _| Ok(()))
    }

    /// The same with zeros, which take no memory until they are written to.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn install_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_pages(offset, len)?;
        let _healthy = self.healthy(offset, len)?;
        let (start, len) = (self.span.address() + offset, len.next_multiple_of(PAGE_SIZE));
        let fill = |part: Range<u64>| {
            // SAFETY: the pages are the span's, `check_pages` says; only missing ones change, see `Mapping`.
            unsafe { userfault::zero(&self.uffd, start + part.start, part.end - part.start) }
        };
        for_missing(len, fill, |_| Ok(()))?;
        if self.protection == Protection::Tracked {
            self.protect_zeroes(start..start + len)?;
        }
        userfault::wake(&self.uffd, start, len)
    }

    /// Zero pages come unprotected, and would count as written. They are protected before those who wait for them wake.
    /// A page that somebody else writes to in between no longer is the shared page of zeros, so that the write stays
    /// known.
    fn protect_zeroes(&self, addresses: Range<u64>) -> io::Result<()> {
        // SAFETY: the pages are the span's, its caller says.
        unsafe { self.pagemap.scan(addresses, Find::ZeroAndProtect, &mut |_| {}) }
    }

    /// Copies whole pages where they are missing, and gives those that are there to `present`.
    fn fill(
        &self,
        offset: u64,
        bytes: &[u8],
        install: Install,
        present: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let protect = install == Install::Clean && self.protection == Protection::Tracked;
        let (whole, tail) = bytes.split_at(bytes.len() - bytes.len() % PAGE_SIZE as usize);
        self.fill_whole(offset, whole, protect, present)?;
        if tail.is_empty() {
            return Ok(());
        }
        let mut page = [0; PAGE_SIZE as usize];
        page[..tail.len()].copy_from_slice(tail);
        self.fill_whole(offset + whole.len() as u64, &page, protect, &mut |at, _| present(at, tail))
    }

    fn fill_whole(
        &self,
        offset: u64,
        bytes: &[u8],
        protect: bool,
        present: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let fill = |part: Range<u64>| {
            let address = self.span.address() + offset + part.start;
            // SAFETY: the pages are the span's, `check_pages` says; only missing ones change, see `Mapping`.
            unsafe { userfault::copy(&self.uffd, address, &bytes[part.start as usize..part.end as usize], protect) }
        };
        let present = |done| present(offset + done, &bytes[done as usize..][..PAGE_SIZE as usize]);
        for_missing(bytes.len() as u64, fill, present)
    }

    /// Makes the page at `offset` raise SIGBUS where it is touched, if it is missing, and wakes who waits for it. A
    /// page that is there stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` for what is not the start of a page inside the mapping.
    pub fn poison(&self, offset: u64) -> io::Result<()> {
        self.check_pages(offset, PAGE_SIZE.min(self.len.saturating_sub(offset)))?;
        let mut poisoned = self.write_poisoned();
        let address = self.span.address() + offset;
        loop {
            // SAFETY: the page is the span's; only a missing one changes, see `Mapping`.
            match (unsafe { userfault::poison(&self.uffd, address, PAGE_SIZE) }).stopped {
                None => {
                    poisoned.insert(offset, Instant::now());
                    return Ok(());
                }
                Some(Errno::AGAIN) => {}
                Some(Errno::EXIST) => return userfault::wake(&self.uffd, address, PAGE_SIZE),
                Some(error) => return Err(error.into()),
            }
        }
    }

    /// Makes pages that have been poisoned for at least `age` missing again, so that the next access asks for them
    /// anew.
    ///
    /// # Errors
    /// When the kernel does not let go of a page; it stays poisoned then.
    pub fn heal(&self, age: Duration) -> io::Result<()> {
        let mut poisoned = self.write_poisoned();
        let old: Vec<u64> =
            poisoned.iter().filter(|(_, since)| since.elapsed() >= age).map(|(offset, _)| *offset).collect();
        self.heal_pages(&mut poisoned, &old)
    }

    fn heal_pages(&self, poisoned: &mut BTreeMap<u64, Instant>, pages: &[u64]) -> io::Result<()> {
        for offset in pages {
            // SAFETY: a page in this table is poisoned: only `poison` puts it there, nobody can have read it, and
            // nobody fills it while we hold the table.
            unsafe { self.span.discard(*offset, PAGE_SIZE) }?;
            poisoned.remove(offset);
        }
        Ok(())
    }

    /// Holds off poisoning while a range is filled; nothing in it is poisoned.
    fn healthy(&self, offset: u64, len: u64) -> io::Result<RwLockReadGuard<'_, BTreeMap<u64, Instant>>> {
        loop {
            let poisoned = self.read_poisoned();
            if poisoned.is_empty() || poisoned.range(offset..offset + len).next().is_none() {
                return Ok(poisoned);
            }
            drop(poisoned);
            let mut poisoned = self.write_poisoned();
            let pages: Vec<u64> = poisoned.range(offset..offset + len).map(|(offset, _)| *offset).collect();
            self.heal_pages(&mut poisoned, &pages)?;
        }
    }

    /// Calls `found` with every run of pages in `bytes` that was written since it was installed clean or last
    /// collected, and protects them again in the same step. The last run may end inside the last page. Ask only about
    /// pages that are filled: missing ones count as written.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole pages, or a mapping that is not tracked. What was protected before
    /// an error was given to `found`.
    pub fn collect(&self, bytes: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        if self.protection != Protection::Tracked {
            return Err(invalid("a read-only mapping does not track writes"));
        }
        self.scan(bytes, Find::WrittenAndProtect, found)
    }

    /// Calls `found` with every run of pages in `bytes` that is in memory.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole pages.
    pub fn present(&self, bytes: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        self.scan(bytes, Find::Present, found)
    }

    fn scan(&self, bytes: Range<u64>, find: Find, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
        self.check_pages(bytes.start, bytes.end.saturating_sub(bytes.start))?;
        let base = self.span.address();
        let addresses = base + bytes.start..base + bytes.end.next_multiple_of(PAGE_SIZE);
        // SAFETY: the pages are the span's, `check_pages` says.
        unsafe {
            self.pagemap.scan(addresses, find, &mut |run| found(run.start - base..(run.end - base).min(self.len)))
        }
    }

    /// Makes every later store of the application a segmentation fault, and returns when none is under way that was not
    /// one: what is found to be written from now on was written before. Loads, filling and reading go on. Takes some 20 ms
    /// for each GiB that is filled.
    ///
    /// # Errors
    /// When the kernel refuses; stores are allowed as before then.
    pub fn freeze(&self) -> io::Result<()> {
        self.freeze_with(|_| {})
    }

    /// The same in twice the time, half of which it leaves the process's memory to others: while it is changed nobody can
    /// map memory, nor the kernel read it.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub fn freeze_gently(&self) -> io::Result<()> {
        self.freeze_with(std::thread::sleep)
    }

    fn freeze_with(&self, rest: impl Fn(Duration)) -> io::Result<()> {
        self.allow(Protection::ReadOnly, rest).inspect_err(|_| {
            // What is split up already can be joined again whatever the kernel's limits are.
            let _ = self.thaw();
        })
    }

    /// Allows again what the application may do.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn thaw(&self) -> io::Result<()> {
        self.allow(self.protection, |_| {})
    }

    /// Changes the protection step by step, unless all access has ended; `rest` is told how long each step took.
    fn allow(&self, protection: Protection, rest: impl Fn(Duration)) -> io::Result<()> {
        for start in (0..self.span.len()).step_by(PROTECT_STEP) {
            let sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
            if *sealed {
                return Ok(());
            }
            let began = Instant::now();
            self.span.allow_in(start, (self.span.len() - start).min(PROTECT_STEP as u64), protection)?;
            drop(sealed);
            rest(began.elapsed());
        }
        Ok(())
    }

    /// Makes whole pages missing.
    ///
    /// # Safety
    /// Nobody sees what the pages hold.
    pub(crate) unsafe fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_pages(offset, len)?;
        let mut poisoned = self.write_poisoned();
        // SAFETY: the caller's.
        unsafe { self.span.discard(offset, len.next_multiple_of(PAGE_SIZE)) }?;
        poisoned.retain(|page, _| !(offset..offset + len).contains(page));
        Ok(())
    }

    /// Copies bytes out. The kernel reads them (`process_vm_readv(2)` on this very process): the application may be
    /// writing to them at the same time, and a page that cannot be had is an error and not a signal. A missing page is
    /// waited for where the kernel's faults are served, and is an error where they are not.
    ///
    /// # Errors
    /// `InvalidInput` past the end; EFAULT for pages that are missing or poisoned.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, buf.len() as u64)?;
        self.span.read(offset, buf)
    }

    /// Copies bytes in: whole pages that are missing are filled, and count as written; others are written to. Pages
    /// that are written in part must be there.
    ///
    /// # Errors
    /// `PermissionDenied` unless the mapping was given up by [`crate::Mapping::share`]; else as [`Self::read`].
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.shared.load(Ordering::Acquire) {
            let text = "the mapping has views of its own, which must not change under them";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        self.check(offset, bytes.len() as u64)?;
        let head = (offset.next_multiple_of(PAGE_SIZE) - offset).min(bytes.len() as u64);
        let (head, rest) = bytes.split_at(head as usize);
        self.overwrite(offset, head)?;
        let start = offset + head.len() as u64;
        let end = start + rest.len() as u64;
        let tail = if end == self.len { 0 } else { rest.len() % PAGE_SIZE as usize };
        let (whole, tail) = rest.split_at(rest.len() - tail);
        self.write_whole(start, whole)?;
        self.overwrite(end - tail.len() as u64, tail)
    }

    fn write_whole(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let _healthy = self.healthy(offset, bytes.len() as u64)?;
        let (mut at, end) = (offset, offset + bytes.len() as u64);
        let part = |range: Range<u64>| &bytes[(range.start - offset) as usize..(range.end - offset) as usize];
        let mut runs = Vec::new();
        self.present(offset..end, &mut |run| runs.push(run))?;
        for run in runs {
            self.fill(at, part(at..run.start), Install::Written, &mut |at, bytes| self.overwrite(at, bytes))?;
            self.overwrite(run.start, part(run.clone()))?;
            at = run.end;
        }
        self.fill(at, part(at..end), Install::Written, &mut |at, bytes| self.overwrite(at, bytes))
    }

    fn overwrite(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: called by `write` alone, after it has seen that there are no views and never will be again.
        unsafe { self.span.write(offset, bytes) }
    }

    /// Lets whoever waits for pages in this range try again.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole pages.
    pub fn wake(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_pages(offset, len)?;
        userfault::wake(&self.uffd, self.span.address() + offset, len.next_multiple_of(PAGE_SIZE))
    }

    /// Ends all access: from now on touching any page is a segmentation fault, also for those who wait for one. For
    /// when nobody serves faults any more, so that nobody waits for ever and nobody reads zeros.
    ///
    /// # Errors
    /// When the kernel is out of memory for its own tables; then access has not ended.
    pub fn seal(&self) -> io::Result<()> {
        let mut sealed = self.sealed.lock().unwrap_or_else(PoisonError::into_inner);
        self.span.forbid()?;
        *sealed = true;
        drop(sealed);
        userfault::wake(&self.uffd, self.span.address(), self.span.len())
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(invalid("past the end of the mapping")),
        }
    }

    fn check_pages(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let end = offset + len;
        if len == 0 || !offset.is_multiple_of(PAGE_SIZE) || !(end.is_multiple_of(PAGE_SIZE) || end == self.len) {
            return Err(invalid("not whole pages"));
        }
        Ok(())
    }

    // The table is only ever changed by single inserts and removals, so that a panic leaves it whole.
    fn read_poisoned(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Instant>> {
        self.poisoned.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_poisoned(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Instant>> {
        self.poisoned.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// Drives a fill over `len` bytes: `fill` fills what lies in a range of them. Goes on where the kernel stopped short; pages
/// that are there go to `present`.
///
/// The kernel fills nothing over the border of two parts of a mapping that differ: while the protection is changed, or
/// where somebody has locked a part of it in memory. It does not say where the border is.
fn for_missing(
    len: u64,
    mut fill: impl FnMut(Range<u64>) -> Filled,
    mut present: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let (mut done, mut upto) = (0, len);
    while done < len {
        let filled = fill(done..upto);
        done += filled.bytes;
        match filled.stopped {
            Some(Errno::NOENT) if upto - done > PAGE_SIZE => {
                upto = done + ((upto - done) / 2).next_multiple_of(PAGE_SIZE);
                continue;
            }
            None | Some(Errno::AGAIN) => {}
            Some(Errno::EXIST) => {
                present(done)?;
                done += PAGE_SIZE;
            }
            Some(error) => return Err(error.into()),
        }
        upto = len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel fills nothing over the border of two parts whose protection differs.
    #[test]
    fn memory_whose_protection_is_being_changed_is_filled_over_every_border() {
        let step = PROTECT_STEP as u64;
        let pager = Pager::new(3 * step, Protection::Tracked, ScopeWanted::Widest).unwrap();
        let bytes: Vec<u8> = (0..7 * PAGE_SIZE).map(|at| (at % 251) as u8 + 1).collect();
        let border = std::cell::Cell::new(step);
        pager
            .freeze_with(|_| {
                let at = border.replace(border.get() + step);
                if at < 3 * step {
                    pager.install(at - 3 * PAGE_SIZE, &bytes, Install::Clean).unwrap();
                    pager.install_zeroes(at - 13 * PAGE_SIZE, 26 * PAGE_SIZE).unwrap();
                }
            })
            .unwrap();
        for at in [step, 2 * step] {
            let mut found = vec![1; 26 * PAGE_SIZE as usize];
            pager.read(at - 13 * PAGE_SIZE, &mut found).unwrap();
            let (before, rest) = found.split_at(10 * PAGE_SIZE as usize);
            assert!(rest.starts_with(&bytes));
            assert!(before.iter().chain(&rest[bytes.len()..]).all(|byte| *byte == 0));
            let filled = at - 13 * PAGE_SIZE..at + 13 * PAGE_SIZE;
            pager.collect(filled, &mut |run| panic!("{run:?} counts as written")).unwrap();
        }
    }
}
