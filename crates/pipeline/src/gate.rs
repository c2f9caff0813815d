//! A gate in front of a backend: it closes, lets what is under way drain, and opens again. What suspends a region for a
//! moment, or ends its use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use r3map_core::{
    Backend, Capabilities, Error, ErrorKind, Extent, Extents, Operation, Piece, ReadMany, ReadOp, ReadPieces, Result,
    Trim, WriteZeroes,
};
use tokio::sync::Notify;

use crate::DECLARED;

/// What happens to calls that come while the gate is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenClosed {
    /// They wait until it opens.
    #[default]
    Wait,
    /// They fail as cancelled.
    Fail,
    /// Those that would change something fail as cancelled; reads and flushes do not notice that it is closed.
    FailChanges,
}

/// A backend that can be closed for a while. Every call passes the gate, reads and flushes too unless only changes are
/// [kept out](WhenClosed::FailChanges); whoever closes it works on the backend inside directly.
///
/// An open gate costs a call two atomic operations.
pub struct Gate {
    inner: Arc<dyn Backend>,
    when_closed: WhenClosed,
    state: Arc<State>,
}

/// One word, so that nobody slips in between: the calls under way, and [`CLOSER`] for each closed guard.
#[derive(Default)]
struct State {
    word: AtomicU64,
    drained: Notify,
    opened: Notify,
}

const CLOSER: u64 = 1 << 32;

fn closers(word: u64) -> u64 {
    word / CLOSER
}

fn calls(word: u64) -> u64 {
    word % CLOSER
}

impl Gate {
    /// An open gate in front of `inner`.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, when_closed: WhenClosed) -> Self {
        Self { inner, when_closed, state: Arc::default() }
    }

    /// The backend behind the gate, for whoever closed it.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn Backend> {
        &self.inner
    }

    /// Stops new calls, and returns when those under way have ended. The gate opens again when the guard is dropped, or
    /// when this future is dropped before it is done. Several may close it at once; it opens when the last of them lets
    /// go.
    ///
    /// A call whose future was dropped has ended too. What a write that was dropped leaves undefined may settle after
    /// this returned, as [`Backend`] says.
    pub async fn close(&self) -> Closed {
        let closed = Closed { state: self.state.clone() };
        self.state.word.fetch_add(CLOSER, Ordering::SeqCst);
        wait_until(&self.state.drained, || calls(self.state.word.load(Ordering::SeqCst)) == 0).await;
        closed
    }

    /// Whether somebody has closed it, or is about to.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        closers(self.state.word.load(Ordering::SeqCst)) > 0
    }

    async fn enter(&self, operation: Operation) -> Result<Option<Passing<'_>>> {
        if self.when_closed == WhenClosed::FailChanges && !changes(operation) {
            return Ok(None); // whoever closes it does not wait for these either
        }
        loop {
            let word = self.state.word.fetch_add(1, Ordering::SeqCst);
            let passing = Passing(&self.state);
            if closers(word) == 0 {
                return Ok(Some(passing));
            }
            drop(passing);
            if self.when_closed != WhenClosed::Wait {
                return Err(Error::new(ErrorKind::Cancelled, operation, "the region is closed"));
            }
            wait_until(&self.state.opened, || !self.is_closed()).await;
        }
    }
}

fn changes(operation: Operation) -> bool {
    matches!(operation, Operation::Write | Operation::Trim | Operation::WriteZeroes)
}

/// Waits until something holds that is made true before `changed` is notified.
async fn wait_until(changed: &Notify, holds: impl Fn() -> bool) {
    loop {
        let notified = changed.notified();
        if holds() {
            return;
        }
        notified.await;
    }
}

/// A call under way.
struct Passing<'a>(&'a State);

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        let word = self.0.word.fetch_sub(1, Ordering::SeqCst);
        if calls(word) == 1 && closers(word) > 0 {
            self.0.drained.notify_waiters();
        }
    }
}

/// Keeps a [`Gate`] closed. Dropping it lets go.
#[must_use = "the gate opens when this is dropped"]
pub struct Closed {
    state: Arc<State>,
}

