//! The side that regions come to, up to the moment when they change hands.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_pipeline::{BlockSet, Priority, Retry, retrying};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::copying::{Copying, Lane};
use crate::hooks::{self, Hooks, LIMIT};
use crate::protocol::{Description, Handover, MigrationId, check_epoch};
use crate::running::{Running, Settled};
use crate::seeder::{bytes, is_refusal};
use crate::settings::PullPhase;
use crate::{Downtime, Ledger, LeecherSettings, Peer, PullProgress, Report, Shown, Standing, Target, source};

/// How often others may come first.
const TURNS: u32 = 8;

/// What can be plugged into a leecher.
#[derive(Clone, Default)]
pub struct LeecherParts {
    /// The application.
    pub hooks: Hooks,
    /// What to pull first, for each region; nothing for those past its end.
    pub priorities: Vec<Priority>,
    /// Where it is written down who owns the regions.
    pub ledger: Option<Arc<dyn Ledger>>,
    /// How long letting the application write, and resuming it, may each take before nobody waits for it any more, and
    /// [`resumed`](Leecher::resumed) says so. Default 30 s.
    pub limit: Option<Duration>,
}

impl LeecherParts {
    pub(crate) fn limit(&self) -> Duration {
        self.limit.unwrap_or(LIMIT)
    }

    /// Has the application run, also where not all regions could be `opened`: it may have a use for the others.
    async fn resume(&self, opened: Result<()>) -> Result<()> {
        let resumed = hooks::call(self.hooks.resume.as_ref(), self.limit(), "resuming the application").await;
        opened.and(resumed)
    }
}

/// A leecher; its state says what can be done with it. A wrong order of calls does not compile: what has not arrived can be
/// neither used nor passed on,
///
/// ```compile_fail,E0599
/// # use r3map_migrate::{Leecher, Pulling, SeederParts, Target};
/// async fn too_early<T: Target>(leecher: Leecher<Pulling<T>>) {
///     leecher.release(Vec::new(), SeederParts::default()).await.unwrap();
/// }
/// ```
///
/// it is asked for once,
///
/// ```compile_fail,E0382
/// # use r3map_migrate::{Leecher, Pulling, Target};
/// async fn twice<T: Target>(leecher: Leecher<Pulling<T>>) {
///     let _ = leecher.finalize().await;
///     let _ = leecher.finalize().await;
/// }
/// ```
///
/// and what was passed on is the seeder's:
///
/// ```compile_fail,E0382
/// # use r3map_migrate::{Leecher, Running, SeederParts, Shown};
/// async fn passed_on<M: Shown>(leecher: Leecher<Running<M>>) {
///     let _ = leecher.release(Vec::new(), SeederParts::default()).await;
///     leecher.report();
/// }
/// ```
///
/// The right one does:
///
/// ```
/// # use r3map_migrate::{FinalizeError, Leecher, Pulling, Seeder, SeederParts, Target};
/// async fn through<T: Target>(leecher: Leecher<Pulling<T>>) -> Result<Seeder, FinalizeError<T>> {
///     let running = leecher.finalize().await?;
///     running.report();
///     let (_regions, seeder, _former) = running.release(vec!["a".into()], SeederParts::default()).await.unwrap();
///     Ok(seeder)
/// }
/// ```
pub struct Leecher<S> {
    pub(crate) state: S,
}

/// The application runs over there, and its regions are being copied.
pub struct Pulling<T: Target> {
    parts: LeecherParts,
    progress: watch::Receiver<PullProgress>,
    stop: CancellationToken,
    /// Taken by whoever consumes the leecher.
    copying: Option<Work<T>>,
}

/// How copying ended: all there is, and why.
type Ended<T> = (Copying<T>, Result<()>);

enum Work<T: Target> {
    Running(JoinHandle<Ended<T>>),
    /// It was asked to finalize, and nobody knows yet what came of it.
    Stopped(Box<Copying<T>>),
}

