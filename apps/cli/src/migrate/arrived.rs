//! After the regions have changed hands: what is missing is fetched, then they are shown until somebody says stop, or
//! until the next host takes them over.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures_util::future::select_all;
use r3map::migration::{Arrived, Former, Leecher, Migration, Report, Running, Seeding};
use r3map::{Outage, Registry, Uri, size};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::host::{self, Ended, Host};
use super::{TICK, rounds};
use crate::args::{self, Patience};
use crate::output::{Bar, Output};
use crate::shown::{View, tell_refused};
use crate::signals::Signals;
use crate::trouble::Troubles;

/// How long a seeder is told that the regions arrived after somebody has said stop: as long as one attempt to tell it may
/// take, and a few more.
const TELL_LIMIT: Duration = Duration::from_secs(30);

/// How long to wait before an address that is taken is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Says that the application may run here.
pub(super) fn tell_running(running: &Leecher<Running<Arrived>>, paths: &[PathBuf], output: Output) {
    let report = running.report();
    let human = format!("downtime {}", report.downtime);
    tell(running, paths, &human, json!({ "downtime": downtime(&report) }), output);
}

/// Says that it may run again: how long it did not, nobody knows.
pub(super) fn tell_resumed(running: &Leecher<Running<Arrived>>, paths: &[PathBuf], output: Output) {
    tell(running, paths, "going on with what is missing", json!({ "resumed": true }), output);
}

fn tell(running: &Leecher<Running<Arrived>>, paths: &[PathBuf], how: &str, mut value: Value, output: Output) {
    if let Err(error) = running.resumed() {
        output.note(
            "warning",
            &format!(
                "the region is here, but the application could not be started, or cannot write to all of it: {error}"
            ),
        );
    }
    running.regions().iter().filter_map(|region| region.block()).for_each(|block| tell_refused(block, output));
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    let kinds: Vec<_> = mounts(running.regions()).map(View::word).collect();
    let size = running.report().size;
    let names: Vec<_> = running.regions().iter().map(|region| region.name()).collect();
    value["regions"] = json!(names);
    value["paths"] = json!(paths);
    value["as"] = json!(kinds);
    value["size"] = json!(size);
    value["epoch"] = json!(running.epoch());
    let human = format!("running: {} ({}) at {}; {how}", names.join(", "), size::format(size), paths.join(", "));
    output.event("running", &human, value);
}

fn downtime(report: &Report) -> Value {
    let downtime = report.downtime;
    json!({
        "total_seconds": downtime.total().as_secs_f64(),
        "suspend_seconds": downtime.suspend.as_secs_f64(),
        "flush_seconds": downtime.flush.as_secs_f64(),
        "round_trip_seconds": downtime.round_trip.as_secs_f64(),
        "resume_seconds": downtime.resume.as_secs_f64(),
    })
}

fn tell_report(report: &Report, output: Output) {
    let [size, before, after, dirty] =
        [report.size, report.pulled_before, report.pulled_after, report.dirty].map(size::format);
    let human = format!(
        "pulled: all {size} are here after {:.1?}: {before} before the move in {}, {after} after it ({dirty} were \
         written last)",
        report.total,
        rounds(report.rounds),
    );
    let value = json!({
        "size": report.size,
        "rounds": report.rounds,
        "pulled_before": report.pulled_before,
        "pulled_after": report.pulled_after,
        "dirty_bytes": report.dirty,
        "total_seconds": report.total.as_secs_f64(),
        "downtime": downtime(report),
    });
    output.event("pulled", &human, value);
}

/// Whether anything comes from a seeder while something is missing.
struct Arrivals {
    outages: Vec<watch::Receiver<Option<Outage>>>,
    /// Bytes so far.
    came: u64,
    /// When something came for the last time, or later: nothing came before because there was no room for it here, and
    /// it did answer.
    since: Instant,
    /// It does not answer: what it was asked for in vain last.
    silence: Option<r3map::Error>,
    /// What else goes wrong, such as that there is no room here.
    troubles: Troubles,
}

