//! The first page of a cache file: what the file is, whose it is, and how it was left.
//!
//! ```text
//!    0  magic "r3mcache"
//!    8  format version, u32           (all numbers are little-endian)
//!   12  checksum, u32: CRC-32C of the whole page with these four bytes zero
//!   16  region size in bytes, u64
//!   24  chunk size in bytes, u32
//!   28  how it was left, u32: 0 being created, 1 open, 2 closed
//!   32  boot id of the machine that opened it last, 36 bytes
//!   68  length of the identity, u32
//!  512  identity, UTF-8
//! ```
//! What changes after creation lies in the first 512 bytes, which a disk writes whole or not at all.

use r3map_core::{ChunkSize, Error, ErrorKind, Geometry, Operation, Result};

use crate::boot::BootId;

/// Bytes that the header takes.
pub(super) const LEN: usize = 4096;

const MAGIC: &[u8; 8] = b"r3mcache";
const VERSION: u32 = 1;
const IDENTITY: usize = 512;

/// The longest identity in bytes.
pub(super) const MAX_IDENTITY: usize = LEN - IDENTITY;

/// How a cache file was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Its creation did not finish: there is nothing in it.
    Creating,
    /// In use, or by a process that was killed, or before a loss of power.
    Open,
    /// Closed, with everything durable.
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    pub(super) identity: String,
    pub(super) left: Left,
    pub(super) boot: Option<BootId>,
}

impl Header {
    pub(super) fn to_page(&self) -> [u8; LEN] {
        let mut page = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        let left = match self.left {
            Left::Creating => 0u32,
            Left::Open => 1,
            Left::Closed => 2,
        };
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.geometry.size().to_le_bytes());
        put(24, &self.geometry.chunk_size().bytes().to_le_bytes()[..4]);
        put(28, &left.to_le_bytes());
        put(32, &BootId::to_bytes(self.boot));
        put(68, &(self.identity.len() as u64).to_le_bytes()[..4]);
        put(IDENTITY, self.identity.as_bytes());
        let checksum = crc_fast::crc32_iscsi(&page);
        page[12..16].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    /// Reads a page, which may be anything.
    ///
    /// # Errors
    /// `InvalidInput` if it is no cache file's or of another format; `Corrupt` if it was one.
    pub(super) fn from_page(page: &[u8; LEN]) -> Result<Self> {
        if &page[..8] != MAGIC {
            return Err(refuse(ErrorKind::InvalidInput, "is not a cache file, and is left as it is"));
        }
        let version = u32_at(page, 8);
        if version != VERSION {
            let message = format!("is a cache file of format {version}; this version knows format {VERSION} only");
            return Err(refuse(ErrorKind::InvalidInput, &message));
        }
        let mut unsigned = *page;
        unsigned[12..16].fill(0);
        if crc_fast::crc32_iscsi(&unsigned) != u32_at(page, 12) {
            return Err(damaged());
        }
        Self::from_checked(page).ok_or_else(damaged)
    }

    fn from_checked(page: &[u8; LEN]) -> Option<Self> {
        let chunk = ChunkSize::new(u64::from(u32_at(page, 24))).ok()?;
        let identity = page.get(IDENTITY..)?.get(..usize::try_from(u32_at(page, 68)).ok()?)?;
        Some(Self {
            geometry: Geometry::new(u64::from_le_bytes(page[16..24].try_into().ok()?), chunk).ok()?,
            identity: String::from_utf8(identity.to_vec()).ok()?,
            left: match u32_at(page, 28) {
                0 => Left::Creating,
                1 => Left::Open,
                2 => Left::Closed,
                _ => return None,
            },
            boot: BootId::from_bytes(page[32..68].try_into().ok()?),
        })
    }
}

fn u32_at(page: &[u8; LEN], at: usize) -> u32 {
    page[at..at + 4].iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn damaged() -> Error {
    let message = "has a damaged header; delete it to pull everything anew (writes that were not pushed are lost)";
    refuse(ErrorKind::Corrupt, message)
}

/// To be completed by the file's name in front.
fn refuse(kind: ErrorKind, message: &str) -> Error {
    Error::new(kind, Operation::Open, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            geometry: Geometry::new(12345, ChunkSize::DEFAULT).unwrap(),
            identity: "grpc://host:1337 ✓".into(),
            left: Left::Closed,
            boot: BootId::current(),
        }
    }

    #[test]
    fn is_read_back() {
        let longest = "x".repeat(MAX_IDENTITY);
        for header in [header(), Header { identity: longest, left: Left::Open, boot: None, ..header() }] {
            assert_eq!(Header::from_page(&header.to_page()).unwrap(), header);
        }
    }

    #[test]
    fn any_damage_is_seen() {
        let page = header().to_page();
        for at in (0..600).chain([LEN - 1]) {
            let mut damaged = page;
            damaged[at] ^= 4;
            let error = Header::from_page(&damaged).unwrap_err();
            let kind = if at < 12 { ErrorKind::InvalidInput } else { ErrorKind::Corrupt };
            assert_eq!(error.kind(), kind, "{at}: {error}");
        }
    }

    #[test]
    fn nonsense_with_a_right_checksum_is_refused() {
        for (at, value) in [(16, 0), (24, 1), (28, 3), (70, 1), (512, 0xff)] {
            let mut page = header().to_page();
            if at == 16 {
                page[16..24].fill(0);
            }
            page[at] = value;
            page[12..16].fill(0);
            let checksum = crc_fast::crc32_iscsi(&page);
            page[12..16].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(Header::from_page(&page).unwrap_err().kind(), ErrorKind::Corrupt, "{at}");
        }
    }

    #[test]
    fn what_changes_lies_in_one_sector() {
        let (a, b) = (header().to_page(), Header { left: Left::Open, boot: None, ..header() }.to_page());
        assert_eq!(a[512..], b[512..]);
    }
}
