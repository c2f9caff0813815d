//! What is known of each block of a region that is kept locally in front of a remote: the one table, all of its
//! transitions, and nothing else.
//!
//! Nothing here reads or writes a byte of the region, knows a remote, a clock or a runtime. Whoever does the work asks
//! the table for a claim ([`Pull`], [`Install`], [`Write`], [`Push`]), does it, and says how it ended; a claim that is
//! dropped (a cancelled call, a panic) puts the blocks back into a state from which nothing is lost.
//!
//! A block is a combination of bits:
//!
//! ```text
//!            Pull::claim           Install::commit
//!   absent ──────────────▶ installing ──────────────▶ valid ─┐
//!     │ ▲                      │                       ▲     │ stays valid for ever
//!     │ └──────── dropped ─────┘                       │     ▼
//!     │  Table::write (whole blocks)                   │
//!     └─────────▶ absent + written to ── commit ───────┘  and dirty
//!                      └─ dropped ─▶ absent
//!
//!   valid:    clean ── write begins, commits, is dropped ─▶ dirty
//!             dirty ── Table::push ─▶ pushing ── Push::done ─▶ unflushed ── Table::flushed ─▶ clean
//!                        pushing ── dropped ─▶ dirty       unflushed ── Table::flush_failed ─▶ dirty
//!             pushing or unflushed ── written to ─▶ the same, and dirty
//! ```
//!
//! The rules that make it safe:
//! - One pull per chunk at a time; whoever else wants the chunk waits for that pull and gets its result.
//! - A pull installs only blocks that are absent and that nobody is writing. A writer of whole blocks waits for an
//!   installation that has begun (local, short), never for the remote. A writer of part of an absent block is told to
//!   pull it first.
//! - A write marks valid blocks dirty before it begins and again when it has ended, however it ended. A push that
//!   begins while a block is being written leaves it dirty, because what it read may be torn; so nothing that is being
//!   written can count as clean.
//! - A block is in at most one push at a time. What was pushed is clean only after the remote has flushed it.
//! - An absent block becomes valid only by an installation or a whole write that succeeded.
//!
//! Blocks are kept in segments (16 MiB, or one chunk if that is larger) that exist once touched and keep bitmaps only
//! while their blocks differ, in sharded locks. Opening costs the same for every region size; a wholly valid TiB costs
//! about 10 MB.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use rustc_hash::FxHashMap;

use crate::bits::{Bits, count, first, first_run};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::{BLOCK_SIZE, Geometry, Result};

mod pulls;
mod pushes;
#[cfg(test)]
mod tests;
mod writes;

pub use pulls::{Failed, Install, Need, Pull, Wait};
pub use pushes::{NextPush, Push};
pub use writes::{Begin, Write};

/// Blocks in a segment, unless one chunk is larger.
const SEGMENT_BLOCKS: u64 = (16 << 20) / BLOCK_SIZE;

/// Locks that the segments are spread over.
const SHARDS: usize = if cfg!(loom) { 1 } else { 64 };

/// Where transitions are written down that must survive the process. Called under the lock of the blocks, so that the
/// order of calls is the order of states; it must be short and must not call the table.
pub trait Journal: Send + Sync + 'static {
    /// These blocks are present and the remote durably has the same bytes. Called before they count as such.
    ///
    /// # Errors
    /// When it could not be written down; the blocks stay as they were.
    fn clean(&self, blocks: Range<u64>) -> Result<()>;

    /// These blocks are present and the remote may not have them. For blocks that were present it is called before
    /// their bytes change; for absent ones after the new bytes are in place and before anyone is told.
    ///
    /// # Errors
    /// When it could not be written down; the write fails.
    fn dirty(&self, blocks: Range<u64>) -> Result<()>;
}

