//! Moving a region from one process to another while an application writes to it, over gRPC and behind a round trip: how
//! long the application stands still, and what the move takes beside a plain copy of the same bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use r3map::migration::{Arrived, Hooks, Leecher, Migration, Place, PullProgress, Report, Running, Verdict};
use r3map::{CopySettings, Mount, OpenOptions, Registry, SliceMount};
use r3map_sys::Pages;
use r3map_testkit::fill;
use tempfile::TempDir;

use crate::figure::{Spec, Target, Unit};
use crate::limits::memory;
use crate::peer::{Leaving, Left, Offered, PIECE, Peer, Role, Shown, Writing, now};
use crate::run::{self, Bench, millis, throughput, timed};
use crate::sections::filled;
use crate::sections::mounted::{alone, connect, runtime};

const NAME: &str = "migrate";
const RTTS: [u64; 4] = [0, 5, 20, 40];
/// A region is so many times the size that other throughputs are measured over.
const REGION: u64 = 4;
/// How much smaller the other region is that tells what grows with the size.
const SMALLER: u64 = 16;
/// The most runs: each takes a minute.
const MOST_RUNS: usize = 5;
/// How long one move may take.
const LIMIT: Duration = Duration::from_secs(300);
/// What a downtime may have beside the flush and the round trips.
const ALLOWANCE: f64 = 5.0;

/// One kind of move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    shown: Shown,
    writing: Writing,
    /// Milliseconds.
    rtt: u64,
    size: u64,
}

/// What one move took, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Moved {
    downtime: f64,
    flush: f64,
    total: f64,
    /// A plain copy, where one was made.
    copy: f64,
    rounds: u64,
    verdict: Option<Verdict>,
}

type Round = BTreeMap<Case, Moved>;

/// Picks a figure and its limit out of a round.
type Pick<'a> = &'a dyn Fn(&Round) -> Result<Sides>;
type Sides = (f64, Option<f64>);

pub(crate) fn run(bench: &mut Bench) {
    if bench.settings.only.is_none() {
        tracked(bench);
    }
    let mut settings = bench.settings.clone();
    settings.runs = settings.runs.min(MOST_RUNS);
    let size = REGION * settings.size;
    let wanted = |case: &Case| settings.only.as_ref().is_none_or(|only| case.name().contains(only));
    let cases: Vec<_> = cases(size).into_iter().filter(wanted).collect();
    let rounds = measure(bench, &settings, &cases);
    let rounds = rounds.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"));
    for shown in [Shown::Slice, Shown::File] {
        for case in cases.iter().filter(|case| case.shown == shown) {
            figures(bench, *case, size, &rounds);
        }
    }
}

/// What is moved. The first of them warms up.
fn cases(size: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for shown in [Shown::Slice, Shown::File] {
        cases.push(Case { shown, writing: Writing::Once, rtt: 0, size: size / SMALLER });
        for writing in [Writing::Once, Writing::Always] {
            cases.extend(RTTS.map(|rtt| Case { shown, writing, rtt, size }));
        }
    }
    cases
}

impl Case {
    fn name(&self) -> String {
        let busy = if self.writing == Writing::Always { "busy " } else { "" };
        format!("{busy}{}, {} ms", self.shown.name(), self.rtt)
    }
}

/// Reports a case; all but the smaller regions have this size.
fn figures(bench: &mut Bench, case: Case, size: u64, rounds: &Result<&Vec<Round>, anyhow::Error>) {
    let name = |what: &str| format!("{}: {what}", case.name());
    let finish = |bench: &mut Bench, spec, pick: Pick<'_>| {
        let outcome = rounds.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"));
        bench.finish(spec, outcome.and_then(|rounds| sides(rounds, pick)));
    };
    let one = |round: &Round, case| round.get(&case).copied().context("it was not measured");
    if case.size != size {
        let whole = Case { size, ..case };
        let spec = Spec::new(NAME, name("downtime, by size"), Unit::Milliseconds)
            .limit(format!("the same of a region that has a {SMALLER}th of the size"))
            .note("the whole downtime, flush included");
        finish(bench, spec, &|round| Ok((one(round, whole)?.downtime, Some(one(round, case)?.downtime))));
        return;
    }
    let spec = Spec::new(NAME, name("downtime"), Unit::Milliseconds)
        .limit("the flush, one and a half round trips, and 5 ms")
        .target(Target::EveryRatioAtMost(1.0));
    let bound = |moved: Moved| moved.flush + 1.5 * case.rtt as f64 + ALLOWANCE;
    finish(bench, spec, &|round| one(round, case).map(|moved| (moved.downtime, Some(bound(moved)))));
    if case.writing == Writing::Once {
        let spec = Spec::new(NAME, name("total"), Unit::Milliseconds)
            .limit("r3map copy of the same bytes through the same proxy")
            .note("from connecting to everything being there, as with the copy")
            .target(Target::RatioAtMost(1.3));
        finish(bench, spec, &|round| one(round, case).map(|moved| (moved.total, Some(moved.copy))));
    } else {
        let spec = Spec::new(NAME, name("records"), Unit::Times).note(verdicts(case, rounds));
        finish(bench, spec, &|round| one(round, case).map(|moved| (moved.rounds as f64, None)));
        let spec = Spec::new(NAME, name("total"), Unit::Milliseconds);
        finish(bench, spec, &|round| one(round, case).map(|moved| (moved.total, None)));
    }
}

