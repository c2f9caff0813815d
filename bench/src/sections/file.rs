//! The file frontend over a region in memory, against a FUSE file system that answers from a static buffer.

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
use crate::limits::fuse::NullFile;
use crate::run::{Bench, Settings, micros, throughput};
use crate::sections::filled;

const NAME: &str = "file";
const LIMIT: &str = "a FUSE file system that answers from a static buffer, same settings";
/// What programs like `dd` and `cp` read and write at once.
const STEP: usize = 1 << 20;
/// The least that direct I/O moves.
const BLOCK: usize = 4096;

pub(crate) fn run(bench: &mut Bench) {
    let both = Both::mount(&bench.settings);
    let settings = bench.settings.clone();
    for (spec, measure) in figures() {
        match &both {
            Ok(both) => {
                bench.pair(spec, || measure(&settings, both.ours.path()), || measure(&settings, &both.null.path()))
            }
            Err(error) => bench.finish(spec, Err(anyhow::anyhow!("{error:#}"))),
        }
    }
}

type Measure = fn(&Settings, &Path) -> Result<f64>;

fn figures() -> [(Spec, Measure); 4] {
    // Of a latency, 0.8 of the limit's speed is 1.25 times its time.
    let (fast, quick) = (Target::RatioAtLeast(0.8), Target::RatioAtMost(1.25));
    let spec = |name: &str, unit, target| Spec::new(NAME, name, unit).limit(LIMIT).target(target);
    [
        (spec("buffered sequential read", Unit::MebibytesPerSecond, fast), read_buffered),
        (
            spec("direct random read of 4 KiB", Unit::Microseconds, quick).note("median of the reads of a run"),
            read_blocks,
        ),
        (spec("direct sequential read, 1 MiB", Unit::MebibytesPerSecond, fast), read_direct),
        (spec("sequential write, 1 MiB", Unit::MebibytesPerSecond, fast), write_sequentially),
    ]
}

/// Our file and the limit's.
struct Both {
    // Dropped in this order: unmounting needs the runtime.
    ours: FileMount,
    null: NullFile,
    _runtime: Runtime,
}

impl Both {
    fn mount(settings: &Settings) -> Result<Self> {
        let threads = NonZeroUsize::new(std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2)));
        let kernel = FileSettings { threads, ..FileSettings::default() };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let region = filled(settings.size, settings.seed)?;
        let path = std::env::temp_dir().join(format!("r3map-bench-{}", std::process::id()));
        let ours = runtime.block_on(FileMount::open(region, path, kernel.clone())).context("mounting")?;
        let null = NullFile::mount(settings.size, &kernel)?;
        let both = Self { ours, null, _runtime: runtime };
        both.check(settings)?;
        Ok(both)
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

fn read_blocks(settings: &Settings, path: &Path) -> Result<f64> {
    let file = open(path, OFlags::DIRECT)?;
    let mut random = Random::new(settings.seed);
    let mut buffer = vec![0; BLOCK];
    let mut times = Vec::new();
    for _ in 0..settings.count(5000, 100) {
        let offset = random.below(settings.size / BLOCK as u64) * BLOCK as u64;
        let start = Instant::now();
        file.read_exact_at(&mut buffer, offset)?;
        times.push(micros(start.elapsed()));
    }
    Ok(median_of(times))
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
