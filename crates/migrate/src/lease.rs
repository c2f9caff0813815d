//! How long a leecher that copies may be silent: its signs of life, of which each of its reads is one. And how much was
//! read, by whomever. Whoever has the regions no more is not read for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Piece, ReadMany, ReadOp, ReadPieces, Result};
use tokio::time::Instant;

use crate::protocol::MigrationId;
use crate::seat;

/// When a leecher was last heard of.
#[derive(Debug)]
pub(crate) struct Pulse {
    began: Instant,
    readers: Mutex<Readers>,
    /// Nanoseconds after it began.
    last: AtomicU64,
    /// Bytes.
    read: AtomicU64,
}

/// Who reads.
#[derive(Debug, Clone, Copy)]
struct Readers {
    /// Whose signs of life count.
    holder: Option<MigrationId>,
    /// Who was the last one.
    last: MigrationId,
    /// From whom the regions were taken back.
    revoked: Option<MigrationId>,
}

impl Pulse {
    pub(crate) fn new() -> Self {
        let readers = Readers { holder: None, last: MigrationId::NONE, revoked: None };
        Self { began: Instant::now(), readers: Mutex::new(readers), last: AtomicU64::new(0), read: AtomicU64::new(0) }
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is `holder` that has the lease from now on.
    pub(crate) fn hold(&self, holder: Option<MigrationId>) {
        let mut readers = self.readers();
        (readers.holder, readers.last) = (holder, holder.unwrap_or(readers.last));
        drop(readers);
        self.beat();
    }

    /// Who has the lease, or had it last.
    pub(crate) fn last(&self) -> MigrationId {
        self.readers().last
    }

    /// The regions were taken back from whoever reads for this migration.
    pub(crate) fn revoke(&self, from: Option<MigrationId>) {
        self.readers().revoked = from;
    }

    /// From whom they were.
    pub(crate) fn revoked(&self) -> Option<MigrationId> {
        self.readers().revoked
    }

    /// Whoever reads for `id` is there.
    ///
    /// # Errors
    /// `Conflict` if it has the regions no more.
    pub(crate) fn heard(&self, id: MigrationId) -> Result<()> {
        let Readers { holder, revoked, .. } = *self.readers();
        if holder == Some(id) {
            self.beat();
        }
        if revoked == Some(id) { Err(seat::revoked()) } else { Ok(()) }
    }

    /// It is there.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.fetch_max(now, Ordering::Relaxed);
    }

    /// For how long it has been silent.
    pub(crate) fn silence(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_nanos(self.last.load(Ordering::Relaxed)))
    }

    /// How many bytes it has read.
    pub(crate) fn read_bytes(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn count(&self, bytes: u64) {
        self.read.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A region whose reads are counted.
pub(crate) struct Counted {
    pub(crate) inner: Arc<dyn Backend>,
    pub(crate) pulse: Arc<Pulse>,
}

/// What the inner backend declares is there.
const DECLARED: &str = "an ability that was declared is there";

#[async_trait]
impl Backend for Counted {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        let inner = self.inner.capabilities();
        Capabilities { pieces: inner.pieces.map(|_| self as _), read_many: inner.read_many.map(|_| self as _), ..inner }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf).await?;
        self.pulse.count(buf.len() as u64);
        Ok(())
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[async_trait]
impl ReadPieces for Counted {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        self.inner.capabilities().pieces.expect(DECLARED).read_pieces(offset, len, visit).await?;
        self.pulse.count(len);
        Ok(())
    }
}

#[async_trait]
impl ReadMany for Counted {
    async fn read_many(&self, reads: &mut [ReadOp<'_>]) -> Result<()> {
        self.inner.capabilities().read_many.expect(DECLARED).read_many(reads).await?;
        self.pulse.count(reads.iter().map(|read| read.buf.len() as u64).sum());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, model};

    use super::*;

    #[tokio::test]
    async fn conforms() {
        let counted =
            |store| Arc::new(Counted { inner: Arc::new(store), pulse: Arc::new(Pulse::new()) }) as Arc<dyn Backend>;
        conformance::backend(async || counted(Store::new(100_001))).await;
        conformance::filled(async || counted(Store::new(100_001).filled(2).read_only()), 2).await;
        model::check(async || counted(Store::new(100_001)), model::Settings::default()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn only_who_holds_the_lease_is_heard() {
        let (pulse, holder, other) = (Pulse::new(), MigrationId([1; 16]), MigrationId([2; 16]));
        let silent = Duration::from_secs(7);
        pulse.hold(Some(holder));
        tokio::time::sleep(silent).await;
        pulse.heard(other).unwrap();
        assert_eq!(pulse.silence(), silent, "that is somebody else");
        pulse.heard(holder).unwrap();
        assert_eq!(pulse.silence(), Duration::ZERO);
        pulse.hold(None);
        tokio::time::sleep(silent).await;
        pulse.heard(holder).unwrap();
        assert_eq!(pulse.silence(), silent, "it holds it no more");
        pulse.revoke(Some(holder));
        assert!(pulse.heard(holder).is_err() && pulse.heard(other).is_ok());
    }

    #[tokio::test]
    async fn every_way_to_read_is_counted_and_failures_are_not() {
        let pulse = Arc::new(Pulse::new());
        let counted = Counted { inner: Arc::new(Store::new(10_000)), pulse: pulse.clone() };
        counted.read_at(0, &mut [0; 100]).await.unwrap();
        counted.read_at(9_999, &mut [0; 2]).await.unwrap_err();
        let able = counted.capabilities();
        able.pieces.expect("a store has pieces").read_pieces(5, 1_000, &mut |_, _| Ok(())).await.unwrap();
        let (mut one, mut two) = ([0; 10], [0; 20]);
        let mut reads = [ReadOp { offset: 0, buf: &mut one }, ReadOp { offset: 50, buf: &mut two }];
        able.read_many.expect("a store reads many").read_many(&mut reads).await.unwrap();
        assert_eq!(pulse.read_bytes(), 1_130);
    }
}
