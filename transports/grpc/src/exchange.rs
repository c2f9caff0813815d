//! One message over an HTTP/2 body: sending it, and receiving it in steps, so that whoever receives can look at its
//! length before its bytes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use prost::encoding::{WireType, encode_varint};

use crate::message::{self, Bulk, NO_MESSAGE, PREFIX};
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

/// A body that is arriving, and the message in it.
#[derive(Debug)]
pub(crate) struct Arriving<B = Incoming> {
    body: B,
    bytes: Rope,
    trailers: Option<HeaderMap>,
}

impl<B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Arriving<B> {
    pub(crate) fn new(body: B) -> Self {
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
            _ => Err(Failure::Malformed(CUT)),
        }
    }

    /// Waits for the next `count` bytes.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn take(&mut self, count: usize) -> Result<Rope, Failure> {
        self.fill(count).await?;
        match self.bytes.len() < count {
            true => Err(Failure::Malformed(CUT)),
            false => Ok(self.bytes.split_to(count)),
        }
    }

    /// Waits for some of the next bytes, at least one and at most `most`.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn some(&mut self, most: usize) -> Result<Rope, Failure> {
        self.fill(1).await?;
        match self.bytes.has_remaining() {
            true => Ok(self.bytes.split_to(most.min(self.bytes.len()))),
            false => Err(Failure::Malformed(CUT)),
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

const CUT: &str = "a message that ends too early";

/// A message with a bulk that is arriving: its fields but the bulk are gathered, the bulk is given as it comes.
///
/// First [`Self::bulk`], then all of the bulk's bytes, and so on until there is no bulk any more; then [`Self::end`].
#[derive(Debug)]
pub(crate) struct Fields<M, B = Incoming> {
    arriving: Arriving<B>,
    /// Bytes of the message that have not been taken.
    left: usize,
    /// Fields that are not the bulk.
    others: BytesMut,
    /// How long these may become.
    limit: usize,
    message: PhantomData<M>,
}

impl<M: Bulk, B: Body<Data = Bytes, Error = hyper::Error> + Unpin> Fields<M, B> {
    /// A message of which `length` bytes (all but the prefix) are arriving, no more than `limit` of them beside the
    /// bulk: a few bytes of a message may become many in memory, those of the bulk do not.
    pub(crate) fn new(arriving: Arriving<B>, length: usize, limit: usize) -> Self {
        Self { arriving, left: length, others: BytesMut::new(), limit, message: PhantomData }
    }

    /// Waits for the next bulk field; its length, or `None` at the end of the message. Where there are several, the
    /// last one counts.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn bulk(&mut self) -> Result<Option<usize>, Failure> {
        while self.left > 0 {
            let key = self.varint().await?;
            let wire = WireType::try_from(key & 7).map_err(|_| Failure::Malformed(NO_MESSAGE))?;
            if key == u64::from(M::FIELD << 3 | 2) {
                return match usize::try_from(self.varint().await?) {
                    Ok(length) if length <= self.left => Ok(Some(length)),
                    _ => Err(Failure::Malformed(NO_MESSAGE)),
                };
            }
            encode_varint(key, &mut self.others);
            self.other(wire).await?;
            if self.others.len() > self.limit {
                return Err(Failure::Malformed("a message with more beside its data than there is reason for"));
            }
        }
        Ok(None)
    }

    /// Waits for the next `count` bytes of the bulk.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn take(&mut self, count: usize) -> Result<Rope, Failure> {
        self.left = self.left.checked_sub(count).ok_or(Failure::Malformed(NO_MESSAGE))?;
        self.arriving.take(count).await
    }

    /// Waits for some bytes of the bulk, at least one and at most `most`.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn some(&mut self, most: usize) -> Result<Rope, Failure> {
        let bytes = self.arriving.some(most).await?;
        self.left = self.left.checked_sub(bytes.len()).ok_or(Failure::Malformed(NO_MESSAGE))?;
        Ok(bytes)
    }

    /// The fields beside the bulk that have arrived so far.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) fn message(&self) -> Result<M, Failure> {
        message::decode(self.others.as_ref()).map_err(|why| Failure::Malformed(why.0))
    }

    /// Waits for the end; the trailers.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn end(self) -> Result<Option<HeaderMap>, Failure> {
        match self.left {
            0 => self.arriving.end().await,
            _ => Err(Failure::Malformed("a message with more in it than was expected")),
        }
    }

    /// Gathers the value of a field that is not the bulk.
    async fn other(&mut self, wire: WireType) -> Result<(), Failure> {
        let length = match wire {
            WireType::Varint => {
                let value = self.varint().await?;
                encode_varint(value, &mut self.others);
                return Ok(());
            }
            WireType::LengthDelimited => {
                let length = self.varint().await?;
                encode_varint(length, &mut self.others);
                usize::try_from(length).unwrap_or(usize::MAX)
            }
            WireType::ThirtyTwoBit => 4,
            WireType::SixtyFourBit => 8,
            WireType::StartGroup | WireType::EndGroup => return Err(Failure::Malformed(NO_MESSAGE)),
        };
        if length > self.limit {
            return Err(Failure::Malformed(NO_MESSAGE));
        }
        let value = self.take(length).await?;
        value.segments().for_each(|segment| self.others.extend_from_slice(segment));
        Ok(())
    }

    async fn varint(&mut self) -> Result<u64, Failure> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1).await?.get_u8();
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Failure::Malformed(NO_MESSAGE))
    }
}

/// A body that arrives in pieces.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Pieces(std::collections::VecDeque<Bytes>);

