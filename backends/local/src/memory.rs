//! A region in this process's memory, allocated as it is written.
//!
//! Bytes rest in pages of 64 KiB, each behind its own lock, under a tree of tables that are allocated when something
//! below them is: an empty region of any size costs next to nothing, and calls on different pages share no lock. What
//! was never written, was trimmed, or was only ever zeros has no page. Nothing survives the process.

use std::ops::Range;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Extents, Geometry, Operation, Piece,
    ReadPieces, Result, Trim, WriteZeroes, check_range, is_zero,
};

/// log2 of the pages in a leaf table: 4096 pages, 256 MiB of the region, in about 130 KiB of bookkeeping.
const LEAF_BITS: u32 = 12;
/// log2 of the leaf tables in an inner table: 65536 leaves, 16 TiB.
const INNER_BITS: u32 = 16;
/// Pages that one call for extents looks at before it answers for a shorter range: 4 GiB.
const EXTENT_PAGES: u64 = 1 << 16;

type Page = Option<Box<[u8]>>;
type Leaf = Box<[RwLock<Page>]>;
type Inner = Box<[OnceLock<Leaf>]>;

/// A sparse region in memory. Not written: reads as zeros and costs nothing. `flush` has nothing to do.
pub struct Memory {
    /// Cut into pages: here a chunk is a page.
    pages: Geometry,
    top: Box<[OnceLock<Inner>]>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("size", &self.pages.size()).finish_non_exhaustive()
    }
}

impl Memory {
    /// An empty region of `size` bytes, at once: nothing in proportion to the size is allocated.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or above [`r3map_core::MAX_REGION_SIZE`].
    pub fn new(size: u64) -> Result<Self> {
        let pages = Geometry::new(size, ChunkSize::DEFAULT)?;
        let top = table(pages.chunk_count(), 0, LEAF_BITS + INNER_BITS, pages.chunk_count());
        Ok(Self { pages, top })
    }

