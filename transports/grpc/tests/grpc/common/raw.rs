//! A client that sends what it is told over HTTP/2.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
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

/// Sends one request; returns the HTTP status and `grpc-status`, which must be in the headers.
pub(crate) async fn call(target: &Target, path: &str, content_type: &str, body: &[u8]) -> (u16, Option<String>) {
    let stream = TcpStream::connect(target.to_string()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://{target}{path}"))
        .header(http::header::CONTENT_TYPE, content_type)
        .body(Once(Some(Bytes::copy_from_slice(body))))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.headers().get("grpc-status").map(|value| value.to_str().unwrap().to_owned());
    (response.status().as_u16(), status)
}
