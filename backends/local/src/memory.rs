//! A region in this process's memory, allocated as it is written.
//!
//! Bytes rest in slabs of 2 MiB, each behind its own lock, in a tree of tables that are allocated when something below
//! them is: an empty region of any size costs next to nothing, and calls on different slabs share no lock. A slab is in
//! one piece, so that reads can be lent what they ask for. What was never written, was trimmed, or was only ever zeros
//! takes no memory, in pages of 64 KiB, except for what huge pages take (see `ledger`). Nothing survives the process.

mod ledger;
mod slab;
mod sparse;

use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, ChunkSize, Extent, ExtentKind, Extents, Geometry, Operation, Piece, ReadPieces, Result,
    Trim, WriteZeroes, check_range, is_zero,
};

use self::ledger::Ledger;
use self::slab::{Slab, Usage, length, slice};
use self::sparse::Sparse;

/// How much data one call for extents looks at before it answers for a shorter range, in bytes.
const EXTENTS_SEEN: u64 = 4 << 30;
/// How many extents one call answers at most.
const EXTENTS_MOST: usize = 1 << 16;

/// Empty while no page of it holds data.
type Slot = RwLock<Option<Slab>>;

/// A sparse region in memory. Not written: reads as zeros and costs nothing. `flush` has nothing to do.
///
/// A child of `fork` must not use it: it does not have the bytes.
pub struct Memory {
    /// Cut into slabs: here a chunk is a slab.
    slabs: Geometry,
    /// Cut into pages: here a chunk is a page.
    pages: Geometry,
    slots: Sparse<Slot>,
    ledger: Ledger,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("size", &self.slabs.size()).finish_non_exhaustive()
    }
}

impl Memory {
    /// An empty region of `size` bytes, at once: nothing in proportion to the size is allocated.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or above [`r3map_core::MAX_REGION_SIZE`].
    pub fn new(size: u64) -> Result<Self> {
        let slabs = Geometry::new(size, ChunkSize::new(slab::SIZE)?)?;
        let pages = Geometry::new(size, slab::PAGE)?;
        Ok(Self { slabs, pages, slots: Sparse::new(slabs.chunk_count()), ledger: Ledger::default() })
    }

    /// [`Backend::read_at`], which never waits for anything here.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    pub fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        check_range(Operation::Read, self.slabs.size(), offset, buf.len() as u64)?;
        let mut rest = buf;
        for (index, range) in self.slabs.split(offset..offset + rest.len() as u64) {
            let part;
            (part, rest) = rest.split_at_mut(length(range.end - range.start));
            let slab = self.slots.get(index).map(read);
            match slab.as_ref().and_then(|slab| slab.as_ref()) {
                Some(slab) => part.copy_from_slice(&slab.bytes()[slice(&self.within(index, &range))]),
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
        check_range(Operation::Write, self.slabs.size(), offset, buf.len() as u64)?;
        let mut rest = buf;
        for (index, range) in self.slabs.split(offset..offset + rest.len() as u64) {
            let part;
            (part, rest) = rest.split_at(length(range.end - range.start));
            self.write_slab(index, self.within(index, &range).start, part)
                .map_err(|error| error.at(offset, buf.len() as u64))?;
        }
        Ok(())
    }

    /// [`Trim::trim`], which never waits for anything here: frees whole pages and clears the rest.
    ///
    /// # Errors
    /// As [`Trim::trim`].
    pub fn trim_now(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::Trim, self.slabs.size(), offset, len)?;
        let end = offset + len;
        let mut at = offset;
        while let Some(data) = self.next_data(at, end) {
            let index = self.slabs.chunk_at(data);
            let slab = self.slabs.chunk_range(index);
            let part = slab.start.max(offset)..slab.end.min(end);
            self.trim_slab(index, self.within(index, &part));
            at = slab.end;
        }
        Ok(())
    }

    fn write_slab(&self, index: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.slots.get(index).is_none() && is_zero(bytes) {
            return Ok(());
        }
        let mut slab = write(self.slots.get_or_make(index));
        let before = usage(&slab);
        match &mut *slab {
            Some(slab) => slab.write(offset, bytes),
            None if is_zero(bytes) => {}
            None => {
                let range = self.slabs.chunk_range(index);
                let len = range.end - range.start;
                slab.insert(Slab::new(len, self.ledger.pages(len))?).write(offset, bytes);
            }
        }
        self.ledger.record(before, usage(&slab));
        Ok(())
    }

    fn trim_slab(&self, index: u64, range: Range<u64>) {
        let Some(slot) = self.slots.get(index) else { return };
        let mut slab = write(slot);
        let before = usage(&slab);
        if let Some(bytes) = &mut *slab {
            bytes.trim(range);
        }
        if slab.as_ref().is_some_and(Slab::is_empty) {
            *slab = None;
        }
        self.ledger.record(before, usage(&slab));
    }

