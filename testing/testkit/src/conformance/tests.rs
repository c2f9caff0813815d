//! The suite tested: each broken promise is found, by the case that is named after it.

use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{
    BLOCK_SIZE, Capabilities, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Extents, Operation, Piece, ReadMany,
    ReadOp, ReadPieces, Result, Trim, WriteZeroes,
};
use tokio::sync::Semaphore;

use super::*;
use crate::fill;
use crate::store::Store;

const SIZE: u64 = 100_001;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    ReadsLeaveTheTail,
    ReadsPastTheEndAreShort,
    EmptyReadsFail,
    TakesPartsOfChunks,
    TakesLongRequests,
    LosesTheLastByte,
    WritesWholeBlocks,
    WritesHalfOfWhatItRefuses,
    WritesSectorBySector,
    LeaksALockWhenDropped,
    WritesLateWhenDropped,
    LendsPiecesTwice,
    LendsAfterAnError,
    ManyReadsSkipTheBadOnes,
    HolesHoldData,
    ExtentsHaveGaps,
    TrimsWholeBlocks,
    ZeroesNothing,
}

/// A store with a flaw.
struct Broken {
    store: Arc<Store>,
    flaw: Flaw,
    turn: Semaphore,
}

impl Broken {
    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == flaw
    }

    async fn write_slowly(&self, offset: u64, buf: &[u8]) -> Result<()> {
        for (n, sector) in buf.chunks(512).enumerate() {
            self.store.write_at(offset + 512 * n as u64, sector).await?;
        }
        Ok(())
    }

    async fn write_detached(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let (store, bytes) = (self.store.clone(), buf.to_vec());
        let write = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            store.write_at(offset, &bytes).await
        });
        tokio::time::timeout(Duration::from_micros(100), std::future::pending::<()>()).await.unwrap_err();
        write.await.expect("no panic")
    }

    async fn write_whole_blocks(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.store.write_at(offset, buf).await?;
        let end = offset + buf.len() as u64;
        let border = end.next_multiple_of(BLOCK_SIZE).min(SIZE);
        self.store.write_at(end, &vec![0; usize::try_from(border - end).unwrap()]).await
    }
}

#[async_trait]
impl Backend for Broken {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let access = match self.flaw {
            Flaw::TakesPartsOfChunks => Access::WholeChunks(ChunkSize::MIN),
            _ => Access::Any,
        };
        let max_request = self.has(Flaw::TakesLongRequests).then_some(10_000);
        Capabilities {
            access,
            max_request,
            pieces: Some(self),
            read_many: Some(self),
            trim: Some(self),
            write_zeroes: Some(self),
            extents: Some(self),
            ..Capabilities::default()
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        match self.flaw {
            Flaw::ReadsLeaveTheTail if buf.len() > 4096 => self.store.read_at(offset, &mut buf[..4096]).await,
            Flaw::ReadsPastTheEndAreShort if offset < SIZE => {
                let len = buf.len().min(usize::try_from(SIZE - offset).unwrap());
                self.store.read_at(offset, &mut buf[..len]).await
            }
            Flaw::EmptyReadsFail if buf.is_empty() => {
                Err(Error::new(ErrorKind::InvalidInput, Operation::Read, "nothing to read"))
            }
            _ => self.store.read_at(offset, buf).await,
        }
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let end = offset.saturating_add(buf.len() as u64);
        match self.flaw {
            Flaw::LosesTheLastByte if end == SIZE && !buf.is_empty() => {
                self.store.write_at(offset, &buf[..buf.len() - 1]).await
            }
            Flaw::WritesWholeBlocks if end <= SIZE => self.write_whole_blocks(offset, buf).await,
            Flaw::WritesHalfOfWhatItRefuses if offset < SIZE && end > SIZE => {
                self.store.write_at(offset, &buf[..usize::try_from(SIZE - offset).unwrap()]).await?;
                self.store.write_at(offset, buf).await
            }
            Flaw::WritesSectorBySector if end <= SIZE => self.write_slowly(offset, buf).await,
            Flaw::WritesLateWhenDropped if end <= SIZE => self.write_detached(offset, buf).await,
            Flaw::LeaksALockWhenDropped => {
                self.turn.acquire().await.expect("never closed").forget();
                let result = self.store.write_at(offset, buf).await;
                self.turn.add_permits(1);
                result
            }
            _ => self.store.write_at(offset, buf).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        self.store.flush().await
    }
}

#[async_trait]
impl ReadPieces for Broken {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let flaw = self.flaw;
        let mut lend = |at: u64, piece: Piece<'_>| match flaw {
            Flaw::LendsPiecesTwice => visit(at, piece).and_then(|()| visit(at, piece)),
            Flaw::LendsAfterAnError => visit(at, piece).or_else(|_| visit(at, piece)),
            _ => visit(at, piece),
        };
        self.store.capabilities().pieces.unwrap().read_pieces(offset, len, &mut lend).await
    }
}

