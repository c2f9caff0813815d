//! Clients that ask for too much, for what cannot be, or for very much at once.

use std::sync::Arc;

use futures_util::future::{join_all, try_join_all};
use prost::Message;
use r3map_core::{Backend, Operation};
use r3map_grpc::{Client, ClientSettings, ServerSettings};
use r3map_local::{Memory, Null};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::{deadline, fill};
use tonic::{Code, Status};

use crate::common::peer::go::ReadAtArgs;
use crate::common::peer::region::{DescribeRequest, Range, RangeRequest, ReadRequest, WriteRequest};
use crate::common::tonic_region::range;
use crate::common::{LIMIT, connect, lasting, raw, serve, tonic_go, tonic_region};

const SIZE: u64 = 300_000;

fn memory() -> Arc<Memory> {
    Arc::new(Memory::new(SIZE).unwrap())
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) {
    let status = result.expect_err("it is refused");
    assert_eq!(status.code(), code, "{status}");
}

#[tokio::test]
async fn somebody_elses_client_reads_and_writes() {
    let memory = memory();
    let (_server, target) = serve(memory.clone(), lasting()).await;
    let mut client = tonic_region::connect(&target).await;
    let description = client.describe(DescribeRequest::default()).await.unwrap().into_inner();
    assert_eq!((description.major, description.size, description.chunk_size), (1, SIZE, 65536));
    assert_eq!(description.instance.len(), 16);

    let bytes = fill::bytes(70_000, 1000, 1);
    let reply = client.write(tonic_region::write(70_000, &bytes)).await.unwrap().into_inner();
    assert_eq!(reply.instance, description.instance);
    let ranges = vec![Range { offset: 0, length: 65_536 }, Range { offset: 70_000, length: 1000 }];
    let reply = client.read(ReadRequest { ranges }).await.unwrap().into_inner();
    assert_eq!(reply.data, bytes, "and no byte for the zeros");
    let runs: Vec<_> = reply.runs.iter().map(|run| (run.length, run.crc32c)).collect();
    let crc32c = tonic_region::sum(&[], &bytes);
    assert_eq!(runs, [(65_536, None), (1000, Some(crc32c))]);
    let numbers = [0, 65_536, 70_000, 1000, 65_536, 1 << 32, 1000, crc32c.into()];
    assert_eq!(reply.crc32c, tonic_region::sum(&numbers, &[]));
}

#[tokio::test]
async fn what_cannot_be_is_refused_before_anything_is_allocated_or_done() {
    let memory = memory();
    let settings = ServerSettings { max_request: 100_000, ..lasting() };
    let (_server, target) = serve(memory.clone(), settings).await;
    let mut client = tonic_region::connect(&target).await;
    let read = |offset, length| ReadRequest { ranges: vec![Range { offset, length }] };
    refused(client.read(read(0, 100_001)).await, Code::InvalidArgument);
    refused(client.read(read(0, u64::MAX)).await, Code::InvalidArgument);
    refused(client.read(read(u64::MAX, u64::MAX)).await, Code::InvalidArgument);
    refused(client.read(read(SIZE, 1)).await, Code::InvalidArgument);
    let ranges = vec![Range { offset: 0, length: 60_000 }; 2];
    refused(client.read(ReadRequest { ranges }).await, Code::InvalidArgument);
    let ranges = vec![Range { offset: 0, length: 1 }; 1025];
    refused(client.read(ReadRequest { ranges }).await, Code::InvalidArgument);

    let write = |len: usize, offset| tonic_region::write(offset, &vec![1; len]);
    refused(client.write(write(100_001, 0)).await, Code::InvalidArgument);
    refused(client.write(write(1 << 20, 0)).await, Code::InvalidArgument);
    refused(client.write(write(2, SIZE - 1)).await, Code::InvalidArgument);
    refused(client.write(write(1, u64::MAX)).await, Code::InvalidArgument);
    refused(client.write(WriteRequest { crc32c: 1, ..write(1, 0) }).await, Code::DataLoss);
    // A bit that flips on the way, in the place and not in the bytes.
    refused(client.write(WriteRequest { offset: 4096, ..write(1, 0) }).await, Code::DataLoss);
    for flipped in [RangeRequest { offset: 4096, ..range(0, 10) }, RangeRequest { length: 11, ..range(0, 10) }] {
        refused(client.trim(flipped).await, Code::DataLoss);
        refused(client.write_zeroes(flipped).await, Code::DataLoss);
        refused(client.extents(flipped).await, Code::DataLoss);
    }
    for (offset, length) in [(SIZE, 1), (0, u64::MAX), (u64::MAX, 2)] {
        refused(client.trim(range(offset, length)).await, Code::InvalidArgument);
        refused(client.write_zeroes(range(offset, length)).await, Code::InvalidArgument);
        refused(client.extents(range(offset, length)).await, Code::InvalidArgument);
    }
    let link = DescribeRequest { link: vec![0; 15].into(), ..DescribeRequest::default() };
    refused(client.describe(link).await, Code::InvalidArgument);

    let mut bytes = vec![1; 300_000];
    memory.read_at(0, &mut bytes).await.unwrap();
    assert!(r3map_core::is_zero(&bytes), "nothing was written");
}

