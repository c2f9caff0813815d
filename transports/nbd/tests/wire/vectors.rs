//! Bytes as proto.md writes them, by hand. What both sides of this crate could get wrong together shows here.

use r3map_nbd::wire::{
    BlockSizes, Chunk, ChunkHeader, ChunkType, ClientFlags, ClientOption, Command, CommandFlags, Descriptor, Errno,
    ExportReply, Framing, Greeting, HandshakeFlags, Info, InfoRequest, InfoType, MetaRequest, OptionCode, OptionHeader,
    OptionReply, OptionReplyHeader, ReplyError, ReplyFlags, ReplyHeader, Request, SimpleReply, StateFlags,
    StatusPayload, Text, TransmissionFlags, encode_data_header,
};

fn text(text: &str) -> Text {
    Text::new(text).unwrap()
}

/// Bytes from hexadecimal digits and `'text'`, with spaces between.
fn bytes(written: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in written.split_whitespace() {
        match part.strip_prefix('\'') {
            Some(ascii) => bytes.extend_from_slice(ascii.trim_end_matches('\'').as_bytes()),
            None => {
                assert_eq!(part.len() % 2, 0, "{part}");
                let byte = |at| u8::from_str_radix(&part[at..at + 2], 16).unwrap();
                bytes.extend((0..part.len()).step_by(2).map(byte));
            }
        }
    }
    bytes
}

#[test]
fn the_greeting() {
    let written = bytes("'NBDMAGIC' 49484156454F5054 0003");
    let greeting = Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES };
    assert_eq!(greeting.encode().to_vec(), written);
    assert_eq!(Greeting::decode(&written.try_into().unwrap()).unwrap(), greeting);
    for (other, says) in [
        ("'NBDMAGIC' 0000420281861253 0003", "old-style"),
        ("'NBDMAGIC' 0000420281861254 0003", "unknown style (0x420281861254)"),
        ("'HTTP/1.1' 2034303020426164 2052", "no NBD server"),
    ] {
        let error = Greeting::decode(&bytes(other).try_into().unwrap()).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    assert_eq!(ClientFlags::decode([0, 0, 0, 3]), ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES);
    assert_eq!(ClientFlags::NO_ZEROES.encode(), [0, 0, 0, 2]);
}

#[test]
fn options() {
    let info = InfoRequest { name: text("disk"), wanted: vec![InfoType::BlockSize, InfoType::Name] };
    let meta = MetaRequest { name: text("d"), queries: vec![text("base:allocation"), text("x-a:")] };
    for (option, written) in [
        (ClientOption::ExportName(text("disk")), "00000001 00000004 'disk'"),
        (ClientOption::Abort, "00000002 00000000"),
        (ClientOption::List, "00000003 00000000"),
        (ClientOption::StartTls, "00000005 00000000"),
        (ClientOption::Info(info.clone()), "00000006 0000000e 00000004 'disk' 0002 0003 0001"),
        (ClientOption::Go(info), "00000007 0000000e 00000004 'disk' 0002 0003 0001"),
        (ClientOption::StructuredReply, "00000008 00000000"),
        (
            ClientOption::ListMetaContext(meta.clone()),
            "00000009 00000024 00000001 'd' 00000002 0000000f 'base:allocation' 00000004 'x-a:'",
        ),
        (
            ClientOption::SetMetaContext(meta),
            "0000000a 00000024 00000001 'd' 00000002 0000000f 'base:allocation' 00000004 'x-a:'",
        ),
        (ClientOption::ExtendedHeaders, "0000000b 00000000"),
        (ClientOption::Unknown(4), "00000004 00000000"),
    ] {
        let written = bytes(&format!("'IHAVEOPT' {written}"));
        let mut out = Vec::new();
        option.encode(&mut out);
        assert_eq!(out, written, "{option:?}");
        let (head, data) = written.split_first_chunk().unwrap();
        let header = OptionHeader::decode(head).unwrap();
        assert_eq!((header.code, header.length as usize), (option.code(), data.len()));
        assert_eq!(ClientOption::decode(header.code, data).unwrap(), option);
    }
}

