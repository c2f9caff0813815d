//! Arbitrary reads and writes over a backend that takes only whole chunks, or only short requests.
//!
//! Parts of chunks are read into a buffer; they are written by reading the chunk, changing it and writing it back, under
//! a lock on that chunk. Whole chunks go straight through, without a copy. The parts of one request run at once.
//!
//! It keeps nothing: each part of a chunk costs a request for the whole chunk. Whoever reads or writes the same chunk
//! often wants the cached stage instead.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use r3map_core::{
    Access, Backend, Capabilities, ChunkSize, Geometry, Operation, Piece, RangeGuard, RangeLock, ReadMany, ReadOp,
    ReadPieces, Result, Trim, WriteZeroes, check_range,
};

use crate::DECLARED;

/// How many parts of one request are under way at once.
const AT_ONCE: usize = 16;
/// How many bytes of unused buffers are kept, if that is at least one.
const SPARE: usize = 4 << 20;

/// A backend that takes any request, over one that does not; over one that does, it changes nothing.
///
/// Beyond what the backend inside does, two things follow from changing whole chunks: a part of a chunk costs a read
/// and a write of the chunk; and a write that fails, or is dropped, on its way out leaves undefined what the backend
/// inside leaves undefined, which is the whole of each chunk that it touched. As long as that is a mixture of old and
/// new bytes, which holds for every backend of this workspace, bytes that were not written stay what they were.
pub struct Aligned {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
    /// Whether parts of chunks are refused inside.
    whole: bool,
    /// The longest request inside in bytes; a number of whole chunks where only these are taken.
    longest: u64,
    changing: RangeLock,
    spare: Spare,
}

/// A part of a request: what one request inside can do.
enum Part {
    /// This range, as it is.
    Direct(Range<u64>),
    /// This range, inside this chunk.
    Within(Range<u64>, Range<u64>),
}

impl Part {
    fn range(&self) -> &Range<u64> {
        match self {
            Self::Direct(range) | Self::Within(range, _) => range,
        }
    }

    /// What is asked inside.
    fn request(&self) -> &Range<u64> {
        match self {
            Self::Direct(range) | Self::Within(_, range) => range,
        }
    }
}

impl Aligned {
    /// Wraps `inner`, and asks it only for what it declares to take.
    ///
    /// # Errors
    /// `InvalidInput` if the size of `inner` is no region's, as [`Geometry::new`].
    pub fn new(inner: Arc<dyn Backend>) -> Result<Self> {
        let capabilities = inner.capabilities();
        let (whole, chunk) = match capabilities.access {
            Access::WholeChunks(chunk) => (true, chunk),
            Access::Any => (false, ChunkSize::MIN),
        };
        let longest = capabilities.max_request.unwrap_or(u64::MAX);
        let longest = if whole { chunk.round_down(longest).max(chunk.bytes()) } else { longest.max(1) };
        let geometry = Geometry::new(inner.size(), chunk)?;
        let (changing, spare) = (RangeLock::new(), Spare::new(chunk));
        Ok(Self { inner, geometry, whole, longest, changing, spare })
    }

    /// The first part of a range that is not empty.
    fn first_part(&self, range: &Range<u64>) -> Part {
        let longest = range.start.saturating_add(self.longest);
        if !self.whole {
            return Part::Direct(range.start..range.end.min(longest));
        }
        let chunk = self.geometry.chunk_range(self.geometry.chunk_at(range.start));
        if chunk.start < range.start || chunk.end > range.end {
            return Part::Within(range.start..chunk.end.min(range.end), chunk);
        }
        let covered = self.geometry.chunks_range(&self.geometry.chunks_covered(range));
        Part::Direct(range.start..covered.end.min(longest))
    }

    fn parts(&self, mut range: Range<u64>) -> impl Iterator<Item = Part> {
        std::iter::from_fn(move || {
            let part = (!range.is_empty()).then(|| self.first_part(&range))?;
            range.start = part.range().end;
            Some(part)
        })
    }

    async fn read_part(&self, part: Part, buf: &mut [u8]) -> Result<()> {
        match part {
            Part::Direct(range) => self.inner.read_at(range.start, buf).await,
            Part::Within(range, chunk) => {
                let mut whole = self.spare.take(len(&chunk));
                self.inner.read_at(chunk.start, &mut whole).await?;
                buf.copy_from_slice(&whole[within(&range, &chunk)]);
                Ok(())
            }
        }
    }