#[tokio::test]
async fn a_read_only_server_denies_changes_to_those_who_do_not_ask() {
    let settings = ServerSettings { read_only: true, ..lasting() };
    let (_server, target) = serve(memory(), settings).await;
    let mut client = tonic_region::connect(&target).await;
    refused(client.write(tonic_region::write(0, b"x")).await, Code::PermissionDenied);
    refused(client.trim(range(0, 1)).await, Code::PermissionDenied);
    refused(client.write_zeroes(range(0, 1)).await, Code::PermissionDenied);
    let mut client = tonic_go::connect(&target).await;
    let write = crate::common::peer::go::WriteAtArgs { off: 0, p: b"x".as_ref().into() };
    refused(client.write_at(write).await, Code::PermissionDenied);
}

#[tokio::test]
async fn more_calls_at_once_than_a_go_program_makes_are_all_answered() {
    let faults = Faults::new(Arc::new(Memory::new(SIZE).unwrap()));
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = tonic_go::connect(&target).await;
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let calls = (0..600).map(|call: i64| {
        let mut client = client.clone();
        tokio::spawn(async move { client.read_at(ReadAtArgs { length: 100, off: call * 100 }).await })
    });
    let calls: Vec<_> = calls.collect();
    deadline(LIMIT, "600 calls at once", faults.wait_in_flight(600)).await;
    pause.release();
    for call in join_all(calls).await {
        assert_eq!(call.unwrap().unwrap().into_inner().p.len(), 100);
    }
}

#[tokio::test]
async fn memory_for_requests_is_bounded_and_everybody_gets_a_turn() {
    let faults = Faults::new(Arc::new(Memory::new(64 << 20).unwrap()));
    let settings = ServerSettings { max_request: 1 << 20, in_flight: 4 << 20, ..lasting() };
    let (_server, target) = serve(faults.clone(), settings).await;
    let client = connect(&target).await;
    let client = &client;
    let writes =
        (0..64u64).map(|part| async move { client.write_at(part << 20, &fill::bytes(part << 20, 1 << 20, 3)).await });
    deadline(LIMIT, "the writes", try_join_all(writes)).await.unwrap();
    let reads = (0..64u64).map(|part| async move {
        let mut buf = vec![0; 1 << 20];
        client.read_at(part << 20, &mut buf).await?;
        fill::check(&buf, part << 20, 3).unwrap();
        Ok::<_, r3map_core::Error>(())
    });
    deadline(LIMIT, "the reads", try_join_all(reads)).await.unwrap();
    assert!(faults.most_in_flight() <= 4, "{} requests of 1 MiB in 4 MiB", faults.most_in_flight());
}

