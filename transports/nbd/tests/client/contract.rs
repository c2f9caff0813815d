//! The backend contract, over nbdkit, qemu-nbd and our own server: the conformance suite and the model.

use std::sync::{Arc, Mutex};

use r3map_core::{Access, Backend, ChunkSize};
use r3map_nbd::{Address, Client, ClientSettings, Server, ServerExport, ServerSettings};
use r3map_testkit::store::Store;
use r3map_testkit::{conformance, model};

use crate::support::{Foreign, backend, socket_in, unix_uri};

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

/// Our own server, on a Unix socket each time.
async fn own(store: impl Fn() -> Store) {
    let servers = Mutex::new(Vec::new());
    let fresh = async || {
        let directory = tempfile::tempdir().unwrap();
        let server =
            Server::new(vec![ServerExport::new("region", Arc::new(store()))], ServerSettings::default()).unwrap();
        server.listen(&Address::Unix(socket_in(directory.path()))).await.unwrap();
        let uri = unix_uri(&socket_in(directory.path()), "region");
        servers.lock().unwrap().push((server, directory));
        backend(uri).await
    };
    conformance::backend(fresh).await;
    servers.lock().unwrap().clear();
    model::check(fresh, model::Settings { runs: 4, at_once: 8, ..model::Settings::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_server() {
    own(|| Store::new(300_001)).await;
}

#[tokio::test]
async fn our_own_server_on_one_thread() {
    own(|| Store::new(300_001)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_pair_of_streams() {
    let fresh = async || {
        let server = Server::new(vec![ServerExport::new("x", Arc::new(Store::new(50_001)))], ServerSettings::default());
        let (here, there) = tokio::io::duplex(10_000);
        server.unwrap().serve_for_ever(there);
        Arc::new(Client::over(here, "x", ClientSettings::default()).await.unwrap()) as Arc<dyn Backend>
    };
    conformance::backend(fresh).await;
}

trait ServeForEver {
    fn serve_for_ever(self, stream: tokio::io::DuplexStream);
}

impl ServeForEver for Server {
    /// Keeps the server until its client has gone.
    fn serve_for_ever(self, stream: tokio::io::DuplexStream) {
        tokio::spawn(async move {
            let served = self.serve(stream);
            let _ = served.await;
        });
    }
}
