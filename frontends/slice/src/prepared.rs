//! Memory that is filled before anybody sees it: where a migration puts what it pulls in advance.

use std::ops::Range;
use std::sync::Arc;

use r3map_core::{Backend, Error, Operation, Result};
use r3map_pipeline::Local;
use r3map_sys::{Mapping, Protection, ScopeWanted};

use crate::pages::Pages;
use crate::slice::map_bytes;
use crate::{Slice, SliceParts, SliceSettings};

/// A slice to be. Nobody has a view of it, so that what was put there can be taken back.
#[derive(Debug)]
pub struct Prepared {
    mapping: Mapping,
}

impl Prepared {
    /// Maps `size` bytes, all of them missing.
    ///
    /// # Errors
    /// As [`Slice::open`].
    pub fn new(size: u64, scope: ScopeWanted) -> Result<Self> {
        Ok(Self { mapping: map_bytes(size, Protection::Tracked, scope)? })
    }

    /// Where bytes are put.
    #[must_use]
    pub fn local(&self) -> Arc<dyn Local> {
        Arc::new(Pages::new(self.mapping.pager().clone()))
    }

    /// Takes back what was put into whole blocks: they can be filled anew.
    ///
    /// # Errors
    /// `InvalidInput` for a range that is not whole blocks of the region, or empty.
    pub fn forget(&mut self, bytes: Range<u64>) -> Result<()> {
        let (offset, len) = (bytes.start, bytes.end.saturating_sub(bytes.start));
        let forgotten = self.mapping.discard(offset, len);
        forgotten.map_err(|error| Error::from_io(Operation::Trim, "memory cannot be emptied", error).at(offset, len))
    }

    /// Shows the memory. What was put there is named in [`present`](r3map_pipeline::CachedParts::present); the rest
    /// comes from `remote`.
    ///
    /// # Errors
    /// As [`Slice::open`].
    pub fn open(self, remote: Arc<dyn Backend>, settings: SliceSettings, parts: SliceParts) -> Result<Slice> {
        Slice::open_on(self.mapping, remote, settings, parts)
    }
}