/// Something to be said: the event, and in words.
type News = (&'static str, String);

impl Arrivals {
    fn new(running: &Leecher<Running<Arrived>>) -> Self {
        let outages = running.regions().iter().map(|region| region.region().outage()).collect();
        Self::through(outages, running.report().pulled_after)
    }

    fn through(outages: Vec<watch::Receiver<Option<Outage>>>, came: u64) -> Self {
        Self { outages, came, since: Instant::now(), silence: None, troubles: Troubles::default() }
    }

    fn outage(&self) -> Option<Outage> {
        self.outages.iter().find_map(|outage| outage.borrow().clone())
    }

    /// Says what keeps it from arriving that is no fault of the seeder's line.
    fn tell_trouble(&mut self, running: &Leecher<Running<Arrived>>, bar: &Bar, output: Output) {
        for error in running.regions().iter().filter_map(|region| self.troubles.news(region.region())) {
            bar.aside(|| output.note("trouble", &format!("what is missing is tried again: {error}")));
        }
    }

    /// Says it when the seeder falls silent, and when it answers again.
    fn look(&mut self, running: &Leecher<Running<Arrived>>, bar: &Bar, output: Output) {
        self.tell_trouble(running, bar, output);
        tell_news(self.hear(running.report().pulled_after), bar, output);
    }

    /// What there is to say now that so many bytes have come.
    fn hear(&mut self, came: u64) -> Option<News> {
        let comes = came > self.came;
        if comes {
            (self.came, self.since) = (came, Instant::now());
        }
        let Some(Outage { since, error }) = self.outage() else { return self.answers() };
        if comes && self.silence.is_none() {
            return None;
        }
        self.since = self.since.max(since);
        let human = format!("the seeder does not answer; what is missing waits for it, and it is tried again: {error}");
        self.silence.replace(error).is_none().then_some(("waiting", human))
    }

    /// What there is to say when it is not silent.
    fn answers(&mut self) -> Option<News> {
        self.silence.take().map(|_| ("resumed", "the seeder answers again".to_owned()))
    }

    /// Why there is no point in waiting any longer, if that is so.
    fn are_over(&self, patience: Option<Duration>) -> Option<String> {
        let (error, waited) = (self.silence.as_ref()?, self.since.elapsed());
        (waited >= patience?).then(|| format!("nothing has come from the seeder for {waited:.0?}: {error}"))
    }
}

fn tell_news(news: Option<News>, bar: &Bar, output: Output) {
    if let Some((event, human)) = news {
        bar.aside(|| output.note(event, &human));
    }
}

/// Regions that have arrived.
pub(super) struct Site {
    pub(super) running: Leecher<Running<Arrived>>,
    pub(super) args: args::Leech,
    /// Nothing where they are in memory.
    pub(super) caches: Vec<PathBuf>,
    /// How they are seeded on.
    pub(super) next: Migration,
    pub(super) output: Output,
}

impl Site {
    /// Shows them until it is over.
    pub(super) async fn stay(self, registry: &Registry, signals: &mut Signals) -> Result<()> {
        let stop = self.rest(signals).await?;
        if stop || self.args.then_seed.is_empty() {
            return self.keep(stop, signals).await;
        }
        self.seed_on(registry, signals).await
    }

    /// Waits until nothing is missing. Whether somebody has said stop meanwhile.
    async fn rest(&self, signals: &mut Signals) -> Result<bool> {
        let mut pulled = std::pin::pin!(self.running.pulled());
        let bar = self.output.bar("pulling", self.running.report().size);
        let (mut stop, mut arrivals) = (false, Arrivals::new(&self.running));
        let report = loop {
            tokio::select! {
                report = &mut pulled => match report {
                    Ok(report) => break report,
                    Err(error) => {
                        bar.finish();
                        return Err(self.lose(error).await);
                    }
                },
                () = tokio::time::sleep(TICK) => {
                    arrivals.look(&self.running, &bar, self.output);
                    self.draw(&bar);
                    if let Some(why) = arrivals.are_over(self.patience()) {
                        bar.finish();
                        return Err(self.give_up().await.context(why));
                    }
                }
                () = unmounted(self.running.regions()), if !stop => {
                    stop = true;
                    bar.aside(|| self.output.note("unmounted", "somebody else unmounted it; fetching what is missing"));
                }
                () = signals.next() => {
                    if std::mem::replace(&mut stop, true) {
                        bar.finish();
                        return Err(self.give_up().await);
                    }
                    let human = "the region is here, and something is missing still, which is fetched first; Ctrl-C again gives up";
                    bar.aside(|| self.output.note("stopping", human));
                }
            }
        };
        // Since the last look.
        tell_news(arrivals.answers(), &bar, self.output);
        bar.finish();
        tell_report(&report, self.output);
        if let Err(error) = self.running.kept() {
            let human = format!("everything is here, but that cannot be written down, which is tried again: {error}");
            self.output.note("warning", &human);
        } else if let Err(error) = self.running.confirmed() {
            let human =
                format!("everything is here, but the seeder does not know; it is told when it answers: {error}");
            self.output.note("warning", &human);
        }
        Ok(stop)
    }

    /// How long what is missing is waited for, if not for ever: nobody can go on with what is in memory only.
    fn patience(&self) -> Option<Duration> {
        let limit = self.args.give_up_after.limit().filter(|_| !self.caches.is_empty())?;
        Some(self.args.retry.limit().unwrap_or_default().saturating_add(limit))
    }

    fn draw(&self, bar: &Bar) {
        let regions = self.running.regions().iter().map(|region| region.region());
        let here = |region: &r3map::Region| region.progress().map_or(0, |progress| progress.borrow().valid_bytes);
        bar.set(regions.map(here).sum(), "");
    }

    async fn give_up(&self) -> anyhow::Error {
        abandon(self.running.regions()).await;
        match self.caches.is_empty() {
            true => anyhow!(
                "gave up; the region was in memory only, and what was written here is lost: the seeder has it as it was when \
                 it left, and `r3map seed --take-back` shows it again"
            ),
            false => anyhow!("gave up while something was missing here: run the same command again to go on"),
        }
    }

    /// They are not to be used here any more: somebody has taken them back over there, or the region was closed.
    async fn lose(&self, error: r3map::Error) -> anyhow::Error {
        abandon(self.running.regions()).await;
        anyhow!(error).context("the region cannot be used here any more, and is not shown")
    }

    /// Shows them until somebody says stop.
    async fn keep(&self, mut stop: bool, signals: &mut Signals) -> Result<()> {
        if !stop {
            tokio::select! {
                () = unmounted(self.running.regions()) => {
                    self.output.note("unmounted", "somebody else unmounted it; storing what is left");
                }
                () = signals.next() => stop = true,
                lost = self.running.taken_back() => return Err(self.lose(lost).await),
            }
        }
        if self.caches.is_empty() {
            if stop {
                self.output.note("stopping", "the region is in this process's memory only: Ctrl-C again loses it");
                tokio::select! {
                    () = signals.next() => {}
                    () = unmounted(self.running.regions()) => {}
                    lost = self.running.taken_back() => return Err(self.lose(lost).await),
                }
            }
            abandon(self.running.regions()).await;
            bail!("stopped; the region was in memory only, and is lost");
        }
        self.output.note("stopping", "storing what is left; Ctrl-C again gives up");
        for mount in mounts(self.running.regions()) {
            tokio::select! {
                closed = host::close(mount, self.output) => if let Err(error) = closed {
                    abandon(self.running.regions()).await;
                    return Err(error).context("gave up, as not everything could be stored");
                },
                () = signals.next() => {
                    abandon(self.running.regions()).await;
                    bail!("gave up before everything was stored");
                }
            }
        }
        if let Err(error) = self.running.kept() {
            bail!(
                "everything is stored, but that it is owned here is not written down: run the same command again: {error}"
            );
        }
        let human = "stopped: everything is stored; `r3map seed --cache` goes on with it";
        self.output.event("stopped", human, json!({}));
        tell_former(self.running.former(), last_words(self.args.give_up_after), signals, self.output).await
    }

    /// Offers them to the next host.
    async fn seed_on(self, registry: &Registry, signals: &mut Signals) -> Result<()> {
        // Until it is written down that they are here, they are not to be passed on, and go on being used.
        while self.running.kept().is_err() {
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = unmounted(self.running.regions()) => return self.keep(false, signals).await,
                () = signals.next() => return self.keep(true, signals).await,
                lost = self.running.taken_back() => return Err(self.lose(lost).await),
            }
        }
        let Self { running, args, caches, next, output } = self;
        let (regions, mut seeding) = next.release(registry, &[], running).await?;
        let mounts = mounts(&regions).collect();
        let (former, seeder) = (seeding.former(), seeding.seeder().clone());
        let host = Host { seeder, mounts, volatile: caches.is_empty(), output };
        let ended = tokio::select! {
            ended = host.until_gone(signals) => ended?,
            never = offer(&mut seeding, registry, &args.then_seed, output) => match never {},
        };
        host::close_listeners(seeding, ended, output).await?;
        debug_assert_ne!(ended, Ended::Returned, "they are shown");
        let limit = match ended {
            Ended::Gone => args.give_up_after.limit(),
            Ended::Stopped | Ended::Returned => last_words(args.give_up_after),
        };
        match former {
            Some(former) => tell_former(former, limit, signals, output).await,
            None => Ok(()),
        }
    }
}

