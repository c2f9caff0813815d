//! One connection: HTTP/2 with its limits, and each request from its path to its reply.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http2::Builder;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use prost::Message;
use r3map_pipeline::User;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::exchange::{self, Arriving, Failure, Fields, Outgoing};
use crate::message::{self, Bulk};
use crate::rope::Rope;
use crate::server::budget::{Buffer, Room, room};
use crate::server::fence::Gate;
use crate::server::migration::{Caller, GoLeecher};
use crate::server::{Shared, Site};
use crate::stream::{Stream, Traffic};
use crate::{REGION_HEADER, path};

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
/// While a request is awaited, its connection must bring this many bytes in each time for which a client may be silent:
/// as much as the slowest line does that anybody uses.
const SLOWEST: u64 = 16 << 10;
/// A request that has begun must be there within so many times of that, however slowly it comes: what it holds on to is not
/// held for ever.
const LONGEST: u32 = 60;
/// How long nothing may come from a client before it is asked whether it is there, and how long it may take to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// For HTTP/2, which does not see bytes but whole frames, and would give up a slow line.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);
/// The length of HTTP/2's greeting.
const PREFACE: u64 = 24;
/// The most bytes in a message of few fields, or beside the data of one.
const SMALL: usize = 1 << 10;
/// The most bytes in a message of as many ranges as there may be.
const RANGES: usize = 32 << 10;

/// Serves one connection to its end.
pub(crate) async fn serve(
    stream: Stream,
    site: Arc<Site>,
    tasks: TaskTracker,
    closing: CancellationToken,
    ending: CancellationToken,
) {
    let traffic = stream.traffic();
    let shared = site.regions[0].clone();
    let patience = shared.patience;
    let (gate, go) = (Arc::default(), Arc::default());
    let users: Arc<[Arc<User>]> = site.regions.iter().map(|region| Arc::new(region.losses.user())).collect();
    let user = users[0].clone();
    let room = shared.budget.room();
    let session = Session { site, users, shared, room, gate, user, go, caller: None, traffic: traffic.clone() };
    let connection = Builder::new(Tasks { tasks, ending: ending.clone() })
        .timer(TokioTimer::new())
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(WINDOW)
        .max_frame_size(FRAME)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(NEVER)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), session);
    let mut gone = pin!(gone(&traffic, patience));
    let mut connection = pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return log(result),
        () = closing.cancelled() => connection.as_mut().graceful_shutdown(),
        () = ending.cancelled() => return,
        () = gone.as_mut() => return,
    }
    tokio::select! {
        result = connection => log(result),
        () = ending.cancelled() => {}
        () = gone => {}
    }
}