impl Closed {
    /// Leaves the gate closed for good: calls that wait or come will wait for ever, or fail, as the gate was told.
    pub fn forever(self) {
        std::mem::forget(self);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let word = self.state.word.fetch_sub(CLOSER, Ordering::SeqCst);
        if closers(word) == 1 {
            self.state.opened.notify_waiters();
        }
    }
}

#[async_trait]
impl Backend for Gate {
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
        let _passing = self.enter(Operation::Read).await?;
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _passing = self.enter(Operation::Write).await?;
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        let _passing = self.enter(Operation::Flush).await?;
        self.inner.flush().await
    }
}

#[async_trait]
impl ReadPieces for Gate {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let _passing = self.enter(Operation::Read).await?;
        self.inner.capabilities().pieces.expect(DECLARED).read_pieces(offset, len, visit).await
    }
}

#[async_trait]
impl ReadMany for Gate {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        let _passing = self.enter(Operation::Read).await?;
        self.inner.capabilities().read_many.expect(DECLARED).read_many(reads).await
    }
}

#[async_trait]
impl Trim for Gate {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let _passing = self.enter(Operation::Trim).await?;
        self.inner.capabilities().trim.expect(DECLARED).trim(offset, len).await
    }
}

#[async_trait]
impl WriteZeroes for Gate {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let _passing = self.enter(Operation::WriteZeroes).await?;
        self.inner.capabilities().write_zeroes.expect(DECLARED).write_zeroes(offset, len).await
    }
}

