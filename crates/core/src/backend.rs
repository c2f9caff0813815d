//! The one contract that everything implements: a region of bytes somewhere.
//!
//! A backend is where bytes rest; a stage is a backend that wraps another and adds one behaviour; a frontend shows one
//! to an application. `testing/testkit` has the conformance suite that holds each of them to the words below.

use std::ops::Range;

use async_trait::async_trait;

use crate::{ChunkSize, Error, ErrorKind, Operation, Result};

/// A region of bytes of a fixed size.
///
/// All calls may run at once from many tasks; calls that do not overlap never disturb one another. Two writes that
/// overlap leave one or the other (or a mixture, block by block), as on a disk. Dropping a call's future at any await
/// point loses no state and leaves no lock held; what it was about to write is then undefined in its range only, and
/// never lands after a later write to the same range has returned.
///
/// A request of no bytes at a place where a longer one could begin or end succeeds and does nothing.
///
/// Each call boxes its future: the one allocation per request that keeps the trait object-safe. Requests are chunks
/// and runs of chunks, never single bytes, so that it does not show.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The region's size in bytes: at least one, and the same for as long as the backend lives.
    fn size(&self) -> u64;

    /// What this backend can and cannot do, beyond reading and writing at any offset. Cheap; asked for often.
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }

    /// Fills the whole of `buf` from `offset`, or fails. What was never written reads as zeros; what was written and
    /// is gone is an error, never zeros. After an error the contents of `buf` are undefined.
    ///
    /// # Errors
    /// `InvalidInput` past the end of the region or against [`Access`] and [`Capabilities::max_request`]; `Corrupt` for
    /// a short read or bytes that are not what was written; `Unavailable` when it may work later.
    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf` at `offset`, or fails. When it has returned, every later read sees the bytes. After an error
    /// the range is undefined, but nothing outside it has changed.
    ///
    /// # Errors
    /// As [`Self::read_at`], and `Denied` for a read-only backend, `Exhausted` when there is no room.
    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()>;

    /// Returns when everything whose `write_at` had returned before this call is as durable as this backend can make
    /// it.
    ///
    /// # Errors
    /// When anything of that may not be durable. The same data is flushed again by the next call.
    async fn flush(&self) -> Result<()>;
}

/// Which requests a backend takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Any offset and length inside the region.
    #[default]
    Any,
    /// Only runs of whole chunks of this size, starting at a multiple of it (the region's last chunk may be shorter).
    WholeChunks(ChunkSize),
}

/// What a backend declares beyond reading and writing. Optional abilities are handles to ask with, so that no method
/// exists only to fail.
#[derive(Clone, Copy, Default)]
pub struct Capabilities<'a> {
    /// Writing, trimming and zeroing answer `Denied`.
    pub read_only: bool,
    /// Which requests it takes.
    pub access: Access,
    /// The longest single request in bytes, if there is a limit. At least one chunk where [`Access::WholeChunks`].
    pub max_request: Option<u64>,
    /// The chunk size that suits it best, where it has one (a remote that was configured with it, a chunk store).
    pub preferred_chunk: Option<ChunkSize>,
    /// What stays the same for as long as the region's bytes live, and differs for every other region, where that is
    /// known: a copy that outlives its user is of the same region only if this is the same.
    pub identity: Option<&'a [u8]>,
    /// Lends its bytes instead of copying them, and knows which are zeros.
    pub pieces: Option<&'a dyn ReadPieces>,
    /// Several reads in one round trip.
    pub read_many: Option<&'a dyn ReadMany>,
    /// Releases storage.
    pub trim: Option<&'a dyn Trim>,
    /// Writes zeros without sending them.
    pub write_zeroes: Option<&'a dyn WriteZeroes>,
    /// Knows which ranges hold data.
    pub extents: Option<&'a dyn Extents>,
    /// Tells whether bytes move between it and where its bytes rest, where that is elsewhere.
    pub activity: Option<&'a dyn Activity>,
}

/// Some bytes of a region, as [`ReadPieces`] lends them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// This many zeros.
    Zeroes(u64),
}

impl<'a> Piece<'a> {
    /// What of this piece, which is at `offset`, lies in `range`, and where; if anything.
    #[must_use]
    pub fn cut(self, offset: u64, range: &Range<u64>) -> Option<(u64, Piece<'a>)> {
        let both = offset.max(range.start)..offset.saturating_add(self.len()).min(range.end);
        if both.is_empty() {
            return None;
        }
        let piece = match self {
            Self::Data(bytes) => {
                let at = |end: u64| usize::try_from(end - offset).expect("it lies in a slice");
                Self::Data(&bytes[at(both.start)..at(both.end)])
            }
            Self::Zeroes(_) => Self::Zeroes(both.end - both.start),
        };
        Some((both.start, piece))
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zeroes(len) => *len,
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Reading without a copy: the bytes are lent to a visitor piece by piece.
#[async_trait]
pub trait ReadPieces: Send + Sync {
    /// Lends `len` bytes at `offset` to `visit` as consecutive pieces, each with its offset in the region, in ascending
    /// order and without gaps. Only bytes that are known to be good are lent. Stops at the first error.
    ///
    /// `visit` may run under the backend's locks: it must be short, and must not call the backend.
    ///
    /// # Errors
    /// As [`Backend::read_at`], and whatever `visit` returns.
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()>;
}

/// One read of several.
#[derive(Debug)]
pub struct ReadOp<'a> {
    /// Where to read.
    pub offset: u64,
    /// What to fill.
    pub buf: &'a mut [u8],
}

/// Several reads in one round trip, for remotes where a request costs more than its bytes.
#[async_trait]
pub trait ReadMany: Send + Sync {
    /// Does all of the reads, or fails; each as [`Backend::read_at`].
    ///
    /// # Errors
    /// As [`Backend::read_at`]; all buffers are undefined then.
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()>;
}

/// Releasing storage.
#[async_trait]
pub trait Trim: Send + Sync {
    /// Releases the storage of `len` bytes at `offset` as far as this backend can; they read as zeros afterwards. Takes
    /// any range, whatever [`Capabilities::access`] says.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    async fn trim(&self, offset: u64, len: u64) -> Result<()>;
}

/// Writing zeros without sending them.
#[async_trait]
pub trait WriteZeroes: Send + Sync {
    /// Makes `len` bytes at `offset` read as zeros; faster than writing them. Takes any range, whatever
    /// [`Capabilities::access`] says.
    ///
    /// # Errors
    /// As [`Backend::write_at`].
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()>;
}

/// What a range holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that may be anything.
    Data,
    /// Nothing is stored here; it reads as zeros.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the region.
    pub range: Range<u64>,
    /// What they are.
    pub kind: ExtentKind,
}

/// Knowing which ranges hold data.
#[async_trait]
pub trait Extents: Send + Sync {
    /// The extents of `len` bytes at `offset`, consecutive and without gaps, cut to that range. It may answer for a
    /// shorter range, but for at least one byte; ask again from there.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>>;
}

/// Telling a slow line from a dead one: whether a call takes too long depends on whether anything moves meanwhile.
pub trait Activity: Send + Sync {
    /// How many bytes have moved so far, for all calls together: those that were received, and those that the other side
    /// is known to have received. Only differences mean something. Cheap enough to be asked ten times a second.
    fn moved(&self) -> u64;
}

/// Checks that `len` bytes at `offset` lie inside a region of `size` bytes.
///
/// # Errors
/// `InvalidInput` if they do not, naming the operation and the range.
pub fn check_range(operation: Operation, size: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            operation,
            format!("past the end of the region, which has {size} bytes"),
        )
        .at(offset, len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_cut_to_a_range() {
        let bytes = [0, 1, 2, 3, 4];
        let (data, zeros) = (Piece::Data(&bytes), Piece::Zeroes(5));
        for (range, cut) in [
            (0..100, Some((10, 0..5))),
            (11..13, Some((11, 1..3))),
            (0..11, Some((10, 0..1))),
            (14..99, Some((14, 4..5))),
        ] {
            let expected = cut.map(|(at, part): (u64, Range<usize>)| (at, Piece::Data(&bytes[part])));
            assert_eq!(data.cut(10, &range), expected, "{range:?}");
            let lengths = expected.map(|(at, piece)| (at, Piece::Zeroes(piece.len())));
            assert_eq!(zeros.cut(10, &range), lengths, "{range:?}");
        }
        for range in [0..10, 15..20, 12..12] {
            assert_eq!((data.cut(10, &range), zeros.cut(10, &range)), (None, None), "{range:?}");
        }
    }

    #[test]
    fn the_end_is_the_end() {
        assert!(check_range(Operation::Read, 10, 10, 0).is_ok());
        for (offset, len) in [(10, 1), (11, 0), (0, 11), (u64::MAX, 1)] {
            let error = check_range(Operation::Read, 10, offset, len).unwrap_err();
            assert_eq!((error.kind(), error.range()), (ErrorKind::InvalidInput, Some((offset, len))));
        }
    }
}
