//! Which calls are struck, and by what.

use std::ops::Range;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};

use super::{Call, Pause};
use crate::random::Random;

/// Which calls are struck: built up from [`Rule::on`] or [`Rule::any`], and turned into a [`Fault`] by saying what
/// happens to them.
#[derive(Debug, Clone)]
pub struct Rule {
    operation: Option<Operation>,
    range: Option<Range<u64>>,
    skip: u64,
    times: u64,
    chance: Option<(f64, Random)>,
}

impl Rule {
    /// Every call.
    #[must_use]
    pub fn any() -> Self {
        Self { operation: None, range: None, skip: 0, times: u64::MAX, chance: None }
    }

    /// Every call of one operation.
    #[must_use]
    pub fn on(operation: Operation) -> Self {
        Self { operation: Some(operation), ..Self::any() }
    }

    /// Of those, the ones that touch a byte of `range`. A flush touches none.
    #[must_use]
    pub fn touching(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Of those, not the first `calls`.
    #[must_use]
    pub fn after(mut self, calls: u64) -> Self {
        self.skip = calls;
        self
    }

    /// Of those, only the first `calls`.
    #[must_use]
    pub fn times(mut self, calls: u64) -> Self {
        self.times = calls;
        self
    }

    /// Of those, each with a probability between 0 and 1, the same ones for the same seed and order of calls.
    #[must_use]
    pub fn chance(mut self, probability: f64, seed: u64) -> Self {
        self.chance = Some((probability, Random::new(seed)));
        self
    }

    /// They fail without having been tried.
    #[must_use]
    pub fn fail(self, kind: ErrorKind) -> Fault {
        self.fault(Moment::Before, Effect::Fail(kind))
    }

    /// They are done, and then fail: the answer was lost.
    #[must_use]
    pub fn fail_after(self, kind: ErrorKind) -> Fault {
        self.fault(Moment::After, Effect::Fail(kind))
    }

    /// Reads fill at most `bytes` of their buffer, leave rubbish in the rest and fail as corrupt.
    #[must_use]
    pub fn short(self, bytes: u64) -> Fault {
        self.fault(Moment::Before, Effect::Short(bytes))
    }

    /// They wait before they are tried.
    #[must_use]
    pub fn delay(self, delay: Duration) -> Fault {
        self.fault(Moment::Before, Effect::Delay(delay))
    }

    /// They are never tried and never answered.
    #[must_use]
    pub fn hang(self) -> Fault {
        self.fault(Moment::Before, Effect::Hang)
    }

    /// They are done, and never answered.
    #[must_use]
    pub fn hang_after(self) -> Fault {
        self.fault(Moment::After, Effect::Hang)
    }

    /// They wait in `pause` before they are tried.
    #[must_use]
    pub fn hold(self, pause: &Pause) -> Fault {
        self.fault(Moment::Before, Effect::Hold(pause.clone()))
    }

    /// They are done, and wait in `pause` with the answer.
    #[must_use]
    pub fn hold_after(self, pause: &Pause) -> Fault {
        self.fault(Moment::After, Effect::Hold(pause.clone()))
    }

    /// The call inside is dropped after it was polled `polls` times, and fails as cancelled.
    #[must_use]
    pub fn cancel(self, polls: usize) -> Fault {
        self.fault(Moment::Before, Effect::Cancel(polls))
    }

    fn fault(self, moment: Moment, effect: Effect) -> Fault {
        Fault { rule: self, moment, effect }
    }

    /// Whether this call is one of them; counts it.
    fn matches(&mut self, call: &Call) -> bool {
        let touches = |range: &Range<u64>| call.ranges.iter().any(|r| r.start < range.end && range.start < r.end);
        if self.operation.is_some_and(|operation| operation != call.operation)
            || self.range.as_ref().is_some_and(|range| !touches(range))
        {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let struck = self.times > 0 && self.chance.as_mut().is_none_or(|(p, random)| random.chance(*p));
        self.times -= u64::from(struck);
        struck
    }
}

/// What happens to which calls.
#[derive(Debug, Clone)]
pub struct Fault {
    rule: Rule,
    moment: Moment,
    effect: Effect,
}

impl Fault {
    pub(super) fn strike(&mut self, call: &Call) -> Option<(Moment, Effect)> {
        self.rule.matches(call).then(|| (self.moment, self.effect.clone()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Before,
    After,
}

#[derive(Debug, Clone)]
pub(super) enum Effect {
    Fail(ErrorKind),
    Delay(Duration),
    Hang,
    Hold(Pause),
    Short(u64),
    Cancel(usize),
}

impl Effect {
    pub(super) async fn happen(&self, call: &Call) -> Result<()> {
        match self {
            Self::Fail(kind) => return Err(failure(*kind, call)),
            Self::Delay(delay) => tokio::time::sleep(*delay).await,
            Self::Hang => std::future::pending().await,
            Self::Hold(pause) => pause.pass().await,
            Self::Short(_) | Self::Cancel(_) => unreachable!("they change the call itself"),
        }
        Ok(())
    }
}

fn failure(kind: ErrorKind, call: &Call) -> Error {
    let error = Error::new(kind, call.operation, "it fails, as the test asked");
    match call.ranges.first() {
        Some(range) => error.at(range.start, range.end - range.start),
        None => error,
    }
}