/// The state of every block of a region. All calls may run at once from any thread.
pub struct Table {
    geometry: Geometry,
    segment_blocks: u64,
    shards: Box<[Mutex<Shard>]>,
    /// Segments with a valid, a dirty, an unflushed block. Changed under the segment's lock.
    present: Mutex<BTreeSet<u64>>,
    dirty: Mutex<BTreeSet<u64>>,
    unflushed: Mutex<BTreeSet<u64>>,
    valid_blocks: AtomicU64,
    unpushed_blocks: AtomicU64,
    journal: Option<Box<dyn Journal>>,
    report_chunks: bool,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table")
            .field("geometry", &self.geometry)
            .field("valid_bytes", &self.valid_bytes())
            .field("unpushed_bytes", &self.unpushed_bytes())
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shard {
    segments: FxHashMap<u64, Segment>,
    /// Who waits for an installation or a write here to end.
    waiting: Vec<Waker>,
}

#[derive(Default)]
struct Segment {
    valid: Bits,
    dirty: Bits,
    pushing: Bits,
    unflushed: Bits,
    /// Ranges that are being written right now.
    writers: Vec<Range<u32>>,
    /// Ranges that pulled bytes are being put into right now: few, and none in another.
    installing: Vec<Range<u32>>,
    pulls: Vec<Arc<pulls::Run>>,
}

/// The part of a range of blocks that lies in one segment.
#[derive(Debug, Clone)]
struct Part {
    segment: u64,
    /// Blocks inside the segment.
    bits: Range<u32>,
}

impl Table {
    /// A table in which every block is absent. `journal` is told of each transition that must survive the process.
    #[must_use]
    pub fn new(geometry: Geometry, journal: Option<Box<dyn Journal>>) -> Self {
        Self {
            geometry,
            segment_blocks: SEGMENT_BLOCKS.max(geometry.chunk_size().blocks()),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect(),
            present: Mutex::new(BTreeSet::new()),
            dirty: Mutex::new(BTreeSet::new()),
            unflushed: Mutex::new(BTreeSet::new()),
            valid_blocks: AtomicU64::new(0),
            unpushed_blocks: AtomicU64::new(0),
            journal,
            report_chunks: false,
        }
    }

    /// The same table, whose [`Install::commit`] and [`Write::commit`] name the chunks that became wholly present by
    /// them, each once. Costs a look at the chunk each time.
    #[must_use]
    pub fn reporting_chunks(mut self) -> Self {
        self.report_chunks = true;
        self
    }

    /// How the region is cut.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Takes over blocks that an earlier process left behind, valid and maybe dirty. Not written to the journal. To be
    /// called before anything else is.
    pub fn restore(&self, blocks: Range<u64>, dirty: bool) {
        for part in self.parts(blocks) {
            self.with(part.segment, |segment, _| {
                self.set_valid(segment, &part, &mut Vec::new());
                if dirty {
                    self.set_dirty(segment, &part, part.bits.clone());
                }
            });
        }
    }

    /// Bytes that are present, counted in whole blocks (and at most the region's size).
    #[must_use]
    pub fn valid_bytes(&self) -> u64 {
        self.bytes(self.valid_blocks.load(Ordering::Acquire))
    }

    /// Bytes that are dirty or being pushed, counted like [`Self::valid_bytes`].
    #[must_use]
    pub fn unpushed_bytes(&self) -> u64 {
        self.bytes(self.unpushed_blocks.load(Ordering::Acquire))
    }

    /// Whether every block is present.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.valid_blocks.load(Ordering::Acquire) == self.geometry.block_count()
    }

    /// Whether every block that `bytes` touches is present. Present blocks stay present.
    #[must_use]
    pub fn is_valid(&self, bytes: &Range<u64>) -> bool {
        self.is_complete()
            || self.parts(self.geometry.blocks_touched(bytes)).all(|part| {
                let shard = lock(self.shard(part.segment));
                shard.segments.get(&part.segment).is_some_and(|segment| segment.valid.all(part.bits))
            })
    }

    /// The first run of present blocks at or after `from`. It ends at a segment's border at the latest, so the next
    /// run may begin where this one ends.
    #[must_use]
    pub fn next_valid(&self, from: u64) -> Option<Range<u64>> {
        let mut at = from;
        loop {
            let segment = *lock(&self.present).range(at / self.segment_blocks..).next()?;
            let base = segment * self.segment_blocks;
            let part = self.part(segment, at.max(base)..self.geometry.block_count());
            let run = self.with(segment, |segment, _| first_run(part.bits, |index| segment.valid.word(index)));
            match run {
                Some(run) => return Some(base + u64::from(run.start)..base + u64::from(run.end)),
                None => at = base + self.segment_blocks,
            }
        }
    }