    /// [`Backend::read_at`], which never waits for anything here.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(Operation::Read, self.pages.size(), offset, buf.len() as u64)?;
        let mut rest = buf;
        for (index, range) in self.pages.split(offset..offset + rest.len() as u64) {
            let part;
            (part, rest) = rest.split_at_mut(length(&range));
            let page = self.slot(index).map(read);
            match page.as_ref().and_then(|page| page.as_deref()) {
                Some(bytes) => part.copy_from_slice(&bytes[self.within(index, &range)]),
                None => part.fill(0),
            }
        }
        Ok(())
    }

    /// [`Backend::write_at`], which never waits for anything here. Zeros that fall where nothing was written allocate
    /// nothing.
    ///
    /// # Errors
    /// As [`Backend::write_at`]; `Exhausted` when the process gets no more memory.
    pub fn write_now(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(Operation::Write, self.pages.size(), offset, buf.len() as u64)?;
        let mut rest = buf;
        for (index, range) in self.pages.split(offset..offset + rest.len() as u64) {
            let part;
            (part, rest) = rest.split_at(length(&range));
            self.write_page(index, self.within(index, &range), part)
                .map_err(|error| error.at(offset, buf.len() as u64))?;
        }
        Ok(())
    }

    /// [`Trim::trim`], which never waits for anything here: frees whole pages and clears the rest.
    ///
    /// # Errors
    /// As [`Trim::trim`].
    pub fn trim_now(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::Trim, self.pages.size(), offset, len)?;
        let end = offset + len;
        let mut from = self.pages.chunk_at(offset);
        while let Some(index) = self.next_allocated(from, end) {
            let page = self.pages.chunk_range(index);
            self.clear_page(index, self.within(index, &(page.start.max(offset)..page.end.min(end))));
            from = index + 1;
        }
        Ok(())
    }

    fn write_page(&self, index: u64, within: Range<usize>, bytes: &[u8]) -> Result<()> {
        if self.slot(index).is_none() && is_zero(bytes) {
            return Ok(());
        }
        let mut page = write(self.slot_or_table(index));
        match page.as_deref_mut() {
            Some(page) => page[within].copy_from_slice(bytes),
            None if is_zero(bytes) => {}
            None => *page = Some(new_page(length(&self.pages.chunk_range(index)), within, bytes)?),
        }
        Ok(())
    }

    fn clear_page(&self, index: u64, within: Range<usize>) {
        let Some(slot) = self.slot(index) else { return };
        let mut page = write(slot);
        match page.as_deref_mut() {
            Some(bytes) if within.len() < bytes.len() => bytes[within].fill(0),
            _ => *page = None,
        }
    }

    /// The part of page `index` that `range`, which lies inside it, is.
    fn within(&self, index: u64, range: &Range<u64>) -> Range<usize> {
        let start = length(&(self.pages.chunk_range(index).start..range.start));
        start..start + length(range)
    }

    fn leaf(&self, index: u64) -> Option<&Leaf> {
        let inner = self.top[place(index, LEAF_BITS + INNER_BITS, u64::MAX)].get()?;
        inner[place(index, LEAF_BITS, (1 << INNER_BITS) - 1)].get()
    }

    fn slot(&self, index: u64) -> Option<&RwLock<Page>> {
        Some(&self.leaf(index)?[place(index, 0, (1 << LEAF_BITS) - 1)])
    }

    /// The same, after allocating the tables above it.
    fn slot_or_table(&self, index: u64) -> &RwLock<Page> {
        let count = self.pages.chunk_count();
        let inner = self.top[place(index, LEAF_BITS + INNER_BITS, u64::MAX)]
            .get_or_init(|| table(count, index, LEAF_BITS, 1 << INNER_BITS));
        let leaf = inner[place(index, LEAF_BITS, (1 << INNER_BITS) - 1)]
            .get_or_init(|| table(count, index, 0, 1 << LEAF_BITS));
        &leaf[place(index, 0, (1 << LEAF_BITS) - 1)]
    }

    /// The first page from `from` on that may hold bytes and starts before the byte `end`; tables that do not exist are
    /// skipped whole.
    fn next_allocated(&self, from: u64, end: u64) -> Option<u64> {
        let last = self.pages.chunks_touched(&(0..end)).end;
        let mut index = from;
        while index < last {
            let skip = match self.top[place(index, LEAF_BITS + INNER_BITS, u64::MAX)].get() {
                None => LEAF_BITS + INNER_BITS,
                Some(_) if self.leaf(index).is_none() => LEAF_BITS,
                Some(_) if self.slot(index).is_some_and(|slot| read(slot).is_none()) => 0,
                Some(_) => return Some(index),
            };
            index = ((index >> skip) + 1) << skip;
        }
        None
    }

    fn is_allocated(&self, index: u64) -> bool {
        self.slot(index).is_some_and(|slot| read(slot).is_some())
    }

    /// The run of one kind that starts in page `index`, up to `last` or, for data, to where looking takes too long.
    fn run(&self, index: u64, last: u64) -> (ExtentKind, u64) {
        if self.is_allocated(index) {
            let last = last.min(index + EXTENT_PAGES);
            let end = (index..last).find(|at| !self.is_allocated(*at)).unwrap_or(last);
            return (ExtentKind::Data, end);
        }
        let end = self.pages.chunk_range(last).start;
        (ExtentKind::Hole, self.next_allocated(index, end).unwrap_or(last))
    }
}

/// A table with room for the entries of `1 << bits` pages each that lie beside page `index` among `count` pages, at
/// most `most` of them.
fn table<T: Default>(count: u64, index: u64, bits: u32, most: u64) -> Box<[T]> {
    let entries = ((count - 1) >> bits) + 1;
    let first = (index >> bits) / most * most;
    (first..entries.min(first + most)).map(|_| T::default()).collect()
}

/// Where page `index` belongs in a table whose entries are `1 << bits` pages each.
fn place(index: u64, bits: u32, mask: u64) -> usize {
    usize::try_from((index >> bits) & mask).unwrap_or(usize::MAX)
}

/// The length of a range that fits in memory.
fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

/// A page of `len` zeros with `bytes` put in at `within`.
fn new_page(len: usize, within: Range<usize>, bytes: &[u8]) -> Result<Box<[u8]>> {
    let mut page = Vec::new();
    page.try_reserve_exact(len).map_err(|error| {
        Error::new(ErrorKind::Exhausted, Operation::Write, "no memory left for the region").with_source(error)
    })?;
    page.resize(within.start, 0);
    page.extend_from_slice(bytes);
    page.resize(len, 0);
    Ok(page.into_boxed_slice())
}

