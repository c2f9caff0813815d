//! Copying while the application runs over there, in rounds: pull what is missing, ask what was written meanwhile, which
//! is missing then, and again.
//!
//! Each round is a [`Cached`] region for each region, whose table knows what is missing: so that rounds are pulled as
//! quickly and as politely as everything else is. Nobody reads what it has put in place before the handover.
//!
//! Where the place has a record of what is in it, that is kept in step, so that a process that is killed is followed by
//! one that goes on. It rests on the order of things: bytes are in place before the record says so; what a record of the
//! seeder names is forgotten before the ledger says that it has arrived; and only then the next one is asked for.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use r3map_core::{Error, ErrorKind, Geometry, Operation, Result};
use r3map_pipeline::{
    BlockSet, Cached, CachedParts, CachedSettings, Hooks as RegionHooks, Priority, PullSettings, Recorded, Retry,
    StateRecord, Writes, retrying,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::convergence::{Convergence, Round};
use crate::order::Heat;
use crate::protocol::{Description, MigrationId, check_dirty};
use crate::seeder::bytes;
use crate::settings::PullPhase;
use crate::{Arrival, Ledger, LeecherParts, LeecherSettings, Peer, PullProgress, Standing, Target, Unconverged};

/// How often progress is told.
const TELL: Duration = Duration::from_millis(50);

/// The shortest time to wait before the seeder is asked again, whatever it says of its lease.
const SHORTEST: Duration = Duration::from_millis(100);

/// One region on its way.
pub(crate) struct Lane<T> {
    pub(crate) target: T,
    pub(crate) geometry: Geometry,
    /// What is in place, unless it was written over there since the last record.
    pub(crate) present: BlockSet,
    /// What was in place and must be taken back before it is pulled again.
    stale: BlockSet,
    /// Says what is in place to whoever comes after this process.
    record: Option<Arc<dyn StateRecord>>,
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
    ledger: Option<Arc<dyn Ledger>>,
    /// Records that have arrived.
    pub(crate) rounds: u64,
    /// The name that is given up, while there is no other under which the seeder is known to record.
    former: Option<MigrationId>,
    /// The regions were asked for, and nobody knows what came of it.
    pub(crate) asked: bool,
    /// Bytes that came over the link.
    pub(crate) pulled: u64,
    pub(crate) begun: Instant,
    /// Where all of it runs, whoever calls.
    pub(crate) runtime: Handle,
    precopy: bool,
    /// How long to wait at most before the seeder is asked for something.
    patience: Duration,
    pub(crate) progress: Arc<watch::Sender<PullProgress>>,
}

impl<T: Target> Lane<T> {
    pub(crate) fn new(target: T, geometry: Geometry, priority: Priority) -> Self {
        let (present, stale, heat) = (BlockSet::default(), BlockSet::default(), Heat::default());
        Self { record: target.record(), target, geometry, present, stale, heat, priority }
    }

    /// Takes over what an earlier process has put in place.
    pub(crate) fn recover(&mut self) -> Result<()> {
        self.present.union(&self.recorded()?);
        Ok(())
    }

    /// What was put in place as the record says, which says of nothing that it was written here.
    fn recorded(&self) -> Result<BlockSet> {
        let (mut recorded, mut written) = (BlockSet::default(), false);
        if let Some(record) = &self.record {
            record.load(&mut |blocks, state| {
                written |= state == Recorded::Dirty;
                recorded.insert(blocks);
            })?;
        }
        if written {
            let message = "what is here was written to, and may be nowhere else: it is no place for a region that has not \
                           arrived; name the cache file that belongs to the ledger, or remove both if nothing of it is wanted";
            return Err(Error::new(ErrorKind::Conflict, Operation::Open, message));
        }
        Ok(recorded)
    }

    /// Counts everything as missing.
    pub(crate) fn clear(&mut self) -> Result<()> {
        if let Some(record) = &self.record {
            self.recorded()?;
            record.forget(0..self.geometry.block_count())?;
        }
        self.stale.union(&std::mem::take(&mut self.present));
        self.heat = Heat::default();
        Ok(())
    }

    fn missing(&self) -> BlockSet {
        self.present.complement(self.geometry.block_count())
    }

    /// These blocks were written over there.
    pub(crate) fn written(&mut self, blocks: &BlockSet, round: u64) -> Result<()> {
        if let Some(record) = &self.record {
            blocks.runs().try_for_each(|run| record.forget(run))?;
        }
        let mut stale = blocks.clone();
        stale.subtract(&self.present.complement(self.geometry.block_count()));
        self.stale.union(&stale);
        self.present.subtract(blocks);
        self.heat.written(&self.geometry, blocks, round);
        Ok(())
    }

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
        shown: CancellationToken,
    ) -> Arrival {
        Arrival {
            geometry: self.geometry,
            remote,
            present: self.present.clone(),
            urgent: dirty.chunks(&self.geometry).flatten().collect(),
            priority: self.heat.order(&self.geometry, &self.missing(), &self.priority),
            pull,
            shown,
            on_chunk_local: hook,
        }
    }
}