#[test]
fn options_whose_lengths_lie_are_refused() {
    for (code, data) in [
        (OptionCode::List, "00"),
        (OptionCode::StartTls, "00"),
        (OptionCode::StructuredReply, "00"),
        (OptionCode::ExtendedHeaders, "00"),
        (OptionCode::Go, ""),
        (OptionCode::Go, "00000000"),
        (OptionCode::Go, "00000005 'disk' 0000"),
        (OptionCode::Go, "ffffffff 'disk' 0000"),
        (OptionCode::Go, "00000004 'disk' 0001"),
        (OptionCode::Go, "00000004 'disk' 0001 0003 00"),
        (OptionCode::Go, "00000004 'disk' ffff 0003"),
        (OptionCode::Go, "00000001 00 0000"),
        (OptionCode::SetMetaContext, "00000000 00000001"),
        (OptionCode::SetMetaContext, "00000000 ffffffff"),
        (OptionCode::SetMetaContext, "00000000 00000001 00000002 'a'"),
        (OptionCode::SetMetaContext, "00000000 00000000 00"),
        (OptionCode::ExportName, "ff"),
    ] {
        assert!(ClientOption::decode(code, &bytes(data)).is_err(), "{code:?} {data}");
    }
    assert_eq!(ClientOption::decode(OptionCode::Abort, b"whatever").unwrap(), ClientOption::Abort);
    let long = OptionHeader::decode(&bytes("'IHAVEOPT' 00000007 00010001").try_into().unwrap()).unwrap();
    assert!(!long.fits() && OptionHeader { length: 65536, ..long }.fits());
    assert!(OptionHeader::decode(&bytes("'IHAVEOPX' 00000007 00000001").try_into().unwrap()).is_err());
}

#[test]
fn replies_to_options() {
    let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };
    for (reply, written) in [
        (OptionReply::Ack, "00000001 00000000"),
        (
            OptionReply::Server { name: text("ab"), description: text("c d") },
            "00000002 00000009 00000002 'ab' 63 20 64",
        ),
        (
            OptionReply::Info(Info::Export { size: 1 << 40, flags: TransmissionFlags::from_bits_retain(0x8d) }),
            "00000003 0000000c 0000 0000010000000000 008d",
        ),
        (OptionReply::Info(Info::Name(text("n"))), "00000003 00000003 0001 'n'"),
        (OptionReply::Info(Info::Description(text(""))), "00000003 00000002 0002"),
        (OptionReply::Info(Info::BlockSize(sizes)), "00000003 0000000e 0003 00000001 00001000 02000000"),
        (
            OptionReply::MetaContext { id: 7, name: text("base:allocation") },
            "00000004 00000013 00000007 'base:allocation'",
        ),
        (OptionReply::error(ReplyError::Unsupported, ""), "80000001 00000000"),
        (OptionReply::error(ReplyError::UnknownExport, "no"), "80000006 00000002 'no'"),
        (OptionReply::error(ReplyError::ExtendedHeadersRequired, ""), "8000000a 00000000"),
    ] {
        let written = bytes(&format!("0003e889045565a9 00000007 {written}"));
        let mut out = Vec::new();
        reply.encode(OptionCode::Go, &mut out);
        assert_eq!(out, written, "{reply:?}");
        let (head, data) = written.split_first_chunk().unwrap();
        let header = OptionReplyHeader::decode(head).unwrap();
        assert_eq!((header.option, header.length as usize), (OptionCode::Go, data.len()));
        assert_eq!(OptionReply::decode(header.kind, data).unwrap(), reply);
    }
}

#[test]
fn replies_to_options_that_make_no_sense_are_refused() {
    for (kind, data) in [
        (1, "00"),
        (2, "00000003 'ab'"),
        (3, "00"),
        (3, "0000 0000000000000000 00"),
        (3, "0000 0000000000000000 0000"),
        (3, "0000 0000000000000000 0001 00"),
        (3, "0003 00000001 00000200 0200"),
        (4, "000000"),
        (5, ""),
        (0, ""),
    ] {
        assert!(OptionReply::decode(kind, &bytes(data)).is_err(), "{kind} {data}");
    }
    assert_eq!(OptionReply::decode(3, &bytes("00ff 0102")).unwrap(), OptionReply::Info(Info::Unknown(255)));
    let unreadable = OptionReply::decode(0x8000_00ff, &[0xff, b'x']).unwrap();
    assert_eq!(unreadable, OptionReply::error(ReplyError::Unknown(0x8000_00ff), "\u{fffd}x"));
    assert!(
        OptionReplyHeader::decode(&bytes("0003e889045565a9 00000007 00000001 00010001").try_into().unwrap()).is_err()
    );
    assert!(
        OptionReplyHeader::decode(&bytes("0003e889045565a8 00000007 00000001 00000000").try_into().unwrap()).is_err()
    );
}

