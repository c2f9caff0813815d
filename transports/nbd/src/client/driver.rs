//! The one task of a connection: waits for what arrives when no call does, sends what calls left over, and watches.
//!
//! It ends when the connection is broken, when nobody needs it any more, or when the server is being shut down; what happens
//! then is the link's matter.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::client::calls::Failure;
use crate::client::link::{Shared, lock};

/// How often it looks after calls that do not come for their data, and for silence. A call that is not polled (because
/// its caller waits for another one first) holds up the rest of the connection for so long at most twice.
const TICK: Duration = Duration::from_millis(5);

/// A future that ends with the reason why the connection is broken, or with nothing when it is to be ended in good order.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    silence: Duration,
    tick: Option<Pin<Box<Sleep>>>,
    /// At the last tick: what had been received and sent, and whose turn it was.
    before: (u64, u64, Option<u64>),
    /// When something was last received or sent, or nothing was waited for.
    alive: Instant,
}

impl Driver {
    pub(crate) fn new(shared: Arc<Shared>, silence: Duration) -> Self {
        Self { shared, silence, tick: None, before: (0, 0, None), alive: Instant::now() }
    }

    /// Moves bytes, both ways.
    fn transfer(&self, context: &mut Context<'_>) -> Result<(), Failure> {
        if let Poll::Ready(Err(failure)) = lock(&self.shared.incoming).poll(context, &self.shared.calls, None) {
            return Err(failure);
        }
        // In this order: what a server said before it closed is heard.
        match lock(&self.shared.outgoing).poll(context) {
            Poll::Ready(Err(error)) => Err(self.shared.ending.broken(&error)),
            _ => Ok(()),
        }
    }

    /// Looks after what takes long, at every tick as long as there are requests. Says whether to transfer again.
    fn watch(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let unanswered = lock(&self.shared.calls).unanswered();
        if self.tick.is_none() {
            if unanswered == 0 {
                return Ok(false);
            }
            self.shared.idle.store(false, Ordering::Release);
            self.alive = Instant::now();
            self.tick = Some(Box::pin(sleep(TICK)));
        }
        let Some(tick) = &mut self.tick else { return Ok(false) };
        if tick.as_mut().poll(context).is_pending() {
            return Ok(false);
        }
        self.tick = None;
        if unanswered > 0 { self.tick(context) } else { self.sleep() }
    }

    fn tick(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let mut incoming = lock(&self.shared.incoming);
        let now = (incoming.received(), lock(&self.shared.outgoing).sent(), incoming.awaited());
        let same = (now.0, now.1) == (self.before.0, self.before.1);
        let stuck = now.0 == self.before.0 && now.2.is_some() && now.2 == self.before.2;
        if stuck {
            incoming.take_over();
        }
        drop(incoming);
        self.before = now;
        if !same || stuck {
            self.alive = Instant::now();
        } else if self.alive.elapsed() > self.silence {
            return Err(Failure::GivenUp(format!("the server is silent for {} s", self.silence.as_secs_f32())));
        }
        let mut next = Box::pin(sleep(TICK));
        let _ = next.as_mut().poll(context);
        self.tick = Some(next);
        Ok(stuck)
    }

    /// Nothing is under way: no more ticks, until a request says so.
    fn sleep(&mut self) -> Result<bool, Failure> {
        self.shared.idle.store(true, Ordering::Release);
        // One that was made just before that did not say so.
        Ok(lock(&self.shared.calls).unanswered() > 0)
    }
}

impl Future for Driver {
    type Output = Option<Failure>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Failure>> {
        let this = &mut *self;
        {
            let mut waker = lock(&this.shared.driver);
            if !waker.will_wake(context.waker()) {
                waker.clone_from(context.waker());
            }
        }
        loop {
            if let Some(failure) = lock(&this.shared.calls).broken() {
                return Poll::Ready(Some(failure.clone()));
            }
            let again = this.transfer(context).and_then(|()| this.watch(context));
            match again {
                Err(failure) => return Poll::Ready(Some(failure)),
                Ok(true) => {}
                Ok(false) => break,
            }
        }
        let calls = lock(&this.shared.calls);
        let unneeded = this.shared.leaving.load(Ordering::Acquire) && calls.unanswered() == 0;
        if unneeded || calls.is_over() { Poll::Ready(None) } else { Poll::Pending }
    }
}
