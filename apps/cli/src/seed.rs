//! `r3map seed`: shows a region as a file until another host takes it over.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use r3map::migration::{Guarded, Migration, SeederPhase, SeederProgress, Seeding, Source, Standing};
use r3map::{Backend, Mount, OpenOptions, PathMount, Registry, size};
use serde_json::json;

use crate::application;
use crate::args;
use crate::output::Output;
use crate::signals::Signals;

pub(crate) async fn run(registry: &Registry, args: args::Seed, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let mut migration = application::migration(&args.application, &args.path)?;
    if let Some(ledger) = ledger(&args) {
        migration = migration.ledger(ledger);
    }
    let (backend, name, identity) = open(registry, &args).await?;
    migration = migration.identity(identity);
    let owns = check_standing(&migration, &args)?;
    let (mount, source) = show(&args, backend, owns).await?;
    let seeding = migration.seed(registry, &args.listen, vec![(name.clone(), source)]).await?;
    let size = seeding.seeder().region(0).size();
    for uri in seeding.uris() {
        let path = args.path.display().to_string();
        let human = format!("ready: {name} ({}) at {path}, to be taken over at {uri}", size::format(size));
        output.event("ready", &human, json!({ "uri": uri, "region": name, "path": path, "size": size, "owner": owns }));
    }
    serve(&seeding, mount.as_ref(), &mut signals, output).await?;
    seeding.close().await?;
    Ok(())
}

/// The region, what it is called, and what stays the same for as long as its bytes live.
async fn open(registry: &Registry, args: &args::Seed) -> Result<(Arc<dyn Backend>, String, Option<String>)> {
    if let Some(cache) = &args.cache {
        let (backend, identity) = r3map::migration::open_cache(cache).await?;
        return Ok((backend, cache.display().to_string(), Some(identity)));
    }
    let uri = args.uri.as_ref().context("give a region, or --cache FILE")?;
    let options = OpenOptions {
        size: args.open.size,
        chunk_size: args.open.chunk_size,
        read_only: false,
        create: args.open.create,
    };
    Ok((registry.open(uri, &options).await?, uri.to_string(), registry.identity(uri)?))
}

/// Beside what it speaks of, where that outlives the process.
fn ledger(args: &args::Seed) -> Option<PathBuf> {
    let beside = |path: PathBuf| {
        let mut name: OsString = path.into();
        name.push(".ledger");
        PathBuf::from(name)
    };
    let local = |uri: &r3map::Uri| matches!(uri.scheme(), "file" | "directory").then(|| uri.path().ok()).flatten();
    args.ledger
        .clone()
        .or_else(|| args.cache.clone().map(beside))
        .or_else(|| args.uri.as_ref().and_then(local).map(beside))
}

/// Whether the region is this side's, as far as is written down.
fn check_standing(migration: &Migration, args: &args::Seed) -> Result<bool> {
    let place = ledger(args).map_or_else(String::new, |path| path.display().to_string());
    match migration.standing()? {
        None | Some(Standing::Owner { .. }) if args.take_back => {
            bail!("nothing was handed over that could be taken back")
        }
        Some(Standing::HandedOver { .. }) if args.take_back => {
            migration.take_back()?;
            Ok(true)
        }
        None | Some(Standing::Owner { .. }) => Ok(true),
        Some(Standing::HandedOver { .. }) => Ok(false),
        Some(Standing::Gone { .. }) => {
            bail!("the region has left: another host has all of it; remove {place} to use this old copy all the same")
        }
        Some(Standing::Asking { .. } | Standing::Arrived { .. }) => {
            bail!("the region has not arrived as a whole: run the same `r3map leech` again")
        }
    }
}

/// Shows the region if it is ours, and only serves it if not.
async fn show(
    args: &args::Seed,
    backend: Arc<dyn Backend>,
    owns: bool,
) -> Result<(Option<PathMount>, Arc<dyn Source>)> {
    if owns {
        let mut mount = Mount::direct(backend).migratable();
        if let Some(chunk) = args.open.chunk_size {
            mount = mount.settings(r3map::Settings { chunk_size: Some(chunk), ..r3map::Settings::default() });
        }
        let mount = mount.path(&args.path).await?;
        let source = mount.source()?;
        return Ok((Some(mount), source));
    }
    let chunk = args.open.chunk_size.or(backend.capabilities().preferred_chunk).unwrap_or_default();
    Ok((None, Arc::new(Guarded::new(backend, chunk)?)))
}

/// Says what happens until the region has gone, or somebody says stop.
async fn serve(seeding: &Seeding, mount: Option<&PathMount>, signals: &mut Signals, output: Output) -> Result<()> {
    let mut progress = seeding.seeder().progress();
    let mut before = SeederProgress::default();
    loop {
        let now = progress.borrow_and_update().clone();
        tell(&before, &now, output);
        if now.phase == SeederPhase::Gone {
            if let Some(mount) = mount {
                mount.abandon().await;
            }
            output.event("gone", "gone: the other side has everything", json!({ "epoch": now.epoch }));
            return Ok(());
        }
        before = now;
        tokio::select! {
            changed = progress.changed() => changed.context("the seeder has ended")?,
            () = signals.next() => return stop(seeding, mount, signals, output).await,
        }
    }
}

fn tell(before: &SeederProgress, now: &SeederProgress, output: Output) {
    if before.rounds != now.rounds && now.rounds > 0 {
        let dirty = size::format(now.dirty_bytes);
        output.note("copying", &format!("round {}: {dirty} were written meanwhile", now.rounds));
    }
    if before.phase == now.phase {
        return;
    }
    match now.phase {
        SeederPhase::Tracked => output.note("tracked", "a leecher copies the region"),
        SeederPhase::Suspending => output.note("suspending", "the application is being stopped"),
        SeederPhase::HandedOver => {
            let human = format!(
                "handed over: {} were written last; suspended in {:.1?}, flushed in {:.1?}",
                size::format(now.dirty_bytes),
                now.suspend,
                now.flush
            );
            let (suspend, flush) = (now.suspend.as_secs_f64(), now.flush.as_secs_f64());
            let value = json!({ "epoch": now.epoch, "dirty_bytes": now.dirty_bytes, "suspend_seconds": suspend, "flush_seconds": flush });
            output.event("handed_over", &human, value);
        }
        SeederPhase::Owner if before.phase != SeederPhase::default() => {
            output.note("kept", "the region stays here; the application runs on");
        }
        SeederPhase::Owner | SeederPhase::Gone => {}
    }
}

async fn stop(seeding: &Seeding, mount: Option<&PathMount>, signals: &mut Signals, output: Output) -> Result<()> {
    if seeding.seeder().owns() {
        output.note("stopping", "storing what is left; Ctrl-C again gives up");
        if let Some(mount) = mount {
            tokio::select! {
                closed = mount.close() => closed?,
                () = signals.next() => bail!("gave up before everything was stored"),
            }
        }
        output.event("stopped", "stopped: everything is stored", json!({}));
        return Ok(());
    }
    output.note("waiting", "the other side still reads from here; Ctrl-C again stops that until this is started again");
    tokio::select! {
        _ = seeding.seeder().gone() => {}
        () = signals.next() => bail!("stopped while something was missing over there: start it again"),
    }
    if let Some(mount) = mount {
        mount.abandon().await;
    }
    output.event("gone", "gone: the other side has everything", json!({}));
    Ok(())
}
