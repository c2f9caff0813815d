//! Bounded memory: every byte of data in a request or reply is accounted for before it is allocated or received, until
//! it is sent or dropped. Each connection gets its part, so that a client that never reads its replies leaves the others
//! theirs.
//!
//! Buffers of replies are used again, because fresh memory from the system costs more than filling it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use r3map_pipeline::{Fair, FairShare, Taker};
use tokio::sync::Mutex as Queue;

/// What is counted in: coarse enough that any sum fits.
const UNIT: u64 = 4096;
/// Buffers have a power of two of bytes, at least this many, so that most requests find one that fits.
const SMALLEST: usize = 4 << 10;
/// The part of the room that unused buffers may take.
const KEPT: u64 = 4;
/// The part of the room that one connection may take for its replies, if it holds the longest request.
const OWN: u64 = 4;
/// The part that is left when one connection has all that it may take for its requests. More than of replies: requests that
/// wait for room take up the connection's HTTP/2 window, which those that have room need to arrive.
const LEFT: u64 = 4;

/// Room for so many bytes.
#[derive(Debug)]
pub(crate) struct Budget {
    fair: Arc<Fair>,
    /// The most that one connection may take for requests.
    requests: u32,
    unused: Arc<Unused>,
}

/// What one connection takes of a [`Budget`].
#[derive(Debug, Clone)]
pub(crate) struct Room {
    replies: Arc<Queue<Taker>>,
    requests: Arc<Queue<Taker>>,
    unused: Arc<Unused>,
}

/// Part of a [`Budget`], given back when the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    _taken: Option<Arc<FairShare>>,
    unused: Arc<Unused>,
}

impl Budget {
    /// Room for so many bytes, for requests of at most `longest` each.
    pub(crate) fn new(bytes: u64, longest: u64) -> Self {
        let [own, requests] = [bytes / OWN, bytes - bytes / LEFT].map(|part| part.max(room(longest)));
        let unused = Unused { limit: usize::try_from(bytes / KEPT).unwrap_or(usize::MAX), ..Unused::default() };
        Self { fair: Fair::new(units(bytes), units(own)), requests: units(requests), unused: Arc::new(unused) }
    }

    /// Room for one connection.
    pub(crate) fn room(&self) -> Room {
        let requests = self.fair.taker_of(self.requests);
        let [replies, requests] = [self.fair.taker(), requests].map(|taker| Arc::new(Queue::new(taker)));
        Room { replies, requests, unused: self.unused.clone() }
    }
}

impl Room {
    /// Waits until there is room for so many bytes of a reply (or for all that one can have), within a connection first
    /// come first served.
    pub(crate) async fn share(&self, bytes: u64) -> Share {
        self.part(&self.replies, bytes).await
    }

    /// The same for a request that is arriving.
    pub(crate) async fn arriving(&self, bytes: u64) -> Share {
        self.part(&self.requests, bytes).await
    }

    async fn part(&self, queue: &Queue<Taker>, bytes: u64) -> Share {
        let taken = match bytes {
            0 => None,
            _ => Some(Arc::new(queue.lock().await.take(units(bytes)).await)),
        };
        Share { _taken: taken, unused: self.unused.clone() }
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX >> 3).min(u32::MAX >> 3)
}

/// How much room a buffer for `len` bytes needs.
pub(crate) fn room(len: u64) -> u64 {
    len.max(SMALLEST as u64).checked_next_power_of_two().unwrap_or(u64::MAX)
}

impl Share {
    /// A buffer of at least `len` bytes, of which none is used yet. What is in it is left from earlier.
    pub(crate) fn buffer(&self, len: usize) -> Buffer {
        let size = len.max(SMALLEST).next_power_of_two();
        let bytes = match len {
            0 => Vec::new(),
            _ => self.unused.take(size).unwrap_or_else(|| vec![0; size]),
        };
        Buffer { bytes, used: 0, share: self.clone() }
    }
}

/// Bytes that hold on to their share.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    used: usize,
    share: Share,
}

impl Buffer {
    /// Uses the first `len` bytes, whatever is in them, and gives them to be filled.
    pub(crate) fn first(&mut self, len: usize) -> &mut [u8] {
        self.used = len;
        &mut self.bytes[..len]
    }

