//! `r3map leech`: takes regions over from the host that seeds them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map::migration::{Arrived, LeechOptions, Leecher, LeecherSettings, Migration, Place, Precopy, Running, Standing};
use r3map::{ErrorKind, Registry, RetrySettings};

use super::arrived::{self, Site};
use super::moving::{self, Trigger, Until};
use super::{application, ledger_beside};
use crate::args::{self, As, Cache, Finalize};
use crate::output::Output;
use crate::signals::Signals;

const NOT_AT_ITS_END: &str = "the migration to here is not at its end: run the same command again";

/// How long a seeder is asked at least.
const SHORTEST: Duration = Duration::from_secs(1);

pub(crate) async fn run(registry: &Registry, args: args::Leech, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut trigger = Trigger::new(args.finalize)?;
    let plan = Plan::new(args)?;
    let running = match plan.migration.standing()? {
        Some(Standing::Asking { .. } | Standing::Arrived { .. }) => {
            match plan.go_on(registry, &mut signals, output).await? {
                Some(running) => running,
                None => plan.start(registry, &mut trigger, &mut signals, output).await?,
            }
        }
        None | Some(Standing::Gone { .. } | Standing::Pulling { .. }) => {
            plan.start(registry, &mut trigger, &mut signals, output).await?
        }
        Some(Standing::Owner { .. }) => bail!(
            "the region has arrived here already: use it with `r3map seed --cache`, or remove the cache and {}",
            plan.ledger_name()
        ),
        Some(Standing::HandedOver { .. }) => bail!(
            "the region was handed over from here, and may be missed there still: `r3map seed --cache` serves the rest ({})",
            plan.ledger_name()
        ),
    };
    let plan_for_next = plan.to_seed_on(output)?;
    let site = Site { running, args: plan.args, caches: plan.caches, next: plan_for_next, output };
    site.stay(registry, &mut signals).await
}

/// What the command line asks for, put together.
struct Plan {
    args: args::Leech,
    migration: Migration,
    /// As they were given.
    places: Vec<PathBuf>,
    /// Where the application finds its regions.
    paths: Vec<PathBuf>,
    /// Cache files: as many as regions, or none where they are in memory.
    caches: Vec<PathBuf>,
    ledger: Option<PathBuf>,
}

impl Plan {
    fn new(args: args::Leech) -> Result<Self> {
        application::check(&args.show)?;
        let places: Vec<_> = std::iter::once(&args.path).chain(&args.also).cloned().collect();
        let paths: Vec<_> = places.iter().map(|place| application::shown_at(&args.show, place)).collect();
        let caches = caches(&args, paths.len())?;
        let ledger = match (&args.ledger, caches.first()) {
            (Some(_), None) => bail!("--ledger is for a region that survives this process: add --cache FILE"),
            (Some(ledger), Some(_)) => Some(ledger.clone()),
            (None, cache) => cache.map(|cache| ledger_beside(cache)),
        };
        let mut migration = application::migration(&args.application, &paths)?.settings(settings(&args)?);
        migration =
            migration.go(LeechOptions { size: args.size, chunk_size: args.chunk_size, ..LeechOptions::default() });
        if let Some(ledger) = &ledger {
            migration = migration.ledger(ledger);
        }
        Ok(Self { args, migration, places, paths, caches, ledger })
    }

    fn ledger_name(&self) -> String {
        self.ledger.as_ref().map_or_else(String::new, |ledger| ledger.display().to_string())
    }

