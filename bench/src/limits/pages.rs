//! Bare userfaultfd: one thread that fills pages, a handler that answers a fault with one page, a scan for written
//! pages.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use r3map_sys::{Event, Install, Mapping, PAGE_SIZE, Pager, Protection, ScopeWanted, Woken, Zeroed};

use crate::limits::memory::PAGE;

/// Pages that are filled by one `UFFDIO_COPY`.
const STEP: usize = 64 << 10;

/// Fresh memory of `size` bytes, registered for missing pages and for tracking of writes.
pub(crate) fn mapping(size: u64) -> Result<Mapping> {
    Mapping::new(size, Protection::Tracked, ScopeWanted::Widest).context("userfaultfd")
}

/// Fills all of a mapping from `source`, 64 KiB at a time, in one thread.
pub(crate) fn fill(mapping: &Mapping, source: &[u8]) -> Result<()> {
    for (step, bytes) in source.chunks(STEP).enumerate() {
        mapping.pager().install((step * STEP) as u64, bytes, Install::Clean).context("UFFDIO_COPY")?;
    }
    Ok(())
}

/// Finds the pages that were written, and how many they are; starts afresh for them.
pub(crate) fn scan(pager: &Pager) -> Result<u64> {
    let mut pages = 0;
    pager
        .collect(0..pager.len(), &mut |run| pages += (run.end - run.start).div_ceil(PAGE_SIZE))
        .context("PAGEMAP_SCAN")?;
    Ok(pages)
}

/// The least that answers a fault: a thread that polls, reads and copies one page.
pub(crate) struct Handler {
    stop: Arc<Event>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Handler {
    /// Serves the faults of `mapping` from `source`.
    pub(crate) fn start(mapping: &Mapping, source: Arc<Zeroed>) -> Result<Self> {
        let (pager, stop) = (mapping.pager().clone(), Arc::new(Event::new()?));
        let stopped = stop.clone();
        let serve = move || {
            let (mut faults, source) = (Vec::new(), source.as_slice());
            while pager.wait(&stopped, &mut faults)? == Woken::Faults {
                for fault in &faults {
                    let start = usize::try_from(fault.offset).map_err(std::io::Error::other)?;
                    let page = &source[start..source.len().min(start + PAGE)];
                    pager.install(fault.offset, page, Install::Clean)?;
                }
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("bare-faults".into()).spawn(serve)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it.
    ///
    /// # Errors
    /// What it could not do while it ran.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.stop.raise();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => Ok(outcome?),
            _ => anyhow::bail!("the bare fault handler panicked"),
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.stop.raise();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::memory::huge_pages;

    #[test]
    fn filled_pages_hold_the_source_and_are_clean() {
        let source = r3map_testkit::fill::bytes(0, 200_000, 1);
        let mut mapping = mapping(200_000).unwrap();
        fill(&mapping, &source).unwrap();
        assert_eq!(mapping.as_slice(), source);
        assert_eq!(scan(mapping.pager()).unwrap(), 0);
        mapping.as_mut_slice().unwrap()[199_999] = 0;
        assert_eq!(scan(mapping.pager()).unwrap(), 1);
    }

    #[test]
    fn the_handler_answers_faults() {
        let source = Arc::new(huge_pages(&r3map_testkit::fill::bytes(0, 200_000, 2)).unwrap());
        let mapping = mapping(200_000).unwrap();
        let handler = Handler::start(&mapping, source.clone()).unwrap();
        assert_eq!(mapping.as_slice(), source.as_slice());
        handler.stop().unwrap();
    }
}