    async fn write_part(&self, part: Part, buf: &[u8]) -> Result<()> {
        let _changing = self.lock(part.request()).await;
        match part {
            Part::Direct(range) => self.inner.write_at(range.start, buf).await,
            Part::Within(range, chunk) => {
                let mut whole = self.spare.take(len(&chunk));
                self.inner.read_at(chunk.start, &mut whole).await?;
                whole[within(&range, &chunk)].copy_from_slice(buf);
                self.inner.write_at(chunk.start, &whole).await
            }
        }
    }

    /// Keeps others from changing the chunks that `range` touches, where some change more than they were asked to.
    async fn lock(&self, range: &Range<u64>) -> Option<RangeGuard> {
        if !self.whole {
            return None;
        }
        let chunks = self.geometry.chunks_range(&self.geometry.chunks_touched(range));
        Some(self.changing.lock(chunks).await)
    }
}

fn len(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("a part of a request in memory fits into memory")
}

/// Where in the bytes of `outer` those of `range` are.
fn within(range: &Range<u64>, outer: &Range<u64>) -> Range<usize> {
    len(&(outer.start..range.start))..len(&(outer.start..range.end))
}

#[async_trait]
impl Backend for Aligned {
    fn size(&self) -> u64 {
        self.geometry.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let inner = self.inner.capabilities();
        let chunk = self.whole.then(|| self.geometry.chunk_size());
        Capabilities {
            access: Access::Any,
            max_request: None,
            preferred_chunk: inner.preferred_chunk.or(chunk),
            pieces: inner.pieces.map(|_| self as _),
            read_many: inner.read_many.map(|_| self as _),
            trim: inner.trim.map(|_| self as _),
            write_zeroes: inner.write_zeroes.map(|_| self as _),
            ..inner
        }
    }

    async fn read_at(&self, offset: u64, mut buf: &mut [u8]) -> Result<()> {
        check_range(Operation::Read, self.size(), offset, buf.len() as u64)?;
        let range = offset..offset + buf.len() as u64;
        let mut parts = self.parts(range.clone());
        let Some(first) = parts.next() else { return Ok(()) };
        if *first.range() == range {
            return self.read_part(first, buf).await;
        }
        let mut reads = Vec::new();
        for part in std::iter::once(first).chain(parts) {
            let (head, tail) = buf.split_at_mut(len(part.range()));
            reads.push((part, head));
            buf = tail;
        }
        let reads = stream::iter(reads).map(Ok);
        reads.try_for_each_concurrent(AT_ONCE, |(part, buf)| self.read_part(part, buf)).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        check_range(Operation::Write, self.size(), offset, buf.len() as u64)?;
        let range = offset..offset + buf.len() as u64;
        let mut parts = self.parts(range.clone());
        let Some(first) = parts.next() else { return Ok(()) };
        if *first.range() == range {
            return self.write_part(first, buf).await;
        }
        let writes = stream::iter(std::iter::once(first).chain(parts)).map(|part| {
            let bytes = &buf[within(part.range(), &range)];
            Ok((part, bytes))
        });
        writes.try_for_each_concurrent(AT_ONCE, |(part, bytes)| self.write_part(part, bytes)).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[async_trait]
impl ReadPieces for Aligned {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        check_range(Operation::Read, self.size(), offset, len)?;
        let pieces = self.inner.capabilities().pieces.expect(DECLARED);
        for part in self.parts(offset..offset + len) {
            let request = part.request();
            let mut lend =
                |at: u64, piece: Piece<'_>| piece.cut(at, part.range()).map_or(Ok(()), |(at, piece)| visit(at, piece));
            pieces.read_pieces(request.start, request.end - request.start, &mut lend).await?;
        }
        Ok(())
    }
}

/// Where the bytes of one part come from: the caller's own buffer, or a buffer for the chunk around it.
enum Target<'a> {
    Direct(u64, &'a mut [u8]),
    Within(Range<u64>, Range<u64>, Spared<'a>, &'a mut [u8]),
}

impl<'a> Target<'a> {
    fn read(&mut self) -> ReadOp<'_> {
        match self {
            Self::Direct(offset, buf) => ReadOp { offset: *offset, buf },
            Self::Within(_, chunk, whole, _) => ReadOp { offset: chunk.start, buf: whole },
        }
    }

    fn finish(self) {
        if let Self::Within(range, chunk, whole, buf) = self {
            buf.copy_from_slice(&whole[within(&range, &chunk)]);
        }
    }
}

impl Aligned {
    fn targets<'a>(&'a self, offset: u64, mut buf: &'a mut [u8], targets: &mut Vec<Target<'a>>) {
        for part in self.parts(offset..offset + buf.len() as u64) {
            let (head, tail) = std::mem::take(&mut buf).split_at_mut(len(part.range()));
            buf = tail;
            targets.push(match part {
                Part::Direct(range) => Target::Direct(range.start, head),
                Part::Within(range, chunk) => {
                    let whole = self.spare.take(len(&chunk));
                    Target::Within(range, chunk, whole, head)
                }
            });
        }
    }
}

