//! The NBD protocol's messages, both ways, without I/O: bytes in, messages out, and back. No socket, no clock, no
//! state of a connection; those are in `server` and `client`.
//!
//! The source of truth is the NBD project's `doc/proto.md`, and its branch `extension-ext-header` for extended headers.
//! Item names follow it. Numbers are big-endian.
//!
//! # How a connection goes
//!
//! ```text
//! client                                            server
//!   │                        Greeting (18 bytes)       │
//!   │◄─────────────────────────────────────────────────│   NBDMAGIC IHAVEOPT handshake flags
//!   │ ClientFlags (4 bytes)                            │
//!   │─────────────────────────────────────────────────►│
//!   │ OptionHeader + ClientOption                      │ ┐
//!   │─────────────────────────────────────────────────►│ │ haggling: the client sends one option and waits
//!   │        OptionReplyHeader + OptionReply, or more  │ │ for its last reply before it sends the next
//!   │◄─────────────────────────────────────────────────│ ┘
//!   │ GO                                     INFO, ACK │
//!   │◄────────────────────────────────────────────────►│   or EXPORT_NAME and ExportReply
//!   │ Request (+ payload)                              │ ┐
//!   │─────────────────────────────────────────────────►│ │ transmission: many requests at once, replies in any
//!   │           SimpleReply (+ data) or ChunkHeader …  │ │ order, chunks of different requests interleaved;
//!   │◄─────────────────────────────────────────────────│ ┘ the cookie says which request is meant
//!   │ Request DISC                                     │
//!   │─────────────────────────────────────────────────►│   the server answers what is in flight and closes
//! ```
//!
//! # States
//!
//! ```text
//! greeting ──► haggling ──STARTTLS, ACK──► TLS handshake ──► haggling (nothing that was negotiated is kept)
//!                 │ ├──ABORT, ACK──► closed
//!                 │ └──STRUCTURED_REPLY / EXTENDED_HEADERS, ACK──► haggling with that Framing
//!                 └──GO, ACK or EXPORT_NAME──► transmission in that Framing ──DISC or end of stream──► closed
//! ```
//!
//! # The version rule
//!
//! There is no version number. The server offers [`HandshakeFlags`] and [`TransmissionFlags`], the client takes what it
//! knows and ignores the rest; everything else is asked for by an option, and an unknown option is answered with
//! [`ReplyError::Unsupported`], after which the client goes on without. A command, a command flag or a chunk type is
//! used only after it was offered so: a server answers others with `EINVAL`, a client gives the connection up. This
//! crate speaks the fixed newstyle handshake only; the older ones are recognised and refused.
//!
//! # Lengths
//!
//! Every decoder is given bytes that somebody has read, so it never allocates more than it was given. The headers say
//! how much to read next; those lengths are checked here, against [`MAX_STRING`], [`MAX_OPTION`], [`MAX_EXTENTS`] and
//! the payload limit that the caller gives, before anybody allocates.

mod bytes;
mod chunk;
mod errno;
mod flags;
mod handshake;
mod option;
mod reply;
mod request;
mod text;

pub use chunk::{Chunk, ChunkHeader, ChunkType, Descriptor, ReplyHeader, SimpleReply, encode_data_header};
pub use errno::Errno;
pub use flags::{ClientFlags, CommandFlags, HandshakeFlags, ReplyFlags, StateFlags, TransmissionFlags};
pub use handshake::{ExportReply, Greeting};
pub use option::{ClientOption, InfoRequest, InfoType, MetaRequest, OptionCode, OptionHeader};
pub use reply::{BlockSizes, Info, OptionReply, OptionReplyHeader, ReplyError};
pub use request::{Command, Request, StatusPayload};
pub use text::Text;

/// The port that IANA reserved for NBD.
pub const PORT: u16 = 10809;
/// The most bytes in a string (proto.md, "Conventions").
pub const MAX_STRING: usize = 4096;
/// The most bytes of data that this crate reads for one option, and for one reply to an option. The longest that makes
/// sense are a name and some queries.
pub const MAX_OPTION: u32 = 64 << 10;
/// The most extents in one chunk (proto.md, `NBD_REPLY_TYPE_BLOCK_STATUS`).
pub const MAX_EXTENTS: u32 = 1 << 20;
/// The most bytes of payload where the server says nothing else (proto.md, "Size constraints").
pub const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;
/// The name of the one metadata context that the protocol defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Which headers are spoken in transmission. Each includes what the one before it can express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Framing {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; replies that carry data are structured, others may be simple.
    Structured,
    /// Extended requests and replies only.
    Extended,
}

/// Bytes that are no message of the protocol, or a message that cannot be expressed in it. One line, for a log or for
/// the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    what: &'static str,
    found: Option<u64>,
}

impl Malformed {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what, found: None }
    }

    pub(crate) const fn found(what: &'static str, found: u64) -> Self {
        Self { what, found: Some(found) }
    }
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.what)?;
        match self.found {
            Some(found) => write!(f, " ({found:#x})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Malformed {}
