//! The two ends of a connection's byte stream: what has arrived and is not used yet, and what is to be sent.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::server::buffers::Buffer;
use crate::server::lend::Lend;

/// How much is received at once where it is not a large payload.
const INPUT: usize = 32 << 10;
/// Replies without data are gathered into segments of this size.
const GATHERED: usize = 4 << 10;
/// The most segments that are sent by one call.
const VECTORS: usize = 64;

/// Bytes that have arrived.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INPUT].into(), start: 0, end: 0 }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves as much as there is to `target`, and says how much that was.
    pub(super) fn move_to(&mut self, target: &mut [u8]) -> usize {
        let count = target.len().min(self.end - self.start);
        target[..count].copy_from_slice(&self.bytes()[..count]);
        self.consume(count);
        count
    }

    /// Receives more; how much that was.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let count = ready!(poll_read(stream, context, &mut self.bytes[self.end..]))?;
        self.end += count;
        Poll::Ready(Ok(count))
    }
}

/// Receives into `buf`; how much that was.
pub(super) fn poll_read<S: AsyncRead + Unpin>(
    stream: &mut S,
    context: &mut Context<'_>,
    buf: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buf = ReadBuf::new(buf);
    ready!(Pin::new(stream).poll_read(context, &mut buf))?;
    Poll::Ready(Ok(buf.filled().len()))
}

#[derive(Debug)]
enum Segment {
    Gathered(Vec<u8>),
    Reply(Buffer),
    /// Bytes that are not there yet.
    Lend(Lend),
}

impl Segment {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Gathered(bytes) => Some(bytes),
            Self::Reply(buffer) => Some(buffer.used()),
            Self::Lend(_) => None,
        }
    }
}

/// Bytes that are to be sent.
#[derive(Debug, Default)]
pub(super) struct Output {
    segments: VecDeque<Segment>,
    /// How much of the first segment has been sent.
    sent: usize,
    /// Whether what was given to the stream may still be in it.
    unflushed: bool,
    /// A segment to be used again.
    spare: Vec<u8>,
}

impl Output {
    pub(super) fn len(&self) -> usize {
        self.segments.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty() && !self.unflushed
    }

    /// Adds a whole reply.
    pub(super) fn push(&mut self, reply: Buffer) {
        self.segments.push_back(Segment::Reply(reply));
    }

    /// Adds a read whose reply is made while it is sent.
    pub(super) fn push_lend(&mut self, lend: Lend) {
        self.segments.push_back(Segment::Lend(lend));
    }

    /// Takes the next segment, if it is a read whose reply is still to be made.
    pub(super) fn take_lend(&mut self) -> Option<Lend> {
        match self.segments.pop_front()? {
            Segment::Lend(lend) => Some(lend),
            other => {
                self.segments.push_front(other);
                None
            }
        }
    }

    /// A buffer for bytes that go in front.
    pub(super) fn take_spare(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.spare)
    }

    /// Puts what is left of a read in front of everything: bytes, and then the rest of it.
    pub(super) fn put_back(&mut self, bytes: Vec<u8>, rest: Option<Lend>) {
        rest.into_iter().for_each(|rest| self.segments.push_front(Segment::Lend(rest)));
        if bytes.is_empty() {
            self.spare = bytes;
        } else {
            self.segments.push_front(Segment::Gathered(bytes));
        }
        self.unflushed = true;
    }

    /// Where bytes of a small reply go.
    pub(super) fn gathered(&mut self) -> &mut Vec<u8> {
        let room = matches!(self.segments.back(), Some(Segment::Gathered(bytes)) if bytes.len() < GATHERED);
        if !room {
            self.segments.push_back(Segment::Gathered(std::mem::take(&mut self.spare)));
        }
        match self.segments.back_mut() {
            Some(Segment::Gathered(bytes)) => bytes,
            _ => unreachable!("it was just made sure of"),
        }
    }

    /// Sends as much as the stream takes, up to the next read whose reply is still to be made; how much that was, and
    /// none if there is nothing.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.segments.is_empty() {
            if self.unflushed {
                ready!(Pin::new(stream).poll_flush(context))?;
                self.unflushed = false;
            }
            return Poll::Ready(Ok(0));
        }
        let mut slices = [IoSlice::new(&[]); VECTORS];
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(self.segments.iter().map_while(Segment::bytes)) {
            let skipped = if count == 0 { self.sent } else { 0 };
            *slice = IoSlice::new(&bytes[skipped..]);
            count += 1;
        }
        let sent = ready!(Pin::new(stream).poll_write_vectored(context, &slices[..count]))?;
        if sent == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.unflushed = true;
        self.advance(sent);
        Poll::Ready(Ok(sent))
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(first) = self.segments.front().and_then(Segment::bytes) {
            let left = first.len() - self.sent;
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            if let Some(Segment::Gathered(mut bytes)) = self.segments.pop_front() {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::server::buffers::Pool;

    #[test]
    fn input_keeps_what_is_not_used_and_makes_place() {
        let (mut context, mut input) = (Context::from_waker(Waker::noop()), Input::new());
        let mut stream: &[u8] = &[7; INPUT + 10];
        assert!(matches!(input.poll_fill(&mut stream, &mut context), Poll::Ready(Ok(INPUT))));
        input.consume(INPUT - 2);
        assert!(matches!(input.poll_fill(&mut stream, &mut context), Poll::Ready(Ok(10))));
        let mut target = [0; 20];
        assert_eq!((input.bytes().len(), input.move_to(&mut target), input.bytes().len()), (12, 12, 0));
        assert!(matches!(input.poll_fill(&mut stream, &mut context), Poll::Ready(Ok(0))));
    }

    #[tokio::test]
    async fn output_is_sent_in_order_however_little_the_stream_takes() {
        let pool = Pool::new(1 << 20, 1 << 20);
        let mut room = pool.room();
        for takes in [1, 3, 1000] {
            let (mut near, mut far) = tokio::io::duplex(takes);
            let mut output = Output::default();
            let mut expected = Vec::new();
            for part in 0..100_u8 {
                if part % 3 == 0 {
                    let Poll::Ready(share) = room.poll_share(&mut Context::from_waker(Waker::noop()), 1) else {
                        panic!()
                    };
                    let mut buffer = share.buffer(10);
                    buffer.push(&[part; 10]);
                    output.push(buffer);
                    expected.extend_from_slice(&[part; 10]);
                } else {
                    output.gathered().extend_from_slice(&[part; 2]);
                    expected.extend_from_slice(&[part; 2]);
                }
            }
            let sending = async move {
                while !output.is_empty() {
                    std::future::poll_fn(|context| output.poll_send(&mut near, context)).await.unwrap();
                }
            };
            let mut received = Vec::new();
            let receiving = tokio::io::AsyncReadExt::read_to_end(&mut far, &mut received);
            let ((), received_len) = tokio::join!(sending, receiving);
            assert_eq!((received_len.unwrap(), received), (expected.len(), expected), "{takes}");
        }
    }
}
