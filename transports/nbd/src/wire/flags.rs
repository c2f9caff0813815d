//! The protocol's flag fields. Unknown bits are kept, so that whoever must refuse them can see them.

use bitflags::bitflags;

bitflags! {
    /// What a server offers in its greeting (proto.md, "Handshake flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct HandshakeFlags: u16 {
        /// `NBD_FLAG_FIXED_NEWSTYLE`: options are answered.
        const FIXED_NEWSTYLE = 1 << 0;
        /// `NBD_FLAG_NO_ZEROES`: the 124 zeros after `EXPORT_NAME` can be left out.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What a client takes of it (proto.md, "Client flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ClientFlags: u32 {
        /// `NBD_FLAG_C_FIXED_NEWSTYLE`.
        const FIXED_NEWSTYLE = 1 << 0;
        /// `NBD_FLAG_C_NO_ZEROES`.
        const NO_ZEROES = 1 << 1;
        const _ = !0;
    }

    /// What can be done with an export (proto.md, "Transmission flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct TransmissionFlags: u16 {
        /// `NBD_FLAG_HAS_FLAGS`: always.
        const HAS_FLAGS = 1 << 0;
        /// `NBD_FLAG_READ_ONLY`.
        const READ_ONLY = 1 << 1;
        /// `NBD_FLAG_SEND_FLUSH`: it takes `FLUSH`.
        const SEND_FLUSH = 1 << 2;
        /// `NBD_FLAG_SEND_FUA`: it takes [`CommandFlags::FUA`].
        const SEND_FUA = 1 << 3;
        /// `NBD_FLAG_ROTATIONAL`.
        const ROTATIONAL = 1 << 4;
        /// `NBD_FLAG_SEND_TRIM`: it takes `TRIM`.
        const SEND_TRIM = 1 << 5;
        /// `NBD_FLAG_SEND_WRITE_ZEROES`: it takes `WRITE_ZEROES` and [`CommandFlags::NO_HOLE`].
        const SEND_WRITE_ZEROES = 1 << 6;
        /// `NBD_FLAG_SEND_DF`: it takes [`CommandFlags::DF`].
        const SEND_DF = 1 << 7;
        /// `NBD_FLAG_CAN_MULTI_CONN`: a flush on one connection covers what was written on all.
        const CAN_MULTI_CONN = 1 << 8;
        /// `NBD_FLAG_SEND_RESIZE`: of an extension that this crate does not speak.
        const SEND_RESIZE = 1 << 9;
        /// `NBD_FLAG_SEND_CACHE`: it takes `CACHE`.
        const SEND_CACHE = 1 << 10;
        /// `NBD_FLAG_SEND_FAST_ZERO`: it takes [`CommandFlags::FAST_ZERO`].
        const SEND_FAST_ZERO = 1 << 11;
        /// `NBD_FLAG_BLOCK_STATUS_PAYLOAD`: `BLOCK_STATUS` may say which contexts it is about.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
        const _ = !0;
    }

    /// How a command is to be done (proto.md, "Command flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct CommandFlags: u16 {
        /// `NBD_CMD_FLAG_FUA`: durable before it is answered.
        const FUA = 1 << 0;
        /// `NBD_CMD_FLAG_NO_HOLE`: zeros that have storage.
        const NO_HOLE = 1 << 1;
        /// `NBD_CMD_FLAG_DF`: at most one chunk with content.
        const DF = 1 << 2;
        /// `NBD_CMD_FLAG_REQ_ONE`: one extent only.
        const REQ_ONE = 1 << 3;
        /// `NBD_CMD_FLAG_FAST_ZERO`: fail with `ENOTSUP` rather than be as slow as writing.
        const FAST_ZERO = 1 << 4;
        /// `NBD_CMD_FLAG_PAYLOAD_LEN`: the length is that of the payload (extended headers).
        const PAYLOAD_LEN = 1 << 5;
        const _ = !0;
    }

    /// About a chunk of a reply (proto.md, "Structured reply flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ReplyFlags: u16 {
        /// `NBD_REPLY_FLAG_DONE`: the last chunk of its reply.
        const DONE = 1 << 0;
        const _ = !0;
    }

    /// What an extent of `base:allocation` is (proto.md, "`base:allocation` metadata context").
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct StateFlags: u64 {
        /// `NBD_STATE_HOLE`: nothing is stored there.
        const HOLE = 1 << 0;
        /// `NBD_STATE_ZERO`: it reads as zeros.
        const ZERO = 1 << 1;
        const _ = !0;
    }
}
