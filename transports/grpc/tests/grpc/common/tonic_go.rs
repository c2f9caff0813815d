//! The Go programs' service, served and called by tonic's generated code.

use std::sync::Arc;

use r3map_core::{Backend as Region, check_range};
use r3map_grpc::Target;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, transport};

use super::peer::go::backend_client::BackendClient;
use super::peer::go::backend_server::{Backend, BackendServer};
use super::peer::go::{ReadAtArgs, ReadAtReply, SyncArgs, SyncReply, WriteAtArgs, WriteAtReply};

/// Longest message, as in the Go programs' client and server.
const MESSAGE: usize = 4 << 20;

struct Service(Arc<dyn Region>);

/// Serves only the Go service on a port that the system chooses, until the runtime ends.
pub(crate) async fn serve(region: Arc<dyn Region>) -> Target {
    serve_with(Routes::new(BackendServer::new(Service(region)).max_decoding_message_size(MESSAGE))).await
}

/// Serves gRPC without any service.
pub(crate) async fn serve_nothing() -> Target {
    serve_with(Routes::default()).await
}

/// Serves anything that tonic generated.
pub(crate) async fn serve_with(routes: Routes) -> Target {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = listener.local_addr().unwrap().to_string().parse().unwrap();
    let server = transport::Server::builder().add_routes(routes);
    let incoming =
        TcpListenerStream::new(listener).map(|stream| stream.inspect(|stream| stream.set_nodelay(true).unwrap()));
    tokio::spawn(server.serve_with_incoming(incoming));
    target
}

/// A client as the Go programs have it.
pub(crate) async fn connect(target: &Target) -> BackendClient<transport::Channel> {
    let endpoint = transport::Endpoint::new(format!("http://{target}")).unwrap();
    BackendClient::new(endpoint.connect().await.unwrap())
}

#[tonic::async_trait]
impl Backend for Service {
    async fn read_at(&self, request: Request<ReadAtArgs>) -> Result<Response<ReadAtReply>, Status> {
        let ReadAtArgs { length, off } = request.into_inner();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        let offset = off.cast_unsigned();
        check_range(r3map_core::Operation::Read, self.0.size(), offset, bytes.len() as u64)
            .map_err(|_| Status::unknown("EOF"))?;
        self.0.read_at(offset, &mut bytes).await.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(ReadAtReply { n: length, p: bytes.into() }))
    }

    async fn write_at(&self, request: Request<WriteAtArgs>) -> Result<Response<WriteAtReply>, Status> {
        let WriteAtArgs { off, p } = request.into_inner();
        let result = self.0.write_at(off.cast_unsigned(), &p).await;
        result.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(WriteAtReply { length: i32::try_from(p.len()).unwrap() }))
    }

    async fn sync(&self, _: Request<SyncArgs>) -> Result<Response<SyncReply>, Status> {
        self.0.flush().await.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(SyncReply {}))
    }
}
