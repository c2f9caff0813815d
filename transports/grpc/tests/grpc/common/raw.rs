//! A client that sends what it is told over HTTP/2.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use r3map_grpc::Target;
use tokio::net::TcpStream;

struct Once(Option<Bytes>);

impl Body for Once {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// A connection on which answers are asked for.
pub(crate) struct Connection {
    sender: SendRequest<Once>,
    target: Target,
}

impl Connection {
    pub(crate) async fn open(target: &Target) -> Self {
        let stream = TcpStream::connect(target.to_string()).await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self { sender, target: target.clone() }
    }

    /// Sends a request; its answer, of whose body nothing is read until somebody asks for it.
    pub(crate) fn send(
        &self,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> impl Future<Output = Response<Incoming>> + Send + 'static {
        let request = http::Request::post(format!("http://{}{path}", self.target))
            .header(http::header::CONTENT_TYPE, content_type)
            .body(Once(Some(Bytes::copy_from_slice(body))))
            .unwrap();
        let answer = self.sender.clone().send_request(request);
        async move { answer.await.unwrap() }
    }
}

/// Sends one request; returns the HTTP status and `grpc-status`, which must be in the headers.
pub(crate) async fn call(target: &Target, path: &str, content_type: &str, body: &[u8]) -> (u16, Option<String>) {
    let response = Connection::open(target).await.send(path, content_type, body).await;
    let status = response.headers().get("grpc-status").map(|value| value.to_str().unwrap().to_owned());
    (response.status().as_u16(), status)
}