/// Ours and the limit of one figure, round by round.
fn sides(rounds: &[Round], pick: Pick<'_>) -> Result<(Vec<f64>, Vec<f64>)> {
    let pairs: Vec<_> = rounds.iter().map(pick).collect::<Result<_>>()?;
    let (ours, limits): (_, Vec<_>) = pairs.into_iter().unzip();
    Ok((ours, limits.into_iter().flatten().collect()))
}

/// What the rounds of each move said.
fn verdicts(case: Case, rounds: &Result<&Vec<Round>, anyhow::Error>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for round in rounds.iter().flat_map(|rounds| rounds.iter()) {
        let verdict = match round.get(&case).and_then(|moved| moved.verdict) {
            Some(Verdict::Fits) => "came close enough",
            Some(Verdict::Stalled) => "did not become less, and was moved all the same",
            Some(Verdict::Rounds | Verdict::Time) => "took too long, and was moved all the same",
            Some(Verdict::Again) | None => "was moved before anything was said",
        };
        *counts.entry(verdict).or_default() += 1;
    }
    let words: Vec<_> = counts.iter().map(|(verdict, count)| format!("{count} × {verdict}")).collect();
    format!("what was left of a region that is written again and again: {}", words.join(", "))
}

fn measure(bench: &Bench, settings: &run::Settings, cases: &[Case]) -> Result<Vec<Round>> {
    pass(bench, settings, &cases[..cases.len().min(2)], "warming up")?;
    (0..settings.runs)
        .map(|run| pass(bench, settings, cases, &format!("run {} of {}", run + 1, settings.runs)))
        .collect()
}

/// Measures every case once.
fn pass(bench: &Bench, settings: &run::Settings, cases: &[Case], what: &str) -> Result<Round> {
    let one = |case: &Case| {
        let Case { shown, writing, rtt, size } = *case;
        let name = format!("{what}: {} of {}, {writing:?}, {rtt} ms", shown.name(), r3map::size::format(size));
        bench.report.progress(&Spec::new(NAME, name.clone(), Unit::Milliseconds));
        Ok((*case, move_once(settings, *case).context(name)?))
    };
    cases.iter().map(one).collect()
}

/// Starts the other process with its application, copies its region, and then moves it.
fn move_once(settings: &run::Settings, case: Case) -> Result<Moved> {
    let Case { shown, writing, size, .. } = case;
    let leaving = Leaving { size, seed: settings.seed, shown, writing, rtt: Duration::from_millis(case.rtt) };
    let mut peer: Peer<Offered> = Peer::start(&Role::Leave(leaving.clone()))?;
    let offered = *peer.ready();
    let copy = if writing == Writing::Once { copy(offered.copy, size)? } else { Duration::ZERO };
    // What is mapped is in small pages, what a file has behind it in huge ones.
    memory::fetch(size, if shown == Shown::Slice { Pages::Small } else { Pages::Huge })?;
    // So that all is written while it is being moved.
    peer.tell(&copy.mul_f64(0.5))?;
    let (arrival, total) = timed(|| Arrival::of(offered.leaving, shown))?;
    let left: Left = peer.hear()?;
    arrival.check(&leaving, left)?;
    let Report { downtime, rounds, .. } = arrival.running.report();
    Ok(Moved {
        downtime: millis(arrival.resumed.saturating_sub(left.stopped)),
        flush: millis(downtime.flush),
        total: millis(total),
        copy: millis(copy),
        rounds,
        verdict: arrival.ready.verdict,
    })
}

/// What `r3map copy` does, from connecting to its end.
fn copy(server: SocketAddr, size: u64) -> Result<Duration> {
    memory::fetch(size, Pages::Huge)?;
    let (_copied, time) = timed(|| {
        let source = connect(server)?;
        let options = OpenOptions { size: Some(size), ..OpenOptions::default() };
        let copying = async {
            let destination = Registry::standard().open(&"memory:".parse()?, &options).await?;
            let copying = r3map::copy(source, destination.clone(), CopySettings::default(), |_| {});
            tokio::time::timeout(LIMIT, copying).await.context("copying")??;
            anyhow::Ok(destination)
        };
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(copying)
    })?;
    Ok(time)
}