impl<T: Target> Drop for Pulling<T> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl<S> fmt::Debug for Leecher<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leecher").finish_non_exhaustive()
    }
}

/// Why the regions did not change hands, and what can be done.
pub struct FinalizeError<T: Target> {
    /// What went wrong.
    pub error: Error,
    /// What is left.
    pub then: Unsettled<T>,
}

/// What is left of a migration that could not be finalized.
pub enum Unsettled<T: Target> {
    /// The seeder refused: the application runs on over there, and copying goes on.
    Refused(Leecher<Pulling<T>>),
    /// The seeder does not answer, or not in a way that says whether it has handed over.
    /// [Finalize](Leecher::finalize) asks again, and [abort](Leecher::abort) gives up. Until one of them succeeds the
    /// application may be stopped over there.
    Unknown(Leecher<Pulling<T>>),
    /// The regions could not be shown, and went back: the application runs on over there.
    Returned,
    /// They could not be shown, and the seeder does not answer, or something panicked before that was known: the
    /// application is stopped over there until [`Owed::abort`] reaches it.
    Owed(Box<Owed>),
}

/// An abort that has not reached the seeder.
pub struct Owed {
    peer: Arc<dyn Peer>,
    id: MigrationId,
    settings: LeecherSettings,
    /// A ledger that may say that the regions have arrived, and what it must say before they go back.
    before: Option<(Arc<dyn Ledger>, Standing)>,
}

/// Has the ledger not say any more that the regions have arrived, which the next process would believe, and run. One that
/// takes nothing, as on a full disk, and does not say so either is as good.
fn take_back(ledger: &dyn Ledger, standing: &Standing) -> Result<()> {
    ledger.save(standing).or_else(|error| match ledger.load() {
        Ok(Some(found)) if found == *standing => Ok(()),
        _ => Err(error),
    })
}

impl fmt::Debug for Owed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owed").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Owed {
    /// What is to be given back of what was asked for.
    fn asked<T: Target>(copying: &Copying<T>, parts: &LeecherParts) -> Self {
        let (peer, id, settings) = (copying.peer.clone(), copying.id, copying.settings.clone());
        let standing = Standing::Asking { id, rounds: copying.rounds };
        Self { peer, id, settings, before: parts.ledger.clone().map(|ledger| (ledger, standing)) }
    }

    /// Gives the regions back, so that the application runs on over there.
    ///
    /// # Errors
    /// `Unavailable` while the seeder does not answer, and what the ledger answers: call it again.
    pub async fn abort(&self) -> Result<()> {
        let Self { peer, id, settings, before } = self;
        if let Some((ledger, standing)) = before {
            take_back(&**ledger, standing)?;
        }
        retrying(&settings.settling(), Operation::Close, || peer.abort(*id)).await
    }
}

impl<T: Target> fmt::Display for FinalizeError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let then = match self.then {
            Unsettled::Refused(_) | Unsettled::Returned => "the application runs on over there",
            Unsettled::Unknown(_) | Unsettled::Owed(_) => {
                "it is not known whether the application runs over there: ask again, or give up"
            }
        };
        write!(f, "{}; {then}", self.error)
    }
}

impl<T: Target> fmt::Debug for FinalizeError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FinalizeError").field("error", &self.error).field("then", &self.then).finish()
    }
}

impl<T: Target> fmt::Debug for Unsettled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Refused(_) => "Refused",
            Self::Unknown(_) => "Unknown",
            Self::Returned => "Returned",
            Self::Owed(_) => "Owed",
        })
    }
}

impl<T: Target> std::error::Error for FinalizeError<T> {}