/// Returns when a client has not even sent the greeting of HTTP/2 after `patience`, or when it does not answer to the
/// question whether it is there and nothing else moves in either direction.
async fn gone(traffic: &Traffic, patience: Duration) {
    tokio::time::sleep(patience).await;
    if traffic.received() < PREFACE {
        return;
    }
    let moved = || (traffic.received(), traffic.delivered().0);
    let mut last = (Instant::now(), moved());
    while last.0.elapsed() < 2 * KEEP_ALIVE {
        tokio::time::sleep(KEEP_ALIVE / 4).await;
        let now = moved();
        if now != last.1 {
            last = (Instant::now(), now);
        }
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
    pub(crate) site: Arc<Site>,
    /// Of each region, as the Go programs use them, which know no instances.
    users: Arc<[Arc<User>]>,
    /// The region that is asked for.
    pub(crate) shared: Arc<Shared>,
    /// Of all regions.
    pub(crate) room: Room,
    pub(crate) gate: Arc<Gate>,
    /// Of that region.
    pub(crate) user: Arc<User>,
    pub(crate) go: Arc<GoLeecher>,
    /// Who has made this request, where the server seeds.
    pub(crate) caller: Option<Caller>,
    traffic: Traffic,
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
        let (head, body) = request.into_parts();
        let session = match self.about(&head) {
            Ok(session) => session,
            Err(status) => return status.into_http(),
        };
        match session.call_method(&head, body).await {
            Ok(reply) => {
                let mut response = Response::new(Outgoing::reply(reply));
                response.headers_mut().insert(CONTENT_TYPE, exchange::CONTENT_TYPE);
                response
            }
            Err(status) => status.into_http(),
        }
    }

    /// The same for whoever has made a request, and for the region that it is about.
    fn about(&self, request: &Parts) -> Result<Self, Status> {
        let caller = self.site.seeder.as_ref().map(|seeder| seeder.admit(request)).transpose()?;
        let session = Self { caller, ..self.clone() };
        let Some(value) = request.headers.get(REGION_HEADER) else { return Ok(session) };
        let index = value.to_str().ok().and_then(|value| value.parse::<usize>().ok());
        match index.and_then(|index| self.site.regions.get(index).zip(self.users.get(index))) {
            Some((shared, user)) => Ok(Self { shared: shared.clone(), user: user.clone(), ..session }),
            None => Err(Status::not_found("there is no region of that number")),
        }
    }

    async fn call_method(&self, head: &Parts, body: Incoming) -> Result<Rope, Status> {
        match head.uri.path() {
            path::DESCRIBE => self.describe(self.small(body).await?).await,
            path::READ => {
                let request = self.receive(body, RANGES).await?;
                self.heard(self.read(request)).await
            }
            path::WRITE => self.write(self.large(body).await?).await,
            path::FLUSH => self.flush(self.small(body).await?).await,
            path::TRIM => self.trim(self.small(body).await?).await,
            path::WRITE_ZEROES => self.write_zeroes(self.small(body).await?).await,
            path::EXTENTS => self.extents(self.small(body).await?).await,
            path::MIGRATION_DESCRIBE => self.migration_describe(self.small(body).await?).await,
            path::MIGRATION_TRACK => self.migration_track(self.small(body).await?).await,
            path::MIGRATION_DIRTY => self.migration_dirty(self.small(body).await?).await,
            path::MIGRATION_FINALIZE => self.migration_finalize(self.small(body).await?).await,
            path::MIGRATION_CONFIRM => self.migration_confirm(self.small(body).await?).await,
            path::MIGRATION_ABORT => self.migration_abort(self.small(body).await?).await,
            path::GO_SEEDER_READ_AT => self.go_seeder_read_at(self.small(body).await?).await,
            path::GO_SEEDER_TRACK => self.go_seeder_track(self.small(body).await?).await,
            path::GO_SEEDER_SYNC => self.go_seeder_sync(self.small(body).await?).await,
            path::GO_SEEDER_CLOSE => self.go_seeder_close(self.small(body).await?).await,
            path::GO_READ_AT => self.go_read_at(self.small(body).await?).await,
            path::GO_WRITE_AT => self.go_write_at(self.large(body).await?).await,
            path::GO_SYNC => self.go_sync(self.small(body).await?).await,
            other => Err(Status::unimplemented(format!("there is no method {other}"))),
        }
    }

    /// Receives a message that carries data, as soon as there is room for it. The data goes to where it stays, piece by
    /// piece, however small the pieces are.
    async fn large<M: Bulk>(&self, body: Incoming) -> Result<(M, Buffer), Status> {
        let arrival = self.arrival();
        let mut arriving = Arriving::new(body);
        let length = arrival.length(&mut arriving, self.shared.max_request + SMALL as u64).await?;
        let mut fields = Fields::new(arriving, length, SMALL);
        let mut data = self.room.arriving(0).await.buffer(0);
        while let Some(length) = arrival.step(fields.bulk()).await? {
            // Nothing is held while waiting for room.
            drop(data);
            data = self.room.arriving(room(length as u64)).await.buffer(length);
            while data.used().len() < length {
                let piece = arrival.step(fields.some(length - data.used().len())).await?;
                piece.segments().for_each(|bytes| data.push(bytes));
            }
        }
        let message = fields.message().map_err(refused)?;
        arrival.step(fields.end()).await?;
        Ok((message, data))
    }

    /// Receives a message of few fields.
    async fn small<M: Message + Default>(&self, body: Incoming) -> Result<M, Status> {
        self.receive(body, SMALL).await
    }

    /// Receives a message that carries no data, of at most `limit` bytes, gathering its pieces however small they are.
    async fn receive<M: Message + Default>(&self, body: Incoming, limit: usize) -> Result<M, Status> {
        let arrival = self.arrival();
        let mut arriving = Arriving::new(body);
        let length = arrival.length(&mut arriving, limit as u64).await?;
        let mut bytes = BytesMut::with_capacity(length);
        while bytes.len() < length {
            bytes.put(arrival.step(arriving.some(length - bytes.len())).await?);
        }
        arrival.step(arriving.end()).await?;
        message::decode(bytes).map_err(|why| refused(Failure::Malformed(why.0)))
    }

    fn arrival(&self) -> Arrival<'_> {
        let patience = self.shared.patience;
        Arrival { traffic: &self.traffic, patience, end: Instant::now() + LONGEST * patience }
    }
}

/// A request that is arriving, for which the server waits as long as its connection brings something: on a slow line one
/// request waits behind others.
struct Arrival<'a> {
    traffic: &'a Traffic,
    patience: Duration,
    end: Instant,
}

impl Arrival<'_> {
    /// Waits for the next part of the request.
    async fn step<T>(&self, step: impl Future<Output = Result<T, Failure>>) -> Result<T, Status> {
        let mut step = pin!(step);
        loop {
            let before = self.traffic.received();
            let until = self.end.min(Instant::now() + self.patience);
            match timeout_at(until, step.as_mut()).await {
                Ok(done) => return done.map_err(refused),
                Err(_) if self.traffic.received() - before >= SLOWEST && until < self.end => {}
                Err(_) => return Err(Status::deadline_exceeded("the request did not arrive in time")),
            }
        }
    }

    /// Waits for the length of the message, which may be at most `limit`.
    async fn length(&self, arriving: &mut Arriving, limit: u64) -> Result<usize, Status> {
        match self.step(arriving.length()).await? {
            None => Err(Status::invalid_argument("the request has no message")),
            Some(length) if length as u64 > limit => {
                Err(Status::invalid_argument(format!("a message of {length} bytes is above the limit of {limit}")))
            }
            Some(length) => Ok(length),
        }
    }
}

fn refused(failure: Failure) -> Status {
    match failure {
        Failure::Transport(error) => Status::cancelled(error.to_string()),
        Failure::Malformed(what) => Status::invalid_argument(format!("the request has {what}")),
    }
}
