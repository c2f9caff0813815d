//! Every decoder, fed with the same bytes: none may panic, and none may give out more than it was given. The fuzz
//! target in `fuzz/` calls the same function.

use r3map_nbd::wire::{
    Chunk, ClientFlags, ClientOption, ExportReply, Framing, Greeting, OptionCode, OptionHeader, OptionReply,
    OptionReplyHeader, ReplyHeader, Request, StatusPayload,
};

const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

/// Decodes `bytes` as everything that it could be the beginning of. Returns how many decoders took it.
pub(crate) fn decode_all(bytes: &[u8]) -> usize {
    let fixed = [
        bytes.first_chunk().is_some_and(|bytes| Greeting::decode(bytes).is_ok()),
        bytes.first_chunk().is_some_and(|bytes| ClientFlags::decode(*bytes).bits() <= 3),
        bytes.first_chunk().is_some_and(|bytes| ExportReply::decode(bytes).is_ok()),
        StatusPayload::decode(bytes).is_ok_and(|payload| payload.contexts.len() <= bytes.len() / 4),
        decode_option(bytes),
        decode_option_reply(bytes),
    ];
    let framed = FRAMINGS.iter().map(|framing| {
        let request = Request::decode(*framing, bytes).is_ok_and(|request| request.is_some());
        usize::from(request) + usize::from(decode_reply(*framing, bytes))
    });
    fixed.into_iter().filter(|taken| *taken).count() + framed.sum::<usize>()
}

fn decode_option(bytes: &[u8]) -> bool {
    OptionCode::ALL.iter().for_each(|code| drop(ClientOption::decode(*code, bytes)));
    let Some((head, data)) = bytes.split_first_chunk() else { return false };
    OptionHeader::decode(head).is_ok_and(|header| {
        let data = &data[..data.len().min(header.length as usize)];
        ClientOption::decode(header.code, data).is_ok_and(|option| {
            let mut again = Vec::new();
            option.encode(&mut again);
            again.len() <= OptionHeader::LEN + data.len()
        })
    })
}

fn decode_option_reply(bytes: &[u8]) -> bool {
    (0..6).chain([1 << 31]).for_each(|kind| drop(OptionReply::decode(kind, bytes)));
    let Some((head, data)) = bytes.split_first_chunk() else { return false };
    OptionReplyHeader::decode(head).is_ok_and(|header| {
        let data = &data[..data.len().min(header.length as usize)];
        OptionReply::decode(header.kind, data).is_ok()
    })
}

fn decode_reply(framing: Framing, bytes: &[u8]) -> bool {
    match ReplyHeader::decode(framing, 1 << 16, bytes) {
        Ok(Some(header @ ReplyHeader::Chunk(chunk))) => {
            let payload = &bytes[header.len()..];
            let payload = &payload[..payload.len().min(chunk.length as usize)];
            Chunk::decode(chunk.kind, payload).is_ok()
        }
        Ok(header) => header.is_some(),
        Err(_) => false,
    }
}
