//! The side that regions leave: does what the [protocol](crate::protocol)'s states say, one call after another.
//!
//! It serves no bytes itself: a transport reads from the sources. It never resumes on its own what it has handed over.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_pipeline::BlockSet;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::hooks::{self, Hooks, LIMIT, within};
use crate::lease::{Counted, Pulse};
use crate::protocol::{Description, Handover, MAX_REGIONS, MigrationId, RegionFacts};
use crate::seat::{Abort, Confirm, Dirty, Finalize, Seat, Track};
use crate::{Fencing, Ledger, Secret, Source, Standing, source};

/// How long to wait before a ledger that takes nothing is tried again.
const PAUSE: Duration = Duration::from_millis(500);

/// How long a leecher may be silent, unless told otherwise.
const LEASE: Duration = Duration::from_secs(300);

/// What can be plugged into a seeder, and chosen.
#[derive(Clone, Default)]
pub struct SeederParts {
    /// The application.
    pub hooks: Hooks,
    /// What whoever calls must know, or reads. Nothing: whoever can reach the seeder may take the regions away.
    pub secret: Option<Secret>,
    /// Where it is written down who owns the regions. Without one a seeder that is started again takes itself for the
    /// owner, so have one wherever regions outlive the process.
    pub ledger: Option<Arc<dyn Ledger>>,
    /// How long suspending, and then flushing and fencing, may each take before the migration is refused; and how long each
    /// of the other hooks, and of the other calls to what the regions stand on, may take before nobody waits for it any
    /// more. Default 30 s.
    pub limit: Option<Duration>,
    /// How long a leecher that copies may be silent, without a call and without a read of its own, before the seeder stops to record
    /// for it, so that one that has vanished costs the application nothing any more. It may start again then, from the
    /// beginning. To be longer than an outage that a migration is to survive, and than any read takes. Default 5 minutes.
    pub lease: Option<Duration>,
    /// How firmly writing is ended at the handover. Default: trusting where a hook suspends the application, strict where
    /// there is none.
    pub fencing: Option<Fencing>,
    /// How the regions stand that arrived here before, from [`crate::Leecher::release`]. Default epoch 1.
    pub epoch: Option<u64>,
}

/// What a seeder is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SeederPhase {
    /// The application runs here, and nobody takes the regions away.
    #[default]
    Owner,
    /// A leecher copies while the application runs here.
    Tracked,
    /// The application is being stopped.
    Suspending,
    /// The application runs there, and what is missing there is read here.
    HandedOver,
    /// The leecher has everything.
    Gone,
}

/// Where a seeder stands.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SeederProgress {
    /// What it is doing.
    pub phase: SeederPhase,
    /// The epoch of the present owner.
    pub epoch: u64,
    /// Records that were taken in this migration.
    pub rounds: u64,
    /// Bytes in the last one, in whole blocks.
    pub dirty_bytes: u64,
    /// How long the application took to stop, and how long it took to record and fence everything.
    pub suspend: Duration,
    /// See `suspend`.
    pub flush: Duration,
}

/// Regions that may leave together. Dropping it ends nothing: transports hold it too.
#[derive(Clone)]
pub struct Seeder {
    shared: Arc<Shared>,
}

struct Shared {
    names: Vec<String>,
    sources: Vec<Arc<dyn Source>>,
    parts: SeederParts,
    progress: watch::Sender<SeederProgress>,
    pulse: Arc<Pulse>,
    /// One call at a time.
    work: Mutex<Work>,
}

struct Work {
    seat: Seat,
    /// The last numbered record, which may not have arrived.
    unconfirmed: Vec<BlockSet>,
    /// What was taken from the sources and is in no numbered record yet: a finalize or a record that failed half-way.
    carried: Vec<BlockSet>,
    /// The ledger may say something else than the seat: what could not be written down may be there all the same.
    unwritten: bool,
    /// The application waits until the ledger says that it may run: what it wrote would be lost if the ledger said
    /// something else to whoever comes after this process.
    halted: bool,
    /// Ends the recording for a leecher that has vanished.
    watch: Option<AbortOnDropHandle<()>>,
}

