//! What a seeder does, and says, until its regions have gone, or somebody says stop.

use anyhow::{Context, Result, bail};
use futures_util::future::select_all;
use r3map::migration::{Seeder, SeederPhase, SeederProgress, Seeding};
use r3map::size;
use serde_json::json;

use super::{GIVE_UP_LIMIT, TICK};
use crate::output::{Bar, Output};
use crate::shown::View;
use crate::signals::Signals;

const KEPT: &str = "the region stays here; the application runs on";
/// Said where a handover has failed, and the ledger may say that it has not. What was written before it is stored.
const IN_DOUBT: &str = "stopped while the ledger may say that the region was handed over, and cannot be written: the application \
                        stays suspended; see to it that the ledger can be written, and start this again, which does what it says";

/// Regions that are seeded.
pub(super) struct Host<'a> {
    pub(super) seeder: Seeder,
    /// What shows them: nothing where they had been handed over when this was started.
    pub(super) mounts: Vec<View<'a>>,
    /// Whether they end with this process.
    pub(super) volatile: bool,
    pub(super) output: Output,
}

/// What leechers have read since there was one. Where none reads there is nothing to say.
struct Sending {
    bar: Bar,
    start: u64,
    last: u64,
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The other side has everything.
    Gone,
    /// Somebody said stop, and everything is stored.
    Stopped,
    /// The regions came back, and nothing shows them.
    Returned,
}

impl Host<'_> {
    /// Says what happens until it is over.
    pub(super) async fn until_gone(&self, signals: &mut Signals) -> Result<Ended> {
        let mut progress = self.seeder.progress();
        // Where nothing is shown, the handover is an old story.
        let phase = if self.mounts.is_empty() { SeederPhase::HandedOver } else { SeederPhase::Owner };
        let mut before = SeederProgress { phase, ..SeederProgress::default() };
        let (mut sending, mut warned) = (None::<Sending>, false);
        loop {
            let now = progress.borrow_and_update().clone();
            match &sending {
                Some(sending) => sending.bar.aside(|| self.tell(&before, &now)),
                None => self.tell(&before, &now),
            }
            self.draw(&mut sending, &now);
            match now.phase {
                SeederPhase::Gone => return self.gone(&now).await,
                SeederPhase::Owner if self.mounts.is_empty() => return Ok(Ended::Returned),
                _ => before = now,
            }
            tokio::select! {
                changed = progress.changed() => changed.context("the seeder has ended")?,
                () = tokio::time::sleep(TICK), if sending.is_some() => {}
                () = self.unmounted(), if self.seeder.owns() => {
                    self.output.note("unmounted", "somebody else unmounted it; storing what is left");
                    return self.stop(signals).await;
                }
                () = signals.next() => {
                    if self.volatile && self.seeder.owns() && !warned {
                        warned = true;
                        self.output.note(
                            "stopping",
                            "the region is in this process's memory only: move it on with `r3map leech`; Ctrl-C again loses it",
                        );
                    } else {
                        return self.stop(signals).await;
                    }
                }
            }
        }
    }

    /// Returns when somebody else has unmounted one of the files.
    async fn unmounted(&self) {
        match self.mounts.is_empty() {
            true => std::future::pending().await,
            false => drop(select_all(self.mounts.iter().map(|mount| Box::pin(mount.gone()))).await),
        }
    }

    fn size(&self) -> u64 {
        (0..self.seeder.regions()).map(|index| self.seeder.region(index).size()).sum()
    }

    fn tell(&self, before: &SeederProgress, now: &SeederProgress) {
        if before.rounds != now.rounds && now.rounds > 0 {
            let human = format!("{}; {} were written meanwhile", now.rounds, size::format(now.dirty_bytes));
            let value = json!({ "round": now.rounds, "dirty_bytes": now.dirty_bytes });
            self.output.step("round", &human, value);
        }
        if before.phase == now.phase {
            return;
        }
        match now.phase {
            SeederPhase::Tracked if before.phase == SeederPhase::Suspending => self.output.note("kept", KEPT),
            SeederPhase::Tracked => self.output.note("tracked", "a leecher copies the region"),
            SeederPhase::Suspending => self.output.note("suspending", "the application is being stopped"),
            SeederPhase::HandedOver => self.tell_handed_over(now),
            SeederPhase::Owner => self.output.note("kept", KEPT),
            SeederPhase::Gone => {}
        }
    }

    fn tell_handed_over(&self, now: &SeederProgress) {
        let dirty = size::format(now.dirty_bytes);
        let human = format!(
            "handed over: {dirty} were written last; suspended in {:.1?}, flushed in {:.1?}; what is missing over there is \
             read here",
            now.suspend, now.flush
        );
        let value = json!({
            "epoch": now.epoch,
            "rounds": now.rounds,
            "dirty_bytes": now.dirty_bytes,
            "suspend_seconds": now.suspend.as_secs_f64(),
            "flush_seconds": now.flush.as_secs_f64(),
        });
        self.output.event("handed_over", &human, value);
    }

    /// A bar while a leecher reads.
    fn draw(&self, sending: &mut Option<Sending>, now: &SeederProgress) {
        if matches!(now.phase, SeederPhase::Owner | SeederPhase::Gone) {
            if let Some(sending) = sending.take() {
                sending.bar.finish();
            }
            return;
        }
        let (served, size) = (self.seeder.served(), self.size());
        let begun = || Sending { bar: self.output.bar("sending", size), start: served, last: served };
        let sending = sending.get_or_insert_with(begun);
        if std::mem::replace(&mut sending.last, served) == served {
            return;
        }
        let sent = served - sending.start;
        let extra = match (now.phase, now.rounds) {
            (SeederPhase::HandedOver, _) => "(handed over)".to_owned(),
            (_, 0) => String::new(),
            (_, rounds) => format!("(round {rounds}, {} sent)", size::format(sent)),
        };
        sending.bar.set(sent.min(size), &extra);
    }

    async fn gone(&self, now: &SeederProgress) -> Result<Ended> {
        self.abandon().await;
        let served = self.seeder.served();
        let human = format!("gone: the other side has everything; {} were sent from here", size::format(served));
        self.output.event("gone", &human, json!({ "epoch": now.epoch, "sent_bytes": served }));
        Ok(Ended::Gone)
    }

    /// There is nothing more to store: it is elsewhere, or given up.
    async fn abandon(&self) {
        abandon(self.mounts.iter().copied()).await;
    }

    /// Ends what can be ended without loss.
    async fn stop(&self, signals: &mut Signals) -> Result<Ended> {
        // A handover that is under way comes to its end first.
        let stopped = tokio::select! {
            stopped = self.seeder.stop_tracking() => stopped,
            () = signals.next() => {
                self.abandon().await;
                bail!("gave up while the region was changing hands: start it again");
            }
        };
        if let Err(error) = stopped {
            self.abandon().await;
            return Err(error).context(IN_DOUBT);
        }
        if !self.seeder.owns() {
            return self.wait(signals).await;
        }
        if self.volatile {
            self.abandon().await;
            bail!("stopped; the region was in memory only, and is lost");
        }
        self.output.note("stopping", "storing what is left; Ctrl-C again gives up");
        for mount in self.mounts.iter().copied() {
            tokio::select! {
                closed = close(mount, self.output) => if let Err(error) = closed {
                    self.abandon().await;
                    return Err(error).context("gave up, as not everything could be stored");
                },
                () = signals.next() => {
                    self.abandon().await;
                    bail!("gave up before everything was stored");
                }
            }
        }
        Ok(Ended::Stopped)
    }

    /// What is missing over there is only here.
    async fn wait(&self, signals: &mut Signals) -> Result<Ended> {
        self.output.note(
            "waiting",
            "the region was handed over, and the other side still reads from here; Ctrl-C again stops that until this is \
             started again",
        );
        tokio::select! {
            now = self.seeder.gone() => self.gone(&now).await,
            () = signals.next() => {
                self.abandon().await;
                bail!("stopped while something was missing over there: start it again, or that is lost")
            }
        }
    }
}

