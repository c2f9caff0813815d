//! What the tests of this crate share: pairs of server and client, and servers and clients that tonic generated from
//! the same protocol files, which stand for everybody else's.

pub(crate) mod go_directory;
pub(crate) mod raw;
pub(crate) mod tonic_go;
pub(crate) mod tonic_region;

use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, ChunkSize, Error};
use r3map_grpc::{Client, ClientSettings, GoRegion, GoRequests, Server, ServerSettings, Target};
use r3map_testkit::deadline;
use tempfile::TempDir;

/// What tonic generated.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub(crate) mod peer {
    pub(crate) mod region {
        include!(concat!(env!("OUT_DIR"), "/peer/r3map.region.v1.rs"));
    }
    pub(crate) mod go {
        include!(concat!(env!("OUT_DIR"), "/peer/com.pojtinger.felicitas.r3map.mount.v1.rs"));
    }
    pub(crate) mod go_seeder {
        include!(concat!(env!("OUT_DIR"), "/peer/com.pojtinger.felicitas.r3map.migration.v1.rs"));
    }
}

/// No step of a test needs a tenth of this, even on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A target that the system completes with a port.
pub(crate) fn any_port() -> Target {
    "127.0.0.1:0".parse().unwrap()
}

/// A server on a TCP port that the system chose.
pub(crate) async fn serve(backend: Arc<dyn Backend>, settings: ServerSettings) -> (Server, Target) {
    let server = Server::new(backend, settings).unwrap();
    let target = server.listen(&any_port()).await.unwrap();
    (server, target)
}

/// A client with settings that let a test find out soon what is wrong.
pub(crate) async fn connect(target: &Target) -> Client {
    deadline(LIMIT, "connecting", Client::connect(target.clone(), settings())).await.unwrap()
}

pub(crate) async fn connect_error(target: &Target, settings: ClientSettings) -> Error {
    deadline(LIMIT, "not connecting", Client::connect(target.clone(), settings)).await.expect_err("it connected")
}

pub(crate) fn settings() -> ClientSettings {
    ClientSettings::default()
}

pub(crate) fn go_settings(size: u64) -> ClientSettings {
    let go = GoRegion { size, chunk_size: ChunkSize::MIN, requests: GoRequests::Any };
    ClientSettings { go: Some(go), ..settings() }
}

/// The settings of a server whose region outlives it.
pub(crate) fn lasting() -> ServerSettings {
    ServerSettings { identity: Some("the test's region".to_owned()), ..ServerSettings::default() }
}

/// A client that owns everything behind it.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) client: Client,
    _server: Option<Server>,
    _folder: Option<TempDir>,
}

pub(crate) async fn over_tcp(backend: Arc<dyn Backend>, settings: ServerSettings) -> Pair {
    let (server, target) = serve(backend, settings).await;
    Pair { client: connect(&target).await, _server: Some(server), _folder: None }
}

pub(crate) async fn over_connections(backend: Arc<dyn Backend>, connections: usize) -> Pair {
    let (server, target) = serve(backend, lasting()).await;
    let settings = ClientSettings { connections: connections.try_into().unwrap(), ..settings() };
    Pair { client: Client::connect(target, settings).await.unwrap(), _server: Some(server), _folder: None }
}

pub(crate) async fn over_unix(backend: Arc<dyn Backend>, settings: ServerSettings) -> Pair {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::new(backend, settings).unwrap();
    let target = server.listen(&Target::Unix(folder.path().join("socket"))).await.unwrap();
    Pair { client: connect(&target).await, _server: Some(server), _folder: Some(folder) }
}

/// Over the Go programs' service, which tonic serves.
pub(crate) async fn over_go(backend: Arc<dyn Backend>) -> Pair {
    let size = backend.size();
    let target = tonic_go::serve(backend).await;
    let client = deadline(LIMIT, "connecting", Client::connect(target, go_settings(size))).await.unwrap();
    Pair { client, _server: None, _folder: None }
}

#[async_trait::async_trait]
impl Backend for Pair {
    fn size(&self) -> u64 {
        self.client.size()
    }

    fn capabilities(&self) -> r3map_core::Capabilities<'_> {
        self.client.capabilities()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> r3map_core::Result<()> {
        self.client.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> r3map_core::Result<()> {
        self.client.write_at(offset, buf).await
    }

    async fn flush(&self) -> r3map_core::Result<()> {
        self.client.flush().await
    }
}
