//! `r3map mount`: shows a region as a file or a block device until it is told to stop.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use r3map::{
    BlockOptions, Durability, ErrorKind, FileOptions, Kept, OpenOptions, Priority, Progress, PullSettings,
    PushSettings, Region, Registry, RetrySettings, Settings, Workers, size,
};
use serde_json::json;

use crate::args::{self, Cache, Fsync, Mode};
use crate::order;
use crate::output::{Bar, Output};
use crate::shown::{Shown, View};
use crate::signals::Signals;
use crate::trouble::Troubles;

/// How often the bars move and the remote is looked at.
const TICK: Duration = Duration::from_millis(200);
/// How long giving up may take.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(3);
/// How often storing is tried where there is no room: each time something may be sent in vain.
const ROOM_TICK: Duration = Duration::from_secs(1);

pub(crate) async fn run(registry: &Registry, args: args::Mount, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let mount = tokio::select! {
        mount = open(registry, &args, output) => mount?,
        () = signals.next() => bail!("stopped before the region was shown; nothing was written"),
    };
    let mount = mount.view();
    let region = mount.region();
    let path = mount.path().display();
    let mode = if args.mode == Mode::Managed { "managed" } else { "direct" };
    let word = mount.word();
    let what = if word == "file" { mode.to_owned() } else { format!("{mode}, {word}") };
    let human = format!("ready: {} ({}, {what}) at {path}", args.uri, size::format(region.size()));
    output.event(
        "ready",
        &human,
        json!({
            "region": args.uri.to_string(),
            "path": path.to_string(),
            "as": word,
            "link": mount.link().map(|link| link.display().to_string()),
            "size": region.size(),
            "mode": mode,
            "read_only": region.is_read_only(),
        }),
    );
    let mut told = Told::default();
    tokio::select! {
        () = watch(region, args.pull_workers != Some(args::Workers::Off), &mut told, output) => {}
        () = mount.gone() => output.note("unmounted", "somebody else unmounted it; storing what is left"),
        () = signals.next() => output.note("stopping", "storing what is left; Ctrl-C again gives up"),
    }
    drain(mount, &mut signals, args.retry.limit(), told, output).await
}

