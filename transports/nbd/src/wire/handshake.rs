//! What is said once at the beginning, and the reply to `EXPORT_NAME`, the one option without a reply header.

use super::bytes::Bytes;
use super::{ClientFlags, HandshakeFlags, Malformed, TransmissionFlags};

const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// `IHAVEOPT`, in the greeting and before each option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

/// The first thing that a server says (proto.md, "Newstyle negotiation").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// What it offers.
    pub flags: HandshakeFlags,
}

impl Greeting {
    /// Its length in bytes.
    pub const LEN: usize = 18;

    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&INIT_PASSWD.to_be_bytes());
        bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[16..].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// If it is no NBD server, or one that speaks the old style.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(bytes, "a greeting is too short");
        match (bytes.u64()?, bytes.u64()?) {
            (INIT_PASSWD, OPTION_MAGIC) => {}
            (INIT_PASSWD, OLD_STYLE_MAGIC) => {
                return Err(Malformed::new("the server speaks the old-style handshake, which has no options"));
            }
            (INIT_PASSWD, other) => return Err(Malformed::found("the server greets with an unknown style", other)),
            (other, _) => return Err(Malformed::found("what answers is no NBD server", other)),
        }
        Ok(Self { flags: HandshakeFlags::from_bits_retain(bytes.u16()?) })
    }
}

impl ClientFlags {
    /// The length of the field in bytes.
    pub const LEN: usize = 4;

    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        self.bits().to_be_bytes()
    }

    /// From bytes, with unknown bits.
    #[must_use]
    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        Self::from_bits_retain(u32::from_be_bytes(bytes))
    }
}

/// The answer to `EXPORT_NAME`: transmission begins right after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportReply {
    /// The export's size in bytes.
    pub size: u64,
    /// What can be done with it.
    pub flags: TransmissionFlags,
}

impl ExportReply {
    /// Its length in bytes, without the zeros.
    pub const LEN: usize = 10;
    /// How many zeros follow unless both sides said `NO_ZEROES`.
    pub const ZEROES: usize = 124;

    /// Adds it to `out`, with the zeros if `zeroes`.
    pub fn encode(self, zeroes: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.resize(out.len() + if zeroes { Self::ZEROES } else { 0 }, 0);
    }

    /// From bytes, without the zeros.
    ///
    /// # Errors
    /// If it has no flags at all, which no server may send.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(bytes, "an export's reply is too short");
        let (size, flags) = (bytes.u64()?, TransmissionFlags::from_bits_retain(bytes.u16()?));
        Ok(Self { size, flags: has_flags(flags)? })
    }
}

/// Every server sets `HAS_FLAGS`: its absence betrays a peer that is out of step.
pub(super) fn has_flags(flags: TransmissionFlags) -> Result<TransmissionFlags, Malformed> {
    if flags.contains(TransmissionFlags::HAS_FLAGS) {
        Ok(flags)
    } else {
        Err(Malformed::found("transmission flags lack HAS_FLAGS", u64::from(flags.bits())))
    }
}
