//! Copying one region onto another: many requests in flight, holes kept as holes, and what is already the same left
//! alone if asked.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use futures_util::stream::{FuturesUnordered, StreamExt};
use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Operation, Result, is_zero};
use r3map_pipeline::{Aligned, Retry, RetrySettings};

/// How a copy is made.
#[derive(Debug, Clone)]
pub struct CopySettings {
    /// Read the destination too and write only what differs: costs a read of the destination, and lets a copy that was
    /// stopped go on. Off by default.
    pub skip_same: bool,
    /// Requests in flight; 16 by default. Each holds one buffer (two with `skip_same`) of 1 MiB, or of a chunk where that is
    /// longer.
    pub in_flight: NonZeroUsize,
    /// How long to keep trying a side that does not answer.
    pub retry: RetrySettings,
}

impl Default for CopySettings {
    fn default() -> Self {
        Self {
            skip_same: false,
            in_flight: NonZeroUsize::new(16).expect("16 is not zero"),
            retry: RetrySettings::default(),
        }
    }
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyProgress {
    /// The region's size in bytes.
    pub size: u64,
    /// Bytes that are done, in any of the ways below.
    pub done: u64,
    /// Bytes that were written.
    pub written: u64,
    /// Bytes that were already the same.
    pub same: u64,
    /// Bytes of holes and of zeros that were not sent.
    pub zeroes: u64,
}

/// The length of a request in bytes, where chunks are not longer.
const STEP: u64 = 1 << 20;

/// Copies all of `source` onto `destination`, which must have the same size, and flushes it. `progress` is called after
/// every step. Dropping the future stops the copy; what was written stays.
///
/// # Errors
/// `InvalidInput` if the sizes differ; otherwise the first error of either side.
pub async fn copy(
    source: Arc<dyn Backend>,
    destination: Arc<dyn Backend>,
    settings: CopySettings,
    mut progress: impl FnMut(CopyProgress),
) -> Result<CopyProgress> {
    if source.size() != destination.size() {
        let message = format!("the source has {} bytes, the destination {}", source.size(), destination.size());
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Write, message));
    }
    let patient = |side| any_access(Arc::new(Retry::new(side, settings.retry.clone())?));
    let copy = Copy { source: patient(source)?, destination: patient(destination)?, settings };
    let mut done = CopyProgress { size: copy.source.size(), ..CopyProgress::default() };
    let mut running = FuturesUnordered::new();
    let mut idle = Vec::new();
    let mut at = 0;
    while at < done.size {
        let extent = copy.extent(at).await?;
        at = extent.range.end;
        let mut start = extent.range.start;
        while start < at {
            let range = start..copy.step_end(start, &extent);
            start = range.end;
            if running.len() >= copy.settings.in_flight.get()
                && let Some((step, buffers)) = running.next().await
            {
                idle.push(buffers);
                done.add(step?);
                progress(done);
            }
            running.push(copy.step(range, extent.kind, idle.pop().unwrap_or_default()));
        }
    }
    while let Some((step, _)) = running.next().await {
        done.add(step?);
        progress(done);
    }
    copy.destination.flush().await?;
    Ok(done)
}

fn any_access(backend: Arc<dyn Backend>) -> Result<Arc<dyn Backend>> {
    Ok(match backend.capabilities().access {
        Access::Any => backend,
        Access::WholeChunks(_) => Arc::new(Aligned::new(backend)?),
    })
}

enum Step {
    Written(u64),
    Same(u64),
    Zeroes(u64),
}

impl CopyProgress {
    fn add(&mut self, step: Step) {
        let (count, bytes) = match step {
            Step::Written(bytes) => (&mut self.written, bytes),
            Step::Same(bytes) => (&mut self.same, bytes),
            Step::Zeroes(bytes) => (&mut self.zeroes, bytes),
        };
        *count += bytes;
        self.done += bytes;
    }
}

struct Copy {
    source: Arc<dyn Backend>,
    destination: Arc<dyn Backend>,
    settings: CopySettings,
}

