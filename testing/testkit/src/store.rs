//! The simplest backend that keeps every promise of the contract, with the capabilities that a test asks for.
//!
//! It is a reference to test stages on, not a place to keep data: one lock over one vector.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use r3map_core::{
    Access, Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Extents, Geometry, Operation,
    Piece, ReadMany, ReadOp, ReadPieces, Result, Trim, WriteZeroes, check_range, is_zero,
};

use crate::fill;

/// A region in a vector. Each call gives way to other tasks once before and once after it touches the bytes, so that
/// calls interleave and can be cancelled at either point.
#[derive(Debug)]
pub struct Store {
    contents: Mutex<Contents>,
    geometry: Geometry,
    access: Access,
    max_request: Option<u64>,
    read_only: bool,
    abilities: bool,
}

#[derive(Debug)]
struct Contents {
    bytes: Vec<u8>,
    /// Which blocks were ever written (and not trimmed since).
    stored: Vec<bool>,
    /// What was there before each write since the last flush, (offset, bytes), if a power cut is to take these.
    undo: Option<Vec<(usize, Vec<u8>)>>,
}

impl Store {
    /// A region of `size` bytes that takes any request and has every optional ability.
    ///
    /// # Panics
    /// If `size` is zero or does not fit into memory.
    #[must_use]
    pub fn new(size: u64) -> Self {
        let geometry = Geometry::new(size, ChunkSize::MIN).expect("a region has at least one byte");
        let contents =
            Contents { bytes: vec![0; index(size)], stored: vec![false; index(geometry.block_count())], undo: None };
        let contents = Mutex::new(contents);
        Self { contents, geometry, access: Access::Any, max_request: None, read_only: false, abilities: true }
    }

    /// The same, filled as [`fill`] has it for `seed`, durably.
    #[must_use]
    pub fn filled(self, seed: u64) -> Self {
        {
            let mut contents = self.contents();
            fill::write(&mut contents.bytes, 0, seed);
            contents.stored.fill(true);
        }
        self
    }

    /// The same, but it takes only whole chunks.
    #[must_use]
    pub fn whole_chunks(mut self, chunk: ChunkSize) -> Self {
        self.access = Access::WholeChunks(chunk);
        self.geometry = Geometry::new(self.geometry.size(), chunk).expect("the size was good before");
        self
    }

    /// The same, but it refuses requests that are longer than `bytes`.
    #[must_use]
    pub fn max_request(mut self, bytes: u64) -> Self {
        self.max_request = Some(bytes);
        self
    }

    /// The same, but nobody can write.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same without optional abilities.
    #[must_use]
    pub fn plain(mut self) -> Self {
        self.abilities = false;
        self
    }

    /// The same, but what is written rests in a volatile cache until it is flushed: see [`Self::lose_unflushed`].
    #[must_use]
    pub fn volatile_cache(self) -> Self {
        self.contents().undo = Some(Vec::new());
        self
    }

    /// All of its bytes, whatever requests it takes.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.contents().bytes.clone()
    }

    /// Loses everything that was written since the last flush, as a power cut would.
    ///
    /// # Panics
    /// If the store has no [`Self::volatile_cache`].
    pub fn lose_unflushed(&self) {
        let mut contents = self.contents();
        let undo = std::mem::take(contents.undo.as_mut().expect("the store has a volatile cache"));
        for (at, old) in undo.into_iter().rev() {
            contents.bytes[at..at + old.len()].copy_from_slice(&old);
        }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<Range<usize>> {
        check_range(operation, self.size(), offset, len)?;
        let range = offset..offset + len;
        let refused = match (self.access, self.max_request) {
            (_, Some(max)) if len > max => format!("longer than {max} bytes; split it"),
            (Access::WholeChunks(chunk), _) if len > 0 && !self.geometry.is_whole_chunks(&range) => {
                format!("not a run of whole chunks of {chunk}")
            }
            _ => return Ok(index(offset)..index(offset + len)),
        };
        Err(Error::new(ErrorKind::InvalidInput, operation, refused).at(offset, len))
    }

    fn check_change(&self, operation: Operation, offset: u64, len: u64) -> Result<Range<usize>> {
        if self.read_only {
            return Err(Error::new(ErrorKind::Denied, operation, "the store is read-only").at(offset, len));
        }
        if operation == Operation::Write {
            return self.check(operation, offset, len);
        }
        check_range(operation, self.size(), offset, len)?;
        Ok(index(offset)..index(offset + len))
    }

    async fn zero(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let range = self.check_change(operation, offset, len)?;
        tokio::task::yield_now().await;
        {
            let mut contents = self.contents();
            contents.change(range, |bytes| bytes.fill(0));
            if operation == Operation::Trim {
                let blocks = self.geometry.blocks_covered(&(offset..offset + len));
                contents.stored[index(blocks.start)..index(blocks.end)].fill(false);
            }
        }
        tokio::task::yield_now().await;
        Ok(())
    }
}

