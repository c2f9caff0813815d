//! A leecher's way to a seeder: the calls that have regions change hands, and a client for each region's bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Geometry, Operation, Result};
use r3map_pipeline::BlockSet;
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

use crate::client::facts::{SMALL, probe};
use crate::client::link::{CallError, Link};
use crate::client::{Client, ClientSettings};
use crate::pass::Pass;
use crate::proto::{go_seeder, migration};
use crate::rope::Rope;
use crate::seeding::{Handed, Seeded, SeededRegion, from_runs};
use crate::target::Target;
use crate::{MAX_RECORD, MIGRATION_VERSION, message, path, sum};

/// The longest secret: it is shown with every call, and servers take headers of 16 KiB.
const MAX_SECRET: usize = 4 << 10;

/// The most regions that a seeder may have.
const MAX_REGIONS: usize = 64;

/// A seeder. It connects again by itself, as [`Client`] does, and makes no call twice.
///
/// A Go seeder can hand over once, and cannot take back: where its answer is lost, the next one says that everything was
/// written, which is always right.
#[derive(Debug)]
pub struct SeederClient {
    calls: Calls,
    go: bool,
    geometries: Vec<Geometry>,
    names: Vec<String>,
    regions: Vec<Arc<Client>>,
    /// A Go seeder was asked to hand over.
    go_asked: AtomicBool,
}

/// One connection at a time.
#[derive(Debug)]
struct Calls {
    target: Target,
    settings: ClientSettings,
    pass: Arc<Pass>,
    runtime: Handle,
    link: Mutex<Option<Arc<Link>>>,
}

impl SeederClient {
    /// Connects to a seeder, and to each of its regions. `secret` is what it may ask for. For a Go seeder
    /// [`ClientSettings::go`] is needed. Connections live on the current tokio runtime.
    ///
    /// # Errors
    /// As [`Client::connect`]; `InvalidInput` for a server that does not seed, and for a secret of more than 4 KiB; `Denied`
    /// where the secret is another.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn connect(target: Target, secret: &[u8], settings: ClientSettings) -> Result<Self> {
        if secret.len() > MAX_SECRET {
            let message =
                format!("a secret of {} bytes is longer than {MAX_SECRET}, and cannot be shown", secret.len());
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        let settings = ClientSettings { region: 0, go_seeder: true, ..settings };
        let calls = Calls {
            target: target.clone(),
            settings: settings.clone(),
            pass: Arc::new(Pass::new(secret)),
            runtime: Handle::current(),
            link: Mutex::default(),
        };
        let (go, regions) = calls.in_time(calls.what_is_there()).await?;
        let mut client = Self {
            geometries: regions
                .iter()
                .map(|region| Geometry::new(region.size, region.chunk_size))
                .collect::<Result<_>>()?,
            names: regions.into_iter().map(|region| region.name).collect(),
            regions: Vec::new(),
            go_asked: AtomicBool::new(false),
            calls,
            go,
        };
        for (index, geometry) in (0..).zip(&client.geometries) {
            let settings = ClientSettings { region: index, ..settings.clone() };
            let region = Client::with(target.clone(), settings, client.calls.pass.clone()).await?;
            if region.size() != geometry.size() {
                return Err(client.calls.corrupt("other sizes of its regions than it described"));
            }
            client.regions.push(Arc::new(region));
        }
        Ok(client)
    }

    /// A region's bytes. All regions are read for the migration that was named last, here or in a call.
    ///
    /// # Panics
    /// If there is no region of that number.
    #[must_use]
    pub fn region(&self, index: usize, id: [u8; 16]) -> Arc<dyn Backend> {
        self.calls.pass.read_for(id);
        self.regions[index].clone()
    }

