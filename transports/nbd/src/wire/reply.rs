//! What a server answers to an option (proto.md, "Option reply types").

use super::bytes::{Bytes, length};
use super::handshake::has_flags;
use super::{InfoType, MAX_OPTION, Malformed, OptionCode, Text, TransmissionFlags};

const MAGIC: u64 = 0x0003_e889_0455_65a9;
const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;
const ERROR: u32 = 1 << 31;

/// What comes before a reply's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that it answers.
    pub option: OptionCode,
    /// The type of the reply, for [`OptionReply::decode`].
    pub kind: u32,
    /// The length of its data in bytes, at most [`MAX_OPTION`].
    pub length: u32,
}

impl OptionReplyHeader {
    /// Its length in bytes.
    pub const LEN: usize = 20;

    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.option.code().to_be_bytes());
        bytes[12..16].copy_from_slice(&self.kind.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// If the magic number is wrong or the data too long.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(bytes, "an option's reply is too short");
        match bytes.u64()? {
            MAGIC => {}
            other => return Err(Malformed::found("a reply to an option has a wrong magic number", other)),
        }
        let option = OptionCode::from_code(bytes.u32()?);
        let (kind, length) = (bytes.u32()?, bytes.u32()?);
        match length {
            ..=MAX_OPTION => Ok(Self { option, kind, length }),
            length => Err(Malformed::found("a reply to an option is too long", u64::from(length))),
        }
    }
}

