//! Memory that leaves for another host, and memory that arrives.

use std::ops::Range;
use std::sync::Arc;

use r3map_core::Backend;
use r3map_pipeline::{BlockSet, CachedParts, Writes};
use r3map_slice::{Prepared, ScopeWanted, SliceHandle, SliceParts, SliceSettings};
use r3map_testkit::fill;

use crate::common::{CHUNK, PAGE, SEED, assert_same, contents, filled, open, until};

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn taken(handle: &SliceHandle) -> Vec<Range<u64>> {
    wait(handle.take_written()).unwrap().runs().collect()
}

#[test]
fn what_is_written_while_tracked_is_told_once_whoever_else_collects() {
    for settings in [SliceSettings::direct(), SliceSettings::default(), crate::common::busy()] {
        let memory = filled(20 * CHUNK + 13);
        let mut slice = open(memory.clone(), settings);
        let handle = slice.handle();
        slice.as_mut_slice().unwrap()[5] = 1;
        wait(handle.track()).unwrap();
        assert_eq!(taken(&handle), [] as [Range<u64>; 0], "what was written before is not told");
        slice.as_mut_slice().unwrap()[3 * PAGE] = 1;
        slice.as_mut_slice().unwrap()[20 * CHUNK + 12] = 1;
        slice.flush().wait().unwrap();
        slice.as_mut_slice().unwrap()[7 * PAGE] = 1;
        assert_eq!(taken(&handle), [3..4, 7..8, 320..321]);
        assert_eq!(taken(&handle), [] as [Range<u64>; 0]);
        handle.untrack();
        slice.as_mut_slice().unwrap()[9 * PAGE] = 1;
        assert_eq!(taken(&handle), [] as [Range<u64>; 0]);
        slice.flush().wait().unwrap();
        assert_same(&contents(&memory), &slice);
        slice.close().wait().unwrap();
    }
}

/// Minor faults of this thread so far.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').nth(7).unwrap().parse().unwrap()
}

#[test]
fn a_store_costs_a_fault_while_it_is_tracked_and_none_before_and_after() {
    let mut arrived = SliceSettings::default();
    arrived.region.writes = Writes::Kept;
    for settings in [SliceSettings::direct(), arrived] {
        let (pages, few) = (20 * CHUNK / PAGE, 20);
        let mut slice = open(filled(pages * PAGE), settings);
        let handle = slice.handle();
        let mut store = || {
            let before = faults();
            slice.as_mut_slice().unwrap().chunks_mut(PAGE).for_each(|page| page[0] ^= 1);
            faults() - before
        };
        store();
        assert!(store() < few, "nothing is recorded");
        wait(handle.track()).unwrap();
        let tracked = store();
        assert!(tracked >= pages as u64, "each page is written for the first time: {tracked}");
        assert!(store() < few, "each page was noticed");
        assert_eq!(taken(&handle).as_slice(), std::slice::from_ref(&(0..pages as u64)));
        handle.untrack();
        store();
        assert!(store() < few, "nothing is recorded any more");
    }
}

#[test]
fn frozen_memory_can_be_read_and_told_of_for_the_last_time() {
    let mut slice = open(filled(4 * CHUNK), SliceSettings::default());
    let handle = slice.handle();
    wait(handle.track()).unwrap();
    slice.as_mut_slice().unwrap()[CHUNK] = 7;
    handle.freeze().unwrap();
    assert_eq!(taken(&handle).as_slice(), std::slice::from_ref(&(16..17)));
    let mut bytes = vec![0; 2];
    wait(handle.read_at(CHUNK as u64, &mut bytes)).unwrap();
    assert_eq!(bytes, [7, fill::bytes(CHUNK as u64 + 1, 1, SEED)[0]]);
    assert_eq!(slice.as_slice()[3 * CHUNK..], fill::bytes(3 * CHUNK as u64, CHUNK, SEED), "the rest still comes");
    handle.thaw().unwrap();
    slice.as_mut_slice().unwrap()[0] = 9;
    assert_eq!(taken(&handle).as_slice(), std::slice::from_ref(&(0..1)));
}

#[test]
fn prepared_memory_is_filled_emptied_and_shown() {
    let (size, remote) = (4 * CHUNK + 100, filled(4 * CHUNK + 100));
    let mut prepared = Prepared::new(size as u64, ScopeWanted::default()).unwrap();
    let local = prepared.local();
    wait(local.install(0, &vec![1; 2 * CHUNK])).unwrap();
    wait(local.install(4 * CHUNK as u64, &[1; 100])).unwrap();
    prepared.forget(0..PAGE as u64).unwrap();
    prepared.forget(4 * CHUNK as u64..size as u64).unwrap();
    assert!(prepared.forget(1..2).is_err());
    let mut present = BlockSet::default();
    present.insert(1..32);
    let mut settings = SliceSettings::default();
    settings.region.writes = Writes::Kept;
    let parts = SliceParts { region: CachedParts { present, ..CachedParts::default() }, runtime: None };
    drop(local);
    let mut slice = prepared.open(remote.clone() as Arc<dyn Backend>, settings, parts).unwrap();
    let mut expected = contents(&remote);
    expected[PAGE..2 * CHUNK].fill(1);
    assert_same(&slice, &expected);
    until("pulling", || slice.progress().borrow().pulled);
    slice.as_mut_slice().unwrap()[0] = 99;
    slice.flush().wait().unwrap();
    slice.close().wait().unwrap();
    assert_eq!(contents(&remote)[0], fill::bytes(0, 1, SEED)[0], "nothing is written back");
}
