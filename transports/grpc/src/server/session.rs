//! One connection: HTTP/2 with its limits, and each request from its path to its reply.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use http::header::CONTENT_TYPE;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use prost::Message;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::exchange::{self, Arriving, Failure, Fields, Outgoing};
use crate::message::{self, Bulk};
use crate::path;
use crate::rope::Rope;
use crate::server::Shared;
use crate::server::budget::{Buffer, room};
use crate::server::fence::Gate;
use crate::stream::Stream;

/// How much a client may send over one connection before it is told that bytes were taken.
const WINDOW: u32 = 16 << 20;
/// The longest piece in which a client sends: a write of 1 MiB arrives in one.
const FRAME: u32 = (1 << 20) + (4 << 10);
/// How much of a reply is handed to HTTP/2 at once.
const SEND_BUFFER: usize = 8 << 20;
/// Requests on one connection at once. The Go programs make 512.
const STREAMS: u32 = 1024;
/// Requests that are given up before they are looked at, at once. More is an attack.
const RESETS: usize = 1024;
/// How long a client may take to say the first thing, and to send more of a request that it has begun.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a client is asked whether it is there, and how long it may take to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// The length of HTTP/2's greeting.
const PREFACE: u64 = 24;
/// The most bytes in a message of few fields, or beside the data of one.
const SMALL: usize = 1 << 10;
/// The most bytes in a message of as many ranges as there may be.
const RANGES: usize = 32 << 10;

/// Serves one connection to its end.
pub(crate) async fn serve(
    stream: Stream,
    shared: Arc<Shared>,
    tasks: TaskTracker,
    closing: CancellationToken,
    ending: CancellationToken,
) {
    let traffic = stream.traffic();
    let session = Session { shared, gate: Arc::default() };
    let connection = Builder::new(Tasks { tasks, ending: ending.clone() })
        .timer(TokioTimer::new())
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
        .max_frame_size(FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), session);
    let silence = async {
        tokio::time::sleep(PATIENCE).await;
        if traffic.received() >= PREFACE {
            std::future::pending::<()>().await;
        }
    };
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return log(result),
        () = closing.cancelled() => connection.as_mut().graceful_shutdown(),
        () = ending.cancelled() => return,
        () = silence => return,
    }
    tokio::select! {
        result = connection => log(result),
        () = ending.cancelled() => {}
    }
}

fn log(result: hyper::Result<()>) {
    if let Err(error) = result {
        tracing::debug!("a connection ended: {error}");
    }
}

/// Runs requests where the server can wait for them and end them.
#[derive(Clone)]
struct Tasks {
    tasks: TaskTracker,
    ending: CancellationToken,
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, request: F) {
        let ending = self.ending.clone();
        self.tasks.spawn(async move { ending.run_until_cancelled(request).await });
    }
}

/// What the requests of one connection share.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) shared: Arc<Shared>,
    pub(crate) gate: Arc<Gate>,
}

impl Service<Request<Incoming>> for Session {
    type Response = Response<Outgoing>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let session = self.clone();
        Box::pin(async move { Ok(session.answer(request).await) })
    }
}

impl Session {
    async fn answer(&self, request: Request<Incoming>) -> Response<Outgoing> {
        let content_type = request.headers().get(CONTENT_TYPE).map(http::HeaderValue::as_bytes);
        if !content_type.is_some_and(|value| value.starts_with(exchange::CONTENT_TYPE.as_bytes())) {
            let mut response = Response::new(Outgoing::default());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return response;
        }
        match self.call_method(request).await {
            Ok(reply) => {
                let mut response = Response::new(Outgoing::reply(reply));
                response.headers_mut().insert(CONTENT_TYPE, exchange::CONTENT_TYPE);
                response
            }
            Err(status) => status.into_http(),
        }
    }

    async fn call_method(&self, request: Request<Incoming>) -> Result<Rope, Status> {
        let (head, body) = request.into_parts();
        match head.uri.path() {
            path::DESCRIBE => self.describe(small(body).await?).await,
            path::READ => self.read(receive(body, RANGES).await?).await,
            path::WRITE => self.write(self.large(body).await?).await,
            path::FLUSH => self.flush(small(body).await?).await,
            path::TRIM => self.trim(small(body).await?).await,
            path::WRITE_ZEROES => self.write_zeroes(small(body).await?).await,
            path::EXTENTS => self.extents(small(body).await?).await,
            path::GO_READ_AT => self.go_read_at(small(body).await?).await,
            path::GO_WRITE_AT => self.go_write_at(self.large(body).await?).await,
            path::GO_SYNC => self.go_sync(small(body).await?).await,
            other => Err(Status::unimplemented(format!("there is no method {other}"))),
        }
    }

    /// Receives a message that carries data, as soon as there is room for it. The data goes to where it stays, piece by
    /// piece, however small the pieces are.
    async fn large<M: Bulk>(&self, body: Incoming) -> Result<(M, Buffer), Status> {
        let mut arriving = Arriving::new(body);
        let length = limited(arriving.length(), self.shared.max_request + SMALL as u64).await?;
        let mut fields = Fields::new(arriving, length, SMALL);
        let mut data = self.shared.budget.share(0).await.buffer(0);
        while let Some(length) = patiently(fields.bulk()).await? {
            // Nothing is held while waiting for room.
            drop(data);
            data = self.shared.budget.share(room(length as u64)).await.buffer(length);
            while data.used().len() < length {
                let piece = patiently(fields.some(length - data.used().len())).await?;
                piece.segments().for_each(|bytes| data.push(bytes));
            }
        }
        let message = fields.message().map_err(refused)?;
        patiently(fields.end()).await?;
        Ok((message, data))
    }
}

/// Receives a message of few fields.
async fn small<M: Message + Default>(body: Incoming) -> Result<M, Status> {
    receive(body, SMALL).await
}

/// Receives a message that carries no data, of at most `limit` bytes, gathering its pieces however small they are.
async fn receive<M: Message + Default>(body: Incoming, limit: usize) -> Result<M, Status> {
    let mut arriving = Arriving::new(body);
    let length = limited(arriving.length(), limit as u64).await?;
    let mut bytes = BytesMut::with_capacity(length);
    while bytes.len() < length {
        bytes.put(patiently(arriving.some(length - bytes.len())).await?);
    }
    patiently(arriving.end()).await?;
    message::decode(bytes).map_err(|why| refused(Failure::Malformed(why.0)))
}

async fn limited(length: impl Future<Output = Result<Option<usize>, Failure>>, limit: u64) -> Result<usize, Status> {
    match patiently(length).await? {
        None => Err(Status::invalid_argument("the request has no message")),
        Some(length) if length as u64 > limit => {
            Err(Status::invalid_argument(format!("a message of {length} bytes is above the limit of {limit}")))
        }
        Some(length) => Ok(length),
    }
}

async fn patiently<T>(step: impl Future<Output = Result<T, Failure>>) -> Result<T, Status> {
    match timeout(PATIENCE, step).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(failure)) => Err(refused(failure)),
        Err(_) => Err(Status::deadline_exceeded("the request did not arrive in time")),
    }
}

fn refused(failure: Failure) -> Status {
    match failure {
        Failure::Transport(error) => Status::cancelled(error.to_string()),
        Failure::Malformed(what) => Status::invalid_argument(format!("the request has {what}")),
    }
}