    /// Whether the block at `from` is present, and where that stops being so; at a segment's border at the latest.
    #[must_use]
    pub fn run_at(&self, from: u64) -> (bool, Range<u64>) {
        let segment = from / self.segment_blocks;
        let part = self.part(segment, from..self.geometry.block_count());
        let shard = lock(self.shard(segment));
        let Some(found) = shard.segments.get(&segment) else {
            return (false, from..self.block(segment, part.bits.end));
        };
        let valid = found.valid.all(part.bits.start..part.bits.start + 1);
        let flip = if valid { u64::MAX } else { 0 };
        let end = first(part.bits.clone(), |index| found.valid.word(index) ^ flip).unwrap_or(part.bits.end);
        (valid, from..self.block(segment, end))
    }

    fn bytes(&self, blocks: u64) -> u64 {
        (blocks * BLOCK_SIZE).min(self.geometry.size())
    }

    fn block(&self, segment: u64, bit: u32) -> u64 {
        segment * self.segment_blocks + u64::from(bit)
    }

    fn blocks(&self, part: &Part) -> Range<u64> {
        self.block(part.segment, part.bits.start)..self.block(part.segment, part.bits.end)
    }

    /// How many blocks a segment has: fewer at the region's end.
    fn segment_len(&self, segment: u64) -> u32 {
        let rest = self.geometry.block_count() - segment * self.segment_blocks;
        narrow(rest.min(self.segment_blocks))
    }

    fn part(&self, segment: u64, blocks: Range<u64>) -> Part {
        let base = segment * self.segment_blocks;
        let len = u64::from(self.segment_len(segment));
        let bits = narrow(blocks.start.max(base) - base)..narrow((blocks.end - base).min(len));
        Part { segment, bits }
    }

    fn parts(&self, blocks: Range<u64>) -> impl Iterator<Item = Part> + use<'_> {
        let last = if blocks.is_empty() { 0 } else { blocks.end.div_ceil(self.segment_blocks) };
        (blocks.start / self.segment_blocks..last).map(move |segment| self.part(segment, blocks.clone()))
    }

    fn shard(&self, segment: u64) -> &Mutex<Shard> {
        &self.shards[narrow(segment % SHARDS as u64) as usize]
    }

    /// Runs `change` on a segment under its lock, keeps the indices in step, and wakes whom `change` put on the list.
    fn with<T>(&self, index: u64, change: impl FnOnce(&mut Segment, &mut Wake) -> T) -> T {
        let mut wake = Wake::default();
        let result = {
            let mut shard = lock(self.shard(index));
            let segment = shard.segments.entry(index).or_default();
            let before = segment.summary();
            let result = change(segment, &mut wake);
            self.reindex(index, before, segment.summary());
            if wake.all_waiting {
                wake.wakers.append(&mut shard.waiting);
            }
            result
        };
        wake.wakers.into_iter().for_each(Waker::wake);
        result
    }

    fn reindex(&self, index: u64, before: [bool; 3], after: [bool; 3]) {
        let sets = [&self.present, &self.dirty, &self.unflushed];
        for (set, (before, after)) in sets.into_iter().zip(before.into_iter().zip(after)) {
            match (before, after) {
                (false, true) => drop(lock(set).insert(index)),
                (true, false) => drop(lock(set).remove(&index)),
                _ => {}
            }
        }
    }

    /// Waits until `ready` says so of a segment; asked again whenever an installation or a write in its shard ends.
    async fn wait_for<T>(&self, index: u64, mut ready: impl FnMut(&mut Segment, &mut Wake) -> Poll<T>) -> T {
        poll_fn(|context| {
            let polled = self.with(index, &mut ready);
            if polled.is_ready() {
                return polled;
            }
            // Registered under the lock, then asked again: an end that came between the two is not slept through.
            self.register(index, context);
            self.with(index, &mut ready)
        })
        .await
    }

    fn register(&self, index: u64, context: &Context<'_>) {
        let mut shard = lock(self.shard(index));
        if !shard.waiting.iter().any(|waker| waker.will_wake(context.waker())) {
            shard.waiting.push(context.waker().clone());
        }
    }

    /// Marks the blocks of a part valid and adds the chunks that became wholly valid by it to `completed`.
    fn set_valid(&self, segment: &mut Segment, part: &Part, completed: &mut Vec<u64>) {
        let known = completed.len();
        if self.report_chunks {
            completed.extend(self.chunks(part).filter(|chunk| !segment.valid.all(self.chunk_bits(*chunk))));
        }
        let changed = segment.valid.fill(self.segment_len(part.segment), part.bits.clone(), true);
        self.valid_blocks.fetch_add(u64::from(changed), Ordering::AcqRel);
        let mut at = known;
        while at < completed.len() {
            if segment.valid.all(self.chunk_bits(completed[at])) {
                at += 1;
            } else {
                completed.remove(at);
            }
        }
    }

    /// The chunks that a part touches.
    fn chunks(&self, part: &Part) -> Range<u64> {
        self.geometry.chunks_touched(&self.geometry.blocks_range(&self.blocks(part)))
    }

    /// The blocks of a chunk inside its segment.
    fn chunk_bits(&self, chunk: u64) -> Range<u32> {
        let blocks = self.geometry.blocks_of_chunk(chunk);
        self.part(self.segment_of(chunk), blocks).bits
    }

    fn segment_of(&self, chunk: u64) -> u64 {
        self.geometry.blocks_of_chunk(chunk).start / self.segment_blocks
    }

    /// The first chunk past the segment that holds `chunk`.
    fn segment_end(&self, chunk: u64) -> u64 {
        let chunks = self.segment_blocks / self.geometry.chunk_size().blocks();
        (chunk / chunks + 1) * chunks
    }

    fn set_dirty(&self, segment: &mut Segment, part: &Part, bits: Range<u32>) {
        let before = segment.unpushed(bits.clone());
        segment.dirty.fill(self.segment_len(part.segment), bits.clone(), true);
        self.count_unpushed(before, segment.unpushed(bits));
    }

    fn count_unpushed(&self, before: u32, after: u32) {
        if after >= before {
            self.unpushed_blocks.fetch_add(u64::from(after - before), Ordering::AcqRel);
        } else {
            self.unpushed_blocks.fetch_sub(u64::from(before - after), Ordering::AcqRel);
        }
    }
}

