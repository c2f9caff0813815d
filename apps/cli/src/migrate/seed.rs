//! `r3map seed`: shows regions as files until another host takes them over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use r3map::migration::{Guarded, Migration, Seeding, Source, Standing, open_cache};
use r3map::{Backend, ChunkSize, Mount, OpenOptions, Registry, Settings, Uri, size};
use rustix::fs::Access;
use serde_json::json;

use super::host::{self, Ended, Host};
use super::{application, ledger_beside};
use crate::args;
use crate::output::Output;
use crate::shown::Shown;
use crate::signals::Signals;

pub(crate) async fn run(registry: &Registry, args: args::Seed, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let offers = offers(&args)?;
    application::check(&args.show)?;
    let paths: Vec<_> = offers.iter().map(|offer| application::shown_at(&args.show, &offer.path)).collect();
    let migration = application::migration(&args.application, &paths)?;
    let migration = application::seeding(migration, &args.application, &paths, output);
    let mut migration = migration.lease(args.lease).open_to_go(args.open_to_go);
    let ledger = ledger(&args, &offers);
    match &ledger {
        Some(ledger) => {
            check_ledger(ledger)?;
            migration = migration.ledger(ledger);
        }
        None if outlive(&offers) => output.note(
            "note",
            "it is written down nowhere who owns the region, so that after a crash nobody knows: give it a --ledger FILE",
        ),
        None => {}
    }
    if args.take_back {
        take_back(&migration, ledger.as_deref())?;
    }
    // Regions that were handed over may come back: then they are shown again.
    loop {
        // What is shown is unmounted also where the rest fails.
        let mut mounts = Vec::new();
        let site = tokio::select! {
            site = Site::open(registry, &args, &offers, &migration, ledger.as_deref(), &mut mounts, output) => site,
            () = signals.next() => Err(anyhow!("stopped before the region was shown; nothing was written")),
        };
        let seeding = match site {
            Ok(site) => site.offer(registry, &args, &migration, &mounts, output).await,
            Err(error) => Err(error),
        };
        let seeding = match seeding {
            Ok(seeding) => seeding,
            Err(error) => {
                host::abandon(mounts.iter().map(Shown::view)).await;
                return Err(error);
            }
        };
        let mounts = mounts.iter().map(Shown::view).collect();
        let host = Host { seeder: seeding.seeder().clone(), mounts, volatile: false, output };
        let ended = host.until_gone(&mut signals).await?;
        host::close_listeners(seeding, ended, output).await?;
        if ended != Ended::Returned {
            return Ok(());
        }
        output.note("kept", "the other side has given the region back");
    }
}

/// A region as the command line has it.
struct Offer {
    origin: Origin,
    path: PathBuf,
}

enum Origin {
    Uri(Uri),
    /// A cache file that a leech has filled.
    Cache(PathBuf),
}

fn offers(args: &args::Seed) -> Result<Vec<Offer>> {
    let first = match (&args.cache, &args.uri) {
        (Some(cache), _) => Origin::Cache(cache.clone()),
        (None, Some(uri)) => Origin::Uri(uri.clone()),
        (None, None) => bail!("give a region, or --cache FILE"),
    };
    let mut offers = vec![Offer { origin: first, path: args.path.clone() }];
    for pair in args.also.chunks_exact(2) {
        let origin = match args.cache {
            Some(_) => Origin::Cache(pair[0].clone()),
            None => Origin::Uri(pair[0].to_str().context("the name of a region is text")?.parse()?),
        };
        offers.push(Offer { origin, path: pair[1].clone() });
    }
    Ok(offers)
}

/// Where it is written down who owns the regions: beside the first one that is a file. The others may be in memory.
fn ledger(args: &args::Seed, offers: &[Offer]) -> Option<PathBuf> {
    let beside = |offer: &Offer| match &offer.origin {
        Origin::Cache(cache) => Some(ledger_beside(cache)),
        Origin::Uri(uri) if matches!(uri.scheme(), "file" | "directory") => {
            // The folder of devices is made anew at every start of the system.
            let path = uri.path().ok().filter(|path| !path.starts_with("/dev"))?;
            Some(ledger_beside(&path))
        }
        Origin::Uri(_) => None,
    };
    args.ledger.clone().or_else(|| offers.iter().find_map(beside))
}

/// Refuses a ledger that could not be written when the region is to be handed over.
fn check_ledger(ledger: &Path) -> Result<()> {
    let folder = ledger.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .with_context(|| format!("the ledger {} could not be written; give another --ledger FILE", ledger.display()))
}

/// Whether any of what is seeded is still there when this process has ended.
fn outlive(offers: &[Offer]) -> bool {
    offers.iter().any(|offer| match &offer.origin {
        Origin::Cache(_) => true,
        Origin::Uri(uri) => !matches!(uri.scheme(), "memory" | "null"),
    })
}

fn take_back(migration: &Migration, ledger: Option<&Path>) -> Result<()> {
    let ledger =
        ledger.context("--take-back needs the --ledger FILE in which it is written that the region was handed over")?;
    match migration.standing()? {
        Some(Standing::HandedOver { .. }) => Ok(migration.take_back()?),
        _ => bail!("{} does not say that the region was handed over: leave out --take-back", ledger.display()),
    }
}

