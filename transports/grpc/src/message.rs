//! gRPC messages: protobuf behind a five-byte prefix (a compression flag, then the length as a big-endian u32).
//!
//! A message that carries data has it in one `bytes` field, the [`Bulk::FIELD`]. It is put behind the rest when the
//! message is written, and given out as it comes when it is received (see `exchange`), so that nothing gathers it. This
//! is plain protobuf: any other implementation reads and writes the same bytes.

use bytes::{Buf, BufMut, BytesMut};
use prost::DecodeError;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::proto::{go, region};
use crate::rope::Rope;

/// Bytes before each message.
pub(crate) const PREFIX: usize = 5;

/// Room for what is in front of the bulk of a message with few other fields.
const HEAD: usize = 64;

/// A message with one big field.
pub(crate) trait Bulk: Message + Default {
    /// The number of the field that is left empty in the Rust type and travels as a [`Rope`] beside it.
    const FIELD: u32;
}

impl Bulk for region::ReadReply {
    const FIELD: u32 = 3;
}

impl Bulk for region::WriteRequest {
    const FIELD: u32 = 3;
}

impl Bulk for go::ReadAtReply {
    const FIELD: u32 = 2;
}

impl Bulk for go::WriteAtArgs {
    const FIELD: u32 = 2;
}

/// A message with its prefix.
pub(crate) fn encode(message: &impl Message) -> Rope {
    let mut bytes = prefixed(message.encoded_len());
    message.encode_raw(&mut bytes);
    finish(bytes, Rope::default())
}

/// A message and its bulk, with their prefix.
pub(crate) fn encode_bulk<M: Bulk>(message: &M, bulk: Rope) -> Rope {
    let mut bytes = prefixed(message.encoded_len() + HEAD);
    message.encode_raw(&mut bytes);
    if bulk.has_remaining() {
        encode_key(M::FIELD, WireType::LengthDelimited, &mut bytes);
        encode_varint(bulk.len() as u64, &mut bytes);
    }
    finish(bytes, bulk)
}

fn prefixed(capacity: usize) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(PREFIX + capacity);
    bytes.put_bytes(0, PREFIX);
    bytes
}

fn finish(mut head: BytesMut, bulk: Rope) -> Rope {
    let len = head.len() - PREFIX + bulk.len();
    let len = u32::try_from(len).expect("requests and replies are limited to less than 4 GiB");
    head[1..PREFIX].copy_from_slice(&len.to_be_bytes());
    let mut message = Rope::from(head.freeze());
    message.append(bulk);
    message
}

/// The length of the message that a prefix announces; `None` if it is compressed or no prefix at all.
pub(crate) fn length(mut prefix: impl Buf) -> Option<usize> {
    (prefix.get_u8() == 0).then(|| prefix.get_u32() as usize)
}

/// Reads a message (without its prefix).
///
/// # Errors
/// If it is malformed.
pub(crate) fn decode<M: Message + Default>(bytes: impl Buf) -> Result<M, Malformed> {
    Ok(M::decode(bytes)?)
}

/// What is said of what cannot be decoded.
pub(crate) const NO_MESSAGE: &str = "something that is not the message that belongs here";

/// Why a message cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl From<DecodeError> for Malformed {
    fn from(_: DecodeError) -> Self {
        Self(NO_MESSAGE)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    /// The Go programs' messages, byte for byte.
    #[test]
    fn golden_frames_of_the_go_service() {
        let args = go::ReadAtArgs { length: 4096, off: 8192 };
        assert_eq!(encode(&args).into_bytes(), hex("00 00000006 08 80 20 10 80 40"));
        let args = go::ReadAtArgs { length: 4096, off: 0 };
        assert_eq!(encode(&args).into_bytes(), hex("00 00000003 08 80 20"));

        let reply = go::ReadAtReply { n: 8, p: Bytes::new() };
        let bytes = Rope::from(Bytes::from_static(&[0, 1, 2, 3, 4, 5, 6, 7]));
        let framed = hex("00 0000000c 08 08 12 08 00 01 02 03 04 05 06 07");
        assert_eq!(encode_bulk(&reply, bytes).into_bytes(), framed);

        let args = go::WriteAtArgs { off: 12288, p: Bytes::new() };
        let bytes = Rope::from(Bytes::from_static(b"\xde\xad\xbe\xef"));
        assert_eq!(encode_bulk(&args, bytes).into_bytes(), hex("00 00000009 08 80 60 12 04 de ad be ef"));

        assert_eq!(encode(&go::SyncArgs {}).into_bytes(), hex("00 00000000"));
        assert_eq!(encode_bulk(&go::WriteAtArgs::default(), Rope::default()).into_bytes(), hex("00 00000000"));
    }

    #[test]
    fn compressed_messages_are_refused() {
        assert_eq!(length(&[1u8, 0, 0, 0, 0][..]), None);
        assert_eq!(length(&[0u8, 1, 2, 3, 4][..]), Some(0x0102_0304));
    }
}
