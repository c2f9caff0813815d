//! How bytes come: demand pulls, background pulls, and the doing of both.
//!
//! What to pull is decided by [`r3map_core::pull`] and [`r3map_core::state`]. There is no task per chunk: a demand pull
//! that completes when it is first polled has none, one that has to wait gets one (so that it does not die with the
//! reader that began it), and all background pulls share a few.

use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use r3map_core::pull::{Next, Workers};
use r3map_core::state::{Failed, Need, Pull, Wait};
use r3map_core::window::Flight;
use r3map_core::{Error, ErrorKind, Operation, Piece, ReadMany, ReadOp, ReadPieces, Result};

use super::placer::{Placer, install};
use super::{DEMAND_REQUEST, Inner, Phase, index, poll_once};
use crate::InstallNow;

/// How a pull ended.
pub(super) struct Pulled {
    failed: Vec<Range<u64>>,
    error: Option<Error>,
}

/// Background pulls that have failed.
#[derive(Default)]
pub(super) struct Failures(Mutex<FailedPulls>);

#[derive(Default)]
struct FailedPulls {
    count: u64,
    last: Option<Error>,
    /// Nothing is pulled any more.
    for_good: bool,
}

impl Failures {
    fn count(&self) -> u64 {
        self.lock().count
    }

    fn add(&self, error: &Error, for_good: bool) {
        let mut failures = self.lock();
        *failures = FailedPulls { count: failures.count + 1, last: Some(error.clone()), for_good };
    }

    /// The last error, if there was one after the first `seen`, or nothing can come after it.
    fn since(&self, seen: u64) -> Option<Error> {
        let failures = self.lock();
        failures.last.clone().filter(|_| failures.for_good || failures.count > seen)
    }

    fn lock(&self) -> MutexGuard<'_, FailedPulls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A demand pull that waits for the remote, counted so that the background leaves it room.
struct Demand(Arc<Inner>);

impl Demand {
    fn new(inner: Arc<Inner>) -> Self {
        inner.demands.fetch_add(1, Ordering::Relaxed);
        Self(inner)
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        if self.0.demands.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.pull_wake.notify_one();
        }
    }
}

/// Tells whoever waits for the background when a hook or a priority function of the caller has panicked in it.
struct Outcry<'a>(&'a Inner);

impl Drop for Outcry<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let message = "pulling in the background has stopped: a function that the caller gave has panicked";
            self.0.note_failed_pull(&Error::new(ErrorKind::Internal, Operation::Read, message), true);
        }
    }
}

/// A background pull as the plan counts it, however it ends.
struct UnderWay<'a> {
    inner: &'a Inner,
    flight: Option<Flight>,
}

/// A background pull, counted.
type Counted<'a> = (Pull, UnderWay<'a>);

impl UnderWay<'_> {
    fn end(mut self, pulled: &Pulled) {
        let Some(flight) = self.flight.take() else { return };
        let inner = self.inner;
        // The remote as a whole is away: asking it for something else would not help.
        let away = pulled.error.as_ref().is_some_and(|error| error.kind().is_retryable());
        inner.pull_plan().finish(flight, &pulled.failed, inner.settings.pull.retry_pause, away, inner.now());
        inner.report.touch();
        inner.pull_wake.notify_one();
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.inner.pull_plan().finish(flight, &[], Duration::ZERO, false, self.inner.now());
            self.inner.report.touch();
        }
    }
}

