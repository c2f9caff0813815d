//! A flag that one thread raises and others wait for together with file descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// An event that happens once: everybody who waits for it, now or later, sees it. An `eventfd(2)` that is never read.
#[derive(Debug)]
pub struct Event {
    fd: OwnedFd,
    raised: AtomicBool,
}

impl Event {
    /// An event that has not happened.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, raised: AtomicBool::new(false) })
    }

    /// Makes it happen; again is the same as once.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        // The counter holds 2^64 - 2 raises, so that this cannot block or fail.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Whether it has happened, without asking the kernel.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
