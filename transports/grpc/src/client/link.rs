//! One HTTP/2 connection to a server, and calls over it.
//!
//! It does not know what the calls mean, and once broken it stays so: `links` opens the next one.

use std::error::Error as StdError;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::header::{CONTENT_TYPE, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Request, Uri};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};

use crate::exchange::{self, Arriving, Failure, Outgoing};
use crate::pass::Pass;
use crate::rope::Rope;
use crate::status;
use crate::stream::{Stream, Traffic};
use crate::target::Target;
use crate::{REGION_HEADER, path};

/// How much a server may send before it is told that bytes were taken, in all and per call. A link keeps a pipe of
/// this much full: 1 GB/s at a round trip of 64 ms.
pub(crate) const WINDOW: u32 = 64 << 20;
/// The longest piece in which a server sends: long enough that its cost does not show, short enough that a small reply
/// gets in between and that a piece is still in the processor's cache when it is looked at.
const FRAME: u32 = 256 << 10;
/// How much of a request is handed to HTTP/2 at once.
const SEND_BUFFER: usize = 8 << 20;
/// The most bytes of longer requests that are being sent at once: they are sent nearly one after another. What comes to a
/// server that has no room for it takes up the connection's window. Those for which there is room are all sent by then, or
/// need no more than is left of it.
const SENDING: usize = 4 << 20;
/// How long a request is that does not wait for that.
const SHORT: usize = 1 << 10;

/// An open connection. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Link {
    sender: SendRequest<Outgoing>,
    target: Target,
    authority: Authority,
    /// Which of the server's regions calls are about.
    region: u32,
    /// What is shown with each call.
    pass: Arc<Pass>,
    traffic: Traffic,
    broken: Arc<OnceLock<String>>,
    /// [`SENDING`].
    sending: Arc<Semaphore>,
    closed: CancellationToken,
    _close: DropGuard,
}

/// Why a call did not give a reply.
#[derive(Debug)]
pub(crate) enum CallError {
    /// The server says so.
    Status(Status),
    /// The connection broke, before or while the server answered.
    Broken(String),
    /// What came back is not a gRPC reply.
    Malformed(String),
}

/// Nobody waits for a turn to send any more when this is dropped.
struct Sender(Arc<Semaphore>);

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs what HTTP/2 does for a connection, until the connection is closed: then everything ends at once, and with it
/// every call.
#[derive(Debug, Clone)]
struct Tasks(CancellationToken);

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, task: F) {
        let closed = self.0.clone();
        tokio::spawn(async move { closed.run_until_cancelled(task).await });
    }
}

impl Link {
    /// Connects, on the current runtime.
    ///
    /// # Errors
    /// As [`Stream::connect`].
    pub(crate) async fn open(target: &Target, region: u32, pass: Arc<Pass>) -> Result<Self> {
        let stream = Stream::connect(target).await?;
        let traffic = stream.traffic();
        let closed = CancellationToken::new();
        let tasks = Tasks(closed.clone());
        let (sender, connection) = Builder::new(tasks.clone())
            .initial_connection_window_size(WINDOW)
            .initial_stream_window_size(WINDOW)
            .max_frame_size(FRAME)
            .max_send_buf_size(SEND_BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| {
                Error::new(ErrorKind::Unavailable, Operation::Open, format!("cannot connect to {target}"))
                    .with_source(error)
            })?;
        let sending = Arc::new(Semaphore::new(SENDING));
        let sends = Sender(sending.clone());
        tasks.execute(async move {
            let _sends = sends;
            if let Err(error) = connection.await {
                tracing::debug!("connection lost: {}", innermost(&error));
            }
        });
        Ok(Self {
            sender,
            target: target.clone(),
            authority: target.authority(),
            region,
            pass,
            traffic,
            broken: Arc::default(),
            sending,
            _close: closed.clone().drop_guard(),
            closed,
        })
    }

    /// Whether calls can be made. A connection that broke without a word is found out only when it is used or watched.
    pub(crate) fn is_open(&self) -> bool {
        !self.sender.is_closed() && !self.closed.is_cancelled()
    }

    /// Bytes that have moved over it, in either direction.
    pub(crate) fn moved(&self) -> u64 {
        self.traffic.received() + self.traffic.delivered().0
    }

    /// Where it leads.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Calls a method with a message (with its prefix), and waits for the beginning of the reply.
    ///
    /// Dropping the future or the reply gives the call up; the server is told.
    ///
    /// # Errors
    /// As [`CallError`] says.
    pub(crate) async fn start(&self, path: &'static str, message: Rope) -> Result<Arriving, CallError> {
        let request = self.request(path, Outgoing::request(self.in_turn(message).await?));
        let response = self.sender.clone().send_request(request).await;
        let (head, body) = response.map_err(|error| self.failed(Failure::Transport(error)))?.into_parts();
        if head.status != http::StatusCode::OK {
            return Err(CallError::Malformed(format!("answered with HTTP status {}", head.status)));
        }
        match status::in_headers(&head.headers).filter(|status| status.code() != Code::Ok) {
            Some(status) => Err(CallError::Status(status)),
            None => Ok(Arriving::new(body)),
        }
    }