impl<T: Target> Copying<T> {
    /// Before anything is copied; the seeder records for `id` already, or is asked to before anything is read.
    pub(crate) fn new(
        peer: Arc<dyn Peer>,
        id: MigrationId,
        lanes: Vec<Lane<T>>,
        description: &Description,
        settings: LeecherSettings,
        parts: &LeecherParts,
    ) -> Self {
        let size = lanes.iter().map(|lane| lane.geometry.size()).sum();
        let progress = Arc::new(watch::Sender::new(PullProgress { size, ..PullProgress::default() }));
        Self {
            peer,
            id,
            // Often enough that one call may be lost; no lease is so short that it keeps both sides busy.
            patience: description.lease.map_or(Duration::MAX, |lease| (lease / 3).max(SHORTEST)),
            settings,
            on_chunk_local: parts.hooks.on_chunk_local.clone(),
            lanes,
            ledger: parts.ledger.clone(),
            rounds: 0,
            former: None,
            asked: false,
            pulled: 0,
            begun: Instant::now(),
            runtime: Handle::current(),
            precopy: description.precopy,
            progress,
        }
    }

    /// Goes on where a process was that had written down so many records, if the seeder still records for it; from the
    /// beginning if not.
    pub(crate) async fn catch_up(&mut self, rounds: u64) -> Result<()> {
        if self.precopy {
            self.lanes.iter_mut().try_for_each(Lane::recover)?;
            self.rounds = rounds;
            match self.ask().await {
                Ok(record) => return self.written(&record).await.map(drop),
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    tracing::info!(%error, "everything is copied anew")
                }
                Err(error) => return Err(error),
            }
        }
        self.anew()?;
        self.track(self.id, &CancellationToken::new()).await.map(drop)
    }

    /// Counts everything as missing, and gives up the name.
    fn anew(&mut self) -> Result<()> {
        self.lanes.iter_mut().try_for_each(Lane::clear)?;
        (self.former, self.rounds) = (Some(self.id), 0);
        self.progress.send_modify(|progress| {
            (progress.phase, progress.verdict) = (PullPhase::Pulling, None);
            progress.restarts += 1;
        });
        self.tell(|_| {});
        Ok(())
    }

    /// Has the seeder record under a new name, if it does not record for somebody else. Whether it was not stopped before.
    async fn track(&mut self, former: MigrationId, stop: &CancellationToken) -> Result<bool> {
        let Some(given_up) = stop.run_until_cancelled(self.give_up(former)).await else { return Ok(false) };
        let last = given_up?;
        let id = former.next();
        // Until there is an answer this one may have to be given up too, be it by a process that comes after this one.
        (self.id, self.former) = (id, Some(id));
        self.write_down().await?;
        let (peer, before) = (&self.peer, &self.settings.before);
        let tracking = retrying(before, Operation::Open, || peer.track(id, last));
        let Some(tracked) = stop.run_until_cancelled(tracking).await else { return Ok(false) };
        tracked?;
        self.former = None;
        Ok(true)
    }

    /// Sees to it that whatever was asked under a name, and is still on its way, changes nothing. For whom was recorded last.
    async fn give_up(&self, id: MigrationId) -> Result<Option<MigrationId>> {
        let (peer, before) = (&self.peer, &self.settings.before);
        retrying(before, Operation::Open, || peer.abort(id)).await?;
        match retrying(before, Operation::Open, || peer.describe()).await? {
            Description { busy: false, last, .. } => Ok(last),
            Description { busy: true, .. } => {
                let message = "the seeder no longer records for this migration: another leecher has come";
                Err(Error::new(ErrorKind::Conflict, Operation::Open, message))
            }
        }
    }

    /// Writes down how far it is, for a process that comes after this one. Not to be given up half-way: what is written
    /// next would meet it.
    async fn write_down(&self) -> Result<()> {
        let Some(ledger) = self.ledger.clone() else { return Ok(()) };
        let standing = Standing::Pulling { id: self.id, rounds: self.rounds };
        let saved = self.runtime.spawn_blocking(move || ledger.save(&standing)).await;
        saved.unwrap_or_else(|error| {
            let message = "the runtime is shutting down";
            Err(Error::new(ErrorKind::Cancelled, Operation::Write, message).with_source(error))
        })
    }

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
        self.write_down().await?;
        loop {
            if let Some(former) = self.former
                && !self.track(former, stop).await?
            {
                return Ok(());
            }
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
            let record = match stop.run_until_cancelled(self.ask()).await {
                None => return Ok(()),
                Some(Err(error)) if error.kind() == ErrorKind::Conflict => {
                    tracing::warn!(%error, "everything is copied anew");
                    self.anew()?;
                    (convergence, over) = (Convergence::default(), false);
                    continue;
                }
                Some(record) => record?,
            };
            let dirty = self.written(&record).await?;
            let round = Round { pulled, took, dirty, elapsed: self.begun.elapsed() };
            if !over {
                over = self.judge(&mut convergence, round)?;
            }
            let pause = self.settings.precopy.recheck.min(self.patience);
            if over && stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return Ok(());
            }
        }
    }

    /// Whether the application may be moved now.
    fn judge(&self, convergence: &mut Convergence, round: Round) -> Result<bool> {
        let verdict = convergence.round(&self.settings.precopy, round);
        if verdict.is_unconverged() && self.settings.precopy.unconverged == Unconverged::GiveUp {
            let rounds = if self.rounds == 1 { "1 round".to_owned() } else { format!("{} rounds", self.rounds) };
            let message = format!(
                "the application writes faster than the link carries ({} bytes were left after {rounds}): give it more \
                 time, or move it all the same",
                round.dirty
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

    /// Checks a record that a peer has sent.
    pub(crate) fn check(&self, record: &[BlockSet]) -> Result<()> {
        check_dirty(record, &self.lanes.iter().map(|lane| lane.geometry).collect::<Vec<_>>())
    }

    /// A record has arrived, and counts once all of it is written down; its bytes.
    async fn written(&mut self, record: &[BlockSet]) -> Result<u64> {
        for (lane, blocks) in self.lanes.iter_mut().zip(record) {
            lane.written(blocks, self.rounds + 1)?;
        }
        self.rounds += 1;
        let dirty = bytes(record);
        self.tell(|progress| progress.dirty = dirty);
        self.write_down().await?;
        // Before anybody waits for it: where the application is moved next, only what it writes from now on is left for then.
        self.lanes.iter_mut().try_for_each(Lane::take_back)?;
        Ok(dirty)
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
        let remote = Arc::new(Retry::new(self.peer.region(index, self.id), self.settings.before.clone())?);
        let settings = CachedSettings {
            chunk_size: lane.geometry.chunk_size(),
            pull: PullSettings { alone: true, ..self.settings.pull.clone() },
            writes: Writes::Kept,
            ..CachedSettings::default()
        };
        let hooks = RegionHooks { on_chunk_local: self.hook(index), ..RegionHooks::default() };
        let priority = lane.heat.order(&lane.geometry, &lane.missing(), &lane.priority);
        let record = lane.record.clone();
        // A record has all of it.
        let present = if record.is_none() { lane.present.clone() } else { BlockSet::default() };
        let parts = CachedParts { hooks, priority, present, record, ..CachedParts::default() };
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
