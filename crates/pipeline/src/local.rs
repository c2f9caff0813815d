//! The local side of a [cached](crate) region: where pulled chunks are put, and what the application works on.

use std::ops::Range;

use async_trait::async_trait;
use r3map_core::{Backend, Error, Piece, Result};

/// A local copy that is filled from a remote. It does not know which of its blocks are valid; the cached stage does,
/// and never reads a block here that it has not put here.
///
/// What a call that was dropped was about to put here or to write has happened when a later read of that range returns, or
/// never does: what is read is sent to the remote, and must be what stays here.
#[async_trait]
pub trait Local: Backend {
    /// Puts pulled bytes in place, without making them count as written by the application. The range is block-aligned
    /// (or ends at the region's end), and nobody else reads or writes it until this returns.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// The same without waiting and without a copy, where this local side can.
    fn install_now(&self) -> Option<&dyn InstallNow> {
        None
    }

    /// Writes that the application makes without a call (through a mapping), where there are such.
    fn written(&self) -> Option<&dyn Written> {
        None
    }

    /// The range cannot be had: the remote does not give it and retries are spent. A mapping makes readers that wait
    /// for it fail instead of sleeping on; others have nothing to do, the caller gets the error.
    fn fail(&self, range: Range<u64>, error: &Error) {
        let _ = (range, error);
    }
}

/// Installing from lent bytes, at once.
pub trait InstallNow: Send + Sync {
    /// As [`Local::install`], from a piece. Short and never blocking on the network or a disk.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    fn install_now(&self, offset: u64, piece: Piece<'_>) -> Result<()>;
}

/// Knowing what was written without a call.
pub trait Written: Send + Sync {
    /// Calls `found` with every block-aligned range inside `valid` that was written since it was installed or last
    /// asked about, and starts afresh for these, in one atomic step: a write is found now or the next time, never lost.
    ///
    /// # Errors
    /// When the kernel does not answer; nothing was started afresh then that was not also given to `found`.
    fn collect(&self, valid: Range<u64>, found: &mut dyn FnMut(Range<u64>)) -> Result<()>;
}
