//! Bytes under way in one direction: stamped when they arrive, handed out when they are due.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The most bytes under way in one direction: 1 GB/s for more than a quarter of a second. Beyond, the sender is held
/// back.
const CAPACITY: usize = 256 << 20;
/// The length of the buffers that are read into.
const BUFFER: usize = 256 << 10;
/// Reads shorter than this are copied, so that they do not hold a whole buffer.
const SMALL: usize = 32 << 10;
/// How many unused buffers are kept.
const SPARE: usize = 256;

/// On a line with a rate: how long the bytes take that fit into it beside those that are on their way, as in the buffer of
/// a router.
const ROUTER: Duration = Duration::from_millis(50);
/// On a line with a rate: how long the bytes take that go into it at once.
const GULP: Duration = Duration::from_millis(10);
/// What goes into a line at once, and fits into it, at least.
const PACKET: usize = 1460;

/// A delay and a rate that can be changed while they are used.
#[derive(Debug)]
pub(super) struct Pace {
    delay: AtomicU64,
    /// Bytes a second; zero stands for as many as there are.
    rate: AtomicU64,
}

impl Pace {
    pub(super) fn new(delay: Duration) -> Self {
        let this = Self { delay: AtomicU64::new(0), rate: AtomicU64::new(0) };
        this.set_delay(delay);
        this
    }

    pub(super) fn set_delay(&self, delay: Duration) {
        self.delay.store(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn set_rate(&self, rate: Option<NonZeroU64>) {
        self.rate.store(rate.map_or(0, NonZeroU64::get), Ordering::Relaxed);
    }

    fn delay(&self) -> Duration {
        Duration::from_nanos(self.delay.load(Ordering::Relaxed))
    }

    /// How long `len` bytes take to go into the line.
    fn takes(&self, len: usize) -> Duration {
        match self.rate.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(len as f64 / rate as f64),
        }
    }

    /// How many bytes go into the line within a time, and at least a packet; `most` if it has no rate.
    fn within(&self, time: Duration, most: usize) -> usize {
        match self.rate.load(Ordering::Relaxed) {
            0 => most,
            rate => {
                let bytes = u128::from(rate) * time.as_micros() / 1_000_000;
                usize::try_from(bytes).unwrap_or(most).clamp(PACKET, most)
            }
        }
    }
}

/// What comes out at the other end.
#[derive(Debug)]
pub(super) enum Item {
    /// This many bytes of this buffer.
    Bytes(Vec<u8>, usize),
    /// The sender has nothing more to say.
    End,
    /// The sender is gone.
    Reset,
}

#[derive(Debug)]
pub(super) struct Queue {
    pace: Arc<Pace>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<(Instant, Item)>,
    bytes: usize,
    /// Somebody waits for room.
    full: bool,
    /// When the last of the bytes has gone into the line.
    free: Option<Instant>,
    spare: Vec<Vec<u8>>,
    stalled: bool,
    closed: bool,
}

impl Queue {
    pub(super) fn new(pace: Arc<Pace>) -> Self {
        Self { pace, state: Mutex::default(), changed: Condvar::new() }
    }

    /// How many bytes of a buffer to fill.
    pub(super) fn gulp(&self) -> usize {
        self.pace.within(GULP, BUFFER)
    }

    /// A buffer to read into.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.state().spare.pop().unwrap_or_else(|| vec![0; BUFFER])
    }

    /// Sends the first `len` bytes of `buffer` on their way; gives a buffer to go on with. Waits while too many bytes
    /// are under way. `None` if the queue was closed.
    pub(super) fn push(&self, buffer: Vec<u8>, len: usize) -> Option<Vec<u8>> {
        let (item, buffer) = match len {
            0..SMALL => (Item::Bytes(buffer[..len].to_vec(), len), Some(buffer)),
            _ => (Item::Bytes(buffer, len), None),
        };
        let room = self.pace.within(self.pace.delay() + ROUTER, CAPACITY);
        let full = |state: &mut State| {
            state.full = !state.closed && state.bytes > 0 && state.bytes + len > room;
            state.full
        };
        let arrived = Instant::now();
        let mut state = self.changed.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.bytes += len;
        let through = state.free.map_or(arrived, |free| free.max(arrived)) + self.pace.takes(len);
        state.free = Some(through);
        self.enqueue(&mut state, through + self.pace.delay(), item);
        let spare = buffer.or_else(|| state.spare.pop());
        drop(state);
        Some(spare.unwrap_or_else(|| vec![0; BUFFER]))
    }

    /// Sends the end, after everything before it.
    pub(super) fn finish(&self, item: Item) {
        let mut state = self.state();
        let now = Instant::now();
        let through = state.free.map_or(now, |free| free.max(now));
        self.enqueue(&mut state, through + self.pace.delay(), item);
    }

    fn enqueue(&self, state: &mut State, due: Instant, item: Item) {
        // The receiver sleeps without a time only while there is nothing.
        if state.items.is_empty() {
            self.changed.notify_all();
        }
        state.items.push_back((due, item));
    }

    /// Waits for the next item to be due. `None` if the queue was closed.
    pub(super) fn pop(&self) -> Option<Item> {
        let mut state = self.state();
        loop {
            if state.closed {
                return None;
            }
            let now = Instant::now();
            let wait = match state.items.front() {
                Some((due, _)) if !state.stalled && *due <= now => return state.take(&self.changed),
                Some((due, _)) if !state.stalled => Some(*due - now),
                _ => None,
            };
            state = match wait {
                Some(wait) => self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Gives a buffer back.
    pub(super) fn recycle(&self, buffer: Vec<u8>) {
        let mut state = self.state();
        if buffer.len() == BUFFER && state.spare.len() < SPARE {
            state.spare.push(buffer);
        }
    }

    pub(super) fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
        self.changed.notify_all();
    }

    /// Ends it: nothing goes in or comes out any more.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn take(&mut self, changed: &Condvar) -> Option<Item> {
        let (_, item) = self.items.pop_front()?;
        if let Item::Bytes(_, len) = &item {
            self.bytes -= len;
            if std::mem::take(&mut self.full) {
                changed.notify_all();
            }
        }
        Some(item)
    }
}
