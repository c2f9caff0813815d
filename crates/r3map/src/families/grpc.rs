//! `grpc://HOST:PORT` and `grpc+unix://PATH`. What a server of the Go programs cannot tell is in the options: `size=`,
//! `chunk=` and `chunking=`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Result};
use r3map_grpc::{Client, ClientSettings, GoRegion, GoRequests, Server, ServerSettings, Target};

use crate::{Family, Listen, ListenOptions, Listener, Open, OpenOptions, Registry, Uri};

/// How long a server that is told to stop goes on with what is in flight.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// The chunk size of the Go programs where they are not told another.
const GO_CHUNK: ChunkSize = ChunkSize::MIN;

pub(super) fn register(registry: &mut Registry) {
    let mut add = |scheme, example, about| {
        registry.register(Family { scheme, example, about, open: Arc::new(Grpc), listen: Some(Arc::new(Grpc)) });
    };
    add("grpc", "grpc://HOST:PORT", "a region on another host");
    add("grpc+unix", "grpc+unix://PATH", "a region behind a Unix socket");
    #[cfg(all(feature = "file", feature = "slice"))]
    ["grpc", "grpc+unix"]
        .into_iter()
        .for_each(|scheme| registry.register_carrier(scheme, Arc::new(carry::GrpcCarrier)));
}

#[cfg(all(feature = "file", feature = "slice"))]
mod carry;

struct Grpc;

fn target(uri: &Uri) -> Result<Target> {
    if uri.scheme() == "grpc+unix" {
        return Ok(Target::Unix(uri.path()?));
    }
    let (host, port) = uri.host_port()?;
    Ok(Target::Tcp { host: host.to_owned(), port })
}

/// Who cuts requests into chunks, where the server is one of the Go programs.
fn requests(uri: &Uri) -> Result<GoRequests> {
    match uri.get("chunking") {
        None | Some("client") => Ok(GoRequests::OneChunk),
        Some("server") => Ok(GoRequests::Any),
        Some(_) => Err(uri.invalid("chunking is `client`, or `server` for a Go server that cuts requests itself")),
    }
}

#[async_trait]
impl Open for Grpc {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        uri.expect(&["size", "chunk", "chunking"], true)?;
        let size = options.size_for(uri)?;
        let requests = requests(uri)?;
        let chunk_size = options.chunk_for(uri)?.unwrap_or(match requests {
            GoRequests::OneChunk => GO_CHUNK,
            GoRequests::Any => ChunkSize::DEFAULT,
        });
        let go = size.map(|size| GoRegion { size, chunk_size, requests });
        let client = Client::connect(target(uri)?, ClientSettings { go, ..ClientSettings::default() }).await?;
        match size {
            Some(size) if size != client.size() => {
                Err(uri.invalid(&format!("it has {} bytes, not {size}", client.size())))
            }
            _ => Ok(Arc::new(client)),
        }
    }

    fn identity(&self, uri: &Uri) -> Option<String> {
        if uri.scheme() == "grpc+unix" { super::absolute(uri) } else { Some(uri.to_string()) }
    }
}

#[async_trait]
impl Listen for Grpc {
    async fn listen(&self, uri: &Uri, backend: Arc<dyn Backend>, options: &ListenOptions) -> Result<Box<dyn Listener>> {
        uri.expect(&[], true)?;
        let settings = ServerSettings {
            read_only: options.read_only,
            chunk_size: options.chunk_size,
            identity: options.identity.clone(),
            ..ServerSettings::default()
        };
        let server = Server::new(backend, settings)?;
        let bound = server.listen(&target(uri)?).await?;
        Ok(Box::new(Listening { uri: format!("{}://{bound}", uri.scheme()), server }))
    }
}

struct Listening {
    uri: String,
    server: Server,
}

#[async_trait]
impl Listener for Listening {
    fn uri(&self) -> String {
        self.uri.clone()
    }

    async fn shutdown(self: Box<Self>) -> Result<()> {
        self.server.close(SHUTDOWN_LIMIT).await
    }
}
