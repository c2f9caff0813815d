//! Bounded memory: room for a request's or a reply's bytes is taken before they are received or made, and given back
//! when they have been written or sent. Buffers are used again, because fresh memory from the system costs more than
//! filling it.
//!
//! There are two bounds: one for each connection, and one over all, of which each gets its fair part.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use r3map_pipeline::{Fair, FairShare, Taker};

/// What is counted in: coarse enough that any sum fits.
const UNIT: u64 = 4096;
/// Buffers hold a power of two of bytes, at least so many, and the headers around them.
const SMALLEST: usize = 4 << 10;
/// Bytes of headers that a buffer has room for beside its data.
pub(crate) const HEADERS: usize = 256;
/// The part of the room that unused buffers may take.
const KEPT: u64 = 4;

/// Room for so many bytes, over all connections, and the buffers that are not used now.
#[derive(Debug)]
pub(crate) struct Pool {
    fair: Arc<Fair>,
    unused: Mutex<Unused>,
    kept: usize,
}

#[derive(Debug, Default)]
struct Unused {
    /// By the power of two that they hold. The last one used is last, and may still be in the processor's cache.
    classes: [Vec<Vec<u8>>; 32],
    total: usize,
}

/// What one connection takes of a [`Pool`].
#[derive(Debug)]
pub(crate) struct Room {
    pool: Arc<Pool>,
    taker: Taker,
}

/// Room that was taken, given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    pool: Arc<Pool>,
    _taken: Option<FairShare>,
}

/// Bytes that hold on to their share.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    used: usize,
    share: Share,
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX >> 3).min(u32::MAX >> 3)
}

impl Pool {
    /// Room for so many bytes, of which one connection takes at most `own` at once.
    pub(crate) fn new(bytes: u64, own: u64) -> Arc<Self> {
        let kept = usize::try_from(bytes / KEPT).unwrap_or(usize::MAX);
        Arc::new(Self { fair: Fair::new(units(bytes), units(own)), unused: Mutex::default(), kept })
    }

    /// Room for one connection.
    pub(crate) fn room(self: &Arc<Self>) -> Room {
        Room { pool: self.clone(), taker: self.fair.taker() }
    }

    fn take(&self, size: usize) -> Vec<u8> {
        let mut unused = self.lock();
        match unused.classes[class(size)].pop() {
            Some(buffer) => {
                unused.total -= size;
                buffer
            }
            None => {
                drop(unused);
                vec![0; size + HEADERS]
            }
        }
    }

    /// Keeps a buffer, and lets go of some of the size that there is most of if there is no room for all.
    fn put(&self, buffer: Vec<u8>) {
        let size = buffer.len() - HEADERS;
        let mut unused = self.lock();
        unused.total += size;
        unused.classes[class(size)].push(buffer);
        while unused.total > self.kept {
            let weight = |buffers: &&mut Vec<Vec<u8>>| buffers.len() * buffers.first().map_or(0, Vec::len);
            let Some(buffer) = unused.classes.iter_mut().max_by_key(weight).and_then(Vec::pop) else { return };
            unused.total -= buffer.len() - HEADERS;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Unused> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn class(size: usize) -> usize {
    size.trailing_zeros() as usize
}

impl Room {
    /// Takes room for so many bytes, or for all that one can have. Ask for the same again until it is ready.
    pub(crate) fn poll_share(&mut self, context: &mut Context<'_>, bytes: u64) -> Poll<Share> {
        let taken = match bytes {
            0 => None,
            _ => Some(ready!(self.taker.poll_take(context, units(bytes)))),
        };
        Poll::Ready(Share { pool: self.pool.clone(), _taken: taken })
    }
}

impl Share {
    /// A buffer for `len` bytes of data and the headers around them, of which none is used yet. What is in it is left
    /// from earlier.
    pub(crate) fn buffer(self, len: usize) -> Buffer {
        let bytes = match len {
            0 => Vec::new(),
            _ => self.pool.take(len.max(SMALLEST).next_power_of_two()),
        };
        Buffer { bytes, used: 0, share: self }
    }
}

impl Buffer {
    /// Uses `len` bytes more, whatever is in them, and gives them to be filled.
    pub(crate) fn more(&mut self, len: usize) -> &mut [u8] {
        let start = self.used;
        self.used += len;
        &mut self.bytes[start..self.used]
    }

    /// Uses `bytes` more.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.more(bytes.len()).copy_from_slice(bytes);
    }

    /// What is used.
    pub(crate) fn used(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// What is used, to be changed.
    pub(crate) fn used_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.used]
    }

    /// The `len` bytes that are used first, and what of them is not used yet, to be filled.
    pub(crate) fn missing(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.used..len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.share.pool.put(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn take(room: &mut Room, bytes: u64) -> Option<Share> {
        match room.poll_share(&mut Context::from_waker(Waker::noop()), bytes) {
            Poll::Ready(share) => Some(share),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_connection_cannot_take_everything_and_room_comes_back_with_the_buffer() {
        let pool = Pool::new(3 * UNIT, 2 * UNIT);
        let (mut first, mut second) = (pool.room(), pool.room());
        let buffer = take(&mut first, u64::MAX).unwrap().buffer(5000);
        let other = take(&mut second, 1).unwrap();
        assert!(take(&mut first, 1).is_none() && take(&mut second, 1).is_none(), "there is none left");
        assert!(take(&mut second, 0).is_some());
        drop((buffer, other));
        assert!(take(&mut first, 1).is_some() && take(&mut second, 1).is_some());
    }

    #[test]
    fn buffers_are_used_again_and_start_unused() {
        let pool = Pool::new(4 << 20, 4 << 20);
        let mut room = pool.room();
        let mut buffer = take(&mut room, 1).unwrap().buffer(100_000);
        buffer.more(100_000).fill(9);
        let place = buffer.used().as_ptr();
        drop(buffer);
        let mut again = take(&mut room, 1).unwrap().buffer(131_072);
        assert_eq!((again.used().len(), again.missing(1).as_ptr()), (0, place));
        again.push(b"ab");
        again.used_mut()[0] = b'x';
        assert_eq!(again.used(), b"xb");
        assert_eq!(again.missing(131_072 + HEADERS).len(), 131_070 + HEADERS);
    }

    #[test]
    fn only_so_much_is_kept_and_least_of_what_there_is_most_of() {
        let pool = Pool::new(1 << 20, 1 << 20);
        let mut room = pool.room();
        let sizes = [64 << 10; 10].into_iter().chain([4 << 10; 8]);
        let buffers: Vec<_> = sizes.map(|len| take(&mut room, 1).unwrap().buffer(len)).collect();
        drop(buffers);
        let unused = pool.lock();
        assert_eq!((unused.classes[16].len(), unused.classes[12].len()), (3, 8), "a quarter of the room");
    }
}