impl<T: Target> Leecher<Pulling<T>> {
    /// Asks a seeder what it has, has `targets` make a place for each region, and starts to copy. `id` names this
    /// migration and no other one ever. Works on the current tokio runtime.
    ///
    /// # Errors
    /// What the seeder and `targets` answer; `InvalidInput` where these do not fit.
    pub async fn start(
        peer: Arc<dyn Peer>,
        id: MigrationId,
        targets: impl AsyncFnOnce(&Description) -> Result<Vec<T>>,
        settings: LeecherSettings,
        parts: LeecherParts,
    ) -> Result<Self> {
        settings.before.validate()?;
        settings.after.validate()?;
        let description = retrying(&settings.before, Operation::Open, || peer.describe()).await?;
        let mut lanes = lanes(&description, targets(&description).await?, &parts)?;
        lanes.iter_mut().try_for_each(Lane::clear)?;
        track(&*peer, id, description.last, &settings).await?;
        let copying = Copying::new(peer, id, lanes, &description, settings, &parts);
        Ok(Self::copy(copying, parts))
    }

    /// Goes on where a leecher was that was killed before it asked for the regions: as the ledger says, from which
    /// `standing` comes. `targets` have what survived of it. Where the seeder no longer records for that leecher, or
    /// cannot, everything is copied anew, under another name.
    ///
    /// # Errors
    /// As [`Self::start`]; `InvalidInput` for a standing from which there is nothing to go on; `Conflict` if the regions
    /// are somewhere else, or another leecher copies them.
    pub async fn go_on(
        peer: Arc<dyn Peer>,
        standing: &Standing,
        targets: impl AsyncFnOnce(&Description) -> Result<Vec<T>>,
        settings: LeecherSettings,
        parts: LeecherParts,
    ) -> Result<Self> {
        settings.before.validate()?;
        settings.after.validate()?;
        let Standing::Pulling { id, rounds } = *standing else {
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, "nothing was being copied"));
        };
        let description = retrying(&settings.before, Operation::Open, || peer.describe()).await?;
        let lanes = lanes(&description, targets(&description).await?, &parts)?;
        let mut copying = Copying::new(peer, id, lanes, &description, settings, &parts);
        copying.catch_up(rounds).await?;
        Ok(Self::copy(copying, parts))
    }

    /// Copies, or goes on to.
    fn copy(copying: Copying<T>, parts: LeecherParts) -> Self {
        let (stop, progress) = (CancellationToken::new(), copying.progress.subscribe());
        copying.progress.send_modify(|progress| {
            (progress.phase, progress.error) = (PullPhase::Pulling, None);
        });
        let runtime = copying.runtime.clone();
        let copying = Some(Work::Running(runtime.spawn(copying.run(stop.clone()))));
        Self { state: Pulling { parts, progress, stop, copying } }
    }

    /// Keeps what is copied, without going on to copy.
    fn stopped(copying: Copying<T>, parts: LeecherParts) -> Self {
        let progress = copying.progress.subscribe();
        let copying = Some(Work::Stopped(Box::new(copying)));
        Self { state: Pulling { parts, progress, stop: CancellationToken::new(), copying } }
    }

    /// How far it is, now and as it changes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<PullProgress> {
        self.state.progress.clone()
    }

    /// Waits until the application may be moved, as [`crate::Precopy`] says. It can be moved before, too.
    ///
    /// # Errors
    /// What ended the copying; the application runs on over there.
    pub async fn ready(&self) -> Result<PullProgress> {
        let mut progress = self.progress();
        let reached = progress.wait_for(|progress| progress.phase != PullPhase::Pulling).await;
        let reached = reached.map_err(|_| gone())?.clone();
        match (reached.phase, &reached.error) {
            (PullPhase::Stopped, Some(error)) => Err(error.clone()),
            (PullPhase::Stopped, None) => Err(gone()),
            _ => Ok(reached),
        }
    }

    /// Moves the application: it is suspended over there, and runs here when this returns. Dropping the future leaves it
    /// unknown where the region is; do not.
    ///
    /// # Errors
    /// As [`FinalizeError`] says. Nobody runs on both sides, whatever goes wrong.
    pub async fn finalize(self) -> Result<Leecher<Running<T::Shown>>, FinalizeError<T>> {
        let (copying, parts) = self.into_copying().await?;
        let runtime = copying.runtime.clone();
        let owed = Owed::asked(&copying, &parts);
        let died = |_| FinalizeError { error: gone(), then: Unsettled::Owed(Box::new(owed)) };
        runtime.spawn(Self::finalize_here(copying, parts)).await.map_err(died)?
    }

    async fn finalize_here(
        mut copying: Copying<T>,
        parts: LeecherParts,
    ) -> Result<Leecher<Running<T::Shown>>, FinalizeError<T>> {
        let asked = Instant::now();
        let handover = match ask(&mut copying, &parts).await {
            Ok(handover) => handover,
            Err(error) if copying.asked => {
                let then = Unsettled::Unknown(Self::stopped(copying, parts));
                return Err(FinalizeError { error, then });
            }
            Err(error) => return Err(FinalizeError { error, then: Unsettled::Refused(Self::copy(copying, parts)) }),
        };
        let answered = Instant::now();
        let (suspend, flush, begun) = (handover.suspend, handover.flush, copying.begun);
        let round_trip = (answered - asked).saturating_sub(suspend + flush);
        let Arrived { shown, opened, owed, mut report } = arrive(copying, &parts, &handover).await?;
        let resumed = parts.resume(opened).await;
        report.downtime = Downtime { suspend, flush, round_trip, resume: answered.elapsed() };
        report.total = begun.elapsed();
        let arrival =
            Settled { peer: owed.peer, id: owed.id, epoch: handover.epoch, settings: owed.settings, parts, report };
        Ok(Leecher { state: Running::new(shown, arrival, resumed) })
    }

    /// Goes on where a leecher was that was killed after it had asked for the regions: as the ledger says, from which
    /// `standing` comes. `targets` have what survived of it. Nothing if the regions were not handed over, so that they are
    /// still over there: the ledger says then that they were being copied, from which one can [go on](Self::go_on).
    ///
    /// # Errors
    /// `Conflict` if somebody has taken the regions back over there since, so that they must not run here, and as
    /// `targets`; `InvalidInput` for a standing from which there is nothing to go on. Others leave it as it was: call it
    /// again.
    pub async fn resume(
        peer: Arc<dyn Peer>,
        standing: &Standing,
        targets: impl AsyncFnOnce(&Description) -> Result<Vec<T>>,
        settings: LeecherSettings,
        parts: LeecherParts,
    ) -> Result<Option<Leecher<Running<T::Shown>>>> {
        let description = retrying(&settings.settling(), Operation::Open, || peer.describe()).await?;
        let regions = description.check()?;
        let (id, handover) = match standing {
            Standing::Asking { id, rounds } => match ask_again(&*peer, *id, *rounds, &settings, &parts).await? {
                Some(handover) => (*id, handover),
                None => return Ok(None),
            },
            // One without a ledger that was started anew forgot the handover. Go's describe no epoch.
            Standing::Arrived { epoch, .. }
                if description.epoch > *epoch || (description.precopy && description.epoch != *epoch) =>
            {
                return Err(taken_back(description.epoch, *epoch));
            }
            Standing::Arrived { id, epoch } => {
                let dirty = vec![BlockSet::default(); regions.len()];
                (*id, Handover { epoch: *epoch, dirty, ..Handover::default() })
            }
            _ => return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, "no migration was under way")),
        };
        let mut lanes = lanes(&description, targets(&description).await?, &parts)?;
        if let Standing::Asking { .. } = standing {
            // A seeder that has no records does not give the same answer again either: nothing is known of what is here.
            let known = if description.precopy { Lane::recover } else { Lane::clear };
            lanes.iter_mut().try_for_each(known)?;
        }
        let mut copying = Copying::new(peer, id, lanes, &description, settings, &parts);
        let report = Report { size: regions.iter().map(r3map_core::Geometry::size).sum(), ..Report::default() };
        let (shown, opened) = show(&mut copying, &parts, &handover).await?;
        let resumed = parts.resume(opened).await;
        let Copying { peer, settings, .. } = copying;
        let arrival = Settled { peer, id, epoch: handover.epoch, settings, parts, report };
        Ok(Some(Leecher { state: Running::new(shown, arrival, resumed) }))
    }

    /// Stops copying, and has everything that there is.
    async fn into_copying(mut self) -> Result<(Copying<T>, LeecherParts), FinalizeError<T>> {
        self.state.stop.cancel();
        let parts = self.state.parts.clone();
        match self.state.copying.take() {
            None => Err(FinalizeError { error: gone(), then: Unsettled::Returned }),
            Some(Work::Stopped(copying)) => Ok((*copying, parts)),
            Some(Work::Running(task)) => match task.await {
                Ok((copying, Ok(()))) => Ok((copying, parts)),
                Ok((copying, Err(error))) => {
                    // Nothing was handed over: where this does not arrive, the seeder goes on recording, no more.
                    let limit = copying.settings.before.attempt_timeout;
                    let _ = timeout(limit, copying.peer.abort(copying.id)).await;
                    Err(FinalizeError { error, then: Unsettled::Returned })
                }
                Err(_) => Err(FinalizeError { error: gone(), then: Unsettled::Returned }),
            },
        }
    }

    /// Gives up: the application runs on over there, and what was copied is dropped.
    ///
    /// # Errors
    /// `Unavailable` with what can be asked again. It matters only after a [finalize](Self::finalize) of which nobody
    /// knows what came.
    pub async fn abort(self) -> Result<(), (Error, Option<Owed>)> {
        let (copying, _) = match self.into_copying().await {
            Ok(copying) => copying,
            Err(FinalizeError { .. }) => return Ok(()),
        };
        let owed = Owed { peer: copying.peer, id: copying.id, settings: copying.settings, before: None };
        match owed.abort().await {
            Ok(()) => Ok(()),
            Err(error) => Err((error, Some(owed))),
        }
    }
}