/// Why an option was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplyError {
    /// `NBD_REP_ERR_UNSUP`: the server does not know the option.
    Unsupported,
    /// `NBD_REP_ERR_POLICY`: the server may not do that.
    Policy,
    /// `NBD_REP_ERR_INVALID`: the option makes no sense as sent, or now.
    Invalid,
    /// `NBD_REP_ERR_PLATFORM`: not on this platform.
    Platform,
    /// `NBD_REP_ERR_TLS_REQD`: only over TLS.
    TlsRequired,
    /// `NBD_REP_ERR_UNKNOWN`: there is no such export.
    UnknownExport,
    /// `NBD_REP_ERR_SHUTDOWN`: the server is being shut down.
    Shutdown,
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`: only if size constraints are asked for.
    BlockSizeRequired,
    /// `NBD_REP_ERR_TOO_BIG`: the request or the reply is too long.
    TooBig,
    /// `NBD_REP_ERR_EXT_HEADER_REQD`: only with extended headers.
    ExtendedHeadersRequired,
    /// Another; the number has bit 31 set.
    Unknown(u32),
}

impl ReplyError {
    /// Every error that is known, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Unsupported,
        Self::Policy,
        Self::Invalid,
        Self::Platform,
        Self::TlsRequired,
        Self::UnknownExport,
        Self::Shutdown,
        Self::BlockSizeRequired,
        Self::TooBig,
        Self::ExtendedHeadersRequired,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        let number = match self {
            Self::Unsupported => 1,
            Self::Policy => 2,
            Self::Invalid => 3,
            Self::Platform => 4,
            Self::TlsRequired => 5,
            Self::UnknownExport => 6,
            Self::Shutdown => 7,
            Self::BlockSizeRequired => 8,
            Self::TooBig => 9,
            Self::ExtendedHeadersRequired => 10,
            Self::Unknown(code) => code,
        };
        ERROR | number
    }

    fn from_code(code: u32) -> Self {
        Self::ALL.into_iter().find(|error| error.code() == code).unwrap_or(Self::Unknown(code))
    }
}

impl std::fmt::Display for ReplyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "the option is not supported",
            Self::Policy => "the server does not allow the option",
            Self::Invalid => "the option is invalid",
            Self::Platform => "the option is not supported on the server's platform",
            Self::TlsRequired => "TLS is required",
            Self::UnknownExport => "there is no such export",
            Self::Shutdown => "the server is being shut down",
            Self::BlockSizeRequired => "the export's block sizes must be asked for",
            Self::TooBig => "the request or its reply is too long",
            Self::ExtendedHeadersRequired => "extended headers are required",
            Self::Unknown(code) => return write!(f, "error {code:#x}"),
        })
    }
}

/// Which requests an export takes, in bytes (proto.md, "Size constraints").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it: a power of two, at most 64 KiB.
    pub minimum: u32,
    /// Multiples of it are efficient: a power of two, at least 512 and at least `minimum`.
    pub preferred: u32,
    /// The most data in one request; at least `preferred`.
    pub maximum: u32,
}

impl BlockSizes {
    /// Whether they keep the protocol's rules.
    ///
    /// # Errors
    /// Names the rule that is broken.
    pub fn check(self) -> Result<Self, Malformed> {
        let Self { minimum, preferred, maximum } = self;
        if !minimum.is_power_of_two() || minimum > 1 << 16 {
            return Err(Malformed::found("the minimum block size is no power of two up to 64 KiB", minimum.into()));
        }
        if !preferred.is_power_of_two() || preferred < minimum.max(512) {
            return Err(Malformed::found("the preferred block size is no power of two from 512 on", preferred.into()));
        }
        if maximum < preferred {
            return Err(Malformed::found("the maximum block size is below the preferred one", maximum.into()));
        }
        Ok(self)
    }
}

/// Something about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export {
        /// The size in bytes.
        size: u64,
        /// What can be done with it.
        flags: TransmissionFlags,
    },
    /// Its canonical name.
    Name(Text),
    /// A line for humans.
    Description(Text),
    /// Size constraints, as they were sent: see [`BlockSizes::check`].
    BlockSize(BlockSizes),
    /// Something else, to be ignored.
    Unknown(u16),
}

impl Info {
    fn kind(&self) -> InfoType {
        match self {
            Self::Export { .. } => InfoType::Export,
            Self::Name(_) => InfoType::Name,
            Self::Description(_) => InfoType::Description,
            Self::BlockSize(_) => InfoType::BlockSize,
            Self::Unknown(code) => InfoType::Unknown(*code),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.kind().code().to_be_bytes());
        match self {
            Self::Export { size, flags } => {
                out.extend_from_slice(&size.to_be_bytes());
                out.extend_from_slice(&flags.bits().to_be_bytes());
            }
            Self::Name(text) | Self::Description(text) => out.extend_from_slice(text.as_bytes()),
            Self::BlockSize(BlockSizes { minimum, preferred, maximum }) => {
                [minimum, preferred, maximum].iter().for_each(|size| out.extend_from_slice(&size.to_be_bytes()));
            }
            Self::Unknown(_) => {}
        }
    }

    fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(data, "information about an export has a wrong length");
        let info = match InfoType::from_code(bytes.u16()?) {
            InfoType::Export => Self::Export {
                size: bytes.u64()?,
                flags: has_flags(TransmissionFlags::from_bits_retain(bytes.u16()?))?,
            },
            InfoType::Name => Self::Name(Text::decode(bytes.rest())?),
            InfoType::Description => Self::Description(Text::decode(bytes.rest())?),
            InfoType::BlockSize => {
                Self::BlockSize(BlockSizes { minimum: bytes.u32()?, preferred: bytes.u32()?, maximum: bytes.u32()? })
            }
            InfoType::Unknown(code) => {
                bytes.rest();
                Self::Unknown(code)
            }
        };
        bytes.end()?;
        Ok(info)
    }
}

/// A reply with its data. `Ack` and `Error` are the last to their option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done.
    Ack,
    /// An export.
    Server {
        /// Its name.
        name: Text,
        /// A line for humans, or nothing.
        description: Text,
    },
    /// Something about the export.
    Info(Info),
    /// A metadata context.
    MetaContext {
        /// What it is called in transmission, if it was selected.
        id: u32,
        /// Its name.
        name: Text,
    },
    /// Refused.
    Error {
        /// Why.
        error: ReplyError,
        /// A line for humans, or nothing.
        message: Text,
    },
}

impl OptionReply {
    /// A refusal.
    #[must_use]
    pub fn error(error: ReplyError, message: &str) -> Self {
        Self::Error { error, message: Text::cut(message) }
    }

    fn kind(&self) -> u32 {
        match self {
            Self::Ack => ACK,
            Self::Server { .. } => SERVER,
            Self::Info(_) => INFO,
            Self::MetaContext { .. } => META_CONTEXT,
            Self::Error { error, .. } => error.code(),
        }
    }

    /// Adds header and data, as an answer to `option`, to `out`.
    pub fn encode(&self, option: OptionCode, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; OptionReplyHeader::LEN]);
        match self {
            Self::Ack => {}
            Self::Server { name, description } => {
                name.encode(out);
                out.extend_from_slice(description.as_bytes());
            }
            Self::Info(info) => info.encode(out),
            Self::MetaContext { id, name } => {
                out.extend_from_slice(&id.to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            Self::Error { message, .. } => out.extend_from_slice(message.as_bytes()),
        }
        let length = length(out.len() - start - OptionReplyHeader::LEN);
        let header = OptionReplyHeader { option, kind: self.kind(), length }.encode();
        out[start..start + OptionReplyHeader::LEN].copy_from_slice(&header);
    }

    /// From the type and the data, all of it. What a server says beside an error is cut rather than refused.
    ///
    /// # Errors
    /// If the data is not as the type wants it, or the type is unknown and no error.
    pub fn decode(kind: u32, data: &[u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(data, "the lengths in a reply to an option contradict each other");
        let reply = match kind {
            ACK => Self::Ack,
            SERVER => Self::Server { name: bytes.text()?, description: Text::decode(bytes.rest())? },
            INFO => Self::Info(Info::decode(bytes.rest())?),
            META_CONTEXT => Self::MetaContext { id: bytes.u32()?, name: Text::decode(bytes.rest())? },
            kind if kind & ERROR != 0 => {
                let message = Text::cut(&String::from_utf8_lossy(bytes.rest()));
                Self::Error { error: ReplyError::from_code(kind), message }
            }
            kind => return Err(Malformed::found("a reply to an option has an unknown type", u64::from(kind))),
        };
        bytes.end()?;
        Ok(reply)
    }
}
