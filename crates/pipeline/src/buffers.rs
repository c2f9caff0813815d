//! Buffers for bytes between the kernel and a backend: taken, used, and given back. At most a few are kept, so that a
//! burst of requests does not hold its memory for ever.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// A pool of buffers. Cloning gives another handle to the same pool.
#[derive(Debug, Clone)]
pub struct Buffers(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    keep: usize,
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A pool that keeps at most `keep` buffers that nobody uses.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self(Arc::new(Pool { keep, free: Mutex::default() }))
    }

    /// A buffer of `len` bytes whose contents mean nothing.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        let mut bytes = self.pop();
        if bytes.len() < len {
            // A fresh allocation is zeroed by the kernel only where it is touched; growing would copy.
            bytes = vec![0; len];
        }
        Buffer { bytes, len, pool: self.clone() }
    }

    /// A buffer with a copy of `data`.
    #[must_use]
    pub fn copy(&self, data: &[u8]) -> Buffer {
        let mut buffer = self.take(data.len());
        buffer.copy_from_slice(data);
        buffer
    }

    fn pop(&self) -> Vec<u8> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, bytes: Vec<u8>) {
        let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < self.0.keep {
            free.push(bytes);
        }
    }
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    pool: Buffers,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuses_a_few_and_keeps_no_more() {
        let pool = Buffers::new(2);
        let taken: Vec<_> = (0..5).map(|_| pool.take(4096)).collect();
        assert!(taken.iter().all(|buffer| buffer.len() == 4096));
        drop(taken);
        assert_eq!(pool.0.free.lock().unwrap().len(), 2);
        assert_eq!(pool.copy(&[1, 2, 3])[..], [1, 2, 3]);
        assert_eq!(pool.take(8192).len(), 8192);
        assert_eq!(pool.0.free.lock().unwrap().len(), 2);
    }
}
