//! Faults that enter through the public trait: a wrapper that does to chosen calls what networks, disks and impatient
//! callers do, and that remembers every call.
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use r3map_core::{Backend, ErrorKind, Operation};
//! # use r3map_testkit::{faults::{Faults, Rule}, store::Store};
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let faults = Faults::new(Arc::new(Store::new(8192)));
//! faults.add(Rule::on(Operation::Read).touching(0..4096).after(1).times(2).fail(ErrorKind::Unavailable));
//! let mut buf = [0; 16];
//! assert!(faults.read_at(0, &mut buf).await.is_ok());
//! assert!(faults.read_at(0, &mut buf).await.is_err());
//! assert!(faults.read_at(4096, &mut buf).await.is_ok());
//! assert_eq!(faults.count(Operation::Read), 3);
//! # }
//! ```
//!
//! It forwards every ability that the backend inside has. Rules can be added and cleared while calls run; a call goes by
//! the rules that were there when it began.

mod link;
mod pause;
mod rule;

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, Error, ErrorKind, Extent, Extents, Operation, Piece, ReadMany, ReadOp, ReadPieces, Result,
    Trim, WriteZeroes,
};
use tokio::sync::watch;

pub use link::Link;
pub use pause::Pause;
use rule::{Effect, Moment};
pub use rule::{Fault, Rule};

/// A backend around a backend, with faults.
pub struct Faults {
    inner: Arc<dyn Backend>,
    faults: Mutex<Vec<Fault>>,
    calls: Mutex<Vec<Call>>,
    flying: watch::Sender<Flying>,
}

/// One call that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What was asked; reading pieces or several ranges is reading.
    pub operation: Operation,
    /// Which bytes; several for [`ReadMany`], none for a flush.
    pub ranges: Vec<Range<u64>>,
}

impl Call {
    /// The bytes of all ranges together.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// Whether it moves no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Flying {
    now: usize,
    most: usize,
}

impl Faults {
    /// Wraps `inner`; without rules it only remembers calls.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>) -> Arc<Self> {
        let (faults, calls) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner, faults, calls, flying: watch::Sender::default() })
    }

    /// Adds a fault for the calls to come.
    pub fn add(&self, fault: Fault) {
        guard(&self.faults).push(fault);
    }

    /// Heals: forgets all faults for the calls to come. What is held in a [`Pause`] stays there.
    pub fn clear(&self) {
        guard(&self.faults).clear();
    }

    /// Every call so far, in the order in which they began.
    #[must_use]
    pub fn calls(&self) -> Vec<Call> {
        guard(&self.calls).clone()
    }

    /// Takes the calls so far and starts a new list.
    #[must_use]
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut guard(&self.calls))
    }

    /// How many calls of one operation there were.
    #[must_use]
    pub fn count(&self, operation: Operation) -> usize {
        guard(&self.calls).iter().filter(|call| call.operation == operation).count()
    }

    /// Bytes that calls of one operation asked for.
    #[must_use]
    pub fn bytes(&self, operation: Operation) -> u64 {
        guard(&self.calls).iter().filter(|call| call.operation == operation).map(Call::len).sum()
    }

    /// How many calls are under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flying.borrow().now
    }

    /// The most calls that were under way at once.
    #[must_use]
    pub fn most_in_flight(&self) -> usize {
        self.flying.borrow().most
    }

    /// Waits until at least `calls` are under way.
    pub async fn wait_in_flight(&self, calls: usize) {
        let waited = self.flying.subscribe().wait_for(|flying| flying.now >= calls).await.map(|_| ());
        waited.expect("the sender lives as long as we do");
    }

    /// Waits until nothing is under way.
    pub async fn wait_idle(&self) {
        let waited = self.flying.subscribe().wait_for(|flying| flying.now == 0).await.map(|_| ());
        waited.expect("the sender lives as long as we do");
    }

    /// Runs a call with its faults around it. Short reads are the caller's: it has the buffer.
    async fn around<T, F>(&self, call: Call, run: impl FnOnce(Option<u64>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let effects: Vec<_> = guard(&self.faults).iter_mut().filter_map(|fault| fault.strike(&call)).collect();
        let _flight = self.depart(call.clone());
        let (mut short, mut polls) = (None, None);
        for (_, effect) in effects.iter().filter(|(moment, _)| *moment == Moment::Before) {
            match effect {
                Effect::Short(bytes) => short = Some(*bytes),
                Effect::Cancel(count) => polls = Some(*count),
                effect => effect.happen(&call).await?,
            }
        }
        let result = match polls {
            None => run(short).await,
            Some(polls) => cancel_after(polls, run(short)).await.unwrap_or_else(|| Err(cancelled(&call))),
        };
        for (_, effect) in effects.iter().filter(|(moment, _)| *moment == Moment::After) {
            effect.happen(&call).await?;
        }
        result
    }

    /// Fills a part, leaves rubbish in the rest, and says so: what a truncated file or a broken stream does.
    async fn read_short(&self, offset: u64, buf: &mut [u8], short: Option<u64>) -> Result<()> {
        self.inner.read_at(offset, buf).await?;
        let Some(got) = short else { return Ok(()) };
        let len = buf.len() as u64;
        buf.iter_mut().skip(usize::try_from(got).unwrap_or(usize::MAX)).for_each(|byte| *byte = 0xbd);
        Err(short_read(offset, len, got))
    }

    async fn pieces_short(&self, offset: u64, len: u64, visit: Visit<'_>, short: Option<u64>) -> Result<()> {
        let pieces = self.inner.capabilities().pieces.expect("it had the ability a moment ago");
        let Some(got) = short else { return pieces.read_pieces(offset, len, visit).await };
        let mut lent = 0;
        let mut cut = |at: u64, piece: Piece<'_>| {
            if lent + piece.len() > got {
                return Err(short_read(offset, len, lent));
            }
            lent += piece.len();
            visit(at, piece)
        };
        pieces.read_pieces(offset, len, &mut cut).await?;
        Err(short_read(offset, len, lent))
    }

    async fn many_short(&self, reads: &mut [ReadOp<'_>], short: Option<u64>) -> Result<()> {
        let many = self.inner.capabilities().read_many.expect("it had the ability a moment ago");
        many.read_many(reads).await?;
        match (short, reads.last_mut()) {
            (Some(got), Some(last)) => {
                last.buf.fill(0xbd);
                Err(short_read(last.offset, last.buf.len() as u64, got))
            }
            _ => Ok(()),
        }
    }

    fn depart(&self, call: Call) -> Flight<'_> {
        guard(&self.calls).push(call);
        self.flying.send_modify(|flying| {
            flying.now += 1;
            flying.most = flying.most.max(flying.now);
        });
        Flight(&self.flying)
    }
}

