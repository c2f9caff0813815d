//! Random steps on the table and on a model of what it is for: a local side, a remote with a volatile cache, and a
//! journal. Whatever the order, nothing that is present is stale, nothing that counts as clean is missing at the remote,
//! and in the end everything arrives.

use std::collections::HashMap;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use proptest::prelude::*;

use super::super::{Begin, Journal, NextPush, Pull, Push, Table, Write};
use crate::{BLOCK_SIZE, ChunkSize, Geometry, Result};

/// Two and a half segments, so that borders between segments are inside, and a short last block.
const BLOCKS: u64 = 10_000;
const SIZE: u64 = BLOCKS * BLOCK_SIZE - 100;

#[derive(Clone, Default)]
struct Recorded(Arc<Mutex<HashMap<u64, bool>>>);

impl Journal for Recorded {
    fn clean(&self, blocks: Range<u64>) -> Result<()> {
        self.0.lock().unwrap().extend(blocks.map(|block| (block, false)));
        Ok(())
    }

    fn dirty(&self, blocks: Range<u64>) -> Result<()> {
        self.0.lock().unwrap().extend(blocks.map(|block| (block, true)));
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Pull { at: u64, chunks: u64 },
    EndPull { which: usize, how: How },
    Write { at: u64, blocks: u64 },
    EndWrite { which: usize, ok: bool },
    Push { at: u64, blocks: u64, whole: bool },
    EndPush { which: usize, ok: bool },
    Flush { ok: bool },
    Mapped { at: u64, blocks: u64 },
}

#[derive(Debug, Clone, Copy)]
enum How {
    Installed,
    InstalledByHalf,
    Failed,
    GivenUp,
}

/// Blocks near a few places, so that steps meet.
fn place() -> impl Strategy<Value = u64> {
    (prop_oneof![Just(0u64), Just(4090), Just(8188), Just(BLOCKS - 8)], 0u64..8)
        .prop_map(|(near, by)| (near + by).min(BLOCKS - 1))
}

fn step() -> impl Strategy<Value = Step> {
    let how = prop_oneof![3 => Just(How::Installed), 1 => Just(How::InstalledByHalf), 1 => Just(How::Failed), 1 => Just(How::GivenUp)];
    prop_oneof![
        (place(), 1u64..4).prop_map(|(at, chunks)| Step::Pull { at, chunks }),
        (any::<usize>(), how).prop_map(|(which, how)| Step::EndPull { which, how }),
        (place(), 1u64..9).prop_map(|(at, blocks)| Step::Write { at, blocks }),
        (any::<usize>(), any::<bool>()).prop_map(|(which, ok)| Step::EndWrite { which, ok }),
        (place(), 1u64..9, any::<bool>()).prop_map(|(at, blocks, whole)| Step::Push { at, blocks, whole }),
        (any::<usize>(), any::<bool>()).prop_map(|(which, ok)| Step::EndPush { which, ok }),
        any::<bool>().prop_map(|ok| Step::Flush { ok }),
        (place(), 1u64..4).prop_map(|(at, blocks)| Step::Mapped { at, blocks }),
    ]
}

/// Values of blocks; a block that was never written has value 0 everywhere. `None` locally is garbage.
struct World<'t> {
    table: &'t Arc<Table>,
    journal: Recorded,
    local: HashMap<u64, u64>,
    expected: HashMap<u64, u64>,
    cache: HashMap<u64, u64>,
    disk: HashMap<u64, u64>,
    pulls: Vec<Pull>,
    writes: Vec<(Write<'t>, Range<u64>)>,
    pushes: Vec<(Push, Vec<u64>)>,
    next: u64,
}

/// The local value of a block that holds nothing yet.
const GARBAGE: u64 = u64::MAX;

fn value(of: &HashMap<u64, u64>, block: u64) -> u64 {
    of.get(&block).copied().unwrap_or(0)
}

impl<'t> World<'t> {
    fn valid(&self, block: u64) -> bool {
        self.table.run_at(block).0
    }

    fn local(&self, block: u64) -> u64 {
        self.local.get(&block).copied().unwrap_or(GARBAGE)
    }