#[test]
fn block_sizes_keep_the_rules() {
    let sizes = |minimum, preferred, maximum| BlockSizes { minimum, preferred, maximum }.check();
    assert!(sizes(1, 512, 512).is_ok() && sizes(65536, 65536, u32::MAX).is_ok());
    for (minimum, preferred, maximum) in
        [(0, 512, 512), (3, 512, 512), (131_072, 131_072, 1 << 20), (1, 256, 512), (1024, 512, 4096), (1, 4096, 512)]
    {
        assert!(sizes(minimum, preferred, maximum).is_err(), "{minimum} {preferred} {maximum}");
    }
}

#[test]
fn the_reply_to_an_export_name() {
    let reply = ExportReply { size: 0x1234, flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH };
    let mut out = Vec::new();
    reply.encode(false, &mut out);
    assert_eq!(out, bytes("0000000000001234 0005"));
    assert_eq!(ExportReply::decode(out.first_chunk().unwrap()).unwrap(), reply);
    out.clear();
    reply.encode(true, &mut out);
    assert_eq!((out.len(), out[10..].iter().max()), (134, Some(&0)));
    assert!(ExportReply::decode(&bytes("0000000000001234 0004").try_into().unwrap()).is_err());
}

#[test]
fn requests() {
    let request = Request {
        flags: CommandFlags::FUA | CommandFlags::NO_HOLE,
        command: Command::WriteZeroes,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
        length: 0x200,
    };
    let compact = bytes("25609513 0003 0006 0102030405060708 0000000000001000 00000200");
    let extended = bytes("21e41c71 0003 0006 0102030405060708 0000000000001000 0000000000000200");
    for (framing, written) in
        [(Framing::Simple, &compact), (Framing::Structured, &compact), (Framing::Extended, &extended)]
    {
        let mut out = Vec::new();
        request.encode(framing, &mut out).unwrap();
        assert_eq!((&out, out.len()), (written, Request::len(framing)));
        assert_eq!(Request::decode(framing, written).unwrap(), Some(request));
        for cut in 0..written.len() {
            assert_eq!(Request::decode(framing, &written[..cut]).unwrap(), None, "{cut}");
        }
    }
    assert!(Request::decode(Framing::Extended, &compact[..4]).is_err());
    assert!(Request::decode(Framing::Simple, &extended).is_err());
    let long = Request { length: 1 << 32, ..request };
    assert!(long.encode(Framing::Structured, &mut Vec::new()).is_err());
    assert!(long.encode(Framing::Extended, &mut Vec::new()).is_ok());
}

#[test]
fn what_follows_a_request() {
    let request = |command, flags| Request { flags, command, cookie: 1, offset: 0, length: 9 };
    let write = request(Command::Write, CommandFlags::empty());
    assert_eq!((write.payload_len(Framing::Simple), write.payload_len(Framing::Extended)), (9, 9));
    let status = request(Command::BlockStatus, CommandFlags::PAYLOAD_LEN);
    assert_eq!((status.payload_len(Framing::Structured), status.payload_len(Framing::Extended)), (0, 9));
    assert_eq!(request(Command::Unknown(77), CommandFlags::PAYLOAD_LEN).payload_len(Framing::Extended), 9);
    let payload = bytes("0000000100000000 00000001 00000002");
    let decoded = StatusPayload::decode(&payload).unwrap();
    assert_eq!(decoded, StatusPayload { length: 1 << 32, contexts: vec![1, 2] });
    let mut out = Vec::new();
    decoded.encode(&mut out);
    assert_eq!(out, payload);
    for wrong in [7, 9, 13] {
        assert!(StatusPayload::decode(&vec![0; wrong]).is_err());
    }
}

#[test]
fn simple_replies() {
    for (error, written) in
        [(None, "67446698 00000000 0102030405060708"), (Some(Errno::NoSpc), "67446698 0000001c 0102030405060708")]
    {
        let reply = SimpleReply { error, cookie: 0x0102_0304_0506_0708 };
        let mut out = Vec::new();
        reply.encode(&mut out);
        assert_eq!(out, bytes(written));
        for framing in [Framing::Simple, Framing::Structured] {
            assert_eq!(ReplyHeader::decode(framing, 0, &out).unwrap(), Some(ReplyHeader::Simple(reply)));
        }
        assert!(ReplyHeader::decode(Framing::Extended, 0, &out).is_err());
    }
}

