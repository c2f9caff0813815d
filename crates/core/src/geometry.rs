//! How a region is cut: all arithmetic on chunks and blocks, and nothing else.
//!
//! Nobody else divides by a chunk size. A region has any size from one byte on; its last chunk and its last block may
//! be shorter than the others.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;

use crate::{Error, ErrorKind, Operation, Result};

/// The unit of tracking in bytes: one page. Whether bytes are present and whether they were changed is kept per block.
pub const BLOCK_SIZE: u64 = 4096;

/// The largest region in bytes: 1 EiB. Offsets in it fit a signed 64-bit file offset with room to round up.
pub const MAX_REGION_SIZE: u64 = 1 << 60;

/// The size of a chunk in bytes, the unit of transfer: a power of two from 4 KiB to 64 MiB. The default is 64 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkSize(u32);

#[expect(clippy::len_without_is_empty, reason = "a chunk size is never zero")]
impl ChunkSize {
    /// The smallest chunk: one block.
    pub const MIN: Self = Self(4 << 10);
    /// The largest chunk.
    pub const MAX: Self = Self(64 << 20);
    /// What is used when nothing else was asked for: 64 KiB.
    pub const DEFAULT: Self = Self(64 << 10);

    /// A chunk size of `bytes`.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a power of two between [`Self::MIN`] and [`Self::MAX`].
    pub fn new(bytes: u64) -> Result<Self> {
        match u32::try_from(bytes) {
            Ok(small) if small.is_power_of_two() && (Self::MIN.0..=Self::MAX.0).contains(&small) => Ok(Self(small)),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                Operation::Open,
                format!(
                    "chunk size {bytes} is not a power of two between 4 KiB and 64 MiB; write it like 64KiB, which is 65536"
                ),
            )),
        }
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// In bytes, as a length of something in memory.
    #[must_use]
    pub fn len(self) -> usize {
        self.0 as usize
    }

    /// Blocks in one whole chunk.
    #[must_use]
    pub fn blocks(self) -> u64 {
        self.bytes() / BLOCK_SIZE
    }

    /// The last chunk border at or before `offset`; of a length, as much of it as whole chunks make up.
    #[must_use]
    pub fn round_down(self, offset: u64) -> u64 {
        offset - offset % self.bytes()
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl fmt::Debug for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 => write!(f, "{}MiB", bytes >> 20),
            bytes => write!(f, "{}KiB", bytes >> 10),
        }
    }
}

/// A region's size and how it is cut into chunks and blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    size: NonZeroU64,
    chunk: ChunkSize,
}

impl Geometry {
    /// A region of `size` bytes in chunks of `chunk`.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or above [`MAX_REGION_SIZE`].
    pub fn new(size: u64, chunk: ChunkSize) -> Result<Self> {
        match NonZeroU64::new(size) {
            Some(size) if size.get() <= MAX_REGION_SIZE => Ok(Self { size, chunk }),
            Some(_) => Err(Error::new(
                ErrorKind::InvalidInput,
                Operation::Open,
                format!("size {size} is above the largest region, 1 EiB ({MAX_REGION_SIZE} bytes)"),
            )),
            None => Err(Error::new(ErrorKind::InvalidInput, Operation::Open, "a region has at least one byte")),
        }
    }

    /// The region's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// The chunk size.
    #[must_use]
    pub fn chunk_size(&self) -> ChunkSize {
        self.chunk
    }