/// Unmounts without storing anything more.
pub(super) async fn abandon(mounts: impl IntoIterator<Item = View<'_>>) {
    for mount in mounts {
        let _ = tokio::time::timeout(GIVE_UP_LIMIT, mount.abandon()).await;
    }
}

/// Unmounts and stores, and waits for those who still use the file.
pub(super) async fn close(mount: View<'_>, output: Output) -> r3map::Result<()> {
    let mut busy = false;
    loop {
        match mount.close().await {
            Err(error) if mount.is_busy(&error) => {
                if !busy {
                    output.note("busy", &format!("{error}; waiting until it is closed, Ctrl-C gives up"));
                    busy = true;
                }
                tokio::time::sleep(TICK).await;
            }
            closed => return closed,
        }
    }
}

/// Takes no more calls, and sees whether the regions left in the last moment.
pub(super) async fn close_listeners(seeding: Seeding, ended: Ended, output: Output) -> Result<()> {
    if ended == Ended::Gone {
        // What is in flight is the answer that they have gone, and calls whose callers have gone.
        let _ = tokio::time::timeout(GIVE_UP_LIMIT, seeding.close()).await;
        return Ok(());
    }
    let seeder = seeding.seeder().clone();
    let closed = seeding.close().await;
    if ended == Ended::Stopped {
        if !seeder.owns() {
            bail!(
                "the region was handed over in the last moment: start it again, so that the other side gets the rest"
            );
        }
        seeder.stop_tracking().await.context(IN_DOUBT)?;
        closed?;
        output.event("stopped", "stopped: everything is stored", json!({}));
    }
    Ok(())
}
