//! PAGEMAP_SCAN (Linux 6.7): which pages are there, and which were written since they were last write-protected.
//!
//! Works in addresses; `Documentation/admin-guide/mm/pagemap.rst` tells what the words mean.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};

use crate::abi;

/// How many ranges one call can find: 12 KiB of stack.
const REGIONS: usize = 512;

/// The page table of this process.
#[derive(Debug)]
pub(crate) struct Pagemap(OwnedFd);

/// Which pages to find, and what to do with them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Find {
    /// Pages that are in memory.
    Present,
    /// Pages that were written since they were write-protected; they are write-protected again in the same step.
    WrittenAndProtect,
    /// Pages that are the shared page of zeros; they are write-protected in the same step.
    ZeroAndProtect,
}

impl Find {
    fn category(self) -> u64 {
        u64::from(match self {
            Self::Present => raw::PAGE_IS_PRESENT,
            Self::WrittenAndProtect => raw::PAGE_IS_WRITTEN,
            Self::ZeroAndProtect => raw::PAGE_IS_PFNZERO,
        })
    }

    fn flags(self) -> u64 {
        u64::from(match self {
            Self::Present => 0,
            Self::WrittenAndProtect | Self::ZeroAndProtect => raw::PM_SCAN_WP_MATCHING | raw::PM_SCAN_CHECK_WPASYNC,
        })
    }
}

impl Pagemap {
    pub(crate) fn open() -> io::Result<Self> {
        let path = "/proc/self/pagemap";
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("{path}: {error}")))?;
        Ok(Self(fd))
    }

    /// Calls `found` with every run of matching pages, in ascending order; long runs may come in parts.
    ///
    /// # Safety
    /// If `find` protects, the pages are the caller's own.
    pub(crate) unsafe fn scan(
        &self,
        addresses: Range<u64>,
        find: Find,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut regions = [raw::page_region { start: 0, end: 0, categories: 0 }; REGIONS];
        let mut start = addresses.start;
        while start < addresses.end {
            let mut argument = argument(start..addresses.end, find, &mut regions);
            // SAFETY: PAGEMAP_SCAN takes this struct; it writes at most `vec_len` regions to `vec`, which is exclusively
            // ours, and the caller owns the pages it may protect.
            let filled = unsafe { abi::call::<{ abi::PAGEMAP_SCAN }, _>(&self.0, &mut argument) }?;
            let filled = usize::try_from(filled).map_err(io::Error::other)?;
            regions[..filled].iter().for_each(|region| found(region.start..region.end));
            if argument.walk_end <= start {
                return Err(io::Error::other("the kernel's page scan makes no progress"));
            }
            start = argument.walk_end;
        }
        Ok(())
    }
}

/// `vec` must not be null even where nobody wants to know what was found: without it the kernel protects every page,
/// whatever its categories.
fn argument(addresses: Range<u64>, find: Find, regions: &mut [raw::page_region; REGIONS]) -> raw::pm_scan_arg {
    raw::pm_scan_arg {
        size: size_of::<raw::pm_scan_arg>() as u64,
        flags: find.flags(),
        start: addresses.start,
        end: addresses.end,
        walk_end: 0,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: find.category(),
        category_anyof_mask: 0,
        return_mask: find.category(),
    }
}