/// A number of blocks inside a segment.
fn narrow(blocks: u64) -> u32 {
    u32::try_from(blocks).expect("a segment has at most 16384 blocks")
}

/// Whom to wake once the lock is released.
#[derive(Default)]
struct Wake {
    wakers: Vec<Waker>,
    all_waiting: bool,
}

impl Segment {
    fn summary(&self) -> [bool; 3] {
        [self.valid.any(), self.dirty.any(), self.unflushed.any()]
    }

    fn unpushed(&self, bits: Range<u32>) -> u32 {
        count(bits, |index| self.dirty.word(index) | self.pushing.word(index))
    }

    /// The next run of absent blocks in `bits` that nobody is writing or installing: what a pull may bring.
    fn next_wanted(&self, bits: Range<u32>) -> Option<Range<u32>> {
        let mut rest = bits;
        while let Some(run) = first_run(rest.clone(), |index| !self.valid.word(index)) {
            match self.without_busy(run) {
                Ok(free) => return Some(free),
                Err(busy_until) => rest.start = busy_until,
            }
        }
        None
    }

    /// The start of a run up to the first block that is busy, or where the work that holds its first block ends.
    fn without_busy(&self, run: Range<u32>) -> Result<Range<u32>, u32> {
        let mut free = run;
        for busy in self.writers.iter().chain(&self.installing) {
            if busy.start <= free.start && free.start < busy.end {
                return Err(busy.end.min(free.end));
            }
            if busy.start > free.start {
                free.end = free.end.min(busy.start);
            }
        }
        Ok(free)
    }

    fn is_installing(&self, bits: &Range<u32>) -> bool {
        self.installing.iter().any(|installing| overlap(installing, bits))
    }

    fn is_written(&self, bits: &Range<u32>) -> bool {
        self.writers.iter().any(|writer| overlap(writer, bits))
    }
}

fn overlap(a: &Range<u32>, b: &Range<u32>) -> bool {
    a.start < b.end && b.start < a.end
}
