//! The side that regions have come to: the application runs here, what is missing is pulled, and then they can go on to
//! the next.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::try_join_all;
use r3map_core::{Error, ErrorKind, Operation, Result};
use r3map_pipeline::retrying;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::leecher::{Leecher, LeecherParts, taken_back};
use crate::protocol::MigrationId;
use crate::{LeecherSettings, Peer, Report, Seeder, SeederParts, Shown, Source, Standing, hooks, source};

/// How long to wait after something could not be had.
const PAUSE: Duration = Duration::from_millis(500);

/// The application runs here.
pub struct Running<M> {
    shown: Vec<Arc<M>>,
    epoch: u64,
    report: Report,
    resumed: Result<()>,
    began: Instant,
    settled: watch::Receiver<Settling>,
    settling: AbortOnDropHandle<()>,
    passed_on: Arc<Mutex<bool>>,
}

/// How far the rest of a migration is.
#[derive(Debug, Clone, Default)]
enum Settling {
    /// Something is missing.
    #[default]
    Missing,
    /// Everything is here.
    Here {
        /// After what time it was.
        after: Duration,
        /// Whether it is kept, and written down whose it is.
        kept: bool,
        /// The seeder knows, or why it does not.
        told: Result<()>,
    },
    /// The region was closed before.
    Closed(Error),
    /// They are over there again, and the application is stopped here.
    TakenBack(Error),
}

/// What there is beside the regions when they have come.
pub(crate) struct Settled {
    pub(crate) peer: Arc<dyn Peer>,
    pub(crate) id: MigrationId,
    pub(crate) epoch: u64,
    pub(crate) settings: LeecherSettings,
    pub(crate) parts: LeecherParts,
    pub(crate) report: Report,
}

