//! When copying in rounds has come close enough, and when it will not: decided from what each round found, as plain data.

use std::num::NonZeroU32;
use std::time::Duration;

/// Rounds in a row that must not have become better before it counts as not converging.
const STALLED: u32 = 3;

/// When the application may be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Precopy {
    /// The rest must be such that it is pulled in this time, at the rate of the last rounds. Default 50 ms. It is pulled
    /// after the application runs, so that this bounds what it may have to wait for, beside the downtime itself.
    pub target: Duration,
    /// The most rounds. Default 30.
    pub max_rounds: NonZeroU32,
    /// The longest time, from the first byte, looked at after each round. Default none.
    pub max_time: Option<Duration>,
    /// What happens if it does not come close enough.
    pub unconverged: Unconverged,
    /// How long to wait between records once it is close enough. Default 500 ms. Each record costs the application a
    /// cheap fault for each page that it writes afterwards.
    pub recheck: Duration,
}

impl Default for Precopy {
    fn default() -> Self {
        Self {
            target: Duration::from_millis(50),
            max_rounds: NonZeroU32::new(30).unwrap_or(NonZeroU32::MIN),
            max_time: None,
            unconverged: Unconverged::default(),
            recheck: Duration::from_millis(500),
        }
    }
}

/// What to do with an application that writes faster than the link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unconverged {
    /// Move it all the same: the rest is pulled on demand.
    #[default]
    Finalize,
    /// Leave it where it is.
    GiveUp,
}

/// What the rounds so far say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Another round.
    Again,
    /// The rest is small.
    Fits,
    /// The rest no longer becomes smaller.
    Stalled,
    /// The most rounds were made.
    Rounds,
    /// The longest time is over.
    Time,
}

impl Verdict {
    /// Whether it is over, whatever came of it.
    #[must_use]
    pub fn is_final(self) -> bool {
        self != Self::Again
    }

    /// Whether the application writes too fast.
    #[must_use]
    pub fn is_unconverged(self) -> bool {
        matches!(self, Self::Stalled | Self::Rounds | Self::Time)
    }
}

/// What one round did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// Bytes that were pulled, and in what time.
    pub(crate) pulled: u64,
    pub(crate) took: Duration,
    /// Bytes that were written meanwhile.
    pub(crate) dirty: u64,
    /// Since the first byte.
    pub(crate) elapsed: Duration,
}

/// The rounds so far.
#[derive(Debug, Default)]
pub(crate) struct Convergence {
    rounds: u32,
    best: Option<u64>,
    without_gain: u32,
    /// Bytes in a second.
    rate: f64,
}

impl Convergence {
    /// Another round has ended.
    pub(crate) fn round(&mut self, settings: &Precopy, round: Round) -> Verdict {
        self.rounds += 1;
        self.measure(round);
        self.without_gain = if self.is_gain(round.dirty) { 0 } else { self.without_gain + 1 };
        self.best = Some(self.best.map_or(round.dirty, |best| best.min(round.dirty)));
        if self.time_for(round.dirty) <= settings.target {
            Verdict::Fits
        } else if self.without_gain >= STALLED {
            Verdict::Stalled
        } else if self.rounds >= settings.max_rounds.get() {
            Verdict::Rounds
        } else if settings.max_time.is_some_and(|limit| round.elapsed >= limit) {
            Verdict::Time
        } else {
            Verdict::Again
        }
    }

    /// Short rounds say little about the link, so that they count by their length.
    fn measure(&mut self, round: Round) {
        if round.pulled == 0 || round.took.is_zero() {
            return;
        }
        let rate = round.pulled as f64 / round.took.as_secs_f64();
        let weight = (round.took.as_secs_f64() / 0.5).clamp(0.1, 1.0);
        self.rate = if self.rate > 0.0 { self.rate * (1.0 - weight) + rate * weight } else { rate };
    }

    /// At least a tenth less than the best so far.
    fn is_gain(&self, dirty: u64) -> bool {
        self.best.is_none_or(|best| dirty < best - best / 10)
    }

    fn time_for(&self, bytes: u64) -> Duration {
        match bytes {
            0 => Duration::ZERO,
            _ if self.rate > 0.0 => Duration::try_from_secs_f64(bytes as f64 / self.rate).unwrap_or(Duration::MAX),
            _ => Duration::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A link of 100 MiB/s, an application that dirties `dirty(bytes pulled)` bytes meanwhile; the verdict and in which
    /// round it came.
    fn run(settings: &Precopy, size: u64, dirty: impl Fn(u64) -> u64) -> (Verdict, u32) {
        let mut convergence = Convergence::default();
        let (mut rest, mut elapsed) = (size, Duration::ZERO);
        loop {
            let took = Duration::from_secs_f64(rest as f64 / (100 * MIB) as f64);
            elapsed += took;
            let round = Round { pulled: rest, took, dirty: dirty(rest), elapsed };
            let verdict = convergence.round(settings, round);
            if verdict.is_final() {
                return (verdict, convergence.rounds);
            }
            rest = round.dirty;
        }
    }

    #[test]
    fn a_slow_writer_converges() {
        let settings = Precopy::default();
        assert_eq!(run(&settings, 1024 * MIB, |_| 0), (Verdict::Fits, 1));
        assert_eq!(run(&settings, 1024 * MIB, |pulled| pulled / 10), (Verdict::Fits, 3));
        assert_eq!(run(&settings, 1024 * MIB, |_| 4 * MIB), (Verdict::Fits, 1), "4 MiB are 40 ms");
    }

    #[test]
    fn a_fast_writer_does_not() {
        let settings = Precopy::default();
        assert_eq!(run(&settings, 1024 * MIB, |_| 200 * MIB), (Verdict::Stalled, 4));
        assert_eq!(run(&settings, 1024 * MIB, |pulled| pulled * 2), (Verdict::Stalled, 4));
    }

    #[test]
    fn limits_end_it() {
        let four = NonZeroU32::new(4).unwrap();
        let settings = Precopy { max_rounds: four, ..Precopy::default() };
        assert_eq!(run(&settings, 1024 * MIB, |pulled| pulled * 4 / 5), (Verdict::Rounds, 4));
        let settings = Precopy { max_time: Some(Duration::from_secs(12)), ..Precopy::default() };
        assert_eq!(run(&settings, 1024 * MIB, |pulled| pulled / 2), (Verdict::Time, 2));
    }

    #[test]
    fn without_a_rate_nothing_fits_but_nothing() {
        let round = |dirty| Round { pulled: 0, took: Duration::ZERO, dirty, elapsed: Duration::ZERO };
        assert_eq!(Convergence::default().round(&Precopy::default(), round(1)), Verdict::Again);
        assert_eq!(Convergence::default().round(&Precopy::default(), round(0)), Verdict::Fits);
    }
}