#[async_trait]
impl ReadMany for Broken {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        for read in reads {
            let result = self.store.read_at(read.offset, read.buf).await;
            if !self.has(Flaw::ManyReadsSkipTheBadOnes) {
                result?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Trim for Broken {
    async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        let trim = self.store.capabilities().trim.unwrap();
        trim.trim(offset, len).await?;
        let start = offset - offset % BLOCK_SIZE;
        if self.has(Flaw::TrimsWholeBlocks) { trim.trim(start, offset - start).await } else { Ok(()) }
    }
}

#[async_trait]
impl WriteZeroes for Broken {
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let len = if self.has(Flaw::ZeroesNothing) && offset.saturating_add(len) <= SIZE { 0 } else { len };
        self.store.capabilities().write_zeroes.unwrap().write_zeroes(offset, len).await
    }
}

#[async_trait]
impl Extents for Broken {
    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut extents = self.store.capabilities().extents.unwrap().extents(offset, len).await?;
        match self.flaw {
            Flaw::HolesHoldData => extents.iter_mut().for_each(|extent| extent.kind = ExtentKind::Hole),
            Flaw::ExtentsHaveGaps => extents.iter_mut().for_each(|extent| extent.range.start += 1),
            _ => {}
        }
        Ok(extents)
    }
}

#[tokio::test(start_paused = true)]
async fn each_flaw_is_found_by_its_case() {
    let flaws = [
        (Flaw::ReadsLeaveTheTail, "what_is_there_can_be_read_in_any_request"),
        (Flaw::ReadsPastTheEndAreShort, "past_the_end_is_refused"),
        (Flaw::EmptyReadsFail, "nothing_is_no_request"),
        (Flaw::TakesPartsOfChunks, "parts_of_chunks_are_refused"),
        (Flaw::TakesLongRequests, "long_requests_are_refused"),
        (Flaw::LosesTheLastByte, "the_last_byte_counts"),
        (Flaw::WritesWholeBlocks, "a_write_changes_nothing_else"),
        (Flaw::WritesHalfOfWhatItRefuses, "a_refused_write_changes_nothing"),
        (Flaw::WritesSectorBySector, "writes_that_overlap_leave_whole_blocks"),
        (Flaw::LeaksALockWhenDropped, "a_cancelled_write_leaves_no_lock"),
        (Flaw::WritesLateWhenDropped, "a_cancelled_write_never_lands_late"),
        (Flaw::LendsPiecesTwice, "pieces_are_consecutive_and_right"),
        (Flaw::LendsAfterAnError, "pieces_stop_at_the_first_error"),
        (Flaw::ManyReadsSkipTheBadOnes, "many_reads_with_a_bad_one_fail"),
        (Flaw::HolesHoldData, "holes_read_as_zeros"),
        (Flaw::ExtentsHaveGaps, "extents_tile_what_was_asked"),
        (Flaw::TrimsWholeBlocks, "trimmed_bytes_read_as_zeros"),
        (Flaw::ZeroesNothing, "zeroed_bytes_read_as_zeros"),
    ];
    for (flaw, case) in flaws {
        let store = || Arc::new(Store::new(SIZE));
        let make = async || Arc::new(Broken { store: store(), flaw, turn: Semaphore::new(1) }) as Arc<dyn Backend>;
        let run = AssertUnwindSafe(backend(make)).catch_unwind().await;
        let Err(panic) = run else { panic!("{flaw:?} must be found") };
        let message = panic_message(&*panic);
        assert!(message.contains(&format!("\n{case}: ")), "{flaw:?} must break {case}, not only: {message}");
    }
}

#[tokio::test]
async fn the_wrong_entrance_and_the_wrong_seed_are_noticed() {
    let make = async || Arc::new(Store::new(SIZE).filled(1).read_only()) as Arc<dyn Backend>;
    assert!(AssertUnwindSafe(backend(make)).catch_unwind().await.is_err(), "it is tested with `filled`");
    let wrong_seed = AssertUnwindSafe(filled(make, 2)).catch_unwind().await;
    assert!(panic_message(&*wrong_seed.unwrap_err()).contains("what_is_there_can_be_read"));
}

/// Opens a region whose last user lost power.
async fn reopened(store: &Store, region: &Arc<dyn Backend>) -> Arc<dyn Backend> {
    store.lose_unflushed();
    region.clone()
}

#[tokio::test]
async fn a_flush_that_does_nothing_is_noticed() {
    let store = Arc::new(Store::new(SIZE).volatile_cache());
    let region: Arc<dyn Backend> = store.clone();
    durable(async || reopened(&store, &region).await).await;
    fill::check(&store.snapshot(), 0, 3).unwrap();

    let store = Arc::new(Store::new(SIZE).volatile_cache());
    let region: Arc<dyn Backend> = Arc::new(Lazy(store.clone()));
    let lazy = AssertUnwindSafe(durable(async || reopened(&store, &region).await)).catch_unwind().await;
    assert!(lazy.is_err());
}

/// Says that it has flushed.
struct Lazy(Arc<Store>);

#[async_trait]
impl Backend for Lazy {
    fn size(&self) -> u64 {
        self.0.size()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.0.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}
