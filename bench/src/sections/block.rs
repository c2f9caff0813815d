//! Block devices over the same region in memory: ublk against the kernel's NBD client and against a loop device. It needs
//! a kernel that has them all, and root: `cargo xtask vm --bench block`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use r3map::{BlockMount, BlockOptions, Kind, Mount};
use r3map_local::Memory;
use r3map_testkit::fill;
use r3map_testkit::random::Random;
use rustix::fs::OFlags;
use tokio::runtime::Runtime;

use crate::figure::{Spec, Target, Unit};
use crate::run::{Bench, Settings, micros, millis, throughput, timed};
use crate::sections::filled;

const NAME: &str = "block";
/// What is read at random.
const BLOCK: usize = 4096;
/// What is read in sequence.
const STEP: usize = 1 << 20;
/// What ublk is compared with.
const PEERS: [Kind; 2] = [Kind::Nbd, Kind::Loop];

pub(crate) fn run(bench: &mut Bench) {
    let settings = bench.settings.clone();
    match Scene::new(&settings) {
        Ok(scene) => scene.run(bench, &settings),
        Err(error) => bench.finish(Spec::new(NAME, "devices", Unit::Milliseconds), Err(error)),
    }
}

type Measure = fn(&Settings, &Path) -> Result<f64>;

const FIGURES: [(&str, Unit, Measure); 4] = [
    ("random read of 4 KiB, depth 1", Unit::Microseconds, |settings, path| read_blocks(settings, path, 1)),
    ("random read of 4 KiB, depth 32", Unit::Microseconds, |settings, path| read_blocks(settings, path, 32)),
    ("sequential read, 1 MiB", Unit::MebibytesPerSecond, read_all),
    ("sequential write, 1 MiB", Unit::MebibytesPerSecond, write_all),
];

/// A region, and a device of each kind over it.
struct Scene {
    runtime: Runtime,
    region: Arc<Memory>,
    shown: Vec<(Kind, Result<BlockMount>)>,
}

impl Scene {
    fn new(settings: &Settings) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let region = filled(settings.size, settings.seed)?;
        let show = |kind| (kind, attach(&runtime, &region, kind));
        let shown = Kind::ALL.map(show).into();
        Ok(Self { runtime, region, shown })
    }

    fn run(&self, bench: &mut Bench, settings: &Settings) {
        for (name, unit, measure) in FIGURES {
            for peer in PEERS {
                let spec = spec(&format!("ublk: {name}"), unit, peer);
                match (self.path(Kind::Ublk), self.path(peer)) {
                    (Ok(ours), Ok(peer)) => {
                        bench.pair(spec, || measure(settings, ours), || measure(settings, peer));
                    }
                    (Err(error), _) | (_, Err(error)) => bench.finish(spec, Err(error)),
                }
            }
        }
        for peer in PEERS {
            let spec = spec("ublk: time to attach", Unit::Milliseconds, peer);
            bench.pair(spec, || self.attach(Kind::Ublk), || self.attach(peer));
        }
    }

    fn path(&self, kind: Kind) -> Result<&Path> {
        let found = self.shown.iter().find(|(shown, _)| *shown == kind).context("every kind was tried")?;
        found.1.as_ref().map(BlockMount::path).map_err(|error| anyhow!("{kind}: {error:#}"))
    }

    /// How long it takes until a new device can be opened.
    fn attach(&self, kind: Kind) -> Result<f64> {
        let (mount, time) = timed(|| attach(&self.runtime, &self.region, kind))?;
        self.runtime.block_on(mount.close())?;
        Ok(millis(time))
    }
}

fn spec(name: &str, unit: Unit, peer: Kind) -> Spec {
    let target = match unit {
        Unit::MebibytesPerSecond => Target::RatioAtLeast(1.0),
        _ => Target::RatioAtMost(1.0),
    };
    let limit = match peer {
        Kind::Loop => "a loop device on the FUSE file, same region",
        _ => "kernel NBD over a socket pair, same region",
    };
    Spec::new(NAME, name, unit).limit(limit).target(target)
}

/// A device over the region, that has shown that it works: a figure of something else would be worth nothing.
fn attach(runtime: &Runtime, region: &Arc<Memory>, kind: Kind) -> Result<BlockMount> {
    let block = BlockOptions { kind: Some(kind), ..BlockOptions::default() };
    let settings = r3map::Settings { block, ..r3map::Settings::default() };
    let mount = runtime.block_on(Mount::direct(region.clone()).settings(settings).block())?;
    File::open(mount.path()).with_context(|| mount.path().display().to_string())?;
    Ok(mount)
}

fn open(path: &Path) -> Result<File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).with_context(|| path.display().to_string())
}

/// A buffer, and from where on it is aligned for direct I/O.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0; len + BLOCK];
    let place = buffer.as_ptr().align_offset(BLOCK);
    (buffer, place)
}

/// The time for each of many reads, `depth` of which are under way at once.
fn read_blocks(settings: &Settings, path: &Path, depth: usize) -> Result<f64> {
    let each = settings.count(4000, 128).div_ceil(depth);
    let read = |thread: usize| -> Result<()> {
        let file = open(path)?;
        let (mut buffer, at) = aligned(BLOCK);
        let mut random = Random::new(settings.seed + thread as u64);
        for _ in 0..each {
            let offset = random.below(settings.size / BLOCK as u64) * BLOCK as u64;
            file.read_exact_at(&mut buffer[at..at + BLOCK], offset)?;
        }
        Ok(())
    };
    let ((), time) = timed(|| {
        std::thread::scope(|scope| {
            let read = &read;
            let threads: Vec<_> = (0..depth).map(|thread| scope.spawn(move || read(thread))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a reader panicked"))?)
        })
    })?;
    Ok(micros(time) / (each * depth) as f64)
}

fn read_all(settings: &Settings, path: &Path) -> Result<f64> {
    let file = open(path)?;
    let (mut buffer, at) = aligned(STEP);
    let rate = throughput(settings.mebibytes(), || {
        for offset in (0..settings.size).step_by(STEP) {
            file.read_exact_at(&mut buffer[at..at + STEP], offset)?;
        }
        Ok(())
    })?;
    ensure!(buffer[at..at + STEP].iter().any(|byte| *byte != 0), "the region is not all zeros");
    Ok(rate)
}

fn write_all(settings: &Settings, path: &Path) -> Result<f64> {
    let file = open(path)?;
    let (mut buffer, at) = aligned(STEP);
    buffer[at..at + STEP].copy_from_slice(&fill::bytes(0, STEP, settings.seed));
    throughput(settings.mebibytes(), || {
        for offset in (0..settings.size).step_by(STEP) {
            file.write_all_at(&buffer[at..at + STEP], offset)?;
        }
        Ok(())
    })
}
