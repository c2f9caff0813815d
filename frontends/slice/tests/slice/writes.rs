//! No write is ever lost, whatever happens beside it.

use std::io::{Read, Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use r3map_core::{Backend, Operation};
use r3map_slice::SliceSettings;
use r3map_testkit::faults::{Faults, Link, Pause, Rule};
use r3map_testkit::fill;
use r3map_testkit::random::Random;

use crate::common::{CHUNK, PAGE, SEED, assert_same, busy, contents, filled, open, until};

/// Random writes from several threads, each in its own part, against a model; with whatever else goes on.
fn hammer(parts: Vec<&mut [u8]>, models: Vec<&mut [u8]>, writes: usize) {
    std::thread::scope(|scope| {
        for (index, (part, model)) in parts.into_iter().zip(models).enumerate() {
            scope.spawn(move || {
                let mut random = Random::new(index as u64);
                for _ in 0..writes {
                    let at = random.below(part.len() as u64) as usize;
                    let len = (random.below(200) as usize).min(part.len() - at);
                    match random.chance(0.5) {
                        true => assert!(part[at..at + len] == model[at..at + len], "at {at} of part {index}"),
                        false => {
                            part[at..at + len].fill(random.next_u64() as u8);
                            model[at..at + len].copy_from_slice(&part[at..at + len]);
                        }
                    }
                }
            });
        }
    });
}

fn hammer_all(remote: Arc<dyn Backend>, settings: SliceSettings, memory: &r3map_local::Memory, writes: usize) {
    let mut model = contents(memory);
    let mut slice = open(remote, settings);
    let part = model.len().div_ceil(6);
    for _ in 0..3 {
        let parts = slice.as_mut_slice().unwrap().chunks_mut(part).collect();
        hammer(parts, model.chunks_mut(part).collect(), writes);
        slice.flush().wait().unwrap();
        assert_same(&contents(memory), &model);
        assert_same(&slice, &model);
    }
    slice.close().wait().unwrap();
    assert_same(&contents(memory), &model);
}

#[test]
fn random_reads_and_writes_from_many_threads() {
    for settings in [SliceSettings::direct(), SliceSettings::default(), busy()] {
        let memory = filled(100 * CHUNK + 13);
        hammer_all(memory.clone(), settings, &memory, 2000);
    }
}

#[test]
fn writing_while_it_is_pulled_and_pushed_over_a_slow_link() {
    let memory = filled(60 * CHUNK + 1);
    let remote = Link::new(memory.clone(), Duration::from_millis(2), Some(100 << 20));
    hammer_all(remote, busy(), &memory, 500);
}

/// The background pull of a chunk is on its way with old bytes when the application writes to that chunk.
#[test]
fn a_pull_that_comes_late_does_not_undo_a_write() {
    let memory = filled(8 * CHUNK);
    let remote = Faults::new(memory.clone());
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Read).hold_after(&pause));
    let mut slice = open(remote.clone(), SliceSettings::default());
    until("pulling", || pause.held() > 0);
    std::thread::scope(|scope| {
        let bytes = slice.as_mut_slice().unwrap();
        let writer = scope.spawn(move || bytes[2 * CHUNK + 5] = 0xaa);
        until("a fault that waits", || remote.in_flight() > 0);
        remote.clear();
        pause.release();
        writer.join().unwrap();
    });
    slice.pulled().wait().unwrap();
    slice.flush().wait().unwrap();
    let mut model = fill::bytes(0, 8 * CHUNK, SEED);
    model[2 * CHUNK + 5] = 0xaa;
    assert_same(&slice, &model);
    assert_same(&contents(&memory), &model);
}

