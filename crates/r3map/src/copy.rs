//! Copying one region onto another: many requests in flight, holes kept as holes, and what is already the same left
//! alone if asked.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;

use futures_util::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use r3map_core::{
    Access, Backend, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Geometry, Operation, Result, is_zero,
};
use r3map_pipeline::{Aligned, Retry, RetrySettings};
use tokio::sync::Semaphore;

/// How a copy is made.
#[derive(Debug, Clone)]
pub struct CopySettings {
    /// Read the destination too and write only what differs: costs a read of the destination, and lets a copy that was
    /// stopped go on. Off by default.
    pub skip_same: bool,
    /// Requests in flight, to both sides together; 16 by default. What a side takes only in parts counts as one; that the
    /// source is asked for its holes does not count. There are as many buffers (twice as many with `skip_same`) of 1 MiB, or
    /// of a chunk where that is longer.
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
    let whole_chunks = match destination.capabilities().access {
        Access::WholeChunks(chunk) => Some(Geometry::new(destination.size(), chunk)?),
        Access::Any => None,
    };
    let requests = Semaphore::new(settings.in_flight.get().min(Semaphore::MAX_PERMITS));
    let copy = Copy { source: patient(source)?, destination: patient(destination)?, whole_chunks, requests, settings };
    let mut done = CopyProgress { size: copy.source.size(), ..CopyProgress::default() };
    let mut running = FuturesUnordered::new();
    let mut idle = Vec::new();
    let (mut known, mut at) = (VecDeque::new(), 0);
    while at < done.size {
        let runs = {
            let mut next = pin!(copy.next(&mut known, at));
            loop {
                tokio::select! {
                    biased;
                    runs = &mut next => break runs?,
                    // What is under way goes on: the answer may be behind it on its way from the source.
                    Some((steps, buffers)) = running.next() => {
                        idle.push(buffers);
                        done.add(steps?);
                        progress(done);
                    }
                }
            }
        };
        at = runs.last().map_or(done.size, |run| run.range.end);
        if running.len() >= copy.settings.in_flight.get()
            && let Some((steps, buffers)) = running.next().await
        {
            idle.push(buffers);
            done.add(steps?);
            progress(done);
        }
        running.push(copy.step(runs, idle.pop().unwrap_or_default()));
    }
    while let Some((steps, _)) = running.next().await {
        done.add(steps?);
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
    fn add(&mut self, steps: Vec<Step>) {
        for step in steps {
            let (count, bytes) = match step {
                Step::Written(bytes) => (&mut self.written, bytes),
                Step::Same(bytes) => (&mut self.same, bytes),
                Step::Zeroes(bytes) => (&mut self.zeroes, bytes),
            };
            *count += bytes;
            self.done += bytes;
        }
    }
}

struct Copy {
    source: Arc<dyn Backend>,
    destination: Arc<dyn Backend>,
    /// What the destination writes at once, if it takes nothing else.
    whole_chunks: Option<Geometry>,
    /// One for each request that may be in flight. Nobody waits for one who has one.
    requests: Semaphore,
    settings: CopySettings,
}

impl Copy {
    /// Makes a request as soon as it may be in flight.
    async fn request<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let _permit = self.requests.acquire().await.expect("it is never closed");
        request.await
    }

    /// What the next step is for, from `at` on: one run of data or of nothing, or several that lie in one step. `known`
    /// are the runs that the source has told of and that are not copied yet.
    async fn next(&self, known: &mut VecDeque<Extent>, at: u64) -> Result<Vec<Extent>> {
        let end = self.step_end(at, self.run_at(known, at).await?);
        let (mut at, mut runs) = (at, Vec::<Extent>::new());
        while at < end {
            let run = self.run_at(known, at).await?;
            let (upto, kind) = (run.range.end.min(end), run.kind);
            match runs.last_mut().filter(|last| last.kind == kind) {
                Some(last) => last.range.end = upto,
                None => runs.push(Extent { range: at..upto, kind }),
            }
            run.range.start = upto;
            if run.range.is_empty() {
                known.pop_front();
            }
            at = upto;
        }
        Ok(match &self.whole_chunks {
            Some(geometry) => by_chunks(&runs, geometry),
            None => runs,
        })
    }

