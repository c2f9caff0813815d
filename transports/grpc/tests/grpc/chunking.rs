//! Servers of the Go programs that do not cut requests into chunks: nothing is sent to them that they would put, or look
//! for, in the wrong place.

use std::sync::Arc;

use r3map_core::{Access, Backend, ChunkSize, ErrorKind};
use r3map_grpc::{Client, ClientSettings, GoRegion, GoRequests, Target};
use r3map_pipeline::Aligned;
use r3map_testkit::{conformance, deadline, fill, model};

use crate::common::go_directory::GoDirectory;
use crate::common::{LIMIT, connect_error, settings, tonic_go};

const CHUNK: u64 = 8192;
/// Neither a multiple of the chunk nor of anything else.
const SIZE: u64 = 40 * CHUNK + 4099;

fn told(chunk: u64, requests: GoRequests) -> ClientSettings {
    let chunk_size = ChunkSize::new(chunk).unwrap();
    ClientSettings { go: Some(GoRegion { size: SIZE, chunk_size, requests }), ..settings() }
}

async fn connect(target: &Target, requests: GoRequests) -> Client {
    deadline(LIMIT, "connecting", Client::connect(target.clone(), told(CHUNK, requests))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_to_a_go_server_is_exactly_one_chunk() {
    let directory = GoDirectory::new(CHUNK);
    let client = connect(&directory.serve().await, GoRequests::default()).await;
    assert_eq!(client.capabilities().access, Access::WholeChunks(ChunkSize::new(CHUNK).unwrap()));
    let bytes = fill::bytes(0, usize::try_from(SIZE).unwrap(), 3);
    client.write_at(0, &bytes).await.unwrap();
    client.flush().await.unwrap();
    let mut found = vec![0; bytes.len()];
    client.read_at(0, &mut found).await.unwrap();
    fill::check(&found, 0, 3).unwrap();

    let starts: Vec<_> = (0..=40).map(|index| index * i64::try_from(CHUNK).unwrap()).collect();
    assert_eq!(directory.files().into_keys().collect::<Vec<_>>(), starts);
    for (off, len) in directory.requests() {
        let (off, len) = (u64::try_from(off).unwrap(), len as u64);
        assert!(off % CHUNK == 0 && len == CHUNK.min(SIZE - off), "{len} bytes at {off}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_chunks_are_refused_before_they_are_sent() {
    let directory = GoDirectory::new(CHUNK);
    let client = connect(&directory.serve().await, GoRequests::OneChunk).await;
    let before = directory.requests().len();
    for (offset, len) in [(1, 100), (0, 100), (CHUNK / 2, CHUNK / 2), (CHUNK, CHUNK + 1), (SIZE - 1, 1)] {
        let mut buf = vec![0; usize::try_from(len).unwrap()];
        let read = client.read_at(offset, &mut buf).await.unwrap_err();
        let write = client.write_at(offset, &buf).await.unwrap_err();
        assert_eq!((read.kind(), write.kind()), (ErrorKind::InvalidInput, ErrorKind::InvalidInput), "{offset}");
    }
    assert_eq!(directory.requests().len(), before);
}

/// Why that is the default: the server answers well, and the bytes are not where the next one looks for them.
#[tokio::test(flavor = "multi_thread")]
async fn told_wrongly_that_a_go_server_cuts_requests_bytes_are_lost() {
    let directory = GoDirectory::new(CHUNK);
    let target = directory.serve().await;
    let bytes = fill::bytes(0, usize::try_from(2 * CHUNK).unwrap(), 5);
    connect(&target, GoRequests::Any).await.write_at(0, &bytes).await.unwrap();
    let mut second = vec![1; usize::try_from(CHUNK).unwrap()];
    connect(&target, GoRequests::OneChunk).await.read_at(CHUNK, &mut second).await.unwrap();
    assert!(r3map_core::is_zero(&second));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_go_server_that_does_not_cut_requests_conforms() {
    let make = async || {
        let target = GoDirectory::new(CHUNK).serve().await;
        Arc::new(connect(&target, GoRequests::OneChunk).await) as Arc<dyn Backend>
    };
    conformance::backend(make).await;
    model::check(make, model::Settings::default()).await;
    let aligned = async || Arc::new(Aligned::new(make().await).unwrap()) as Arc<dyn Backend>;
    conformance::backend(aligned).await;
    model::check(aligned, model::Settings::default()).await;
}

#[tokio::test]
async fn a_chunk_that_does_not_fit_a_message_of_the_go_programs_is_refused() {
    let memory = || Arc::new(r3map_local::Memory::new(SIZE).unwrap());
    let target = tonic_go::serve(memory()).await;
    let error = connect_error(&target, told(4 << 20, GoRequests::OneChunk)).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("less than 4 MiB") && !error.to_string().contains('\n'), "{error}");
    Client::connect(target, told(4 << 20, GoRequests::Any)).await.unwrap();
}