/// Offers regions that are used here, at each place as soon as that can be had: they must not end because one is taken just
/// now. Never returns.
async fn offer(seeding: &mut Seeding, registry: &Registry, places: &[Uri], output: Output) -> Infallible {
    let mut places: Vec<_> = places.iter().map(|place| (place, false)).collect();
    while !places.is_empty() {
        let mut left = Vec::new();
        for (place, told) in places {
            match seeding.listen(registry, place).await {
                Ok(uri) => {
                    output.event("seeding", &format!("seeding: to be taken over at {uri}"), json!({ "uri": uri }));
                }
                Err(error) => {
                    if !told {
                        let human =
                            format!("the region is used here and cannot be offered yet, which is tried again: {error}");
                        output.note("waiting", &human);
                    }
                    left.push((place, true));
                }
            }
        }
        places = left;
        tokio::time::sleep(PAUSE).await;
    }
    std::future::pending().await
}

/// For how long a seeder is told that the regions arrived when somebody has said stop.
fn last_words(patience: Patience) -> Option<Duration> {
    Some(patience.limit().map_or(TELL_LIMIT, |limit| limit.min(TELL_LIMIT)))
}

/// Sees to it that the seeder from which the regions came knows that they arrived: who does not know that may take them
/// back there, and they would be in two places. It is told while the seeder here lives.
async fn tell_former(mut former: Former, limit: Option<Duration>, signals: &mut Signals, output: Output) -> Result<()> {
    if former.knows() {
        return Ok(());
    }
    let human = "the seeder from which the region came does not know that it has arrived; it is told when it answers, \
                 Ctrl-C gives up";
    output.note("waiting", human);
    let patience = async {
        match limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let why = tokio::select! {
        told = former.told() => match told {
            Ok(()) => {
                output.note("told", "the seeder from which the region came knows that it has arrived");
                return Ok(());
            }
            Err(error) => error.to_string(),
        },
        () = patience => "it does not answer".to_owned(),
        () = signals.next() => "stopped".to_owned(),
    };
    bail!(
        "the seeder from which the region came does not know that it has arrived here ({why}): stop it by hand, and do not \
         take the region back there"
    )
}

fn mounts(regions: &[Arc<Arrived>]) -> impl Iterator<Item = View<'_>> {
    regions.iter().filter_map(|region| View::arrived(region))
}