type Visit<'a> = &'a mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send);

struct Flight<'a>(&'a watch::Sender<Flying>);

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|flying| flying.now -= 1);
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cancelled(call: &Call) -> Error {
    Error::new(ErrorKind::Cancelled, call.operation, "given up, as the test asked")
}

fn short_read(offset: u64, len: u64, got: u64) -> Error {
    Error::new(ErrorKind::Corrupt, Operation::Read, format!("only {got} bytes came, as the test asked")).at(offset, len)
}

/// Polls a future at most `polls` times, whenever it asks to be polled, and then drops it. `None` if it was not ready
/// by then.
pub async fn cancel_after<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn call(operation: Operation, offset: u64, len: u64) -> Call {
    Call { operation, ranges: std::iter::once(offset..offset.saturating_add(len)).collect() }
}

#[async_trait]
impl Backend for Faults {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let inner = self.inner.capabilities();
        Capabilities {
            pieces: inner.pieces.map(|_| self as _),
            read_many: inner.read_many.map(|_| self as _),
            trim: inner.trim.map(|_| self as _),
            write_zeroes: inner.write_zeroes.map(|_| self as _),
            extents: inner.extents.map(|_| self as _),
            ..inner
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let call = call(Operation::Read, offset, buf.len() as u64);
        self.around(call, |short| self.read_short(offset, buf, short)).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let call = call(Operation::Write, offset, buf.len() as u64);
        self.around(call, |_| self.inner.write_at(offset, buf)).await
    }

    async fn flush(&self) -> Result<()> {
        let call = Call { operation: Operation::Flush, ranges: Vec::new() };
        self.around(call, |_| self.inner.flush()).await
    }
}

#[async_trait]
impl ReadPieces for Faults {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        self.around(call(Operation::Read, offset, len), |short| self.pieces_short(offset, len, visit, short)).await
    }
}

#[async_trait]
impl ReadMany for Faults {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        let ranges = reads.iter().map(|read| read.offset..read.offset.saturating_add(read.buf.len() as u64)).collect();
        self.around(Call { operation: Operation::Read, ranges }, |short| self.many_short(reads, short)).await
    }
}

#[async_trait]
impl Trim for Faults {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let trim = self.inner.capabilities().trim.expect("it had the ability a moment ago");
        self.around(call(Operation::Trim, offset, len), |_| trim.trim(offset, len)).await
    }
}

#[async_trait]
impl WriteZeroes for Faults {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeroing = self.inner.capabilities().write_zeroes.expect("it had the ability a moment ago");
        self.around(call(Operation::WriteZeroes, offset, len), |_| zeroing.write_zeroes(offset, len)).await
    }
}

#[async_trait]
impl Extents for Faults {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let extents = self.inner.capabilities().extents.expect("it had the ability a moment ago");
        self.around(call(Operation::Extents, offset, len), |_| extents.extents(offset, len)).await
    }
}

#[cfg(test)]
mod tests;