impl Contents {
    fn change(&mut self, range: Range<usize>, change: impl FnOnce(&mut [u8])) {
        if let Some(undo) = &mut self.undo {
            undo.push((range.start, self.bytes[range.clone()].to_vec()));
        }
        change(&mut self.bytes[range]);
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("a store fits into memory")
}

#[async_trait]
impl Backend for Store {
    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let plain = Capabilities {
            read_only: self.read_only,
            access: self.access,
            max_request: self.max_request,
            ..Capabilities::default()
        };
        if !self.abilities {
            return plain;
        }
        Capabilities {
            pieces: Some(self),
            read_many: Some(self),
            trim: Some(self),
            write_zeroes: Some(self),
            extents: Some(self),
            ..plain
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = self.check(Operation::Read, offset, buf.len() as u64)?;
        tokio::task::yield_now().await;
        buf.copy_from_slice(&self.contents().bytes[range]);
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let range = self.check_change(Operation::Write, offset, buf.len() as u64)?;
        tokio::task::yield_now().await;
        {
            let blocks = self.geometry.blocks_touched(&(offset..offset + buf.len() as u64));
            let mut contents = self.contents();
            contents.change(range, |bytes| bytes.copy_from_slice(buf));
            contents.stored[index(blocks.start)..index(blocks.end)].fill(true);
        }
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        tokio::task::yield_now().await;
        if let Some(undo) = &mut self.contents().undo {
            undo.clear();
        }
        tokio::task::yield_now().await;
        Ok(())
    }
}

#[async_trait]
impl ReadPieces for Store {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        self.check(Operation::Read, offset, len)?;
        tokio::task::yield_now().await;
        let contents = self.contents();
        for block in self.geometry.blocks_touched(&(offset..offset + len)) {
            let range = self.geometry.block_range(block);
            let (start, end) = (range.start.max(offset), range.end.min(offset + len));
            let bytes = &contents.bytes[index(start)..index(end)];
            let piece = if is_zero(bytes) { Piece::Zeroes(end - start) } else { Piece::Data(bytes) };
            visit(start, piece)?;
        }
        Ok(())
    }
}

#[async_trait]
impl ReadMany for Store {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        for read in reads {
            self.read_at(read.offset, read.buf).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Trim for Store {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(Operation::Trim, offset, len).await
    }
}

#[async_trait]
impl WriteZeroes for Store {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.zero(Operation::WriteZeroes, offset, len).await
    }
}

#[async_trait]
impl Extents for Store {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.size(), offset, len)?;
        tokio::task::yield_now().await;
        let contents = self.contents();
        let mut extents: Vec<Extent> = Vec::new();
        for block in self.geometry.blocks_touched(&(offset..offset + len)) {
            let range = self.geometry.block_range(block);
            let range = range.start.max(offset)..range.end.min(offset + len);
            let kind = if contents.stored[index(block)] { ExtentKind::Data } else { ExtentKind::Hole };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.end = range.end,
                _ => extents.push(Extent { range, kind }),
            }
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::conformance;

    fn chunk() -> ChunkSize {
        ChunkSize::new(8192).unwrap()
    }

    #[tokio::test]
    async fn conforms() {
        conformance::backend(async || Arc::new(Store::new(300_001)) as Arc<dyn Backend>).await;
        conformance::backend(async || Arc::new(Store::new(1)) as Arc<dyn Backend>).await;
        conformance::backend(async || Arc::new(Store::new(5000).plain()) as Arc<dyn Backend>).await;
    }

    #[tokio::test]
    async fn conforms_with_limits() {
        let make =
            async || Arc::new(Store::new(300_001).whole_chunks(chunk()).max_request(3 * 8192)) as Arc<dyn Backend>;
        conformance::backend(make).await;
    }

    #[tokio::test]
    async fn conforms_when_read_only() {
        let make = async || Arc::new(Store::new(300_001).filled(5).read_only()) as Arc<dyn Backend>;
        conformance::filled(make, 5).await;
    }

    #[tokio::test]
    async fn a_power_cut_takes_what_was_not_flushed() {
        let store = Store::new(10_000).filled(1).volatile_cache();
        store.write_at(10, &fill::bytes(10, 100, 2)).await.unwrap();
        store.flush().await.unwrap();
        store.write_at(50, &fill::bytes(50, 5000, 3)).await.unwrap();
        store.write_at(60, &fill::bytes(60, 5000, 4)).await.unwrap();
        store.lose_unflushed();
        let bytes = store.snapshot();
        fill::check(&bytes[..10], 0, 1).unwrap();
        fill::check(&bytes[10..110], 10, 2).unwrap();
        fill::check(&bytes[110..], 110, 1).unwrap();
    }
}
