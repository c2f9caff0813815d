//! The gRPC transport against raw TCP: the same bytes between two processes, with the same length of requests and the
//! same number of them in flight. And what the difference is spent on.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use r3map_core::Backend;
use r3map_grpc::{Client, ClientSettings, Target as Server};
use r3map_testkit::fill;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::figure::{Spec, Target, Unit};
use crate::limits::tcp;
use crate::machine::Times;
use crate::peer::{Addresses, Peer, Role};
use crate::run::{Bench, Settings, millis, throughput, worked};

const NAME: &str = "grpc";
const LIMIT: &str = "raw TCP on one connection, same requests, same processes";
const LENGTHS: [(&str, u64); 3] = [("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("4 MiB", 4 << 20)];
const IN_FLIGHT: [usize; 3] = [1, 8, 64];
/// The combination that has a target, and whose costs are looked at.
const AIM: (u64, usize) = (1 << 20, 8);
const GIB: u64 = 1 << 30;

pub(crate) fn run(bench: &mut Bench) {
    let both = match Both::start(&bench.settings) {
        Ok(both) => both,
        Err(error) => {
            return bench.finish(Spec::new(NAME, "all of it", Unit::MebibytesPerSecond), Err(error));
        }
    };
    for (length_name, length) in LENGTHS {
        for in_flight in IN_FLIGHT {
            let name = format!("read {length_name} × {in_flight}");
            let mut spec = Spec::new(NAME, name, Unit::MebibytesPerSecond).limit(LIMIT);
            if (length, in_flight) == AIM {
                spec = spec.target(Target::RatioAtLeast(0.5));
            }
            let total = total(&bench.settings, length);
            let mebibytes = crate::run::mebibytes(total);
            match Pair::new(&both, length, in_flight) {
                Ok(mut pair) => bench.pair(
                    spec,
                    || throughput(mebibytes, || pair.ours.read(total)),
                    || throughput(mebibytes, || pair.raw.read(total)),
                ),
                Err(error) => bench.finish(spec, Err(error)),
            }
        }
    }
    costs(bench, &both);
}

/// At least one request, all of them whole.
fn total(settings: &Settings, length: u64) -> u64 {
    settings.size.next_multiple_of(length)
}

/// One client of each kind, and the process that they both talk to.
struct Both {
    client: Arc<Client>,
    raw: SocketAddr,
    runtime: Runtime,
    peer: Peer<Addresses>,
    size: u64,
}

impl Both {
    fn start(settings: &Settings) -> Result<Self> {
        let longest = LENGTHS[LENGTHS.len() - 1].1;
        let size = settings.size.next_multiple_of(longest);
        let peer: Peer<Addresses> = Peer::start(&Role::Serve { size, seed: settings.seed, rtts: Vec::new() })?;
        let address = peer.ready().direct;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let server = Server::Tcp { host: address.grpc.ip().to_string(), port: address.grpc.port() };
        let client = runtime.block_on(Client::connect(server, ClientSettings::default()))?;
        let mut bytes = vec![0; 1 << 20];
        runtime.block_on(client.read_at(0, &mut bytes))?;
        fill::check(&bytes, 0, settings.seed).map_err(anyhow::Error::msg)?;
        Ok(Self { client: Arc::new(client), raw: address.raw, runtime, peer, size })
    }

    /// The processor time of this process and of the other.
    fn times(&self) -> Result<[Times; 2]> {
        Ok([Times::of(std::process::id()).context("our own times")?, self.peer.times()?])
    }
}

/// The same requests over gRPC and over raw TCP.
struct Pair<'a> {
    ours: Ours<'a>,
    raw: Raw,
}

impl<'a> Pair<'a> {
    fn new(both: &'a Both, length: u64, in_flight: usize) -> Result<Self> {
        let buffers = vec![vec![0; usize::try_from(length)?]; in_flight];
        let client = tcp::Client::connect(both.raw, usize::try_from(length)?, in_flight)?;
        Ok(Self { ours: Ours { both, length, buffers }, raw: Raw { client, length, size: both.size } })
    }
}

/// Reads with one task for each request in flight, each with a buffer of its own that is kept from run to run.
struct Ours<'a> {
    both: &'a Both,
    length: u64,
    buffers: Vec<Vec<u8>>,
}