impl Work {
    fn new(seat: Seat, regions: usize) -> Self {
        let none = vec![BlockSet::default(); regions];
        Self { seat, unconfirmed: none.clone(), carried: none, unwritten: false, halted: false, watch: None }
    }

    fn forget(&mut self) {
        self.unconfirmed.fill_with(BlockSet::default);
        self.carried.fill_with(BlockSet::default);
    }
}

impl std::fmt::Debug for Seeder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seeder").field("progress", &*self.shared.progress.borrow()).finish_non_exhaustive()
    }
}

impl Seeder {
    /// Offers regions, each with a name. Where the ledger says that they were handed over, the application must not run:
    /// they are fenced, and [`Self::owns`] says so.
    ///
    /// # Errors
    /// `InvalidInput` for no regions or too many; `Conflict` where the ledger says that they are not here; what the
    /// ledger and fencing answer.
    pub async fn new(regions: Vec<(String, Arc<dyn Source>)>, parts: SeederParts) -> Result<Self> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            let message = format!("a migration has between 1 and {MAX_REGIONS} regions");
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        let standing = parts.ledger.as_ref().map_or(Ok(None), |ledger| ledger.load())?;
        let seat = Seat::new(parts.epoch.unwrap_or(1), standing)?;
        let (names, sources): (_, Vec<_>) = regions.into_iter().unzip();
        if !seat.owns() {
            within(parts.limit.unwrap_or(LIMIT), "fencing", async {
                for source in &sources {
                    source.fence(Fencing::Strict).await?;
                }
                Ok(())
            })
            .await?;
        }
        let (progress, pulse) = (watch::Sender::default(), Arc::new(Pulse::new()));
        pulse.revoke(seat.revoked());
        let work = Mutex::new(Work::new(seat, sources.len()));
        let shared = Shared { names, sources, parts, progress, pulse, work };
        let seeder = Self { shared: Arc::new(shared) };
        seeder.shared.publish(&*seeder.shared.work.lock().await);
        Ok(seeder)
    }

    /// Lets whoever calls in if he knows the secret, or anybody where there is none.
    ///
    /// # Errors
    /// `Denied` for another.
    pub fn admit(&self, shown: &[u8]) -> Result<Admitted> {
        match &self.shared.parts.secret {
            Some(secret) if !secret.is(shown) => {
                let message = "the region may be neither read nor taken away without the seeder's secret: give both sides \
                               the same";
                Err(Error::new(ErrorKind::Denied, Operation::Open, message))
            }
            _ => Ok(self.admit_unasked()),
        }
    }

    /// Lets whoever calls in without asking for the secret: for a transport over which it cannot be shown, where the user
    /// wants that.
    #[must_use]
    pub fn admit_unasked(&self) -> Admitted {
        Admitted { shared: self.shared.clone() }
    }

    /// What there is.
    ///
    /// # Errors
    /// `Cancelled` when the runtime shuts down.
    pub async fn describe(&self) -> Result<Description> {
        let facts = |(name, source): (&String, &Arc<dyn Source>)| RegionFacts {
            name: name.clone(),
            size: source.backend().size(),
            chunk_size: source.chunk_size(),
        };
        let regions = self.shared.names.iter().zip(&self.shared.sources).map(facts).collect();
        let SeederProgress { epoch, phase, .. } = *self.shared.progress.borrow();
        let busy = matches!(phase, SeederPhase::Tracked | SeederPhase::Suspending);
        let (lease, pulse) = (Some(self.shared.lease()), &self.shared.pulse);
        let (revoked, last) = (pulse.revoked(), Some(pulse.last()));
        Ok(Description { epoch, regions, precopy: true, busy, lease, revoked, last })
    }

    /// A region's bytes, for a transport to serve: it lets in who reads, and says whose [sign of life](Admitted::heard) that
    /// is.
    ///
    /// # Panics
    /// If there is no region of that number.
    #[must_use]
    pub fn region(&self, index: usize) -> Arc<dyn Backend> {
        Arc::new(Counted { inner: self.shared.sources[index].backend(), pulse: self.shared.pulse.clone() })
    }

    /// How many bytes leechers have read so far, of all regions together.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.shared.pulse.read_bytes()
    }

    /// How many regions there are.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.shared.sources.len()
    }

    /// Whether the application here may run.
    #[must_use]
    pub fn owns(&self) -> bool {
        let phase = self.shared.progress.borrow().phase;
        !matches!(phase, SeederPhase::HandedOver | SeederPhase::Gone)
    }

    /// Where it stands, now and as it changes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<SeederProgress> {
        self.shared.progress.subscribe()
    }

    /// Waits until a leecher has everything, and answers how it went. The leecher's call is not answered yet: let whatever
    /// serves this finish its calls before the process ends, or the leecher asks for as long as it is told to try.
    pub async fn gone(&self) -> SeederProgress {
        let mut progress = self.progress();
        let gone = progress.wait_for(|progress| progress.phase == SeederPhase::Gone).await;
        gone.map(|progress| progress.clone()).unwrap_or_default()
    }

    /// Takes back regions that were handed over. **Only for somebody who knows that the leecher does not run and never
    /// will**: the protocol cannot know, and two sides that run destroy the region. One that does run all the same is stopped
    /// when it hears of it, and what it has written is lost. A leecher does this itself by aborting where it can.
    ///
    /// # Errors
    /// `Conflict` if they were not handed over, or everything was confirmed to be there; what the ledger, the fence and
    /// the hook answer.
    pub async fn take_back(&self) -> Result<()> {
        let Standing::HandedOver { id, .. } = self.shared.work.lock().await.seat.standing() else {
            return Err(Error::new(ErrorKind::Conflict, Operation::Open, "the region was not handed over"));
        };
        Admitted { shared: self.shared.clone() }.abort(id).await
    }

    /// Stops recording for a leecher that has not finalized; it must start again.
    ///
    /// # Errors
    /// What the ledger answers, where a handover has failed and it may say that it has not: the application waits until
    /// it says what holds. Otherwise `Cancelled` when the runtime shuts down.
    pub async fn stop_tracking(&self) -> Result<()> {
        self.shared
            .run(|shared| async move {
                let mut work = shared.work.lock().await;
                if work.seat.is_tracked() {
                    shared.untrack(&mut work).await;
                }
                if work.halted { shared.go_on(&mut work).await } else { Ok(()) }
            })
            .await
    }
}