/// Returns when somebody else has unmounted one of the files.
async fn unmounted(regions: &[Arc<Arrived>]) {
    let mut waiting = mounts(regions).map(|mount| Box::pin(mount.gone())).peekable();
    match waiting.peek() {
        Some(_) => drop(select_all(waiting).await),
        None => std::future::pending().await,
    }
}

async fn abandon(regions: &[Arc<Arrived>]) {
    host::abandon(mounts(regions)).await;
}

#[cfg(test)]
mod tests {
    use r3map::{Error, ErrorKind, Operation};

    use super::*;

    #[test]
    fn a_seeder_that_answers_is_not_silent_though_nothing_comes_for_want_of_room() {
        let patience = Duration::from_secs(60);
        let away = |since| {
            let error = Error::new(ErrorKind::Unavailable, Operation::Read, "nobody is there");
            Some(Outage { since, error })
        };
        let long_ago = Instant::now() - 2 * patience;
        let outage = watch::Sender::new(away(long_ago));
        let mut arrivals = Arrivals::through(vec![outage.subscribe()], 0);
        arrivals.since = long_ago;
        assert_eq!(arrivals.hear(0).map(|news| news.0), Some("waiting"));
        assert_eq!(arrivals.hear(0), None, "that was said");
        assert!(arrivals.are_over(Some(patience)).is_some() && arrivals.are_over(None).is_none());

        outage.send_replace(None);
        assert_eq!(arrivals.hear(0).map(|news| news.0), Some("resumed"));
        assert_eq!(arrivals.are_over(Some(patience)), None, "it is not the seeder that is waited for");
        assert_eq!(arrivals.hear(0), None);

        outage.send_replace(away(Instant::now()));
        assert_eq!(arrivals.hear(0).map(|news| news.0), Some("waiting"));
        assert_eq!(arrivals.are_over(Some(patience)), None, "it has answered not long ago");
        outage.send_replace(None);
        assert!(arrivals.hear(0).is_some());
        outage.send_replace(away(long_ago));
        assert_eq!(arrivals.hear(1), None, "something comes");
        assert_eq!(arrivals.are_over(Some(patience)), None);
    }
}