fn gone() -> Error {
    Error::new(
        ErrorKind::Cancelled,
        Operation::Read,
        "copying has stopped: a hook has panicked, or the runtime has shut down",
    )
}

fn lanes<T: Target>(description: &Description, targets: Vec<T>, parts: &LeecherParts) -> Result<Vec<Lane<T>>> {
    let regions = description.check()?;
    let fit = |(target, region): (&T, &r3map_core::Geometry)| target.local().size() == region.size();
    if targets.len() != regions.len() || !targets.iter().zip(&regions).all(fit) {
        let message = "the places for the regions do not have their number and sizes";
        return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
    }
    let priorities = parts.priorities.iter().cloned().chain(std::iter::repeat(Priority::None));
    let lanes = targets.into_iter().zip(regions).zip(priorities);
    Ok(lanes.map(|((target, region), priority)| Lane::new(target, region, priority)).collect())
}

/// Has the seeder record for `id`, in place of whomever it recorded for last, which is `last` as far as is known.
async fn track(
    peer: &dyn Peer,
    id: MigrationId,
    mut last: Option<MigrationId>,
    settings: &LeecherSettings,
) -> Result<()> {
    let before = &settings.before;
    for _ in 0..TURNS {
        let refused = match retrying(before, Operation::Open, || peer.track(id, last)).await {
            Err(error) if error.kind() == ErrorKind::Conflict => error,
            answer => return answer,
        };
        // Somebody has come since.
        let now = retrying(before, Operation::Open, || peer.describe()).await?.last;
        if now == last {
            return Err(refused);
        }
        last = now;
    }
    let message = "other leechers come all the time: see to it that there is one only";
    Err(Error::new(ErrorKind::Conflict, Operation::Open, message))
}