#[async_trait]
impl ReadMany for Aligned {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        let many = self.inner.capabilities().read_many.expect(DECLARED);
        for read in &*reads {
            check_range(Operation::Read, self.size(), read.offset, read.buf.len() as u64)?;
        }
        let mut targets = Vec::with_capacity(reads.len());
        reads.iter_mut().for_each(|read| self.targets(read.offset, read.buf, &mut targets));
        many.read_many(&mut targets.iter_mut().map(Target::read).collect::<Vec<_>>()).await?;
        targets.into_iter().for_each(Target::finish);
        Ok(())
    }
}

#[async_trait]
impl Trim for Aligned {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::Trim, self.size(), offset, len)?;
        let trim = self.inner.capabilities().trim.expect(DECLARED);
        let _changing = self.lock(&(offset..offset + len)).await;
        trim.trim(offset, len).await
    }
}

#[async_trait]
impl WriteZeroes for Aligned {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        check_range(Operation::WriteZeroes, self.size(), offset, len)?;
        let zeroing = self.inner.capabilities().write_zeroes.expect(DECLARED);
        let _changing = self.lock(&(offset..offset + len)).await;
        zeroing.write_zeroes(offset, len).await
    }
}

/// Buffers for chunks, kept for the next one to need one.
struct Spare {
    buffers: Mutex<Vec<Vec<u8>>>,
    chunk: ChunkSize,
}

impl Spare {
    fn new(chunk: ChunkSize) -> Self {
        Self { buffers: Mutex::default(), chunk }
    }

    fn take(&self, len: usize) -> Spared<'_> {
        let buffer = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let buffer = buffer.unwrap_or_else(|| vec![0; self.chunk.len()]);
        Spared { buffer, len, spare: self }
    }
}

/// A buffer of the length of a chunk, of which the last may be shorter. Holds whatever its last user left.
struct Spared<'a> {
    buffer: Vec<u8>,
    len: usize,
    spare: &'a Spare,
}

