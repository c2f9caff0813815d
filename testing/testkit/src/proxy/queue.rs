//! Bytes under way in one direction: stamped when they arrive, handed out when they are due.

use std::collections::VecDeque;
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

/// A delay that can be changed while it is used.
#[derive(Debug)]
pub(super) struct Delay(AtomicU64);

impl Delay {
    pub(super) fn new(delay: Duration) -> Self {
        let this = Self(AtomicU64::new(0));
        this.set(delay);
        this
    }

    pub(super) fn set(&self, delay: Duration) {
        self.0.store(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn due(&self) -> Instant {
        Instant::now() + Duration::from_nanos(self.0.load(Ordering::Relaxed))
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
    delay: Arc<Delay>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<(Instant, Item)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    stalled: bool,
    closed: bool,
}

impl Queue {
    pub(super) fn new(delay: Arc<Delay>) -> Self {
        Self { delay, state: Mutex::default(), changed: Condvar::new() }
    }

    /// A buffer to read into.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.state().spare.pop().unwrap_or_else(|| vec![0; BUFFER])
    }

    /// Sends the first `len` bytes of `buffer` on their way; gives a buffer to go on with. Waits while too many bytes
    /// are under way. `None` if the queue was closed.
    pub(super) fn push(&self, buffer: Vec<u8>, len: usize) -> Option<Vec<u8>> {
        let due = self.delay.due();
        let (item, buffer) = match len {
            0..SMALL => (Item::Bytes(buffer[..len].to_vec(), len), Some(buffer)),
            _ => (Item::Bytes(buffer, len), None),
        };
        let full = |state: &mut State| !state.closed && state.bytes + len > CAPACITY;
        let mut state = self.changed.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.bytes += len;
        self.enqueue(&mut state, due, item);
        let spare = buffer.or_else(|| state.spare.pop());
        drop(state);
        Some(spare.unwrap_or_else(|| vec![0; BUFFER]))
    }

    /// Sends the end, after everything before it.
    pub(super) fn finish(&self, item: Item) {
        let due = self.delay.due();
        self.enqueue(&mut self.state(), due, item);
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
            if self.bytes + BUFFER > CAPACITY {
                changed.notify_all();
            }
            self.bytes -= len;
        }
        Some(item)
    }
}