/// The calls of a leecher that may make them. Each runs to its end even if its future is dropped.
#[derive(Clone)]
pub struct Admitted {
    shared: Arc<Shared>,
}

impl Admitted {
    /// Somebody reads for the migration `id`, or has just read: the leecher of that name is there. To be called before and
    /// after each read.
    ///
    /// # Errors
    /// `Conflict` if the regions were taken back from it: it may not have what it reads.
    pub fn heard(&self, id: MigrationId) -> Result<()> {
        self.shared.pulse.heard(id)
    }

    /// As [`crate::Peer::track`].
    ///
    /// # Errors
    /// As [`crate::Peer::track`].
    pub async fn track(&self, id: MigrationId, after: Option<MigrationId>) -> Result<()> {
        self.shared.run(move |shared| async move { shared.track(id, true, after).await }).await
    }

    /// The same for a leecher that gives no sign of life while it waits, as those in Go: what is recorded for it is
    /// recorded until [`Seeder::stop_tracking`], or until another comes. Its name may come again.
    ///
    /// # Errors
    /// As [`crate::Peer::track`].
    pub async fn track_for_ever(&self, id: MigrationId) -> Result<()> {
        self.shared.run(move |shared| async move { shared.track(id, false, None).await }).await
    }

    /// As [`crate::Peer::dirty`].
    ///
    /// # Errors
    /// As [`crate::Peer::dirty`].
    pub async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>> {
        self.shared.run(move |shared| async move { shared.dirty(id, round).await }).await
    }

