//! The backend that holds nothing: reads give zeros, and writes are thrown away.
//!
//! It is for measuring everything around a backend, and for opening regions larger than any disk. It does not keep the
//! contract's promise that a read sees what was written, and says so here because nobody should store anything in it.

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, ChunkSize, Extent, ExtentKind, Extents, Geometry, Operation, Piece, ReadPieces, Result,
    Trim, WriteZeroes, check_range,
};

/// A region of any size that reads as zeros and **discards every write**. Costs no memory.
#[derive(Debug, Clone, Copy)]
pub struct Null {
    size: u64,
}

impl Null {
    /// A region of `size` bytes.
    ///
    /// # Errors
    /// `InvalidInput` if `size` is zero or above [`r3map_core::MAX_REGION_SIZE`].
    pub fn new(size: u64) -> Result<Self> {
        let geometry = Geometry::new(size, ChunkSize::DEFAULT)?;
        Ok(Self { size: geometry.size() })
    }
}

#[async_trait]
impl Backend for Null {
    fn size(&self) -> u64 {
        self.size
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
        check_range(Operation::Read, self.size, offset, buf.len() as u64)?;
        buf.fill(0);
        Ok(())
    }

    /// Checks the range, then discards the bytes.
    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(Operation::Write, self.size, offset, buf.len() as u64)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl ReadPieces for Null {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        check_range(Operation::Read, self.size, offset, len)?;
        if len == 0 { Ok(()) } else { visit(offset, Piece::Zeroes(len)) }
    }
}

#[async_trait]
impl Trim for Null {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::Trim, self.size, offset, len)
    }
}

#[async_trait]
impl WriteZeroes for Null {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::WriteZeroes, self.size, offset, len)
    }
}

#[async_trait]
impl Extents for Null {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        check_range(Operation::Extents, self.size, offset, len)?;
        let range = offset..offset + len;
        Ok(if len == 0 { Vec::new() } else { vec![Extent { range, kind: ExtentKind::Hole }] })
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::{ErrorKind, MAX_REGION_SIZE};

    use super::*;

    #[tokio::test]
    async fn reads_zeros_discards_writes_and_checks_ranges() {
        let null = Null::new(MAX_REGION_SIZE).unwrap();
        null.write_at(MAX_REGION_SIZE - 4, &[1; 4]).await.unwrap();
        let mut buf = [7; 4];
        null.read_at(MAX_REGION_SIZE - 4, &mut buf).await.unwrap();
        assert_eq!(buf, [0; 4]);
        for result in [
            null.read_at(MAX_REGION_SIZE - 3, &mut buf).await,
            null.write_at(MAX_REGION_SIZE, &[1]).await,
            null.trim(u64::MAX, 1).await,
            null.write_zeroes(1, MAX_REGION_SIZE).await,
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert!(Null::new(0).is_err() && Null::new(MAX_REGION_SIZE + 1).is_err());
    }

    #[tokio::test]
    async fn lends_one_run_of_zeros() {
        let null = Null::new(1 << 40).unwrap();
        let mut pieces = Vec::new();
        null.read_pieces(5, 1 << 39, &mut |at, piece| {
            pieces.push((at, piece.len(), matches!(piece, Piece::Zeroes(_))));
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(pieces, [(5, 1 << 39, true)]);
        assert_eq!(null.extents(0, 1 << 40).await.unwrap(), [Extent { range: 0..1 << 40, kind: ExtentKind::Hole }]);
    }
}
