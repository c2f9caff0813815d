//! How bytes go: rounds of pushes, flushes, and the end.
//!
//! One round at a time: so nothing is pushed while the remote flushes, and a round that begins finds nothing under way
//! that could fail behind its back. When to push is decided by [`r3map_core::push`].

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{join, try_join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use r3map_core::push::Round;
use r3map_core::state::{NextPush, Push};
use r3map_core::window::Flight;
use r3map_core::{Error, ErrorKind, Operation, Piece, Result, WriteZeroes};

use super::placer::by_zeroes;
use super::{Durability, Inner, index};

/// How often a flush pushes again when the remote says that it has lost what was pushed before.
const FLUSH_ATTEMPTS: u32 = 4;

/// A push as the plan counts it, however it ends.
struct UnderWay<'a> {
    inner: &'a Inner,
    flight: Option<Flight>,
    ok: bool,
}

impl UnderWay<'_> {
    fn end(mut self, ok: bool) {
        self.ok = ok;
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(flight) = self.flight.take() {
            self.inner.push_plan().finish(flight, self.ok, self.inner.now());
            self.inner.report.touch();
        }
    }
}

/// Waits for the next while those under way go on: it may have to wait for them.
async fn beside<T>(
    next: impl Future<Output = T>,
    under_way: &mut FuturesUnordered<impl Future<Output = Result<()>>>,
    mut ended: impl FnMut(Result<()>),
) -> T {
    let mut next = pin!(next);
    loop {
        tokio::select! {
            biased;
            next = &mut next => return next,
            Some(result) = under_way.next() => ended(result),
        }
    }
}

impl Inner {
    /// Makes everything durable that was written before the call, as far as the settings ask for it.
    pub(super) async fn flush(self: &Arc<Self>) -> Result<()> {
        self.before_flush().await?;
        if self.keeps_writes() {
            return self.flush_local().await;
        }
        match self.settings.durability {
            Durability::Local => {
                self.collect_all().await?;
                self.flush_local().await
            }
            Durability::Remote => self.flush_folded().await,
        }
    }

    pub(super) async fn before_flush(&self) -> Result<()> {
        match &self.parts.hooks.on_before_flush {
            Some(hook) => hook().await,
            None => Ok(()),
        }
    }

    /// Several flushes that wait for one another become one: whoever finds that a flush which began after his call has
    /// succeeded has nothing left to do.
    async fn flush_folded(self: &Arc<Self>) -> Result<()> {
        let ticket = self.flushes_asked.fetch_add(1, Ordering::SeqCst) + 1;
        let _round = self.rounds.lock().await;
        if self.flushes_done.load(Ordering::SeqCst) >= ticket {
            return Ok(());
        }
        let covers = self.flushes_asked.load(Ordering::SeqCst);
        self.collect_all().await?;
        let (local, remote) = join(self.flush_local(), self.push_and_flush()).await;
        local.and(remote)?;
        self.flushes_done.store(covers, Ordering::SeqCst);
        Ok(())
    }

    /// Makes the local side durable, and what it remembers of itself.
    async fn flush_local(&self) -> Result<()> {
        match &self.parts.record {
            Some(record) => record.checkpoint().await,
            None => self.local.flush().await,
        }
    }

    /// Pushes what is dirty and has the remote flush it. To be called with `rounds` held.
    async fn push_and_flush(self: &Arc<Self>) -> Result<()> {
        for attempt in 1.. {
            self.push_round().await?;
            if !self.table.has_unflushed() {
                return Ok(());
            }
            let Err(error) = self.remote.flush().await else { return self.table.flushed() };
            self.table.flush_failed();
            self.report.touch();
            // The remote is another one than the one that was written to: what is dirty again can be pushed at once.
            if error.kind() != ErrorKind::Conflict || attempt == FLUSH_ATTEMPTS {
                return Err(error);
            }
        }
        unreachable!("the loop returns at its last attempt")
    }

