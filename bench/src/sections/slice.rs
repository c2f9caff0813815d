//! The slice frontend over a region in memory, against bare userfaultfd and plain memory.

use std::hint::black_box;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use r3map_core::ChunkSize;
use r3map_core::pull::Workers;
use r3map_local::Memory;
use r3map_slice::{Slice, SliceParts, SliceSettings};
use r3map_sys::{Mapping, Zeroed};
use r3map_testkit::{fill, random::Random};

use crate::figure::{Spec, Target, Unit, median_of};
use crate::limits::memory::{PAGE, huge_pages, small_pages, sum, touch_pages};
use crate::limits::pages::{self, Handler};
use crate::run::{Bench, micros, millis, throughput, timed};
use crate::sections::filled;

const NAME: &str = "slice";
const GIB: f64 = (1u64 << 30) as f64;
/// From one written page to the next, so that a GiB has a thousand.
const SPACING: usize = (1 << 30) / PAGE / 1000 * PAGE;
/// Longer than a run: nothing is looked for or pushed behind the back of a measurement.
const NEVER: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn run(bench: &mut Bench) {
    let spec = Spec::new(NAME, "all of it", Unit::MebibytesPerSecond);
    let source = match Source::new(bench) {
        Ok(source) => source,
        Err(error) => return bench.finish(spec, Err(error)),
    };
    install(bench, &source);
    fault(bench, &source);
    match Pulled::new(&source) {
        Ok(mut pulled) => {
            read(bench, &pulled);
            track(bench, &mut pulled);
            scan(bench, &mut pulled);
        }
        Err(error) => bench.finish(spec, Err(error)),
    }
}

/// The same bytes as a backend, for ours, and for limits: to copy from, and plain memory made of small pages.
struct Source {
    backend: Arc<Memory>,
    bytes: Arc<Zeroed>,
    plain: Arc<Vec<u8>>,
}

impl Source {
    fn new(bench: &Bench) -> Result<Self> {
        let (size, seed) = (bench.settings.size, bench.settings.seed);
        let bytes = fill::bytes(0, usize::try_from(size)?, seed);
        let (huge, small) = (huge_pages(&bytes)?, small_pages(&bytes)?);
        Ok(Self { backend: filled(size, seed)?, bytes: Arc::new(huge), plain: Arc::new(small) })
    }

    fn slice(&self, settings: SliceSettings) -> Result<Slice> {
        Slice::open(self.backend.clone(), settings, SliceParts::default()).context("opening a slice")
    }

    fn bare(&self) -> Result<Mapping> {
        pages::mapping(self.plain.len() as u64)
    }
}

/// A managed slice that is left alone once everything is pulled.
fn undisturbed() -> SliceSettings {
    let mut settings = SliceSettings::default();
    settings.region.push.interval = NEVER;
    settings.region.push.collect_interval = NEVER;
    settings.region.push.dirty_budget = NonZeroU64::MAX;
    settings
}

fn install(bench: &mut Bench, source: &Source) {
    let mebibytes = bench.settings.mebibytes();
    let spec = Spec::new(NAME, "background install", Unit::MebibytesPerSecond)
        .limit("a bare UFFDIO_COPY loop in one thread, 64 KiB at a time")
        .note("from opening to everything being there")
        .target(Target::RatioAtLeast(0.8));
    // What was made is dropped after the time is taken.
    let rate = |time: Duration| mebibytes / time.as_secs_f64();
    bench.pair(
        spec,
        || {
            let (_slice, time) = timed(|| {
                let slice = source.slice(undisturbed())?;
                slice.pulled().wait()?;
                Ok(slice)
            })?;
            Ok(rate(time))
        },
        || {
            let (_mapping, time) = timed(|| {
                let mapping = source.bare()?;
                pages::fill(&mapping, source.bytes.as_slice())?;
                Ok(mapping)
            })?;
            Ok(rate(time))
        },
    );
}

fn fault(bench: &mut Bench, source: &Source) {
    let spec = Spec::new(NAME, "demand fault, 4 KiB", Unit::Microseconds)
        .limit("a thread that polls, reads and copies one page")
        .note("median of the faults of a run; chunks of 4 KiB, one reader")
        .target(Target::RatioAtMost(1.3));
    let (count, seed) = (bench.settings.count(4000, 100), bench.settings.seed);
    bench.pair(
        spec,
        || {
            let mut settings = undisturbed();
            settings.region.chunk_size = ChunkSize::new(PAGE as u64)?;
            settings.region.pull.workers = Workers::Off;
            Ok(touch(&source.slice(settings)?, count, seed))
        },
        || {
            let mapping = source.bare()?;
            let handler = Handler::start(&mapping, source.bytes.clone())?;
            let time = touch(mapping.as_slice(), count, seed);
            handler.stop()?;
            Ok(time)
        },
    );
}

