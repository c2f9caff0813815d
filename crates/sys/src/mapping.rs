//! The application's side of memory whose pages are filled on demand: ordinary slices, under ordinary borrow rules.

use std::io;
use std::sync::Arc;

use crate::pager::Pager;
use crate::userfault::ScopeWanted;

/// What the application may do with a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Read it. Writing is a segmentation fault.
    ReadOnly,
    /// Read and write it; which pages it wrote can be asked.
    Tracked,
}

/// Memory of any length whose missing pages are filled by a [`Pager`] when they are touched. This is the one owner of
/// views of its bytes.
///
/// # Why the views are sound
/// While a `&[u8]` or `&mut [u8]` from here is alive, nothing that safe code can call changes a byte that somebody may
/// have seen through it:
/// - A pager fills *missing* pages only, and the kernel refuses others. Nobody has seen what a missing page holds: an
///   access to it does not finish before it is filled. To the program the page has held these bytes from the start.
/// - A pager writes to pages that are there ([`Pager::write`]) only after [`Mapping::share`] has taken the views away
///   for good.
/// - Write-protecting pages and finding written ones changes no byte.
/// - Discarding happens to poisoned pages, which nobody can have read, and under an exclusive borrow of the mapping, when
///   there is no view.
///
/// Bytes are read in the background while a `&mut [u8]` is alive ([`Pager::read`]). The kernel reads them, as it would
/// for a debugger; to the program this is no access at all, and what comes out may mix old and new bytes. Such a page
/// was written after it was last write-protected, so that it is found again.
///
/// A `fork`ed child does not have the memory: its accesses are segmentation faults, never zeros.
#[derive(Debug)]
pub struct Mapping {
    pager: Arc<Pager>,
}

impl Mapping {
    /// Maps `len` bytes, all of them missing. The kernel works in whole pages: bytes past `len` in the last one belong
    /// to nobody.
    ///
    /// # Errors
    /// `PermissionDenied` when the kernel forbids this process to handle its page faults, `Unsupported` when it cannot,
    /// each with a message that says what to change; `OutOfMemory` when there are no addresses left.
    pub fn new(len: u64, protection: Protection, scope: ScopeWanted) -> io::Result<Self> {
        Ok(Self { pager: Arc::new(Pager::new(len, protection, scope)?) })
    }

    /// The side that fills its pages.
    #[must_use]
    pub fn pager(&self) -> &Arc<Pager> {
        &self.pager
    }

    /// The bytes. Reading one whose page is missing waits until the pager has filled it.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the bytes are mapped for as long as the pager lives, which `self` holds; see above for the rest.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len()) }
    }

    /// The bytes, to change; none if they may only be read.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> Option<&mut [u8]> {
        match self.pager.protection() {
            Protection::ReadOnly => None,
            // SAFETY: as above, and `self` is borrowed exclusively, so that this is the only view.
            Protection::Tracked => Some(unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len()) }),
        }
    }

    /// The address of the first byte, for other languages. It is valid until the last handle to the pager is dropped;
    /// the rules of [`Self::as_slice`] and [`Self::as_mut_slice`] hold for whoever uses it.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.pager.as_ptr()
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        // A mapping never is longer than the address space.
        self.pager.len() as usize
    }

    /// Whether it has no bytes: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes whole pages missing again, whatever they hold. There is no view while this runs, and a later one finds the
    /// pages filled anew.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole pages of the mapping; some of the pages may be discarded then.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        // SAFETY: `self` is borrowed exclusively, and views borrow it: nobody sees what the pages hold.
        unsafe { self.pager.discard(offset, len) }
    }

    /// Gives up the views for good; from now on the pager may write to pages that are there.
    #[must_use]
    pub fn share(self) -> Arc<Pager> {
        self.pager.set_shared();
        self.pager
    }
}
