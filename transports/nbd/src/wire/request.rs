//! What a client asks for in transmission (proto.md, "Request message" and "Request types").

use super::bytes::Bytes;
use super::{CommandFlags, Framing, Malformed};

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Which command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`: the only one with data in every framing.
    Write,
    /// `NBD_CMD_DISC`: end the session; there is no reply.
    Disconnect,
    /// `NBD_CMD_FLUSH`.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_CACHE`: it will be read soon.
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`: which extents there are.
    BlockStatus,
    /// Another, which a server answers with `EINVAL`.
    Unknown(u16),
}

impl Command {
    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(code) => code,
        }
    }

    /// From the number.
    #[must_use]
    pub fn from_code(code: u16) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            code => Self::Unknown(code),
        }
    }
}

/// A request, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// How to do it.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// What the client calls it; its replies carry the same.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes of the export, or of payload: see [`Request::payload_len`]. Compact headers hold 32 bits.
    pub length: u64,
}

impl Request {
    /// The length in bytes of the longest header.
    pub const MAX_LEN: usize = 32;

    /// The length of a header in bytes.
    #[must_use]
    pub const fn len(framing: Framing) -> usize {
        match framing {
            Framing::Simple | Framing::Structured => 28,
            Framing::Extended => 32,
        }
    }

    /// How many bytes of payload follow, as the client says: check it before anything is allocated for them.
    #[must_use]
    pub fn payload_len(&self, framing: Framing) -> u64 {
        // A write has one also without the flag that a client must set then: qemu 10.0 does not.
        let says_so = framing == Framing::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        let carries = self.command == Command::Write || says_so;
        if carries { self.length } else { 0 }
    }

    /// Adds the header to `out`.
    ///
    /// # Errors
    /// If the length is above 32 bits and the header compact.
    pub fn encode(&self, framing: Framing, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let compact = framing != Framing::Extended;
        let short = u32::try_from(self.length).ok();
        if compact && short.is_none() {
            return Err(Malformed::found("a length does not fit a compact request", self.length));
        }
        out.extend_from_slice(&if compact { COMPACT_MAGIC } else { EXTENDED_MAGIC }.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.extend_from_slice(&self.command.code().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        match short {
            Some(short) if compact => out.extend_from_slice(&short.to_be_bytes()),
            _ => out.extend_from_slice(&self.length.to_be_bytes()),
        }
        Ok(())
    }

    /// From the first bytes of `bytes`. `None` if the header is not complete yet; it has [`Request::len`] bytes.
    ///
    /// # Errors
    /// If the magic number is wrong: the client is out of step. Found as soon as the number is there.
    pub fn decode(framing: Framing, bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut header = Bytes::new(bytes, "a request is too short");
        let expected = if framing == Framing::Extended { EXTENDED_MAGIC } else { COMPACT_MAGIC };
        match header.u32() {
            Err(_) => return Ok(None),
            Ok(magic) if magic == expected => {}
            Ok(magic) => return Err(Malformed::found("a request has a wrong magic number", u64::from(magic))),
        }
        if bytes.len() < Self::len(framing) {
            return Ok(None);
        }
        Ok(Some(Self {
            flags: CommandFlags::from_bits_retain(header.u16()?),
            command: Command::from_code(header.u16()?),
            cookie: header.u64()?,
            offset: header.u64()?,
            length: if framing == Framing::Extended { header.u64()? } else { header.u32()?.into() },
        }))
    }
}

/// The payload of a `BLOCK_STATUS` that says which contexts it is about (extended headers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusPayload {
    /// How many bytes of the export it is about.
    pub length: u64,
    /// The ids of the contexts.
    pub contexts: Vec<u32>,
}

impl StatusPayload {
    /// Adds it to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.length.to_be_bytes());
        self.contexts.iter().for_each(|context| out.extend_from_slice(&context.to_be_bytes()));
    }

    /// From a payload, all of it.
    ///
    /// # Errors
    /// If it has an impossible length.
    pub fn decode(payload: &[u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(payload, "the payload of BLOCK_STATUS has a wrong length");
        let length = bytes.u64()?;
        let contexts = (0..bytes.len() / 4).map(|_| bytes.u32()).collect::<Result<_, _>>()?;
        bytes.end()?;
        Ok(Self { length, contexts })
    }
}
