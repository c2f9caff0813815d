//! Servers that say what cannot be: the client gives out no byte that it cannot vouch for, and an error instead.

use std::sync::atomic::Ordering;

use r3map_core::{Backend, ErrorKind, ReadOp};
use r3map_grpc::{Client, ClientSettings, GoRegion};
use tonic::Status;
use tonic::service::Routes;

use crate::common::peer::go::backend_server::{Backend as GoBackend, BackendServer};
use crate::common::peer::go::{ReadAtArgs, ReadAtReply, SyncArgs, SyncReply, WriteAtArgs, WriteAtReply};
use crate::common::peer::region::{Extent, Run};
use crate::common::tonic_go::serve_with;
use crate::common::tonic_region::{self, Fake};
use crate::common::{connect, connect_error, go_settings, settings};

const SIZE: u64 = 100_000;

#[tokio::test]
async fn an_honest_server_of_somebody_else_is_understood() {
    let fake = Fake::new(SIZE);
    let client = connect(&fake.clone().serve().await).await;
    assert_eq!((client.size(), client.capabilities().preferred_chunk.map(|chunk| chunk.bytes())), (SIZE, Some(4096)));
    let mut buf = [0; 9000];
    client.read_at(77, &mut buf).await.unwrap();
    assert_eq!(buf, [0x5a; 9000]);

    client.write_at(5, b"bytes").await.unwrap();
    let written = fake.written.lock().unwrap().take().unwrap();
    assert_eq!((written.offset, written.data.as_ref()), (5, b"bytes".as_ref()));
    assert_eq!(written, tonic_region::write(5, b"bytes"));
    client.flush().await.unwrap();

    let abilities = client.capabilities();
    abilities.trim.unwrap().trim(0, 10).await.unwrap();
    assert!(abilities.write_zeroes.is_none());
    assert_eq!(abilities.extents.unwrap().extents(10, 20).await.unwrap()[0].range, 10..30);
}

#[tokio::test]
async fn many_reads_are_one_round_trip() {
    let fake = Fake::new(SIZE);
    let client = connect(&fake.clone().serve().await).await;
    let mut bufs = [[0; 100]; 6];
    let mut reads: Vec<_> = bufs.iter_mut().map(|buf| ReadOp { offset: 7, buf }).collect();
    client.capabilities().read_many.unwrap().read_many(&mut reads).await.unwrap();
    assert_eq!(bufs, [[0x5a; 100]; 6]);
    assert_eq!(fake.reads.load(Ordering::Relaxed), 2, "the server takes four ranges at once");
}

#[tokio::test]
async fn a_reply_that_is_not_what_was_asked_for_is_corrupt_and_nothing_is_lent() {
    let lies: [fn(&mut crate::common::peer::region::ReadReply); 8] = [
        |reply| reply.runs[0].crc32c = Some(reply.runs[0].crc32c.unwrap() ^ 1),
        |reply| {
            let mut data = reply.data.to_vec();
            data[99] ^= 1;
            reply.data = data.into();
        },
        |reply| reply.runs[0].length = u64::MAX,
        |reply| reply.runs[0].length += 1,
        |reply| reply.data = reply.data.slice(1..),
        |reply| reply.runs.clear(),
        |reply| reply.runs.insert(0, Run { length: u64::MAX, crc32c: None }),
        |reply| reply.runs = vec![Run { length: 0, crc32c: None }; 1000],
    ];
    for (number, read) in lies.into_iter().enumerate() {
        let client = connect(&Fake { read, ..Fake::new(SIZE) }.serve().await).await;
        let mut lent = 0;
        let pieces = client.capabilities().pieces.unwrap();
        let mut visit = |_: u64, piece: r3map_core::Piece<'_>| {
            lent += piece.len();
            Ok(())
        };
        let error = pieces.read_pieces(1000, 5000, &mut visit).await.expect_err("it is a lie");
        assert_eq!((error.kind(), lent), (ErrorKind::Corrupt, 0), "lie {number}: {error}");
    }
}

/// As where a bit of the request has flipped on its way, or the answer is somebody else's.
#[tokio::test]
async fn a_reply_to_something_else_is_corrupt() {
    let client = connect(&Fake { flipped: 1, ..Fake::new(SIZE) }.serve().await).await;
    let read = client.read_at(1000, &mut [0; 10]).await.unwrap_err();
    let extents = client.capabilities().extents.unwrap().extents(10, 10).await.unwrap_err();
    assert_eq!([read.kind(), extents.kind()], [ErrorKind::Corrupt; 2], "{read}, {extents}");
}

#[tokio::test]
async fn a_reply_that_goes_on_after_what_was_asked_for_is_corrupt() {
    let lies: [fn(&mut crate::common::peer::region::ReadReply); 3] = [
        |reply| reply.runs.push(Run { length: 1, crc32c: None }),
        |reply| reply.data = [&reply.data[..], b"x"].concat().into(),
        |reply| reply.data = vec![0; 1 << 20].into(),
    ];
    for (number, read) in lies.into_iter().enumerate() {
        let client = connect(&Fake { read, ..Fake::new(SIZE) }.serve().await).await;
        let error = client.read_at(0, &mut [0; 10]).await.expect_err("it is a lie");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "lie {number}: {error}");
    }
}

