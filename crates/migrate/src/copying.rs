//! Copying while the application runs over there, in rounds: pull what is missing, ask what was written meanwhile, which
//! is missing then, and again.
//!
//! Each round is a [`Cached`] region for each region, whose table knows what is missing: so that rounds are pulled as
//! quickly and as politely as everything else is. Nobody reads what it has put in place before the handover.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use r3map_core::{Error, ErrorKind, Geometry, Operation, Result};
use r3map_pipeline::{
    BlockSet, Cached, CachedParts, CachedSettings, Hooks as RegionHooks, Priority, PullSettings, Retry, Writes,
    retrying,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::convergence::{Convergence, Round};
use crate::order::Heat;
use crate::protocol::{MigrationId, check_dirty};
use crate::seeder::bytes;
use crate::settings::PullPhase;
use crate::{Arrival, LeecherSettings, Peer, PullProgress, Target, Unconverged};

/// How often progress is told.
const TELL: Duration = Duration::from_millis(50);

/// One region on its way.
pub(crate) struct Lane<T> {
    pub(crate) target: T,
    pub(crate) geometry: Geometry,
    /// What is in place, unless it was written over there since the last record.
    pub(crate) present: BlockSet,
    /// What was in place and must be taken back before it is pulled again.
    stale: BlockSet,
    heat: Heat,
    pub(crate) priority: Priority,
}

/// All that a leecher has before it is finalized.
pub(crate) struct Copying<T> {
    pub(crate) peer: Arc<dyn Peer>,
    pub(crate) id: MigrationId,
    pub(crate) settings: LeecherSettings,
    pub(crate) on_chunk_local: Option<Arc<dyn Fn(usize, u64) + Send + Sync>>,
    pub(crate) lanes: Vec<Lane<T>>,
    /// Records that have arrived.
    pub(crate) rounds: u64,
    /// Bytes that came over the link.
    pub(crate) pulled: u64,
    pub(crate) begun: Instant,
    /// Where all of it runs, whoever calls.
    pub(crate) runtime: Handle,
    pub(crate) precopy: bool,
    pub(crate) progress: Arc<watch::Sender<PullProgress>>,
}

impl<T> Lane<T> {
    pub(crate) fn new(target: T, geometry: Geometry, priority: Priority) -> Self {
        let (present, stale, heat) = (BlockSet::default(), BlockSet::default(), Heat::default());
        Self { target, geometry, present, stale, heat, priority }
    }

    fn missing(&self) -> BlockSet {
        self.present.complement(self.geometry.block_count())
    }

    /// These blocks were written over there.
    pub(crate) fn written(&mut self, blocks: &BlockSet, round: u64) {
        let mut stale = blocks.clone();
        stale.subtract(&self.present.complement(self.geometry.block_count()));
        self.stale.union(&stale);
        self.present.subtract(blocks);
        self.heat.written(&self.geometry, blocks, round);
    }
}

impl<T: Target> Lane<T> {
    /// Takes back what must be.
    pub(crate) fn take_back(&mut self) -> Result<()> {
        for run in std::mem::take(&mut self.stale).runs() {
            self.target.forget(self.geometry.blocks_range(&run))?;
        }
        Ok(())
    }

    /// What is known of it when it arrives, with `dirty` written last.
    pub(crate) fn arrival(
        &self,
        remote: Arc<Retry>,
        dirty: &BlockSet,
        pull: PullSettings,
        hook: Option<Arc<dyn Fn(u64) + Send + Sync>>,
    ) -> Arrival {
        Arrival {
            geometry: self.geometry,
            remote,
            present: self.present.clone(),
            urgent: dirty.chunks(&self.geometry).flatten().collect(),
            priority: self.heat.order(&self.geometry, &self.missing(), &self.priority),
            pull,
            on_chunk_local: hook,
        }
    }
}

impl<T: Target> Copying<T> {
    /// Copies until it is stopped, and gives itself back, with the error that ended it if one did.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> (Self, Result<()>) {
        let result = self.rounds(&stop).await;
        self.progress.send_modify(|progress| {
            progress.phase = PullPhase::Stopped;
            progress.error = result.as_ref().err().cloned();
        });
        (self, result)
    }

    async fn rounds(&mut self, stop: &CancellationToken) -> Result<()> {
        let mut convergence = Convergence::default();
        let mut over = false;
        loop {
            let began = Instant::now();
            let before = self.pulled;
            if !self.pull(stop).await? {
                return Ok(());
            }
            if !self.precopy {
                self.tell(|progress| progress.phase = PullPhase::Ready);
                stop.cancelled().await;
                return Ok(());
            }
            let (pulled, took) = (self.pulled - before, began.elapsed());
            let Some(record) = stop.run_until_cancelled(self.ask()).await else { return Ok(()) };
            let dirty = self.written(&record?);
            let round = Round { pulled, took, dirty, elapsed: self.begun.elapsed() };
            if !over {
                over = self.judge(&mut convergence, round)?;
            }
            if over && stop.run_until_cancelled(tokio::time::sleep(self.settings.precopy.recheck)).await.is_none() {
                return Ok(());
            }
        }
    }

    /// Whether the application may be moved now.
    fn judge(&self, convergence: &mut Convergence, round: Round) -> Result<bool> {
        let verdict = convergence.round(&self.settings.precopy, round);
        if verdict.is_unconverged() && self.settings.precopy.unconverged == Unconverged::GiveUp {
            let message = format!(
                "the application writes faster than the link carries ({} bytes were left after {} rounds): give it more \
                 time, or move it all the same",
                round.dirty, self.rounds
            );
            return Err(Error::new(ErrorKind::Exhausted, Operation::Read, message));
        }
        self.tell(|progress| {
            progress.verdict = Some(verdict);
            if verdict.is_final() {
                progress.phase = PullPhase::Ready;
            }
        });
        Ok(verdict.is_final())
    }

    /// The next record.
    async fn ask(&self) -> Result<Vec<BlockSet>> {
        let (peer, id, round) = (&self.peer, self.id, self.rounds + 1);
        let record = retrying(&self.settings.before, Operation::Read, || peer.dirty(id, round)).await?;
        self.check(&record)?;
        Ok(record)
    }

    pub(crate) fn check(&self, record: &[BlockSet]) -> Result<()> {
        check_dirty(record, &self.lanes.iter().map(|lane| lane.geometry).collect::<Vec<_>>())
    }

    /// A record has arrived; its bytes.
    fn written(&mut self, record: &[BlockSet]) -> u64 {
        self.rounds += 1;
        for (lane, blocks) in self.lanes.iter_mut().zip(record) {
            lane.written(blocks, self.rounds);
        }
        let dirty = bytes(record);
        self.tell(|progress| progress.dirty = dirty);
        dirty
    }

    /// Pulls what is missing. Whether it was not stopped before.
    async fn pull(&mut self, stop: &CancellationToken) -> Result<bool> {
        let mut regions = Vec::new();
        for index in 0..self.lanes.len() {
            self.lanes[index].take_back()?;
            regions.push(self.open(index).await?);
        }
        let pulled = tokio::select! {
            pulled = try_join_all(regions.iter().map(|region| region.pulled())) => pulled.map(|_| true),
            () = stop.cancelled() => Ok(false),
            never = self.watch(&regions) => never,
        };
        join_all(regions.iter().map(|region| region.abandoned())).await;
        for (lane, region) in self.lanes.iter_mut().zip(&regions) {
            lane.present = region.local_blocks();
        }
        self.pulled += came(&regions);
        self.tell(|_| {});
        pulled
    }

    async fn open(&self, index: usize) -> Result<Arc<Cached>> {
        let lane = &self.lanes[index];
        let remote = Arc::new(Retry::new(self.peer.region(index), self.settings.before.clone())?);
        let settings = CachedSettings {
            chunk_size: lane.geometry.chunk_size(),
            pull: self.settings.pull.clone(),
            writes: Writes::Kept,
            ..CachedSettings::default()
        };
        let hooks = RegionHooks { on_chunk_local: self.hook(index), ..RegionHooks::default() };
        let priority = lane.heat.order(&lane.geometry, &lane.missing(), &lane.priority);
        let parts = CachedParts { hooks, priority, present: lane.present.clone(), ..CachedParts::default() };
        Cached::open(lane.target.local(), remote, settings, parts).await
    }

    /// The caller's hook for one region.
    pub(crate) fn hook(&self, index: usize) -> Option<Arc<dyn Fn(u64) + Send + Sync>> {
        let hook = self.on_chunk_local.clone()?;
        Some(Arc::new(move |chunk| hook(index, chunk)))
    }

    /// Tells how far it is, and never returns.
    async fn watch(&self, regions: &[Arc<Cached>]) -> ! {
        let mut ticks = interval(TELL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let present = regions.iter().map(|region| region.progress().borrow().valid_bytes).sum();
            let pulled = self.pulled + came(regions);
            self.progress.send_modify(|progress| (progress.present, progress.pulled) = (present, pulled));
        }
    }

    fn tell(&self, change: impl FnOnce(&mut PullProgress)) {
        let present = self.lanes.iter().map(|lane| lane.present.len()).sum::<u64>() * r3map_core::BLOCK_SIZE;
        self.progress.send_modify(|progress| {
            progress.present = present.min(progress.size);
            (progress.pulled, progress.rounds) = (self.pulled, self.rounds);
            change(progress);
        });
    }
}

fn came(regions: &[Arc<Cached>]) -> u64 {
    regions.iter().map(|region| region.progress().borrow().pulled_bytes).sum()
}