/// Each asks for all of the memory that there is, and takes none of it: it reads what comes over TCP and answers pings, but
/// gives HTTP/2 no window for more than the beginning of each reply.
#[tokio::test]
async fn clients_that_never_read_their_replies_hold_up_nobody() {
    const LENGTH: u64 = 128 << 10;
    let memory = Memory::new(1 << 20).unwrap();
    memory.write_at(0, &fill::bytes(0, 1 << 20, 3)).await.unwrap();
    let settings = ServerSettings { max_request: 1 << 20, in_flight: 16 << 20, ..lasting() };
    let (_server, target) = serve(Arc::new(memory), settings).await;
    let ranges = vec![Range { offset: 0, length: LENGTH }];
    let mut request = vec![0; 5];
    ReadRequest { ranges }.encode(&mut request).unwrap();
    request[4] = u8::try_from(request.len() - 5).unwrap();
    let mut unread = Vec::new();
    for _ in 0..8 {
        let deaf = raw::Connection::open(&target).await;
        let send = |_| tokio::spawn(deaf.send("/r3map.region.v1.Region/Read", "application/grpc", &request));
        let mut answers: Vec<_> = (0..(16 << 20) / LENGTH).map(send).collect();
        unread.push(deadline(LIMIT, "the first answer", &mut answers[0]).await.unwrap());
        // Those that come are kept until all have come, which they do not.
        tokio::spawn(join_all(answers.into_iter().skip(1)));
    }
    let client = deadline(LIMIT, "connecting", connect(&target)).await;
    let others = async {
        for _ in 0..16 {
            let mut read = vec![0; 1 << 20];
            client.read_at(0, &mut read).await.unwrap();
            fill::check(&read, 0, 3).unwrap();
            client.write_at(0, &read).await.unwrap();
        }
    };
    deadline(LIMIT, "a client that reads", others).await;
    assert_eq!(unread.len(), 8);
}

#[tokio::test]
async fn one_long_call_is_cut_and_several_parts_are_under_way() {
    const LONG: usize = 20 << 20;
    let faults = Faults::new(Arc::new(Memory::new(LONG as u64 + 1).unwrap()));
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = connect(&target).await;
    let bytes = fill::bytes(1, LONG, 5);
    client.write_at(1, &bytes).await.unwrap();
    let mut read = vec![0; LONG];
    client.read_at(1, &mut read).await.unwrap();
    assert!(read == bytes);
    assert!((5..=6).contains(&faults.count(Operation::Write)), "{}", faults.count(Operation::Write));
    assert!((5..=6).contains(&faults.count(Operation::Read)), "{}", faults.count(Operation::Read));
}

/// What comes first of a long read may be what the backend has last: what was asked for ahead must leave room for it.
#[tokio::test]
async fn long_reads_whose_beginnings_come_last_do_not_keep_them_out() {
    const LONG: usize = 16 << 20;
    let memory = Memory::new(LONG as u64).unwrap();
    memory.write_at(0, &fill::bytes(0, LONG, 5)).await.unwrap();
    let faults = Faults::new(Arc::new(memory));
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = Arc::new(connect(&target).await);
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Read).touching(0..1).hold(&pause));
    let reads: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut read = vec![0; LONG];
                client.read_at(0, &mut read).await.unwrap();
                fill::check(&read, 0, 5).unwrap();
            })
        })
        .collect();
    deadline(LIMIT, "the beginnings", pause.wait_held(8)).await;
    let moved = || client.capabilities().activity.unwrap().moved();
    let all_that_can = async {
        let mut before = 0;
        while std::mem::replace(&mut before, moved()) != before {
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    };
    deadline(LIMIT, "what was asked for ahead", all_that_can).await;
    pause.release();
    for read in deadline(LIMIT, "the reads", join_all(reads)).await {
        read.unwrap();
    }
}

