//! What a round trip does to mounts: managed and direct, as slice and as file, with the server in another process behind
//! a proxy that delays.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use r3map::Settings;
use r3map_sys::Pages;
use r3map_testkit::fill;

use crate::figure::{Spec, Target, Unit};
use crate::limits::{memory, tcp};
use crate::peer::{Address, Addresses, Peer, Role, Shown};
use crate::run::{self, Bench, mebibytes, millis, throughput, timed};
use crate::sections::mounted::{Mode, Mounted, connect};

const NAME: &str = "rtt";
const RTTS: [u64; 6] = [0, 1, 5, 10, 20, 40];
/// The round trip that targets are about, in milliseconds.
const FAR: u64 = 40;
/// The most runs: each takes about a minute.
const MOST_RUNS: usize = 5;
/// How long a direct mount is read or written: far away it would take minutes for the whole region.
const SAMPLE: Duration = Duration::from_secs(1);
const CHUNK: usize = 64 << 10;
const STEP: usize = 1 << 20;

/// What is measured of each mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Metric {
    FirstByte,
    FirstChunk,
    Read,
    Write,
    Flushed,
}

/// Which mount, at which round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    mode: Mode,
    shown: Shown,
    rtt: u64,
}

const MOUNTS: [(Mode, Shown); 4] = [
    (Mode::Managed, Shown::Slice),
    (Mode::Managed, Shown::File),
    (Mode::Direct, Shown::Slice),
    (Mode::Direct, Shown::File),
];

/// What one pass over all cases gave.
type Round = BTreeMap<(Case, Metric), f64>;

pub(crate) fn run(bench: &mut Bench) {
    let mut settings = bench.settings.clone();
    settings.runs = settings.runs.min(MOST_RUNS);
    let rounds = measure(bench, &settings);
    for (mode, shown) in MOUNTS {
        for metric in [Metric::FirstByte, Metric::FirstChunk, Metric::Read, Metric::Write, Metric::Flushed] {
            for rtt in RTTS {
                let case = Case { mode, shown, rtt };
                let outcome = rounds.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"));
                bench.finish(spec(case, metric), outcome.and_then(|rounds| pick(rounds, case, metric)));
            }
        }
    }
}

fn spec(case: Case, metric: Metric) -> Spec {
    let unit = match metric {
        Metric::FirstByte | Metric::FirstChunk => Unit::Milliseconds,
        Metric::Read | Metric::Write | Metric::Flushed => Unit::MebibytesPerSecond,
    };
    let what = match metric {
        Metric::FirstByte => "first byte",
        Metric::FirstChunk => "first chunk",
        Metric::Read => "read",
        Metric::Write => "write",
        Metric::Flushed => "write and flush",
    };
    let (mode, shown) = (case.mode.name(), case.shown.name());
    let spec = Spec::new(NAME, format!("{mode} {shown}, {} ms: {what}", case.rtt), unit);
    let spec = match (metric, case.rtt) {
        (Metric::FirstByte | Metric::FirstChunk, 0) => spec.limit("raw TCP through the proxy, one request of 64 KiB"),
        (Metric::FirstByte | Metric::FirstChunk, _) => spec.limit("the round trip"),
        (Metric::Read, 0) => spec.limit("raw TCP through the proxy, 1 MiB × 8"),
        (Metric::Write | Metric::Flushed, 0) => spec,
        _ => spec.limit("its own at 0 ms"),
    };
    match target(case, metric) {
        Some(target) => spec.target(target),
        None => spec,
    }
}

fn target(case: Case, metric: Metric) -> Option<Target> {
    match (metric, case.mode, case.rtt) {
        (Metric::FirstChunk, _, FAR) => Some(Target::RatioAtMost(1.2)),
        (Metric::Read, Mode::Managed, FAR) => Some(Target::RatioAtLeast(0.7)),
        (Metric::Write, Mode::Managed, FAR) => Some(Target::RatioAtLeast(0.9)),
        _ => None,
    }
}

/// Ours and the limit of one figure, round by round.
fn pick(rounds: &[(Round, Raw)], case: Case, metric: Metric) -> Result<(Vec<f64>, Vec<f64>)> {
    let one = |round: &Round, case| round.get(&(case, metric)).copied().context("it was not measured");
    let limit = |(round, raw): &(Round, Raw)| match (metric, case.rtt) {
        (Metric::FirstByte | Metric::FirstChunk, 0) => Ok(Some(raw.request)),
        (Metric::FirstByte | Metric::FirstChunk, rtt) => Ok(Some(rtt as f64)),
        (Metric::Read, 0) => Ok(Some(raw.throughput)),
        (Metric::Write | Metric::Flushed, 0) => Ok(None),
        _ => one(round, Case { rtt: 0, ..case }).map(Some),
    };
    let ours = rounds.iter().map(|(round, _)| one(round, case)).collect::<Result<_>>()?;
    let limits: Result<Vec<Option<f64>>> = rounds.iter().map(limit).collect();
    Ok((ours, limits?.into_iter().flatten().collect()))
}

/// Raw TCP through the proxy without a round trip.
#[derive(Debug, Clone, Copy)]
struct Raw {
    /// Milliseconds.
    request: f64,
    /// MiB per second.
    throughput: f64,
}