    /// Bytes change under a claim or through a mapping: what is there now is known only when it has ended.
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Pull { at, chunks } => {
                let chunk = at / self.table.geometry().chunk_size().blocks();
                self.pulls.extend(self.table.pull(chunk..chunk + chunks, chunks));
            }
            Step::EndPull { which, how } if !self.pulls.is_empty() => {
                let pull = self.pulls.swap_remove(which % self.pulls.len());
                self.end_pull(pull, how);
            }
            Step::Write { at, blocks } => self.begin_write(at..(at + blocks).min(BLOCKS)),
            Step::EndWrite { which, ok } if !self.writes.is_empty() => {
                let (write, blocks) = self.writes.swap_remove(which % self.writes.len());
                self.end_write(write, blocks, ok);
            }
            Step::Push { at, blocks, whole } => self.begin_push(at, blocks, whole),
            Step::EndPush { which, ok } if !self.pushes.is_empty() => {
                let (push, values) = self.pushes.swap_remove(which % self.pushes.len());
                self.end_push(push, &values, ok);
            }
            Step::Flush { ok } if self.pushes.is_empty() => self.flush(ok),
            Step::Mapped { at, blocks } => self.mapped(at..(at + blocks).min(BLOCKS)),
            _ => {}
        }
    }

    fn end_pull(&mut self, mut pull: Pull, how: How) {
        let error = crate::Error::new(crate::ErrorKind::Unavailable, crate::Operation::Read, "away");
        let blocks = self.table.geometry().blocks_touched(&pull.bytes());
        let end = match how {
            How::Installed => blocks.end,
            How::InstalledByHalf => blocks.start + (blocks.end - blocks.start) / 2,
            How::Failed | How::GivenUp => blocks.start,
        };
        while let Some(install) = pull.claim(blocks.start..end) {
            for block in install.blocks() {
                assert!(!self.table.run_at(block).0, "a pull overwrites what is valid");
                let writing = self.writes.iter().any(|(_, blocks)| blocks.contains(&block));
                assert!(!writing, "a pull overwrites what is being written");
                self.local.insert(block, value(&self.cache, block));
            }
            let middle = install.blocks().start;
            let waits = pin!(self.table.write(&self.table.geometry().block_range(middle)))
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_pending();
            assert!(waits, "a writer does not wait for an installation");
            install.commit().unwrap();
        }
        match how {
            How::Installed => pull.end(u64::MAX, Ok(())),
            How::Failed => pull.end(u64::MAX, Err(error)),
            How::InstalledByHalf | How::GivenUp => drop(pull),
        }
    }

    fn begin_write(&mut self, blocks: Range<u64>) {
        let bytes = self.table.geometry().blocks_range(&blocks);
        let begun = pin!(self.table.write(&bytes)).poll(&mut Context::from_waker(Waker::noop()));
        let Poll::Ready(Ok(Begin::Now(write))) = begun else { panic!("whole blocks never wait for a pull") };
        for block in blocks.clone() {
            let torn = self.fresh();
            if self.valid(block) {
                assert_ne!(self.journal.0.lock().unwrap().get(&block), Some(&false), "journalled before it changes");
                self.expected.insert(block, torn);
            }
            self.local.insert(block, torn);
        }
        self.writes.push((write, blocks));
    }

    fn end_write(&mut self, write: Write<'t>, blocks: Range<u64>, ok: bool) {
        for block in blocks.clone() {
            let value = self.fresh();
            self.local.insert(block, value);
            if ok || self.valid(block) {
                self.expected.insert(block, value);
            }
        }
        if ok {
            write.commit().unwrap();
        } else {
            drop(write);
        }
    }

    fn begin_push(&mut self, at: u64, blocks: u64, whole: bool) {
        let unit = if whole { self.table.geometry().chunk_size().bytes() } else { BLOCK_SIZE };
        let Some(NextPush::Push(push)) = self.table.push(at, blocks * BLOCK_SIZE, unit) else { return };
        for (other, _) in &self.pushes {
            assert!(other.blocks().end <= push.blocks().start || push.blocks().end <= other.blocks().start);
        }
        let values = push.blocks().map(|block| self.local(block)).collect();
        assert!(push.blocks().all(|block| self.valid(block)), "absent blocks are never pushed");
        self.pushes.push((push, values));
    }

    fn end_push(&mut self, push: Push, values: &[u64], ok: bool) {
        for (block, value) in push.blocks().zip(values) {
            // A push that fails may have written anything.
            let value = if ok { *value } else { self.fresh() };
            self.cache.insert(block, value);
        }
        if ok {
            push.done();
        }
    }

    fn flush(&mut self, ok: bool) {
        if ok {
            self.disk = self.cache.clone();
            self.table.flushed().unwrap();
        } else {
            self.cache = self.disk.clone();
            self.table.flush_failed();
        }
    }

    /// What is valid changes through a mapping and is found right away.
    fn mapped(&mut self, blocks: Range<u64>) {
        for block in blocks.filter(|block| self.table.run_at(*block).0) {
            let value = self.fresh();
            self.local.insert(block, value);
            self.expected.insert(block, value);
            self.table.mark_dirty(block..block + 1).unwrap();
        }
    }

    fn check(&self) {
        let touched = self.local.keys().chain(self.expected.keys());
        for block in touched.copied() {
            let writing = self.writes.iter().any(|(_, blocks)| blocks.contains(&block));
            if self.valid(block) && !writing {
                assert_eq!(self.local(block), value(&self.expected, block), "block {block} is stale");
            }
            let recorded = self.journal.0.lock().unwrap().get(&block).copied();
            if self.valid(block) && !writing {
                assert!(recorded.is_some(), "block {block} would be forgotten");
            }
            if recorded == Some(false) {
                let pushed = self.pushes.iter().any(|(push, _)| push.blocks().contains(&block));
                assert!(!pushed && self.valid(block), "block {block} is called clean and is not");
                assert_eq!(self.local(block), value(&self.disk, block), "block {block} would be lost");
            }
        }
        let (valid, unpushed) = self.counted();
        assert_eq!(self.table.valid_bytes(), (valid * BLOCK_SIZE).min(SIZE));
        assert_eq!(self.table.unpushed_bytes(), (unpushed * BLOCK_SIZE).min(SIZE));
    }

    fn counted(&self) -> (u64, u64) {
        let (mut valid, mut unpushed) = (0, 0);
        for shard in &self.table.shards {
            for (index, segment) in &shard.lock().unwrap().segments {
                let all = 0..self.table.segment_len(*index);
                valid += u64::from(crate::bits::count(all.clone(), |word| segment.valid.word(word)));
                unpushed += u64::from(segment.unpushed(all));
            }
        }
        (valid, unpushed)
    }

    /// Everything ends, everything is pushed and flushed: the remote has all that was written.
    fn finish(mut self) {
        self.pulls.clear();
        while let Some((write, blocks)) = self.writes.pop() {
            self.end_write(write, blocks, false);
        }
        while let Some((push, values)) = self.pushes.pop() {
            self.end_push(push, &values, false);
        }
        let mut at = 0;
        while let Some(NextPush::Push(push)) = self.table.push(at, 1 << 20, BLOCK_SIZE) {
            at = push.blocks().end;
            let values: Vec<u64> = push.blocks().map(|block| self.local(block)).collect();
            self.end_push(push, &values, true);
        }
        self.flush(true);
        self.check();
        assert_eq!(self.table.unpushed_bytes(), 0);
        for (block, value) in &self.expected {
            assert_eq!(self.disk.get(block), Some(value), "block {block} never arrived");
        }
        assert!(self.journal.0.lock().unwrap().values().all(|dirty| !dirty), "all of it is called clean");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn nothing_is_stale_and_nothing_is_lost(
        shift in 12u32..17,
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let geometry = Geometry::new(SIZE, ChunkSize::new(1 << shift).unwrap()).unwrap();
        let journal = Recorded::default();
        let table = Arc::new(Table::new(geometry, Some(Box::new(journal.clone()))));
        let mut world = World {
            table: &table,
            journal,
            local: HashMap::new(),
            expected: HashMap::new(),
            cache: HashMap::new(),
            disk: HashMap::new(),
            pulls: Vec::new(),
            writes: Vec::new(),
            pushes: Vec::new(),
            next: 0,
        };
        for step in steps {
            world.step(step);
            world.check();
        }
        world.finish();
    }
}
