//! What a client asks for while haggling (proto.md, "Option types").

use super::bytes::{Bytes, length};
use super::handshake::OPTION_MAGIC;
use super::{MAX_OPTION, Malformed, Text};

/// Which option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OptionCode {
    /// `NBD_OPT_EXPORT_NAME`: choose an export and begin, without any error but a closed connection.
    ExportName,
    /// `NBD_OPT_ABORT`: end the session.
    Abort,
    /// `NBD_OPT_LIST`: name the exports.
    List,
    /// `NBD_OPT_STARTTLS`: go on over TLS.
    StartTls,
    /// `NBD_OPT_INFO`: tell about an export.
    Info,
    /// `NBD_OPT_GO`: tell about it and begin.
    Go,
    /// `NBD_OPT_STRUCTURED_REPLY`.
    StructuredReply,
    /// `NBD_OPT_LIST_META_CONTEXT`: name metadata contexts.
    ListMetaContext,
    /// `NBD_OPT_SET_META_CONTEXT`: select metadata contexts.
    SetMetaContext,
    /// `NBD_OPT_EXTENDED_HEADERS`.
    ExtendedHeaders,
    /// Another, which a server answers with `Unsupported`.
    Unknown(u32),
}

impl OptionCode {
    /// Every option that is known.
    pub const ALL: [Self; 10] = [
        Self::ExportName,
        Self::Abort,
        Self::List,
        Self::StartTls,
        Self::Info,
        Self::Go,
        Self::StructuredReply,
        Self::ListMetaContext,
        Self::SetMetaContext,
        Self::ExtendedHeaders,
    ];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::StartTls => 5,
            Self::Info => 6,
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::ListMetaContext => 9,
            Self::SetMetaContext => 10,
            Self::ExtendedHeaders => 11,
            Self::Unknown(code) => code,
        }
    }

    /// From the number.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        Self::ALL.into_iter().find(|option| option.code() == code).unwrap_or(Self::Unknown(code))
    }
}

/// What comes before an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub code: OptionCode,
    /// The length of its data in bytes, as the client says: see [`OptionHeader::fits`].
    pub length: u32,
}

impl OptionHeader {
    /// Its length in bytes.
    pub const LEN: usize = 16;

    /// As bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.code.code().to_be_bytes());
        bytes[12..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// If the magic number is wrong: the client is out of step.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(bytes, "an option's header is too short");
        match bytes.u64()? {
            OPTION_MAGIC => Ok(Self { code: OptionCode::from_code(bytes.u32()?), length: bytes.u32()? }),
            other => Err(Malformed::found("an option has a wrong magic number", other)),
        }
    }

    /// Whether the data is short enough to be read into memory. Longer data is skipped, and answered with `TooBig`.
    #[must_use]
    pub fn fits(self) -> bool {
        self.length <= MAX_OPTION
    }
}

/// Something that a client wants to know of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InfoType {
    /// `NBD_INFO_EXPORT`: size and flags.
    Export,
    /// `NBD_INFO_NAME`: its canonical name.
    Name,
    /// `NBD_INFO_DESCRIPTION`: a line for humans.
    Description,
    /// `NBD_INFO_BLOCK_SIZE`: size constraints.
    BlockSize,
    /// Another, to be ignored.
    Unknown(u16),
}

impl InfoType {
    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Export => 0,
            Self::Name => 1,
            Self::Description => 2,
            Self::BlockSize => 3,
            Self::Unknown(code) => code,
        }
    }

    /// From the number.
    #[must_use]
    pub fn from_code(code: u16) -> Self {
        match code {
            0 => Self::Export,
            1 => Self::Name,
            2 => Self::Description,
            3 => Self::BlockSize,
            code => Self::Unknown(code),
        }
    }
}

/// The data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// The export; the default one if empty.
    pub name: Text,
    /// What the client wants to know beside [`InfoType::Export`].
    pub wanted: Vec<InfoType>,
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export; the default one if empty.
    pub name: Text,
    /// Each a namespace, a colon and what that namespace makes of the rest.
    pub queries: Vec<Text>,
}

/// An option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// Choose this export and begin.
    ExportName(Text),
    /// End the session.
    Abort,
    /// Name the exports.
    List,
    /// Go on over TLS.
    StartTls,
    /// Tell about an export.
    Info(InfoRequest),
    /// Tell about an export and begin.
    Go(InfoRequest),
    /// Use structured replies.
    StructuredReply,
    /// Name metadata contexts.
    ListMetaContext(MetaRequest),
    /// Select metadata contexts.
    SetMetaContext(MetaRequest),
    /// Use extended headers.
    ExtendedHeaders,
    /// Another; its data is not kept.
    Unknown(u32),
}