#[test]
fn chunks() {
    let hole = Descriptor { length: 0x10000, flags: (StateFlags::HOLE | StateFlags::ZERO).bits() };
    let data = Descriptor { length: 512, flags: 0 };
    let (done, more) = (ReplyFlags::DONE, ReplyFlags::empty());
    for (framing, flags, chunk, written) in [
        (Framing::Structured, done, Chunk::None, "668e33ef 0001 0000 0000000000000007 00000000"),
        (Framing::Extended, done, Chunk::None, "6e8a278c 0001 0000 0000000000000007 0000000000001000 0000000000000000"),
        (
            Framing::Structured,
            more,
            Chunk::Data { offset: 0x1100, bytes: b"xyz" },
            "668e33ef 0000 0001 0000000000000007 0000000b 0000000000001100 'xyz'",
        ),
        (
            Framing::Extended,
            done,
            Chunk::Data { offset: 0x1100, bytes: b"xyz" },
            "6e8a278c 0001 0001 0000000000000007 0000000000001000 000000000000000b 0000000000001100 'xyz'",
        ),
        (
            Framing::Structured,
            done,
            Chunk::Hole { offset: 0x1100, length: 0x200 },
            "668e33ef 0001 0002 0000000000000007 0000000c 0000000000001100 00000200",
        ),
        (
            Framing::Structured,
            done,
            Chunk::BlockStatus { context: 9, extents: vec![hole, data] },
            "668e33ef 0001 0005 0000000000000007 00000014 00000009 00010000 00000003 00000200 00000000",
        ),
        (
            Framing::Extended,
            done,
            Chunk::BlockStatus { context: 9, extents: vec![hole] },
            "6e8a278c 0001 0006 0000000000000007 0000000000001000 0000000000000018 00000009 00000001 \
             0000000000010000 0000000000000003",
        ),
        (
            Framing::Structured,
            done,
            Chunk::Error { error: Errno::Io, message: text("bad"), offset: None },
            "668e33ef 0001 8001 0000000000000007 00000009 00000005 0003 'bad'",
        ),
        (
            Framing::Structured,
            more,
            Chunk::Error { error: Errno::Io, message: text(""), offset: Some(0x1180) },
            "668e33ef 0000 8002 0000000000000007 0000000e 00000005 0000 0000000000001180",
        ),
    ] {
        let written = bytes(written);
        let mut out = Vec::new();
        chunk.encode(framing, flags, 7, 0x1000, &mut out);
        assert_eq!(out, written, "{chunk:?}");
        let header = ReplyHeader::decode(framing, 4096, &written).unwrap().unwrap();
        let ReplyHeader::Chunk(chunk_header) = header else { panic!("{header:?}") };
        assert_eq!((chunk_header.cookie, chunk_header.is_last()), (7, flags == done));
        assert_eq!(chunk_header.offset, (framing == Framing::Extended).then_some(0x1000));
        let payload = &written[header.len()..];
        assert_eq!(payload.len(), chunk_header.length as usize);
        assert_eq!(Chunk::decode(chunk_header.kind, payload).unwrap(), chunk);
        for cut in 0..header.len() {
            assert_eq!(ReplyHeader::decode(framing, 4096, &written[..cut]).unwrap(), None, "{cut}");
        }
    }
}

#[test]
fn a_data_header_is_what_comes_before_the_data() {
    for framing in [Framing::Structured, Framing::Extended] {
        let mut whole = Vec::new();
        Chunk::Data { offset: 12, bytes: b"abc" }.encode(framing, ReplyFlags::DONE, 7, 10, &mut whole);
        let mut parts = Vec::new();
        encode_data_header(framing, ReplyFlags::DONE, 7, 10, 12, 3, &mut parts);
        parts.extend_from_slice(b"abc");
        assert_eq!(parts, whole);
    }
}

