//! What a local side remembers of its blocks, so that it survives a crash of the process that fills it.

use std::ops::Range;

use async_trait::async_trait;
use r3map_core::Result;

/// The state of a block, as far as it outlives the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// Present, and the remote durably has the same bytes.
    Clean,
    /// Present, and the remote may not have it (or not durably).
    Dirty,
}

/// A durable table of block states. Blocks that it says nothing about are absent.
///
/// Order is what makes it safe: `Dirty` is recorded before the bytes of a present block change, and for an absent block
/// after the bytes that make it present are in place (a crash in between leaves it absent, never half written and
/// present); `Clean` is recorded after pulled bytes are in place, or after the remote has flushed what was pushed. Calls
/// are short and synchronous: they go to the page cache, which a killed process leaves behind whole.
#[async_trait]
pub trait StateRecord: Send + Sync + 'static {
    /// Gives every run of blocks that is present to `visit`, with its state, in ascending order. After a loss of power a
    /// block may be missing that was clean, and one may be dirty that was not; the other way round never.
    ///
    /// # Errors
    /// `Corrupt` if the table cannot be trusted.
    fn load(&self, visit: &mut dyn FnMut(Range<u64>, Recorded)) -> Result<()>;

    /// Remembers the state of a run of blocks (block indices, not bytes).
    ///
    /// # Errors
    /// When it could not be recorded; the caller must then not go on as if it had been.
    fn record(&self, blocks: Range<u64>, state: Recorded) -> Result<()>;

    /// Has a run of blocks be absent: what is in place there no longer counts. Not for blocks that are dirty, of which it
    /// was promised that they are not lost: a loss of power may bring back what a checkpoint has promised.
    ///
    /// # Errors
    /// When it could not be recorded; the caller must then not go on as if it had been.
    fn forget(&self, blocks: Range<u64>) -> Result<()>;

    /// Makes the bytes that were put in place and then everything recorded durable, in that order.
    ///
    /// # Errors
    /// As [`r3map_core::Backend::flush`].
    async fn checkpoint(&self) -> Result<()>;
}
