//! `r3map leech`: takes a region over from the host that seeds it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map::migration::{
    Arrived, FinalizeError, Landing, LeechOptions, Leecher, LeecherSettings, Migration, Place, Precopy, PullProgress,
    Pulling, Report, Running, SeederPhase, Standing, Unconverged, Unsettled,
};
use r3map::{Registry, RetrySettings, size};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::application;
use crate::args::{self, Cache, Finalize};
use crate::output::Output;
use crate::signals::Signals;

/// How often the bars move.
const TICK: Duration = Duration::from_millis(200);
/// How long to wait before a seeder that does not answer is asked again.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) async fn run(registry: &Registry, args: args::Leech, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let migration = migration(&args)?;
    let running = tokio::select! {
        running = arrive(registry, &args, &migration, output) => running?,
        () = signals.next() => bail!("stopped before the region was asked for; the application runs on over there"),
    };
    let report = tokio::select! {
        report = rest(&running, output) => report?,
        () = signals.next() => {
            bail!("stopped while something was missing here: run the same command again to go on")
        }
    };
    say_report(&report, output);
    match &args.then_seed {
        Some(uri) => seed_on(registry, &args, uri, running, &mut signals, output).await,
        None => keep(&args, &running, &mut signals, output).await,
    }
}

fn migration(args: &args::Leech) -> Result<Migration> {
    let retry = RetrySettings { limit: args.retry.limit(), ..RetrySettings::default() };
    let target = match args.finalize {
        Finalize::Downtime(time) => time,
        Finalize::Ready | Finalize::Manual => Precopy::default().target,
    };
    let unconverged = if args.give_up { Unconverged::GiveUp } else { Unconverged::Finalize };
    let settings = LeecherSettings {
        precopy: Precopy { target, unconverged, ..Precopy::default() },
        before: retry.clone(),
        after: retry,
        ..LeecherSettings::default()
    };
    let go = LeechOptions { size: args.size, chunk_size: args.chunk_size, ..LeechOptions::default() };
    let mut migration = application::migration(&args.application, &args.path)?.settings(settings).go(go);
    if let Cache::File(cache) = &args.cache {
        migration = migration.ledger(ledger_beside(cache));
    }
    Ok(migration)
}

fn ledger_beside(cache: &Path) -> PathBuf {
    let mut name: OsString = cache.into();
    name.push(".ledger");
    name.into()
}

fn places(args: &args::Leech) -> Vec<Place> {
    let cache = match &args.cache {
        Cache::Memory => r3map::Cache::Memory,
        Cache::File(path) => r3map::Cache::File(path.clone()),
    };
    vec![Place::path(&args.path).cache(cache)]
}

/// From the first call to where the application runs here.
async fn arrive(
    registry: &Registry,
    args: &args::Leech,
    migration: &Migration,
    output: Output,
) -> Result<Leecher<Running<Arrived>>> {
    let running = match migration.standing()? {
        Some(Standing::Asking { .. } | Standing::Arrived { .. }) => {
            output.note("resuming", "a migration to here was under way: going on with it");
            migration.clone().resume(registry, &args.uri, places(args)).await?
        }
        Some(Standing::Owner { .. }) => {
            bail!(
                "the region has arrived here already: use it with `r3map seed --cache`, or remove the cache and its ledger"
            )
        }
        _ => {
            let leecher = migration.clone().leech(registry, &args.uri, places(args)).await?;
            copy(&leecher, args.finalize, output).await?;
            finalize(leecher, output).await?
        }
    };
    if let Err(error) = running.resumed() {
        output.note("warning", &format!("the region is here, but the application was not started: {error}"));
    }
    let (report, path) = (running.report(), args.path.display().to_string());
    let human = format!("running: {} at {path}, downtime {}", size::format(report.size), report.downtime);
    output.event("running", &human, json!({ "path": path, "size": report.size, "downtime": downtime(&report) }));
    Ok(running)
}

/// Copies until the region shall be moved.
async fn copy(leecher: &Leecher<Pulling<Landing>>, when: Finalize, output: Output) -> Result<()> {
    let bar = output.bar("copying", leecher.progress().borrow().size);
    let mut asked = std::pin::pin!(asked(when));
    let mut told = false;
    loop {
        let now = leecher.progress().borrow().clone();
        bar.set(now.present, &rounds(&now));
        if now.phase != r3map::migration::PullPhase::Pulling && !told {
            told = true;
            ready(leecher, when, output).await?;
        }
        if told && when != Finalize::Manual {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            answer = &mut asked => {
                answer?;
                break;
            }
        }
    }
    bar.finish();
    Ok(())
}

async fn ready(leecher: &Leecher<Pulling<Landing>>, when: Finalize, output: Output) -> Result<()> {
    let ready = leecher.ready().await?;
    let dirty = size::format(ready.dirty);
    let unconverged = ready.verdict.is_some_and(r3map::migration::Verdict::is_unconverged);
    let how = if unconverged { "it is written to as fast as it is copied" } else { "the rest is small" };
    let next = if when == Finalize::Manual { "; Enter or SIGUSR1 moves it" } else { "" };
    let human = format!("ready after {} rounds: {how} ({dirty} in the last one){next}", ready.rounds);
    let value = json!({ "rounds": ready.rounds, "dirty_bytes": ready.dirty, "converged": !unconverged });
    output.event("copied", &human, value);
    Ok(())
}

