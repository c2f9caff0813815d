//! What a server sends wrong is an error, never other bytes than it has: cuts at every byte, bits that flip, chunks that
//! contradict what was asked for.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use r3map_core::{Backend, ErrorKind, Extents};
use r3map_nbd::kernel::{self, Settings};
use r3map_nbd::wire::{
    Chunk, ClientFlags, Command, Descriptor, Errno, Framing, Greeting, HandshakeFlags, Info, OptionCode, OptionHeader,
    OptionReply, ReplyError, ReplyFlags, Request, SimpleReply, Text, TransmissionFlags,
};
use r3map_nbd::{Client, ClientSettings, NbdUri};
use r3map_testkit::random::Random;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Notify;

use crate::liar::{CONTEXT, Liar, bytes, chunk, holey, honest};
use crate::support::LONG;

const LEN: usize = 9_001;

/// A read from a liar; the bytes must be the right ones if there are any.
async fn read(liar: &Liar, offset: u64, len: usize) -> r3map_core::Result<()> {
    let client = liar.client().await?;
    let mut buf = vec![0xa5; len];
    let result = tokio::time::timeout(LONG, client.read_at(offset, &mut buf)).await.expect("nothing hangs");
    if result.is_ok() {
        assert!(buf == holey(offset, len as u64), "wrong bytes were taken for good ones");
    }
    result
}

#[tokio::test]
async fn an_honest_server_is_believed() {
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        for (offset, len) in [(5, LEN), (0, 3), (4096, 500_000), (1, 1_000_000)] {
            read(&Liar::new(framing, honest(framing)), offset, len).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_conversation_that_is_cut_at_any_byte_is_an_outage() {
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        let liar = Liar::new(framing, honest(framing));
        let mut cut = 0;
        // Every byte of the handshake and of the headers, and some of the data.
        loop {
            match read(&liar.clone().cut(cut).once(), 5, LEN).await {
                Ok(()) => break,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Unavailable, "{framing:?} cut at {cut}: {error}");
                    assert!(!error.to_string().contains('\n'));
                }
            }
            cut += if cut > 700 && cut % 1000 > 40 { 37 } else { 1 };
        }
        assert!(cut > LEN / 2, "{framing:?}: {cut} bytes were enough");
    }
}

/// Where headers are in what an honest server answers: of the data itself nobody can tell.
fn headers(framing: Framing) -> Vec<usize> {
    let header = if framing == Framing::Extended { 32 } else { 20 };
    let (third, last) = (LEN / 3, LEN - LEN / 3 * 2);
    let second = header + 8 + last;
    let third_chunk = second + header + 12;
    let end = third_chunk + header + 8 + third;
    let within = |at: usize| at < header + 8 || (second..third_chunk + header + 8).contains(&at);
    (0..end).filter(|at| within(*at)).collect()
}

#[tokio::test]
async fn a_bit_that_flips_in_a_header_is_noticed() {
    for framing in [Framing::Structured, Framing::Extended] {
        let (mut harmless, mut noticed) = (0, 0);
        for byte in headers(framing) {
            for bit in 0..8 {
                let liar = Liar::new(framing, honest(framing)).flip(byte, bit).once();
                match read(&liar, 5, LEN).await {
                    // A reply flag that nobody knows means nothing.
                    Ok(()) => harmless += 1,
                    Err(error) => {
                        noticed += 1;
                        let expected = [ErrorKind::Corrupt, ErrorKind::Unavailable, ErrorKind::InvalidInput];
                        let refused =
                            error.message().contains("the server answered") || expected.contains(&error.kind());
                        assert!(refused, "{framing:?}, byte {byte}, bit {bit}: {error}");
                    }
                }
            }
        }
        assert!(harmless <= 3 * 16 && noticed > 400, "{harmless} harmless, {noticed} noticed");
    }
}

type Lie = Box<dyn Fn(&Request) -> Vec<u8> + Send + Sync>;

