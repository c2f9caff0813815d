//! What a client learns about an export in the handshake, and whether it is still the same when it connects again.

use r3map_core::{Access, ChunkSize, Error, ErrorKind, MAX_REGION_SIZE, Operation, Result};

use crate::wire::{BlockSizes, DEFAULT_MAX_PAYLOAD, Framing, TransmissionFlags};

/// The most data that is asked for, or sent, in one request, unless the server takes less: enough to fill a pipe with a
/// few, and not much memory.
const LONGEST: u64 = 4 << 20;

/// An export, as one connection has negotiated it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    pub(crate) framing: Framing,
    /// The id of `base:allocation` on this connection, if it was selected.
    pub(crate) allocation: Option<u32>,
    pub(crate) blocks: Option<BlockSizes>,
}

impl Facts {
    /// Checks that this can be a region.
    ///
    /// # Errors
    /// `InvalidInput` for an empty export, one too large, or one whose last bytes no request can reach; `Corrupt` for
    /// block sizes against the protocol's rules.
    pub(crate) fn check(self, peer: &dyn std::fmt::Display) -> Result<Self> {
        let refuse = |kind, what: String| Err(Error::new(kind, Operation::Open, format!("{peer}: {what}")));
        if let Some(Err(malformed)) = self.blocks.map(BlockSizes::check) {
            return refuse(ErrorKind::Corrupt, malformed.to_string());
        }
        match self.size {
            0 => refuse(ErrorKind::InvalidInput, "the export is empty".to_owned()),
            1..=MAX_REGION_SIZE if self.size.is_multiple_of(self.minimum()) => Ok(self),
            1..=MAX_REGION_SIZE => refuse(
                ErrorKind::InvalidInput,
                format!(
                    "the export's size of {} bytes is no multiple of its block size of {}: its end is out of reach",
                    self.size,
                    self.minimum()
                ),
            ),
            size => refuse(ErrorKind::InvalidInput, format!("the export has {size} bytes, which is too large")),
        }
    }

    pub(crate) fn has(&self, flag: TransmissionFlags) -> bool {
        self.flags.contains(flag)
    }

    /// The unit of offsets and lengths in bytes.
    pub(crate) fn minimum(&self) -> u64 {
        self.blocks.map_or(1, |blocks| blocks.minimum.into())
    }

    /// The most data in one request in bytes, a multiple of the unit.
    pub(crate) fn longest(&self) -> u64 {
        let limit = self.blocks.map_or(DEFAULT_MAX_PAYLOAD, |blocks| blocks.maximum);
        let limit = u64::from(limit).min(LONGEST);
        (limit - limit % self.minimum()).max(self.minimum())
    }

    /// The longest range in bytes of a request without data, a multiple of the unit.
    pub(crate) fn longest_range(&self) -> u64 {
        match self.framing {
            Framing::Extended => 1 << 60,
            // Far below 32 bits, because servers count these in signed numbers and sectors.
            Framing::Simple | Framing::Structured => 1 << 30,
        }
    }

    /// Which requests the region takes: any where the server does, else the smallest chunks that servers' blocks make.
    pub(crate) fn access(&self) -> Access {
        match self.minimum() {
            1 => Access::Any,
            minimum => Access::WholeChunks(ChunkSize::new(minimum.max(ChunkSize::MIN.bytes())).unwrap_or_default()),
        }
    }

    /// The chunk size that suits the server, where it says so.
    pub(crate) fn preferred(&self) -> Option<ChunkSize> {
        self.blocks.and_then(|blocks| ChunkSize::new(blocks.preferred.into()).ok())
    }

    /// Checks that `now` describes the region that this describes, and takes the same requests.
    ///
    /// # Errors
    /// `Conflict` if not.
    pub(crate) fn same_region(&self, now: &Self, peer: &dyn std::fmt::Display) -> Result<()> {
        let what = if self.size != now.size {
            format!("has {} bytes where it had {}", now.size, self.size)
        } else if self.has(TransmissionFlags::READ_ONLY) != now.has(TransmissionFlags::READ_ONLY) {
            let writable =
                |facts: &Self| if facts.has(TransmissionFlags::READ_ONLY) { "read-only" } else { "writable" };
            format!("is {} where it was {}", writable(now), writable(self))
        } else if (self.flags, self.framing, self.blocks) != (now.flags, now.framing, now.blocks)
            || self.allocation.is_some() != now.allocation.is_some()
        {
            "can do other things than before".to_owned()
        } else {
            return Ok(());
        };
        let message = format!("{peer}: the export now {what}: open it anew");
        Err(Error::new(ErrorKind::Conflict, Operation::Open, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let blocks = BlockSizes { minimum: 512, preferred: 4096, maximum: 100_000 };
        Facts {
            size: 1 << 20,
            flags: TransmissionFlags::HAS_FLAGS,
            framing: Framing::Structured,
            allocation: Some(1),
            blocks: Some(blocks),
        }
    }

    #[test]
    fn requests_keep_to_the_block_sizes() {
        assert_eq!((facts().minimum(), facts().longest()), (512, 99_840));
        assert_eq!(facts().access(), Access::WholeChunks(ChunkSize::MIN));
        let wide = BlockSizes { minimum: 1 << 16, preferred: 1 << 16, maximum: u32::MAX };
        let wide = Facts { blocks: Some(wide), ..facts() };
        assert_eq!((wide.longest(), wide.access()), (4 << 20, Access::WholeChunks(ChunkSize::DEFAULT)));
        let plain = Facts { blocks: None, ..facts() };
        assert_eq!((plain.minimum(), plain.longest(), plain.access()), (1, 4 << 20, Access::Any));
        assert_eq!(plain.preferred(), None);
        assert_eq!(facts().preferred(), Some(ChunkSize::MIN));
    }

    #[test]
    fn what_cannot_be_a_region_is_refused() {
        let blocks = |minimum, preferred, maximum| Some(BlockSizes { minimum, preferred, maximum });
        for (facts, kind, reason) in [
            (Facts { size: 0, ..facts() }, ErrorKind::InvalidInput, "empty"),
            (Facts { size: 1000, ..facts() }, ErrorKind::InvalidInput, "out of reach"),
            (Facts { size: u64::MAX - 511, ..facts() }, ErrorKind::InvalidInput, "too large"),
            (Facts { blocks: blocks(3, 512, 512), ..facts() }, ErrorKind::Corrupt, "minimum"),
            (Facts { blocks: blocks(0, 512, 512), ..facts() }, ErrorKind::Corrupt, "minimum"),
            (Facts { blocks: blocks(512, 1, 512), ..facts() }, ErrorKind::Corrupt, "preferred"),
            (Facts { blocks: blocks(1, 4096, 512), ..facts() }, ErrorKind::Corrupt, "maximum"),
        ] {
            let error = facts.check(&"host:1").unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.message().starts_with("host:1: ") && error.message().contains(reason), "{error}");
        }
        assert_eq!(facts().check(&"host:1").unwrap(), facts());
    }

    #[test]
    fn another_region_is_noticed() {
        let now = |now: Facts| facts().same_region(&now, &"host:1");
        now(Facts { allocation: Some(7), ..facts() }).unwrap();
        for (other, reason) in [
            (Facts { size: 512, ..facts() }, "has 512 bytes where it had 1048576"),
            (Facts { flags: facts().flags | TransmissionFlags::READ_ONLY, ..facts() }, "read-only where it was"),
            (Facts { blocks: None, ..facts() }, "other things"),
            (Facts { allocation: None, ..facts() }, "other things"),
        ] {
            let error = now(other).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict);
            assert!(error.message().contains(reason), "{error}");
        }
    }
}
