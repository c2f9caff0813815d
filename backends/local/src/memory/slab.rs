//! A run of the region's bytes in one piece, and which pages of it hold any. It has no locks.

use std::ops::Range;

use r3map_core::{ChunkSize, Error, ErrorKind, Geometry, Operation, Result, is_zero};
use r3map_sys::{Pages, Zeroed, stream_copy};

/// The bytes of a whole slab: as long as the longest request that frontends make, twice, so that most of them find
/// their bytes in one piece.
pub(super) const SIZE: u64 = 2 << 20;
/// What is known to hold data or not.
pub(super) const PAGE: ChunkSize = ChunkSize::DEFAULT;
/// From how many bytes on a write passes the processor's caches by: whoever writes so much at once is filling the region, and
/// what is read next is seldom the end of it.
const MANY: usize = 256 << 10;

/// Bytes in [pages](PAGE). Pages that were not written, or were trimmed, are empty: they are zeros.
pub(super) struct Slab {
    /// Cut into pages: here a chunk is a page. There are at most 32.
    pages: Geometry,
    bytes: Zeroed,
    /// A bit for each page that holds data, the first page's lowest.
    data: u32,
    made_of: Pages,
}

impl Slab {
    /// An empty slab of `len` bytes, at most [`SIZE`]. Made of huge pages, its empty pages take memory too.
    pub(super) fn new(len: u64, made_of: Pages) -> Result<Self> {
        debug_assert!(len <= SIZE);
        let pages = Geometry::new(len, PAGE)?;
        let bytes = Zeroed::new(length(len), made_of).map_err(|error| {
            Error::new(ErrorKind::Exhausted, Operation::Write, "no memory left for the region").with_source(error)
        })?;
        Ok(Self { pages, bytes, data: 0, made_of })
    }

    /// All bytes; those of empty pages are zeros.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Whether no page holds data.
    pub(super) fn is_empty(&self) -> bool {
        self.data == 0
    }

    /// What it takes.
    pub(super) fn usage(&self) -> Usage {
        let data = i64::from(self.data.count_ones());
        let all = if self.made_of == Pages::Huge { self.pages.chunk_count().cast_signed() } else { data };
        Usage { data, spare: all - data }
    }

    /// Writes at an offset. Zeros that fall on an empty page leave it empty.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let copy = if bytes.len() < MANY { <[u8]>::copy_from_slice } else { stream_copy };
        let mut rest = bytes;
        for (page, range) in self.pages.split(offset..offset + bytes.len() as u64) {
            let part;
            (part, rest) = rest.split_at(length(range.end - range.start));
            if self.has(page) || !is_zero(part) {
                copy(&mut self.bytes.as_mut_slice()[slice(&range)], part);
                self.data |= 1 << page;
            }
        }
    }

    /// Empties the pages that lie in a range, which gives their memory back, and clears what else does.
    pub(super) fn trim(&mut self, range: Range<u64>) {
        let whole = self.pages.chunks_covered(&range);
        self.bytes.release(slice(&self.pages.chunks_range(&whole)));
        whole.for_each(|page| self.data &= !(1 << page));
        for (page, part) in self.pages.split(range) {
            if self.has(page) {
                self.bytes.as_mut_slice()[slice(&part)].fill(0);
            }
        }
    }

    /// The first byte from `offset` on whose page holds data.
    pub(super) fn next_data(&self, offset: u64) -> Option<u64> {
        self.next(offset, self.data)
    }

    /// The first byte from `offset` on whose page is empty.
    pub(super) fn next_hole(&self, offset: u64) -> Option<u64> {
        self.next(offset, !self.data)
    }

    fn next(&self, offset: u64, pages: u32) -> Option<u64> {
        let first = self.pages.chunk_at(offset);
        let skip = pages.checked_shr(u32::try_from(first).ok()?)?.trailing_zeros();
        let found = offset.max(self.pages.chunk_range(first + u64::from(skip)).start);
        (found < self.pages.size()).then_some(found)
    }

    fn has(&self, page: u64) -> bool {
        self.data >> page & 1 == 1
    }
}