/// Asks for the regions. An error leaves it to `asked` whether they may have been handed over.
async fn ask<T: Target>(copying: &mut Copying<T>, parts: &LeecherParts) -> Result<Handover> {
    let Copying { peer, id, rounds, settings, asked, .. } = copying;
    if let Some(ledger) = &parts.ledger {
        ledger.save(&Standing::Asking { id: *id, rounds: *rounds })?;
    }
    let answer = retrying(&settings.handover(), Operation::Close, || peer.finalize(*id, *rounds)).await;
    *asked = answer.as_ref().is_err_and(|error| !is_refusal(error.kind()));
    answer
}

/// Asks again what a process asked that was killed. Nothing where nothing was handed over, which is written down.
async fn ask_again(
    peer: &dyn Peer,
    id: MigrationId,
    rounds: u64,
    settings: &LeecherSettings,
    parts: &LeecherParts,
) -> Result<Option<Handover>> {
    // A number of records that it never had: only one who has handed over answers.
    match retrying(&settings.handover(), Operation::Close, || peer.finalize(id, u64::MAX)).await {
        Err(error) if error.kind() == ErrorKind::Conflict => {
            tracing::info!(%error, "the regions are still over there");
            parts.ledger.as_ref().map_or(Ok(()), |ledger| ledger.save(&Standing::Pulling { id, rounds }))?;
            Ok(None)
        }
        answer => answer.map(Some),
    }
}

