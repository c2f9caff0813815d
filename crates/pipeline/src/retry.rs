//! The one place with retries, backoff and time-outs for single attempts: what a remote is wrapped in before anybody
//! uses it.
//!
//! A call that fails because the remote does not answer is made again until it succeeds, fails for another reason, or
//! the limit is reached. Only calls whose repetition changes nothing exist in the contract: the same bytes to the same
//! place. An attempt that takes too long is dropped before the next begins, and [`Backend`] promises that a write that
//! was dropped never lands after a later write to its range has returned: so when the call returns, no attempt of it can
//! still land on top of what comes after.
//!
//! Time-outs count silence, not transfers: an attempt goes on for as long as bytes move between here and the remote
//! ([`Activity`]), so that a request of any length gets through a line of any speed.
//!
//! It does not retry conflicts: if the remote says that somebody else owns the region now, or that it lost what was
//! written before a flush, whoever wrote must know.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{
    Access, Activity, Backend, Capabilities, Error, ErrorKind, Extent, Extents, Operation, Piece, ReadMany, ReadOp,
    ReadPieces, Result, Trim, WriteZeroes,
};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use crate::DECLARED;

/// For how long and how often to try.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrySettings {
    /// For how long one call is tried; time in which bytes moved does not count. `None`: until it succeeds. Default: one
    /// minute. A short one shows an outage soon; a long one sits it out.
    pub limit: Option<Duration>,
    /// After how long without an answer, and without anything moving, an attempt is given up. Default: ten seconds. Too
    /// short for how long the remote takes to answer, and no attempt ever succeeds; a long one is slow to notice a remote
    /// that fell silent. A remote that does not tell what moves has this long for all of an attempt.
    pub attempt_timeout: Duration,
    /// How long to wait between attempts.
    pub backoff: Backoff,
}

/// Waits that grow from attempt to attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Backoff {
    /// After the first failure. Default: 50 milliseconds.
    pub initial: Duration,
    /// The longest. Default: two seconds.
    pub max: Duration,
    /// By what it grows each time; at least one. Default: two.
    pub multiplier: f64,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            limit: Some(Duration::from_secs(60)),
            attempt_timeout: Duration::from_secs(10),
            backoff: Backoff::default(),
        }
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { initial: Duration::from_millis(50), max: Duration::from_secs(2), multiplier: 2.0 }
    }
}

impl RetrySettings {
    /// Checks that they make sense.
    ///
    /// # Errors
    /// `InvalidInput`, naming the setting that does not.
    pub fn validate(&self) -> Result<()> {
        let Backoff { initial, max, multiplier } = &self.backoff;
        let wrong = if self.limit.is_some_and(|limit| limit.is_zero()) {
            "the retry limit is zero; give it some time, or none to retry for ever"
        } else if self.attempt_timeout.is_zero() {
            "the time for an attempt is zero; no attempt could succeed"
        } else if initial.is_zero() || max < initial {
            "the backoff must be longer than zero at first, and not shorter at last"
        } else if !multiplier.is_finite() || *multiplier < 1.0 {
            "the backoff must be multiplied by one or more"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::InvalidInput, Operation::Open, wrong))
    }
}

/// A remote that did not answer when it was asked last.
#[derive(Debug, Clone)]
pub struct Outage {
    /// Since when, on tokio's clock: the first failure after the last answer.
    pub since: Instant,
    /// What went wrong last.
    pub error: Error,
}

/// The calls that have failed and are not over.
#[derive(Debug, Default)]
struct Waiting {
    count: usize,
    /// Whether another call was answered since one of them failed last.
    answered: bool,
}

/// A backend that tries again.
///
/// A call that succeeds at once costs a timer beyond what the backend inside does, and no allocation. When one call gets
/// through after a failure, those that wait for their next attempt make it at once.
pub struct Retry {
    inner: Arc<dyn Backend>,
    settings: RetrySettings,
    waiting: Mutex<Waiting>,
    outage: watch::Sender<Option<Outage>>,
    recovered: Notify,
}