#[test]
fn lengths_that_a_chunk_cannot_have_are_refused_before_anything_is_read() {
    use ChunkType::{BlockStatus, BlockStatusExt, Data, Error, ErrorOffset, Hole, UnknownError};
    let decode = |kind: ChunkType, length| {
        let framing = if kind == BlockStatusExt { Framing::Extended } else { Framing::Structured };
        let offset = (kind == BlockStatusExt).then_some(0);
        let header = ChunkHeader { flags: ReplyFlags::DONE, kind, cookie: 0, offset, length };
        let mut out = Vec::new();
        header.encode(&mut out);
        ReplyHeader::decode(framing, 4096, &out)
    };
    for (kind, good, bad) in [
        (ChunkType::None, vec![0], vec![1, u32::MAX]),
        (Data, vec![9, 4096 + 8], vec![0, 8, 4096 + 9, u32::MAX]),
        (Hole, vec![12], vec![0, 11, 13]),
        (BlockStatus, vec![12, 4 + (8 << 20)], vec![0, 4, 11, 13, 12 + (8 << 20)]),
        (BlockStatusExt, vec![24, 8 + (16 << 20)], vec![0, 8, 23, 25, 24 + (16 << 20)]),
        (Error, vec![6, 6 + 4096], vec![0, 5, 7 + 4096, u32::MAX]),
        (ErrorOffset, vec![14, 14 + 4096], vec![0, 13, 15 + 4096]),
        (UnknownError(0x8fff), vec![6, 6 + 4096], vec![0, 5, 1 << 20]),
    ] {
        good.iter().for_each(|length| assert!(decode(kind, *length).unwrap().is_some(), "{kind:?} {length}"));
        bad.iter().for_each(|length| assert!(decode(kind, *length).is_err(), "{kind:?} {length}"));
    }
    for (framing, written) in [
        (Framing::Structured, "668e33ef 0001 0006 0000000000000007 00000018"),
        (Framing::Extended, "6e8a278c 0001 0005 0000000000000007 0000000000001000 000000000000000c"),
        (Framing::Extended, "6e8a278c 0001 0001 0000000000000007 0000000000001000 0000000100000009"),
        (Framing::Structured, "668e33ef 0000 0000 0000000000000007 00000000"),
        (Framing::Structured, "668e33ef 0001 0007 0000000000000007 00000000"),
        (Framing::Simple, "668e33ef 0001 0000 0000000000000007 00000000"),
    ] {
        assert!(ReplyHeader::decode(framing, 4096, &bytes(written)).is_err(), "{written}");
    }
}

#[test]
fn payloads_that_contradict_themselves_are_refused() {
    for (kind, payload) in [
        (ChunkType::Data, "0000000000000000"),
        (ChunkType::Hole, "0000000000000000 00000000"),
        (ChunkType::BlockStatus, "00000000"),
        (ChunkType::BlockStatus, "00000000 00000000 00000000"),
        (ChunkType::BlockStatusExt, "00000000 00000002 0000000000000001 0000000000000000"),
        (ChunkType::BlockStatusExt, "00000000 00000000"),
        (ChunkType::Error, "00000000 0000"),
        (ChunkType::Error, "00000005 0001"),
        (ChunkType::Error, "00000005 0000 00"),
        (ChunkType::ErrorOffset, "00000005 0000 00"),
    ] {
        assert!(Chunk::decode(kind, &bytes(payload)).is_err(), "{kind:?} {payload}");
    }
    let payload = bytes("00000099 0001 'x' 0102");
    let unknown = Chunk::decode(ChunkType::UnknownError(0x8fff), &payload).unwrap();
    assert_eq!(unknown, Chunk::Error { error: Errno::Inval, message: text("x"), offset: None });
}

#[test]
fn an_extent_that_is_too_long_for_its_chunk_is_cut_and_ends_the_list() {
    let long = Descriptor { length: 5 << 32, flags: 3 };
    let short = Descriptor { length: 1, flags: 0 };
    let mut out = Vec::new();
    let chunk = Chunk::BlockStatus { context: 0, extents: vec![short, long, short] };
    chunk.encode(Framing::Structured, ReplyFlags::DONE, 7, 0, &mut out);
    let cut = Descriptor { length: 0xffff_0000, flags: 3 };
    let decoded = Chunk::decode(ChunkType::BlockStatus, &out[ChunkHeader::STRUCTURED_LEN..]).unwrap();
    assert_eq!(decoded, Chunk::BlockStatus { context: 0, extents: vec![short, cut] });
}
