//! Each rule of the table by an example.

use std::task::{Context, Poll, Waker};
use std::time::Instant;

use super::super::{Begin, Journal, Need, NextPush, Push, Table, Write};
use super::table;
use crate::{BLOCK_SIZE, ChunkSize, Error, ErrorKind, Geometry, Operation};
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;

const BLOCK: u64 = BLOCK_SIZE;
const CHUNK: u64 = 4 * BLOCK;

/// The value of a future that has to be ready.
fn now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it should not have to wait"),
    }
}

fn is_pending<F: Future>(future: F) -> bool {
    pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

fn begin(table: &Table, bytes: Range<u64>) -> Write<'_> {
    match now(table.write(&bytes)).unwrap() {
        Begin::Now(write) => write,
        Begin::Absent(range) => panic!("{range:?} is absent"),
    }
}

fn write(table: &Table, bytes: Range<u64>) -> Vec<u64> {
    begin(table, bytes).commit().unwrap()
}

fn pull(table: &Arc<Table>, chunks: Range<u64>) {
    while let Some(mut pull) = table.pull(chunks.clone(), u64::MAX) {
        let bytes = pull.bytes();
        while let Some(install) = pull.claim(table.geometry().blocks_touched(&bytes)) {
            install.commit().unwrap();
        }
        pull.end(chunks.end, Ok(()));
    }
}

fn push(table: &Arc<Table>, from: u64) -> Option<Push> {
    match table.push(from, 1 << 20, BLOCK) {
        Some(NextPush::Push(push)) => Some(push),
        Some(other) => panic!("{other:?}"),
        None => None,
    }
}

fn error() -> Error {
    Error::new(ErrorKind::Unavailable, Operation::Read, "away")
}

#[test]
fn the_second_reader_joins_the_first_ones_pull() {
    let table = table(10 * CHUNK, CHUNK);
    let Need::Pull(mut first) = table.need(&(0..1), 8) else { panic!() };
    let Need::Join(wait) = table.need(&(5..6), 8) else { panic!() };
    let mut wait = pin!(wait);
    assert!(is_pending(wait.as_mut()));
    assert!(table.pull(0..1, 8).is_none());
    first.end(1, Err(error()));
    assert_eq!(now(wait).unwrap().unwrap_err().chunks, 0..1);
    assert!(matches!(table.need(&(0..1), 8), Need::Pull(_)), "a later reader tries again");
}

#[test]
fn the_chunks_of_one_pull_end_one_by_one() {
    let table = table(10 * CHUNK, CHUNK);
    let Need::Pull(mut pull) = table.need(&(0..3 * CHUNK), 8) else { panic!() };
    assert_eq!(pull.chunks(), 0..3);
    let Need::Join(first) = table.need(&(0..1), 8) else { panic!() };
    let Need::Join(third) = table.need(&(2 * CHUNK..2 * CHUNK + 1), 8) else { panic!() };
    pull.claim(0..4).unwrap().commit().unwrap();
    pull.end(1, Ok(()));
    assert!(now(first).unwrap().is_ok());
    pull.end(2, Err(error()));
    let mut third = pin!(third);
    assert!(is_pending(third.as_mut()), "another chunk's error is not ours");
    drop(pull);
    assert!(now(third).is_none(), "given up: ask again");
    assert!(matches!(table.need(&(2 * CHUNK..2 * CHUNK + 1), 8), Need::Pull(_)));
}

#[test]
fn a_demand_takes_as_much_as_it_may_and_stops_where_others_are_at_work() {
    let table = table(100 * CHUNK, CHUNK);
    let other = table.pull(5..6, 1).unwrap();
    let Need::Pull(all) = table.need(&(0..10 * CHUNK), 100) else { panic!() };
    assert_eq!(all.chunks(), 0..5);
    let Need::Pull(few) = table.need(&(6 * CHUNK..10 * CHUNK), 2) else { panic!() };
    assert_eq!(few.chunks(), 6..8);
    drop(other);
}