impl Retry {
    /// Wraps `inner`.
    ///
    /// # Errors
    /// As [`RetrySettings::validate`].
    pub fn new(inner: Arc<dyn Backend>, settings: RetrySettings) -> Result<Self> {
        settings.validate()?;
        let (waiting, outage, recovered) = (Mutex::default(), watch::Sender::default(), Notify::new());
        Ok(Self { inner, settings, waiting, outage, recovered })
    }

    /// Whether the remote is away, since when and why: for whoever tells a user. It is `None` again when a call was
    /// answered and none waits any more, in whichever order. That calls give up, or are dropped, says nothing of the
    /// remote.
    #[must_use]
    pub fn outage(&self) -> watch::Receiver<Option<Outage>> {
        self.outage.subscribe()
    }

    /// The remote has answered a call, which waits no more.
    fn answered(&self) {
        if self.outage.borrow().is_some() {
            let mut waiting = self.waiting();
            waiting.answered = true;
            self.end_outage(&waiting);
        }
    }

    /// Ends the outage unless a call still waits, or none was answered.
    fn end_outage(&self, waiting: &Waiting) {
        if waiting.count == 0 && waiting.answered {
            self.outage.send_replace(None);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, operation: Operation) -> Call<'_> {
        Call {
            retry: self,
            operation,
            start: Instant::now(),
            moving: Duration::ZERO,
            wait: self.settings.backoff.initial,
            trouble: None,
        }
    }
}

/// One call, over all its attempts.
struct Call<'a> {
    retry: &'a Retry,
    operation: Operation,
    start: Instant,
    /// In which bytes moved, in attempts that failed.
    moving: Duration,
    wait: Duration,
    trouble: Option<Trouble<'a>>,
}

impl Call<'_> {
    /// Makes an attempt. `None` if there shall be another; the time until then has passed.
    async fn attempt<T>(&mut self, attempt: impl Future<Output = Result<T>>) -> Option<Result<T>> {
        let result = self.watched(attempt).await;
        match result {
            Err(error) if error.kind().is_retryable() => self.wait(error).await.err().map(Err),
            other => {
                if self.trouble.take().is_some() {
                    self.retry.recovered.notify_waiters();
                }
                self.retry.answered();
                Some(other)
            }
        }
    }

    /// Makes an attempt, and drops it when it gets nowhere.
    async fn watched<T>(&mut self, attempt: impl Future<Output = Result<T>>) -> Result<T> {
        let mut watch = Watch::new(self);
        let mut attempt = pin!(attempt);
        let result = loop {
            match timeout(watch.pause(), attempt.as_mut()).await {
                Ok(result) => break result,
                Err(_) if watch.goes_on() => {}
                Err(_) => break Err(self.silence(&watch)),
            }
        };
        if result.is_err() {
            self.moving += watch.moving();
        }
        result
    }

    /// What is left of the limit, if there is one.
    fn left(&self) -> Option<Duration> {
        self.retry.settings.limit.map(|limit| limit.saturating_sub(self.start.elapsed().saturating_sub(self.moving)))
    }

    /// What an attempt that was not answered says. One that had less than its time, because of the limit, says nothing
    /// new where there was an error before.
    fn silence(&self, watch: &Watch<'_>) -> Error {
        let text = match &self.trouble {
            Some(trouble) if watch.allowed < self.retry.settings.attempt_timeout => return trouble.error.clone(),
            _ if watch.is_forgotten() => {
                format!("no answer within {:.1?}, though others are answered", watch.start.elapsed())
            }
            _ => format!("no answer within {:?}", watch.allowed),
        };
        Error::new(ErrorKind::Unavailable, self.operation, text)
    }

    /// Waits for the next attempt, or gives up.
    async fn wait(&mut self, error: Error) -> Result<()> {
        let backoff = &self.retry.settings.backoff;
        let wait = self.left().map_or(self.wait, |left| left.min(self.wait));
        self.wait = self.wait.mul_f64(backoff.multiplier).min(backoff.max);
        let recovered = self.retry.recovered.notified();
        self.trouble.get_or_insert_with(|| Trouble::new(self.retry, error.clone())).goes_on(error.clone());
        let _ = timeout(wait, recovered).await;
        if self.left() != Some(Duration::ZERO) {
            return Ok(());
        }
        let tried = self.start.elapsed();
        Err(error.context(format!("gave up after {tried:.1?}; check that the remote is up and reachable")))
    }
}

