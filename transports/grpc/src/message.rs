//! gRPC messages: protobuf behind a five-byte prefix (a compression flag, then the length as a big-endian u32).
//!
//! A message that carries data has it in one `bytes` field, the [`Bulk::FIELD`]. It is put behind the rest when the
//! message is written and cut out of it when it is read, so that it is never copied. This is plain protobuf: fields may
//! come in any order, and any other implementation reads and writes the same bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::DecodeError;
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

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
    const FIELD: u32 = 2;
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

/// Reads a message (without its prefix), and its bulk apart.
///
/// # Errors
/// If it is malformed, or has more than `rest` bytes beside the bulk: a few bytes of a message may become many in
/// memory, those of the bulk do not.
pub(crate) fn decode_bulk<M: Bulk>(mut bytes: Rope, rest: usize) -> Result<(M, Rope), Malformed> {
    let mut bulk = Rope::default();
    let mut others = BytesMut::new();
    while bytes.has_remaining() {
        let (field, wire) = decode_key(&mut bytes)?;
        if (field, wire) == (M::FIELD, WireType::LengthDelimited) {
            let len = decode_varint(&mut bytes)?;
            bulk = take(&mut bytes, len)?;
        } else {
            encode_key(field, wire, &mut others);
            copy_value(wire, &mut bytes, &mut others)?;
        }
        if others.len() > rest {
            return Err(Malformed("more beside its data than there is reason for"));
        }
    }
    Ok((decode(others.freeze())?, bulk))
}

/// Reads a message (without its prefix).
///
/// # Errors
/// If it is malformed.
pub(crate) fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, Malformed> {
    Ok(M::decode(bytes)?)
}

fn copy_value(wire: WireType, from: &mut Rope, to: &mut BytesMut) -> Result<(), Malformed> {
    let len = match wire {
        WireType::Varint => {
            encode_varint(decode_varint(from)?, to);
            return Ok(());
        }
        WireType::LengthDelimited => {
            let len = decode_varint(from)?;
            encode_varint(len, to);
            len
        }
        WireType::ThirtyTwoBit => 4,
        WireType::SixtyFourBit => 8,
        WireType::StartGroup | WireType::EndGroup => return Err(Malformed("a group, which proto3 has not")),
    };
    to.put(take(from, len)?);
    Ok(())
}

fn take(bytes: &mut Rope, len: u64) -> Result<Rope, Malformed> {
    match usize::try_from(len) {
        Ok(len) if len <= bytes.len() => Ok(bytes.split_to(len)),
        _ => Err(Malformed("a field that is longer than the message")),
    }
}

/// Why a message cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl From<DecodeError> for Malformed {
    fn from(_: DecodeError) -> Self {
        Self("not the protobuf message that belongs here")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    fn body(framed: &str) -> Rope {
        let mut bytes = Rope::from(Bytes::from(hex(framed)));
        let len = length(bytes.split_to(PREFIX)).unwrap();
        assert_eq!(len, bytes.len());
        bytes
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
        let framed = "00 0000000c 08 08 12 08 00 01 02 03 04 05 06 07";
        assert_eq!(encode_bulk(&reply, bytes.clone()).into_bytes(), hex(framed));
        assert_eq!(decode_bulk::<go::ReadAtReply>(body(framed), 64).unwrap(), (reply, bytes));

        let args = go::WriteAtArgs { off: 12288, p: Bytes::new() };
        let bytes = Rope::from(Bytes::from_static(b"\xde\xad\xbe\xef"));
        let framed = "00 00000009 08 80 60 12 04 de ad be ef";
        assert_eq!(encode_bulk(&args, bytes.clone()).into_bytes(), hex(framed));
        assert_eq!(decode_bulk::<go::WriteAtArgs>(body(framed), 64).unwrap(), (args, bytes));

        assert_eq!(encode(&go::SyncArgs {}).into_bytes(), hex("00 00000000"));
        assert_eq!(encode_bulk(&go::WriteAtArgs::default(), Rope::default()).into_bytes(), hex("00 00000000"));
    }

    #[test]
    fn fields_may_come_in_any_order_and_twice_and_unknown() {
        // The bulk first, then an unknown varint, string and fixed64, the bulk again (the last one counts), the rest.
        let framed =
            "00 0000001c 12 02 61 62  78 01  82 01 02 78 79  89 01 01 02 03 04 05 06 07 08  12 03 63 64 65  08 07";
        let (args, bulk) = decode_bulk::<go::WriteAtArgs>(body(framed), 64).unwrap();
        assert_eq!((args.off, bulk.into_bytes().as_ref()), (7, b"cde".as_ref()));
    }

    #[test]
    fn what_prost_writes_is_read_and_the_other_way_round() {
        let data = Bytes::from((0..=255).collect::<Vec<u8>>());
        let runs = vec![region::Run { length: 256, crc32c: Some(0) }, region::Run { length: 9, crc32c: None }];
        let whole = region::ReadReply { runs: runs.clone(), data: data.clone() };
        let (reply, bulk) =
            decode_bulk::<region::ReadReply>(Rope::from(Bytes::from(whole.encode_to_vec())), 64).unwrap();
        assert_eq!((&reply.runs, bulk.clone().into_bytes()), (&runs, data));
        let mut framed = encode_bulk(&reply, bulk);
        framed.advance(PREFIX);
        assert_eq!(region::ReadReply::decode(framed).unwrap(), whole);
    }

    #[test]
    fn malformed_messages_are_refused() {
        for framed in [
            "00 00000001 08",                               // a key without a value
            "00 00000002 08 ff",                            // a varint that does not end
            "00 00000003 12 02 61",                         // a field that is longer than the message
            "00 0000000b 12 ff ff ff ff ff ff ff ff ff 01", // one that is longer than memory
            "00 00000003 0d 01 02",                         // a fixed32 that is cut
            "00 00000001 0b",                               // a group
            "00 00000002 0a 00",                            // a string where a number belongs
        ] {
            assert!(decode_bulk::<go::WriteAtArgs>(body(framed), 64).is_err(), "{framed}");
        }
        let padded = Rope::from(Bytes::from([0x78, 1].repeat(50)));
        assert!(decode_bulk::<go::WriteAtArgs>(padded.clone(), 100).is_ok());
        assert!(decode_bulk::<go::WriteAtArgs>(padded, 99).is_err());
        assert_eq!(length(&[1u8, 0, 0, 0, 0][..]), None);
    }
}
