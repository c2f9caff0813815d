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
use crate::limits::processors::{on_processor, processors};
use crate::run::{Bench, Settings, micros, millis, throughput, timed};
use crate::sections::filled;

const NAME: &str = "slice";
const GIB: f64 = (1u64 << 30) as f64;
/// From one written page to the next, so that a GiB has a thousand.
const SPACING: usize = (1 << 30) / PAGE / 1000 * PAGE;
/// Faults in a turn.
const TURN: usize = 50;
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
    read(bench, &source);
    match Pulled::new(&source) {
        Ok(mut pulled) => {
            track(bench, &mut pulled);
            scan(bench, &mut pulled);
        }
        Err(error) => bench.finish(spec, Err(error)),
    }
}

/// The same bytes as a backend, for ours, and in memory to copy from, for limits.
struct Source {
    backend: Arc<Memory>,
    bytes: Arc<Zeroed>,
}

impl Source {
    fn new(bench: &Bench) -> Result<Self> {
        let (size, seed) = (bench.settings.size, bench.settings.seed);
        let bytes = huge_pages(&fill::bytes(0, usize::try_from(size)?, seed))?;
        Ok(Self { backend: filled(size, seed)?, bytes: Arc::new(bytes) })
    }

    fn slice(&self, settings: SliceSettings) -> Result<Slice> {
        Slice::open(self.backend.clone(), settings, SliceParts::default()).context("opening a slice")
    }

    /// A managed slice that has everything and is left alone.
    fn pulled(&self) -> Result<Slice> {
        let slice = self.slice(undisturbed())?;
        slice.pulled().wait()?;
        Ok(slice)
    }

    fn bare(&self) -> Result<Mapping> {
        pages::mapping(self.bytes.as_slice().len() as u64)
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
            let (_slice, time) = timed(|| source.pulled())?;
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

/// With the reader and the fault threads on one processor, and on two: which of the two the kernel chooses by itself changes
/// from moment to moment, for each side apart, and decides more than what either does to answer.
fn fault(bench: &mut Bench, source: &Source) {
    let processors = match processors() {
        Ok(processors) => processors,
        Err(error) => return bench.finish(Spec::new(NAME, "demand fault, 4 KiB", Unit::Microseconds), Err(error)),
    };
    for (place, threads) in [("one processor", processors.first()), ("two processors", processors.get(1))] {
        let (Some(&reader), Some(&threads)) = (processors.first(), threads) else { continue };
        let spec = Spec::new(NAME, format!("demand fault, 4 KiB, {place}"), Unit::Microseconds)
            .limit("a thread that polls, reads and copies one page")
            .note("median of the faults of a run; chunks of 4 KiB, one reader, both in turns of 50")
            .target(Target::RatioAtMost(1.3));
        let settings = bench.settings.clone();
        bench.both(spec, || {
            let mut direct = undisturbed();
            direct.region.chunk_size = ChunkSize::new(PAGE as u64)?;
            direct.region.pull.workers = Workers::Off;
            // Threads stay on the processors of the thread that has started them.
            let (slice, bare, handler) = on_processor(threads, || {
                let (slice, bare) = (source.slice(direct)?, source.bare()?);
                let handler = Handler::start(&bare, source.bytes.clone())?;
                Ok((slice, bare, handler))
            })?;
            let medians = on_processor(reader, || Ok(touch(&settings, &slice, bare.as_slice())))?;
            handler.stop()?;
            Ok(medians)
        });
    }
}

/// Reads one byte of each of so many random pages, each page once; the median times in microseconds. Both in turns of a
/// few, so that what disturbs the machine disturbs both.
fn touch(settings: &Settings, ours: &[u8], limit: &[u8]) -> (f64, f64) {
    let order = pages_in_any_order(ours.len() / PAGE, settings.count(4000, 100), settings.seed);
    let mut times = [Vec::new(), Vec::new()];
    for turn in order.chunks(TURN) {
        for (bytes, times) in [ours, limit].iter().zip(&mut times) {
            times.extend(turn.iter().map(|page| {
                let start = Instant::now();
                black_box(bytes[page * PAGE]);
                micros(start.elapsed())
            }));
        }
    }
    let [ours, limit] = times.map(median_of);
    (ours, limit)
}

/// Up to `count` of so many pages, each once.
fn pages_in_any_order(pages: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut random = Random::new(seed);
    let count = count.min(order.len());
    for at in 0..count {
        let left = (order.len() - at) as u64;
        let other = at + usize::try_from(random.below(left)).unwrap_or_default();
        order.swap(at, other);
    }
    order.truncate(count);
    order
}

/// Everything is there, in ours and in bare memory.
struct Pulled {
    slice: Slice,
    bare: Mapping,
}

impl Pulled {
    fn new(source: &Source) -> Result<Self> {
        let slice = source.pulled()?;
        ensure!(slice.as_slice() == source.bytes.as_slice(), "the slice holds other bytes than its source");
        let bare = source.bare()?;
        pages::fill(&bare, source.bytes.as_slice())?;
        Ok(Self { slice, bare })
    }
}

/// How fast memory is read depends on where the kernel has found its pages. So both are made anew for each run, one after
/// the other: each from the pages that the other has just given back.
fn read(bench: &mut Bench, source: &Source) {
    let mebibytes = bench.settings.mebibytes();
    let spec = Spec::new(NAME, "sequential read after pull", Unit::MebibytesPerSecond)
        .limit("plain anonymous memory in small pages (no huge pages)")
        .note("both are made anew for each run; read once before")
        .target(Target::RatioAtLeast(0.95));
    let read = |bytes: &[u8]| {
        black_box(sum(bytes));
        throughput(mebibytes, || Ok(black_box(sum(bytes))))
    };
    bench.pair(spec, || read(&source.pulled()?), || read(&small_pages(source.bytes.as_slice())?));
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
    let size = pulled.bare.len() as f64;
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