/// A page is written again after the push of it has read it, and before the remote has taken it.
#[test]
fn a_write_during_the_push_of_the_same_page_is_pushed_again() {
    let memory = filled(4 * CHUNK);
    let remote = Faults::new(memory.clone());
    let mut slice = open(remote.clone(), SliceSettings::direct());
    for value in 1..20 {
        slice.as_mut_slice().unwrap()[CHUNK..CHUNK + 100].fill(value);
        let pause = Pause::new();
        remote.add(Rule::on(Operation::Write).times(1).hold(&pause));
        let flush = slice.flush();
        until("pushing", || pause.held() == 1);
        slice.as_mut_slice().unwrap()[CHUNK + 50] = 100 + value;
        remote.clear();
        pause.release();
        flush.wait().unwrap();
        slice.flush().wait().unwrap();
        assert_same(&contents(&memory), &slice);
        assert_eq!(contents(&memory)[CHUNK + 50], 100 + value);
    }
}

/// Two threads never stop writing while flushes and background pushes run; when they stop, one flush makes both equal.
#[test]
fn hammering_while_flushes_run() {
    let memory = filled(16 * CHUNK);
    let mut slice = open(memory.clone(), busy());
    let handle = slice.handle();
    let stop = AtomicBool::new(false);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    std::thread::scope(|scope| {
        for (index, part) in slice.as_mut_slice().unwrap().chunks_mut(8 * CHUNK).enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                let mut random = Random::new(index as u64);
                while !stop.load(Ordering::Relaxed) {
                    part[random.below(8 * CHUNK as u64) as usize] = random.next_u64() as u8;
                }
            });
        }
        for _ in 0..50 {
            runtime.block_on(handle.flush()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    slice.flush().wait().unwrap();
    assert_same(&contents(&memory), &slice);
}

#[test]
fn what_the_kernel_writes_for_the_program_is_pushed() {
    let memory = filled(8 * CHUNK);
    let mut slice = open(memory.clone(), SliceSettings::direct());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&fill::bytes(0, 3 * PAGE, 99)).unwrap();
    // Into pages that are missing, and into pages that are there and clean.
    for start in [CHUNK - PAGE / 2, CHUNK + PAGE] {
        file.rewind().unwrap();
        file.read_exact(&mut slice.as_mut_slice().unwrap()[start..start + 3 * PAGE]).unwrap();
        slice.flush().wait().unwrap();
        fill::check(&slice[start..start + 3 * PAGE], 0, 99).unwrap();
        assert_same(&contents(&memory), &slice);
    }
    let (first, second) = slice.as_mut_slice().unwrap().split_at_mut(5 * CHUNK);
    let mut two = [&mut first[3 * CHUNK..3 * CHUNK + 7], &mut second[..PAGE]].map(std::io::IoSliceMut::new);
    file.rewind().unwrap();
    assert_eq!(file.read_vectored(&mut two).unwrap(), PAGE + 7);
    slice.flush().wait().unwrap();
    fill::check(&slice[5 * CHUNK..5 * CHUNK + PAGE], 7, 99).unwrap();
    assert_same(&contents(&memory), &slice);
}

#[test]
fn only_what_was_written_is_pushed() {
    let remote = Faults::new(filled(40 * CHUNK));
    let mut slice = open(remote.clone(), SliceSettings::default());
    slice.pulled().wait().unwrap();
    slice.flush().wait().unwrap();
    assert_eq!(remote.bytes(Operation::Write), 0);
    for page in [3, 4, 77, 639] {
        slice.as_mut_slice().unwrap()[page * PAGE + 1] = 1;
    }
    slice.flush().wait().unwrap();
    assert_eq!(remote.bytes(Operation::Write), 4 * PAGE as u64);
    slice.flush().wait().unwrap();
    assert_eq!(remote.bytes(Operation::Write), 4 * PAGE as u64);
}

#[test]
fn writes_are_pushed_without_being_asked() {
    let memory = filled(4 * CHUNK);
    let mut slice = open(memory.clone(), busy());
    slice.as_mut_slice().unwrap()[100] = 42;
    until("pushing", || contents(&memory)[100] == 42);
}
