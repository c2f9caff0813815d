//! Ordinary private memory that costs nothing before it is written, and can be given back in parts. Nobody is told of
//! its page faults; memory that this process fills itself is [`crate::Mapping`].

use std::io;
use std::ops::Range;

use crate::mapping::Protection;
use crate::span::Span;

/// Where huge pages begin: a multiple of their size on x86-64, and on others with pages of 4 KiB.
const HUGE: usize = 2 << 20;

/// What memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Pages of the usual size, whatever the system's default: what is not written takes no memory.
    Small,
    /// Huge pages (2 MiB) where the system has them and lets programs ask for them: many times faster to fill for the
    /// first time, and faster to read, but the first byte that is written takes all of one.
    Huge,
}

/// Bytes that are zero until they are written. A page takes memory from its first write on.
///
/// A `fork`ed child does not have the memory: its accesses are segmentation faults, never zeros.
#[derive(Debug)]
pub struct Zeroed {
    span: Span,
    len: usize,
}

impl Zeroed {
    /// `len` bytes, at least one.
    ///
    /// # Errors
    /// `OutOfMemory` when there are no addresses left, `InvalidInput` if `len` is zero or cannot be one.
    pub fn new(len: usize, pages: Pages) -> io::Result<Self> {
        let span = match pages {
            Pages::Small => Span::new(len as u64)?,
            Pages::Huge => Span::aligned(len as u64, HUGE)?,
        };
        span.allow(Protection::Tracked)?;
        if pages == Pages::Huge {
            span.prefer_huge();
        }
        Ok(Self { span, len })
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the span has at least this many bytes, readable for as long as it lives, which `self` holds; whoever
        // changes one borrows `self` exclusively.
        unsafe { std::slice::from_raw_parts(self.span.base().as_ptr(), self.len) }
    }

    /// The bytes, to change.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above and writable, and `self` is borrowed exclusively, so that this is the only view.
        unsafe { std::slice::from_raw_parts_mut(self.span.base().as_ptr(), self.len) }
    }

    /// Makes a range zero again and gives its memory back to the system: all of it if the range starts and ends at a
    /// border of (small) pages, or ends with the memory; the kernel may be late with parts of huge pages. What the
    /// system does not take back is filled with zeros.
    ///
    /// # Panics
    /// If the range is not inside, as slices do.
    pub fn release(&mut self, range: Range<usize>) {
        let (start, len) = (range.start as u64, range.len() as u64);
        if self.as_slice()[range.clone()].is_empty() {
            return;
        }
        // Bytes past the end belong to nobody, so the last page goes whole.
        let end = if range.end == self.len { self.span.len() } else { start + len };
        let whole = start.is_multiple_of(self.page()) && end.is_multiple_of(self.page());
        // SAFETY: this memory is borrowed exclusively, so that nobody goes on seeing what the pages hold.
        if !whole || unsafe { self.span.discard(start, end - start) }.is_err() {
            self.as_mut_slice()[range].fill(0);
        }
    }

    fn page(&self) -> u64 {
        rustix::param::page_size() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    const PAGE: usize = PAGE_SIZE as usize;

    /// How many pages of it take memory.
    fn pages(memory: &Zeroed) -> usize {
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; memory.span.len() as usize / PAGE * 8];
        let start = memory.span.address() / PAGE_SIZE * 8;
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, start).unwrap();
        // Bit 63, and not a page that others have too: bit 56 says that it is nobody else's (pagemap.rst).
        entries.chunks(8).filter(|entry| entry[7] & 0x81 == 0x81).count()
    }

    #[test]
    fn costs_what_was_written_and_gives_it_back() {
        let mut memory = Zeroed::new(1000 * PAGE + 1, Pages::Small).unwrap();
        assert!(memory.as_slice().iter().all(|byte| *byte == 0));
        assert_eq!((memory.as_slice().len(), pages(&memory)), (1000 * PAGE + 1, 0));
        memory.as_mut_slice()[500 * PAGE..502 * PAGE].fill(7);
        memory.as_mut_slice()[1000 * PAGE] = 8;
        assert_eq!(pages(&memory), 3);
        memory.release(500 * PAGE..501 * PAGE);
        memory.release(1000 * PAGE..1000 * PAGE + 1);
        assert_eq!(pages(&memory), 1);
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>();
        assert_eq!(sum(memory.as_slice()), 7 * PAGE);
        assert_eq!(sum(&memory.as_slice()[501 * PAGE..502 * PAGE]), 7 * PAGE);
    }

    #[test]
    fn parts_of_pages_are_cleared() {
        for pages in [Pages::Small, Pages::Huge] {
            let mut memory = Zeroed::new(3 * PAGE, pages).unwrap();
            memory.as_mut_slice().fill(1);
            memory.release(1..1);
            memory.release(PAGE - 1..2 * PAGE + 1);
            let zeros = memory.as_slice().iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at);
            assert!(zeros.eq(PAGE - 1..2 * PAGE + 1));
        }
    }

    #[test]
    fn huge_pages_are_whole_where_there_are_any() {
        let all: Vec<_> = (0..4).map(|_| Zeroed::new(2 * HUGE, Pages::Huge).unwrap()).collect();
        for mut memory in all {
            assert_eq!(memory.as_slice().as_ptr() as usize % HUGE, 0);
            memory.as_mut_slice()[HUGE + 1] = 1;
            // One small page where the kernel has no huge ones, or has none left.
            assert!([1, HUGE / PAGE].contains(&pages(&memory)));
            memory.release(0..2 * HUGE);
            assert!(pages(&memory) == 0 && memory.as_slice().iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn nothing_outside_is_released() {
        Zeroed::new(PAGE - 1, Pages::Small).unwrap().release(0..PAGE);
    }

    #[test]
    fn no_bytes_and_too_many_are_refused() {
        assert_eq!(Zeroed::new(0, Pages::Huge).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Zeroed::new(1 << 60, Pages::Small).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
    }
}
