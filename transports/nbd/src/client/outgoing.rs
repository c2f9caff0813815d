//! The sending half of a connection: requests in the order in which they were made, several in one system call.
//!
//! A request is sent at once by whoever makes it, straight from the caller's buffer, as far as the stream takes it. What
//! it does not take is copied and sent later by the connection's driver, so that a request that has begun ends, whatever
//! becomes of its caller.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use crate::client::ending::Ending;
use crate::stream::Writing;

/// How many bytes may wait before requests have to.
const FULL: usize = 1 << 20;
/// The most pieces in one system call.
const PIECES: usize = 32;

/// The sending half.
pub(crate) struct Outgoing {
    stream: Writing,
    ending: Ending,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// Whether the stream may have buffered something itself.
    unflushed: bool,
    waiting: Vec<Waker>,
    sent: u64,
    broken: bool,
}

impl Outgoing {
    pub(crate) fn new(stream: Writing, ending: Ending) -> Self {
        Self {
            stream,
            ending,
            queue: VecDeque::new(),
            queued: 0,
            unflushed: false,
            waiting: Vec::new(),
            sent: 0,
            broken: false,
        }
    }

    /// How many bytes have left so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Waits until there is room for a request.
    pub(crate) fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.queued < FULL || self.broken {
            return Poll::Ready(());
        }
        self.waiting.push(context.waker().clone());
        Poll::Pending
    }

    /// Sends a request, as much of it as is possible now; `driver` is woken when the rest can go on.
    pub(crate) fn send(&mut self, driver: &mut Context<'_>, header: &[u8], payload: &[u8]) {
        let mut taken = 0;
        while self.queue.is_empty() && !self.broken && taken < header.len() + payload.len() {
            let head = &header[taken.min(header.len())..];
            let body = &payload[taken.saturating_sub(header.len())..];
            match Pin::new(&mut self.stream).poll_write_vectored(driver, &[IoSlice::new(head), IoSlice::new(body)]) {
                Poll::Ready(Ok(count)) if count > 0 => taken += count,
                Poll::Ready(Ok(_)) => self.broken = true,
                Poll::Ready(Err(error)) => {
                    self.ending.note(&error);
                    self.broken = true;
                }
                Poll::Pending => break,
            }
        }
        self.sent += taken as u64;
        self.unflushed |= taken > 0;
        if self.broken {
            // The driver finds out why.
            driver.waker().wake_by_ref();
            return;
        }
        self.push(&header[taken.min(header.len())..]);
        self.push(&payload[taken.saturating_sub(header.len())..]);
        if self.queue.is_empty() && matches!(self.poll_flushed(driver), Poll::Ready(Err(_))) {
            driver.waker().wake_by_ref();
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.queue.push_back(Bytes::copy_from_slice(bytes));
            self.queued += bytes.len();
        }
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// If the stream is broken.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.queue.is_empty() {
            let pieces: Vec<_> = self.queue.iter().take(PIECES).map(|bytes| IoSlice::new(bytes)).collect();
            let count = match ready!(Pin::new(&mut self.stream).poll_write_vectored(context, &pieces)) {
                Ok(0) => return Poll::Ready(Err(self.failed(io::ErrorKind::BrokenPipe.into()))),
                Ok(count) => count,
                Err(error) => return Poll::Ready(Err(self.failed(error))),
            };
            self.unflushed = true;
            self.sent += count as u64;
            self.advance(count);
        }
        self.poll_flushed(context)
    }

    fn poll_flushed(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed && !self.broken {
            if let Err(error) = ready!(Pin::new(&mut self.stream).poll_flush(context)) {
                return Poll::Ready(Err(self.failed(error)));
            }
            self.unflushed = false;
        }
        match self.broken {
            true => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            false => Poll::Ready(Ok(())),
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.queued -= count;
        while let Some(front) = self.queue.front_mut() {
            if count < front.len() {
                front.advance(count);
                break;
            }
            count -= front.len();
            self.queue.pop_front();
        }
        if self.queued < FULL {
            self.waiting.drain(..).for_each(Waker::wake);
        }
    }

    /// Nothing can be sent any more; whoever waits for room is told.
    fn failed(&mut self, error: io::Error) -> io::Error {
        self.ending.note(&error);
        self.close();
        error
    }

    /// As [`Self::failed`], whatever the reason.
    pub(crate) fn close(&mut self) {
        self.broken = true;
        self.queue.clear();
        self.queued = 0;
        self.waiting.drain(..).for_each(Waker::wake);
    }

    /// Lets go of the stream, as [`crate::client::incoming::Incoming::release`].
    pub(crate) fn release(&mut self) {
        self.close();
        self.stream = Box::new(tokio::io::sink());
    }

    /// Tells the other side that nothing more comes.
    pub(crate) fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.stream).poll_shutdown(context).map(|_| ())
    }
}
