//! Notices a client that has stopped, or gets on so slowly that it might as well have.
//!
//! Each direction has credit of some time. It runs out while the client is to send or to receive, every byte earns some
//! of it back, and all of it is back whenever the client has done what it was to do. So one that stops is given up when
//! its credit is used up, one that sends a byte now and then hardly later, and one on a slow line never.

use std::num::NonZeroU32;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// How often a time-out is looked at before it is over.
const TICKS: u32 = 4;

/// For how long a client may do nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// When it is to send or receive.
    pub(super) stall: Duration,
    /// How many bytes in a second are as good as none.
    pub(super) least_rate: NonZeroU32,
    /// When it could ask for something.
    pub(super) idle: Option<Duration>,
}

/// What a client is to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waits {
    /// Send what it has begun to send.
    pub(super) sending: bool,
    /// Receive what it has asked for.
    pub(super) receiving: bool,
    /// Ask for something, if it likes to.
    pub(super) idle: bool,
}

/// What a client has not done for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    Sending,
    Receiving,
    Idle,
}

/// Looks a few times per time-out, so that it costs nothing per request.
pub(super) struct Clock {
    patience: Patience,
    period: Duration,
    tick: Pin<Box<Sleep>>,
    /// What the client sends.
    pub(super) sending: Meter,
    /// What the client receives.
    pub(super) receiving: Meter,
    /// Whether anything happened since the last tick.
    pub(super) moved: bool,
    /// Since when nothing was asked for.
    idle_since: Instant,
}

/// One direction.
pub(super) struct Meter {
    credit: Duration,
    /// Since the last tick.
    bytes: u64,
    /// Whether there was nothing to do at some time since the last tick.
    rested: bool,
}

impl Meter {
    pub(super) fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// There was nothing to do, or something as good as all of it was done.
    pub(super) fn rest(&mut self) {
        self.rested = true;
    }

    /// Whether the credit is used up.
    fn tick(&mut self, period: Duration, patience: &Patience) -> bool {
        let earned = Duration::from_secs(self.bytes) / patience.least_rate.get();
        self.credit = match self.rested {
            true => patience.stall,
            false => (self.credit + earned).saturating_sub(period).min(patience.stall),
        };
        (self.bytes, self.rested) = (0, false);
        self.credit.is_zero()
    }
}

impl Clock {
    pub(super) fn new(patience: Patience) -> Self {
        let period = patience.idle.unwrap_or(patience.stall).min(patience.stall) / TICKS;
        let meter = || Meter { credit: patience.stall, bytes: 0, rested: true };
        let (tick, idle_since) = (Box::pin(sleep(period)), Instant::now());
        Self { patience, period, tick, sending: meter(), receiving: meter(), moved: false, idle_since }
    }

    /// Ready with what the client is late with. Say what it is to do each time that anything may have changed.
    pub(super) fn poll(&mut self, context: &mut Context<'_>, waits: Waits) -> Poll<Late> {
        if !waits.sending {
            self.sending.rest();
        }
        if !waits.receiving {
            self.receiving.rest();
        }
        while self.tick.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            self.tick.as_mut().reset(now + self.period);
            if !waits.idle || self.moved {
                self.idle_since = now;
            }
            self.moved = false;
            if self.sending.tick(self.period, &self.patience) {
                return Poll::Ready(Late::Sending);
            }
            if self.receiving.tick(self.period, &self.patience) {
                return Poll::Ready(Late::Receiving);
            }
            if self.patience.idle.is_some_and(|limit| now - self.idle_since >= limit) {
                return Poll::Ready(Late::Idle);
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::*;

    const STALL: Duration = Duration::from_secs(120);
    const RATE: u32 = 1024;
    const NOTHING: Waits = Waits { sending: false, receiving: false, idle: false };

    fn clock(idle: Option<Duration>) -> Clock {
        Clock::new(Patience { stall: STALL, least_rate: NonZeroU32::new(RATE).unwrap(), idle })
    }

    /// What a client is late with, and when, for which `waits` stays true and which moves `bytes` in each `pause`.
    async fn late(mut clock: Clock, waits: Waits, bytes: usize, pause: Duration) -> Option<(Late, Duration)> {
        let begun = Instant::now();
        while begun.elapsed() < STALL * 100 {
            if let Ok(late) = timeout(pause, poll_fn(|context| clock.poll(context, waits))).await {
                return Some((late, begun.elapsed()));
            }
            let meter = if waits.sending { &mut clock.sending } else { &mut clock.receiving };
            meter.add(bytes);
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_or_dribbles_is_late_and_who_is_only_slow_is_not() {
        for (waits, expected) in [
            (Waits { sending: true, ..NOTHING }, Late::Sending),
            (Waits { receiving: true, ..NOTHING }, Late::Receiving),
        ] {
            for (bytes, pause, limit) in [
                (0, Duration::from_secs(1), STALL),
                (1, Duration::from_secs(1), STALL),
                (1, Duration::from_secs(30), STALL),
                (RATE as usize / 2, Duration::from_secs(1), STALL * 2),
                (RATE as usize * 20, Duration::from_secs(40), STALL * 2),
            ] {
                let (late, after) = late(clock(None), waits, bytes, pause).await.expect("it is late");
                assert_eq!(late, expected);
                assert!(after >= STALL && after <= limit + STALL / 2, "{bytes} in {pause:?}: {after:?}");
            }
            for (bytes, pause) in [
                (RATE as usize, Duration::from_secs(1)),
                (62_500, Duration::from_secs(1)),
                // In a burst now and then, as a socket with a large buffer takes it.
                (1 << 20, STALL * 9 / 10),
            ] {
                assert_eq!(late(clock(None), waits, bytes, pause).await, None, "{bytes} in {pause:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_nothing_to_do_is_idle_and_not_late() {
        let waits = Waits { idle: true, ..NOTHING };
        assert_eq!(late(clock(None), waits, 0, STALL).await, None);
        let limit = STALL / 2;
        let (late, after) = late(clock(Some(limit)), waits, 0, STALL).await.expect("it has been idle");
        assert_eq!(late, Late::Idle);
        assert!(after >= limit && after < STALL);
    }

    /// Somebody who asks for little things, one after another, and happens to be busy whenever it is looked at.
    #[tokio::test(start_paused = true)]
    async fn who_finishes_what_it_began_has_all_its_time_for_the_next() {
        let mut clock = clock(None);
        for _ in 0..1000 {
            let sends = Waits { sending: true, ..NOTHING };
            let nearly = timeout(STALL * 9 / 10, poll_fn(|context| clock.poll(context, sends))).await;
            assert!(nearly.is_err(), "{nearly:?}");
            let rests = poll_fn(|context| Poll::Ready(clock.poll(context, NOTHING).is_pending())).await;
            assert!(rests);
        }
    }
}