#[async_trait]
impl Extents for Gate {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let _passing = self.enter(Operation::Extents).await?;
        self.inner.capabilities().extents.expect(DECLARED).extents(offset, len).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::join_all;
    use futures_util::poll;
    use r3map_testkit::faults::{Faults, Pause, Rule};
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, deadline, model};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn gate(when_closed: WhenClosed) -> (Arc<Faults>, Arc<Gate>) {
        let faults = Faults::new(Arc::new(Store::new(10_000).filled(1)));
        (faults.clone(), Arc::new(Gate::new(faults, when_closed)))
    }

    #[tokio::test]
    async fn conforms() {
        let open = |store| Arc::new(Gate::new(Arc::new(store), WhenClosed::Wait)) as Arc<dyn Backend>;
        conformance::backend(async || open(Store::new(100_001))).await;
        conformance::backend(async || open(Store::new(100_001).plain().max_request(9000))).await;
        conformance::filled(async || open(Store::new(100_001).filled(2).read_only()), 2).await;
        model::check(async || open(Store::new(100_001)), model::Settings::default()).await;
    }

    #[tokio::test]
    async fn close_waits_for_what_is_under_way_and_stops_the_rest() {
        let (faults, gate) = gate(WhenClosed::Wait);
        let pause = Pause::new();
        faults.add(Rule::any().times(3).hold(&pause));
        let mut early: Vec<_> = (0..3).map(|n| write(&gate, n)).collect();
        pause.wait_held(3).await;
        let mut close = Box::pin(gate.close());
        assert!(poll!(close.as_mut()).is_pending());
        let late = write(&gate, 7);
        early[0].abort();
        pause.let_go(1);
        tokio::task::yield_now().await;
        assert!(poll!(close.as_mut()).is_pending(), "one is still under way");
        pause.release();
        let closed = deadline(LONG, "closing", close).await;
        assert_eq!((faults.in_flight(), faults.count(Operation::Write)), (0, 3));
        assert!(!late.is_finished() && gate.is_closed());
        drop(closed);
        deadline(LONG, "a call that waited", late).await.unwrap().unwrap();
        early.remove(0);
        join_all(early).await.into_iter().for_each(|early| early.unwrap().unwrap());
        assert!(!gate.is_closed());
    }

    fn write(gate: &Arc<Gate>, offset: u64) -> tokio::task::JoinHandle<Result<()>> {
        let gate = gate.clone();
        tokio::spawn(async move { gate.write_at(offset, &[1]).await })
    }

    #[tokio::test]
    async fn every_kind_of_call_is_stopped() {
        let (faults, gate) = gate(WhenClosed::Fail);
        let closed = gate.close().await;
        let capabilities = gate.capabilities();
        let mut visit = |_: u64, _: Piece<'_>| -> Result<()> { Ok(()) };
        let results = [
            gate.read_at(0, &mut [0]).await,
            gate.write_at(0, &[0]).await,
            gate.flush().await,
            capabilities.pieces.unwrap().read_pieces(0, 1, &mut visit).await,
            capabilities.read_many.unwrap().read_many(&mut []).await,
            capabilities.trim.unwrap().trim(0, 1).await,
            capabilities.write_zeroes.unwrap().write_zeroes(0, 1).await,
            capabilities.extents.unwrap().extents(0, 1).await.map(|_| ()),
        ];
        for result in results {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        assert!(faults.calls().is_empty());
        gate.inner().read_at(0, &mut [0]).await.expect("who closed it works inside");
        drop(closed);
        gate.read_at(0, &mut [0]).await.unwrap();
    }

    #[tokio::test]
    async fn only_changes_are_stopped_where_reads_may_go_on() {
        let (faults, gate) = gate(WhenClosed::FailChanges);
        let (pause, reading) = (Pause::new(), gate.clone());
        faults.add(Rule::on(Operation::Read).times(1).hold(&pause));
        let read = tokio::spawn(async move { reading.read_at(0, &mut [0]).await });
        pause.wait_held(1).await;
        let closed = deadline(LONG, "closing, which waits for no read", gate.close()).await;
        pause.release();
        read.await.unwrap().unwrap();
        let capabilities = gate.capabilities();
        let refused = [
            gate.write_at(0, &[0]).await,
            capabilities.trim.unwrap().trim(0, 1).await,
            capabilities.write_zeroes.unwrap().write_zeroes(0, 1).await,
        ];
        for result in refused {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        gate.read_at(0, &mut [0]).await.unwrap();
        gate.flush().await.unwrap();
        capabilities.extents.unwrap().extents(0, 1).await.unwrap();
        assert_eq!(faults.count(Operation::Write), 0);
        drop(closed);
        gate.write_at(0, &[0]).await.unwrap();
    }

    #[tokio::test]
    async fn a_dropped_close_opens_again() {
        let (faults, gate) = gate(WhenClosed::Wait);
        let pause = Pause::new();
        faults.add(Rule::any().times(1).hold(&pause));
        let held = write(&gate, 0);
        pause.wait_held(1).await;
        let mut close = Box::pin(gate.close());
        assert!(poll!(close.as_mut()).is_pending());
        let late = write(&gate, 1);
        tokio::task::yield_now().await;
        assert!(!late.is_finished());
        drop(close);
        deadline(LONG, "a call after a dropped close", late).await.unwrap().unwrap();
        pause.release();
        held.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn it_opens_with_the_last_who_closed_it() {
        let (_, gate) = gate(WhenClosed::Fail);
        let (a, b) = (gate.close().await, gate.close().await);
        drop(a);
        assert!(gate.flush().await.is_err());
        drop(b);
        gate.flush().await.unwrap();
        gate.close().await.forever();
        assert!(gate.flush().await.is_err());
    }

    /// What is inside while the gate is closed is nothing, however the calls fall.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nothing_slips_through() {
        let (faults, gate) = gate(WhenClosed::Wait);
        let callers: Vec<_> = (0..4)
            .map(|n| {
                let gate = gate.clone();
                tokio::spawn(async move {
                    for _ in 0..500 {
                        gate.write_at(n, &[1]).await.unwrap();
                    }
                })
            })
            .collect();
        while callers.iter().any(|caller| !caller.is_finished()) {
            let closed = deadline(LONG, "closing", gate.close()).await;
            let before = faults.count(Operation::Write);
            tokio::task::yield_now().await;
            assert_eq!((faults.in_flight(), faults.count(Operation::Write)), (0, before));
            drop(closed);
            tokio::time::sleep(Duration::from_micros(50)).await;
        }
        assert_eq!(faults.count(Operation::Write), 2000);
    }
}