impl Settled {
    /// Waits until nothing is missing, however often something cannot be had.
    async fn all_here<M: Shown>(&self, shown: &[Arc<M>]) -> std::result::Result<(), Settling> {
        loop {
            let Err(error) = try_join_all(shown.iter().map(|region| region.pulled())).await else { return Ok(()) };
            match error.kind() {
                ErrorKind::Cancelled | ErrorKind::InvalidInput => return Err(Settling::Closed(error)),
                ErrorKind::Conflict => {
                    if let Ok(Some(lost)) = self.lost().await {
                        self.stop(shown).await;
                        return Err(Settling::TakenBack(lost));
                    }
                }
                _ => {}
            }
            tracing::warn!(%error, "what is missing could not be had; it is tried again");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Everything is here: sees to it that it stays, and writes down that nobody else has it.
    async fn keep<M: Shown>(&self, shown: &[Arc<M>]) -> Result<()> {
        try_join_all(shown.iter().map(|region| region.keep())).await?;
        self.write_down(&Standing::Owner { epoch: self.epoch, revoked: None })
    }

    fn write_down(&self, standing: &Standing) -> Result<()> {
        self.parts.ledger.as_ref().map_or(Ok(()), |ledger| ledger.save(standing))
    }

    /// Whether somebody has taken the regions back over there. Nobody but the seeder knows, and others may answer in its place.
    async fn lost(&self) -> Result<Option<Error>> {
        let description =
            timeout(self.settings.after.attempt_timeout, self.peer.describe()).await.map_err(|_| silent())??;
        Ok((description.revoked == Some(self.id)).then(|| taken_back(description.epoch, self.epoch)))
    }

    /// Nobody may write here any more, be it that the application is told, or that it is refused; nor may whoever comes after
    /// this process.
    async fn stop<M: Shown>(&self, shown: &[Arc<M>]) {
        let limit = self.parts.limit();
        let suspend = self.parts.hooks.suspend.as_ref();
        if let Err(error) = hooks::call(suspend, limit, "suspending the application").await {
            tracing::error!(%error, "the application may not know that the region was taken back");
        }
        let sources: Vec<_> = shown.iter().map(|region| region.source()).collect();
        if let Err(error) = source::close(&sources, limit).await {
            tracing::error!(%error, "what was taken back may still be written here, or what was written last not be kept");
        }
        if let Err(error) = self.write_down(&Standing::Arrived { id: self.id, epoch: self.epoch }) {
            tracing::error!(%error, "it is not written down that the region may not be used here any more");
        }
    }

    /// Tells the seeder, which may forget it then.
    async fn confirm(&self) -> Result<()> {
        retrying(&self.settings.after, Operation::Close, || self.peer.confirm(self.id)).await
    }
}

impl<M: Shown> Running<M> {
    pub(crate) fn new(shown: Vec<M>, arrival: Settled, resumed: Result<()>) -> Self {
        let (report, epoch) = (arrival.report.clone(), arrival.epoch);
        let shown: Vec<_> = shown.into_iter().map(Arc::new).collect();
        let began = Instant::now();
        let (settling, settled) = watch::channel(Settling::default());
        let rest = shown.clone();
        let passed_on = Arc::new(Mutex::new(false));
        let elsewhere = passed_on.clone();
        let task = tokio::spawn(async move {
            if let Err(ended) = arrival.all_here(&rest).await {
                settling.send_replace(ended);
                return;
            }
            let after = began.elapsed();
            while let Err(error) = arrival.keep(&rest).await {
                tracing::warn!(%error, "what is here could not be made to stay; it is tried again");
                settling.send_replace(Settling::Here { after, kept: false, told: Err(error) });
                tokio::time::sleep(PAUSE).await;
            }
            // From here on it is not for this task that they are shown. Nor is it written down again who owns them: they
            // may have gone on to the next when the seeder answers at last.
            let shown: Vec<_> = rest.iter().map(Arc::downgrade).collect();
            drop(rest);
            while let Err(mut error) = arrival.confirm().await {
                let mut is_final = is_final(&error);
                if error.kind() == ErrorKind::Conflict {
                    match arrival.lost().await {
                        Ok(Some(lost)) => {
                            let elsewhere = elsewhere.lock().await;
                            if !*elsewhere {
                                arrival.stop(&shown.iter().filter_map(Weak::upgrade).collect::<Vec<_>>()).await;
                                settling.send_replace(Settling::TakenBack(lost));
                                return;
                            }
                            error = lost;
                        }
                        Ok(None) => {}
                        Err(_) => is_final = false,
                    }
                }
                settling.send_replace(Settling::Here { after, kept: true, told: Err(error) });
                if is_final {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
            settling.send_replace(Settling::Here { after, kept: true, told: Ok(()) });
        });
        Self { shown, epoch, report, resumed, began, settled, settling: AbortOnDropHandle::new(task), passed_on }
    }
}

impl<M: Shown> Leecher<Running<M>> {
    /// The regions, in the seeder's order.
    #[must_use]
    pub fn regions(&self) -> &[Arc<M>] {
        &self.state.shown
    }

    /// The epoch that began with this owner.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.state.epoch
    }

    /// Whether the application can write to all regions, and the hook that lets it run succeeded. The regions are here
    /// either way.
    ///
    /// # Errors
    /// What a region or the hook answered.
    pub fn resumed(&self) -> Result<()> {
        self.state.resumed.clone()
    }

    /// What it took so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let came = |region: &Arc<M>| region.progress().borrow().pulled_bytes;
        let since = match &*self.state.settled.borrow() {
            Settling::Here { after, .. } => *after,
            _ => self.state.began.elapsed(),
        };
        let pulled_after = self.state.shown.iter().map(came).sum();
        Report { pulled_after, total: self.state.report.total + since, ..self.state.report.clone() }
    }

    /// Waits until everything is here, and the seeder has been told, or has not answered for as long as
    /// [`LeecherSettings::after`] says: it is told when it answers again, see [`Self::confirmed`].
    ///
    /// # Errors
    /// `Cancelled` if a region is closed before; `Conflict` as [`Self::taken_back`] says.
    pub async fn pulled(&self) -> Result<Report> {
        let mut settled = self.state.settled.clone();
        let ended = settled.wait_for(|settling| !matches!(settling, Settling::Missing)).await;
        match ended.map(|settling| settling.clone()) {
            Ok(Settling::Here { .. }) => Ok(self.report()),
            Ok(Settling::Closed(error) | Settling::TakenBack(error)) => Err(error),
            _ => Err(Error::new(ErrorKind::Cancelled, Operation::Read, "the runtime has shut down")),
        }
    }

    /// Waits until somebody has taken the regions back over there, in the belief that nobody runs here: what that means. It is
    /// noticed with the next call or read that reaches the seeder, of which there is none once it knows that everything is
    /// here. By then the suspend hook was called, nothing can be written any more, and the ledger says nothing else.
    pub async fn taken_back(&self) -> Error {
        let mut settled = self.state.settled.clone();
        let lost = settled.wait_for(|settling| matches!(settling, Settling::TakenBack(_))).await;
        match lost.map(|settling| settling.clone()) {
            Ok(Settling::TakenBack(error)) => error,
            _ => std::future::pending().await,
        }
    }

    /// Whether the seeder knows that everything is here. It serves on for nothing as long as it does not.
    ///
    /// # Errors
    /// What it answered, or that something is missing still.
    pub fn confirmed(&self) -> Result<()> {
        match &*self.state.settled.borrow() {
            Settling::Here { told, .. } => told.clone(),
            Settling::TakenBack(error) => Err(error.clone()),
            _ => Err(Error::new(ErrorKind::Unavailable, Operation::Close, "something is missing still")),
        }
    }

    /// The seeder from which the regions came.
    #[must_use]
    pub fn former(&self) -> Former {
        Former { settled: self.state.settled.clone() }
    }

    /// Whether everything is here to stay, and it is written down that nobody else has it.
    ///
    /// # Errors
    /// What keeps it from that, which is tried again; or that something is missing still.
    pub fn kept(&self) -> Result<()> {
        match &*self.state.settled.borrow() {
            Settling::Here { kept: false, told, .. } => told.clone(),
            Settling::Here { .. } => Ok(()),
            Settling::TakenBack(error) => Err(error.clone()),
            _ => Err(Error::new(ErrorKind::Unavailable, Operation::Close, "something is missing still")),
        }
    }

    /// Waits until everything is here, and offers the regions to the next leecher, while the application runs on. Each
    /// region is offered under the name that it is given here, in order. A seeder that could not be told yet that everything
    /// is here is told when it answers, for as long as the new seeder lives: until then it is not to end, as [`Former`] says.
    ///
    /// # Errors
    /// `Cancelled` if a region is closed before; `Conflict` as [`Self::taken_back`] says; as [`Shown::keep`] and
    /// [`Ledger::save`](crate::Ledger::save); as [`Seeder::new`].
    pub async fn release(self, names: Vec<String>, parts: SeederParts) -> Result<(Vec<Arc<M>>, Seeder, Former)> {
        self.pulled().await?;
        let former = self.former();
        let Running { shown, epoch, settled, settling, passed_on, .. } = self.state;
        *passed_on.lock().await = true;
        if let Settling::Here { kept: false, told: Err(error), .. } | Settling::TakenBack(error) = &*settled.borrow() {
            return Err(error.clone());
        }
        let sources = shown.iter().map(|region| region.source());
        let regions: Vec<(String, Arc<dyn Source>)> = names.into_iter().zip(sources).collect();
        if regions.len() != shown.len() {
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, "each region needs a name"));
        }
        let seeder = Seeder::new(regions, SeederParts { epoch: Some(epoch), ..parts }).await?;
        let mut progress = seeder.progress();
        tokio::spawn(async move {
            tokio::select! {
                _ = settling => {}
                () = async { while progress.changed().await.is_ok() {} } => {}
            }
        });
        Ok((shown, seeder, former))
    }
}