/// How many times in the time for an attempt it is looked at whether anything moves.
const LOOKS: u32 = 8;
/// So few bytes in the time for an attempt are no sign of life: connections say more than that to be kept alive.
const NOTHING: u64 = 16 << 10;
/// When so many bytes have moved since an attempt began, and its time is over, it is not the line that it waits for: more
/// than this is never under way on a line that is too slow to move it in that time.
const BACKLOG: u64 = 32 << 20;

/// Whether an attempt gets on. Nothing is counted in those that succeed soon.
struct Watch<'a> {
    activity: Option<&'a dyn Activity>,
    patience: Duration,
    start: Instant,
    /// How much had moved when it was looked at for the first time, and when something had moved for the last time.
    counted: Option<(u64, u64)>,
    /// When something had moved for the last time, as far as is known.
    since: Instant,
    /// How long nothing may move from then on.
    allowed: Duration,
}

impl<'a> Watch<'a> {
    fn new(call: &Call<'a>) -> Self {
        let (patience, start) = (call.retry.settings.attempt_timeout, Instant::now());
        let activity = call.retry.inner.capabilities().activity;
        let allowed = call.left().map_or(patience, |left| left.min(patience));
        Self { activity, patience, start, counted: None, since: start, allowed }
    }

    /// Until it must be looked at again.
    fn pause(&self) -> Duration {
        let left = self.allowed.saturating_sub(self.since.elapsed());
        if self.activity.is_some() { left.min(self.patience / LOOKS) } else { left }
    }

    /// Looks whether the attempt may go on.
    fn goes_on(&mut self) -> bool {
        if let Some(activity) = self.activity {
            let moved = activity.moved();
            let (first, last) = *self.counted.get_or_insert((moved, moved));
            if moved.saturating_sub(last) >= NOTHING {
                self.counted = Some((first, moved));
                (self.since, self.allowed) = (Instant::now(), self.patience);
            }
        }
        self.since.elapsed() < self.allowed && !self.is_forgotten()
    }

    /// Whether everything has moved that could be in front of this attempt.
    fn is_forgotten(&self) -> bool {
        let moved = self.counted.map_or(0, |(first, last)| last - first);
        self.start.elapsed() >= self.patience && moved >= BACKLOG
    }

    /// For how long the attempt got on, as far as is known.
    fn moving(&self) -> Duration {
        if self.is_forgotten() { Duration::ZERO } else { self.since - self.start }
    }
}

/// A call that has failed and is not over: as long as there is one, the outage is not.
struct Trouble<'a> {
    retry: &'a Retry,
    /// What went wrong last.
    error: Error,
}

impl<'a> Trouble<'a> {
    fn new(retry: &'a Retry, error: Error) -> Self {
        retry.waiting().count += 1;
        Self { retry, error }
    }

    fn goes_on(&mut self, error: Error) {
        self.error = error.clone();
        let mut waiting = self.retry.waiting();
        waiting.answered = false;
        self.retry.outage.send_modify(|outage| {
            let since = outage.as_ref().map_or_else(Instant::now, |outage| outage.since);
            *outage = Some(Outage { since, error });
        });
    }
}

impl Drop for Trouble<'_> {
    fn drop(&mut self) {
        let mut waiting = self.retry.waiting();
        waiting.count -= 1;
        self.retry.end_outage(&waiting);
    }
}

/// Makes attempts at something that is no backend's call until one succeeds, fails for good, or the limit is reached,
/// as [`Retry`] does. What is attempted must change nothing when it is done again.
///
/// # Errors
/// The last attempt's.
pub async fn retrying<T, F>(settings: &RetrySettings, operation: Operation, mut attempt: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let (start, mut wait) = (Instant::now(), settings.backoff.initial);
    loop {
        let left = settings.limit.map_or(Duration::MAX, |limit| limit.saturating_sub(start.elapsed()));
        let allowed = settings.attempt_timeout.min(left);
        let silence = || Error::new(ErrorKind::Unavailable, operation, format!("no answer within {allowed:?}"));
        let error = match timeout(allowed, attempt()).await.unwrap_or_else(|_| Err(silence())) {
            Err(error) if error.kind().is_retryable() => error,
            other => return other,
        };
        let left = settings.limit.map_or(Duration::MAX, |limit| limit.saturating_sub(start.elapsed()));
        tokio::time::sleep(wait.min(left)).await;
        if left <= wait {
            let tried = start.elapsed();
            return Err(error.context(format!("gave up after {tried:.1?}; check that the remote is up and reachable")));
        }
        wait = wait.mul_f64(settings.backoff.multiplier).min(settings.backoff.max);
    }
}