/// Whether the regions are this side's, as far as is written down.
fn owns(migration: &Migration, ledger: Option<&Path>) -> Result<bool> {
    let place = ledger.unwrap_or(Path::new("")).display();
    match migration.standing()? {
        None | Some(Standing::Owner { .. }) => Ok(true),
        Some(Standing::HandedOver { .. }) => Ok(false),
        Some(Standing::Gone { .. }) => {
            bail!("the region has left: another host has all of it; remove {place} to use this old copy all the same")
        }
        Some(Standing::Pulling { .. } | Standing::Asking { .. } | Standing::Arrived { .. }) => {
            bail!("the region has not arrived as a whole: run the same `r3map leech` again ({place})")
        }
    }
}

/// Regions that are opened, and shown if they are ours.
struct Site {
    regions: Vec<(String, Arc<dyn Source>)>,
    /// What stays the same for as long as their bytes live.
    identity: Option<String>,
    owner: bool,
}

impl Site {
    async fn open(
        registry: &Registry,
        args: &args::Seed,
        offers: &[Offer],
        migration: &Migration,
        ledger: Option<&Path>,
        mounts: &mut Vec<Shown>,
        output: Output,
    ) -> Result<Self> {
        let owner = owns(migration, ledger)?;
        let (mut regions, mut identities) = (Vec::new(), Vec::new());
        for (index, offer) in offers.iter().enumerate() {
            let opened = offer.open(registry, args, index == 0).await?;
            identities.push(opened.identity);
            let source: Arc<dyn Source> = match owner {
                true => {
                    let mount = show(opened.backend, &offer.path, args, output).await?;
                    let source = mount.view().source()?;
                    mounts.push(mount);
                    source
                }
                false => Arc::new(Guarded::new(opened.backend.clone(), chunk(&*opened.backend, args))?),
            };
            regions.push((opened.name, source));
        }
        let identity = identities.into_iter().collect::<Option<Vec<_>>>().map(|all| all.join(", "));
        Ok(Self { regions, identity, owner })
    }

    /// Offers them, and says so.
    async fn offer(
        self,
        registry: &Registry,
        args: &args::Seed,
        migration: &Migration,
        mounts: &[Shown],
        output: Output,
    ) -> Result<Seeding> {
        let Self { regions, identity, owner } = self;
        let names: Vec<_> = regions.iter().map(|(name, _)| name.clone()).collect();
        let seeding = migration.clone().identity(identity).seed(registry, &args.listen, regions).await?;
        let seeder = seeding.seeder();
        let size = (0..seeder.regions()).map(|index| seeder.region(index).size()).sum::<u64>();
        let paths: Vec<_> = mounts.iter().map(|mount| mount.view().path().display().to_string()).collect();
        let links: Vec<_> =
            mounts.iter().filter_map(|mount| mount.view().link()).map(|link| link.display().to_string()).collect();
        let kinds: Vec<_> = mounts.iter().map(|mount| mount.view().word()).collect();
        let (what, place) = (names.join(", "), paths.join(", "));
        for uri in seeding.uris() {
            let human = match owner {
                true => format!("ready: {what} ({}) at {place}, to be taken over at {uri}", size::format(size)),
                false => format!("ready: {what} was handed over; what is missing over there is read at {uri}"),
            };
            let value = json!({ "uri": uri, "regions": names, "paths": paths, "as": kinds, "links": links, "size": size, "owner": owner });
            output.event("ready", &human, value);
        }
        Ok(seeding)
    }
}

/// A region that is opened.
struct Opened {
    backend: Arc<dyn Backend>,
    name: String,
    identity: Option<String>,
}

impl Offer {
    /// The size is that of the first region; others have it in their names.
    async fn open(&self, registry: &Registry, args: &args::Seed, first: bool) -> Result<Opened> {
        match &self.origin {
            Origin::Cache(cache) => {
                let (backend, facts) = open_cache(cache).await?;
                Ok(Opened { backend, name: facts.name, identity: Some(facts.identity) })
            }
            Origin::Uri(uri) => {
                let options = OpenOptions {
                    size: args.open.size.filter(|_| first),
                    chunk_size: args.open.chunk_size,
                    read_only: false,
                    create: args.open.create && first,
                };
                let backend = registry.open(uri, &options).await?;
                Ok(Opened { backend, name: uri.to_string(), identity: registry.identity(uri)? })
            }
        }
    }
}

async fn show(backend: Arc<dyn Backend>, path: &Path, args: &args::Seed, output: Output) -> Result<Shown> {
    let settings = Settings { chunk_size: args.open.chunk_size, ..application::settings(&args.show, path) };
    let mount = Mount::direct(backend).migratable().settings(settings);
    Shown::open(mount, args.show.r#as, Some(path.to_owned()), output).await
}

/// The chunk size of a region that is served and not shown.
fn chunk(backend: &dyn Backend, args: &args::Seed) -> ChunkSize {
    args.open.chunk_size.or(backend.capabilities().preferred_chunk).unwrap_or_default()
}
