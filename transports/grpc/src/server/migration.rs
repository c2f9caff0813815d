//! The calls that have regions change hands: our own service, and that of the Go programs, which knows one region.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use http::request::Parts;
use prost::Message;
use r3map_core::{Geometry, Result};
use r3map_pipeline::BlockSet;
use tonic::Status;

use crate::proto::{go, go_seeder, migration};
use crate::rope::Rope;
use crate::seeding::{Leeching, Seeding, Service, coarser, to_runs};
use crate::server::region::answer;
use crate::server::session::Session;
use crate::{MIGRATION_VERSION, message, pass, path, sum};

/// What Go leechers are called, who have no name: they are all one.
const GO_LEECHER: [u8; 16] = *b"a leecher in Go\0";

/// A seeder, and what is known of Go leechers.
pub(crate) struct Seeder {
    calls: Arc<dyn Seeding>,
    /// The longest read of any Go leecher, in bytes.
    go_chunk: AtomicU64,
    /// The Go leecher that got the regions from this server.
    go_taker: Mutex<Option<Weak<GoLeecher>>>,
}

/// A connection over which a Go leecher may have come. They have no names, but each of them has a connection, and one only.
#[derive(Debug, Default)]
pub(crate) struct GoLeecher {
    /// Its chunk size, in bytes: its longest read.
    chunk: AtomicU64,
}

/// Whoever has made a request to a seeder, and was let in.
#[derive(Clone)]
pub(crate) struct Caller {
    calls: Arc<dyn Leeching>,
    /// The migration that he reads for.
    reads_for: Option<[u8; 16]>,
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caller").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Seeder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seeder").finish_non_exhaustive()
    }
}

impl Seeder {
    pub(crate) fn new(calls: Arc<dyn Seeding>) -> Self {
        Self { calls, go_chunk: AtomicU64::new(0), go_taker: Mutex::default() }
    }

    /// Lets whoever makes a request in, whatever he asks for.
    pub(crate) fn admit(&self, request: &Parts) -> Result<Caller, Status> {
        let service = if request.uri.path().starts_with(path::GO) { Service::Go } else { Service::Own };
        let calls = answer(self.calls.admit(&pass::secret(&request.headers), service))?;
        Ok(Caller { calls, reads_for: pass::migration(&request.headers) })
    }

    fn taken_by(&self, leecher: &Arc<GoLeecher>) {
        *self.go_taker.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(leecher));
    }

    /// Whether it was this one that got the regions; nothing where nobody did.
    fn is_taker(&self, leecher: &Arc<GoLeecher>) -> Option<bool> {
        let taker = self.go_taker.lock().unwrap_or_else(PoisonError::into_inner);
        taker.as_ref().map(|taker| std::ptr::eq(taker.as_ptr(), Arc::as_ptr(leecher)))
    }
}

fn does_not_seed() -> Status {
    Status::unimplemented("this server does not seed: its region stays")
}

impl Session {
    fn seeder(&self) -> Result<&Seeder, Status> {
        self.site.seeder.as_ref().ok_or_else(does_not_seed)
    }

    fn calls(&self) -> Result<&dyn Leeching, Status> {
        self.caller.as_ref().map(|caller| &*caller.calls).ok_or_else(does_not_seed)
    }

    /// Reads, which is a sign of life of the leecher that it is done for.
    pub(crate) async fn heard<T>(&self, reading: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let heard = || match &self.caller {
            Some(Caller { calls, reads_for: Some(id) }) => answer(calls.heard(*id)),
            _ => Ok(()),
        };
        heard()?;
        let read = reading.await;
        heard()?;
        read
    }