fn rounds(progress: &PullProgress) -> String {
    match progress.rounds {
        0 => String::new(),
        rounds => format!("(round {rounds}, {} changed in the last)", size::format(progress.dirty)),
    }
}

/// Returns when somebody presses Enter or sends SIGUSR1, and never if nobody is asked to.
async fn asked(when: Finalize) -> Result<()> {
    if when != Finalize::Manual {
        return std::future::pending().await;
    }
    let mut told = signal(SignalKind::user_defined1())?;
    let (tell, enter) = tokio::sync::oneshot::channel();
    // A thread of its own: reading cannot be given up, and must not keep the process from ending.
    std::thread::spawn(move || {
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|read| read > 0) {
            let _ = tell.send(());
        }
    });
    let enter = async {
        if enter.await.is_err() {
            // There is nobody at the keyboard.
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        _ = told.recv() => {}
        () = enter => {}
    }
    Ok(())
}

/// Moves it. Where nobody knows what came of the asking, it is asked again until somebody does.
async fn finalize(mut leecher: Leecher<Pulling<Landing>>, output: Output) -> Result<Leecher<Running<Arrived>>> {
    loop {
        let FinalizeError { error, then } = match leecher.finalize().await {
            Ok(running) => return Ok(running),
            Err(left) => left,
        };
        match then {
            Unsettled::Unknown(again) => {
                output.note(
                    "waiting",
                    &format!("the seeder does not say whether it has handed over; asking again: {error}"),
                );
                leecher = again;
            }
            Unsettled::Refused(again) => {
                drop(again.abort().await);
                bail!("the region stays where it is, and the application runs on there: {error}");
            }
            Unsettled::Returned => bail!("the region went back, and the application runs on over there: {error}"),
            Unsettled::Owed(owed) => {
                output.note("waiting", &format!("the region cannot be used here ({error}); giving it back"));
                while owed.abort().await.is_err() {
                    tokio::time::sleep(PAUSE).await;
                }
                bail!("the region went back, and the application runs on over there: {error}");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits until nothing is missing.
async fn rest(running: &Leecher<Running<Arrived>>, output: Output) -> Result<Report> {
    let region = running.regions()[0].region().clone();
    let bar = output.bar("pulling", region.size());
    let mut pulled = std::pin::pin!(running.pulled());
    let report = loop {
        tokio::select! {
            report = &mut pulled => break report?,
            () = tokio::time::sleep(TICK) => {
                if let Some(progress) = region.progress() {
                    bar.set(progress.borrow().valid_bytes, "");
                }
            }
        }
    };
    bar.finish();
    if let Err(error) = running.confirmed() {
        output.note("warning", &format!("everything is here, but the seeder does not know: {error}"));
    }
    Ok(report)
}

fn downtime(report: &Report) -> serde_json::Value {
    let downtime = report.downtime;
    json!({
        "total_seconds": downtime.total().as_secs_f64(),
        "suspend_seconds": downtime.suspend.as_secs_f64(),
        "flush_seconds": downtime.flush.as_secs_f64(),
        "round_trip_seconds": downtime.round_trip.as_secs_f64(),
        "resume_seconds": downtime.resume.as_secs_f64(),
    })
}

fn say_report(report: &Report, output: Output) {
    let [before, after, dirty] = [report.pulled_before, report.pulled_after, report.dirty].map(size::format);
    let human = format!(
        "pulled: all {} are here after {:.1?}: {before} before in {} rounds, {after} after ({dirty} written last); downtime {}",
        size::format(report.size),
        report.total,
        report.rounds,
        report.downtime
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

/// Shows the region until somebody says stop.
async fn keep(
    args: &args::Leech,
    running: &Leecher<Running<Arrived>>,
    signals: &mut Signals,
    output: Output,
) -> Result<()> {
    let mount = running.regions()[0].path().context("the region is on a path")?;
    tokio::select! {
        () = mount.unmounted() => output.note("unmounted", "the file was unmounted; storing what is left"),
        () = signals.next() => {}
    }
    if args.cache == Cache::Memory {
        output.note("stopping", "the region is in this process's memory only: Ctrl-C again loses it");
        signals.next().await;
        mount.abandon().await;
        bail!("stopped; the region was in memory only, and is lost");
    }
    output.note("stopping", "storing what is left; Ctrl-C again gives up");
    tokio::select! {
        closed = mount.close() => closed?,
        () = signals.next() => bail!("gave up before everything was stored"),
    }
    output.event("stopped", "stopped: everything is stored; `r3map seed --cache` goes on with it", json!({}));
    Ok(())
}

/// Offers the region to the next.
async fn seed_on(
    registry: &Registry,
    args: &args::Leech,
    uri: &r3map::Uri,
    running: Leecher<Running<Arrived>>,
    signals: &mut Signals,
    output: Output,
) -> Result<()> {
    let migration = migration(args)?;
    let (regions, seeding) = migration.release(registry, std::slice::from_ref(uri), running).await?;
    for uri in seeding.uris() {
        output.event("seeding", &format!("seeding: to be taken over at {uri}"), json!({ "uri": uri }));
    }
    let mut progress = seeding.seeder().progress();
    tokio::select! {
        gone = progress.wait_for(|progress| progress.phase == SeederPhase::Gone) => drop(gone?),
        () = signals.next() => bail!("stopped while the region was here"),
    }
    let region: &Arc<Arrived> = &regions[0];
    if let Some(mount) = region.path() {
        mount.abandon().await;
    }
    output.event("gone", "gone: the next one has everything", json!({}));
    Ok(seeding.close().await?)
}
