//! Refuses every request that is not a bounded run of whole chunks: what a server puts in front of a backend, so that
//! clients agree on the chunk size and nobody asks for more memory than was meant.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{
    Access, Backend, Capabilities, ChunkSize, Error, ErrorKind, Geometry, Operation, Piece, ReadMany, ReadOp,
    ReadPieces, Result, check_range,
};

use crate::DECLARED;

/// A backend that takes only whole, aligned, bounded requests, and declares so.
///
/// Abilities that move no bytes (trimming, zeroing, extents) are passed on for any range.
pub struct Chunked {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
    max_request: u64,
}

impl Chunked {
    /// Wraps `inner` for requests of whole chunks of `chunk`, of at most `max_request` bytes (or fewer where `inner`
    /// takes fewer).
    ///
    /// # Errors
    /// `InvalidInput` if one chunk is more than `max_request`, or more or less than `inner` takes.
    pub fn new(inner: Arc<dyn Backend>, chunk: ChunkSize, max_request: u64) -> Result<Self> {
        let capabilities = inner.capabilities();
        let max_request = capabilities.max_request.map_or(max_request, |max| max.min(max_request));
        if max_request < chunk.bytes() {
            return Err(bad_chunk(format!("a chunk of {chunk} is more than the longest request, {max_request} bytes")));
        }
        match capabilities.access {
            Access::WholeChunks(inside) if inside > chunk => {
                Err(bad_chunk(format!("chunks of {chunk} are smaller than the backend's own, {inside}; use those")))
            }
            _ => Ok(Self { geometry: Geometry::new(inner.size(), chunk)?, inner, max_request }),
        }
    }

    /// Whether it would take a read or write of `len` bytes at `offset`: to be asked before a buffer for it is
    /// allocated.
    ///
    /// # Errors
    /// `InvalidInput` if it would not, saying why.
    pub fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(operation, self.geometry.size(), offset, len)?;
        let (chunk, max) = (self.geometry.chunk_size(), self.max_request);
        let wrong = if len > max {
            format!("longer than {max} bytes; ask for less at once")
        } else if len > 0 && !self.geometry.is_whole_chunks(&(offset..offset + len)) {
            format!("not a run of whole chunks of {chunk}; check the chunk size on both sides")
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidInput, operation, wrong).at(offset, len))
    }
}

fn bad_chunk(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, Operation::Open, message)
}

#[async_trait]
impl Backend for Chunked {
    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let inner = self.inner.capabilities();
        let chunk = self.geometry.chunk_size();
        Capabilities {
            access: Access::WholeChunks(chunk),
            max_request: Some(self.max_request),
            preferred_chunk: Some(chunk),
            pieces: inner.pieces.map(|_| self as _),
            read_many: inner.read_many.map(|_| self as _),
            ..inner
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check(Operation::Read, offset, buf.len() as u64)?;
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.check(Operation::Write, offset, buf.len() as u64)?;
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[async_trait]
impl ReadPieces for Chunked {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        self.check(Operation::Read, offset, len)?;
        let pieces = self.inner.capabilities().pieces.expect(DECLARED);
        pieces.read_pieces(offset, len, visit).await
    }
}

#[async_trait]
impl ReadMany for Chunked {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        for read in &*reads {
            self.check(Operation::Read, read.offset, read.buf.len() as u64)?;
        }
        let many = self.inner.capabilities().read_many.expect(DECLARED);
        many.read_many(reads).await
    }
}

#[cfg(test)]
mod tests {
    use r3map_testkit::faults::Faults;
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, model};

    use super::*;

    const SIZE: u64 = 300_001;

    fn chunk(bytes: u64) -> ChunkSize {
        ChunkSize::new(bytes).unwrap()
    }

    fn chunked(inner: Store) -> Arc<dyn Backend> {
        Arc::new(Chunked::new(Arc::new(inner), chunk(16384), 40_000).unwrap())
    }

    #[tokio::test]
    async fn conforms() {
        conformance::backend(async || chunked(Store::new(SIZE))).await;
        conformance::backend(async || chunked(Store::new(SIZE).plain().whole_chunks(chunk(4096)))).await;
        conformance::backend(async || chunked(Store::new(16384))).await;
        conformance::backend(async || chunked(Store::new(5))).await;
        conformance::filled(async || chunked(Store::new(SIZE).filled(2).read_only()), 2).await;
        model::check(async || chunked(Store::new(SIZE)), model::Settings::default()).await;
    }

    #[tokio::test]
    async fn what_is_refused_never_reaches_the_backend() {
        let faults = Faults::new(Arc::new(Store::new(SIZE)));
        let chunked = Chunked::new(faults.clone(), chunk(4096), 8192).unwrap();
        for (offset, len) in [(0, 12288), (0, 1), (1, 4096), (SIZE, 1), (4096, 4095), (299_008, 992), (u64::MAX, 2)] {
            let error = chunked.check(Operation::Read, offset, len as u64).unwrap_err();
            assert_eq!((error.kind(), error.range()), (ErrorKind::InvalidInput, Some((offset, len as u64))));
            assert!(chunked.read_at(offset, &mut vec![0; len]).await.is_err());
            assert!(chunked.write_at(offset, &vec![0; len]).await.is_err());
        }
        assert!(faults.calls().is_empty());
        // The last chunk is shorter, and whole.
        chunked.write_at(299_008, &[1; 993]).await.unwrap();
    }

    #[test]
    fn limits_that_cannot_work_are_refused() {
        let refused = |inner: Store, bytes, max| Chunked::new(Arc::new(inner), chunk(bytes), max).err().unwrap();
        assert!(refused(Store::new(SIZE), 8192, 8191).to_string().contains("longest request"));
        assert!(refused(Store::new(SIZE).max_request(4096), 8192, 8192).to_string().contains("4096 bytes"));
        assert!(refused(Store::new(SIZE).whole_chunks(chunk(8192)), 4096, 8192).to_string().contains("8KiB"));
        let smaller = Chunked::new(Arc::new(Store::new(SIZE).max_request(16384)), chunk(8192), 32768).unwrap();
        assert_eq!(smaller.capabilities().max_request, Some(16384));
    }
}
