//! Whatever is encoded decodes to itself.

use proptest::collection::vec;
use proptest::prelude::*;
use r3map_nbd::wire::{
    BlockSizes, Chunk, ChunkHeader, ChunkType, ClientOption, Command, CommandFlags, Descriptor, Errno, Framing,
    HandshakeFlags, Info, InfoRequest, InfoType, MetaRequest, OptionCode, OptionHeader, OptionReply, OptionReplyHeader,
    ReplyError, ReplyFlags, ReplyHeader, Request, Text, TransmissionFlags,
};

fn text() -> impl Strategy<Value = Text> {
    "[^\0]{0,40}".prop_map(|text| Text::new(text).unwrap())
}

fn option() -> impl Strategy<Value = ClientOption> {
    let info = || {
        (text(), vec(any::<u16>().prop_map(InfoType::from_code), 0..9))
            .prop_map(|(name, wanted)| InfoRequest { name, wanted })
    };
    let meta = || (text(), vec(text(), 0..9)).prop_map(|(name, queries)| MetaRequest { name, queries });
    prop_oneof![
        text().prop_map(ClientOption::ExportName),
        Just(ClientOption::List),
        info().prop_map(ClientOption::Info),
        info().prop_map(ClientOption::Go),
        meta().prop_map(ClientOption::ListMetaContext),
        meta().prop_map(ClientOption::SetMetaContext),
        (12_u32..).prop_map(ClientOption::Unknown),
    ]
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    let flags = any::<u16>().prop_map(|bits| TransmissionFlags::from_bits_retain(bits | 1));
    let sizes = any::<[u32; 3]>().prop_map(|[minimum, preferred, maximum]| BlockSizes { minimum, preferred, maximum });
    let error = prop::sample::select(&ReplyError::ALL[..]);
    prop_oneof![
        Just(OptionReply::Ack),
        (text(), text()).prop_map(|(name, description)| OptionReply::Server { name, description }),
        (any::<u64>(), flags).prop_map(|(size, flags)| OptionReply::Info(Info::Export { size, flags })),
        text().prop_map(|name| OptionReply::Info(Info::Name(name))),
        text().prop_map(|text| OptionReply::Info(Info::Description(text))),
        sizes.prop_map(|sizes| OptionReply::Info(Info::BlockSize(sizes))),
        (any::<u32>(), text()).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
        (error, text()).prop_map(|(error, message)| OptionReply::Error { error, message }),
    ]
}

fn framing() -> impl Strategy<Value = Framing> {
    prop::sample::select(&[Framing::Simple, Framing::Structured, Framing::Extended][..])
}

fn request() -> impl Strategy<Value = (Framing, Request)> {
    (framing(), any::<[u16; 2]>(), any::<[u64; 3]>()).prop_map(
        |(framing, [flags, command], [cookie, offset, length])| {
            let length = if framing == Framing::Extended { length } else { length >> 32 };
            let (flags, command) = (CommandFlags::from_bits_retain(flags), Command::from_code(command));
            (framing, Request { flags, command, cookie, offset, length })
        },
    )
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    (1..=u64::from(u32::MAX), 0..=u64::from(u32::MAX)).prop_map(|(length, flags)| Descriptor { length, flags })
}

fn chunk(data: &[u8]) -> impl Strategy<Value = Chunk<'_>> {
    let error = prop::sample::select(&Errno::ALL[..]);
    prop_oneof![
        Just(Chunk::None),
        (any::<u64>(), 1..=data.len()).prop_map(|(offset, len)| Chunk::Data { offset, bytes: &data[..len] }),
        (any::<u64>(), 1_u32..).prop_map(|(offset, length)| Chunk::Hole { offset, length }),
        (any::<u32>(), vec(descriptor(), 1..9)).prop_map(|(context, extents)| Chunk::BlockStatus { context, extents }),
        (error, text(), any::<Option<u64>>()).prop_map(|(error, message, offset)| Chunk::Error {
            error,
            message,
            offset
        }),
    ]
}

const DATA: [u8; 64] = *b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._";

proptest! {
    #[test]
    fn options(option in option()) {
        let mut out = b"before".to_vec();
        option.encode(&mut out);
        let (head, data) = out[6..].split_first_chunk().unwrap();
        let header = OptionHeader::decode(head).unwrap();
        prop_assert_eq!(header.length as usize, data.len());
        prop_assert_eq!(ClientOption::decode(header.code, data).unwrap(), option);
    }

    #[test]
    fn replies_to_options(reply in option_reply(), code in any::<u32>()) {
        let mut out = b"before".to_vec();
        reply.encode(OptionCode::from_code(code), &mut out);
        let (head, data) = out[6..].split_first_chunk().unwrap();
        let header = OptionReplyHeader::decode(head).unwrap();
        prop_assert_eq!((header.option.code(), header.length as usize), (code, data.len()));
        prop_assert_eq!(OptionReply::decode(header.kind, data).unwrap(), reply);
    }

    #[test]
    fn requests((framing, request) in request()) {
        let mut out = Vec::new();
        request.encode(framing, &mut out).unwrap();
        prop_assert_eq!(out.len(), Request::len(framing));
        out.extend_from_slice(b"payload");
        prop_assert_eq!(Request::decode(framing, &out).unwrap(), Some(request));
    }

    #[test]
    fn chunks(chunk in chunk(&DATA), extended in any::<bool>(), cookie in any::<u64>(), offset in any::<u64>()) {
        let framing = if extended { Framing::Extended } else { Framing::Structured };
        let mut out = b"before".to_vec();
        chunk.encode(framing, ReplyFlags::DONE, cookie, offset, &mut out);
        let out = &out[6..];
        let header = ReplyHeader::decode(framing, 64, out).unwrap().unwrap();
        let ReplyHeader::Chunk(ChunkHeader { kind, length, .. }) = header else { panic!("{header:?}") };
        prop_assert_eq!(out.len(), header.len() + length as usize);
        prop_assert_eq!(Chunk::decode(kind, &out[header.len()..]).unwrap(), chunk);
    }

    #[test]
    fn numbers(code in any::<u32>(), short in any::<u16>()) {
        prop_assert_eq!(OptionCode::from_code(code).code(), code);
        prop_assert_eq!(InfoType::from_code(short).code(), short);
        prop_assert_eq!(Command::from_code(short).code(), short);
        prop_assert_eq!(HandshakeFlags::from_bits_retain(short).bits(), short);
        if let Ok(kind) = ChunkType::from_code(short) {
            prop_assert_eq!(kind.code(), short);
        }
    }
}