/// Reads one byte of each of so many random pages, each page once; the median time in microseconds.
fn touch(bytes: &[u8], count: usize, seed: u64) -> f64 {
    let mut order: Vec<usize> = (0..bytes.len() / PAGE).collect();
    let mut random = Random::new(seed);
    let count = count.min(order.len());
    for at in 0..count {
        let left = (order.len() - at) as u64;
        let other = at + usize::try_from(random.below(left)).unwrap_or_default();
        order.swap(at, other);
    }
    let time = |page: &usize| {
        let start = Instant::now();
        black_box(bytes[page * PAGE]);
        micros(start.elapsed())
    };
    median_of(order[..count].iter().map(time).collect())
}

/// Everything is there, in ours and in bare memory.
struct Pulled {
    slice: Slice,
    bare: Mapping,
    plain: Arc<Vec<u8>>,
}

impl Pulled {
    fn new(source: &Source) -> Result<Self> {
        let slice = source.slice(undisturbed())?;
        slice.pulled().wait()?;
        ensure!(slice.as_slice() == source.plain.as_slice(), "the slice holds other bytes than its source");
        let bare = source.bare()?;
        pages::fill(&bare, source.bytes.as_slice())?;
        Ok(Self { slice, bare, plain: source.plain.clone() })
    }
}

fn read(bench: &mut Bench, pulled: &Pulled) {
    let mebibytes = bench.settings.mebibytes();
    let spec = Spec::new(NAME, "sequential read after pull", Unit::MebibytesPerSecond)
        .limit("plain anonymous memory in small pages (no huge pages)")
        .target(Target::RatioAtLeast(0.95));
    let read = |bytes: &[u8]| throughput(mebibytes, || Ok(black_box(sum(bytes))));
    bench.pair(spec, || read(&pulled.slice), || read(&pulled.plain));
}

fn track(bench: &mut Bench, pulled: &mut Pulled) {
    let spec = Spec::new(NAME, "tracking a write, per page", Unit::Nanoseconds)
        .limit("bare memory with asynchronous write-protection")
        .note("the first write to each page, less a second one");
    let (slice, bare) = (&mut pulled.slice, &mut pulled.bare);
    bench.pair(
        spec,
        || {
            let time = touch_twice(slice.as_mut_slice()?)?;
            slice.flush().wait()?;
            Ok(time)
        },
        || {
            let time = touch_twice(bare.as_mut_slice().context("memory that can be written")?)?;
            pages::scan(bare.pager())?;
            Ok(time)
        },
    );
}

/// How much longer the first write to each page takes than the second, in nanoseconds.
fn touch_twice(bytes: &mut [u8]) -> Result<f64> {
    let count = bytes.len().div_ceil(PAGE) as f64;
    let mut touch = |value| timed(|| touch_pages(bytes, value)).map(|(_, time)| time.as_secs_f64());
    Ok((touch(1)? - touch(2)?) * 1e9 / count)
}

fn scan(bench: &mut Bench, pulled: &mut Pulled) {
    let size = pulled.plain.len() as f64;
    let per_gib = GIB / size;
    let spec = Spec::new(NAME, "a flush with nothing written", Unit::MillisecondsPerGibibyte)
        .limit("a bare PAGEMAP_SCAN that finds nothing");
    let slice = &pulled.slice;
    let pager = pulled.bare.pager().clone();
    bench.pair(
        spec,
        || Ok(millis(timed(|| Ok(slice.flush().wait()?))?.1) * per_gib),
        || Ok(millis(timed(|| pages::scan(&pager))?.1) * per_gib),
    );
    let spec = Spec::new(NAME, "a scan that finds 1000 pages a GiB", Unit::MillisecondsPerGibibyte)
        .note("PAGEMAP_SCAN, which also protects what it finds");
    let bare = &mut pulled.bare;
    bench.alone(spec, || {
        let bytes = bare.as_mut_slice().context("memory that can be written")?;
        let written = bytes.len().div_ceil(SPACING) as u64;
        bytes.chunks_mut(SPACING).for_each(|part| part[0] = 3);
        let (found, time) = timed(|| pages::scan(&pager))?;
        ensure!(found == written, "{found} pages were found, not {written}");
        Ok(millis(time) * per_gib)
    });
}
