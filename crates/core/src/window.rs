//! How many bytes to keep in flight: a controller that is fed with completions and a clock reading, and decides alone.
//!
//! The link's bandwidth and its round trip are estimated from what completes (the delivery-rate sample of BBR,
//! draft-cardwell-iccrg-bbr-congestion-control §4.1): the window grows fourfold each round while the delivered rate
//! grows with it, and stays a little above bandwidth × shortest latency once it does not. A longer latency alone never
//! makes it grow: what is a queue of our own making is found out by letting it drain now and then (ProbeRTT there, §5.3.4).
//! No I/O and no clock here.

use std::collections::VecDeque;
use std::time::Duration;

/// The window at the start, in bytes: small enough for a slow link, and three rounds away from 40 MiB.
const INITIAL: u64 = 2 << 20;
/// It never shrinks below this, so that a link with no latency to speak of still has something to overlap.
const FLOOR: u64 = 1 << 20;
/// It never grows above this: a gigabyte per second at a quarter of a second.
const CEILING: u64 = 256 << 20;
/// A round in which the rate grew by less than a quarter counts as flat; after this many the link is full.
const FLAT_ROUNDS: u32 = 2;
/// Rounds that the highest rate is remembered for.
const RATE_ROUNDS: u64 = 10;
/// How long the shortest latency is remembered for.
const LATENCY_MEMORY: Duration = Duration::from_secs(10);
/// How much of what the link carries is in flight at least where nobody can wait for something else, however short the latency:
/// where both sides would otherwise go to sleep and be woken for each request. As long as [`FLOOR`] takes on gigabit Ethernet.
const BULK: Duration = Duration::from_millis(8);

/// Who else wants something of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Somebody waits: three quarters of the target leave room, so that what comes next need not queue.
    Waiting,
    /// Somebody may come any time.
    Possible,
    /// Nobody: the target, or more where that is little for the link.
    None,
}

/// What is known of a request that is in flight. Give it back to [`Window::finish`].
#[derive(Debug)]
#[must_use = "the bytes count as in flight until it is finished"]
pub struct Flight {
    bytes: u64,
    sent: Duration,
    delivered: u64,
    round: u64,
    full: bool,
    /// Hardly anything was in flight when it was sent.
    alone: bool,
}

/// Bytes in flight, and how many there should be.
#[derive(Debug)]
pub struct Window {
    target: u64,
    in_flight: u64,
    requests: usize,
    delivered: u64,
    round: u64,
    starting: bool,
    flat: u32,
    /// The best rate of a round so far, while starting.
    best_at_start: u64,
    /// Rates of late by round, in bytes per second, falling.
    rates: VecDeque<(u64, u64)>,
    latency: Option<(Duration, Duration)>,
    /// What is in flight is let drain, to see how long a request takes by itself.
    probing: bool,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            target: INITIAL,
            in_flight: 0,
            requests: 0,
            delivered: 0,
            round: 0,
            starting: true,
            flat: 0,
            best_at_start: 0,
            rates: VecDeque::new(),
            latency: None,
            probing: false,
        }
    }
}

impl Window {
    /// The bytes that fill the link.
    #[must_use]
    pub fn target(&self) -> u64 {
        self.target
    }

    /// The bytes that are in flight.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// The requests that are in flight.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests
    }

    /// The bytes that should be in flight now.
    #[must_use]
    pub fn wanted(&self, others: Others) -> u64 {
        match others {
            _ if self.probing => self.half(),
            Others::Waiting => self.target / 4 * 3,
            Others::Possible => self.target,
            Others::None => self.target.max(carried(self.rate(), BULK)).min(CEILING),
        }
    }

    /// Bytes that may be started now.
    #[must_use]
    pub fn room(&self, others: Others) -> u64 {
        self.wanted(others).saturating_sub(self.in_flight)
    }

    /// A request of `bytes` begins at `now`.
    pub fn start(&mut self, bytes: u64, now: Duration) -> Flight {
        // Whatever a probe lets start ends it, however long it is.
        let alone = self.in_flight == 0 || self.in_flight < self.half();
        self.in_flight += bytes;
        self.requests += 1;
        let full = self.in_flight * 8 >= self.target * 7;
        Flight { bytes, sent: now, delivered: self.delivered, round: self.round, full, alone }
    }

    /// It has ended at `now`, and `delivered` says whether the bytes came through.
    pub fn finish(&mut self, flight: Flight, delivered: bool, now: Duration) {
        self.in_flight -= flight.bytes;
        self.requests -= 1;
        if !delivered {
            return;
        }
        self.delivered += flight.bytes;
        let took = now.saturating_sub(flight.sent).max(Duration::from_micros(1));
        self.note_latency(took, flight.alone, now);
        // What was started while there was little to do says nothing about what the link could carry.
        if flight.full || self.starting {
            self.note_rate(per_second(self.delivered - flight.delivered, took));
        }
        if flight.round == self.round {
            self.end_round();
        }
        self.retarget(flight.bytes);
    }

    /// What was not alone has waited for others too: it may have been faster than ever before, but not slower.
    fn note_latency(&mut self, took: Duration, alone: bool, now: Duration) {
        let known = self.latency;
        let old = known.is_some_and(|(_, at)| now.saturating_sub(at) >= LATENCY_MEMORY);
        match known {
            Some((shortest, _)) if took > shortest && !(old && alone) => self.probing = old,
            // A way does not become so much longer, but a remote that was away for a while looks like it.
            Some((shortest, _)) => (self.latency, self.probing) = (Some((took.min(shortest * 4), now)), false),
            None => (self.latency, self.probing) = (Some((took, now)), false),
        }
    }

    /// Half of what the link holds, so that nothing queues.
    fn half(&self) -> u64 {
        self.latency.map_or(0, |(shortest, _)| carried(self.rate(), shortest)) / 2
    }

    fn note_rate(&mut self, rate: u64) {
        while self.rates.back().is_some_and(|(_, known)| *known <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((self.round, rate));
        while self.rates.front().is_some_and(|(round, _)| round + RATE_ROUNDS < self.round) {
            self.rates.pop_front();
        }
    }

    /// The highest rate of late, in bytes per second.
    fn rate(&self) -> u64 {
        self.rates.front().map_or(0, |(_, rate)| *rate)
    }

    /// Everything that was in flight when the last round ended is through.
    fn end_round(&mut self) {
        self.round += 1;
        if !self.starting {
            return;
        }
        if self.rate() >= self.best_at_start / 4 * 5 {
            self.best_at_start = self.rate();
            self.flat = 0;
        } else {
            self.flat += 1;
            self.starting = self.flat < FLAT_ROUNDS;
        }
    }

    fn retarget(&mut self, bytes: u64) {
        let carried = self.latency.map_or(0, |(shortest, _)| carried(self.rate(), shortest));
        // While the rate still grows with the window the estimate is the window itself, so four times that is the
        // fourfold growth; once it does not, that bounds what queues.
        let growing = (self.target + 3 * bytes).min(carried.saturating_mul(4).max(INITIAL));
        let target = if self.starting { growing } else { carried / 2 * 3 };
        self.target = target.clamp(FLOOR, CEILING);
    }
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    let rate = u128::from(bytes) * Duration::from_secs(1).as_nanos() / took.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Bytes that a link of `rate` bytes per second holds in `time`.
fn carried(rate: u64, time: Duration) -> u64 {
    let bytes = u128::from(rate) * time.as_nanos() / Duration::from_secs(1).as_nanos();
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests;
