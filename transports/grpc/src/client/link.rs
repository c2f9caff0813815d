//! One HTTP/2 connection to a server, and calls over it.
//!
//! It does not know what the calls mean, and once broken it stays so: `links` opens the next one.

use std::error::Error as StdError;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::header::{CONTENT_TYPE, TE};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Request, Uri};
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status};

use crate::exchange::{self, Arriving, Failure, Outgoing};
use crate::rope::Rope;
use crate::status;
use crate::stream::{Received, Stream};
use crate::target::Target;

/// How much a server may send before it is told that bytes were taken, in all and per call. A link keeps a pipe of
/// this much full: 1 GB/s at a round trip of 64 ms.
const WINDOW: u32 = 64 << 20;
/// The longest piece in which a server sends: long enough that its cost does not show, short enough that a small reply
/// gets in between and that a piece is still in the processor's cache when it is looked at.
const FRAME: u32 = 256 << 10;
/// How much of a request is handed to HTTP/2 at once.
const SEND_BUFFER: usize = 8 << 20;

/// An open connection. Dropping it closes the connection.
#[derive(Debug)]
pub(crate) struct Link {
    sender: SendRequest<Outgoing>,
    target: Target,
    authority: Authority,
    received: Received,
    broken: Arc<OnceLock<String>>,
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

impl Link {
    /// Connects, on the current runtime.
    ///
    /// # Errors
    /// As [`Stream::connect`].
    pub(crate) async fn open(target: &Target) -> Result<Self> {
        let stream = Stream::connect(target).await?;
        let received = stream.received();
        let (sender, connection) = Builder::new(TokioExecutor::new())
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
        let closed = CancellationToken::new();
        let until = closed.clone();
        tokio::spawn(async move {
            if let Some(Err(error)) = until.run_until_cancelled(connection).await {
                tracing::debug!("connection lost: {}", innermost(&error));
            }
        });
        Ok(Self {
            sender,
            target: target.clone(),
            authority: target.authority(),
            received,
            broken: Arc::default(),
            _close: closed.clone().drop_guard(),
            closed,
        })
    }

    /// Whether calls can be made. A connection that broke without a word is found out only when it is used or watched.
    pub(crate) fn is_open(&self) -> bool {
        !self.sender.is_closed() && !self.closed.is_cancelled()
    }

    /// Where it leads.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Calls a method with a message (with its prefix), and returns the reply (without), of at most `limit` bytes.
    ///
    /// Dropping the future gives the call up; the server is told.
    ///
    /// # Errors
    /// As [`CallError`] says.
    pub(crate) async fn call(&self, path: &'static str, message: Rope, limit: usize) -> Result<Rope, CallError> {
        let request = self.request(path, Outgoing::request(message));
        let response = self.sender.clone().send_request(request).await.map_err(|error| self.failed(&error))?;
        let (head, body) = response.into_parts();
        if head.status != http::StatusCode::OK {
            return Err(CallError::Malformed(format!("answered with HTTP status {}", head.status)));
        }
        if let Some(status) = status::in_headers(&head.headers).filter(|status| status.code() != Code::Ok) {
            return Err(CallError::Status(status));
        }
        self.reply(Arriving::new(body), limit).await
    }

    async fn reply(&self, mut arriving: Arriving, limit: usize) -> Result<Rope, CallError> {
        let reply = match arriving.length().await.map_err(|failure| self.lost(failure))? {
            Some(length) if length > limit => {
                return Err(CallError::Malformed(format!("answered with {length} bytes where {limit} are enough")));
            }
            Some(length) => Some(arriving.message(length).await.map_err(|failure| self.lost(failure))?),
            None => None,
        };
        let trailers = arriving.end().await.map_err(|failure| self.lost(failure))?;
        let status = trailers.as_ref().and_then(status::in_headers);
        match (status, reply) {
            (Some(status), _) if status.code() != Code::Ok => Err(CallError::Status(status)),
            (Some(_), Some(reply)) => Ok(reply),
            (Some(_), None) => Err(CallError::Malformed("answered without a reply".to_owned())),
            (None, _) => Err(CallError::Broken("the reply ended too early".to_owned())),
        }
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
        request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        request
    }

    fn lost(&self, failure: Failure) -> CallError {
        match failure {
            Failure::Transport(error) => self.failed(&error),
            Failure::Malformed(text) => CallError::Malformed(format!("answered with {text}")),
        }
    }

    fn failed(&self, error: &hyper::Error) -> CallError {
        match self.broken.get() {
            Some(reason) => CallError::Broken(reason.clone()),
            None => CallError::Broken(innermost(error)),
        }
    }

    /// Sees to it that the link breaks when the server gives no sign of life: when nothing was received for `interval`,
    /// `ping` is called, and must make something be received within another one. On the current runtime.
    pub(crate) fn watch<F>(self: &Arc<Self>, interval: Duration, ping: impl Fn(Arc<Self>) -> F + Send + Sync + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (link, closed) = (Arc::downgrade(self), self.closed.clone());
        tokio::spawn(async move {
            let watching = async {
                let mut before = u64::MAX;
                loop {
                    tokio::time::sleep(interval).await;
                    let Some(link) = link.upgrade() else { return };
                    let now = link.received.bytes();
                    if now == before && !link.answers(ping(link.clone()), interval).await {
                        return;
                    }
                    before = link.received.bytes();
                }
            };
            closed.run_until_cancelled(watching).await;
        });
    }

    async fn answers(&self, ping: impl Future<Output = ()>, limit: Duration) -> bool {
        let before = self.received.bytes();
        let answered = tokio::time::timeout(limit, ping).await.is_ok();
        if answered || self.received.bytes() != before {
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
                Error::new(ErrorKind::Unavailable, operation, format!("the connection to {target} is lost: {reason}"))
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
