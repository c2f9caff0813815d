//! Reading and writing a stretch of an open file at any offset, without waiting where the page cache has it.
//!
//! What the page cache can serve is done at once, on the caller's thread, with `RWF_NOWAIT`; the rest goes to tokio's
//! threads for blocking calls. A change that went there cannot be taken back when its caller goes away, so it holds
//! its range until it has happened: later changes to the same bytes wait for it and win, and later reads wait for it and
//! see it. Calls must be made within a tokio runtime.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use r3map_core::{Error, ErrorKind, Extent, ExtentKind, Operation, RangeGuard, RangeLock, Result};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use crate::durability::{Durability, Undurable, sync_data};
use crate::opened::Opened;

/// The most bytes that are copied to or from a blocking thread at once.
const STEP: usize = 4 << 20;
/// Extents that one call answers with at most.
const MAX_EXTENTS: usize = 1024;
/// What zeros are written from, where the file system cannot make them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How zeros are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeroing {
    /// The storage is released.
    Release,
    /// The storage stays, so that a later write finds room.
    Keep,
}

/// `len` bytes from `base` on in an open file. Offsets are relative to `base`; ranges were checked by the caller.
#[derive(Debug, Clone)]
pub(crate) struct Window(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    opened: Opened,
    base: u64,
    len: u64,
    /// Changes under way.
    changing: RangeLock,
    durability: Durability,
    /// Whether this file system is known not to take `RWF_NOWAIT`.
    no_read_now: AtomicBool,
    no_write_now: AtomicBool,
}

impl Window {
    pub(crate) fn new(opened: Opened, base: u64, len: u64) -> Self {
        Self(Arc::new(Inner {
            opened,
            base,
            len,
            changing: RangeLock::new(),
            durability: Durability::unknown(),
            no_read_now: AtomicBool::new(false),
            no_write_now: AtomicBool::new(false),
        }))
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len
    }

    pub(crate) fn opened(&self) -> &Opened {
        &self.0.opened
    }

    pub(crate) fn durability(&self) -> &Durability {
        &self.0.durability
    }

    pub(crate) async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let range = range(offset, buf.len() as u64);
        self.0.changing.free(&range).await;
        let mut done = self.0.read_now(offset, buf).map_err(|error| self.fault(Operation::Read, &range, error))?;
        while done < buf.len() {
            let (at, len) = (self.0.base + offset + done as u64, (buf.len() - done).min(STEP));
            let bytes = self
                .hop(Operation::Read, &range, move |inner| {
                    let mut bytes = vec![0; len];
                    inner.opened.file.read_exact_at(&mut bytes, at)?;
                    Ok(bytes)
                })
                .await?;
            buf[done..done + len].copy_from_slice(&bytes);
            done += len;
        }
        Ok(())
    }

    pub(crate) async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let range = range(offset, buf.len() as u64);
        let mut guard = self.0.changing.lock(range.clone()).await;
        let done = self.0.write_now(offset, buf).map_err(|error| self.fault(Operation::Write, &range, error))?;
        let mut at = self.0.base + offset + done as u64;
        for step in buf[done..].chunks(STEP) {
            let bytes = step.to_vec();
            let write = move |inner: &Inner| inner.change(guard, |file| file.file.write_all_at(&bytes, at));
            guard = self.hop(Operation::Write, &range, write).await?;
            at += step.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    pub(crate) async fn zero(&self, operation: Operation, offset: u64, len: u64, how: Zeroing) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let range = range(offset, len);
        let guard = self.0.changing.lock(range.clone()).await;
        let at = self.0.base + offset;
        let zero = move |inner: &Inner| inner.change(guard, |opened| zero(&opened.file, at, len, how));
        self.hop(operation, &range, zero).await.map(drop)
    }

    /// The extents of a range that is not empty, or of a shorter one if there are very many.
    pub(crate) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let range = range(offset, len);
        self.hop(Operation::Extents, &range.clone(), move |inner| inner.extents(range)).await
    }

    /// Makes every change that has returned durable.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.flush_with(sync_data).await
    }

    /// The same by other means. They run one at a time, and not if nothing has changed.
    pub(crate) async fn flush_with(
        &self,
        sync: impl FnOnce(&fs::File) -> std::result::Result<(), Undurable> + Send + 'static,
    ) -> Result<()> {
        if self.0.durability.is_durable() {
            return Ok(());
        }
        let flush = move |inner: &Inner| {
            let sync = || {
                inner.check_not_cut()?;
                sync(&inner.opened.file)
            };
            let fault = |error| inner.opened.fault(Operation::Flush, "cannot make durable", error);
            Ok(inner.durability.make(sync, fault))
        };
        self.hop(Operation::Flush, &(0..self.0.len), flush).await?
    }

    /// Runs `work` on a thread that may wait for the disk.
    async fn hop<T: Send + 'static>(
        &self,
        operation: Operation,
        range: &Range<u64>,
        work: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.0.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result.map_err(|error| self.fault(operation, range, error)),
            Err(lost) if lost.is_panic() => std::panic::resume_unwind(lost.into_panic()),
            Err(_) => Err(Error::new(ErrorKind::Cancelled, operation, "the runtime is shutting down")),
        }
    }

    fn fault(&self, operation: Operation, range: &Range<u64>, error: io::Error) -> Error {
        self.0.opened.fault(operation, "input/output failed", error).at(range.start, range.end - range.start)
    }
}