/// A region that has arrived, all of it.
struct Arrival {
    running: Leecher<Running<Arrived>>,
    ready: PullProgress,
    /// The instant from which the application may run here.
    resumed: Duration,
    _folder: TempDir,
}

impl Arrival {
    fn of(seeder: SocketAddr, shown: Shown) -> Result<Self> {
        let folder = TempDir::with_prefix("r3map-bench-")?;
        let place = match shown {
            Shown::Slice => Place::slice(),
            Shown::File => Place::path(folder.path().join("region")),
        };
        let resumed = Arc::new(Mutex::new(None));
        let instant = resumed.clone();
        let hooks = Hooks::default().on_resume(move || {
            *instant.lock().unwrap_or_else(PoisonError::into_inner) = Some(now());
            async { Ok(()) }
        });
        let moving = async {
            let uri = format!("grpc://{seeder}").parse()?;
            let leecher = Migration::new().hooks(hooks).leech(&Registry::standard(), &uri, vec![place]).await?;
            let ready = leecher.ready().await?;
            let running = leecher.finalize().await.map_err(|left| anyhow::anyhow!("{left}"))?;
            running.pulled().await?;
            running.confirmed()?;
            anyhow::Ok((running, ready))
        };
        let moved = runtime()?.block_on(async { tokio::time::timeout(LIMIT, moving).await });
        let (running, ready) = moved.context("moving")??;
        let resumed = *resumed.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Self { running, ready, resumed: resumed.context("the application was not resumed")?, _folder: folder })
    }

    /// Whether everything that was written has come, and ends the region.
    fn check(&self, leaving: &Leaving, left: Left) -> Result<()> {
        let arrived = &self.running.regions()[0];
        let backend = arrived.region().backend();
        let mut bytes = vec![0; PIECE];
        runtime()?.block_on(async {
            for (offset, seed) in leaving.expected(left) {
                backend.read_at(offset, &mut bytes).await?;
                fill::check(&bytes, offset, seed).map_err(anyhow::Error::msg)?;
                backend.read_at(offset + PIECE as u64, &mut bytes).await?;
                fill::check(&bytes, offset + PIECE as u64, leaving.seed).map_err(anyhow::Error::msg)?;
            }
            if let Some(mount) = arrived.path() {
                mount.abandon().await;
            }
            Ok(())
        })
    }
}

/// What it costs an application that its writes are recorded, once it has touched what it writes.
fn tracked(bench: &mut Bench) {
    let spec = Spec::new(NAME, "slice: writing while tracked", Unit::MebibytesPerSecond)
        .limit("the same slice while nothing is recorded")
        .note("each page was touched before, in both")
        .target(Target::RatioAtLeast(0.95));
    match Recorded::new(bench) {
        Ok(mut recorded) => bench.both(spec, || recorded.measure()),
        Err(error) => bench.finish(spec, Err(error)),
    }
}

/// A slice whose writes are recorded, or not.
struct Recorded {
    mount: SliceMount,
    bytes: Vec<u8>,
}

impl Recorded {
    fn new(bench: &Bench) -> Result<Self> {
        let memory = filled(bench.settings.size, bench.settings.seed)?;
        let mount = runtime()?.block_on(async {
            let mount = Mount::managed(memory).settings(alone()).slice().await?;
            mount.region().pulled().await?;
            anyhow::Ok(mount)
        })?;
        Ok(Self { mount, bytes: fill::bytes(0, 1 << 20, bench.settings.seed) })
    }

    /// MiB per second, recorded and not.
    fn measure(&mut self) -> Result<(f64, f64)> {
        let (source, runtime) = (self.mount.source(), runtime()?);
        let plain = self.write_twice()?;
        runtime.block_on(source.track())?;
        let recorded = self.write_twice()?;
        let found = runtime.block_on(source.take())?;
        ensure!(found.len() * crate::limits::memory::PAGE as u64 == self.mount.as_slice().len() as u64, "not recorded");
        runtime.block_on(source.untrack());
        Ok((recorded, plain))
    }

    /// Writes everything twice; how fast the second time.
    fn write_twice(&mut self) -> Result<f64> {
        self.write()?;
        let mebibytes = run::mebibytes(self.mount.as_slice().len() as u64);
        throughput(mebibytes, || self.write())
    }

    fn write(&mut self) -> Result<()> {
        let Self { mount, bytes } = self;
        mount.as_mut_slice()?.chunks_mut(bytes.len()).for_each(|part| part.copy_from_slice(&bytes[..part.len()]));
        Ok(())
    }
}