    /// The run that begins at `at`.
    async fn run_at<'k>(&self, known: &'k mut VecDeque<Extent>, at: u64) -> Result<&'k mut Extent> {
        if known.is_empty() {
            *known = self.extents(at).await?.into();
        }
        let none = || Error::new(ErrorKind::Internal, Operation::Extents, "the source does not say what it has there");
        known.front_mut().filter(|run| run.range.start == at && run.range.end > at).ok_or_else(none)
    }

    async fn extents(&self, at: u64) -> Result<Vec<Extent>> {
        let rest = at..self.source.size();
        match self.source.capabilities().extents {
            Some(extents) => extents.extents(at, rest.end - rest.start).await,
            None => Ok(vec![Extent { range: rest, kind: ExtentKind::Data }]),
        }
    }

    /// Where a step from `start` on ends. Zeros that need not be sent go in larger ones.
    fn step_end(&self, start: u64, run: &Extent) -> u64 {
        // Up to a border of the step, so that pieces of one chunk do not wait for one another.
        let border = |step: u64| ((start / step + 1) * step).min(self.source.size());
        let able = self.destination.capabilities();
        let end = border(self.longest());
        match run.kind {
            ExtentKind::Hole if run.range.end > end && !self.settings.skip_same && able.write_zeroes.is_some() => {
                let all = run.range.end.min(border(1 << 30));
                // What follows may be data of the same chunk.
                let whole = |geometry: &Geometry| geometry.chunks_range(&geometry.chunks_covered(&(start..all))).end;
                self.whole_chunks.as_ref().map_or(all, whole).min(all).max(end)
            }
            _ => end,
        }
    }

    /// The length of a step in bytes.
    fn longest(&self) -> u64 {
        let limit = |backend: &Arc<dyn Backend>| backend.capabilities().max_request.unwrap_or(u64::MAX);
        let chunk = |backend: &Arc<dyn Backend>| {
            backend.capabilities().preferred_chunk.map_or(STEP, ChunkSize::bytes).max(STEP)
        };
        let whole = chunk(&self.source).max(chunk(&self.destination));
        whole.min(limit(&self.source)).min(limit(&self.destination)).max(1)
    }

    /// Copies what lies side by side, and gives the buffers back.
    async fn step(&self, runs: Vec<Extent>, mut buffers: Buffers) -> (Result<Vec<Step>>, Buffers) {
        let steps = match &runs[..] {
            [Extent { range, kind: ExtentKind::Hole }] => {
                self.hole(range.clone(), &mut buffers).await.map(|one| vec![one])
            }
            runs => self.data(runs, &mut buffers).await,
        };
        (steps, buffers)
    }

    async fn hole(&self, range: Range<u64>, buffers: &mut Buffers) -> Result<Step> {
        let len = range.end - range.start;
        if self.is_hole(&range).await? {
            return Ok(Step::Zeroes(len));
        }
        if !self.settings.skip_same // then it is only known to be different once it was read
            && let Some(zeroes) = self.destination.capabilities().write_zeroes
        {
            self.request(zeroes.write_zeroes(range.start, len)).await?;
            return Ok(Step::Zeroes(len));
        }
        let bytes = part(&mut buffers.bytes, len)?;
        bytes.fill(0);
        let there = self.there(range.start, bytes.len(), &mut buffers.there).await?;
        self.put(range.start, bytes, there).await
    }

    /// Data, perhaps with holes between: with one read of all of it, because a round trip for each piece would take for
    /// ever.
    async fn data(&self, runs: &[Extent], buffers: &mut Buffers) -> Result<Vec<Step>> {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(Vec::new()) };
        let whole = first.range.start..last.range.end;
        let bytes = part(&mut buffers.bytes, whole.end - whole.start)?;
        self.request(self.source.read_at(whole.start, bytes)).await?;
        let (bytes, there) = (&*bytes, self.there(whole.start, bytes.len(), &mut buffers.there).await?);
        // Most often into what is new, and empty.
        let empty = runs.len() > 1 && there.is_none() && self.is_hole(&whole).await?;
        let puts = runs.iter().cloned().map(|run| self.put_run(run, whole.start, bytes, there, empty));
        stream::iter(puts).buffer_unordered(self.settings.in_flight.get()).try_collect().await
    }

    /// Puts one run of those whose bytes begin at `start`; `empty` if the destination has nothing there.
    async fn put_run(&self, run: Extent, start: u64, bytes: &[u8], there: Option<&[u8]>, empty: bool) -> Result<Step> {
        let within = index(run.range.start - start)?..index(run.range.end - start)?;
        let bytes = &bytes[within.clone()];
        // What was a hole when the source told of it may be written since.
        if empty && run.kind == ExtentKind::Hole && is_zero(bytes) {
            return Ok(Step::Zeroes(bytes.len() as u64));
        }
        self.put(run.range.start, bytes, there.map(|there| &there[within])).await
    }

    /// What the destination has in a place, if that is to be left alone where it is the same.
    async fn there<'b>(&self, offset: u64, len: usize, buffer: &'b mut Vec<u8>) -> Result<Option<&'b [u8]>> {
        if !self.settings.skip_same {
            return Ok(None);
        }
        let there = part(buffer, len as u64)?;
        self.request(self.destination.read_at(offset, there)).await?;
        Ok(Some(there))
    }

    /// Whether the destination already has nothing in all of `range`.
    async fn is_hole(&self, range: &Range<u64>) -> Result<bool> {
        let Some(extents) = self.destination.capabilities().extents else { return Ok(false) };
        let found = self.request(extents.extents(range.start, range.end - range.start)).await?;
        Ok(matches!(&found[..], [one] if one.kind == ExtentKind::Hole && one.range == *range))
    }

    async fn put(&self, offset: u64, bytes: &[u8], there: Option<&[u8]>) -> Result<Step> {
        let len = bytes.len() as u64;
        if there == Some(bytes) {
            return Ok(Step::Same(len));
        }
        match self.destination.capabilities().write_zeroes {
            Some(zeroes) if is_zero(bytes) => {
                self.request(zeroes.write_zeroes(offset, len)).await?;
                Ok(Step::Zeroes(len))
            }
            _ => {
                self.request(self.destination.write_at(offset, bytes)).await?;
                Ok(Step::Written(len))
            }
        }
    }
}