impl Copy {
    /// What the source has at `at`: one run of data or of nothing.
    async fn extent(&self, at: u64) -> Result<Extent> {
        let rest = at..self.source.size();
        match self.source.capabilities().extents {
            Some(extents) => {
                let found = extents.extents(at, rest.end - rest.start).await?;
                let none = || Error::new(ErrorKind::Internal, Operation::Extents, "the source answered with no extent");
                found.into_iter().next().filter(|e| e.range.start == at && e.range.end > at).ok_or_else(none)
            }
            None => Ok(Extent { range: rest, kind: ExtentKind::Data }),
        }
    }

    /// Where a request that starts at `start` ends. Zeros that need not be sent go in larger steps.
    fn step_end(&self, start: u64, extent: &Extent) -> u64 {
        let step = match extent.kind {
            ExtentKind::Hole if !self.settings.skip_same && self.destination.capabilities().write_zeroes.is_some() => {
                1 << 30
            }
            _ => {
                let limit = |backend: &Arc<dyn Backend>| backend.capabilities().max_request.unwrap_or(u64::MAX);
                let chunk = |backend: &Arc<dyn Backend>| {
                    backend.capabilities().preferred_chunk.map_or(STEP, ChunkSize::bytes).max(STEP)
                };
                let whole = chunk(&self.source).max(chunk(&self.destination));
                whole.min(limit(&self.source)).min(limit(&self.destination)).max(1)
            }
        };
        // Up to a border of the step, so that pieces of one chunk do not wait for one another.
        extent.range.end.min((start / step + 1) * step)
    }

    /// Copies a range, and gives the buffers back.
    async fn step(&self, range: Range<u64>, kind: ExtentKind, mut buffers: Buffers) -> (Result<Step>, Buffers) {
        let step = match kind {
            ExtentKind::Hole => self.hole(range, &mut buffers).await,
            ExtentKind::Data => self.data(range, &mut buffers).await,
        };
        (step, buffers)
    }

    async fn hole(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<Step> {
        let len = range.end - range.start;
        if self.is_hole(&range).await? {
            return Ok(Step::Zeroes(len));
        }
        if !self.settings.skip_same // then it is only known to be different once it was read
            && let Some(zeroes) = self.destination.capabilities().write_zeroes
        {
            zeroes.write_zeroes(range.start, len).await?;
            return Ok(Step::Zeroes(len));
        }
        let bytes = part(&mut buffers.bytes, len)?;
        bytes.fill(0);
        self.put(range.start, bytes, &mut buffers.there).await
    }

    async fn data(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<Step> {
        let bytes = part(&mut buffers.bytes, range.end - range.start)?;
        self.source.read_at(range.start, bytes).await?;
        self.put(range.start, bytes, &mut buffers.there).await
    }

    /// Whether the destination already has nothing in all of `range`.
    async fn is_hole(&self, range: &Range<u64>) -> Result<bool> {
        let Some(extents) = self.destination.capabilities().extents else { return Ok(false) };
        let found = extents.extents(range.start, range.end - range.start).await?;
        Ok(matches!(&found[..], [one] if one.kind == ExtentKind::Hole && one.range == *range))
    }

    async fn put(&self, offset: u64, bytes: &[u8], there: &mut Vec<u8>) -> Result<Step> {
        let len = bytes.len() as u64;
        if self.settings.skip_same {
            let there = part(there, len)?;
            self.destination.read_at(offset, there).await?;
            if there == bytes {
                return Ok(Step::Same(len));
            }
        }
        match self.destination.capabilities().write_zeroes {
            Some(zeroes) if is_zero(bytes) => {
                zeroes.write_zeroes(offset, len).await?;
                Ok(Step::Zeroes(len))
            }
            _ => {
                self.destination.write_at(offset, bytes).await?;
                Ok(Step::Written(len))
            }
        }
    }
}

/// What a step reads into. Memory that is new each time costs more than what is done with it.
#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    /// Of the destination.
    there: Vec<u8>,
}

/// The first `len` bytes of a buffer, which grows as it must.
fn part(buffer: &mut Vec<u8>, len: u64) -> Result<&mut [u8]> {
    let len = usize::try_from(len)
        .map_err(|error| Error::new(ErrorKind::InvalidInput, Operation::Read, "too long").with_source(error))?;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    Ok(&mut buffer[..len])
}
