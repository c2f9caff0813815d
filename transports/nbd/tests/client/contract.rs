//! The backend contract, over nbdkit, qemu-nbd and our own server: the conformance suite and the model.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use r3map_core::{Access, Backend, ChunkSize, ExtentKind};
use r3map_nbd::wire::TransmissionFlags;
use r3map_nbd::{Address, Client, ClientSettings, Server, ServerExport, ServerSettings};
use r3map_testkit::store::Store;
use r3map_testkit::{conformance, model};

use crate::support::{Foreign, backend, read, socket_in, unix_uri};

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

/// The qemu-nbd of a newer Debian, which knows extended headers.
fn newer_qemu_nbd() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/trixie/bin/qemu-nbd");
    if !program.exists() {
        r3map_testkit::skip("the qemu-nbd of a newer Debian is not there; `cargo xtask setup` gets it");
        return None;
    }
    Some(program)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd_with_extended_headers() {
    let Some(program) = newer_qemu_nbd() else { return };
    conforms(|| Foreign::qemu_nbd_at(&program, &["--shared=0"], 307_200)).await;
}

/// What no request without extended headers can say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_more_than_32_bits() {
    const SIZE: u64 = 12 << 30;
    let Some(program) = newer_qemu_nbd() else { return };
    let server = Foreign::qemu_nbd_at(&program, &["--shared=0", "--discard=unmap"], SIZE);
    let client = server.client().await;
    assert!(client.flags().contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD), "it comes with extended headers only");
    let at = (9 << 30) + 5;
    client.write_at(at, &[7; 10_000]).await.unwrap();
    assert!(read(&client, at, 10_000).await == [7; 10_000]);
    let all = client.capabilities().extents.unwrap().extents(0, SIZE).await.unwrap();
    assert_eq!((all[0].kind, all[0].range.start), (ExtentKind::Hole, 0));
    assert!(all[0].range.end > 8 << 30, "{all:?}");
    client.capabilities().trim.unwrap().trim(0, SIZE).await.unwrap();
    assert!(read(&client, at, 10_000).await == [0; 10_000]);
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
