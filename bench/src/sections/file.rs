//! The file frontend over a region in memory, against a FUSE file system that answers from a static buffer, and one
//! that keeps its bytes in the simplest way.

use std::fs::{File, OpenOptions};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use r3map_file::{FileMount, FileSettings};
use r3map_testkit::{fill, random::Random};
use rustix::fs::{Advice, OFlags, fadvise};
use tokio::runtime::Runtime;

use crate::figure::{Spec, Target, Unit, median_of};
use crate::limits::fuse::{Content, NullFile};
use crate::limits::memory::small_pages;
use crate::run::{Bench, Settings, micros, timed};
use crate::sections::filled;

const NAME: &str = "file";
const STATIC: &str = "a FUSE file system that answers from a static buffer, same settings";
const STORED: &str = "the same file system over one plain buffer as large as the region";
/// What programs like `dd` and `cp` read and write at once.
const STEP: usize = 1 << 20;
/// The least that direct I/O moves.
const BLOCK: usize = 4096;
/// Reads of one file before it is the other one's turn: direct ones of a block, and bytes in steps.
const TURN: usize = 50;
const LONG_TURN: usize = 16 << 20;

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

/// Ours beside the static buffer, which the processor has in its cache; and beside one as large as the region, which is in memory
/// as ours is.
fn compare(bench: &mut Bench, settings: &Settings, mounted: &Mounted, spec: Spec, measure: Measure) {
    let name = format!("{}: large buffer", spec.name);
    let stored = Spec { name, ..spec.clone() }.limit(STORED);
    for (spec, limit) in [(spec.limit(STATIC), &mounted.null), (stored, &mounted.stored)] {
        bench.both(spec, || measure(settings, [mounted.ours.path(), &limit.path()]));
    }
}

/// Measures the first file and the second one, its limit.
type Measure = fn(&Settings, [&Path; 2]) -> Result<(f64, f64)>;

fn figures() -> [(Spec, Measure); 4] {
    // Of a latency, 0.8 of the limit's speed is 1.25 times its time.
    let (fast, quick) = (Target::RatioAtLeast(0.8), Target::RatioAtMost(1.25));
    let spec = |name: &str, unit, target| Spec::new(NAME, name, unit).target(target);
    let throughput = |name, measure: Measure| (spec(name, Unit::MebibytesPerSecond, fast), measure);
    [
        throughput("buffered sequential read", read_buffered),
        (
            spec("direct random read of 4 KiB", Unit::Microseconds, quick).note("median of the reads of a run"),
            read_blocks,
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

fn both([ours, limit]: [&Path; 2], flags: OFlags) -> Result<[File; 2]> {
    let flags = i32::try_from(flags.bits())?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    let open = |path: &Path| options.open(path).with_context(|| path.display().to_string());
    Ok([open(ours)?, open(limit)?])
}

/// With nothing in the kernel's page cache, and read-ahead.
fn read_buffered(settings: &Settings, files: [&Path; 2]) -> Result<(f64, f64)> {
    let files = both(files, OFlags::empty())?;
    for file in &files {
        fadvise(file, 0, None, Advice::DontNeed)?;
    }
    read_all(settings, &files)
}

/// Past the page cache, one request after another.
fn read_direct(settings: &Settings, files: [&Path; 2]) -> Result<(f64, f64)> {
    read_all(settings, &both(files, OFlags::DIRECT)?)
}

fn read_all(settings: &Settings, files: &[File; 2]) -> Result<(f64, f64)> {
    let mut buffer = vec![0; STEP];
    in_turns(settings, files, |file, at| Ok(file.read_exact_at(&mut buffer[..length(&at)?], at.start)?))
}

/// Over what is there already. The kernel passes each write on before the next.
fn write_sequentially(settings: &Settings, files: [&Path; 2]) -> Result<(f64, f64)> {
    let buffer = fill::bytes(0, STEP, settings.seed + 1);
    in_turns(settings, &both(files, OFlags::empty())?, |file, at| {
        Ok(file.write_all_at(&buffer[..length(&at)?], at.start)?)
    })
}

/// MiB per second of both, of which each goes a little further in turn: which processors the threads of both are on, and how long
/// waking them takes, changes from moment to moment.
fn in_turns(
    settings: &Settings,
    files: &[File; 2],
    mut step: impl FnMut(&File, Range<u64>) -> Result<()>,
) -> Result<(f64, f64)> {
    let mut times = [Duration::ZERO; 2];
    for turn in split(0..settings.size, LONG_TURN) {
        for (file, time) in files.iter().zip(&mut times) {
            let mut steps = split(turn.clone(), STEP);
            *time += timed(|| steps.try_for_each(|at| step(file, at)))?.1;
        }
    }
    let [ours, limit] = times.map(|time| settings.mebibytes() / time.as_secs_f64());
    Ok((ours, limit))
}

/// A range in parts of `len` bytes; the last may be shorter.
fn split(range: Range<u64>, len: usize) -> impl Iterator<Item = Range<u64>> {
    range.clone().step_by(len).map(move |start| start..range.end.min(start + len as u64))
}

fn length(range: &Range<u64>) -> Result<usize> {
    Ok(usize::try_from(range.end - range.start)?)
}

/// The medians of both, read in turns of a few: how long the kernel takes to wake a thread changes from moment to
/// moment, by more than either takes to answer.
fn read_blocks(settings: &Settings, files: [&Path; 2]) -> Result<(f64, f64)> {
    let files = both(files, OFlags::DIRECT)?;
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
