//! Clients and servers that are not ours.

use std::sync::Arc;

use r3map_core::Backend;
use r3map_grpc::ServerSettings;
use r3map_local::Memory;
use r3map_testkit::fill;
use tonic::Code;

use crate::common::peer::go::{ReadAtArgs, SyncArgs, WriteAtArgs};
use crate::common::{serve, tonic_go};

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