    /// Pushes once whatever is dirty, several runs side by side. What is written behind its back waits for the next
    /// round. To be called with `rounds` held.
    async fn push_round(self: &Arc<Self>) -> Result<()> {
        let mut under_way = FuturesUnordered::new();
        let mut failure: Option<Error> = None;
        let mut away = false;
        let mut note = |error: Error, away: &mut bool| {
            *away |= error.kind().is_retryable();
            failure.get_or_insert(error);
        };
        let mut at = 0;
        loop {
            // A remote that is away would make every further run spend the whole time of its retries.
            while !away && self.push_plan().has_room() {
                let ended = |ended: Result<()>| ended.unwrap_or_else(|error| note(error, &mut away));
                match beside(self.next_push(&mut at), &mut under_way, ended).await {
                    Ok(Some(push)) => under_way.push(self.counted_push(push)),
                    Ok(None) => break,
                    Err(error) => note(error, &mut away),
                }
            }
            match under_way.next().await {
                Some(Ok(())) => {}
                Some(Err(error)) => note(error, &mut away),
                None => return failure.map_or(Ok(()), Err),
            }
        }
    }

    /// The next run at or after `at`, made whole where the remote takes whole chunks only. After an error, too, `at` is
    /// behind what it was about: the others go, and nothing is tried twice in a round.
    async fn next_push(self: &Arc<Self>, at: &mut u64) -> Result<Option<Push>> {
        let longest = self.settings.push.max_request.get().min(self.request_limit);
        loop {
            match self.table.push(*at, longest, self.push_unit) {
                None => return Ok(None),
                Some(NextPush::Push(push)) => {
                    *at = push.blocks().end;
                    return Ok(Some(push));
                }
                Some(NextPush::Refused(blocks, error)) => {
                    *at = blocks.end;
                    return Err(error);
                }
                Some(NextPush::Absent(bytes)) => {
                    if let Err(error) = self.demand(bytes.clone()).await {
                        *at = self.table.geometry().blocks_touched(&bytes).end;
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Counts from now on, not from the first poll: the plan is asked for more before that.
    fn counted_push(&self, push: Push) -> impl Future<Output = Result<()>> + Send + '_ {
        let bytes = push.bytes();
        let flight = self.push_plan().start(bytes.end - bytes.start, self.now());
        let under_way = UnderWay { inner: self, flight: Some(flight), ok: false };
        async move {
            let result = self.push_run(push).await;
            under_way.end(result.is_ok());
            result
        }
    }

    async fn push_run(&self, push: Push) -> Result<()> {
        let bytes = push.bytes();
        let len = bytes.end - bytes.start;
        let mut buffer = self.buffers.take(index(len));
        self.local.read_at(bytes.start, &mut buffer).await?;
        match self.remote.capabilities().write_zeroes {
            None => self.remote.write_at(bytes.start, &buffer).await?,
            Some(zeroes) => self.push_spans(zeroes, bytes, &buffer).await?,
        }
        push.done();
        self.report.pushed_bytes.fetch_add(len, Ordering::Relaxed);
        self.report.touch();
        self.room.notify_waiters();
        Ok(())
    }

    /// [`Self::collect`], without missing anything that was written before the call: not even to blocks whose bytes are
    /// in place and that do not count as present yet.
    pub(super) async fn collect_all(&self) -> Result<()> {
        if self.local.written().is_some() {
            self.table.installations_ended().await;
        }
        self.collect()
    }

    /// Sends data, and has zeros written where they are.
    async fn push_spans(&self, zeroes: &dyn WriteZeroes, range: Range<u64>, bytes: &[u8]) -> Result<()> {
        let spans = by_zeroes(self.table.geometry(), range, Piece::Data(bytes));
        let sent = spans.map(|(span, piece)| match piece {
            Piece::Data(data) => self.remote.write_at(span.start, data),
            Piece::Zeroes(len) => zeroes.write_zeroes(span.start, len),
        });
        try_join_all(sent).await.map(drop)
    }

    /// Asks a mapping what was written through it, and marks that dirty.
    fn collect(&self) -> Result<()> {
        let Some(written) = self.local.written() else { return Ok(()) };
        // One at a time: what another has been told of, and not marked yet, would seem not to be written.
        let _collecting = self.collecting.lock().unwrap_or_else(PoisonError::into_inner);
        let geometry = self.table.geometry();
        let mut at = 0;
        let mut journalled = Ok(());
        while let Some(run) = self.next_valid_run(at) {
            at = run.end;
            written.collect(geometry.blocks_range(&run), &mut |found| {
                let blocks = geometry.blocks_touched(&found);
                self.parts.tracker.note(blocks.clone());
                let marked = self.table.mark_dirty(blocks);
                if journalled.is_ok() {
                    journalled = marked;
                }
            })?;
        }
        self.report.touch();
        journalled
    }

    /// The next run of valid blocks, across the borders that the table cuts them at.
    fn next_valid_run(&self, from: u64) -> Option<Range<u64>> {
        let mut run = self.table.next_valid(from)?;
        while let Some(next) = self.table.next_valid(run.end).filter(|next| next.start == run.end) {
            run.end = next.end;
        }
        Some(run)
    }

    /// Pushes in the background.
    pub(super) async fn run_pusher(self: Arc<Self>) {
        let mut next_collect = self.settings.push.collect_interval;
        loop {
            let again = self.next_round_in(next_collect);
            tokio::select! {
                () = self.push_wake.notified() => {}
                () = tokio::time::sleep(again) => {}
            }
            let mut result = Ok(());
            let began = self.now();
            if self.local.written().is_some() && began >= next_collect {
                result = self.collect();
                // A search of a very large mapping takes long: it must not become all that is done.
                let took = self.now() - began;
                next_collect = self.now().saturating_add(self.settings.push.collect_interval.max(took * 20));
            }
            let round = self.push_plan().round(self.table.unpushed_bytes(), self.now());
            if let Err(error) = result.and(self.background_round(round).await) {
                self.report.failed(&error);
            }
        }
    }

    /// When to look again at the latest.
    fn next_round_in(&self, next_collect: Duration) -> Duration {
        let now = self.now();
        let mut due = match self.push_plan().round(self.table.unpushed_bytes(), now) {
            Round::Later(due) => due,
            Round::Budget | Round::Complete => now,
        };
        if self.local.written().is_some() {
            due = due.min(next_collect);
        }
        due.saturating_sub(now)
    }

    async fn background_round(self: &Arc<Self>, round: Round) -> Result<()> {
        let work = async {
            match round {
                Round::Later(_) => Ok(()),
                Round::Budget => {
                    let _round = self.rounds.lock().await;
                    self.push_round().await
                }
                Round::Complete => self.complete_round().await,
            }
        };
        // Whoever waits for room would wait for ever if this were the end.
        let result = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
            let message = "pushing has panicked, in a hook of the caller or in the remote";
            Err(Error::new(ErrorKind::Internal, Operation::Write, message))
        });
        self.push_plan().round_ended(round, result.is_ok(), self.now());
        result
    }

    async fn complete_round(self: &Arc<Self>) -> Result<()> {
        let _round = self.rounds.lock().await;
        self.collect()?;
        self.push_and_flush().await?;
        match &self.parts.record {
            Some(record) => record.checkpoint().await,
            None => Ok(()),
        }
    }

    /// Stores everything; nobody writes any more.
    pub(super) async fn drain(self: &Arc<Self>) -> Result<()> {
        if self.read_only || self.keeps_writes() {
            return self.flush_local().await;
        }
        {
            let _round = self.rounds.lock().await;
            self.collect_all().await?;
            self.push_and_flush().await?;
        }
        // Last, so that the record says of everything that it is clean.
        self.flush_local().await?;
        match self.table.unpushed_bytes() {
            0 => Ok(()),
            left => Err(Error::new(
                ErrorKind::Conflict,
                Operation::Close,
                format!("{left} bytes were written while the region was being stored; close it again"),
            )),
        }
    }
}