async fn open(registry: &Registry, args: &args::Mount, output: Output) -> Result<Shown> {
    let options =
        OpenOptions { size: args.size, chunk_size: args.chunk_size, read_only: args.read_only, create: false };
    let remote = registry.open(&args.uri, &options).await?;
    let settings = settings(args)?;
    let chunk = args.chunk_size.or(remote.capabilities().preferred_chunk).unwrap_or_default();
    let priority = match &args.pull_order {
        Some(file) => Priority::List(order::read(file, remote.size(), chunk)?.into()),
        None => Priority::None,
    };
    let (size, here) = (remote.size(), Arc::new(AtomicU64::new(0)));
    let counter = here.clone();
    let mount = match args.mode {
        Mode::Managed => r3map::Mount::managed(remote),
        Mode::Direct => r3map::Mount::direct(remote),
    };
    // However it is named from here: the same relative path is another file elsewhere.
    let identity = registry.identity(&args.uri)?.unwrap_or_else(|| args.uri.to_string());
    let mount = mount.settings(settings).identity(identity).priority(priority).on_chunk_local(move |_| {
        counter.fetch_add(chunk.bytes(), Ordering::Relaxed);
    });
    let bar = args.pull_first.then(|| output.bar("pulling", size));
    let mut shown = std::pin::pin!(Shown::open(mount, args.r#as, args.path.clone(), output));
    loop {
        tokio::select! {
            shown = &mut shown => {
                if let Some(bar) = bar {
                    bar.finish();
                }
                return shown.map_err(|error| told(error, args));
            }
            () = tokio::time::sleep(TICK) => {
                if let Some(bar) = &bar {
                    bar.set(here.load(Ordering::Relaxed).min(size), "");
                }
            }
        }
    }
}

/// An error with what the command could be told instead, where it is likely that the user meant that.
fn told(error: anyhow::Error, args: &args::Mount) -> anyhow::Error {
    let wrong = error.downcast_ref::<r3map::Error>().is_some_and(|error| error.kind() == ErrorKind::InvalidInput);
    let directory = args.r#as == args::As::File && args.path.as_ref().is_some_and(|path| path.is_dir());
    match wrong && directory && args.entry.is_none() {
        true => anyhow!("{error:#}; or add --entry NAME, to show it as a file in an empty directory"),
        false => error,
    }
}

fn settings(args: &args::Mount) -> Result<Settings> {
    check_modes(args)?;
    let default = PushSettings::default();
    let budget = match args.dirty_budget {
        Some(bytes) => NonZeroU64::new(bytes).context("--dirty-budget must be at least one byte")?,
        None => default.dirty_budget,
    };
    Ok(Settings {
        chunk_size: args.chunk_size,
        read_only: args.read_only,
        retry: RetrySettings {
            limit: args.retry.limit(),
            attempt_timeout: args.attempt_timeout,
            ..RetrySettings::default()
        },
        cache: match &args.cache {
            Cache::Memory => r3map::Cache::Memory,
            Cache::File(path) => r3map::Cache::File(path.clone()),
        },
        pull: PullSettings {
            workers: match args.pull_workers {
                None | Some(args::Workers::Auto) => Workers::Adaptive,
                Some(args::Workers::Off) => Workers::Off,
                Some(args::Workers::Fixed(workers)) => Workers::Fixed(workers.try_into()?),
            },
            ..PullSettings::default()
        },
        pull_first: args.pull_first,
        push: PushSettings {
            interval: args.push_interval.unwrap_or(default.interval),
            dirty_budget: budget,
            ..default
        },
        durability: match args.fsync {
            Fsync::Remote => Durability::Remote,
            Fsync::Local => Durability::Local,
        },
        file: FileOptions {
            direct_io: args.direct_io,
            allow_other: args.allow_other,
            source: Some(args.uri.to_string()),
            entry: args.entry.clone(),
        },
        block: BlockOptions {
            kind: args.r#as.kind(),
            logical_block_size: args.block_size,
            queues: args.queues,
            depth: args.queue_depth,
            keep: args.keep.map(|id| Kept { id, meanwhile: args.meanwhile.into() }),
            link: args.path.clone().filter(|_| args.r#as != args::As::File),
        },
    })
}

/// Refuses what would silently have no effect.
fn check_modes(args: &args::Mount) -> Result<()> {
    let copies = args.pull_first || args.pull_order.is_some() || args.pull_workers.is_some();
    let pushes = args.push_interval.is_some() || args.dirty_budget.is_some();
    if args.mode == Mode::Direct && (copies || pushes || args.cache != Cache::Memory) {
        bail!("--mode direct keeps no local copy: leave out --cache and what begins with --pull, --push and --dirty");
    }
    if args.fsync == Fsync::Local && args.cache == Cache::Memory {
        bail!("--fsync local needs a local copy that survives: add --cache FILE");
    }
    if args.pull_first && args.pull_workers == Some(args::Workers::Off) {
        bail!("--pull-first pulls everything, --pull-workers 0 pulls nothing: leave out one of them");
    }
    if args.keep.is_some() && args.r#as != args::As::Ublk {
        bail!("only ublk devices can be kept: add --as ublk, or leave out --keep");
    }
    if (args.queues.is_some() || args.queue_depth.is_some()) && !matches!(args.r#as, args::As::Ublk | args::As::Block) {
        bail!("only ublk devices have queues: add --as ublk, or leave out --queues and --queue-depth");
    }
    if args.r#as != args::As::File && (args.direct_io || args.allow_other || args.entry.is_some()) {
        bail!("--direct-io, --allow-other and --entry are for files: leave them out, or add --as file");
    }
    if args.r#as == args::As::File && args.block_size.is_some() {
        bail!("--block-size is for block devices: leave it out, or add --as block");
    }
    Ok(())
}

/// Shows how pulling goes, if anything is pulled that nobody asks for, and what goes wrong, for as long as the region is
/// used.
async fn watch(region: &Region, pulls: bool, told: &mut Told, output: Output) {
    let mut bar = region.progress().filter(|_| pulls).map(|_| output.bar("pulling", region.size()));
    let mut pulled = false;
    loop {
        tokio::time::sleep(TICK).await;
        told.tell(region, bar.as_ref(), output);
        let Some(progress) = region.progress().map(|progress| progress.borrow().clone()) else { continue };
        if progress.pulled {
            if !pulled {
                bar.take().into_iter().for_each(Bar::finish);
                let human = format!("pulled: all {} are local", size::format(progress.size));
                output.event("pulled", &human, json!({ "size": progress.size }));
                pulled = true;
            }
        } else if let Some(bar) = &bar {
            bar.set(progress.valid_bytes, &changes(&progress));
        }
    }
}

