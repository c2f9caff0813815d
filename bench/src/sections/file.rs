//! The file frontend over a region in memory, against a FUSE file system that answers from a static buffer, and one
//! that keeps its bytes in the simplest way.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use r3map_file::{FileMount, FileSettings};
use r3map_testkit::{fill, random::Random};
use rustix::fs::{Advice, OFlags, fadvise};
use tokio::runtime::Runtime;

use crate::figure::{Spec, Target, Unit, median_of};
use crate::limits::fuse::{Content, NullFile};
use crate::limits::memory::small_pages;
use crate::run::{Bench, Settings, micros, throughput};
use crate::sections::filled;

const NAME: &str = "file";
/// What of the limit is out of reach for whoever keeps what it is given.
const STORED: &str = "in place of ours the same file system over one plain buffer as large as the region";
const LIMIT: &str = "a FUSE file system that answers from a static buffer, same settings";
/// What programs like `dd` and `cp` read and write at once.
const STEP: usize = 1 << 20;
/// The least that direct I/O moves.
const BLOCK: usize = 4096;
/// Reads of one file before it is the other one's turn.
const TURN: usize = 50;

pub(crate) fn run(bench: &mut Bench) {
    let mounted = Mounted::new(&bench.settings);
    let settings = bench.settings.clone();
    for (spec, measure) in figures() {
        match &mounted {
            Ok(mounted) => compare(bench, &settings, mounted, spec, measure),
            Err(error) => bench.finish(spec, Err(anyhow::anyhow!("{error:#}"))),
        }
    }
}

/// Ours beside the static buffer, and then what the simplest program that keeps its bytes reaches of the same limit.
fn compare(bench: &mut Bench, settings: &Settings, mounted: &Mounted, spec: Spec, measure: Measure) {
    let (ours, null, stored) = (mounted.ours.path(), mounted.null.path(), mounted.stored.path());
    let name = format!("{}: plain buffer", spec.name);
    let plain = Spec { target: None, name, ..spec.clone() }.note(STORED);
    for (spec, path) in [(spec, ours), (plain, &stored)] {
        match measure {
            Measure::Throughput(measure) => {
                bench.pair(spec, || measure(settings, path), || measure(settings, &null));
            }
            Measure::Latency => bench.both(spec, || read_blocks(settings, path, &null)),
        }
    }
}

#[derive(Clone, Copy)]
enum Measure {
    Throughput(fn(&Settings, &Path) -> Result<f64>),
    Latency,
}

fn figures() -> [(Spec, Measure); 4] {
    // Of a latency, 0.8 of the limit's speed is 1.25 times its time.
    let (fast, quick) = (Target::RatioAtLeast(0.8), Target::RatioAtMost(1.25));
    let spec = |name: &str, unit, target| Spec::new(NAME, name, unit).limit(LIMIT).target(target);
    let throughput = |name, measure| (spec(name, Unit::MebibytesPerSecond, fast), Measure::Throughput(measure));
    [
        throughput("buffered sequential read", read_buffered),
        (
            spec("direct random read of 4 KiB", Unit::Microseconds, quick).note("median of the reads of a run"),
            Measure::Latency,
        ),
        throughput("direct sequential read, 1 MiB", read_direct),
        throughput("sequential write, 1 MiB", write_sequentially),
    ]
}

/// Our file and the limits'.
struct Mounted {
    // Dropped in this order: unmounting needs the runtime.
    ours: FileMount,
    null: NullFile,
    stored: NullFile,
    _runtime: Runtime,
}

impl Mounted {
    fn new(settings: &Settings) -> Result<Self> {
        let threads = NonZeroUsize::new(std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2)));
        let kernel = FileSettings { threads, ..FileSettings::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let region = filled(settings.size, settings.seed)?;
        let path = std::env::temp_dir().join(format!("r3map-bench-{}", std::process::id()));
        let ours = runtime.block_on(FileMount::open(region, path, kernel.clone())).context("mounting")?;
        let null = NullFile::mount(settings.size, Content::Static, &kernel)?;
        // Of small pages, as ours is.
        let bytes = small_pages(&fill::bytes(0, usize::try_from(settings.size)?, settings.seed))?;
        let stored = NullFile::mount(settings.size, Content::Stored(bytes), &kernel)?;
        let mounted = Self { ours, null, stored, _runtime: runtime };
        mounted.check(settings)?;
        Ok(mounted)
    }

    /// A figure of something that does not work would be worth nothing.
    fn check(&self, settings: &Settings) -> Result<()> {
        let mut bytes = vec![0; STEP];
        File::open(self.ours.path())?.read_exact_at(&mut bytes, 0)?;
        fill::check(&bytes, 0, settings.seed).map_err(anyhow::Error::msg)
    }
}

fn open(path: &Path, flags: OFlags) -> Result<File> {
    let flags = i32::try_from(flags.bits())?;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).with_context(|| path.display().to_string())
}

/// With nothing in the kernel's page cache, and read-ahead.
fn read_buffered(settings: &Settings, path: &Path) -> Result<f64> {
    let mut file = open(path, OFlags::empty())?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    read_all(settings, &mut file)
}

/// Past the page cache, one request after another.
fn read_direct(settings: &Settings, path: &Path) -> Result<f64> {
    read_all(settings, &mut open(path, OFlags::DIRECT)?)
}

fn read_all(settings: &Settings, file: &mut File) -> Result<f64> {
    let mut buffer = vec![0; STEP];
    throughput(settings.mebibytes(), || {
        let mut total = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                len => total += len as u64,
            }
        }
        ensure!(total == settings.size, "{total} bytes were read, not {}", settings.size);
        Ok(())
    })
}

/// The medians of both, read in turns of a few: how long the kernel takes to wake a thread changes from moment to
/// moment, by more than either takes to answer.
fn read_blocks(settings: &Settings, ours: &Path, limit: &Path) -> Result<(f64, f64)> {
    let files = [open(ours, OFlags::DIRECT)?, open(limit, OFlags::DIRECT)?];
    let mut times = [Vec::new(), Vec::new()];
    let mut random = Random::new(settings.seed);
    for _ in 0..settings.count(5000, 100) / TURN {
        for (file, times) in files.iter().zip(&mut times) {
            for _ in 0..TURN {
                times.push(read_block(file, random.below(settings.size / BLOCK as u64))?);
            }
        }
    }
    let [ours, limit] = times.map(median_of);
    Ok((ours, limit))
}

fn read_block(file: &File, block: u64) -> Result<f64> {
    let mut buffer = [0; BLOCK];
    let start = Instant::now();
    file.read_exact_at(&mut buffer, block * BLOCK as u64)?;
    Ok(micros(start.elapsed()))
}

/// Over what is there already. The kernel passes each write on before the next.
fn write_sequentially(settings: &Settings, path: &Path) -> Result<f64> {
    let file = open(path, OFlags::empty())?;
    let buffer = fill::bytes(0, STEP, settings.seed + 1);
    throughput(settings.mebibytes(), || {
        for offset in (0..settings.size).step_by(STEP) {
            file.write_all_at(&buffer, offset)?;
        }
        Ok(())
    })
}