    /// The part of slab `index` that `range`, which lies inside it, is.
    fn within(&self, index: u64, range: &Range<u64>) -> Range<u64> {
        let start = self.slabs.chunk_range(index).start;
        range.start - start..range.end - start
    }

    fn page_end(&self, offset: u64) -> u64 {
        self.pages.chunk_range(self.pages.chunk_at(offset)).end
    }

    /// The first byte in a range whose page holds data.
    fn next_data(&self, start: u64, end: u64) -> Option<u64> {
        let mut at = start;
        while at < end {
            let (index, slot) = self.slots.next(self.slabs.chunk_at(at))?;
            let slab = self.slabs.chunk_range(index);
            at = at.max(slab.start);
            if let Some(found) = read(slot).as_ref().and_then(|bytes| bytes.next_data(at - slab.start)) {
                return Some(slab.start + found).filter(|found| *found < end);
            }
            at = slab.end;
        }
        None
    }

    /// The first byte in a range whose page is empty.
    fn next_hole(&self, start: u64, end: u64) -> Option<u64> {
        self.slabs.split(start..end).find_map(|(index, part)| {
            let slab = self.slots.get(index).map(read);
            let Some(bytes) = slab.as_ref().and_then(|slab| slab.as_ref()) else { return Some(part.start) };
            let within = self.within(index, &part);
            let found = bytes.next_hole(within.start).filter(|found| *found < within.end)?;
            Some(part.start + (found - within.start))
        })
    }

    /// The run of one kind that starts at `at`, up to `end` or, for data, to where looking takes too long.
    fn run(&self, at: u64, end: u64) -> Extent {
        match self.next_data(at, end) {
            Some(data) if data == at => {
                let end = end.min(at + EXTENTS_SEEN);
                // This page held data, whatever it does by now.
                Extent { range: at..self.next_hole(self.page_end(at), end).unwrap_or(end), kind: ExtentKind::Data }
            }
            data => Extent { range: at..data.unwrap_or(end), kind: ExtentKind::Hole },
        }
    }

    /// Lends the data that starts at `at` and lies in one slab, if there is any; where it ended.
    fn lend(&self, at: u64, end: u64, visit: &mut Visit<'_>) -> Result<Option<u64>> {
        let index = self.slabs.chunk_at(at);
        let slab = self.slots.get(index).map(read);
        let Some(slab) = slab.as_ref().and_then(|slab| slab.as_ref()) else { return Ok(None) };
        let part = self.within(index, &(at..self.slabs.chunk_range(index).end.min(end)));
        if slab.next_data(part.start) != Some(part.start) {
            return Ok(None);
        }
        let until = slab.next_hole(part.start).map_or(part.end, |hole| hole.min(part.end));
        visit(at, Piece::Data(&slab.bytes()[slice(&(part.start..until))]))?;
        Ok(Some(at + (until - part.start)))
    }
}

fn usage(slab: &Option<Slab>) -> Usage {
    slab.as_ref().map_or_else(Usage::default, Slab::usage)
}

/// A panic under a lock can only come from somebody's visitor, which cannot change the slab.
fn read(slot: &Slot) -> RwLockReadGuard<'_, Option<Slab>> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(slot: &Slot) -> RwLockWriteGuard<'_, Option<Slab>> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Backend for Memory {
    fn size(&self) -> u64 {
        self.slabs.size()
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

type Visit<'v> = dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send + 'v;

#[async_trait]
impl ReadPieces for Memory {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        check_range(Operation::Read, self.slabs.size(), offset, len)?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            if let Some(until) = self.lend(at, end, visit)? {
                at = until;
                continue;
            }
            // This page was empty, whatever it is by now.
            let until = self.next_data(self.page_end(at), end).unwrap_or(end);
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
        check_range(Operation::WriteZeroes, self.slabs.size(), offset, len)?;
        self.trim_now(offset, len)
    }
}

#[async_trait]
impl Extents for Memory {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.slabs.size(), offset, len)?;
        let end = offset + len;
        let mut found = Vec::new();
        let mut at = offset;
        // Holes cost nothing to cross, so that only data and the answer's own length count towards the limit.
        let mut seen = 0;
        while at < end && seen < EXTENTS_SEEN && found.len() < EXTENTS_MOST {
            let extent = self.run(at, end);
            at = extent.range.end;
            if extent.kind == ExtentKind::Data {
                seen += extent.range.end - extent.range.start;
            }
            found.push(extent);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use r3map_core::{ErrorKind, MAX_REGION_SIZE};

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
                Piece::Zeroes(len) => bytes.resize(bytes.len() + length(len), 0),
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
            let mut model = vec![0; length(size)];
            for (op, a, b) in ops {
                let (a, b) = (a % (size + 1), b % (size + 1));
                let (start, end) = (a.min(b), a.max(b));
                let part = &mut model[slice(&(start..end))];
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
                    prop_assert!(is_zero(&model[slice(&extent.range)]));
                }
            }
            prop_assert_eq!(at, size);
        }
    }
}
