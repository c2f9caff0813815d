//! The calls that have regions change hands: our own service, and that of the Go programs, which knows one region.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message;
use r3map_core::{Geometry, Result};
use r3map_pipeline::BlockSet;
use tonic::Status;

use crate::proto::{go, go_seeder, migration};
use crate::rope::Rope;
use crate::seeding::{Seeding, coarser, to_runs};
use crate::server::region::answer;
use crate::server::session::Session;
use crate::{MIGRATION_VERSION, message};

/// What Go leechers are called, who have no name: they are all one.
const GO_LEECHER: [u8; 16] = *b"a leecher in Go\0";

/// A seeder, and what is known of Go leechers.
pub(crate) struct Seeder {
    calls: Arc<dyn Seeding>,
    /// The chunk size of Go leechers, in bytes: the longest read so far.
    go_chunk: AtomicU64,
}

impl std::fmt::Debug for Seeder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seeder").finish_non_exhaustive()
    }
}

impl Seeder {
    pub(crate) fn new(calls: Arc<dyn Seeding>) -> Self {
        Self { calls, go_chunk: AtomicU64::new(0) }
    }
}

/// Who calls, and for which migration.
type Caller = (Vec<u8>, [u8; 16]);

impl Session {
    fn seeder(&self) -> Result<&Seeder, Status> {
        self.site.seeder.as_ref().ok_or_else(|| Status::unimplemented("this server does not seed: its region stays"))
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
        };
        Ok(message::encode(&reply))
    }

    pub(crate) async fn migration_track(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let (secret, id) = caller(&request)?;
        done(self.seeder()?.calls.track(&secret, id).await)
    }

    pub(crate) async fn migration_dirty(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let (secret, id) = caller(&request)?;
        let dirty = answer(self.seeder()?.calls.dirty(&secret, id, request.round).await)?;
        let reply = fitting(&dirty, crate::MAX_RECORD, |regions| migration::DirtyReply { regions });
        Ok(message::encode(&reply))
    }

    pub(crate) async fn migration_finalize(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let (secret, id) = caller(&request)?;
        let handed = answer(self.seeder()?.calls.finalize(&secret, id, request.round).await)?;
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
        let (secret, id) = caller(&request)?;
        done(self.seeder()?.calls.confirm(&secret, id).await)
    }

    pub(crate) async fn migration_abort(&self, request: migration::StepRequest) -> Result<Rope, Status> {
        let (secret, id) = caller(&request)?;
        done(self.seeder()?.calls.abort(&secret, id).await)
    }

    /// As the Go seeder does, a read that crosses the region's end is filled up with zeros: its leecher reads whole
    /// chunks.
    pub(crate) async fn go_seeder_read_at(&self, request: go::ReadAtArgs) -> Result<Rope, Status> {
        let (asked, offset) = self.go_range(&request)?;
        self.seeder()?.go_chunk.fetch_max(asked, Ordering::Relaxed);
        let there = self.shared.geometry.size().saturating_sub(offset);
        self.go_read(offset.min(self.shared.geometry.size()), there.min(asked), asked).await
    }

    pub(crate) async fn go_seeder_track(&self, _: go_seeder::TrackArgs) -> Result<Rope, Status> {
        answer(self.seeder()?.calls.track_for_ever(&[], GO_LEECHER).await)?;
        Ok(message::encode(&go_seeder::TrackReply {}))
    }

    pub(crate) async fn go_seeder_sync(&self, _: go_seeder::SyncArgs) -> Result<Rope, Status> {
        let seeder = self.seeder()?;
        let handed = answer(seeder.calls.finalize_once(&[], GO_LEECHER).await)?;
        let chunk = match seeder.go_chunk.load(Ordering::Relaxed) {
            0 => self.shared.geometry.chunk_size().bytes(),
            read => read,
        };
        let offsets = handed.dirty.first().map(|dirty| dirty_offsets(self.shared.geometry, dirty, chunk));
        // However long it is: the region was handed over.
        Ok(message::encode(&go_seeder::SyncReply { dirty_offsets: offsets.unwrap_or_default() }))
    }

    /// Before anything was handed over it means nothing, and is always answered well.
    pub(crate) async fn go_seeder_close(&self, _: go_seeder::CloseArgs) -> Result<Rope, Status> {
        let _ = self.seeder()?.calls.confirm(&[], GO_LEECHER).await;
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

fn caller(request: &migration::StepRequest) -> Result<Caller, Status> {
    let id = request.id.as_ref().try_into();
    let id = id.map_err(|_| Status::invalid_argument("a migration's name has 16 bytes"))?;
    Ok((request.secret.to_vec(), id))
}

fn done(result: Result<()>) -> Result<Rope, Status> {
    answer(result.map(|()| message::encode(&migration::StepReply {})))
}

fn blocks(dirty: &[BlockSet]) -> Vec<migration::Blocks> {
    dirty.iter().map(|dirty| migration::Blocks { runs: to_runs(dirty) }).collect()
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
