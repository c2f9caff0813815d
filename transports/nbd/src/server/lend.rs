//! Long reads from a backend that lends its bytes: they go from where they rest straight into the stream, without a
//! buffer between. Only with chunks, because after the first of them an error can still be told.
//!
//! What the stream does not take of the piece that is being lent is copied, so that no piece is held while it waits.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use r3map_core::{Error, ErrorKind, Operation, Piece, Result};
use tokio::io::AsyncWrite;

use crate::server::answer::{SHORTEST_HOLE, ZEROES};
use crate::server::buffers::Share;
use crate::wire::{Chunk, Framing, ReplyFlags, Request, encode_data_header};

/// Reads that are shorter are gathered: sending many by one call is worth more than not copying them.
pub(super) const SHORTEST: u64 = 32 << 10;
/// The most bytes of data in a chunk that is lent, and so the most that is copied when the stream takes no more.
const LONGEST: usize = 128 << 10;

/// A read whose reply is made while it is sent.
#[derive(Debug)]
pub(super) struct Lend {
    pub(super) request: Request,
    /// The first byte of the export that is not in the reply yet.
    pub(super) at: u64,
    /// Room for it, should it have to be copied after all.
    pub(super) share: Share,
}

impl Lend {
    pub(super) fn end(&self) -> u64 {
        self.request.offset + self.request.length
    }
}

/// Sends pieces as they are lent.
pub(super) struct Lending<'a, S> {
    stream: &'a mut S,
    waker: Waker,
    framing: Framing,
    request: Request,
    /// The first byte of the export that is not in the reply yet.
    pub(super) at: u64,
    /// Bytes of the reply that are to be sent before anything else.
    pub(super) left: Vec<u8>,
    /// Whether the stream takes no more.
    pub(super) blocked: bool,
    pub(super) broken: Option<io::Error>,
    /// How much was sent.
    pub(super) sent: usize,
}

impl<'a, S: AsyncWrite + Unpin> Lending<'a, S> {
    /// `left` is an empty buffer to be used.
    pub(super) fn new(stream: &'a mut S, waker: Waker, framing: Framing, lend: &Lend, left: Vec<u8>) -> Self {
        let (request, at) = (lend.request, lend.at);
        Self { stream, waker, framing, request, at, left, blocked: false, broken: None, sent: 0 }
    }

    /// Takes a piece; an error if no more are wanted now.
    pub(super) fn visit(&mut self, piece: Piece<'_>) -> Result<()> {
        match piece {
            Piece::Data(bytes) => bytes.chunks(LONGEST).try_for_each(|part| self.data(part)),
            Piece::Zeroes(length) if length < SHORTEST_HOLE => {
                self.data(&ZEROES[..usize::try_from(length).unwrap_or(0)])
            }
            Piece::Zeroes(length) => {
                self.hole(length);
                Ok(())
            }
        }
    }

    fn hole(&mut self, length: u64) {
        let Request { cookie, offset, .. } = self.request;
        let length = u32::try_from(length).expect("a read is shorter than 4 GiB");
        Chunk::Hole { offset: self.at, length }.encode(
            self.framing,
            ReplyFlags::empty(),
            cookie,
            offset,
            &mut self.left,
        );
        self.at += u64::from(length);
        if self.at == self.request.offset + self.request.length {
            Chunk::None.encode(self.framing, ReplyFlags::DONE, cookie, offset, &mut self.left);
        }
    }

    /// A chunk of data. What is lent is known to be good, so that the one that completes the read is the last.
    fn data(&mut self, bytes: &[u8]) -> Result<()> {
        if self.blocked {
            return Err(Error::new(ErrorKind::Cancelled, Operation::Read, "the client takes no more now"));
        }
        let Request { cookie, offset, length, .. } = self.request;
        let (at, len) = (self.at, u32::try_from(bytes.len()).expect("it is short"));
        self.at += u64::from(len);
        let flags = if self.at == offset + length { ReplyFlags::DONE } else { ReplyFlags::empty() };
        encode_data_header(self.framing, flags, cookie, offset, at, len, &mut self.left);
        let sent = match self.send(bytes) {
            Ok(sent) => sent,
            Err(error) => {
                self.broken = Some(error);
                return Err(Error::new(ErrorKind::Cancelled, Operation::Read, "the client is gone"));
            }
        };
        self.sent += sent;
        let front = sent.min(self.left.len());
        self.left.drain(..front);
        self.left.extend_from_slice(&bytes[sent - front..]);
        self.blocked = !self.left.is_empty();
        Ok(())
    }

    /// Sends what is left and `bytes`, as far as the stream takes them; how much that was.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut context = Context::from_waker(&self.waker);
        let (total, mut sent) = (self.left.len() + bytes.len(), 0);
        while sent < total {
            let front = sent.min(self.left.len());
            let slices = [IoSlice::new(&self.left[front..]), IoSlice::new(&bytes[sent - front..])];
            match Pin::new(&mut *self.stream).poll_write_vectored(&mut context, &slices) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => sent += count,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => break,
            }
        }
        Ok(sent)
    }
}