/// More than the server has room for, and than a connection's window holds beside that: those that wait for room must leave
/// a way for the rest of those that have it.
#[tokio::test]
async fn writes_that_wait_for_room_do_not_keep_out_what_there_is_room_for() {
    let faults = Faults::new(Arc::new(Memory::new(128 << 20).unwrap()));
    let settings = ServerSettings { max_request: 4 << 20, in_flight: 16 << 20, ..lasting() };
    let (_server, target) = serve(faults.clone(), settings).await;
    let keep_alive = std::time::Duration::from_millis(200);
    let settings = ClientSettings { keep_alive, ..ClientSettings::default() };
    let client = &Client::connect(target, settings).await.unwrap();
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Write).hold(&pause));
    let write = |part: u64| async move { client.write_at(part << 22, &fill::bytes(part << 22, 4 << 20, 3)).await };
    let writes = try_join_all((0..32).map(write));
    let hold = async {
        // Until the server takes no more, and some times as long as it takes to give it up if it gives no sign of life.
        pause.wait_held(3).await;
        tokio::time::sleep(10 * keep_alive).await;
        pause.release();
        Ok(())
    };
    deadline(LIMIT, "the writes", futures_util::future::try_join(writes, hold)).await.unwrap();
    assert_eq!(faults.count(Operation::Write), 32, "each was made once");
}

#[tokio::test]
async fn zeros_cost_nothing() {
    let (_server, target) = serve(Arc::new(Null::new(1 << 40).unwrap()), lasting()).await;
    let client = connect(&target).await;
    let mut zeros = 0;
    let mut visit = |_: u64, piece: r3map_core::Piece<'_>| {
        assert!(matches!(piece, r3map_core::Piece::Zeroes(_)));
        zeros += piece.len();
        Ok(())
    };
    client.capabilities().pieces.unwrap().read_pieces(12345, 1 << 30, &mut visit).await.unwrap();
    assert_eq!(zeros, 1 << 30);
}

#[tokio::test]
async fn what_is_no_grpc_is_refused_and_others_are_served_on() {
    use tokio::io::AsyncWriteExt;
    let (_server, target) = serve(memory(), lasting()).await;
    let client = connect(&target).await;
    let address = target.to_string();
    for garbage in
        [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0xff; 100_000], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff".to_vec()]
    {
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        // It may be refused before it is all written.
        let _ = stream.write_all(&garbage).await;
    }
    client.write_at(0, b"still here").await.unwrap();
}

#[tokio::test]
async fn unknown_methods_and_malformed_requests_are_refused() {
    let (_server, target) = serve(memory(), lasting()).await;
    for (path, body, code) in [
        ("/r3map.region.v1.Region/Nothing", &[0, 0, 0, 0, 0][..], "12"),
        ("/r3map.region.v1.Region/Read", &[0, 0, 0, 0, 2, 0x0a, 9], "3"),
        ("/r3map.region.v1.Region/Read", &[], "3"),
        ("/r3map.region.v1.Region/Read", &[1, 0, 0, 0, 0], "3"),
        ("/r3map.region.v1.Region/Read", &[0, 0, 0, 0, 9], "3"),
        ("/r3map.region.v1.Region/Read", &[0, 0, 0, 0, 0, 0], "3"),
        ("/r3map.region.v1.Region/Read", &[0, 0xff, 0xff, 0xff, 0xff], "3"),
        ("/r3map.region.v1.Region/Write", &[0, 0xff, 0xff, 0xff, 0xff], "3"),
        ("/r3map.region.v1.Region/Write", &[0, 0, 0, 0, 2, 0x1a, 9], "3"),
        ("/r3map.region.v1.Region/Write", &[0, 0, 0, 0, 1, 0x1b], "3"),
    ] {
        let (status, code_now) = raw::call(&target, path, "application/grpc", body).await;
        assert_eq!((status, code_now.as_deref()), (200, Some(code)), "{path} {body:?}");
    }
    let (status, _) = raw::call(&target, "/r3map.region.v1.Region/Read", "text/html", &[]).await;
    assert_eq!(status, 415);
}

#[tokio::test]
async fn more_connections_than_allowed_wait_until_another_ends() {
    let settings = ServerSettings { connections: 1.try_into().unwrap(), ..lasting() };
    let (_server, target) = serve(memory(), settings).await;
    let first = connect(&target).await;
    let mut second = Box::pin(connect(&target));
    let early = tokio::time::timeout(std::time::Duration::from_millis(200), &mut second).await;
    assert!(early.is_err(), "it did not wait");
    first.flush().await.unwrap();
    drop(first);
    deadline(LIMIT, "the second connection", second).await.flush().await.unwrap();
}