    /// What the seeder has.
    ///
    /// # Errors
    /// As the call; `Conflict` if these are other regions than when it connected.
    pub async fn describe(&self) -> Result<Seeded> {
        let now = match self.go {
            true => migration::DescribeReply::default(),
            false => self.calls.describe().await?,
        };
        if !self.go {
            self.check(&now)?;
        }
        let lease = Some(now.lease_milliseconds).filter(|lease| *lease > 0).map(Duration::from_millis);
        let region = |(name, geometry): (&String, &Geometry)| SeededRegion {
            name: name.clone(),
            size: geometry.size(),
            chunk_size: geometry.chunk_size(),
        };
        let regions = self.names.iter().zip(&self.geometries).map(region).collect();
        let [revoked, last] = [&now.revoked, &now.last].map(|id| id.as_ref().try_into().ok());
        Ok(Seeded { epoch: now.epoch, regions, precopy: !self.go, busy: now.busy, lease, revoked, last })
    }

    fn check(&self, now: &migration::DescribeReply) -> Result<()> {
        let same = now.regions.len() == self.geometries.len()
            && now.regions.iter().zip(&self.geometries).all(|(now, then)| now.size == then.size());
        match same {
            true => Ok(()),
            false => {
                let message = format!("{} has other regions than before: start again", self.calls.target);
                Err(Error::new(ErrorKind::Conflict, Operation::Open, message))
            }
        }
    }

    /// Has the seeder record for `id`, in place of the one that was the [last](Seeded::last), if that is said.
    ///
    /// # Errors
    /// As the call; so for all.
    pub async fn track(&self, id: [u8; 16], after: Option<[u8; 16]>) -> Result<()> {
        if self.go {
            let request = message::encode(&go_seeder::TrackArgs {});
            return self.calls.call::<go_seeder::TrackReply>(path::GO_SEEDER_TRACK, request, SMALL).await.map(drop);
        }
        let after = after.map(|id| Bytes::copy_from_slice(&id)).unwrap_or_default();
        self.calls.pass.read_for(id);
        let request = migration::StepRequest { id: Bytes::copy_from_slice(&id), after, round: 0 };
        let request = message::encode(&request);
        self.calls.call::<migration::StepReply>(path::MIGRATION_TRACK, request, SMALL).await.map(drop)
    }