fn changes(progress: &Progress) -> String {
    match progress.dirty_bytes {
        0 => String::new(),
        dirty => format!("({} to push)", size::format(dirty)),
    }
}

/// What was said of things that go wrong in the background.
#[derive(Default)]
struct Told {
    /// The remote does not answer.
    silent: bool,
    /// Something else.
    troubles: Troubles,
}

impl Told {
    /// Says what is new.
    fn tell(&mut self, region: &Region, bar: Option<&Bar>, output: Output) {
        match &*region.outage().borrow() {
            Some(outage) if !self.silent => {
                let human = format!("the remote does not answer; trying again: {}", outage.error);
                note(bar, output, "waiting", &human);
                self.silent = true;
            }
            None if self.silent => {
                note(bar, output, "resumed", "the remote answers again");
                self.silent = false;
            }
            _ => {}
        }
        if let Some(error) = self.troubles.news(region) {
            note(bar, output, "trouble", &error.to_string());
        }
    }
}

/// Says something beside a bar.
fn note(bar: Option<&Bar>, output: Output, event: &str, human: &str) {
    match bar {
        Some(bar) => bar.aside(|| output.note(event, human)),
        None => output.note(event, human),
    }
}

/// Unmounts and stores what is left; a second signal gives up.
async fn drain(
    mount: View<'_>,
    signals: &mut Signals,
    patience: Option<Duration>,
    mut told: Told,
    output: Output,
) -> Result<()> {
    let bar = mount.region().progress().map(|progress| {
        let dirty = progress.borrow().dirty_bytes;
        (output.bar("storing", dirty), dirty)
    });
    tokio::select! {
        closed = close(mount, patience, bar.as_ref(), output) => if let Err(error) = closed {
            return give_up(mount, &format!(": {error}")).await;
        },
        () = show_left(mount, bar.as_ref(), &mut told, output) => {}
        () = signals.next() => return give_up(mount, "").await,
    }
    if let Some((bar, _)) = bar {
        bar.finish();
    }
    output.event("stopped", "stopped: everything is stored", json!({}));
    Ok(())
}

/// What is being stored: its bar, and how much it was.
type Storing = (Bar, u64);

/// Closes, and waits for those who still use the file; and for room, as long as for a remote that does not answer: what is
/// not stored when this ends may be nowhere.
async fn close(
    mount: View<'_>,
    patience: Option<Duration>,
    storing: Option<&Storing>,
    output: Output,
) -> r3map::Result<()> {
    let began = Instant::now();
    let mut said = None;
    loop {
        let closed = mount.close().await;
        let (event, until, tick, error) = match closed {
            Err(error) if mount.is_busy(&error) => ("busy", "until it is closed", TICK, error),
            Err(error) if is_full(&error) && patience.is_none_or(|patience| began.elapsed() < patience) => {
                ("full", "for room", ROOM_TICK, error)
            }
            closed => return closed,
        };
        if said.replace(event) != Some(event) {
            let human = format!("{error}; waiting {until}, Ctrl-C gives up");
            note(storing.map(|(bar, _)| bar), output, event, &human);
        }
        tokio::time::sleep(tick).await;
    }
}

fn is_full(error: &r3map::Error) -> bool {
    error.kind() == ErrorKind::Exhausted
}

/// Shows how storing goes, and what goes wrong. Never returns.
async fn show_left(mount: View<'_>, storing: Option<&Storing>, told: &mut Told, output: Output) {
    loop {
        tokio::time::sleep(TICK).await;
        told.tell(mount.region(), storing.map(|(bar, _)| bar), output);
        if let (Some((bar, dirty)), Some(progress)) = (storing, mount.region().progress()) {
            let left = progress.borrow().dirty_bytes;
            bar.set(dirty.saturating_sub(left), &format!("({} left)", size::format(left)));
        }
    }
}

async fn give_up(mount: View<'_>, why: &str) -> Result<()> {
    let left = mount.region().progress().map(|progress| progress.borrow().dirty_bytes);
    // A remote that is gone must not keep the process; what is left of the mount the next one takes over.
    let _ = tokio::time::timeout(GIVE_UP_LIMIT, mount.abandon()).await;
    match left {
        Some(left) => bail!("gave up with {} ({left} bytes) of changes not pushed{why}", size::format(left)),
        None => bail!("gave up; what was written since the last good flush may not be stored{why}"),
    }
}
