//! Closing, giving up, dropping: nothing is lost that was promised, nobody waits for ever.

use std::hint::black_box;
use std::sync::Arc;

use r3map_core::{Backend, ErrorKind, Operation};
use r3map_slice::SliceSettings;
use r3map_testkit::faults::{Faults, Rule};
use r3map_testkit::fill;

use crate::common::{CHUNK, SEED, SIGBUS, assert_killed_by, assert_same, contents, filled, in_child, open, until};

#[test]
fn close_stores_everything_and_refuses_writes_from_then_on() {
    let memory = filled(10 * CHUNK + 3);
    let mut slice = open(memory.clone(), SliceSettings::default());
    let mut model = contents(&memory);
    for at in (0..model.len()).step_by(5000) {
        model[at] = 200;
        slice.as_mut_slice().unwrap()[at] = 200;
    }
    slice.close().wait().unwrap();
    assert_same(&contents(&memory), &model);
    assert_eq!(slice.as_mut_slice().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(slice.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::Cancelled);
    // What is local can still be looked at.
    assert_eq!(slice[5000], 200);
    slice.close().wait().unwrap();
}

#[test]
fn after_a_close_what_was_not_local_raises_sigbus() {
    let status = in_child("ending::after_a_close_what_was_not_local_raises_sigbus", || {
        let mut slice = open(filled(4 * CHUNK), SliceSettings::direct());
        slice.close().wait().unwrap();
        black_box(slice[0]);
    });
    assert_killed_by(SIGBUS, status);
}

/// The remote never answers: whoever waits for it gets SIGBUS when the slice is given up.
#[test]
fn giving_up_ends_the_waiting_of_those_who_fault() {
    let status = in_child("ending::giving_up_ends_the_waiting_of_those_who_fault", || {
        let remote = Faults::new(filled(4 * CHUNK));
        remote.add(Rule::on(Operation::Read).hang());
        let slice = open(remote.clone(), SliceSettings::default());
        let handle = slice.handle();
        std::thread::scope(|scope| {
            scope.spawn(|| black_box(slice[2 * CHUNK]));
            until("a fault that waits", || remote.in_flight() > 0);
            handle.abandon();
        });
    });
    assert_killed_by(SIGBUS, status);
}

/// A handle can close a slice under those who read it.
#[test]
fn a_close_while_faults_wait_ends_their_waiting() {
    let status = in_child("ending::a_close_while_faults_wait_ends_their_waiting", || {
        let remote = Faults::new(filled(4 * CHUNK));
        remote.add(Rule::on(Operation::Read).hang());
        let slice = open(remote.clone(), SliceSettings::direct());
        let handle = slice.handle();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| black_box(slice[2 * CHUNK]));
            until("a fault that waits", || remote.in_flight() == 1);
            runtime.block_on(handle.close()).unwrap();
        });
    });
    assert_killed_by(SIGBUS, status);
}

#[test]
fn dropping_without_a_close_ends_at_once_and_leaves_the_remote_alone() {
    let memory = filled(4 * CHUNK);
    let remote = Faults::new(memory.clone());
    let mut slice = open(remote.clone(), SliceSettings::direct());
    slice.as_mut_slice().unwrap()[0] = slice[0].wrapping_add(1);
    remote.add(Rule::any().hang());
    let handle = slice.handle();
    drop(slice);
    fill::check(&contents(&memory), 0, SEED).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut buf = [0; 10];
    assert_eq!(runtime.block_on(handle.read_at(0, &mut buf)).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(runtime.block_on(handle.flush()).unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn dropping_while_it_is_pulled_gives_everything_back() {
    let memory = filled(400 * CHUNK);
    for _ in 0..20 {
        let slice = open(memory.clone(), SliceSettings::default());
        black_box(slice[100 * CHUNK]);
        drop(slice);
    }
    until("letting go of the remote", || Arc::strong_count(&memory) == 1);
}

#[test]
fn many_slices_live_side_by_side() {
    let memories: Vec<_> = (1..20).map(|index| filled(index * CHUNK)).collect();
    let slices: Vec<_> = memories.iter().map(|memory| open(memory.clone(), SliceSettings::default())).collect();
    for slice in &slices {
        fill::check(slice, 0, SEED).unwrap();
    }
}

#[tokio::test]
async fn it_can_be_dropped_in_asynchronous_code() {
    let mut slice = open(filled(4 * CHUNK), SliceSettings::default());
    slice.close().await.unwrap();
    drop(slice);
    drop(open(filled(4 * CHUNK), SliceSettings::default()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_slice_lives_until_its_last_handle() {
    let memory = filled(4 * CHUNK);
    let first = open(memory.clone(), SliceSettings::direct()).share();
    let second = first.clone();
    drop(first);
    second.write_at(5, &[9; 100]).await.unwrap();
    second.close().await.unwrap();
    drop(second);
    assert_eq!(contents(&memory)[5..105], [9; 100]);
}