/// A panic under a lock can only come from somebody's visitor, which cannot change the page.
fn read(slot: &RwLock<Page>) -> RwLockReadGuard<'_, Page> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(slot: &RwLock<Page>) -> RwLockWriteGuard<'_, Page> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Backend for Memory {
    fn size(&self) -> u64 {
        self.pages.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            pieces: Some(self),
            trim: Some(self),
            write_zeroes: Some(self),
            extents: Some(self),
            ..Capabilities::default()
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_now(offset, buf)
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.write_now(offset, buf)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl ReadPieces for Memory {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        check_range(Operation::Read, self.pages.size(), offset, len)?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let index = self.pages.chunk_at(at);
            let page = self.slot(index).map(read);
            let until = self.pages.chunk_range(index).end.min(end);
            if let Some(bytes) = page.as_ref().and_then(|page| page.as_deref()) {
                visit(at, Piece::Data(&bytes[self.within(index, &(at..until))]))?;
                at = until;
                continue;
            }
            drop(page);
            let until = match self.next_allocated(index + 1, end) {
                Some(next) => self.pages.chunk_range(next).start,
                None => end,
            };
            visit(at, Piece::Zeroes(until - at))?;
            at = until;
        }
        Ok(())
    }
}

#[async_trait]
impl Trim for Memory {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.trim_now(offset, len)
    }
}

#[async_trait]
impl WriteZeroes for Memory {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::WriteZeroes, self.pages.size(), offset, len)?;
        self.trim_now(offset, len)
    }
}