/// Whoever has taken regions back knew that nobody runs here. Now nobody may.
pub(crate) fn taken_back(there: u64, here: u64) -> Error {
    let message = format!(
        "the seeder has taken the region back (epoch {there} there, {here} here), and the application may run there: it must \
         not run here too. What was written here is nowhere else; remove it, and the ledger, if nothing of it is wanted"
    );
    Error::new(ErrorKind::Conflict, Operation::Open, message)
}

/// Regions that are here, and shown.
struct Arrived<M> {
    shown: Vec<M>,
    /// Whether all of them can be written.
    opened: Result<()>,
    owed: Owed,
    report: Report,
}

/// Shows everything, or gives everything back.
async fn arrive<T: Target>(
    mut copying: Copying<T>,
    parts: &LeecherParts,
    handover: &Handover,
) -> Result<Arrived<T::Shown>, FinalizeError<T>> {
    let owed = Owed::asked(&copying, parts);
    let report = Report {
        size: copying.lanes.iter().map(|lane| lane.geometry.size()).sum(),
        rounds: copying.rounds,
        pulled_before: copying.pulled,
        dirty: bytes(&handover.dirty),
        ..Report::default()
    };
    match show(&mut copying, parts, handover).await {
        Ok((shown, opened)) => Ok(Arrived { shown, opened, owed, report }),
        Err(error) => {
            let then = match owed.abort().await {
                Ok(()) => Unsettled::Returned,
                Err(_) => Unsettled::Owed(Box::new(owed)),
            };
            Err(FinalizeError { error, then })
        }
    }
}

/// Shows all regions, then writes down that they are here, then opens them. They are here whether that works or not: what
/// came of it is answered beside them.
async fn show<T: Target>(
    copying: &mut Copying<T>,
    parts: &LeecherParts,
    handover: &Handover,
) -> Result<(Vec<T::Shown>, Result<()>)> {
    copying.check(&handover.dirty)?;
    check_epoch(handover.epoch)?;
    let hooks: Vec<_> = (0..copying.lanes.len()).map(|index| copying.hook(index)).collect();
    let (mut shown, all_shown) = (Vec::new(), CancellationToken::new());
    for (index, (mut lane, hook)) in std::mem::take(&mut copying.lanes).into_iter().zip(hooks).enumerate() {
        let dirty: &BlockSet = &handover.dirty[index];
        lane.written(dirty, copying.rounds + 1)?;
        lane.take_back()?;
        let remote = Arc::new(Retry::new(copying.peer.region(index, copying.id), copying.settings.after.clone())?);
        let arrival = lane.arrival(remote, dirty, copying.settings.pull.clone(), hook, all_shown.clone());
        shown.push(lane.target.show(arrival).await?);
    }
    if let Some(ledger) = &parts.ledger {
        ledger.save(&Standing::Arrived { id: copying.id, epoch: handover.epoch })?;
    }
    let sources: Vec<_> = shown.iter().map(Shown::source).collect();
    let opened = source::unfence(&sources, parts.limit()).await;
    all_shown.cancel();
    Ok((shown, opened))
}