/// What a server must not answer to a read of `LEN` bytes at 5, and a word of what is said then.
fn lies() -> Vec<(&'static str, Lie)> {
    const S: Framing = Framing::Structured;
    let data = |request: &Request, last, at: u64, len| {
        chunk(S, request, last, &Chunk::Data { offset: at, bytes: &bytes(at, len) })
    };
    let len = LEN as u64;
    let with_cookie = |cookie| move |request: &Request| Request { cookie, ..*request };
    vec![
        ("less than was asked", Box::new(move |r| data(r, true, 5, len - 1))),
        ("less than was asked", Box::new(move |r| chunk(S, r, true, &Chunk::None))),
        ("where 5..9006 was asked", Box::new(move |r| data(r, true, 5, len + 1))),
        ("where 5..9006 was asked", Box::new(move |r| data(r, true, 4, 1))),
        ("sent before", Box::new(move |r| [data(r, false, 5, 100), data(r, true, 104, len - 99)].concat())),
        ("not made", Box::new(move |r| data(&with_cookie(999)(r), true, 5, len))),
        ("not made", Box::new(move |r| [data(r, true, 5, len), data(r, true, 5, len)].concat().repeat(2))),
        (
            "a simple reply to a read",
            Box::new(|r| {
                let mut out = Vec::new();
                SimpleReply { error: None, cookie: r.cookie }.encode(&mut out);
                out
            }),
        ),
        (
            "extents",
            Box::new(|r| {
                let extents = vec![Descriptor { length: 1, flags: 0 }];
                chunk(S, r, true, &Chunk::BlockStatus { context: CONTEXT, extents })
            }),
        ),
        ("no reply", Box::new(|_| b"HTTP/1.1 400 Bad Request\r\n\r\nmore bytes than a header".to_vec())),
        (
            "impossible length",
            Box::new(|r| {
                let mut out = chunk(S, r, true, &Chunk::Hole { offset: 5, length: 1 });
                out[7] = 1;
                out[16..20].fill(0xff);
                out
            }),
        ),
        (
            "wrong length",
            Box::new(|r| {
                let message = Text::cut("x");
                let mut out = chunk(S, r, true, &Chunk::Error { error: Errno::Io, message, offset: None });
                out[25] = 200;
                out
            }),
        ),
    ]
}

#[tokio::test]
async fn a_lie_is_corrupt_and_ends_the_connection() {
    for (reason, lie) in lies() {
        let liar = Liar::new(Framing::Structured, lie);
        let client = liar.client().await.unwrap();
        let mut buf = vec![0xa5; LEN];
        let first = client.read_at(5, &mut buf).await;
        // One lie comes only after a good reply.
        let error = match first {
            Err(error) => error,
            Ok(()) => {
                assert_eq!(reason, "not made");
                client.read_at(5, &mut buf).await.expect_err(reason)
            }
        };
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unavailable), "{reason}: {error}");
        if error.kind() == ErrorKind::Corrupt {
            assert!(error.message().contains(reason), "{reason}: {error}");
        }
        let next = client.read_at(5, &mut buf).await.expect_err("the connection is gone");
        assert_eq!(next.kind(), ErrorKind::Unavailable, "{reason}: {next}");
    }
}

#[tokio::test]
async fn an_error_of_the_server_leaves_the_connection_alone() {
    let liar = Liar::new(Framing::Structured, |request| match request.offset {
        0 => {
            let message = Text::cut("two\nlines");
            chunk(Framing::Structured, request, true, &Chunk::Error { error: Errno::NoMem, message, offset: Some(3) })
        }
        _ => honest(Framing::Structured)(request),
    });
    let client = liar.client().await.unwrap();
    let mut buf = vec![0; 1000];
    let error = client.read_at(0, &mut buf).await.unwrap_err();
    assert_eq!((error.kind(), error.range()), (ErrorKind::Exhausted, Some((0, 1000))));
    assert_eq!(error.message(), "the server: out of memory: two lines");
    client.read_at(1, &mut buf).await.unwrap();
    assert!(buf == holey(1, 1000));
}