impl ClientOption {
    /// Which option.
    #[must_use]
    pub fn code(&self) -> OptionCode {
        match self {
            Self::ExportName(_) => OptionCode::ExportName,
            Self::Abort => OptionCode::Abort,
            Self::List => OptionCode::List,
            Self::StartTls => OptionCode::StartTls,
            Self::Info(_) => OptionCode::Info,
            Self::Go(_) => OptionCode::Go,
            Self::StructuredReply => OptionCode::StructuredReply,
            Self::ListMetaContext(_) => OptionCode::ListMetaContext,
            Self::SetMetaContext(_) => OptionCode::SetMetaContext,
            Self::ExtendedHeaders => OptionCode::ExtendedHeaders,
            Self::Unknown(code) => OptionCode::Unknown(*code),
        }
    }

    /// Adds header and data to `out`.
    ///
    /// # Panics
    /// If the lists have more than 65535 or 2³² elements.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; OptionHeader::LEN]);
        match self {
            Self::ExportName(name) => out.extend_from_slice(name.as_bytes()),
            Self::Info(request) | Self::Go(request) => request.encode(out),
            Self::ListMetaContext(request) | Self::SetMetaContext(request) => request.encode(out),
            _ => {}
        }
        let length = length(out.len() - start - OptionHeader::LEN);
        let header = OptionHeader { code: self.code(), length }.encode();
        out[start..start + OptionHeader::LEN].copy_from_slice(&header);
    }

    /// From an option's data, all of it.
    ///
    /// # Errors
    /// What a server answers with `Invalid`.
    pub fn decode(code: OptionCode, data: &[u8]) -> Result<Self, Malformed> {
        let none = |option| match data.len() {
            0 => Ok(option),
            len => Err(Malformed::found("an option that takes no data has some", len as u64)),
        };
        match code {
            OptionCode::ExportName => Text::decode(data).map(Self::ExportName),
            // Whatever a client sends with it is to be ignored.
            OptionCode::Abort => Ok(Self::Abort),
            OptionCode::List => none(Self::List),
            OptionCode::StartTls => none(Self::StartTls),
            OptionCode::Info => InfoRequest::decode(data).map(Self::Info),
            OptionCode::Go => InfoRequest::decode(data).map(Self::Go),
            OptionCode::StructuredReply => none(Self::StructuredReply),
            OptionCode::ListMetaContext => MetaRequest::decode(data).map(Self::ListMetaContext),
            OptionCode::SetMetaContext => MetaRequest::decode(data).map(Self::SetMetaContext),
            OptionCode::ExtendedHeaders => none(Self::ExtendedHeaders),
            OptionCode::Unknown(code) => Ok(Self::Unknown(code)),
        }
    }
}

impl InfoRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        self.name.encode(out);
        let count = u16::try_from(self.wanted.len()).expect("there are a handful of kinds of information");
        out.extend_from_slice(&count.to_be_bytes());
        self.wanted.iter().for_each(|wanted| out.extend_from_slice(&wanted.code().to_be_bytes()));
    }

    fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(data, "the lengths in INFO or GO contradict each other");
        let (name, count) = (bytes.text()?, bytes.u16()?);
        if bytes.len() != usize::from(count) * 2 {
            return Err(Malformed::new("the number of information requests in INFO or GO is wrong"));
        }
        let wanted = (0..count).map(|_| bytes.u16().map(InfoType::from_code)).collect::<Result<_, _>>()?;
        Ok(Self { name, wanted })
    }
}

impl MetaRequest {
    fn encode(&self, out: &mut Vec<u8>) {
        self.name.encode(out);
        out.extend_from_slice(&length(self.queries.len()).to_be_bytes());
        self.queries.iter().for_each(|query| query.encode(out));
    }

    fn decode(data: &[u8]) -> Result<Self, Malformed> {
        let mut bytes = Bytes::new(data, "the lengths in a request for metadata contexts contradict each other");
        let (name, count) = (bytes.text()?, bytes.u32()?);
        // Each takes four bytes at least: more cannot be, and nothing is allocated for them.
        if u64::from(count) > bytes.len() as u64 / 4 {
            return Err(Malformed::found("a request has more queries than data", u64::from(count)));
        }
        let queries = (0..count).map(|_| bytes.text()).collect::<Result<_, _>>()?;
        bytes.end()?;
        Ok(Self { name, queries })
    }
}