/// Pages that take memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    /// Those that hold data.
    pub(super) data: i64,
    /// Empty ones that are part of a huge page.
    pub(super) spare: i64,
}

/// A length or an offset of what is in memory.
pub(super) fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// A range of what is in memory.
pub(super) fn slice(range: &Range<u64>) -> Range<usize> {
    length(range.start)..length(range.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 64 << 10;

    #[test]
    fn knows_which_pages_hold_data() {
        let mut slab = Slab::new(SIZE, Pages::Small).unwrap();
        assert_eq!((slab.next_data(0), slab.next_hole(0), slab.is_empty()), (None, Some(0), true));
        slab.write(PAGE - 1, &[1, 2]);
        slab.write(31 * PAGE + 5, &[3]);
        assert_eq!((slab.next_data(0), slab.next_data(7)), (Some(0), Some(7)));
        assert_eq!((slab.next_hole(7), slab.next_hole(3 * PAGE + 1)), (Some(2 * PAGE), Some(3 * PAGE + 1)));
        assert_eq!((slab.next_data(2 * PAGE + 1), slab.next_data(SIZE - 1)), (Some(31 * PAGE), Some(SIZE - 1)));
        assert_eq!((slab.next_hole(31 * PAGE), slab.next_data(SIZE)), (None, None));
        slab.trim(1..2 * PAGE);
        assert_eq!(
            (slab.next_data(0), slab.next_hole(0), slab.next_data(PAGE)),
            (Some(0), Some(PAGE), Some(31 * PAGE))
        );
        assert!(is_zero(&slab.bytes()[..slice(&(0..31 * PAGE)).end]));
        slab.trim(0..SIZE);
        assert!(slab.is_empty() && is_zero(slab.bytes()));
    }

    #[test]
    fn long_writes_are_whole() {
        let mut slab = Slab::new(SIZE, Pages::Huge).unwrap();
        let bytes: Vec<u8> = (1..=251).cycle().take(MANY + 100).collect();
        for offset in [0, 1, 17, 63, 64, 4096, PAGE - 1] {
            slab.write(offset, &vec![255; bytes.len() + 1]);
            slab.write(offset, &bytes);
            let start = length(offset);
            assert!(slab.bytes()[start..start + bytes.len()] == bytes, "{offset}");
            assert_eq!(slab.bytes()[start + bytes.len()], 255, "{offset}");
        }
    }

    #[test]
    fn a_short_one_ends_where_it_ends() {
        let mut slab = Slab::new(PAGE + 9, Pages::Small).unwrap();
        slab.write(0, &vec![1; 65536 + 9]);
        assert_eq!(
            (slab.next_hole(0), slab.next_data(PAGE + 8), slab.bytes().len()),
            (None, Some(PAGE + 8), 65536 + 9)
        );
        slab.trim(PAGE..PAGE + 9);
        assert_eq!((slab.next_hole(0), slab.next_data(PAGE)), (Some(PAGE), None));
        slab.trim(1..PAGE);
        assert!(!slab.is_empty());
        assert_eq!(slab.bytes()[..2], [1, 0]);
    }

    #[test]
    fn zeros_do_not_fill_empty_pages() {
        let mut slab = Slab::new(3 * PAGE, Pages::Huge).unwrap();
        let mut bytes = vec![0; 3 << 16];
        slab.write(0, &bytes);
        assert!(slab.is_empty());
        bytes[0x1_8000] = 1;
        slab.write(0, &bytes);
        assert_eq!((slab.next_data(0), slab.next_hole(PAGE)), (Some(PAGE), Some(2 * PAGE)));
        slab.write(0, &[0; 3 << 16]);
        assert!(!slab.is_empty() && is_zero(slab.bytes()));
        assert_eq!(slab.usage(), Usage { data: 1, spare: 2 });
    }
}