    pub(crate) async fn migration_describe(&self, _: migration::DescribeRequest) -> Result<Rope, Status> {
        let seeded = answer(self.seeder()?.calls.describe().await)?;
        let regions = seeded.regions.into_iter().map(|region| migration::Region {
            name: region.name,
            size: region.size,
            chunk_size: u32::try_from(region.chunk_size.bytes()).unwrap_or(u32::MAX),
        });
        let (major, minor) = MIGRATION_VERSION;
        let milliseconds = |lease: std::time::Duration| u64::try_from(lease.as_millis()).unwrap_or(u64::MAX).max(1);
        let reply = migration::DescribeReply {
            major,
            minor,
            epoch: seeded.epoch,
            regions: regions.collect(),
            busy: seeded.busy,
            lease_milliseconds: seeded.lease.map_or(0, milliseconds),
            revoked: seeded.revoked.map(|id| id.to_vec().into()).unwrap_or_default(),
            last: seeded.last.map(|id| id.to_vec().into()).unwrap_or_default(),
        };
        Ok(message::encode(&reply))
    }

    pub(crate) async fn migration_track(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        done(self.calls()?.track(name(&request)?, request.after.as_ref().try_into().ok()).await)
    }

    pub(crate) async fn migration_dirty(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let dirty = answer(self.calls()?.dirty(name(&request)?, request.round).await)?;
        let reply = fitting(&dirty, crate::MAX_RECORD, |regions| migration::DirtyReply { regions });
        Ok(message::encode(&reply))
    }

    pub(crate) async fn migration_finalize(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let handed = answer(self.calls()?.finalize(name(&request)?, request.round).await)?;
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let reply = fitting(&handed.dirty, crate::MAX_RECORD, |regions| migration::HandoverReply {
            epoch: handed.epoch,
            regions,
            suspend_nanoseconds: nanoseconds(handed.suspend),
            flush_nanoseconds: nanoseconds(handed.flush),
        });
        Ok(message::encode(&reply))
    }

    pub(crate) async fn migration_confirm(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        done(self.calls()?.confirm(name(&request)?).await)
    }

    pub(crate) async fn migration_abort(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        done(self.calls()?.abort(name(&request)?).await)
    }

    /// As the Go seeder does, a read that crosses the region's end is filled up with zeros: its leecher reads whole
    /// chunks.
    pub(crate) async fn go_seeder_read_at(&self, request: go::ReadAtArgs) -> Result<Rope, Status> {
        let (asked, offset) = self.go_range(&request)?;
        for longest in [&self.seeder()?.go_chunk, &self.go.chunk] {
            longest.fetch_max(asked, Ordering::Relaxed);
        }
        let there = self.shared.geometry.size().saturating_sub(offset);
        self.go_read(offset.min(self.shared.geometry.size()), there.min(asked), asked).await
    }

    pub(crate) async fn go_seeder_track(&self, _: go_seeder::TrackArgs) -> Result<Rope, Status> {
        answer(self.calls()?.track_for_ever(GO_LEECHER).await)?;
        Ok(message::encode(&go_seeder::TrackReply {}))
    }

    pub(crate) async fn go_seeder_sync(&self, _: go_seeder::SyncArgs) -> Result<Rope, Status> {
        let seeder = self.seeder()?;
        let handed = answer(self.calls()?.finalize_once(GO_LEECHER).await)?;
        seeder.taken_by(&self.go);
        // One that has connected again since it read is told what some other one was: it may be the same.
        let longest = [&self.go.chunk, &seeder.go_chunk].map(|longest| longest.load(Ordering::Relaxed));
        let read = longest.into_iter().find(|longest| *longest > 0);
        let chunk = read.unwrap_or(self.shared.geometry.chunk_size().bytes());
        let offsets = handed.dirty.first().map(|dirty| dirty_offsets(self.shared.geometry, dirty, chunk));
        // However long it is: the region was handed over.
        Ok(message::encode(&go_seeder::SyncReply { dirty_offsets: offsets.unwrap_or_default() }))
    }

    /// Every Go leecher says this when it ends. Only from the one that got the regions it means something, and that one is
    /// known by its connection: where that broke, nobody is believed to have everything.
    pub(crate) async fn go_seeder_close(&self, _: go_seeder::CloseArgs) -> Result<Rope, Status> {
        match self.seeder()?.is_taker(&self.go) {
            Some(true) => answer(self.calls()?.confirm(GO_LEECHER).await)?,
            Some(false) => tracing::warn!(
                "a leecher in Go has ended that is not known to have the region: it goes on being served to the one that has"
            ),
            None => {}
        }
        Ok(message::encode(&go_seeder::CloseReply {}))
    }
}