/// The seeder from which regions came. As long as it has not heard that everything arrived, it serves
/// what nobody needs, and somebody may take back there what is long somewhere else.
#[derive(Debug, Clone)]
pub struct Former {
    settled: watch::Receiver<Settling>,
}

impl Former {
    /// Whether it has heard.
    #[must_use]
    pub fn knows(&self) -> bool {
        matches!(&*self.settled.borrow(), Settling::Here { told: Ok(()), .. })
    }

    /// Waits until it has heard.
    ///
    /// # Errors
    /// When there is no point in telling it any more, or nobody tells it: its last answer.
    pub async fn told(&mut self) -> Result<()> {
        let knows = |settling: &Settling| matches!(settling, Settling::Here { told: Ok(()), .. });
        if self.settled.wait_for(knows).await.is_ok() {
            return Ok(());
        }
        match &*self.settled.borrow() {
            Settling::Here { told, .. } => told.clone(),
            Settling::TakenBack(error) => Err(error.clone()),
            _ => Err(Error::new(ErrorKind::Cancelled, Operation::Close, "the runtime has shut down")),
        }
    }
}

/// Whether there is no point in telling the seeder again. There is if it is just ending: it may be started again.
fn is_final(error: &Error) -> bool {
    use ErrorKind::{Conflict, Denied, InvalidInput};
    matches!(error.kind(), Conflict | Denied | InvalidInput)
}

fn silent() -> Error {
    Error::new(ErrorKind::Unavailable, Operation::Open, "the seeder does not answer")
}
