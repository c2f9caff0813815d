//! Any backend as the local side of a cached region.
//!
//! It keeps no record of what was put there: that is [`StateRecord`](r3map_pipeline::StateRecord)'s, which `CacheFile`
//! has. When the process ends, a region stored this way is what a plain file of bytes is: bytes of unknown worth.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Operation, Piece, Result, check_range, is_zero};
use r3map_pipeline::{InstallNow, Local};

use crate::Memory;

/// A local side whose bytes rest in another backend.
#[derive(Clone)]
pub struct Stored {
    bytes: Arc<dyn Backend>,
    /// The same backend, where it is memory and bytes can be put there without waiting.
    memory: Option<Arc<Memory>>,
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stored").field("size", &self.bytes.size()).field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Stored {
    /// A local side in `bytes`, which must be of the region's size and take requests of any alignment.
    #[must_use]
    pub fn new(bytes: Arc<dyn Backend>) -> Self {
        Self { bytes, memory: None }
    }

    /// A local side in memory: pulled chunks are put in place at once, from where they lie, and zeros cost nothing.
    #[must_use]
    pub fn memory(memory: Arc<Memory>) -> Self {
        Self { bytes: memory.clone(), memory: Some(memory) }
    }
}

#[async_trait]
impl Backend for Stored {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        self.bytes.capabilities()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.bytes.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.bytes.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.bytes.flush().await
    }
}

#[async_trait]
impl Local for Stored {
    async fn install(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self.bytes.capabilities().trim {
            Some(trim) if is_zero(bytes) => trim.trim(offset, bytes.len() as u64).await,
            _ => self.bytes.write_at(offset, bytes).await,
        }
    }

    fn install_now(&self) -> Option<&dyn InstallNow> {
        self.memory.as_deref().map(|memory| memory as &dyn InstallNow)
    }
}

impl InstallNow for Memory {
    fn install_now(&self, offset: u64, piece: Piece<'_>) -> Result<()> {
        match piece {
            Piece::Data(bytes) => self.write_now(offset, bytes),
            Piece::Zeroes(len) => {
                check_range(Operation::WriteZeroes, self.size(), offset, len)?;
                self.trim_now(offset, len)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::{Extent, ExtentKind};

    use super::*;

    async fn is_a_hole(local: &dyn Local) -> bool {
        let extents = local.capabilities().extents.unwrap().extents(0, local.size()).await.unwrap();
        extents == [Extent { range: 0..local.size(), kind: ExtentKind::Hole }]
    }

    #[tokio::test]
    async fn installed_bytes_are_read_back_and_zeros_replace_them() {
        let memory = Arc::new(Memory::new(100_000).unwrap());
        for local in [Stored::memory(memory.clone()), Stored::new(memory)] {
            match local.install_now() {
                Some(now) => now.install_now(4096, Piece::Data(&[5; 8192])).unwrap(),
                None => local.install(4096, &[5; 8192]).await.unwrap(),
            }
            let mut buf = [0; 8192];
            local.read_at(4096, &mut buf).await.unwrap();
            assert_eq!(buf, [5; 8192]);
            assert!(!is_a_hole(&local).await);
            local.install(0, &vec![0; 100_000]).await.unwrap();
            assert!(is_a_hole(&local).await, "zeros take no room");
            assert!(local.install(99_999, &[1, 2]).await.is_err());
        }
    }

    #[test]
    fn zeros_installed_at_once_replace_what_was_there() {
        let local = Stored::memory(Arc::new(Memory::new(8192).unwrap()));
        let now = local.install_now().unwrap();
        now.install_now(0, Piece::Data(&[9; 8192])).unwrap();
        now.install_now(0, Piece::Zeroes(4096)).unwrap();
        assert!(now.install_now(4096, Piece::Zeroes(4097)).is_err());
        let mut buf = [1; 8192];
        local.memory.unwrap().read_now(0, &mut buf).unwrap();
        assert!(is_zero(&buf[..4096]) && buf[4096..] == [9; 4096]);
    }
}