    /// Uses `bytes` more.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let end = self.used + bytes.len();
        self.bytes[self.used..end].copy_from_slice(bytes);
        self.used = end;
    }

    /// Uses `len` zeros more.
    pub(crate) fn push_zeros(&mut self, len: usize) {
        let end = self.used + len;
        self.bytes[self.used..end].fill(0);
        self.used = end;
    }

    /// Uses only the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.used = self.used.min(len);
    }

    /// What is used.
    pub(crate) fn used(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// What is used, to be sent.
    pub(crate) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.used()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.share.unused.put(std::mem::take(&mut self.bytes));
        }
    }
}

/// Buffers that wait to be used again.
#[derive(Debug, Default)]
struct Unused {
    kept: Mutex<Kept>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Kept {
    /// By the power of two that is their size. The last one used is last, and may still be in the processor's cache.
    classes: [Vec<Vec<u8>>; 32],
    total: usize,
}

impl Unused {
    fn take(&self, size: usize) -> Option<Vec<u8>> {
        let mut kept = self.lock();
        let buffer = kept.classes[class(size)].pop()?;
        kept.total -= size;
        Some(buffer)
    }

    /// Keeps a buffer, and lets go of some of the size that there is most of if there is no room for all.
    fn put(&self, buffer: Vec<u8>) {
        let mut kept = self.lock();
        kept.total += buffer.len();
        kept.classes[class(buffer.len())].push(buffer);
        while kept.total > self.limit {
            let most =
                kept.classes.iter_mut().max_by_key(|buffers| buffers.len() * buffers.first().map_or(0, Vec::len));
            let Some(buffer) = most.and_then(Vec::pop) else { return };
            kept.total -= buffer.len();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn class(size: usize) -> usize {
    size.trailing_zeros() as usize
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn room_comes_back_with_the_last_of_its_bytes() {
        let room = Budget::new(3 * UNIT, 3 * UNIT).room();
        let share = room.share(2 * UNIT).await;
        let mut buffer = share.buffer(3);
        buffer.push(&[1, 2, 3]);
        let bytes = buffer.freeze();
        let part = bytes.slice(1..);
        drop((share, bytes));
        assert!(room.share(2 * UNIT).now_or_never().is_none());
        assert!(room.share(1).now_or_never().is_some());
        drop(part);
        assert!(room.share(3 * UNIT).now_or_never().is_some());
        assert!(room.share(u64::MAX).now_or_never().is_some(), "all that there can be");
    }

    #[test]
    fn one_connection_leaves_room_for_others() {
        let budget = Budget::new(256 << 20, 32 << 20);
        let (one, other) = (budget.room(), budget.room());
        let taken: Vec<_> = std::iter::from_fn(|| one.share(1 << 20).now_or_never()).collect();
        assert_eq!(taken.len(), 64);
        let arriving: Vec<_> = std::iter::from_fn(|| one.arriving(1 << 20).now_or_never()).collect();
        assert!(arriving.len() >= 96, "{}: its requests arrive all the same", arriving.len());
        assert!(other.share(32 << 20).now_or_never().is_some());
        drop((taken, arriving));
        let arriving: Vec<_> = std::iter::from_fn(|| one.arriving(1 << 20).now_or_never()).collect();
        assert_eq!(arriving.len(), 192);
        assert!(other.arriving(32 << 20).now_or_never().is_some());
    }

    #[tokio::test]
    async fn buffers_are_used_again_and_start_unused() {
        let budget = Budget::new(4 << 20, 1 << 20);
        let share = budget.room().share(0).await;
        let mut buffer = share.buffer(100_000);
        buffer.first(100_000).fill(9);
        let place = buffer.used().as_ptr();
        drop(buffer.freeze());
        assert_ne!(share.buffer(1000).first(1000).as_ptr(), place, "of another size");
        assert_eq!((room(1000), room(100_000), room(u64::MAX)), (4096, 131_072, u64::MAX));
        let mut again = share.buffer(131_072);
        assert_eq!((again.used().len(), again.first(1).as_ptr()), (0, place));
        again.truncate(0);
        again.push_zeros(2);
        again.push(b"ab");
        again.truncate(3);
        assert_eq!(again.used(), b"\0\0a");
    }

    #[tokio::test]
    async fn only_so_much_is_kept_and_least_of_what_there_is_most_of() {
        let budget = Budget::new(1 << 20, 1 << 20);
        let share = budget.room().share(0).await;
        let buffers: Vec<_> = [64 << 10; 10].into_iter().chain([4 << 10; 8]).map(|len| share.buffer(len)).collect();
        drop(buffers);
        let kept = budget.unused.lock();
        let counts = (kept.classes[16].len(), kept.classes[12].len());
        assert_eq!((counts, kept.total), ((3, 8), (3 * 64 + 8 * 4) << 10), "a quarter of the room");
    }
}