impl Inner {
    /// Makes a range local, or fails.
    pub(super) async fn demand(self: &Arc<Self>, bytes: Range<u64>) -> Result<()> {
        while !self.table.is_valid(&bytes) {
            self.check_serving(Operation::Read)?;
            if let Err(Failed { chunks, error }) = self.demand_missing(&bytes).await {
                self.local.fail(self.table.geometry().chunks_range(&chunks), &error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Starts pulls for everything missing, side by side, and waits for all of them and for those of others.
    async fn demand_missing(self: &Arc<Self>, bytes: &Range<u64>) -> Result<(), Failed> {
        let geometry = self.table.geometry();
        let longest = (DEMAND_REQUEST.min(self.request_limit) / geometry.chunk_size().bytes()).max(1);
        let mut rest = bytes.clone();
        let mut waits: Vec<(Wait, bool)> = Vec::new();
        while rest.start < rest.end {
            match self.table.need(&rest, longest) {
                Need::Nothing => break,
                Need::Busy(chunk) => self.table.settled(chunk).await,
                Need::Join(wait) => {
                    rest.start = geometry.chunks_range(&wait.chunks()).end;
                    waits.push((wait, false));
                }
                Need::Pull(pull) => {
                    let chunks = pull.chunks();
                    rest.start = geometry.chunks_range(&chunks).end;
                    self.pull_plan_demanded(&chunks);
                    if let Some(wait) = self.start_demand(pull).await? {
                        waits.push((wait, true));
                    }
                }
            }
        }
        for (wait, own) in waits {
            let chunks = wait.chunks();
            match wait.await {
                Some(result) => result?,
                None if own => return Err(Failed { chunks, error: self.given_up() }),
                None => {}
            }
        }
        Ok(())
    }

    fn pull_plan_demanded(&self, chunks: &Range<u64>) {
        // A hint for the background, which a demand never waits for: not even while the plan sorts by a priority.
        if self.settings.pull.workers != Workers::Off
            && let Ok(mut plan) = self.pull_plan.try_lock()
        {
            plan.demanded(chunks);
        }
    }

    /// Why a pull that this region's runtime was doing was given up.
    fn given_up(&self) -> Error {
        match self.check_serving(Operation::Read) {
            Err(error) => error,
            Ok(()) => {
                let message = "the pull was given up: the region's runtime is shutting down, or a hook has panicked";
                Error::new(ErrorKind::Cancelled, Operation::Read, message)
            }
        }
    }

    /// Polls a pull once; if that does not complete it, it goes on in a task, and what to wait for is answered.
    async fn start_demand(self: &Arc<Self>, pull: Pull) -> Result<Option<Wait>, Failed> {
        let wait = pull.wait();
        let chunks = wait.chunks();
        // Like a task until there is one, so that whoever ends the region can wait for it.
        let _first_poll = self.tasks.token();
        if self.stop.is_cancelled() {
            return Err(Failed { chunks, error: self.given_up() });
        }
        let mut work: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(self.clone().do_demand(pull));
        if poll_once(&self.runtime, &mut work).await.is_pending() {
            let demand = Demand::new(self.clone());
            self.spawn(&self.stop, async move {
                let _waiting = demand;
                work.await;
            });
            return Ok(Some(wait));
        }
        match wait.now_or_never() {
            Some(Some(result)) => result.map(|()| None),
            _ => Err(Failed { chunks, error: self.given_up() }),
        }
    }

    async fn do_demand(self: Arc<Self>, pull: Pull) {
        self.pull(pull).await;
    }

    /// Does a pull: every chunk has ended afterwards, well or with an error. Where a request for several chunks fails
    /// because of what is in one of them, the others are asked for one by one.
    async fn pull(&self, mut pull: Pull) -> Pulled {
        let end = pull.chunks().end;
        let mut pulled = Pulled { failed: Vec::new(), error: None };
        let mut upto = end;
        while !pull.chunks().is_empty() {
            let error = match self.fetch(&mut pull, upto).await {
                Err(error) if pull.chunks().start < upto => error,
                // Also where the remote has failed afterwards: what was asked for is in place.
                _ => {
                    upto = pull.chunks().start + 1;
                    continue;
                }
            };
            let rest = pull.chunks();
            if upto > rest.start + 1 && !error.kind().is_retryable() {
                upto = rest.start + 1;
                continue;
            }
            let failed = rest.start..if error.kind().is_retryable() { end } else { upto };
            pull.end(failed.end, Err(error.clone()));
            upto = failed.end + 1;
            pulled.failed.push(failed);
            pulled.error = Some(error);
        }
        self.tell_if_complete();
        pulled
    }

    /// Tells whoever waits for everything to be local if it is. To be called after whatever may have completed it.
    pub(super) fn tell_if_complete(&self) {
        let told = &self.told_complete;
        // Once: who begins to wait later sees it, and each write to a region that is all here comes by.
        if self.table.is_complete() && !told.load(Ordering::Relaxed) && !told.swap(true, Ordering::Relaxed) {
            self.publish();
            self.pull_news.notify_waiters();
        }
    }

    /// Fetches the chunks of a pull before `end`, and puts them in place.
    async fn fetch(&self, pull: &mut Pull, end: u64) -> Result<()> {
        let range = self.table.geometry().chunks_range(&(pull.chunks().start..end));
        let local = self.local.install_now();
        match (self.remote.capabilities().pieces, local) {
            (Some(remote), Some(local)) => self.fetch_pieces(remote, local, pull, range).await,
            _ => self.fetch_bytes(local, pull, range).await,
        }
    }

    /// Straight from the bytes that the remote lends.
    async fn fetch_pieces(
        &self,
        remote: &dyn ReadPieces,
        local: &dyn InstallNow,
        pull: &mut Pull,
        range: Range<u64>,
    ) -> Result<()> {
        let mut placer = Placer::new(self, local, pull, range.end);
        let mut result = Ok(());
        while result.is_ok() && placer.at() < range.end {
            let (at, len) = (placer.at(), (range.end - placer.at()).min(self.request_limit));
            result = remote.read_pieces(at, len, &mut |at, piece| placer.place(at, piece)).await;
            if result.is_ok() && placer.at() != at + len {
                let message = "the remote lent fewer bytes than it was asked for";
                result = Err(Error::new(ErrorKind::Corrupt, Operation::Read, message).at(at, len));
            }
        }
        result
    }

    /// Through a buffer.
    async fn fetch_bytes(&self, local: Option<&dyn InstallNow>, pull: &mut Pull, range: Range<u64>) -> Result<()> {
        let mut buffer = self.buffers.take(index(range.end - range.start));
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(self.request_limit);
            let from = index(at - range.start);
            self.remote.read_at(at, &mut buffer[from..from + index(len)]).await?;
            at += len;
        }
        self.place(local, pull, range, &buffer).await
    }

    /// Puts the bytes of the first chunks of a pull in place.
    async fn place(
        &self,
        local: Option<&dyn InstallNow>,
        pull: &mut Pull,
        range: Range<u64>,
        bytes: &[u8],
    ) -> Result<()> {
        let Some(local) = local else { return install(self, pull, range.start, bytes).await };
        Placer::new(self, local, pull, range.end).place(range.start, Piece::Data(bytes))
    }

    /// Several pulls in one request.
    async fn fetch_many(&self, remote: &dyn ReadMany, pulls: &mut [&mut Pull]) -> Result<()> {
        let lens: Vec<usize> = pulls.iter().map(|pull| index(pull.bytes().end - pull.bytes().start)).collect();
        let mut buffer = self.buffers.take(lens.iter().sum());
        let mut rest: &mut [u8] = &mut buffer;
        let mut reads = Vec::with_capacity(pulls.len());
        for (pull, len) in pulls.iter().zip(&lens) {
            let (buf, tail) = std::mem::take(&mut rest).split_at_mut(*len);
            reads.push(ReadOp { offset: pull.bytes().start, buf });
            rest = tail;
        }
        remote.read_many(&mut reads).await?;
        for (pull, read) in pulls.iter_mut().zip(&reads) {
            let range = pull.bytes();
            self.place(self.local.install_now(), pull, range, read.buf).await?;
        }
        Ok(())
    }

    /// Pulls in the background until there is nothing left.
    pub(super) async fn run_puller(self: Arc<Self>) {
        if let Some(begin) = &self.parts.pull_after {
            begin.cancelled().await;
        }
        let _outcry = Outcry(&self);
        let mut under_way = FuturesUnordered::new();
        loop {
            // Before it is looked whether everything is there: who tells of that wakes only those that wait already.
            let mut news = pin!(self.pull_wake.notified());
            if self.table.is_complete() {
                break;
            }
            let again = self.start_pulls(|pulls| under_way.push(self.background_pulls(pulls)));
            tokio::select! {
                Some(()) = under_way.next() => tokio::task::yield_now().await,
                () = &mut news => {}
                () = tokio::time::sleep(again) => {}
            }
        }
        // One that has put the last bytes in place, and waits for the reply to end, ends here without a word.
        drop(under_way);
        self.tell_if_complete();
    }

    /// Starts what the plan allows; answers when to look again at the latest.
    fn start_pulls<'a>(&'a self, mut start: impl FnMut(Vec<Counted<'a>>)) -> Duration {
        // What is left while others are at work may come back: a demand that fails, a write that does.
        const LOOK_AGAIN: Duration = Duration::from_secs(1);
        // It outlives the lock: those in it that are not started, because the caller's order panics, tell the plan so.
        let mut batch = Vec::new();
        let mut plan = self.pull_plan();
        let again = loop {
            let now = self.now();
            let (pull, flight) = match plan.next(now, self.demands.load(Ordering::Relaxed) > 0) {
                Next::Pull(pull, flight) => (pull, flight),
                Next::Later(due) => break due.saturating_sub(now).max(Duration::from_millis(1)),
                Next::Full | Next::Done => break LOOK_AGAIN,
            };
            let counted = (pull, UnderWay { inner: self, flight: Some(flight) });
            if !self.goes_with(&batch, &counted.0, plan.request_bytes()) && !batch.is_empty() {
                start(std::mem::take(&mut batch));
            }
            batch.push(counted);
        };
        if !batch.is_empty() {
            start(batch);
        }
        again
    }

    /// Whether a pull goes into one request with others: where the remote can do that, and the chunks lie too far apart
    /// to be one pull.
    fn goes_with(&self, batch: &[Counted<'_>], pull: &Pull, longest: u64) -> bool {
        let bytes = |pull: &Pull| pull.bytes().end - pull.bytes().start;
        let together = batch.iter().map(|(pull, _)| bytes(pull)).sum::<u64>() + bytes(pull);
        let apart = batch.last().is_some_and(|(last, _)| last.chunks().end != pull.chunks().start);
        apart && together <= longest.min(self.request_limit) && self.remote.capabilities().read_many.is_some()
    }

    async fn background_pulls(&self, mut pulls: Vec<Counted<'_>>) {
        if pulls.len() > 1
            && let Some(remote) = self.remote.capabilities().read_many
        {
            let mut each: Vec<&mut Pull> = pulls.iter_mut().map(|(pull, _)| pull).collect();
            // Those that it does not bring are asked for one by one, and get an error of their own.
            let _ = self.fetch_many(remote, &mut each).await;
        }
        join_all(pulls.into_iter().map(|(pull, under_way)| self.background_pull(pull, under_way))).await;
    }

    async fn background_pull(&self, pull: Pull, under_way: UnderWay<'_>) {
        let pulled = self.pull(pull).await;
        under_way.end(&pulled);
        if let Some(error) = &pulled.error {
            self.note_failed_pull(error, false);
        }
    }

    fn note_failed_pull(&self, error: &Error, for_good: bool) {
        self.report.failed(error);
        self.pull_failures.add(error, for_good);
        self.pull_news.notify_waiters();
    }

    /// Waits until everything is local.
    pub(super) async fn pulled(&self) -> Result<()> {
        let seen = self.pull_failures.count();
        loop {
            let mut news = pin!(self.pull_news.notified());
            news.as_mut().enable();
            if self.table.is_complete() {
                return Ok(());
            }
            if self.phase() != Phase::Running {
                return Err(Error::new(ErrorKind::Cancelled, Operation::Read, "the region is closing or closed"));
            }
            if self.settings.pull.workers == Workers::Off {
                let message = "background pulling is off, so the region will not be pulled as a whole";
                return Err(Error::new(ErrorKind::InvalidInput, Operation::Read, message));
            }
            if let Some(error) = self.pull_failures.since(seen) {
                return Err(error);
            }
            news.await;
        }
    }
}
