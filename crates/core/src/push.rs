//! When to push and how much at once: plain data, without I/O and without a clock.

use std::time::Duration;

use crate::pull::Workers;
use crate::window::{Flight, Others, Window};

/// When dirty blocks go to the remote.
#[derive(Debug)]
pub struct PushPlan {
    workers: Workers,
    interval: Duration,
    budget: u64,
    window: Window,
    due: Duration,
    failures: u32,
}

/// The pause after a failed round; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Whether it is time for a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// Push what is dirty, then have the remote flush it.
    Complete,
    /// Push what is dirty: the budget is half used up.
    Budget,
    /// Not before this time, unless the budget asks for it.
    Later(Duration),
}

impl PushPlan {
    /// Rounds every `interval`, and whenever half of `budget` bytes are dirty.
    #[must_use]
    pub fn new(workers: Workers, interval: Duration, budget: u64) -> Self {
        Self { workers, interval, budget, window: Window::default(), due: interval, failures: 0 }
    }

    /// Whether it is time for a round at `now`, with `dirty` bytes that are not pushed.
    #[must_use]
    pub fn round(&self, dirty: u64, now: Duration) -> Round {
        if now >= self.due {
            Round::Complete
        } else if self.failures == 0 && dirty >= self.press_at() {
            Round::Budget
        } else {
            Round::Later(self.due)
        }
    }

    /// The dirty bytes at which a round begins, half of the budget: pushing starts before writers have to wait.
    #[must_use]
    pub fn press_at(&self) -> u64 {
        (self.budget / 2).max(1)
    }

    /// A round has ended at `now`. After a failure the next comes after a pause that grows, not at the next interval.
    pub fn round_ended(&mut self, round: Round, ok: bool, now: Duration) {
        if !ok {
            // The pause is capped long before the shift is.
            let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(5)).min(LONGEST_PAUSE);
            self.failures = self.failures.saturating_add(1);
            self.due = now.saturating_add(pause);
        } else {
            self.failures = 0;
            if round == Round::Complete {
                self.due = now.saturating_add(self.interval);
            }
        }
    }

    /// Whether another push may begin.
    #[must_use]
    pub fn has_room(&self) -> bool {
        match self.workers {
            Workers::Off => self.window.requests() == 0,
            Workers::Fixed(limit) => self.window.requests() < limit.get(),
            Workers::Adaptive => self.window.requests() == 0 || self.window.room(Others::Possible) > 0,
        }
    }

    /// A push of `bytes` begins at `now`.
    pub fn start(&mut self, bytes: u64, now: Duration) -> Flight {
        self.window.start(bytes, now)
    }

    /// It has ended.
    pub fn finish(&mut self, flight: Flight, ok: bool, now: Duration) {
        self.window.finish(flight, ok, now);
        if ok {
            // The remote is back, whoever found out: the budget counts again at once.
            self.failures = 0;
        }
    }

    /// What is under way.
    #[must_use]
    pub fn window(&self) -> &Window {
        &self.window
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