#[test]
fn a_pull_leaves_out_what_is_valid_and_what_is_being_written() {
    let table = table(CHUNK, CHUNK);
    write(&table, 0..BLOCK);
    let writing = begin(&table, 2 * BLOCK..3 * BLOCK);
    let Need::Pull(pull) = table.need(&(0..CHUNK), 1) else { panic!() };
    assert_eq!(pull.claim(0..4).unwrap().blocks(), 1..2);
    let first = pull.claim(0..4).unwrap();
    let second = pull.claim(0..4).unwrap();
    assert_eq!((first.blocks(), second.blocks()), (1..2, 3..4));
    assert!(pull.claim(0..4).is_none());
    first.commit().unwrap();
    second.commit().unwrap();
    drop(pull);
    assert!(matches!(table.need(&(0..CHUNK), 1), Need::Busy(0)));
    assert!(is_pending(table.settled(0)));
    assert_eq!(writing.commit().unwrap(), [0], "it completed the chunk");
    now(table.settled(0));
    assert!(matches!(table.need(&(0..CHUNK), 1), Need::Nothing));
}

#[test]
fn a_whole_write_waits_for_an_installation_and_not_for_a_pull() {
    let table = table(CHUNK, CHUNK);
    let pull = table.pull(0..1, 1).unwrap();
    write(&table, 0..BLOCK);
    let install = pull.claim(1..2).unwrap();
    let mut waiting = pin!(table.write(&(BLOCK..2 * BLOCK)));
    assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    install.commit().unwrap();
    let Poll::Ready(Ok(Begin::Now(write))) = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("the installation is over");
    };
    write.commit().unwrap();
}

#[test]
fn a_partial_write_to_an_absent_block_needs_it_first() {
    let table = table(10 * BLOCK + 100, CHUNK);
    for (bytes, absent) in [
        (10..20, 0..BLOCK),
        (10..3 * BLOCK, 0..BLOCK),
        (BLOCK..2 * BLOCK + 1, 2 * BLOCK..3 * BLOCK),
        (10 * BLOCK..10 * BLOCK + 99, 10 * BLOCK..10 * BLOCK + 100),
    ] {
        let Begin::Absent(found) = now(table.write(&bytes)).unwrap() else { panic!("{bytes:?}") };
        assert_eq!(found, absent, "{bytes:?}");
    }
    // The last, short block as a whole is a whole block.
    write(&table, 10 * BLOCK..10 * BLOCK + 100);
    assert!(table.is_valid(&(10 * BLOCK..10 * BLOCK + 100)));
    // And a block that somebody writes as a whole is waited for.
    let writing = begin(&table, 0..BLOCK);
    assert!(is_pending(table.write(&(10..20))));
    drop(writing);
    assert!(matches!(now(table.write(&(10..20))).unwrap(), Begin::Absent(_)));
}

#[test]
fn a_failed_write_leaves_absent_blocks_absent_and_others_dirty() {
    let table = table(CHUNK, CHUNK);
    drop(begin(&table, 0..2 * BLOCK));
    assert_eq!((table.valid_bytes(), table.unpushed_bytes()), (0, 0));
    pull(&table, 0..1);
    drop(begin(&table, 10..20));
    assert_eq!(table.unpushed_bytes(), BLOCK);
}

#[test]
fn what_is_written_during_its_push_is_pushed_again() {
    let table = table(CHUNK, CHUNK);
    write(&table, 0..BLOCK);
    let first = push(&table, 0).unwrap();
    write(&table, 0..BLOCK);
    assert!(push(&table, 0).is_none(), "one push at a time");
    first.done();
    assert_eq!(table.unpushed_bytes(), BLOCK);
    push(&table, 0).unwrap().done();
    assert_eq!(table.unpushed_bytes(), 0);
}

#[test]
fn what_is_being_written_when_its_push_begins_stays_dirty() {
    let table = table(CHUNK, CHUNK);
    pull(&table, 0..1);
    let writing = begin(&table, 0..BLOCK);
    push(&table, 0).unwrap().done();
    table.flushed().unwrap();
    assert_eq!(table.unpushed_bytes(), BLOCK);
    writing.commit().unwrap();
    push(&table, 0).unwrap().done();
    assert_eq!(table.unpushed_bytes(), 0);
}

#[test]
fn pushed_is_not_safe_until_flushed() {
    let table = table(CHUNK, CHUNK);
    write(&table, 0..2 * BLOCK);
    push(&table, 0).unwrap().done();
    assert!(table.has_unflushed());
    table.flush_failed();
    assert!(!table.has_unflushed());
    let again = push(&table, 0).unwrap();
    assert_eq!(again.blocks(), 0..2);
    drop(again);
    push(&table, 0).unwrap().done();
    table.flushed().unwrap();
    assert!(push(&table, 0).is_none());
}

