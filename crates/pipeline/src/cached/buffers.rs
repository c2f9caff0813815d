//! Buffers that are used again, so that a pull or a push neither allocates nor zeroes memory.
//!
//! It bounds what it keeps, not what is in use: that is what the pull and push plans are for.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes that are kept for later use, at most.
const KEPT: usize = 32 << 20;

#[derive(Debug, Default)]
pub(super) struct Buffers {
    kept: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A buffer of `len` bytes with any contents. It comes back when it is dropped.
    pub(super) fn take(&self, len: usize) -> Buffer<'_> {
        let mut bytes = self.lock().pop().unwrap_or_default();
        // Only what the buffer never had is zeroed.
        bytes.resize(len.max(bytes.len()), 0);
        Buffer { pool: self, bytes, len }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, bytes: Vec<u8>) {
        let mut kept = self.lock();
        if (kept.len() + 1) * bytes.len() <= KEPT {
            kept.push(bytes);
        }
    }
}

/// A buffer on loan.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    pool: &'a Buffers,
    bytes: Vec<u8>,
    len: usize,
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_have_the_length_asked_for() {
        let pool = Buffers::default();
        let mut first = pool.take(100);
        first.fill(7);
        let place = first.as_ptr();
        drop(first);
        let second = pool.take(50);
        assert_eq!((second.len(), second.as_ptr()), (50, place));
        assert_eq!(pool.take(200).len(), 200);
        drop(second);
        assert_eq!(pool.take(100).len(), 100);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let pool = Buffers::default();
        let taken: Vec<_> = (0..10).map(|_| pool.take(8 << 20)).collect();
        drop(taken);
        assert!(pool.lock().iter().map(Vec::len).sum::<usize>() <= KEPT);
    }
}