impl Ours<'_> {
    /// Reads `total` bytes, request by request around the region.
    fn read(&mut self, total: u64) -> Result<()> {
        let (both, length) = (self.both, self.length);
        let next = Arc::new(AtomicU64::new(0));
        let mut readers = JoinSet::new();
        for buffer in self.buffers.drain(..) {
            let reader = read_on(both.client.clone(), next.clone(), total, length, both.size, buffer);
            readers.spawn_on(reader, both.runtime.handle());
        }
        both.runtime.block_on(async {
            while let Some(reader) = readers.join_next().await {
                self.buffers.push(reader??);
            }
            Ok(())
        })
    }
}

async fn read_on(
    client: Arc<Client>,
    next: Arc<AtomicU64>,
    total: u64,
    length: u64,
    size: u64,
    mut buffer: Vec<u8>,
) -> Result<Vec<u8>> {
    loop {
        let at = next.fetch_add(length, Ordering::Relaxed);
        if at >= total {
            return Ok(buffer);
        }
        client.read_at(at % size, &mut buffer).await?;
    }
}

/// The same with one connection, which keeps its buffers too.
struct Raw {
    client: tcp::Client,
    length: u64,
    size: u64,
}

impl Raw {
    fn read(&mut self, total: u64) -> Result<()> {
        let offsets: Vec<u64> = (0..total / self.length).map(|at| at * self.length % self.size).collect();
        self.client.read(&offsets)
    }
}

/// Processor time for each GiB at the aim, on each side, in the program and in the kernel; and what the two known parts
/// of ours take by themselves.
fn costs(bench: &mut Bench, both: &Both) {
    let total = if bench.settings.quick { bench.settings.size } else { GIB.next_multiple_of(AIM.0) };
    bench.report.progress(&Spec::new(NAME, "1 MiB × 8: processor time", Unit::MillisecondsPerGibibyte));
    let runs = measure_costs(bench, both, total);
    for (index, name) in
        ["client, in the program", "client, in the kernel", "server, in the program", "server, in the kernel"]
            .into_iter()
            .enumerate()
    {
        let spec = Spec::new(NAME, format!("1 MiB × 8: {name}"), Unit::MillisecondsPerGibibyte)
            .limit(LIMIT)
            .note("processor time, counted in hundredths of a second");
        let split = |runs: &Vec<[[f64; 4]; 2]>| {
            let side = |side: usize| runs.iter().map(|run| run[side][index]).collect();
            (side(0), side(1))
        };
        let outcome = runs.as_ref().map(split).map_err(|error| anyhow::anyhow!("{error:#}"));
        bench.finish(spec, outcome);
    }
    parts(bench);
}

/// The known parts of what ours costs: processor time by itself, over memory that is not in the cache.
fn parts(bench: &mut Bench) {
    let bytes = fill::bytes(0, usize::try_from(bench.settings.size).unwrap_or(1 << 20), bench.settings.seed);
    let mut copy = vec![0; 1 << 20];
    let mut part = |name, work: &mut dyn FnMut()| {
        let spec = Spec::new(NAME, name, Unit::MillisecondsPerGibibyte);
        let spec = spec.note("processor time; ours makes one on each side");
        bench.alone(spec, || Ok(millis(worked(&mut *work)) * GIB as f64 / bytes.len() as f64));
    };
    part("a checksum (CRC-32C)", &mut || {
        let sum = |chunk: &[u8]| u64::from(crc_fast::crc32_iscsi(chunk));
        black_box(bytes.chunks(64 << 10).map(sum).sum::<u64>());
    });
    part("a copy, 1 MiB at a time", &mut || {
        bytes.chunks(1 << 20).for_each(|part| copy[..part.len()].copy_from_slice(part));
        black_box(&mut copy);
    });
}

/// For each run: ours and raw, each split into four, in milliseconds for a GiB.
fn measure_costs(bench: &Bench, both: &Both, total: u64) -> Result<Vec<[[f64; 4]; 2]>> {
    let mut pair = Pair::new(both, AIM.0, AIM.1)?;
    pair.ours.read(total)?;
    pair.raw.read(total)?;
    let mut runs = Vec::new();
    for _ in 0..bench.settings.runs {
        let start = both.times()?;
        pair.ours.read(total)?;
        let middle = both.times()?;
        pair.raw.read(total)?;
        let end = both.times()?;
        runs.push([split(start, middle, total), split(middle, end, total)]);
    }
    Ok(runs)
}

/// What the client and the server used between two looks, in the program and in the kernel.
fn split(before: [Times; 2], after: [Times; 2], total: u64) -> [f64; 4] {
    let [client, server] = [after[0].since(before[0]), after[1].since(before[1])];
    let per_gib = 1e3 * GIB as f64 / total as f64;
    [client.user, client.system, server.user, server.system].map(|seconds| seconds * per_gib)
}
