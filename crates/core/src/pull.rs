//! What to pull next in the background: an order of chunks, and how much of it may be under way at once.
//!
//! Plain data: it claims chunks in a [`Table`] and says what to do; whoever does it says how it went. Demand does not
//! pass through here at all, so that it never queues: it claims its chunks directly, and only tells the plan that it is
//! waiting, so that less is started behind its back, and where it was, so that the sequential order goes on from there.

use std::collections::{BinaryHeap, VecDeque};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::state::{Pull, Table};
use crate::window::{Flight, Others, Window};

/// How many requests may be under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Workers {
    /// None.
    Off,
    /// As many as it takes to keep the link busy, found out by measuring.
    #[default]
    Adaptive,
    /// Exactly this many, as long as there is something to do.
    Fixed(NonZeroUsize),
}

/// Which chunks the caller wants first.
#[derive(Clone, Default)]
pub enum Priority {
    /// None before others.
    #[default]
    None,
    /// The chunks with the highest value first, of equal ones the lower index. Asked for every chunk, several times in
    /// a large region: it must be short, and must neither wait for the region nor look at its progress, which waits for it.
    Function(Arc<dyn Fn(u64) -> i64 + Send + Sync>),
    /// These chunks in this order, then the others. Chunks past the end are ignored.
    List(Arc<[u64]>),
}

impl fmt::Debug for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Function(_) => f.write_str("Function"),
            Self::List(chunks) => write!(f, "List({} chunks)", chunks.len()),
        }
    }
}

/// How many chunks of a priority function are sorted at a time: bounds the memory to a few MiB for any region.
const SORTED: usize = 1 << 16;

/// The smallest request while the window is small, as a part of it: several requests overlap from the start on.
const REQUESTS_IN_WINDOW: u64 = 8;

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// Pull these chunks.
    Pull(Pull, Flight),
    /// Nothing until something that is under way has ended.
    Full,
    /// Nothing before this time: what is left has failed lately.
    Later(Duration),
    /// Nothing is left that is not under way or valid.
    Done,
}

/// The order, and what is under way.
#[derive(Debug)]
pub struct PullPlan {
    table: Arc<Table>,
    workers: Workers,
    max_chunks: u64,
    window: Window,
    urgent: Ordered,
    priority: Priority,
    wanted: Ordered,
    /// Where the last sorted part of a priority function ended.
    sorted_to: Option<(i64, u64)>,
    priority_over: bool,
    cursor: u64,
    /// The chunk after the last demand.
    demanded: Option<u64>,
    postponed: VecDeque<(Duration, Range<u64>)>,
    paused_until: Duration,
    /// The remote did not answer the last time: one request finds out whether it is back.
    away: bool,
    /// Nobody reads before everything is there.
    alone: bool,
    /// As of the last look.
    others: Others,
}

/// Chunks in a given order.
#[derive(Debug, Default)]
struct Ordered(VecDeque<u64>);

impl Ordered {
    /// How many of the first chunks follow on one another, up to `max`.
    fn run(&self, max: u64) -> Option<Range<u64>> {
        let first = *self.0.front()?;
        let count = self.0.iter().zip(first..).take_while(|(chunk, next)| **chunk == *next).take(index(max)).count();
        Some(first..first + count as u64)
    }

    /// Claims the first chunks that can be; forgets those that need not be.
    fn next(&mut self, table: &Arc<Table>, max: u64) -> Option<Pull> {
        while let Some(run) = self.run(max) {
            let pull = table.pull(run.clone(), max);
            let done_to = pull.as_ref().map_or(run.end, |pull| pull.chunks().end);
            self.0.drain(..index(done_to - run.start));
            if pull.is_some() {
                return pull;
            }
        }
        None
    }
}

