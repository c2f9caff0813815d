//! The backend contract, over nbdkit and qemu-nbd: the conformance suite and the model.

use std::sync::Arc;
use std::sync::Mutex;

use r3map_core::{Access, Backend, ChunkSize};
use r3map_testkit::{conformance, model};

use crate::support::{Foreign, backend};

/// Holds the contract over fresh servers, one for each region that a test asks for. They live until the test ends.
async fn conforms(start: impl Fn() -> Foreign) {
    let servers = Mutex::new(Vec::new());
    let fresh = async || {
        let server = start();
        let uri = server.uri("");
        servers.lock().unwrap().push(server);
        backend(uri).await
    };
    conformance::backend(fresh).await;
    servers.lock().unwrap().clear();
    let settings = model::Settings { runs: 2, at_once: 8, ..model::Settings::default() };
    model::check(fresh, settings).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_memory() {
    conforms(|| Foreign::nbdkit("memory 300001")).await;
}

#[tokio::test]
async fn nbdkit_memory_on_one_thread() {
    conforms(|| Foreign::nbdkit("memory 300001")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_with_simple_replies() {
    conforms(|| Foreign::nbdkit("--no-sr memory 300001")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdkit_with_block_sizes() {
    let text = "--filter=blocksize-policy memory 305152 blocksize-minimum=512 blocksize-preferred=4096 \
                blocksize-maximum=65536 blocksize-error-policy=error";
    let server = Foreign::nbdkit(text);
    let client = server.client().await;
    assert_eq!(client.capabilities().access, Access::WholeChunks(ChunkSize::MIN));
    assert_eq!(client.capabilities().preferred_chunk, Some(ChunkSize::MIN));
    conforms(|| Foreign::nbdkit(text)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd() {
    conforms(|| Foreign::qemu_nbd(&["--shared=0"], 307_200)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_export() {
    let server = Foreign::nbdkit("--readonly memory 1M");
    let client = Arc::new(server.client().await);
    assert!(client.capabilities().read_only);
    let error = client.write_at(0, &[1]).await.unwrap_err();
    assert_eq!((error.kind(), error.range()), (r3map_core::ErrorKind::Denied, Some((0, 1))));
    client.flush().await.unwrap();
}