/// A body that arrives in pieces of `step` bytes.
#[cfg(test)]
pub(crate) fn pieces(bytes: &[u8], step: usize) -> Pieces {
    Pieces(bytes.chunks(step).map(Bytes::copy_from_slice).collect())
}

#[cfg(test)]
impl Body for Pieces {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Poll::Ready(self.0.pop_front().map(|bytes| Ok(Frame::data(bytes))))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::message::{encode, encode_bulk};
    use crate::proto::go::{ReadAtReply, WriteAtArgs};
    use crate::proto::region;

    fn arriving(bytes: &[u8], step: usize) -> Arriving<Pieces> {
        Arriving::new(pieces(bytes, step))
    }

    /// A message that arrives in pieces of `step` bytes, and its bulk.
    fn receive<M: Bulk>(framed: &[u8], step: usize, limit: usize) -> Result<(M, Vec<u8>), Failure> {
        let received = async {
            let mut arriving = arriving(framed, step);
            let length = arriving.length().await?.expect("there is a message");
            let mut fields = Fields::<M, _>::new(arriving, length, limit);
            let mut bulk = Vec::new();
            while let Some(length) = fields.bulk().await? {
                bulk = fields.take(length).await?.into_bytes().to_vec();
            }
            let message = fields.message()?;
            assert_eq!(fields.end().await?, None);
            Ok((message, bulk))
        };
        received.now_or_never().expect("everything is there")
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: String = text.split_whitespace().collect();
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }

    fn framed(message: &str) -> Vec<u8> {
        let message = hex(message);
        [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
    }

    #[test]
    fn golden_frames_of_the_go_service_are_read() {
        for step in [1, 2, 7, 100] {
            let framed = hex("00 0000000c 08 08 12 08 00 01 02 03 04 05 06 07");
            let (reply, bulk) = receive::<ReadAtReply>(&framed, step, 64).unwrap();
            assert_eq!((reply.n, bulk), (8, vec![0, 1, 2, 3, 4, 5, 6, 7]));
            let framed = hex("00 00000009 08 80 60 12 04 de ad be ef");
            let (args, bulk) = receive::<WriteAtArgs>(&framed, step, 64).unwrap();
            assert_eq!((args.off, bulk), (12288, vec![0xde, 0xad, 0xbe, 0xef]));
            let (args, bulk) = receive::<WriteAtArgs>(&hex("00 00000000"), step, 64).unwrap();
            assert_eq!((args.off, bulk), (0, vec![]));
        }
    }

    #[test]
    fn fields_may_come_in_any_order_and_twice_and_unknown() {
        // The bulk first, then an unknown varint, string and fixed64, the bulk again (the last one counts), the rest.
        let text = "12 02 61 62  78 01  82 01 02 78 79  89 01 01 02 03 04 05 06 07 08  12 03 63 64 65  08 07";
        let (args, bulk) = receive::<WriteAtArgs>(&framed(text), 3, 64).unwrap();
        assert_eq!((args.off, bulk.as_slice()), (7, b"cde".as_ref()));
    }

    #[test]
    fn what_prost_writes_is_read_and_the_other_way_round() {
        let data = Bytes::from((0..=255).collect::<Vec<u8>>());
        let runs = vec![region::Run { length: 256, crc32c: Some(0) }, region::Run { length: 9, crc32c: None }];
        let whole = region::ReadReply { runs: runs.clone(), crc32c: 7, data: data.clone() };
        let (reply, bulk) = receive::<region::ReadReply>(&encode(&whole).into_bytes(), 50, 64).unwrap();
        assert_eq!((&reply.runs, reply.crc32c, bulk.as_slice()), (&runs, 7, &data[..]));
        let framed = encode_bulk(&reply, data.into());
        assert_eq!(framed.into_bytes(), encode(&whole).into_bytes());
    }

    #[test]
    fn malformed_messages_are_refused() {
        for text in [
            "08",                               // a key without a value
            "08 ff",                            // a varint that does not end
            "12 02 61",                         // a field that is longer than the message
            "12 ff ff ff ff ff ff ff ff ff 01", // one that is longer than memory
            "82 01 ff ff ff ff ff ff ff ff ff 01",
            "0d 01 02", // a fixed32 that is cut
            "0b",       // a group
            "0f",       // no type at all
            "0a 00",    // a string where a number belongs
        ] {
            assert!(receive::<WriteAtArgs>(&framed(text), 1, 64).is_err(), "{text}");
        }
        let padded = framed(&"78 01 ".repeat(50));
        assert!(receive::<WriteAtArgs>(&padded, 1, 100).is_ok());
        assert!(receive::<WriteAtArgs>(&padded, 1, 99).is_err());
    }

    #[tokio::test]
    async fn a_body_is_one_whole_message() {
        assert!(arriving(&[0, 0, 0], 1).length().await.is_err());
        assert!(arriving(&[1, 0, 0, 0, 0], 5).length().await.is_err());
        assert_eq!(arriving(&[], 1).length().await.unwrap(), None);
        let mut short = arriving(&[0, 0, 0, 0, 2, 9], 1);
        assert_eq!(short.length().await.unwrap(), Some(2));
        assert!(short.take(2).await.is_err());
        let mut long = arriving(&[0, 0, 0, 0, 1, 9, 9], 6);
        assert_eq!(long.length().await.unwrap(), Some(1));
        assert_eq!(long.some(1).await.unwrap().len(), 1);
        assert!(long.end().await.is_err());
    }
}