#[tokio::test]
async fn a_write_that_nobody_signs_for_is_no_write() {
    let client = connect(&Fake { write: |reply| reply.instance.clear(), ..Fake::new(SIZE) }.serve().await).await;
    assert_eq!(client.write_at(0, b"x").await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn extents_that_do_not_fit_are_corrupt() {
    let lies: [fn(&mut crate::common::peer::region::ExtentsReply); 4] = [
        |reply| reply.extents.clear(),
        |reply| reply.extents[0].length += 1,
        |reply| reply.extents[0].length = 0,
        |reply| reply.extents.push(Extent { length: u64::MAX, hole: true }),
    ];
    for (number, extents) in lies.into_iter().enumerate() {
        let client = connect(&Fake { extents, ..Fake::new(SIZE) }.serve().await).await;
        let error = client.capabilities().extents.unwrap().extents(10, 10).await.expect_err("it is a lie");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "lie {number}: {error}");
    }
}

#[tokio::test]
async fn another_version_is_one_line_that_names_both() {
    let mut fake = Fake::new(SIZE);
    (fake.description.major, fake.description.minor) = (2, 3);
    let error = connect_error(&fake.serve().await, settings()).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let text = error.to_string();
    assert!(text.contains("version 2.3") && text.contains("version 1.0") && !text.contains('\n'), "{text}");
}

#[tokio::test]
async fn a_region_that_cannot_be_is_refused() {
    let lies: [fn(&mut Fake); 6] = [
        |fake| fake.description.size = 0,
        |fake| fake.description.size = u64::MAX,
        |fake| fake.description.chunk_size = 5000,
        |fake| fake.description.chunk_size = 0,
        |fake| fake.description.max_request = 0,
        |fake| fake.description.max_ranges = 0,
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let mut fake = Fake::new(SIZE);
        lie(&mut fake);
        let error = connect_error(&fake.serve().await, settings()).await;
        assert_eq!(error.kind(), ErrorKind::Corrupt, "lie {number}: {error}");
    }
}

/// A server of the Go service, of which only the last chunk can be read as it should be.
struct GoLiar(fn(&mut ReadAtReply, &mut WriteAtReply));

const LAST: i64 = 98_304;

#[tonic::async_trait]
impl GoBackend for GoLiar {
    async fn read_at(&self, request: tonic::Request<ReadAtArgs>) -> Result<tonic::Response<ReadAtReply>, Status> {
        let ReadAtArgs { length, off } = request.into_inner();
        let mut reply = ReadAtReply { n: length, p: vec![1; usize::try_from(length).unwrap()].into() };
        if off != LAST {
            (self.0)(&mut reply, &mut WriteAtReply::default());
        }
        Ok(tonic::Response::new(reply))
    }

    async fn write_at(&self, request: tonic::Request<WriteAtArgs>) -> Result<tonic::Response<WriteAtReply>, Status> {
        let mut reply = WriteAtReply { length: i32::try_from(request.get_ref().p.len()).unwrap() };
        (self.0)(&mut ReadAtReply::default(), &mut reply);
        Ok(tonic::Response::new(reply))
    }

    async fn sync(&self, _: tonic::Request<SyncArgs>) -> Result<tonic::Response<SyncReply>, Status> {
        Err(Status::unknown("short write"))
    }
}

async fn go_liar(lie: fn(&mut ReadAtReply, &mut WriteAtReply)) -> Client {
    let target = serve_with(Routes::new(BackendServer::new(GoLiar(lie)))).await;
    Client::connect(target, go_settings(SIZE)).await.unwrap()
}

#[tokio::test]
async fn a_short_read_or_write_of_a_go_server_is_corrupt() {
    let lies: [fn(&mut ReadAtReply, &mut WriteAtReply); 4] = [
        |read, write| {
            read.n -= 1;
            write.length -= 1;
        },
        |read, write| {
            read.p.truncate(read.p.len().saturating_sub(1));
            write.length += 1;
        },
        |read, write| {
            read.p = [&read.p[..], &[0]].concat().into();
            write.length = -1;
        },
        |read, write| {
            *read = ReadAtReply::default();
            write.length = 0;
        },
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let client = go_liar(lie).await;
        let error = client.read_at(0, &mut [0; 100]).await.expect_err("it is a lie");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "lie {number}: {error}");
        let error = client.write_at(0, &[0; 100]).await.expect_err("it is a lie");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "lie {number}: {error}");
    }
}

#[tokio::test]
async fn errors_of_a_go_server_are_understood_by_their_text() {
    let client = go_liar(|_, _| {}).await;
    let error = client.flush().await.unwrap_err();
    assert_eq!((error.kind(), error.message().ends_with("short write")), (ErrorKind::Corrupt, true));
    let go = |size| ClientSettings { go: Some(GoRegion { size, ..go_settings(size).go.unwrap() }), ..settings() };
    let memory = std::sync::Arc::new(r3map_local::Memory::new(SIZE).unwrap());
    let target = crate::common::tonic_go::serve(memory).await;
    let error = connect_error(&target, go(SIZE + 1)).await;
    assert!(error.to_string().contains("is the size right? (EOF)"), "{error}");
}