#[test]
fn pushes_join_what_is_adjacent_and_respect_limit_and_unit() {
    let table = table(64 * CHUNK, CHUNK);
    write(&table, 3 * BLOCK..9 * BLOCK);
    let Some(NextPush::Push(some)) = table.push(0, 2 * BLOCK + 1, BLOCK) else { panic!() };
    assert_eq!(some.blocks(), 3..5);
    assert_eq!(push(&table, 0).unwrap().blocks(), 5..9);
    drop(some);
    let Some(NextPush::Absent(bytes)) = table.push(0, 1 << 20, 2 * BLOCK) else { panic!() };
    assert_eq!(bytes, 2 * BLOCK..4 * BLOCK);
    pull(&table, 0..3);
    let Some(NextPush::Push(whole)) = table.push(0, 1 << 20, 2 * BLOCK) else { panic!() };
    assert_eq!(whole.blocks(), 2..10);
    drop(whole);
    assert_eq!(table.unpushed_bytes(), 8 * BLOCK, "what went along may be torn at the remote and must go again");
}

#[test]
fn runs_say_what_is_present() {
    let table = table(5000 * BLOCK, CHUNK);
    assert_eq!(table.run_at(10), (false, 10..4096));
    assert_eq!(table.next_valid(0), None);
    write(&table, 4094 * BLOCK..4098 * BLOCK);
    assert_eq!(table.run_at(10), (false, 10..4094));
    assert_eq!(table.run_at(4095), (true, 4095..4096));
    assert_eq!(table.run_at(4096), (true, 4096..4098));
    assert_eq!(table.next_valid(0), Some(4094..4096));
    assert_eq!(table.next_valid(4096), Some(4096..4098));
    assert_eq!(table.run_at(4999), (false, 4999..5000));
    table.restore(0..5000, false);
    assert!(table.is_complete());
    assert_eq!(table.valid_bytes(), 5000 * BLOCK);
}

#[test]
fn a_huge_region_costs_nothing_until_it_is_touched() {
    let began = Instant::now();
    let table = table(1 << 60, 64 << 10);
    let far = (1 << 60) - 3 * BLOCK;
    write(&table, far..far + BLOCK);
    assert_eq!(push(&table, 0).unwrap().bytes(), far..far + BLOCK);
    assert_eq!(table.next_valid(0).unwrap().start * BLOCK, far);
    assert!(table.pull(0..u64::MAX, 16).is_some());
    assert_eq!(table.shards.iter().map(|shard| shard.lock().unwrap().segments.len()).sum::<usize>(), 2);
    // Far more than it takes, far less than a walk over 2⁴⁴ blocks.
    assert!(began.elapsed().as_secs() < 30);
}

#[test]
fn a_whole_tebibyte_keeps_no_bitmaps() {
    let table = table(1 << 40, 64 << 10);
    table.restore(0..1 << 28, false);
    let mixed = |bits: &super::super::Bits| matches!(bits, super::super::Bits::Mixed(..));
    for shard in &table.shards {
        for segment in shard.lock().unwrap().segments.values() {
            assert!(!mixed(&segment.valid) && !mixed(&segment.dirty) && !mixed(&segment.unflushed));
        }
    }
    assert!(size_of::<super::super::Segment>() * 65536 < 20 << 20);
}

/// Refuses to call anything dirty from a block on.
struct Refusing(u64);

impl Journal for Refusing {
    fn clean(&self, _blocks: Range<u64>) -> crate::Result<()> {
        Ok(())
    }

    fn dirty(&self, blocks: Range<u64>) -> crate::Result<()> {
        match blocks.end > self.0 {
            true => Err(Error::new(ErrorKind::Exhausted, Operation::Write, "the disk is full")),
            false => Ok(()),
        }
    }
}

#[test]
fn a_write_that_cannot_be_recorded_makes_nothing_present() {
    let geometry = Geometry::new(8192 * BLOCK, ChunkSize::new(CHUNK).unwrap()).unwrap();
    let table = Arc::new(Table::new(geometry, Some(Box::new(Refusing(4096)))).reporting_chunks());
    // Across the border of two segments, of which only the first can be recorded.
    let error = begin(&table, 4088 * BLOCK..4104 * BLOCK).commit().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert_eq!(
        (table.valid_bytes(), table.unpushed_bytes()),
        (0, 0),
        "of what is present somebody would have been told"
    );
    assert_eq!(write(&table, 4088 * BLOCK..4096 * BLOCK), [1022, 1023]);
}