    /// As [`crate::Peer::finalize`].
    ///
    /// # Errors
    /// As [`crate::Peer::finalize`].
    pub async fn finalize(&self, id: MigrationId, rounds: u64) -> Result<Handover> {
        self.shared.run(move |shared| async move { shared.finalize(id, rounds, false).await }).await
    }

    /// The same for a leecher that never asks again, as those in Go, and has the same name as others: whoever asks when it
    /// was answered is another one.
    ///
    /// # Errors
    /// As [`crate::Peer::finalize`]; `Conflict` when the regions were handed over before.
    pub async fn finalize_once(&self, id: MigrationId, rounds: u64) -> Result<Handover> {
        self.shared.run(move |shared| async move { shared.finalize(id, rounds, true).await }).await
    }

    /// As [`crate::Peer::confirm`].
    ///
    /// # Errors
    /// As [`crate::Peer::confirm`].
    pub async fn confirm(&self, id: MigrationId) -> Result<()> {
        self.shared.run(move |shared| async move { shared.confirm(id).await }).await
    }

    /// As [`crate::Peer::abort`].
    ///
    /// # Errors
    /// As [`crate::Peer::abort`].
    pub async fn abort(&self, id: MigrationId) -> Result<()> {
        self.shared.run(move |shared| async move { shared.abort(id).await }).await
    }
}