    /// Waits until a request may be sent.
    async fn in_turn(&self, message: Rope) -> Result<Rope, CallError> {
        if message.len() <= SHORT {
            return Ok(message);
        }
        let units = u32::try_from(message.len().min(SENDING)).unwrap_or(u32::MAX);
        match self.sending.clone().acquire_many_owned(units).await {
            Ok(turn) => Ok(message.guarded(turn)),
            Err(_) => {
                let reason = self.broken.get().cloned();
                Err(CallError::Broken(reason.unwrap_or_else(|| "it is closed".to_owned())))
            }
        }
    }

    /// Has a living server answer something, whatever it is. Neither the request nor the answer has a message, so that both get
    /// through where the connection's window is used up: as long as the server has no room for what was sent.
    async fn ping(&self) {
        let request = self.request(path::DESCRIBE, Outgoing::default());
        let _ = self.sender.clone().send_request(request).await;
    }

    /// Waits for the length of a reply's message, which may be at most `limit`. A reply that has none is an error, most
    /// often the server's.
    ///
    /// # Errors
    /// As [`CallError`] says.
    pub(crate) async fn length(&self, mut reply: Arriving, limit: usize) -> Result<(Arriving, usize), CallError> {
        match reply.length().await.map_err(|failure| self.failed(failure))? {
            Some(length) if length <= limit => Ok((reply, length)),
            Some(length) => Err(CallError::Malformed(format!("answered with {length} bytes where {limit} are enough"))),
            None => {
                self.check(reply.end().await)?;
                Err(CallError::Malformed("answered without a reply".to_owned()))
            }
        }
    }

    /// Looks at the end of a reply, where the server says whether it went well.
    ///
    /// # Errors
    /// As [`CallError`] says.
    pub(crate) fn check(&self, end: Result<Option<HeaderMap>, Failure>) -> Result<(), CallError> {
        let trailers = end.map_err(|failure| self.failed(failure))?;
        match trailers.as_ref().and_then(status::in_headers) {
            Some(status) if status.code() == Code::Ok => Ok(()),
            Some(status) => Err(CallError::Status(status)),
            None => Err(CallError::Broken("the reply ended too early".to_owned())),
        }
    }

    /// Calls a method with a message (with its prefix), and waits for the reply (without), of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`CallError`] says.
    pub(crate) async fn call(&self, path: &'static str, message: Rope, limit: usize) -> Result<Rope, CallError> {
        let reply = self.start(path, message).await?;
        let (mut reply, length) = self.length(reply, limit).await?;
        let message = reply.take(length).await.map_err(|failure| self.failed(failure))?;
        self.check(reply.end().await)?;
        Ok(message)
    }

    fn request(&self, path: &'static str, body: Outgoing) -> Request<Outgoing> {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static(path));
        let mut request = Request::new(body);
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        request.headers_mut().insert(CONTENT_TYPE, exchange::CONTENT_TYPE);
        if self.region > 0 {
            request.headers_mut().insert(REGION_HEADER, self.region.into());
        }
        self.pass.show(request.headers_mut());
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        request
    }

    pub(crate) fn failed(&self, failure: Failure) -> CallError {
        match (failure, self.broken.get()) {
            (Failure::Malformed(text), _) => CallError::Malformed(format!("answered with {text}")),
            (Failure::Transport(_), Some(reason)) => CallError::Broken(reason.clone()),
            (Failure::Transport(error), None) => CallError::Broken(innermost(&error)),
        }
    }

    /// Sees to it that the link breaks when the server gives no sign of life: when nothing was received for `interval`,
    /// it is asked for one, and something must be received within another one. On the current runtime.
    pub(crate) fn watch(self: &Arc<Self>, interval: Duration) {
        let (link, closed) = (Arc::downgrade(self), self.closed.clone());
        tokio::spawn(async move {
            let watching = async {
                let mut before = u64::MAX;
                loop {
                    tokio::time::sleep(interval).await;
                    let Some(link) = link.upgrade() else { return };
                    if link.traffic.received() == before && !link.answers(interval).await {
                        return;
                    }
                    before = link.traffic.received();
                }
            };
            closed.run_until_cancelled(watching).await;
        });
    }

    /// Waits for an answer to a ping, or for another sign of life: bytes that arrive here, or there while others are still
    /// under way, behind which the ping waits on a slow line.
    async fn answers(&self, limit: Duration) -> bool {
        let (received, (before, _)) = (self.traffic.received(), self.traffic.delivered());
        let answered = tokio::time::timeout(limit, self.ping()).await.is_ok();
        let (delivered, under_way) = self.traffic.delivered();
        if answered || self.traffic.received() != received || delivered > before && under_way > 0 {
            return true;
        }
        let reason = format!("no sign of life for {} s", (2 * limit).as_secs_f32());
        tracing::warn!("{}: {reason}", self.target);
        let _ = self.broken.set(reason);
        self.closed.cancel();
        false
    }
}

impl CallError {
    /// As an error of ours.
    pub(crate) fn into_error(self, operation: Operation, target: &Target) -> Error {
        match self {
            Self::Status(status) => status::into_error(&status, operation, target),
            Self::Broken(reason) => {
                // What has never answered may be anything.
                let hint = if operation == Operation::Open { " (is that a gRPC server?)" } else { "" };
                let message = format!("the connection to {target} is lost{hint}: {reason}");
                Error::new(ErrorKind::Unavailable, operation, message)
            }
            Self::Malformed(what) => Error::new(ErrorKind::Corrupt, operation, format!("{target} {what}")),
        }
    }
}

/// The last of an error's causes, which is the one that says what happened.
fn innermost(error: &hyper::Error) -> String {
    let mut innermost: &dyn StdError = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
