//! What a server answers in transmission (proto.md, "Simple reply message", "Structured reply chunk message",
//! "Structured reply types"; the extension's "Extended reply chunk message").

use super::bytes::{Bytes, length};
use super::{Errno, Framing, MAX_EXTENTS, MAX_STRING, Malformed, ReplyFlags, Text};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
/// The bit of a type that makes it an error.
const ERROR: u16 = 1 << 15;
/// What may follow the parts that are known of an error of an unknown type.
const ERROR_EXTRA: usize = 1 << 10;

/// A reply of its own: a request without data, or a read whose data follows if `error` is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// The number of the error, or `None`.
    pub error: Option<Errno>,
    /// The request that it answers.
    pub cookie: u64,
}

impl SimpleReply {
    /// Its length in bytes.
    pub const LEN: usize = 16;

    /// Adds it to `out`.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
        out.extend_from_slice(&self.error.map_or(0, Errno::code).to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
    }
}

/// The type of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkType {
    /// `NBD_REPLY_TYPE_NONE`: nothing; the last of its reply.
    None,
    /// `NBD_REPLY_TYPE_OFFSET_DATA`: bytes.
    Data,
    /// `NBD_REPLY_TYPE_OFFSET_HOLE`: zeros.
    Hole,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS`: extents, with structured replies.
    BlockStatus,
    /// `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`: extents, with extended headers.
    BlockStatusExt,
    /// `NBD_REPLY_TYPE_ERROR`.
    Error,
    /// `NBD_REPLY_TYPE_ERROR_OFFSET`: an error at an offset.
    ErrorOffset,
    /// An error of another type: what it begins with is known.
    UnknownError(u16),
}

impl ChunkType {
    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Data => 1,
            Self::Hole => 2,
            Self::BlockStatus => 5,
            Self::BlockStatusExt => 6,
            Self::Error => ERROR + 1,
            Self::ErrorOffset => ERROR + 2,
            Self::UnknownError(code) => code,
        }
    }

    /// From the number.
    ///
    /// # Errors
    /// If it is unknown and no error, which a client cannot skip.
    pub fn from_code(code: u16) -> Result<Self, Malformed> {
        const KNOWN: [ChunkType; 7] = [
            ChunkType::None,
            ChunkType::Data,
            ChunkType::Hole,
            ChunkType::BlockStatus,
            ChunkType::BlockStatusExt,
            ChunkType::Error,
            ChunkType::ErrorOffset,
        ];
        match KNOWN.into_iter().find(|kind| kind.code() == code) {
            Some(kind) => Ok(kind),
            None if code & ERROR != 0 => Ok(Self::UnknownError(code)),
            None => Err(Malformed::found("a chunk has an unknown type", u64::from(code))),
        }
    }

    /// Whether its reply has failed.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.code() & ERROR != 0
    }

    /// Whether so many bytes can be the payload of such a chunk, where data is limited to `max_data`.
    fn can_have(self, length: u64, max_data: u32) -> bool {
        let array = |fixed, each| {
            let elements = length.checked_sub(fixed).filter(|rest| rest % each == 0).map(|rest| rest / each);
            elements.is_some_and(|count| (1..=u64::from(MAX_EXTENTS)).contains(&count))
        };
        let error = |fixed: u64, extra: usize| (fixed..=fixed + (MAX_STRING + extra) as u64).contains(&length);
        match self {
            Self::None => length == 0,
            Self::Data => (9..=8 + u64::from(max_data)).contains(&length),
            Self::Hole => length == 12,
            Self::BlockStatus => array(4, 8),
            Self::BlockStatusExt => array(8, 16),
            Self::Error => error(6, 0),
            Self::ErrorOffset => error(14, 0),
            Self::UnknownError(_) => error(6, ERROR_EXTRA),
        }
    }
}

/// What comes before a chunk's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether it is the last of its reply.
    pub flags: ReplyFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// The request that it answers.
    pub cookie: u64,
    /// The request's offset, where headers are extended.
    pub offset: Option<u64>,
    /// The length of the payload in bytes.
    pub length: u32,
}

impl ChunkHeader {
    /// Its length in bytes with structured replies.
    pub const STRUCTURED_LEN: usize = 20;
    /// Its length in bytes with extended headers.
    pub const EXTENDED_LEN: usize = 32;

    /// Whether this is the last chunk of its reply.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.flags.contains(ReplyFlags::DONE)
    }

    /// Adds it to `out`: extended if it has an offset, else structured.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let magic = if self.offset.is_some() { EXTENDED_MAGIC } else { STRUCTURED_MAGIC };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&self.flags.bits().to_be_bytes());
        out.extend_from_slice(&self.kind.code().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        match self.offset {
            None => out.extend_from_slice(&self.length.to_be_bytes()),
            Some(offset) => {
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&u64::from(self.length).to_be_bytes());
            }
        }
    }
}

/// The beginning of any reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; a read's data follows if it is no error.
    Simple(SimpleReply),
    /// A chunk; so many bytes of payload follow as it says.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// The length in bytes of the longest header.
    pub const MAX_LEN: usize = ChunkHeader::EXTENDED_LEN;

    /// The length of this header in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self {
            Self::Simple(_) => SimpleReply::LEN,
            Self::Chunk(ChunkHeader { offset: None, .. }) => ChunkHeader::STRUCTURED_LEN,
            Self::Chunk(ChunkHeader { offset: Some(_), .. }) => ChunkHeader::EXTENDED_LEN,
        }
    }

    /// From the first bytes of `bytes`; it has [`ReplyHeader::len`] of them. `None` if it is not complete yet.
    /// `max_data` is the most bytes of data in a chunk: what the server said, or what was asked for if that is more.
    ///
    /// # Errors
    /// If it is no reply, or none of this framing, or its length is impossible for its type: the server is out of step.
    /// A wrong magic number is found as soon as it is there.
    pub fn decode(framing: Framing, max_data: u32, bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut header = Bytes::new(bytes, "a reply is too short");
        let Ok(magic) = header.u32() else { return Ok(None) };
        let len = match (framing, magic) {
            (Framing::Simple | Framing::Structured, SIMPLE_MAGIC) => SimpleReply::LEN,
            (Framing::Structured, STRUCTURED_MAGIC) => ChunkHeader::STRUCTURED_LEN,
            (Framing::Extended, EXTENDED_MAGIC) => ChunkHeader::EXTENDED_LEN,
            _ => return Err(Malformed::found("a reply has a wrong magic number", u64::from(magic))),
        };
        if bytes.len() < len {
            return Ok(None);
        }
        if magic == SIMPLE_MAGIC {
            let error = Some(header.u32()?).filter(|code| *code != 0).map(Errno::from_code);
            return Ok(Some(Self::Simple(SimpleReply { error, cookie: header.u64()? })));
        }
        chunk_header(framing, max_data, &mut header).map(|chunk| Some(Self::Chunk(chunk)))
    }
}

/// What follows the magic number of a chunk.
fn chunk_header(framing: Framing, max_data: u32, header: &mut Bytes<'_>) -> Result<ChunkHeader, Malformed> {
    let flags = ReplyFlags::from_bits_retain(header.u16()?);
    let kind = ChunkType::from_code(header.u16()?)?;
    let cookie = header.u64()?;
    let (offset, length) = match framing {
        Framing::Extended => (Some(header.u64()?), header.u64()?),
        _ => (None, u64::from(header.u32()?)),
    };
    let wrong = Malformed::found("a chunk has an impossible length", length);
    let misplaced = match kind {
        ChunkType::BlockStatus => framing == Framing::Extended,
        ChunkType::BlockStatusExt => framing != Framing::Extended,
        ChunkType::None => !flags.contains(ReplyFlags::DONE),
        _ => false,
    };
    if misplaced {
        return Err(Malformed::found("a chunk of this type has no place here", u64::from(kind.code())));
    }
    if !kind.can_have(length, max_data) {
        return Err(wrong);
    }
    Ok(ChunkHeader { flags, kind, cookie, offset, length: u32::try_from(length).map_err(|_| wrong)? })
}

/// An extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Its length in bytes, which is not zero. Structured replies hold 32 bits: longer ones are cut to a multiple of
    /// 64 KiB when they are encoded, and end the list.
    pub length: u64,
    /// What it is: for `base:allocation`, [`StateFlags`](super::StateFlags).
    pub flags: u64,
}

/// The longest extent in a structured reply.
const LONGEST: u64 = u32::MAX as u64 & !0xffff;

/// A chunk's payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// Nothing.
    None,
    /// Bytes.
    Data {
        /// Where in the export.
        offset: u64,
        /// At least one.
        bytes: &'a [u8],
    },
    /// Zeros.
    Hole {
        /// Where in the export.
        offset: u64,
        /// At least one byte.
        length: u32,
    },
    /// Extents, from the request's offset on.
    BlockStatus {
        /// The id of their context.
        context: u32,
        /// At least one.
        extents: Vec<Descriptor>,
    },
    /// The request has failed.
    Error {
        /// Why.
        error: Errno,
        /// A line for humans, or nothing.
        message: Text,
        /// Where in the export, if the server knows.
        offset: Option<u64>,
    },
}

impl Chunk<'_> {
    fn kind(&self, framing: Framing) -> ChunkType {
        match self {
            Self::None => ChunkType::None,
            Self::Data { .. } => ChunkType::Data,
            Self::Hole { .. } => ChunkType::Hole,
            Self::BlockStatus { .. } if framing == Framing::Extended => ChunkType::BlockStatusExt,
            Self::BlockStatus { .. } => ChunkType::BlockStatus,
            Self::Error { offset: None, .. } => ChunkType::Error,
            Self::Error { offset: Some(_), .. } => ChunkType::ErrorOffset,
        }
    }

    /// Adds header and payload to `out`, as a part of the answer to the request `cookie` at `offset`, in a framing that
    /// has chunks. Extents above [`MAX_EXTENTS`] are left out.
    pub fn encode(&self, framing: Framing, flags: ReplyFlags, cookie: u64, offset: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let extended = framing == Framing::Extended;
        let mut header =
            ChunkHeader { flags, kind: self.kind(framing), cookie, offset: extended.then_some(offset), length: 0 };
        header.encode(out);
        let payload = out.len();
        self.encode_payload(extended, out);
        header.length = length(out.len() - payload);
        let mut front = Vec::with_capacity(ChunkHeader::EXTENDED_LEN);
        header.encode(&mut front);
        out[start..payload].copy_from_slice(&front);
    }

    fn encode_payload(&self, extended: bool, out: &mut Vec<u8>) {
        match self {
            Self::None => {}
            Self::Data { offset, bytes } => {
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(bytes);
            }
            Self::Hole { offset, length } => {
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&length.to_be_bytes());
            }
            Self::BlockStatus { context, extents } => {
                out.extend_from_slice(&context.to_be_bytes());
                let extents = &extents[..extents.len().min(MAX_EXTENTS as usize)];
                if extended { encode_long(extents, out) } else { encode_short(extents, out) }
            }
            Self::Error { error, message, offset } => {
                out.extend_from_slice(&error.code().to_be_bytes());
                let len = u16::try_from(message.len()).expect("strings are short");
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(message.as_bytes());
                offset.iter().for_each(|offset| out.extend_from_slice(&offset.to_be_bytes()));
            }
        }
    }
}

fn encode_long(extents: &[Descriptor], out: &mut Vec<u8>) {
    out.extend_from_slice(&length(extents.len()).to_be_bytes());
    for Descriptor { length, flags } in extents {
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
    }
}

fn encode_short(extents: &[Descriptor], out: &mut Vec<u8>) {
    for Descriptor { length, flags } in extents {
        let cut = (*length).min(if *length > u64::from(u32::MAX) { LONGEST } else { *length });
        out.extend_from_slice(&u32::try_from(cut).expect("it was cut").to_be_bytes());
        // A context whose flags need more bits cannot be selected with structured replies.
        out.extend_from_slice(&u32::try_from(*flags).unwrap_or(u32::MAX).to_be_bytes());
        if cut < *length {
            break;
        }
    }
}

/// Adds to `out` what comes before `len` bytes of data at `at` in the export, so that the data itself need not be
/// copied: a chunk's header with the data's offset. Otherwise as [`Chunk::encode`].
pub fn encode_data_header(
    framing: Framing,
    flags: ReplyFlags,
    cookie: u64,
    offset: u64,
    at: u64,
    len: u32,
    out: &mut Vec<u8>,
) {
    let offset = (framing == Framing::Extended).then_some(offset);
    ChunkHeader { flags, kind: ChunkType::Data, cookie, offset, length: len.saturating_add(8) }.encode(out);
    out.extend_from_slice(&at.to_be_bytes());
}

impl<'a> Chunk<'a> {
    /// From a payload, all of it.
    ///
    /// # Errors
    /// If it contradicts itself: the server is out of step.
    pub fn decode(kind: ChunkType, payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(payload, "a chunk's payload has a wrong length");
        let chunk = match kind {
            ChunkType::None => Self::None,
            ChunkType::Data => Self::Data { offset: bytes.u64()?, bytes: bytes.rest() },
            ChunkType::Hole => Self::Hole { offset: bytes.u64()?, length: bytes.u32()? },
            ChunkType::BlockStatus => {
                let (context, count) = (bytes.u32()?, bytes.len() / 8);
                let read = |bytes: &mut Bytes<'_>| Ok((bytes.u32()?.into(), bytes.u32()?.into()));
                Self::BlockStatus { context, extents: descriptors(&mut bytes, count, read)? }
            }
            ChunkType::BlockStatusExt => {
                let (context, said, count) = (bytes.u32()?, bytes.u32()?, bytes.len() / 16);
                if u64::from(said) != count as u64 {
                    return Err(Malformed::found("the number of extents is wrong", u64::from(said)));
                }
                let read = |bytes: &mut Bytes<'_>| Ok((bytes.u64()?, bytes.u64()?));
                Self::BlockStatus { context, extents: descriptors(&mut bytes, count, read)? }
            }
            ChunkType::Error | ChunkType::ErrorOffset | ChunkType::UnknownError(_) => decode_error(kind, &mut bytes)?,
        };
        bytes.end()?;
        match chunk {
            Self::Data { bytes: [], .. } | Self::Hole { length: 0, .. } => {
                Err(Malformed::new("a chunk describes no bytes"))
            }
            chunk => Ok(chunk),
        }
    }
}

fn decode_error<'a>(kind: ChunkType, bytes: &mut Bytes<'_>) -> Result<Chunk<'a>, Malformed> {
    let (code, len) = (bytes.u32()?, bytes.u16()?);
    if code == 0 {
        return Err(Malformed::new("an error chunk says that there is no error"));
    }
    let message = Text::cut(&String::from_utf8_lossy(bytes.take(len.into())?));
    let offset = match kind {
        ChunkType::ErrorOffset => Some(bytes.u64()?),
        ChunkType::UnknownError(_) => {
            bytes.rest();
            None
        }
        _ => None,
    };
    Ok(Chunk::Error { error: Errno::from_code(code), message, offset })
}

fn descriptors(
    bytes: &mut Bytes<'_>,
    count: usize,
    read: impl Fn(&mut Bytes<'_>) -> Result<(u64, u64), Malformed>,
) -> Result<Vec<Descriptor>, Malformed> {
    if count == 0 {
        return Err(Malformed::new("a chunk has no extents"));
    }
    let one = |_| match read(bytes)? {
        (0, _) => Err(Malformed::new("an extent is empty")),
        (length, flags) => Ok(Descriptor { length, flags }),
    };
    (0..count).map(one).collect()
}