/// It is told goodbye, although the client is still there, and is asked for nothing more.
#[tokio::test]
async fn a_server_that_is_being_shut_down_is_left() {
    let (left, asked) = (Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (tell, count) = (left.clone(), asked.clone());
    let liar = Liar::new(Framing::Structured, move |request| {
        if request.command == Command::Disconnect {
            tell.notify_one();
            return Vec::new();
        }
        count.fetch_add(1, Relaxed);
        let message = Text::default();
        chunk(Framing::Structured, request, true, &Chunk::Error { error: Errno::Shutdown, message, offset: None })
    });
    let client = liar.client().await.unwrap();
    let error = client.read_at(0, &mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    tokio::time::timeout(LONG, left.notified()).await.expect("it is told goodbye");
    assert_eq!(client.read_at(0, &mut [0; 10]).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(asked.load(Relaxed), 1);
}

/// A server that knows no option but `GO`, to which it says `to_go`; gives back the last thing that the client said.
async fn last_words(mut stream: impl AsyncRead + AsyncWrite + Unpin, to_go: OptionReply) -> Last {
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    stream.write_all(&Greeting { flags }.encode()).await.unwrap();
    stream.read_exact(&mut [0; ClientFlags::LEN]).await.unwrap();
    loop {
        let mut header = [0; OptionHeader::LEN];
        stream.read_exact(&mut header).await.unwrap();
        let header = OptionHeader::decode(&header).unwrap();
        stream.read_exact(&mut vec![0; header.length as usize]).await.unwrap();
        let mut out = Vec::new();
        match header.code {
            OptionCode::Abort => return Last::Abort,
            OptionCode::Go => to_go.encode(header.code, &mut out),
            code => OptionReply::error(ReplyError::Unsupported, "").encode(code, &mut out),
        }
        if matches!(to_go, OptionReply::Info(_)) && header.code == OptionCode::Go {
            OptionReply::Ack.encode(header.code, &mut out);
            stream.write_all(&out).await.unwrap();
            let mut request = [0; Request::len(Framing::Simple)];
            stream.read_exact(&mut request).await.unwrap();
            return Last::Command(Request::decode(Framing::Simple, &request).unwrap().unwrap().command);
        }
        stream.write_all(&out).await.unwrap();
    }
}

#[derive(Debug, PartialEq)]
enum Last {
    Abort,
    Command(Command),
}

/// Only a side that is betrayed may simply hang up (proto.md, "Termination of the session during option haggling").
#[tokio::test]
async fn a_session_that_comes_to_nothing_is_ended_with_a_word() {
    let empty = OptionReply::Info(Info::Export { size: 0, flags: TransmissionFlags::HAS_FLAGS });
    for (reply, kind, last) in [
        (OptionReply::error(ReplyError::UnknownExport, ""), ErrorKind::NotFound, Last::Abort),
        (OptionReply::error(ReplyError::TlsRequired, ""), ErrorKind::Denied, Last::Abort),
        (OptionReply::error(ReplyError::Shutdown, ""), ErrorKind::Unavailable, Last::Abort),
        (empty, ErrorKind::InvalidInput, Last::Command(Command::Disconnect)),
    ] {
        let (here, there) = tokio::io::duplex(1 << 16);
        let server = tokio::spawn(last_words(there, reply));
        let error = Client::over(here, "x", ClientSettings::default()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(tokio::time::timeout(LONG, server).await.expect("stuck").unwrap(), last);
    }
}

/// The same where the kernel is to go on with the connections: an export that cannot be a device, and devices that
/// cannot be had.
#[tokio::test]
async fn a_device_that_comes_to_nothing_is_ended_with_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    for (size, takes_over) in [(1000, false), (1 << 20, false), (1 << 20, true)] {
        let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
        let export = OptionReply::Info(Info::Export { size, flags: TransmissionFlags::HAS_FLAGS });
        let server = async { last_words(listener.accept().await.unwrap().0, export).await };
        let client = async {
            let (sockets, disk) = kernel::connect(uri, NonZeroUsize::MIN, LONG).await?;
            let nowhere = Settings { device: Some(u32::MAX), ..Settings::default() };
            match takes_over {
                true => kernel::take_over(u32::MAX, sockets, disk, &nowhere).map(drop),
                false => kernel::attach(sockets, disk, &nowhere).map(drop),
            }
        };
        let both = async { tokio::join!(server, client) };
        let (last, refused) = tokio::time::timeout(LONG, both).await.expect("stuck");
        refused.expect_err("there is no such device");
        assert_eq!(last, Last::Command(Command::Disconnect), "{size}");
    }
}

#[tokio::test]
async fn extents_in_either_framing_and_lies_about_them() {
    for framing in [Framing::Structured, Framing::Extended] {
        let extents = |lengths: &'static [u64], context, twice: bool| {
            Liar::new(framing, move |request: &Request| {
                assert_eq!(request.command, Command::BlockStatus);
                let list = lengths.iter().zip(0..).map(|(length, n)| Descriptor { length: *length, flags: n % 2 * 3 });
                let status = Chunk::BlockStatus { context, extents: list.collect() };
                let first = chunk(framing, request, !twice, &status);
                if twice { [first, chunk(framing, request, true, &status)].concat() } else { first }
            })
        };
        let good = extents(&[1000, 2000, 1 << 19], CONTEXT, false).client().await.unwrap();
        let found = good.extents(10, 5000).await.unwrap();
        let ranges: Vec<_> = found.iter().map(|extent| extent.range.clone()).collect();
        assert_eq!(ranges, [10..1010, 1010..3010, 3010..5010], "{framing:?}");
        for liar in [
            extents(&[1000], CONTEXT + 1, false),
            extents(&[1000], CONTEXT, true),
            extents(&[5000, 1], CONTEXT, false),
            Liar::new(framing, move |request| chunk(framing, request, true, &Chunk::None)),
        ] {
            let error = liar.client().await.unwrap().extents(10, 5000).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }
}

#[tokio::test]
async fn what_is_no_nbd_server_is_told_so() {
    for (said, kind, reason) in [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".as_slice(), ErrorKind::InvalidInput, "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53........", ErrorKind::InvalidInput, "old-style"),
        (b"NBDMAGICIHAVEOPT\x00\x00", ErrorKind::InvalidInput, "too old"),
        (b"NBDMAGIC", ErrorKind::Unavailable, "closed the connection during the handshake"),
        (b"NBDMAGICIHAVEOPT\x00\x03and then nonsense of some length", ErrorKind::Corrupt, "magic number"),
    ] {
        let (here, mut there) = tokio::io::duplex(1 << 16);
        there.write_all(said).await.unwrap();
        there.shutdown().await.unwrap();
        let error = Client::over(here, "", ClientSettings::default()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(reason), "{error}");
    }
}

/// Nothing that a server sends makes the client panic, hang, or allocate without bound.
#[tokio::test]
async fn nonsense_after_the_handshake() {
    let seed = r3map_testkit::random::fresh_seed();
    let mut random = Random::new(seed);
    for _ in 0..300 {
        let nonsense: Vec<u8> = (0..random.below(200)).map(|_| u8::try_from(random.below(256)).unwrap()).collect();
        let magic = [[0x67, 0x44, 0x66, 0x98], [0x66, 0x8e, 0x33, 0xef]][usize::try_from(random.below(2)).unwrap()];
        let liar = Liar::new(Framing::Structured, move |request| {
            let mut out = magic.to_vec();
            out.extend(u32::from(ReplyFlags::DONE.bits()).to_be_bytes());
            out.extend(request.cookie.to_be_bytes());
            out.extend(&nonsense);
            out
        });
        let error = read(&liar.once(), 5, LEN).await.expect_err("that is no reply");
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unavailable), "seed {seed}: {error}");
    }
}