impl Shared {
    /// Runs a call to its end, whoever waits for it.
    async fn run<T, F>(self: &Arc<Self>, call: impl FnOnce(Arc<Self>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        tokio::spawn(call(self.clone())).await.unwrap_or_else(|error| {
            // After a panic nobody knows what was done before it: that is no refusal.
            let kind = if error.is_panic() { ErrorKind::Internal } else { ErrorKind::Cancelled };
            let message = "the seeder's runtime is shutting down, or it has panicked";
            Err(Error::new(kind, Operation::Open, message).with_source(error))
        })
    }

    async fn track(self: &Arc<Self>, id: MigrationId, leased: bool, after: Option<MigrationId>) -> Result<()> {
        let mut work = self.work.lock().await;
        let track = work.seat.track(id, leased, after)?;
        self.pulse.beat();
        if track == Track::Start {
            let tracking = within(self.limit(), "starting to record what is written", async {
                for source in &self.sources {
                    source.track().await?;
                }
                Ok(())
            });
            let tracked = AssertUnwindSafe(tracking).catch_unwind().await;
            if let Err(error) = tracked.unwrap_or_else(|_| Err(panicked("what the region stands on"))) {
                self.untrack(&mut work).await;
                return Err(error);
            }
            work.seat.tracked(id, leased);
            work.forget();
            self.progress.send_modify(|progress| (progress.rounds, progress.dirty_bytes) = (0, 0));
            self.pulse.hold(Some(id));
            work.watch = leased.then(|| self.watch(id));
            self.publish(&work);
        }
        Ok(())
    }

    fn limit(&self) -> Duration {
        self.parts.limit.unwrap_or(LIMIT)
    }

    /// Who was not told to stop has not said that he has.
    fn fencing(&self) -> Fencing {
        let told = self.parts.hooks.suspend.is_some();
        self.parts.fencing.unwrap_or(if told { Fencing::Trusting } else { Fencing::Strict })
    }

    fn lease(&self) -> Duration {
        self.parts.lease.unwrap_or(LEASE)
    }

    /// Sees to it that what is recorded for `id` is not recorded for ever. Holds nothing of the seeder while it waits.
    fn watch(self: &Arc<Self>, id: MigrationId) -> AbortOnDropHandle<()> {
        let (seeder, pulse, lease) = (Arc::downgrade(self), self.pulse.clone(), self.lease());
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                let left = lease.saturating_sub(pulse.silence());
                if !left.is_zero() {
                    tokio::time::sleep(left).await;
                    continue;
                }
                let Some(seeder) = seeder.upgrade() else { return };
                if seeder.is_over(id).await {
                    return;
                }
            }
        }))
    }

    /// Stops to record for `id` if it is silent still. Whether nothing is recorded for it.
    async fn is_over(&self, id: MigrationId) -> bool {
        let mut work = self.work.lock().await;
        if !work.seat.is_leased(id) {
            return true;
        }
        if self.pulse.silence() < self.lease() {
            return false;
        }
        tracing::warn!(
            "nothing was heard of a leecher for {:?}: what is written is not recorded for it any more",
            self.lease()
        );
        self.untrack(&mut work).await;
        true
    }

    async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>> {
        let mut work = self.work.lock().await;
        let _ = self.settle(&mut work).await;
        if work.seat.dirty(id, round)? == Dirty::Next {
            within(self.limit(), "asking what was written", self.take(&mut work.carried)).await?;
            work.seat.took();
            let empty = vec![BlockSet::default(); self.sources.len()];
            work.unconfirmed = std::mem::replace(&mut work.carried, empty);
            self.publish_taken(&work, round);
        }
        self.pulse.beat();
        Ok(work.unconfirmed.clone())
    }

    /// Adds all records to `into`, where they stay whatever comes of it.
    async fn take(&self, into: &mut [BlockSet]) -> Result<()> {
        for (source, into) in self.sources.iter().zip(into) {
            into.union(&source.take().await?);
        }
        Ok(())
    }

    async fn finalize(self: &Arc<Self>, id: MigrationId, rounds: u64, once: bool) -> Result<Handover> {
        let mut work = self.work.lock().await;
        if work.halted {
            // Whether it was handed over is not known, whatever else is: so nothing is refused.
            self.settle(&mut work).await.map_err(as_silence)?;
        }
        let received = match work.seat.finalize(id, rounds)? {
            Finalize::Again(_) if once => return Err(work.seat.elsewhere()),
            Finalize::Again(answer) => return self.settle(&mut work).await.map_err(as_silence).map(|()| answer),
            Finalize::Start { received } => received,
        };
        self.settle(&mut work).await.map_err(as_refusal)?;
        self.progress.send_modify(|progress| progress.phase = SeederPhase::Suspending);
        let handed = AssertUnwindSafe(self.hand_over(&mut work, id, received)).catch_unwind().await;
        if let Err(error) = handed.unwrap_or_else(|_| Err(panicked("what the region stands on"))) {
            return Err(self.stay(&mut work, error).await);
        }
        self.publish(&work);
        work.watch = None;
        self.pulse.hold(None);
        self.stop_recording().await;
        match work.seat.finalize(id, 0)? {
            Finalize::Again(answer) => Ok(answer),
            Finalize::Start { .. } => unreachable!("it was handed over just now"),
        }
    }

    /// A handover has come to nothing: the application goes on, once the ledger does not say that it was one. What is to be
    /// answered.
    async fn stay(self: &Arc<Self>, work: &mut Work, error: Error) -> Error {
        work.halted = true;
        match self.go_on(work).await {
            Ok(()) => as_refusal(error),
            Err(again) => {
                tracing::error!(error = %again, "the ledger may say that the region was handed over: the application waits until it does not");
                self.go_on_later();
                as_silence(error)
            }
        }
    }

    /// Lets the application run as soon as the ledger says that it may, whether anybody asks or not.
    fn go_on_later(self: &Arc<Self>) {
        let seeder = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PAUSE).await;
                let Some(seeder) = seeder.upgrade() else { return };
                let mut work = seeder.work.lock().await;
                if !work.halted || seeder.go_on(&mut work).await.is_ok() {
                    return;
                }
            }
        });
    }

    async fn hand_over(&self, work: &mut Work, id: MigrationId, received: bool) -> Result<()> {
        let (limit, begun) = (self.limit(), Instant::now());
        hooks::call(self.parts.hooks.suspend.as_ref(), limit, "suspending the application").await?;
        let suspend = begun.elapsed();
        within(limit, "flushing", self.fence(&mut work.carried)).await?;
        let (mut dirty, flush) = (work.carried.clone(), begun.elapsed() - suspend);
        if !received {
            dirty.iter_mut().zip(&work.unconfirmed).for_each(|(dirty, last)| dirty.union(last));
        }
        let next = work.seat.handed_over(id, Handover { dirty, suspend, flush, ..Handover::default() });
        // The one step that hands over: before it is written down this side owns the regions, after it the other.
        self.change(work, next)
    }

    /// Ends writing everywhere, and takes what was written.
    async fn fence(&self, into: &mut [BlockSet]) -> Result<()> {
        let fencing = self.fencing();
        for source in &self.sources {
            source.flush().await?;
        }
        for source in &self.sources {
            source.fence(fencing).await?;
        }
        self.take(into).await
    }

    /// The application goes on here.
    async fn resume(&self) {
        if let Err(error) = source::unfence(&self.sources, self.limit()).await {
            tracing::error!(%error, "the application may not be able to write to what it resumes on");
        }
        let resume = self.parts.hooks.resume.as_ref();
        if let Err(error) = hooks::call(resume, self.limit(), "resuming the application").await {
            tracing::error!(%error, "the application could not be resumed");
        }
    }

    async fn confirm(&self, id: MigrationId) -> Result<()> {
        let mut work = self.work.lock().await;
        if work.seat.confirm(id)? == Confirm::Gone {
            let gone = work.seat.gone(id);
            self.change(&mut work, gone)?;
            let before_close = self.parts.hooks.before_close.as_ref();
            if let Err(error) = hooks::call(before_close, self.limit(), "the hook before closing").await {
                tracing::error!(%error, "the hook before closing failed");
            }
            self.publish(&work);
        }
        Ok(())
    }

    async fn abort(&self, id: MigrationId) -> Result<()> {
        let mut work = self.work.lock().await;
        match work.seat.abort(id)? {
            Abort::Nothing => self.settle(&mut work).await.map_err(as_silence)?,
            Abort::Untrack => {
                self.untrack(&mut work).await;
                self.settle(&mut work).await.map_err(as_silence)?;
            }
            Abort::TakeBack => {
                let back = work.seat.taken_back();
                self.change(&mut work, back)?;
                self.pulse.revoke(work.seat.revoked());
                self.resume().await;
                self.publish(&work);
            }
        }
        Ok(())
    }

    async fn stop_recording(&self) {
        if let Err(error) = source::untrack(&self.sources, self.limit()).await {
            tracing::warn!(%error, "what is written may go on being recorded for nobody");
        }
    }

    async fn untrack(&self, work: &mut Work) {
        self.stop_recording().await;
        work.seat.untracked();
        work.forget();
        work.watch = None;
        self.pulse.hold(None);
        self.publish(work);
    }

    /// The seat changes once that is written down. Where it cannot be, it may be found later all the same: then what holds
    /// is written down again.
    fn change(&self, work: &mut Work, next: Seat) -> Result<()> {
        if let Err(error) = self.write_down(&next) {
            work.unwritten = true;
            if let Err(again) = self.write_again(work) {
                tracing::error!(error = %again, "the ledger may not say who owns the region; it is written again later");
            }
            return Err(error);
        }
        (work.seat, work.unwritten) = (next, false);
        Ok(())
    }

    /// Sees to it that the ledger says what holds. Before that nothing may rest on it.
    fn write_again(&self, work: &mut Work) -> Result<()> {
        if work.unwritten {
            self.write_down(&work.seat)?;
            work.unwritten = false;
        }
        Ok(())
    }

    /// The same; an application that has waited for it goes on.
    async fn settle(&self, work: &mut Work) -> Result<()> {
        match work.halted {
            true => self.go_on(work).await,
            false => self.write_again(work),
        }
    }

    /// Lets the application run, unless the ledger may say that it is somewhere else.
    async fn go_on(&self, work: &mut Work) -> Result<()> {
        self.write_again(work).or_else(|error| match self.is_kept() {
            true => Ok(()),
            false => Err(error),
        })?;
        work.halted = false;
        self.resume().await;
        self.pulse.beat();
        self.publish(work);
        Ok(())
    }

    /// Whether the ledger says nothing of a handover: one that takes nothing, as on a full disk, says what it said before.
    fn is_kept(&self) -> bool {
        let Some(ledger) = &self.parts.ledger else { return true };
        let found = catch_unwind(AssertUnwindSafe(|| ledger.load()));
        matches!(found, Ok(Ok(found)) if !matches!(found, Some(Standing::HandedOver { .. } | Standing::Gone { .. })))
    }

    /// A panic leaves open what it says, as an error does.
    fn write_down(&self, seat: &Seat) -> Result<()> {
        let Some(ledger) = &self.parts.ledger else { return Ok(()) };
        catch_unwind(AssertUnwindSafe(|| ledger.save(&seat.standing()))).unwrap_or_else(|_| Err(panicked("the ledger")))
    }

    fn publish(&self, work: &Work) {
        let phase = match &work.seat {
            _ if work.halted => SeederPhase::Suspending,
            seat if seat.is_tracked() => SeederPhase::Tracked,
            seat if seat.owns() => SeederPhase::Owner,
            seat if seat.is_gone() => SeederPhase::Gone,
            _ => SeederPhase::HandedOver,
        };
        let times = match work.seat.standing() {
            Standing::HandedOver { id, .. } => work.seat.finalize(id, 0).ok(),
            _ => None,
        };
        self.progress.send_modify(|progress| {
            (progress.phase, progress.epoch) = (phase, work.seat.epoch());
            if let Some(Finalize::Again(answer)) = &times {
                (progress.suspend, progress.flush) = (answer.suspend, answer.flush);
                progress.dirty_bytes = bytes(&answer.dirty);
            }
        });
    }

    fn publish_taken(&self, work: &Work, round: u64) {
        self.progress.send_modify(|progress| {
            (progress.rounds, progress.dirty_bytes) = (round, bytes(&work.unconfirmed));
        });
    }
}

/// What records amount to, in whole blocks.
pub(crate) fn bytes(dirty: &[BlockSet]) -> u64 {
    dirty.iter().map(BlockSet::len).sum::<u64>() * r3map_core::BLOCK_SIZE
}

fn panicked(what: &str) -> Error {
    Error::new(ErrorKind::Internal, Operation::Close, format!("{what} has panicked"))
}

/// An error that says that nothing was handed over; see [`is_refusal`].
fn as_refusal(error: Error) -> Error {
    match is_refusal(error.kind()) {
        true => error,
        false => Error::new(ErrorKind::Cancelled, Operation::Close, error.reason()),
    }
}

/// An error that a leecher takes for silence, and asks again.
fn as_silence(error: Error) -> Error {
    Error::new(ErrorKind::Unavailable, Operation::Close, error.reason())
}

/// Whether an error to `finalize` says that nothing was handed over. All others can also come from what lies between, after
/// the seeder has done it: an answer that is too long, or garbled.
pub(crate) fn is_refusal(kind: ErrorKind) -> bool {
    use ErrorKind::{Cancelled, Conflict, Denied, InvalidInput, NotFound};
    matches!(kind, Cancelled | Conflict | Denied | InvalidInput | NotFound)
}
