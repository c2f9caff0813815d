//! A bounded number of open chunk files, the least recently used of which are closed first.
//!
//! The bound is on what is open, not on what is kept: whoever finds every place taken by a call under way waits for one
//! of them. It does not know how chunk files are opened.

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

#[derive(Debug)]
pub(super) struct Handles {
    limit: usize,
    pool: Mutex<Pool>,
    freed: Condvar,
}

#[derive(Debug)]
struct Pool {
    /// Open files that no call uses.
    idle: LruCache<u64, fs::File>,
    /// Places taken, idle or not.
    taken: usize,
    /// Calls that wait for a place.
    waiting: usize,
}

impl Handles {
    pub(super) fn new(limit: NonZeroUsize) -> Self {
        let pool = Mutex::new(Pool { idle: LruCache::unbounded(), taken: 0, waiting: 0 });
        Self { limit: limit.get(), pool, freed: Condvar::new() }
    }

    /// A place for the file of `chunk`, which is in it if it was open. Blocks while all places are in use; whoever has one
    /// must not take another.
    pub(super) fn place(&self, chunk: u64) -> Place<'_> {
        let mut pool = self.lock();
        if let Some(file) = pool.idle.pop(&chunk) {
            return Place { handles: self, chunk, file: Some(file) };
        }
        let mut evicted = None;
        while pool.taken == self.limit {
            evicted = pool.idle.pop_lru();
            if evicted.is_some() {
                pool.taken -= 1;
                break;
            }
            pool.waiting += 1;
            pool = self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner);
            pool.waiting -= 1;
        }
        pool.taken += 1;
        drop(pool);
        // Closing may take a while, but comes before the other is opened.
        drop(evicted);
        Place { handles: self, chunk, file: None }
    }

    /// Closes the file of `chunk` if it is open and nobody uses it.
    pub(super) fn close(&self, chunk: u64) {
        let mut pool = self.lock();
        if let Some(file) = pool.idle.pop(&chunk) {
            pool.taken -= 1;
            drop(pool);
            drop(file);
            self.freed.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the places for an open file. When it is dropped, its file stays open until the place is needed.
#[derive(Debug)]
pub(super) struct Place<'a> {
    handles: &'a Handles,
    chunk: u64,
    file: Option<fs::File>,
}

impl Place<'_> {
    /// The file that is open.
    pub(super) fn file(&self) -> Option<&fs::File> {
        self.file.as_ref()
    }

    /// Closes what is open, and puts another file in its place.
    pub(super) fn open(&mut self, open: impl FnOnce() -> io::Result<fs::File>) -> io::Result<&fs::File> {
        self.file = None;
        Ok(self.file.insert(open()?))
    }

    /// Closes what is open.
    pub(super) fn close(&mut self) {
        self.file = None;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut pool = self.handles.lock();
        match self.file.take() {
            Some(file) if pool.waiting == 0 && !pool.idle.contains(&self.chunk) => {
                pool.idle.put(self.chunk, file);
            }
            file => {
                drop(file);
                pool.taken -= 1;
                drop(pool);
                self.handles.freed.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn handles(limit: usize) -> Handles {
        Handles::new(NonZeroUsize::new(limit).unwrap())
    }

    fn null() -> io::Result<fs::File> {
        fs::File::open("/dev/null")
    }

    #[test]
    fn the_least_recently_used_is_closed_first() {
        let handles = handles(2);
        for chunk in [1, 2, 1, 3] {
            let mut place = handles.place(chunk);
            if place.file().is_none() {
                place.open(null).unwrap();
            }
        }
        let open: Vec<_> = [1, 2, 3].into_iter().filter(|chunk| handles.lock().idle.contains(chunk)).collect();
        assert_eq!(open, [1, 3]);
    }

    #[test]
    fn a_failure_to_open_gives_the_place_back() {
        let handles = handles(1);
        assert!(handles.place(1).open(|| fs::File::open("/no/such/file")).is_err());
        handles.place(2).open(null).unwrap();
        handles.place(2).close();
        handles.place(3).open(null).unwrap();
        handles.close(3);
        assert_eq!(handles.lock().taken, 0);
    }

    #[test]
    fn a_file_that_is_open_twice_is_kept_once() {
        let handles = handles(2);
        let (mut first, mut second) = (handles.place(1), handles.place(1));
        first.open(null).unwrap();
        second.open(null).unwrap();
        drop((first, second));
        let pool = handles.lock();
        assert_eq!((pool.taken, pool.idle.len()), (1, 1));
    }

    #[test]
    fn never_more_than_the_limit_and_nobody_waits_for_ever() {
        let handles = handles(3);
        let open = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (handles, open) = (&handles, &open);
                scope.spawn(move || {
                    for round in 0..500 {
                        let mut place = handles.place(thread + 5 * (round % 3));
                        assert!(open.fetch_add(1, Ordering::SeqCst) < 3);
                        if place.file().is_none() {
                            place.open(null).unwrap();
                        }
                        open.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        let pool = handles.lock();
        assert!(pool.taken <= 3 && pool.taken == pool.idle.len() && pool.waiting == 0);
    }
}