    /// The record of that number, for each region.
    ///
    /// # Errors
    /// `InvalidInput` for a Go seeder, which has none.
    pub async fn dirty(&self, id: [u8; 16], round: u64) -> Result<Vec<BlockSet>> {
        if self.go {
            let message = "a Go seeder cannot say what was written before it suspends";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Read, message));
        }
        let request = self.calls.request(id, round);
        let reply: migration::DirtyReply = self.calls.call(path::MIGRATION_DIRTY, request, MAX_RECORD).await?;
        self.blocks(&reply.regions)
    }

    /// Has the regions handed over, after so many records have arrived.
    ///
    /// # Errors
    /// See above.
    pub async fn finalize(&self, id: [u8; 16], rounds: u64) -> Result<Handed> {
        if self.go {
            return self.go_finalize().await;
        }
        let request = self.calls.request(id, rounds);
        let reply: migration::HandoverReply = self.calls.call(path::MIGRATION_FINALIZE, request, MAX_RECORD).await?;
        Ok(Handed {
            epoch: reply.epoch,
            dirty: self.blocks(&reply.regions)?,
            suspend: Duration::from_nanos(reply.suspend_nanoseconds),
            flush: Duration::from_nanos(reply.flush_nanoseconds),
        })
    }

    async fn go_finalize(&self) -> Result<Handed> {
        let geometry = self.geometries[0];
        let again = self.go_asked.swap(true, Ordering::SeqCst);
        let request = message::encode(&go_seeder::SyncArgs {});
        let reply: go_seeder::SyncReply = self.calls.call(path::GO_SEEDER_SYNC, request, MAX_RECORD).await?;
        let mut dirty = BlockSet::default();
        if again {
            // The answer that had the record is lost; the seeder has forgotten it with that.
            dirty.insert(0..geometry.block_count());
        }
        for offset in reply.dirty_offsets {
            let start = u64::try_from(offset).ok().filter(|start| *start < geometry.size());
            let start = start.ok_or_else(|| self.calls.corrupt("an offset past the region's end"))?;
            let chunk = geometry.chunk_range(geometry.chunk_at(start));
            let end = (start + geometry.chunk_size().bytes()).max(chunk.end).min(geometry.size());
            dirty.insert(geometry.blocks_touched(&(chunk.start..end)));
        }
        Ok(Handed { epoch: 1, dirty: vec![dirty], ..Handed::default() })
    }

    /// Tells the seeder that everything is here.
    ///
    /// # Errors
    /// See above. A Go seeder ends with it, and may not answer: that is no error.
    pub async fn confirm(&self, id: [u8; 16]) -> Result<()> {
        if self.go {
            let request = message::encode(&go_seeder::CloseArgs {});
            let _ = self.calls.call::<go_seeder::CloseReply>(path::GO_SEEDER_CLOSE, request, SMALL).await;
            return Ok(());
        }
        self.step(path::MIGRATION_CONFIRM, id).await
    }

    /// Gives the regions back.
    ///
    /// # Errors
    /// See above; `Denied` for a Go seeder that was asked to hand over, and cannot take back.
    pub async fn abort(&self, id: [u8; 16]) -> Result<()> {
        match self.go {
            true if self.go_asked.load(Ordering::SeqCst) => {
                let message = "a Go seeder cannot take a region back: it is stopped, and nobody runs";
                Err(Error::new(ErrorKind::Denied, Operation::Close, message))
            }
            true => Ok(()),
            false => self.step(path::MIGRATION_ABORT, id).await,
        }
    }

    async fn step(&self, path: &'static str, id: [u8; 16]) -> Result<()> {
        let request = self.calls.request(id, 0);
        self.calls.call::<migration::StepReply>(path, request, SMALL).await.map(drop)
    }

    fn blocks(&self, regions: &[migration::Blocks]) -> Result<Vec<BlockSet>> {
        if regions.len() != self.geometries.len() {
            return Err(self.calls.corrupt("a record of another number of regions"));
        }
        let records = regions.iter().zip(&self.geometries).map(|(record, region)| {
            let blocks = blocks(record, region.block_count());
            blocks.ok_or_else(|| self.calls.corrupt("a record that no region fits, or that has changed on its way"))
        });
        records.collect()
    }
}

/// What a record of a region of `count` blocks names, if it is as it was sent.
fn blocks(record: &migration::Blocks, count: u64) -> Option<BlockSet> {
    from_runs(&record.runs, count).filter(|_| sum::record(&record.runs) == record.crc32c)
}

impl Calls {
    /// Which service is there, and its regions.
    async fn what_is_there(&self) -> Result<(bool, Vec<SeededRegion>)> {
        let link = self.link().await?;
        match ask(&link).await {
            Ok(reply) => Ok((false, self.described(reply)?)),
            Err(CallError::Status(status)) if status.code() == Code::Unimplemented => {
                if status.message().contains("does not seed") || self.settings.go.is_none() {
                    let message = format!("{} serves no region that can be migrated: is it a seeder?", self.target);
                    return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
                }
                let geometry = probe(&link, &self.settings).await?.geometry;
                let (size, chunk_size) = (geometry.size(), geometry.chunk_size());
                Ok((true, vec![SeededRegion { name: String::new(), size, chunk_size }]))
            }
            Err(error) => Err(error.into_error(Operation::Open, &self.target)),
        }
    }

    async fn describe(&self) -> Result<migration::DescribeReply> {
        let link = self.link().await?;
        ask(&link).await.map_err(|error| error.into_error(Operation::Open, &self.target))
    }