impl Inner {
    /// Reads what can be had without waiting; answers how much that was.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() && !self.no_read_now.load(Ordering::Relaxed) {
            let at = self.base + offset + done as u64;
            let mut rest = [IoSliceMut::new(&mut buf[done..])];
            match preadv2(&self.opened.file, &mut rest, at, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => self.no_read_now.store(true, Ordering::Relaxed),
                // Not in memory; or an error, which will come again from the thread that may wait.
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Writes what can be written without waiting; answers how much that was.
    fn write_now(&self, offset: u64, buf: &[u8]) -> io::Result<usize> {
        if self.no_write_now.load(Ordering::Relaxed) {
            return Ok(0);
        }
        self.check_not_cut()?;
        self.durability.changed();
        let mut done = 0;
        while done < buf.len() {
            let at = self.base + offset + done as u64;
            match pwritev2(&self.opened.file, &[IoSlice::new(&buf[done..])], at, ReadWriteFlags::NOWAIT) {
                Ok(0) => break,
                Ok(written) => done += written,
                Err(error) => {
                    let never = matches!(error, Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS);
                    self.no_write_now.store(never, Ordering::Relaxed);
                    break;
                }
            }
        }
        self.durability.changed();
        Ok(done)
    }

    /// Makes a change whose caller may be gone, and gives back the guard of its range.
    fn change(&self, guard: RangeGuard, make: impl FnOnce(&Opened) -> io::Result<()>) -> io::Result<RangeGuard> {
        self.check_not_cut()?;
        self.durability.changed();
        let made = make(&self.opened);
        self.durability.changed();
        made.map(|()| guard)
    }

    /// A write behind the end of a file that was cut would make the gap read as zeros.
    fn check_not_cut(&self) -> io::Result<()> {
        self.opened.check_not_cut(self.base + self.len)
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<Extent>> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end && found.len() < MAX_EXTENTS {
            let data = self.next(SeekFrom::Data, at, range.end)?;
            if at < data {
                found.push(Extent { range: at..data, kind: ExtentKind::Hole });
            }
            at = data;
            if data < range.end {
                at = self.next(SeekFrom::Hole, data, range.end)?;
                if data < at {
                    found.push(Extent { range: data..at, kind: ExtentKind::Data });
                }
            }
        }
        // A file that was cut has a hole at its end, too.
        self.check_not_cut()?;
        Ok(found)
    }

    fn next(&self, kind: fn(u64) -> SeekFrom, at: u64, end: u64) -> io::Result<u64> {
        match seek(&self.opened.file, kind(self.base + at)) {
            Ok(position) => Ok((position - self.base).min(end)),
            Err(Errno::NXIO) => Ok(end),
            Err(error) => Err(error.into()),
        }
    }
}

fn range(offset: u64, len: u64) -> Range<u64> {
    offset..offset + len
}

/// Makes a range of a file read as zeros, in the first way that its file system has.
pub(crate) fn zero(file: &fs::File, at: u64, len: u64, how: Zeroing) -> io::Result<()> {
    let release = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    let ways: &[FallocateFlags] = if how == Zeroing::Release { &[release] } else { &[keep, release] };
    for way in ways {
        match fallocate(file, *way, at, len) {
            // EINVAL: a device, and a range that does not keep to its sectors.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
            Err(Errno::INTR) => return zero(file, at, len, how),
            result => return Ok(result?),
        }
    }
    write_zeros(file, at, len)
}

fn write_zeros(file: &fs::File, mut at: u64, len: u64) -> io::Result<()> {
    let end = at + len;
    while at < end {
        let step = (end - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..usize::try_from(step).unwrap_or(ZEROS.len())], at)?;
        at += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use r3map_testkit::faults::cancel_after;

    use super::*;
    use crate::opened::Purpose;

    /// Whoever reads what a change that was given up has left, to store it elsewhere, must not be overtaken by it.
    #[test]
    fn a_change_that_was_given_up_has_happened_when_its_range_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let window = Window::new(Opened::existing(file.path(), Purpose::Write).unwrap(), 0, 8192);
        window.0.no_write_now.store(true, Ordering::Relaxed);
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let (release, released) = mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || released.recv().is_err());
            assert!(cancel_after(1, window.write_at(0, &[1; 4096])).await.is_none());
            let read = |offset| {
                let window = window.clone();
                tokio::spawn(async move {
                    let mut buf = [0; 4096];
                    window.read_at(offset, &mut buf).await.map(|()| buf)
                })
            };
            let reader = read(0);
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            drop(release);
            assert!(busy.await.unwrap());
            assert!(reader.await.unwrap().unwrap() == [1; 4096]);
            assert!(read(4096).await.unwrap().unwrap() == [0; 4096]);
        });
    }

    #[test]
    fn zeros_can_be_written_where_they_cannot_be_made() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let opened = Opened::existing(file.path(), Purpose::Write).unwrap();
        opened.file.write_all_at(&[7; 200_000], 0).unwrap();
        write_zeros(&opened.file, 1, 199_998).unwrap();
        let mut bytes = vec![1; 200_000];
        opened.file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[0] == 7 && bytes[199_999] == 7 && r3map_core::is_zero(&bytes[1..199_999]));
    }
}