    /// How many chunks there are, the last and maybe shorter one included.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.size().div_ceil(self.chunk.bytes())
    }

    /// How many blocks there are, the last and maybe shorter one included.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.size().div_ceil(BLOCK_SIZE)
    }

    /// The chunk that holds the byte at `offset`. Meaningful only for offsets inside the region.
    #[must_use]
    pub fn chunk_at(&self, offset: u64) -> u64 {
        offset / self.chunk.bytes()
    }

    /// The bytes of chunk `index`, cut at the end of the region; empty past it.
    #[must_use]
    pub fn chunk_range(&self, index: u64) -> Range<u64> {
        self.unit_range(index, self.chunk.bytes())
    }

    /// The bytes of block `index`, cut at the end of the region; empty past it.
    #[must_use]
    pub fn block_range(&self, index: u64) -> Range<u64> {
        self.unit_range(index, BLOCK_SIZE)
    }

    /// The bytes of a run of blocks, cut at the end of the region.
    #[must_use]
    pub fn blocks_range(&self, blocks: &Range<u64>) -> Range<u64> {
        self.block_range(blocks.start).start..self.block_range(blocks.end).start
    }

    /// The bytes of a run of chunks, cut at the end of the region.
    #[must_use]
    pub fn chunks_range(&self, chunks: &Range<u64>) -> Range<u64> {
        self.chunk_range(chunks.start).start..self.chunk_range(chunks.end).start
    }

    /// The chunks that a range of bytes touches; none for an empty range.
    #[must_use]
    pub fn chunks_touched(&self, bytes: &Range<u64>) -> Range<u64> {
        touched(bytes, self.chunk.bytes())
    }

    /// The blocks that a range of bytes touches; none for an empty range.
    #[must_use]
    pub fn blocks_touched(&self, bytes: &Range<u64>) -> Range<u64> {
        touched(bytes, BLOCK_SIZE)
    }

    /// The blocks that a range of bytes covers whole. The region's last, shorter block counts as covered when the range
    /// reaches its start and the region's end.
    #[must_use]
    pub fn blocks_covered(&self, bytes: &Range<u64>) -> Range<u64> {
        self.covered(bytes, BLOCK_SIZE)
    }

    /// The chunks that a range of bytes covers whole, like [`Self::blocks_covered`].
    #[must_use]
    pub fn chunks_covered(&self, bytes: &Range<u64>) -> Range<u64> {
        self.covered(bytes, self.chunk.bytes())
    }

    /// The blocks of chunk `index`, the last and maybe shorter one included.
    #[must_use]
    pub fn blocks_of_chunk(&self, index: u64) -> Range<u64> {
        self.blocks_touched(&self.chunk_range(index))
    }

    /// Cuts a range of bytes at chunk borders: `(chunk, bytes)` in ascending order.
    pub fn split(&self, bytes: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let geometry = *self;
        self.chunks_touched(&bytes).map(move |index| {
            let chunk = geometry.chunk_range(index);
            (index, chunk.start.max(bytes.start)..chunk.end.min(bytes.end))
        })
    }

    /// Whether a range starts and ends at chunk borders (the region's end is one) and is not empty.
    #[must_use]
    pub fn is_whole_chunks(&self, bytes: &Range<u64>) -> bool {
        let chunk = self.chunk.bytes();
        bytes.start < bytes.end
            && bytes.end <= self.size()
            && bytes.start.is_multiple_of(chunk)
            && (bytes.end.is_multiple_of(chunk) || bytes.end == self.size())
    }

    fn unit_range(&self, index: u64, unit: u64) -> Range<u64> {
        let start = index.saturating_mul(unit).min(self.size());
        start..start.saturating_add(unit).min(self.size())
    }

    fn covered(&self, bytes: &Range<u64>, unit: u64) -> Range<u64> {
        let start = bytes.start.div_ceil(unit);
        let end = if bytes.end >= self.size() { self.size().div_ceil(unit) } else { bytes.end / unit };
        start..end.max(start)
    }
}

fn touched(bytes: &Range<u64>, unit: u64) -> Range<u64> {
    if bytes.start >= bytes.end {
        return bytes.start / unit..bytes.start / unit;
    }
    bytes.start / unit..bytes.end.div_ceil(unit)
}