    fn described(&self, reply: migration::DescribeReply) -> Result<Vec<SeededRegion>> {
        let (major, minor) = MIGRATION_VERSION;
        if reply.major != major {
            let message = format!(
                "{} speaks version {}.{} of the r3map migration protocol and this program version {major}.{minor}: use \
                 programs of the same major version on both sides",
                self.target, reply.major, reply.minor
            );
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        if reply.regions.is_empty() || reply.regions.len() > MAX_REGIONS {
            return Err(self.corrupt("regions that cannot be"));
        }
        let region = |region: migration::Region| {
            let chunk_size = ChunkSize::new(region.chunk_size.into());
            let fits = chunk_size.and_then(|chunk| Geometry::new(region.size, chunk).map(|_| chunk));
            let chunk_size = fits.map_err(|_| self.corrupt("regions that cannot be"))?;
            Ok(SeededRegion { name: region.name, size: region.size, chunk_size })
        };
        reply.regions.into_iter().map(region).collect()
    }

    fn request(&self, id: [u8; 16], round: u64) -> Rope {
        self.pass.read_for(id);
        let id = Bytes::copy_from_slice(&id);
        message::encode(&migration::StepRequest { id, round, ..migration::StepRequest::default() })
    }

    async fn call<M>(&self, path: &'static str, request: Rope, limit: usize) -> Result<M>
    where
        M: prost::Message + Default,
    {
        let link = self.link().await?;
        let reply = link.call(path, request, limit).await;
        let reply = reply.map_err(|error| error.into_error(Operation::Close, &self.target))?;
        message::decode(reply.into_bytes()).map_err(|why| self.corrupt(why.0))
    }

    /// The connection, or a new one.
    async fn link(&self) -> Result<Arc<Link>> {
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| link.is_open()) {
            return Ok(link.clone());
        }
        let (target, settings, pass) = (self.target.clone(), self.settings.clone(), self.pass.clone());
        let opening = AbortOnDropHandle::new(self.runtime.spawn(async move {
            let link = Arc::new(Link::open(&target, 0, pass).await?);
            // A Go server does not stand for being asked.
            if ask(&link).await.is_ok() {
                link.watch(settings.keep_alive);
            }
            Ok(link)
        }));
        let opened = self.in_time(async { Ok(opening.await) }).await?;
        let link = opened.map_err(|error| {
            Error::new(ErrorKind::Cancelled, Operation::Open, "the client's runtime has shut down").with_source(error)
        })??;
        *slot = Some(link.clone());
        Ok(link)
    }

    /// Limits something that connecting waits for.
    async fn in_time<T>(&self, waiting: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = self.settings.connect_timeout;
        tokio::time::timeout(limit, waiting).await.unwrap_or_else(|_| {
            let message = format!("{} does not answer within {} s", self.target, limit.as_secs_f32());
            Err(Error::new(ErrorKind::Unavailable, Operation::Open, message))
        })
    }

    fn corrupt(&self, what: &str) -> Error {
        Error::new(ErrorKind::Corrupt, Operation::Open, format!("{} answered with {what}", self.target))
    }
}

async fn ask(link: &Link) -> Result<migration::DescribeReply, CallError> {
    let (major, minor) = MIGRATION_VERSION;
    let request = message::encode(&migration::DescribeRequest { major, minor });
    let reply = link.call(path::MIGRATION_DESCRIBE, request, SMALL).await?;
    message::decode(reply.into_bytes()).map_err(|why| CallError::Malformed(format!("answered with {}", why.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_has_changed_on_its_way_names_nothing() {
        let runs = vec![3, 1, 2, 4];
        let record = migration::Blocks { crc32c: sum::record(&runs), runs };
        assert_eq!(blocks(&record, 10).unwrap().runs().collect::<Vec<_>>(), [3..4, 6..10]);
        assert!(blocks(&record, 9).is_none(), "past the end");
        for index in 0..4 {
            let mut flipped = record.clone();
            flipped.runs[index] ^= 2;
            assert!(blocks(&flipped, 100).is_none(), "{flipped:?}");
        }
    }
}