impl Deref for Spared<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Spared<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Spared<'_> {
    fn drop(&mut self) {
        let mut buffers = self.spare.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.is_empty() || (buffers.len() + 1) * self.buffer.len() <= SPARE {
            buffers.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use r3map_core::{Error, ErrorKind};
    use r3map_testkit::faults::{Faults, Link, Pause, Rule};
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, fill, model};

    use super::*;

    const CHUNK: u64 = 8192;
    const SIZE: u64 = 300_001;

    fn chunks() -> Store {
        Store::new(SIZE).whole_chunks(ChunkSize::new(CHUNK).unwrap())
    }

    fn aligned(inner: Arc<dyn Backend>) -> Arc<Aligned> {
        Arc::new(Aligned::new(inner).unwrap())
    }

    async fn check(backend: &dyn Backend, range: Range<u64>, seed: u64) {
        let mut buf = vec![0; len(&range)];
        backend.read_at(range.start, &mut buf).await.unwrap();
        fill::check(&buf, range.start, seed).unwrap();
    }

    async fn write(backend: &dyn Backend, range: Range<u64>, seed: u64) -> Result<()> {
        backend.write_at(range.start, &fill::bytes(range.start, len(&range), seed)).await
    }

    #[tokio::test]
    async fn conforms() {
        conformance::backend(async || aligned(Arc::new(chunks())) as _).await;
        conformance::backend(async || aligned(Arc::new(chunks().plain().max_request(3 * CHUNK + 5))) as _).await;
        conformance::backend(async || aligned(Arc::new(Store::new(SIZE).max_request(1000))) as _).await;
        let tiny = || Store::new(3).whole_chunks(ChunkSize::MIN);
        conformance::backend(async || aligned(Arc::new(tiny())) as _).await;
        conformance::filled(async || aligned(Arc::new(chunks().filled(3).read_only())) as _, 3).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn conforms_in_parallel() {
        conformance::backend(async || aligned(Arc::new(chunks().max_request(2 * CHUNK))) as _).await;
    }

    #[tokio::test]
    async fn agrees_with_the_model() {
        let settings = model::Settings { at_once: 8, ..model::Settings::default() };
        model::check(async || aligned(Arc::new(chunks())) as _, settings.clone()).await;
        model::check(async || aligned(Arc::new(chunks().max_request(3 * CHUNK))) as _, settings).await;
    }

    #[tokio::test]
    async fn whole_chunks_go_straight_through() {
        let faults = Faults::new(Arc::new(chunks()));
        let aligned = aligned(faults.clone());
        write(&*aligned, CHUNK..3 * CHUNK, 1).await.unwrap();
        check(&*aligned, CHUNK..3 * CHUNK, 1).await;
        // The last chunk is short, and whole.
        write(&*aligned, 36 * CHUNK..SIZE, 1).await.unwrap();
        let ranges: Vec<_> = faults.calls().into_iter().flat_map(|call| call.ranges).collect();
        assert_eq!(ranges, [CHUNK..3 * CHUNK, CHUNK..3 * CHUNK, 36 * CHUNK..SIZE]);
    }

    #[tokio::test(start_paused = true)]
    async fn parts_of_one_request_run_at_once() {
        let delay = Duration::from_millis(10);
        let aligned = aligned(Link::new(Arc::new(chunks().max_request(CHUNK)), delay, None));
        let start = tokio::time::Instant::now();
        check_zero(&*aligned, 5..10 * CHUNK + 5).await;
        assert!(start.elapsed() < 2 * delay, "{:?}", start.elapsed());
        write(&*aligned, 5..10 * CHUNK + 5, 1).await.unwrap();
        assert!(start.elapsed() < 4 * delay, "a read and a write each: {:?}", start.elapsed());
    }

    async fn check_zero(backend: &dyn Backend, range: Range<u64>) {
        let mut buf = vec![1; len(&range)];
        backend.read_at(range.start, &mut buf).await.unwrap();
        assert!(r3map_core::is_zero(&buf));
    }

    /// A part of a chunk is being changed; a write of the whole chunk must not be undone by what was read before it.
    #[tokio::test]
    async fn a_change_of_a_part_undoes_nothing() {
        let faults = Faults::new(Arc::new(chunks()));
        let aligned = aligned(faults.clone());
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Read).times(1).hold_after(&pause));
        let part = {
            let aligned = aligned.clone();
            tokio::spawn(async move { write(&*aligned, 10..20, 1).await })
        };
        pause.wait_held(1).await;
        let mut whole = Box::pin(write(&*aligned, 0..CHUNK, 2));
        assert!(futures_util::poll!(whole.as_mut()).is_pending(), "it waits for the part");
        let trim = aligned.capabilities().trim.unwrap();
        let mut zeros = Box::pin(trim.trim(30, 5));
        assert!(futures_util::poll!(zeros.as_mut()).is_pending(), "so does a trim");
        // Another chunk is not disturbed.
        write(&*aligned, CHUNK + 1..CHUNK + 2, 3).await.unwrap();
        pause.release();
        part.await.unwrap().unwrap();
        whole.await.unwrap();
        zeros.await.unwrap();
        check(&*aligned, 0..30, 2).await;
        check_zero(&*aligned, 30..35).await;
        check(&*aligned, 35..CHUNK, 2).await;
    }

    #[tokio::test]
    async fn a_dropped_change_leaves_the_neighbours_and_no_lock() {
        let faults = Faults::new(Arc::new(chunks().filled(1)));
        let aligned = aligned(faults.clone());
        faults.add(Rule::on(Operation::Write).times(1).hang());
        let hanging = tokio::time::timeout(Duration::from_millis(5), write(&*aligned, 100..200, 2));
        assert!(hanging.await.is_err());
        write(&*aligned, 300..400, 3).await.unwrap();
        check(&*aligned, 0..300, 1).await;
        check(&*aligned, 300..400, 3).await;
        check(&*aligned, 400..SIZE, 1).await;
    }

    #[tokio::test]
    async fn a_chunk_that_cannot_be_read_is_not_written() {
        let faults = Faults::new(Arc::new(chunks().filled(1)));
        let aligned = aligned(faults.clone());
        for fault in [Rule::on(Operation::Read).fail(ErrorKind::Corrupt), Rule::on(Operation::Read).short(9)] {
            faults.add(fault);
            let error: Error = write(&*aligned, 100..200, 2).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            faults.clear();
        }
        assert_eq!(faults.count(Operation::Write), 0);
        check(&*aligned, 0..SIZE, 1).await;
    }

    #[tokio::test]
    async fn many_reads_are_one_round_trip() {
        let faults = Faults::new(Arc::new(chunks().filled(1)));
        let aligned = aligned(faults.clone());
        let (mut a, mut b) = (vec![0; 20_000], vec![0; 1]);
        let mut reads = [ReadOp { offset: 5, buf: &mut a }, ReadOp { offset: SIZE - 1, buf: &mut b }];
        aligned.capabilities().read_many.unwrap().read_many(&mut reads).await.unwrap();
        assert_eq!(faults.calls().len(), 1);
        fill::check(&a, 5, 1).unwrap();
        fill::check(&b, SIZE - 1, 1).unwrap();
    }
}
