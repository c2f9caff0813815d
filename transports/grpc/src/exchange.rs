//! One message over an HTTP/2 body: sending it, and receiving it in steps, so that whoever receives can look at its
//! length before its bytes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Buf;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use hyper::body::Incoming;

use crate::message::{self, PREFIX};
use crate::rope::Rope;

/// The content type of every request and reply.
pub(crate) const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("application/grpc");

/// One message, and on the server's side the trailers behind it.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    message: Option<Rope>,
    trailers: Option<HeaderMap>,
}

impl Outgoing {
    /// A request.
    pub(crate) fn request(message: Rope) -> Self {
        Self { message: Some(message), trailers: None }
    }

    /// A reply that went well.
    pub(crate) fn reply(message: Rope) -> Self {
        let trailers = HeaderMap::from_iter([(tonic::Status::GRPC_STATUS, HeaderValue::from_static("0"))]);
        Self { message: Some(message), trailers: Some(trailers) }
    }
}

impl Body for Outgoing {
    type Data = Rope;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Rope>, Infallible>>> {
        let message = self.message.take().map(Frame::data);
        Poll::Ready(message.or_else(|| self.trailers.take().map(Frame::trailers)).map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.message.is_none() && self.trailers.is_none()
    }
}

/// Why a message did not arrive.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The connection or the stream ended.
    Transport(hyper::Error),
    /// What arrived is not gRPC.
    Malformed(&'static str),
}

/// A message that is arriving.
#[derive(Debug)]
pub(crate) struct Arriving {
    body: Incoming,
    bytes: Rope,
    trailers: Option<HeaderMap>,
}

impl Arriving {
    pub(crate) fn new(body: Incoming) -> Self {
        Self { body, bytes: Rope::default(), trailers: None }
    }

    /// Waits for the message's prefix; the length of the message, or `None` if the body ends without any.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn length(&mut self) -> Result<Option<usize>, Failure> {
        self.fill(PREFIX).await?;
        match self.bytes.len() {
            0 => Ok(None),
            PREFIX.. => match message::length(self.bytes.split_to(PREFIX)) {
                None => Err(Failure::Malformed("a compressed message, which nobody asked for")),
                length => Ok(length),
            },
            _ => Err(Failure::Malformed("a message that ends too early")),
        }
    }

    /// Waits for the message of that length.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn message(&mut self, length: usize) -> Result<Rope, Failure> {
        self.fill(length).await?;
        match self.bytes.len() < length {
            true => Err(Failure::Malformed("a message that ends too early")),
            false => Ok(self.bytes.split_to(length)),
        }
    }

    /// Waits for the end, behind which nothing may come but trailers.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn end(mut self) -> Result<Option<HeaderMap>, Failure> {
        self.fill(1).await?;
        match self.bytes.has_remaining() {
            true => Err(Failure::Malformed("more than one message")),
            false => Ok(self.trailers),
        }
    }

    /// Waits until there are `want` bytes, or the end.
    async fn fill(&mut self, want: usize) -> Result<(), Failure> {
        while self.bytes.len() < want && self.trailers.is_none() {
            let Some(frame) = poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await else { break };
            match frame.map_err(Failure::Transport)?.into_data() {
                Ok(bytes) => self.bytes.push(bytes),
                Err(frame) => self.trailers = frame.into_trailers().ok(),
            }
        }
        Ok(())
    }
}