/// The same runs, of data wherever a chunk has some: written in parts, it would be read, changed and written for each of them.
fn by_chunks(runs: &[Extent], geometry: &Geometry) -> Vec<Extent> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Vec::new() };
    let (mut at, end) = (first.range.start, last.range.end);
    let hole = |range| Extent { range, kind: ExtentKind::Hole };
    let mut whole = Vec::<Extent>::new();
    for data in runs.iter().filter(|run| run.kind == ExtentKind::Data) {
        let chunks = geometry.chunks_range(&geometry.chunks_touched(&data.range));
        // A step may be of parts of chunks, where requests are short.
        let (start, upto) = (chunks.start.max(at), chunks.end.min(end));
        if start > at {
            whole.push(hole(at..start));
        }
        match whole.last_mut().filter(|last| last.kind == ExtentKind::Data) {
            Some(last) => last.range.end = upto,
            None => whole.push(Extent { range: start..upto, kind: ExtentKind::Data }),
        }
        at = upto;
    }
    if at < end {
        whole.push(hole(at..end));
    }
    whole
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
    let len = index(len)?;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    Ok(&mut buffer[..len])
}

/// A length of something in memory.
fn index(len: u64) -> Result<usize> {
    let too_long = |error| Error::new(ErrorKind::InvalidInput, Operation::Read, "too long").with_source(error);
    usize::try_from(len).map_err(too_long)
}