impl PullPlan {
    /// A plan for everything absent in `table`, in requests of at most `max_bytes` (at least one chunk).
    #[must_use]
    pub fn new(table: Arc<Table>, workers: Workers, max_bytes: u64, priority: Priority) -> Self {
        let max_chunks = (max_bytes / table.geometry().chunk_size().bytes()).max(1);
        let wanted = match &priority {
            Priority::List(chunks) => Ordered(chunks.iter().copied().collect()),
            _ => Ordered::default(),
        };
        Self {
            table,
            workers,
            max_chunks,
            window: Window::default(),
            urgent: Ordered::default(),
            priority_over: !matches!(priority, Priority::Function(_)),
            priority,
            wanted,
            sorted_to: None,
            cursor: 0,
            demanded: None,
            postponed: VecDeque::new(),
            paused_until: Duration::ZERO,
            away: false,
            alone: false,
            others: Others::Possible,
        }
    }

    /// Whether nobody reads before everything is there: what is in flight keeps nobody waiting then.
    #[must_use]
    pub fn alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }

    /// These chunks come before everything but demand: what the other side of a migration changed last.
    pub fn urgent(&mut self, chunks: impl IntoIterator<Item = u64>) {
        self.urgent.0.extend(chunks);
    }

    /// Somebody had to wait for `chunk`. Where that is the second time in a row, the sequential order goes on there.
    pub fn demanded(&mut self, chunks: &Range<u64>) {
        if self.demanded == Some(chunks.start) && !self.table.is_complete() {
            self.cursor = chunks.end;
        }
        self.demanded = Some(chunks.end);
    }

    /// What is under way, and how much should be.
    #[must_use]
    pub fn window(&self) -> &Window {
        &self.window
    }

    /// How long a request should be now, in bytes.
    #[must_use]
    pub fn request_bytes(&self) -> u64 {
        let chunk = self.table.geometry().chunk_size().bytes();
        match self.workers {
            Workers::Adaptive => self.sized(chunk) * chunk,
            Workers::Off | Workers::Fixed(_) => self.max_chunks * chunk,
        }
    }

    /// What to do at `now`. `demand` while one is waiting for the remote: the link is not filled to the brim then.
    pub fn next(&mut self, now: Duration, demand: bool) -> Next {
        self.others = match (demand, self.alone) {
            (true, _) => Others::Waiting,
            (false, true) => Others::None,
            (false, false) => Others::Possible,
        };
        if now < self.paused_until {
            return Next::Later(self.paused_until);
        }
        let Some(max) = self.room() else { return Next::Full };
        if let Some(pull) = self.choose(max, now) {
            let range = pull.bytes();
            return Next::Pull(pull, self.window.start(range.end - range.start, now));
        }
        if self.window.requests() > 0 {
            return Next::Full;
        }
        match self.postponed.front() {
            Some((due, _)) => Next::Later(*due),
            None => Next::Done,
        }
    }

    /// How many chunks the next request may have; nothing if there must be none.
    fn room(&self) -> Option<u64> {
        let chunks = self.request_bytes() / self.table.geometry().chunk_size().bytes();
        match self.workers {
            _ if self.away && self.window.requests() > 0 => None,
            Workers::Off => None,
            Workers::Fixed(limit) => (self.window.requests() < limit.get()).then_some(chunks),
            Workers::Adaptive if self.window.requests() > 0 && self.window.room(self.others) == 0 => None,
            Workers::Adaptive => Some(chunks),
        }
    }

    fn sized(&self, chunk: u64) -> u64 {
        (self.window.wanted(self.others) / REQUESTS_IN_WINDOW / chunk).clamp(1, self.max_chunks)
    }

    fn choose(&mut self, max: u64, now: Duration) -> Option<Pull> {
        if let Some(pull) = self.urgent.next(&self.table, max) {
            return Some(pull);
        }
        let wanted = self.wanted.next(&self.table, max).or_else(|| self.refill(max));
        wanted.or_else(|| self.sequential(max)).or_else(|| self.overdue(max, now))
    }

    /// Sorts the next part of a priority function's chunks until one of them can be pulled.
    fn refill(&mut self, max: u64) -> Option<Pull> {
        while !self.priority_over {
            let Priority::Function(value) = self.priority.clone() else { return None };
            let sorted = best_after(self.sorted_to, self.table.geometry().chunk_count(), &*value);
            self.sorted_to = sorted.last().copied();
            self.priority_over = sorted.len() < SORTED;
            self.wanted = Ordered(sorted.into_iter().map(|(_, chunk)| chunk).collect());
            if let Some(pull) = self.wanted.next(&self.table, max) {
                return Some(pull);
            }
        }
        None
    }

    /// From the cursor to the end, then from the start.
    fn sequential(&mut self, max: u64) -> Option<Pull> {
        if self.table.is_complete() {
            return None;
        }
        let count = self.table.geometry().chunk_count();
        let pull = self.pull_fresh(self.cursor..count, max).or_else(|| self.pull_fresh(0..self.cursor, max))?;
        self.cursor = pull.chunks().end;
        Some(pull)
    }

    /// Claims in `chunks`, leaving out what was postponed.
    fn pull_fresh(&self, chunks: Range<u64>, max: u64) -> Option<Pull> {
        let mut at = chunks.start;
        while at < chunks.end {
            let end = match self.postponed_after(at) {
                Some(range) if range.contains(&at) => {
                    at = range.end;
                    continue;
                }
                Some(range) => range.start.min(chunks.end),
                None => chunks.end,
            };
            if let Some(pull) = self.table.pull(at..end, max) {
                return Some(pull);
            }
            at = end;
        }
        None
    }

    fn postponed_after(&self, at: u64) -> Option<Range<u64>> {
        let later = self.postponed.iter().filter(|(_, range)| range.end > at);
        later.min_by_key(|(_, range)| range.start).map(|(_, range)| range.clone())
    }

    fn overdue(&mut self, max: u64, now: Duration) -> Option<Pull> {
        while self.postponed.front().is_some_and(|(due, _)| *due <= now) {
            let (due, range) = self.postponed.pop_front()?;
            if let Some(pull) = self.table.pull(range.clone(), max) {
                if pull.chunks().end < range.end {
                    self.postponed.push_front((due, pull.chunks().end..range.end));
                }
                return Some(pull);
            }
        }
        None
    }

    /// A pull has ended at `now`. `failed` are the chunks that could not be had; they are tried again after `pause`.
    /// Where the remote as a whole does not answer, `pause_all` holds everything back as long.
    pub fn finish(&mut self, flight: Flight, failed: &[Range<u64>], pause: Duration, pause_all: bool, now: Duration) {
        self.window.finish(flight, failed.is_empty(), now);
        for chunks in failed {
            self.postponed.push_back((now.saturating_add(pause), chunks.clone()));
        }
        self.away = pause_all && !failed.is_empty();
        if self.away {
            self.paused_until = now.saturating_add(pause);
        }
    }
}

/// A count as an index; larger than memory means all there is.
fn index(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// The [`SORTED`] first chunks behind `after` in the order of a priority function.
fn best_after(after: Option<(i64, u64)>, count: u64, value: &dyn Fn(u64) -> i64) -> Vec<(i64, u64)> {
    use std::cmp::Reverse;
    // The heap's top is the worst of the best so far: a low value, then a high index.
    let mut best = BinaryHeap::with_capacity(SORTED.min(index(count)) + 1);
    for chunk in 0..count {
        let value = value(chunk);
        let behind = after.is_none_or(|(last, index)| (Reverse(value), chunk) > (Reverse(last), index));
        if behind {
            best.push((Reverse(value), chunk));
            if best.len() > SORTED {
                best.pop();
            }
        }
    }
    best.into_sorted_vec().into_iter().map(|(Reverse(value), chunk)| (value, chunk)).collect()
}

#[cfg(all(test, not(loom)))]
mod tests;