    fn places(&self) -> Vec<Place> {
        let show = &self.args.show;
        let cache =
            |index: usize| self.caches.get(index).map_or(r3map::Cache::Memory, |file| r3map::Cache::File(file.clone()));
        let place = |(index, path): (usize, &PathBuf)| {
            let place = match show.r#as {
                As::File => Place::path(path),
                device => Place::block(device.kind()),
            };
            place.settings(application::settings(show, path)).cache(cache(index))
        };
        self.places.iter().enumerate().map(place).collect()
    }

    /// As a seeder, with what stays the same for as long as the bytes live.
    fn to_seed_on(&self, output: Output) -> Result<Migration> {
        let facts = self.caches.iter().map(|cache| Ok(r3map::migration::describe_cache(cache)?.identity));
        let identities = facts.collect::<Result<Vec<_>>>()?;
        let identity = (!identities.is_empty()).then(|| identities.join(", "));
        let next = application::seeding(self.migration.clone(), &self.args.application, &self.paths, output);
        let next = next.identity(identity).lease(self.args.lease);
        Ok(next.open_to_go(self.args.open_to_go))
    }

    /// From the first call to where the application runs here.
    async fn start(
        &self,
        registry: &Registry,
        trigger: &mut Trigger,
        signals: &mut Signals,
        output: Output,
    ) -> Result<Leecher<Running<Arrived>>> {
        // Before anything moves: a region that is here already must not end for this.
        for place in &self.args.then_seed {
            Migration::can_seed(registry, place).await.context("--then-seed")?;
        }
        let before = self.migration.standing()?;
        let new: Vec<_> = self.caches.iter().filter(|cache| !cache.exists()).collect();
        let moved = async {
            let leecher = tokio::select! {
                leecher = self.migration.clone().leech(registry, &self.args.uri, self.places()) => leecher?,
                () = signals.next() => bail!("stopped before anything was copied; the application runs on over there"),
            };
            moving::copy(leecher, trigger, signals, output).await
        };
        let moved = match moved.await {
            Ok(leecher) => {
                moving::finalize(leecher, Until::new(self.args.give_up_after.limit()), signals, output).await
            }
            Err(error) => Err(moving::Failed::Stays(error)),
        };
        match moved {
            Ok(running) => {
                arrived::tell_running(&running, &self.paths, output);
                Ok(running)
            }
            Err(moving::Failed::Stays(error)) => Err(self.tidy_up(error, before.as_ref(), &new)),
            Err(moving::Failed::Unknown(error)) => Err(self.advise(error)),
        }
    }

    /// The region stays over there. Unless that is only because the seeder does not answer, what was copied of it is of no
    /// use, and there is nothing to go on with.
    fn tidy_up(&self, error: anyhow::Error, before: Option<&Standing>, new: &[&PathBuf]) -> anyhow::Error {
        let now = self.migration.standing().ok().flatten();
        let cause = error.chain().find_map(|cause| cause.downcast_ref::<r3map::Error>());
        let silent = cause.is_some_and(|cause| cause.kind().is_retryable());
        if silent && matches!(now, Some(Standing::Pulling { .. })) {
            return error.context("the same command goes on from here when the seeder answers again");
        }
        let ledger = self.ledger.iter().filter(|_| now.as_ref() != before);
        for file in new.iter().map(|file| file.as_path()).chain(ledger.map(PathBuf::as_path)) {
            remove(file);
        }
        error
    }

    fn advise(&self, error: anyhow::Error) -> anyhow::Error {
        match self.ledger {
            Some(_) => error.context("it is not known who owns the region; run the same command again to find out"),
            None => error.context(
                "it is not known who owns the region; if the seeder says that it was handed over, start it with --take-back",
            ),
        }
    }

    /// Goes on with a migration whose process was killed after it had asked for the region; nothing where that was in vain.
    async fn go_on(
        &self,
        registry: &Registry,
        signals: &mut Signals,
        output: Output,
    ) -> Result<Option<Leecher<Running<Arrived>>>> {
        output.note(
            "resuming",
            "a migration to here was under way: going on with it; --retry and --give-up-after say for how long it is tried",
        );
        let resumed = tokio::select! {
            resumed = self.migration.clone().resume(registry, &self.args.uri, self.places()) => resumed,
            () = signals.next() => bail!("stopped; run the same command again to go on"),
        };
        match resumed {
            Ok(Some(running)) => {
                arrived::tell_resumed(&running, &self.paths, output);
                Ok(Some(running))
            }
            Ok(None) => {
                output.note("copying", "the region has not left the seeder, and is copied on");
                Ok(None)
            }
            Err(error) if error.kind() == ErrorKind::Conflict => {
                Err(error).context("the migration to here cannot go on")
            }
            Err(error) => Err(error).context(NOT_AT_ITS_END),
        }
    }
}

fn remove(file: &Path) {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, file = %file.display(), "what is of no use any more cannot be removed");
        }
        _ => {}
    }
}

fn caches(args: &args::Leech, regions: usize) -> Result<Vec<PathBuf>> {
    let file = |cache: &Cache| match cache {
        Cache::Memory => None,
        Cache::File(file) => Some(file.clone()),
    };
    let files: Vec<_> = args.cache.iter().filter_map(file).collect();
    if !files.is_empty() && (files.len() != regions || args.cache.len() != regions) {
        bail!("give --cache FILE once for each of the {regions} regions, or not at all: they are moved as one");
    }
    Ok(files)
}

fn settings(args: &args::Leech) -> Result<LeecherSettings> {
    let retry =
        RetrySettings { limit: args.retry.limit(), attempt_timeout: args.attempt_timeout, ..RetrySettings::default() };
    let target = match args.finalize {
        Finalize::Downtime(time) => time,
        Finalize::Ready | Finalize::Manual => Precopy::default().target,
    };
    let precopy = Precopy {
        target,
        max_rounds: args.max_rounds,
        max_time: args.max_time,
        unconverged: args.unconverged.into(),
        ..Precopy::default()
    };
    let default = LeecherSettings::default();
    // What a seeder takes for its command, and then for storing.
    let hooks = args.application.hook_timeout.saturating_mul(2).saturating_add(Duration::from_secs(10));
    let more = args.give_up_after.limit();
    // What is asked for ever is asked until one gives up; once at least.
    let handover_limit = more.filter(|_| retry.limit.is_none()).map(|more| more.max(SHORTEST));
    let patience = retry.limit.zip(more).map(|(retry, more)| retry.saturating_add(more)).or(handover_limit);
    let handover_timeout = default.handover_timeout.max(hooks).min(patience.unwrap_or(Duration::MAX));
    Ok(LeecherSettings { precopy, before: retry.clone(), after: retry, handover_limit, handover_timeout, ..default })
}