fn measure(bench: &Bench, settings: &run::Settings) -> Result<Vec<(Round, Raw)>> {
    let rtts = RTTS.map(Duration::from_millis).to_vec();
    let peer: Peer<Addresses> = Peer::start(&Role::Serve { size: settings.size, seed: settings.seed, rtts })?;
    let addresses: Vec<(u64, Address)> = RTTS.into_iter().zip(peer.ready().delayed.iter().copied()).collect();
    // One pass without a round trip warms up.
    pass(bench, settings, &addresses[..1], "warming up")?;
    (0..settings.runs)
        .map(|run| pass(bench, settings, &addresses, &format!("run {} of {}", run + 1, settings.runs)))
        .collect()
}

/// Measures every case once.
fn pass(bench: &Bench, settings: &run::Settings, addresses: &[(u64, Address)], what: &str) -> Result<(Round, Raw)> {
    let mut round = Round::new();
    for (mode, shown) in MOUNTS {
        for (rtt, address) in addresses {
            let case = Case { mode, shown, rtt: *rtt };
            let name = format!("{what}: {} {}, {rtt} ms", mode.name(), shown.name());
            bench.report.progress(&Spec::new(NAME, name.clone(), Unit::Milliseconds));
            let found = measure_case(settings, case, *address).context(name)?;
            round.extend(found.map(|(metric, value)| ((case, metric), value)));
        }
    }
    Ok((round, raw(settings, addresses[0].1)?))
}

fn raw(settings: &run::Settings, address: Address) -> Result<Raw> {
    let mut one = tcp::Client::connect(address.raw, CHUNK, 1)?;
    one.read(&[0])?;
    let request = millis(timed(|| one.read(&[CHUNK as u64]))?.1);
    let mut many = tcp::Client::connect(address.raw, STEP, 8)?;
    let offsets: Vec<u64> = (0..settings.size).step_by(STEP).collect();
    Ok(Raw { request, throughput: throughput(settings.mebibytes(), || many.read(&offsets))? })
}

fn measure_case(settings: &run::Settings, case: Case, address: Address) -> Result<[(Metric, f64); 5]> {
    let (first_byte, first_chunk) = first(settings, case, address)?;
    let (read, write, flushed) = whole(settings, case, address)?;
    Ok([
        (Metric::FirstByte, millis(first_byte)),
        (Metric::FirstChunk, millis(first_chunk)),
        (Metric::Read, read),
        (Metric::Write, write),
        (Metric::Flushed, flushed),
    ])
}

/// The time from nothing to the first byte, and then for a chunk far from where pulling is.
fn first(settings: &run::Settings, case: Case, address: Address) -> Result<(Duration, Duration)> {
    let mut byte = [0];
    fetch(settings, case)?;
    let (mounted, first_byte) = timed(|| {
        let mounted = Mounted::open(connect(address.grpc)?, case.mode, case.shown, Settings::default())?;
        mounted.read(0, &mut byte)?;
        Ok(mounted)
    })?;
    check(&byte, 0, settings)?;
    let last = settings.size - CHUNK as u64;
    let ((), first_chunk) = timed(|| mounted.read(last, &mut byte))?;
    check(&byte, last, settings)?;
    mounted.close()?;
    Ok((first_byte, first_chunk))
}

/// So that the hypervisor has no part in it: see [`memory::fetch`].
fn fetch(settings: &run::Settings, case: Case) -> Result<()> {
    match (case.mode, case.shown) {
        (Mode::Direct, _) => Ok(()),
        (Mode::Managed, Shown::Slice) => memory::fetch(settings.size, Pages::Small),
        (Mode::Managed, Shown::File) => memory::fetch(settings.size, Pages::Huge),
    }
}

/// Reads a fresh mount from its start, writes it, and flushes; MiB per second each.
fn whole(settings: &run::Settings, case: Case, address: Address) -> Result<(f64, f64, f64)> {
    let remote = connect(address.grpc)?;
    let mut buffer = vec![0; STEP];
    fetch(settings, case)?;
    let ((mut mounted, bytes), read) = timed(|| {
        let mounted = Mounted::open(remote, case.mode, case.shown, Settings::default())?;
        let bytes = sample(case.mode, settings.size, |offset| mounted.read(offset, &mut buffer))?;
        Ok((mounted, bytes))
    })?;
    check(&buffer, bytes - STEP as u64, settings)?;
    // The same bytes again, so that the region stays as it is.
    let source = fill::bytes(0, usize::try_from(settings.size)?, settings.seed);
    let ((written, writing), flushed) = timed(|| {
        let (written, writing) = timed(|| {
            sample(case.mode, bytes, |offset| {
                let start = usize::try_from(offset)?;
                mounted.write(offset, &source[start..start + STEP])
            })
        })?;
        mounted.flush()?;
        Ok((written, writing))
    })?;
    mounted.close()?;
    let rate = |bytes: u64, time: Duration| mebibytes(bytes) / time.as_secs_f64();
    Ok((rate(bytes, read), rate(written, writing), rate(written, flushed)))
}

/// Goes step by step over the first `bytes`, or as many of them as the time for a sample of a direct mount allows. How
/// many these were.
fn sample(mode: Mode, bytes: u64, mut step: impl FnMut(u64) -> Result<()>) -> Result<u64> {
    let start = std::time::Instant::now();
    let mut at = 0;
    while at < bytes && (mode == Mode::Managed || start.elapsed() < SAMPLE) {
        step(at)?;
        at += STEP as u64;
    }
    ensure!(at > 0, "the region is empty");
    Ok(at)
}

fn check(bytes: &[u8], offset: u64, settings: &run::Settings) -> Result<()> {
    fill::check(bytes, offset, settings.seed).map_err(anyhow::Error::msg)
}
