//! Clients and servers that are not ours.

use std::process::Command;
use std::sync::Arc;

use futures_util::future::try_join_all;
use r3map_core::{Backend, ErrorKind};
use r3map_grpc::{Client, ServerSettings, Target};
use r3map_local::Memory;
use r3map_testkit::process::Process;
use r3map_testkit::{deadline, fill, skip};
use tonic::Code;

use crate::common::peer::go::{ReadAtArgs, SyncArgs, WriteAtArgs};
use crate::common::{LIMIT, connect_error, go_settings, lasting, serve, tonic_go};

#[tokio::test]
async fn a_client_of_the_go_service_reads_writes_and_syncs() {
    let memory = Arc::new(Memory::new(100_000).unwrap());
    let (_server, target) = serve(memory.clone(), ServerSettings::default()).await;
    let mut client = tonic_go::connect(&target).await;

    let bytes = fill::bytes(8192, 4096, 1);
    let reply = client.write_at(WriteAtArgs { off: 8192, p: bytes.clone().into() }).await.unwrap().into_inner();
    assert_eq!(reply.length, 4096);
    let reply = client.read_at(ReadAtArgs { length: 4096, off: 8192 }).await.unwrap().into_inner();
    assert_eq!((reply.n, reply.p.to_vec()), (4096, bytes.clone()));
    client.sync(SyncArgs {}).await.unwrap();

    let mut stored = vec![0; 4096];
    memory.read_at(8192, &mut stored).await.unwrap();
    assert_eq!(stored, bytes);
}

#[tokio::test]
async fn a_client_of_the_go_service_gets_the_texts_that_it_knows() {
    let (_server, target) = serve(Arc::new(Memory::new(100_000).unwrap()), ServerSettings::default()).await;
    let mut client = tonic_go::connect(&target).await;
    for (length, off, code, text) in [
        ((32 << 20) + 1, 0, Code::Unknown, "max chunk size exceeded"),
        (i32::MAX, 0, Code::Unknown, "max chunk size exceeded"),
        (4096, 98_304, Code::Unknown, "EOF"),
        (1, i64::MAX, Code::Unknown, "EOF"),
        (-1, 0, Code::InvalidArgument, "negative length"),
        (1, -1, Code::InvalidArgument, "invalid offset"),
    ] {
        let status = client.read_at(ReadAtArgs { length, off }).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, text), "{length} at {off}");
    }
    let status = client.write_at(WriteAtArgs { off: 99_999, p: vec![1, 2].into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

/// gRPC's C core in Python, if this machine has it.
fn peer(arguments: &[&str]) -> Option<Process> {
    let has_grpc = |python: &&str| {
        let probe = Command::new(python).args(["-c", "import grpc"]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    let Some(python) = ["/usr/bin/python3", "python3"].into_iter().find(has_grpc) else {
        skip("there is no python3 with grpc (apt-get install python3-grpcio)");
        return None;
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peer/peer.py");
    Some(Process::start(Command::new(python).arg(script).args(arguments)))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_c_core_as_a_client_sees_what_it_expects_of_a_go_server() {
    const SIZE: u64 = (5 << 20) + 1000;
    let (_server, target) = serve(Arc::new(Memory::new(SIZE).unwrap()), lasting()).await;
    let Some(mut peer) = peer(&["check", &target.to_string(), &SIZE.to_string()]) else { return };
    let status = peer.wait(LIMIT);
    assert!(status.success(), "{status}: {:?}", peer.stderr());
    assert_eq!(peer.stdout(), ["agrees"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_c_core_as_a_server_sees_what_it_expects_of_a_go_client() {
    const SIZE: usize = (10 << 20) + 1000;
    let Some(mut peer) = peer(&["serve", &SIZE.to_string()]) else { return };
    let line = peer.wait_for_line(LIMIT, "listens on ");
    let target: Target = line.split("listens on ").nth(1).unwrap().trim().parse().unwrap();

    let client = Client::connect(target.clone(), go_settings(SIZE as u64)).await.unwrap();
    let mut bytes = vec![1; SIZE];
    client.read_at(0, &mut bytes).await.unwrap();
    assert!(r3map_core::is_zero(&bytes));
    fill::write(&mut bytes, 0, 9);
    client.write_at(0, &bytes).await.unwrap();
    client.flush().await.unwrap();
    let chunks = (0..512u64).map(|chunk| {
        let client = &client;
        async move {
            let mut buf = [0; 4096];
            client.read_at(chunk * 4096, &mut buf).await?;
            fill::check(&buf, chunk * 4096, 9).unwrap();
            Ok::<_, r3map_core::Error>(())
        }
    });
    deadline(LIMIT, "512 reads at once", try_join_all(chunks)).await.unwrap();
    let mut last = [0; 999];
    client.read_at(SIZE as u64 - 999, &mut last).await.unwrap();
    fill::check(&last, SIZE as u64 - 999, 9).unwrap();

    let error = connect_error(&target, go_settings(SIZE as u64 + 1)).await;
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains("is the size right?"), "{error}");
}