/// The first byte of each chunk of `chunk` bytes in which a block is named, each once.
fn dirty_offsets(geometry: Geometry, dirty: &BlockSet, chunk: u64) -> Vec<i64> {
    let mut offsets: Vec<i64> = Vec::new();
    for run in dirty.runs() {
        let bytes = geometry.blocks_range(&run);
        let step = usize::try_from(chunk).unwrap_or(usize::MAX);
        for offset in (bytes.start - bytes.start % chunk..bytes.end).step_by(step) {
            let offset = offset.cast_signed();
            if offsets.last().is_none_or(|last| *last < offset) {
                offsets.push(offset);
            }
        }
    }
    offsets
}

fn name(request: &migration::StepRequest) -> Result<[u8; 16], Status> {
    let id = request.id.as_ref().try_into();
    id.map_err(|_| Status::invalid_argument("a migration's name has 16 bytes"))
}

fn done(result: Result<()>) -> Result<Rope, Status> {
    answer(result.map(|()| message::encode(&migration::StepReply {})))
}

fn blocks(dirty: &[BlockSet]) -> Vec<migration::Blocks> {
    let record = |runs: Vec<u64>| migration::Blocks { crc32c: sum::record(&runs), runs };
    dirty.iter().map(|dirty| record(to_runs(dirty))).collect()
}

/// A reply with a record, of at most so many bytes. What was written can be too scattered to be told; since the record has
/// been taken it is told all the same, and what lies between counts as written too.
fn fitting<M: Message>(dirty: &[BlockSet], limit: usize, reply: impl Fn(Vec<migration::Blocks>) -> M) -> M {
    let mut told = reply(blocks(dirty));
    let mut gap = 1;
    while told.encoded_len() > limit && gap < u64::MAX {
        let coarse: Vec<_> = dirty.iter().map(|dirty| coarser(dirty, gap)).collect();
        told = reply(blocks(&coarse));
        gap = gap.saturating_mul(2);
    }
    told
}

#[cfg(test)]
mod tests {
    use r3map_core::ChunkSize;

    use super::*;
    use crate::seeding::from_runs;

    #[test]
    fn what_is_too_scattered_to_be_told_is_told_in_coarser_runs() {
        let mut scattered = BlockSet::default();
        (0..1000).for_each(|block| scattered.insert(block * 3..block * 3 + 1));
        let dirty = [scattered.clone(), BlockSet::default()];
        let reply = |limit| fitting(&dirty, limit, |regions| migration::DirtyReply { regions });
        let told = |limit| from_runs(&reply(limit).regions[0].runs, 3000).unwrap();
        assert_eq!(told(4000), scattered, "it fits as it is");
        let coarse = told(100);
        assert!(reply(100).encoded_len() <= 100 && from_runs(&reply(100).regions[1].runs, 10).unwrap().is_empty());
        let mut lost = scattered.clone();
        lost.subtract(&coarse);
        assert!(lost.is_empty() && coarse.runs().count() == 1, "{coarse:?}");
    }

    #[test]
    fn go_leechers_get_each_of_their_chunks_once() {
        let geometry = Geometry::new(40 * 4096 + 1, ChunkSize::MIN).unwrap();
        let mut dirty = BlockSet::default();
        [0..1, 2..3, 5..9, 40..41].into_iter().for_each(|run| dirty.insert(run));
        let by = |chunk: u64| dirty_offsets(geometry, &dirty, chunk * 4096);
        assert_eq!(by(1), [0, 2, 5, 6, 7, 8, 40].map(|block| block * 4096));
        assert_eq!(by(4), [0, 4, 8, 40].map(|block| block * 4096));
        assert_eq!(by(64), [0]);
        assert_eq!(dirty_offsets(geometry, &dirty, 10_000), [0, 10_000, 20_000, 30_000, 160_000]);
    }
}