#[async_trait]
impl Backend for Retry {
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
        let mut call = self.call(Operation::Read);
        loop {
            if let Some(result) = call.attempt(self.inner.read_at(offset, buf)).await {
                return result;
            }
        }
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut call = self.call(Operation::Write);
        loop {
            if let Some(result) = call.attempt(self.inner.write_at(offset, buf)).await {
                return result;
            }
        }
    }

    async fn flush(&self) -> Result<()> {
        let mut call = self.call(Operation::Flush);
        loop {
            if let Some(result) = call.attempt(self.inner.flush()).await {
                return result;
            }
        }
    }
}

/// Pieces that were lent stay lent: the next attempt goes on behind them.
#[async_trait]
impl ReadPieces for Retry {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let Capabilities { pieces, access, .. } = self.inner.capabilities();
        let pieces = pieces.expect(DECLARED);
        let mut lending = Lending { left: offset..offset.saturating_add(len), refusal: None, visit };
        let (mut start, mut len) = (offset, len);
        let mut call = self.call(Operation::Read);
        loop {
            let mut lend = |at: u64, piece: Piece<'_>| lending.lend(at, piece);
            let result = call.attempt(pieces.read_pieces(start, len, &mut lend)).await;
            if let Some(refusal) = lending.refusal {
                return Err(refusal);
            }
            if let Some(result) = result {
                return result;
            }
            if lending.left.start > offset {
                if lending.left.is_empty() {
                    return Ok(());
                }
                start = border(access, lending.left.start);
                len = lending.left.end - start;
            }
        }
    }
}

/// Where a request must begin to go on at `offset`.
fn border(access: Access, offset: u64) -> u64 {
    match access {
        Access::Any => offset,
        Access::WholeChunks(chunk) => chunk.round_down(offset),
    }
}

struct Lending<'a> {
    /// What was not lent yet.
    left: Range<u64>,
    /// The visitor's own error, which no attempt can mend.
    refusal: Option<Error>,
    visit: &'a mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
}

impl Lending<'_> {
    fn lend(&mut self, at: u64, piece: Piece<'_>) -> Result<()> {
        let Some((at, piece)) = piece.cut(at, &self.left) else { return Ok(()) };
        self.left.start = at + piece.len();
        (self.visit)(at, piece).map_err(|refusal| {
            self.refusal = Some(refusal);
            Error::new(ErrorKind::Cancelled, Operation::Read, "whoever asked wants no more")
        })
    }
}

#[async_trait]
impl ReadMany for Retry {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        let many = self.inner.capabilities().read_many.expect(DECLARED);
        let mut call = self.call(Operation::Read);
        loop {
            if let Some(result) = call.attempt(many.read_many(reads)).await {
                return result;
            }
        }
    }
}

#[async_trait]
impl Trim for Retry {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let trim = self.inner.capabilities().trim.expect(DECLARED);
        let mut call = self.call(Operation::Trim);
        loop {
            if let Some(result) = call.attempt(trim.trim(offset, len)).await {
                return result;
            }
        }
    }
}

#[async_trait]
impl WriteZeroes for Retry {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let zeroing = self.inner.capabilities().write_zeroes.expect(DECLARED);
        let mut call = self.call(Operation::WriteZeroes);
        loop {
            if let Some(result) = call.attempt(zeroing.write_zeroes(offset, len)).await {
                return result;
            }
        }
    }
}

#[async_trait]
impl Extents for Retry {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let extents = self.inner.capabilities().extents.expect(DECLARED);
        let mut call = self.call(Operation::Extents);
        loop {
            if let Some(result) = call.attempt(extents.extents(offset, len)).await {
                return result;
            }
        }
    }
}

#[cfg(test)]
mod tests;