#[async_trait]
impl Extents for Memory {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.pages.size(), offset, len)?;
        let pages = self.pages.chunks_touched(&(offset..offset + len));
        let mut found = Vec::new();
        let mut index = pages.start;
        // Holes cost nothing to cross, so that only pages and the answer's own length count towards the limit.
        let mut cost = 0;
        while index < pages.end && cost < EXTENT_PAGES {
            let (kind, next) = self.run(index, pages.end);
            let bytes = self.pages.chunks_range(&(index..next));
            found.push(Extent { range: bytes.start.max(offset)..bytes.end.min(offset + len), kind });
            cost += if kind == ExtentKind::Data { next - index } else { 1 };
            index = next;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use r3map_core::MAX_REGION_SIZE;

    use super::*;

    const PAGE: u64 = 64 << 10;

    fn extents_of(memory: &Memory) -> Vec<Extent> {
        let len = memory.size();
        now(memory.extents(0, len)).unwrap()
    }

    /// Nothing in here ever waits.
    fn now<T>(future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        match future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
            std::task::Poll::Ready(value) => value,
            std::task::Poll::Pending => panic!("memory waited for something"),
        }
    }

    fn pieces_of(memory: &Memory, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        now(memory.read_pieces(offset, len, &mut |at, piece| {
            assert_eq!(at, offset + bytes.len() as u64);
            match piece {
                Piece::Data(data) => bytes.extend_from_slice(data),
                Piece::Zeroes(len) => bytes.resize(bytes.len() + length(&(0..len)), 0),
            }
            Ok(())
        }))
        .unwrap();
        bytes
    }

    #[test]
    fn the_largest_region_opens_and_its_ends_can_be_used() {
        let memory = Memory::new(MAX_REGION_SIZE).unwrap();
        for at in [0, 1 << 28, (1 << 44) - 2, MAX_REGION_SIZE - 3] {
            memory.write_now(at, b"abc").unwrap();
            let mut buf = [0; 3];
            memory.read_now(at, &mut buf).unwrap();
            assert_eq!(&buf, b"abc", "{at}");
        }
        let data: Vec<_> = extents_of(&memory)
            .into_iter()
            .filter(|extent| extent.kind == ExtentKind::Data)
            .map(|extent| extent.range)
            .collect();
        let border = 1 << 44;
        assert_eq!(
            data,
            [0..PAGE, 1 << 28..(1 << 28) + PAGE, border - PAGE..border + PAGE, MAX_REGION_SIZE - PAGE..MAX_REGION_SIZE]
        );
        memory.trim_now(0, MAX_REGION_SIZE).unwrap();
        assert_eq!(extents_of(&memory), [Extent { range: 0..MAX_REGION_SIZE, kind: ExtentKind::Hole }]);
    }

    #[test]
    fn zeros_allocate_nothing_and_trimming_frees() {
        let memory = Memory::new(10 * PAGE + 1).unwrap();
        memory.write_now(0, &vec![0; 10 << 16]).unwrap();
        assert_eq!(extents_of(&memory).len(), 1);
        memory.write_now(PAGE - 1, &[1, 2]).unwrap();
        memory.trim_now(PAGE, PAGE).unwrap();
        let kinds: Vec<_> = extents_of(&memory).into_iter().map(|extent| (extent.range, extent.kind)).collect();
        assert_eq!(kinds, [(0..PAGE, ExtentKind::Data), (PAGE..10 * PAGE + 1, ExtentKind::Hole)]);
        memory.trim_now(PAGE - 1, 1).unwrap();
        assert_eq!(pieces_of(&memory, 0, 2 * PAGE), vec![0; 2 << 16]);
    }

    #[test]
    fn past_the_end_is_an_error_and_changes_nothing() {
        let memory = Memory::new(5).unwrap();
        for result in [
            memory.write_now(3, &[1; 3]),
            memory.read_now(6, &mut []),
            memory.trim_now(u64::MAX, 2),
            now(memory.write_zeroes(0, 6)),
            now(memory.read_pieces(5, 1, &mut |_, _| Ok(()))),
            now(memory.extents(0, 6)).map(drop),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(pieces_of(&memory, 0, 5), [0; 5]);
    }

    #[test]
    fn neighbours_in_one_page_do_not_disturb_each_other() {
        let memory = Arc::new(Memory::new(4 * PAGE).unwrap());
        let threads: Vec<_> = (0..8u8)
            .map(|thread| {
                let memory = memory.clone();
                std::thread::spawn(move || {
                    for at in (u64::from(thread)..4 * PAGE).step_by(8) {
                        memory.write_now(at, &[thread + 1]).unwrap();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let bytes = pieces_of(&memory, 0, 4 * PAGE);
        assert!(bytes.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 8 + 1));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Write(u8),
        Zeroes,
        Trim,
    }

    fn any_op() -> impl Strategy<Value = (Op, u64, u64)> {
        let op = prop_oneof![(1u8..).prop_map(Op::Write), Just(Op::Zeroes), Just(Op::Trim)];
        (op, any::<u64>(), any::<u64>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn does_what_a_vec_does(size in 1..5 * PAGE, ops in proptest::collection::vec(any_op(), 1..40)) {
            let memory = Memory::new(size).unwrap();
            let mut model = vec![0; length(&(0..size))];
            for (op, a, b) in ops {
                let (a, b) = (a % (size + 1), b % (size + 1));
                let (start, end) = (a.min(b), a.max(b));
                let part = &mut model[length(&(0..start))..length(&(0..end))];
                match op {
                    Op::Write(seed) => {
                        (start..).zip(part.iter_mut()).for_each(|(at, byte)| *byte = (at % 251) as u8 ^ seed);
                        memory.write_now(start, part).unwrap();
                    }
                    Op::Zeroes => {
                        part.fill(0);
                        memory.write_now(start, part).unwrap();
                    }
                    Op::Trim => {
                        part.fill(0);
                        memory.trim_now(start, end - start).unwrap();
                    }
                }
            }
            let mut bytes = vec![7; model.len()];
            memory.read_now(0, &mut bytes).unwrap();
            prop_assert!(bytes == model);
            prop_assert!(pieces_of(&memory, 0, size) == model);
            let mut at = 0;
            for extent in extents_of(&memory) {
                prop_assert_eq!(extent.range.start, at);
                at = extent.range.end;
                if extent.kind == ExtentKind::Hole {
                    prop_assert!(is_zero(&model[length(&(0..extent.range.start))..length(&(0..at))]));
                }
            }
            prop_assert_eq!(at, size);
        }
    }
}