/// Whether every byte is zero. Runs at memory speed: it compares the bytes with themselves, shifted by one.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn geometry(size: u64, chunk: u64) -> Geometry {
        Geometry::new(size, ChunkSize::new(chunk).unwrap()).unwrap()
    }

    #[test]
    fn refuses_what_is_no_chunk_size_and_no_region() {
        for bytes in [0, 1, 2048, 4095, 4097, 12288, 128 << 20, 1 << 32, u64::MAX] {
            assert_eq!(ChunkSize::new(bytes).unwrap_err().kind(), ErrorKind::InvalidInput, "{bytes}");
        }
        assert!(Geometry::new(0, ChunkSize::DEFAULT).is_err());
        assert!(Geometry::new(MAX_REGION_SIZE + 1, ChunkSize::DEFAULT).is_err());
        assert!(Geometry::new(MAX_REGION_SIZE, ChunkSize::DEFAULT).is_ok());
    }

    #[test]
    fn zero_means_every_byte() {
        assert!(is_zero(&[]));
        for len in [1, 2, 7, 8, 9, 4096, 4097] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in [0, len / 2, len - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn rounds_down_to_a_border() {
        let chunk = ChunkSize::new(8192).unwrap();
        let cases = [(0, 0), (8191, 0), (8192, 8192), (20_000, 16384), (u64::MAX, u64::MAX - 8191)];
        cases.into_iter().for_each(|(offset, border)| assert_eq!(chunk.round_down(offset), border));
    }

    fn any_geometry() -> impl Strategy<Value = Geometry> {
        (1u64..2_000_000, 12u32..18).prop_map(|(size, shift)| geometry(size, 1 << shift))
    }

    proptest! {
        #[test]
        fn chunks_tile_the_region(g in any_geometry()) {
            let mut at = 0;
            for index in 0..g.chunk_count() {
                let range = g.chunk_range(index);
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > range.start);
                prop_assert_eq!(g.chunk_at(range.start), index);
                prop_assert_eq!(g.chunk_at(range.end - 1), index);
                prop_assert!(g.is_whole_chunks(&range));
                at = range.end;
            }
            prop_assert_eq!(at, g.size());
            prop_assert!(g.chunk_range(g.chunk_count()).is_empty());
        }

        #[test]
        fn blocks_tile_each_chunk(g in any_geometry()) {
            let mut at = 0;
            for index in 0..g.chunk_count() {
                for block in g.blocks_of_chunk(index) {
                    let range = g.block_range(block);
                    prop_assert_eq!(range.start, at);
                    at = range.end;
                }
                prop_assert_eq!(at, g.chunk_range(index).end);
            }
            prop_assert_eq!(g.block_count(), g.blocks_touched(&(0..g.size())).end);
        }

        #[test]
        fn split_gives_the_range_back(g in any_geometry(), a in 0u64..2_000_000, b in 0u64..2_000_000) {
            let (a, b) = (a % (g.size() + 1), b % (g.size() + 1));
            let bytes = a.min(b)..a.max(b);
            let mut at = bytes.start;
            for (index, part) in g.split(bytes.clone()) {
                prop_assert_eq!(part.start, at);
                prop_assert!(part.end > part.start);
                let chunk = g.chunk_range(index);
                prop_assert!(chunk.start <= part.start && part.end <= chunk.end);
                at = part.end;
            }
            prop_assert_eq!(at, if bytes.is_empty() { bytes.start } else { bytes.end });
        }

        #[test]
        fn covered_blocks_are_those_inside(g in any_geometry(), a in 0u64..2_000_000, b in 0u64..2_000_000) {
            let (a, b) = (a % (g.size() + 1), b % (g.size() + 1));
            let bytes = a.min(b)..a.max(b);
            let covered = g.blocks_covered(&bytes);
            for block in g.blocks_touched(&bytes) {
                let range = g.block_range(block);
                let inside = bytes.start <= range.start && range.end <= bytes.end;
                prop_assert_eq!(inside, covered.contains(&block));
            }
        }
    }
}
