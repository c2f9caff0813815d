//! The promises of `Mapping` and `Pager` to their users.

use std::io::ErrorKind;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{PAGE, Server, byte, bytes, in_child, install, present, tracked, written};
use r3map_sys::{Event, Install, Mapping, PAGE_SIZE, Protection, ScopeWanted, Woken};

#[test]
fn any_length_is_filled_on_demand_byte_for_byte() {
    for len in [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 7, 300 * PAGE + 1] {
        for protection in [Protection::ReadOnly, Protection::Tracked] {
            let mapping = Mapping::new(len as u64, protection, ScopeWanted::Widest).unwrap();
            let server = Server::start(mapping.pager());
            assert_eq!(mapping.len(), len);
            assert_eq!(mapping.as_slice(), bytes(0, len));
            assert_eq!(server.stop(), len.div_ceil(PAGE));
        }
    }
}

#[test]
fn ranges_that_are_not_pages_are_refused() {
    let mapping = Mapping::new(2 * PAGE_SIZE + 9, Protection::Tracked, ScopeWanted::Widest).unwrap();
    let pager = mapping.pager();
    let refused = |result: std::io::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
    for (offset, len) in [(1, PAGE), (0, 1), (0, PAGE + 1), (0, 0), (0, 3 * PAGE), (3 * PAGE, PAGE), (PAGE, PAGE)] {
        let is_pages = (offset, len) == (PAGE, PAGE);
        let result = pager.install(offset as u64, &vec![1; len], Install::Clean);
        if is_pages { result.unwrap() } else { refused(result) }
    }
    refused(pager.install(u64::MAX - 4095, &[1; PAGE], Install::Clean));
    refused(pager.install_zeroes(PAGE_SIZE, PAGE_SIZE + 1));
    refused(pager.poison(3 * PAGE_SIZE));
    refused(pager.poison(17));
    refused(pager.collect(0..100, &mut |_| {}));
    refused(pager.read(2 * PAGE_SIZE, &mut [0; 10]));
    refused(pager.read(u64::MAX, &mut [0; 10]));
    for len in [0, u64::MAX, u64::MAX - 1] {
        refused(Mapping::new(len, Protection::Tracked, ScopeWanted::Widest).map(drop));
    }
    let huge = Mapping::new(1 << 60, Protection::Tracked, ScopeWanted::Widest).unwrap_err();
    assert_eq!(huge.kind(), ErrorKind::OutOfMemory, "{huge}");
}

#[test]
fn the_last_page_may_end_early() {
    let len = PAGE + 9;
    let mut mapping = Mapping::new(len as u64, Protection::Tracked, ScopeWanted::Widest).unwrap();
    let pager = mapping.pager().clone();
    pager.install(PAGE_SIZE, &bytes(PAGE, 9), Install::Clean).unwrap();
    pager.install_zeroes(0, PAGE_SIZE).unwrap();
    mapping.as_mut_slice().unwrap()[len - 1] = 0;
    let mut found = Vec::new();
    pager.collect(0..len as u64, &mut |run| found.push(run)).unwrap();
    assert_eq!(found, std::slice::from_ref(&(PAGE as u64..len as u64)));
    let mut tail = [9; 10];
    pager.read(PAGE as u64 - 1, &mut tail).unwrap();
    assert_eq!((tail[0], &tail[1..9], tail[9]), (0, &bytes(PAGE, 8)[..], 0));
}

#[test]
fn scattered_writes_are_all_found_beyond_one_batch() {
    let pages = 4096;
    let mut mapping = tracked(pages);
    let pager = mapping.pager().clone();
    install(&pager, 0, pages);
    let view = mapping.as_mut_slice().unwrap();
    let expected: Vec<usize> = (0..pages).step_by(2).collect();
    expected.iter().for_each(|page| view[page * PAGE] = 0);
    assert_eq!(written(&pager), expected);
    assert_eq!(written(&pager), [0; 0]);
}

#[test]
fn pages_that_are_there_cannot_be_overwritten_while_there_are_views() {
    let mapping = tracked(2);
    install(mapping.pager(), 0, 1);
    assert_eq!(mapping.pager().write(0, &[1]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(mapping.pager().write(PAGE_SIZE, &[1; PAGE]).unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert_eq!(mapping.as_slice()[..PAGE], bytes(0, PAGE));
}

#[test]
fn once_shared_any_range_can_be_written_and_read() {
    let len = 8 * PAGE + 100;
    let mapping = Mapping::new(len as u64, Protection::Tracked, ScopeWanted::Widest).unwrap();
    let mut model = bytes(0, len);
    let server = Server::start(mapping.pager());
    let pager = mapping.share();
    install(&pager, 1, 1);
    install(&pager, 4, 2);
    pager.poison(6 * PAGE_SIZE).unwrap();
    // Over a page that is there in part, missing ones, ones that are there, a poisoned one, and the short tail.
    for (start, end) in [(PAGE + 5, PAGE + 6), (PAGE + 10, 5 * PAGE + 3), (6 * PAGE, 7 * PAGE), (8 * PAGE, len)] {
        let new: Vec<u8> = (start..end).map(|at| byte(at * 7 + 3)).collect();
        pager.write(start as u64, &new).unwrap();
        model[start..end].copy_from_slice(&new);
    }
    assert_eq!(present(&pager), [1, 2, 3, 4, 5, 6, 8]);
    pager.install(0, &bytes(0, PAGE), Install::Clean).unwrap();
    pager.install(7 * PAGE_SIZE, &bytes(7 * PAGE, PAGE), Install::Clean).unwrap();
    let mut all = vec![0; len];
    pager.read(0, &mut all).unwrap();
    assert!(all == model);
    let mut found = Vec::new();
    pager.collect(0..len as u64, &mut |run| found.push(run)).unwrap();
    let page = |page: u64| page * PAGE_SIZE;
    assert_eq!(found, [page(1)..page(7), page(8)..len as u64]);
    assert_eq!(server.stop(), 0);
}

#[test]
fn waiting_ends_by_the_event() {
    let mapping = tracked(1);
    let stop = Event::new().unwrap();
    let mut faults = Vec::new();
    assert!(!stop.is_raised());
    stop.raise();
    stop.raise();
    assert!(stop.is_raised());
    assert_eq!(mapping.pager().wait(&stop, &mut faults).unwrap(), Woken::Stopped);
    assert_eq!(mapping.pager().wait(&stop, &mut faults).unwrap(), Woken::Stopped);
}

#[test]
fn a_fault_says_where_and_whether_it_writes() {
    let mut mapping = tracked(4);
    let pager = mapping.pager().clone();
    let stop = Event::new().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (first, second) = mapping.as_mut_slice().unwrap().split_at_mut(2 * PAGE);
        scope.spawn(|| assert_eq!(std::hint::black_box(&*first)[PAGE + 77], byte(PAGE + 77)));
        scope.spawn(|| std::hint::black_box(second)[PAGE + 9] = 1);
        let (mut seen, mut faults) = (Vec::new(), Vec::new());
        while seen.len() < 2 {
            pager.wait(&stop, &mut faults).unwrap();
            seen.extend(faults.iter().map(|fault| (fault.offset, fault.write)));
        }
        pager.take(&mut faults).unwrap();
        assert_eq!(faults, [], "each is told once, and none is waited for");
        seen.sort_unstable();
        assert_eq!(seen, [(PAGE_SIZE, false), (3 * PAGE_SIZE, true)]);
        install(&pager, 0, 4);
        done.store(true, Ordering::Relaxed);
    });
    assert!(done.into_inner());
    assert_eq!(written(&pager), [3]);
    assert_eq!(mapping.as_slice()[3 * PAGE + 9], 1);
}

#[test]
fn many_threads_fault_at_once_and_all_are_served() {
    let pages = 512;
    let mapping = tracked(pages);
    let server = Server::start(mapping.pager());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let view = mapping.as_slice();
            scope.spawn(move || {
                for step in 0..pages {
                    let at = (step * 37 + thread * 61) % pages * PAGE + thread * 11;
                    assert_eq!(view[at], byte(at));
                }
            });
        }
    });
    assert!(server.stop() >= pages);
}

/// A writer hammers the memory while another thread collects and copies out: what was copied last is what is there.
#[test]
fn no_write_is_lost_between_collecting_and_copying() {
    let pages = 32;
    let mut mapping = tracked(pages);
    let pager = mapping.pager().clone();
    install(&pager, 0, pages);
    let mut copy = bytes(0, pages * PAGE);
    let stop = AtomicBool::new(false);
    let sync = |copy: &mut Vec<u8>| {
        let mut runs = Vec::new();
        pager.collect(0..pager.len(), &mut |run| runs.push(run)).unwrap();
        for run in runs {
            pager.read(run.start, &mut copy[run.start as usize..run.end as usize]).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let view = mapping.as_mut_slice().unwrap();
        let stop = &stop;
        scope.spawn(move || {
            let mut random = 12345usize;
            for _ in 0..200_000 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                view[(random >> 33) % (pages * PAGE)] = (random >> 20) as u8;
            }
            stop.store(true, Ordering::Release);
        });
        while !stop.load(Ordering::Acquire) {
            sync(&mut copy);
        }
    });
    sync(&mut copy);
    assert!(copy == mapping.as_slice());
    assert_eq!(written(mapping.pager()), [0; 0]);
}

#[test]
fn discarded_pages_are_filled_anew() {
    let mut mapping = tracked(4);
    let pager = mapping.pager().clone();
    install(&pager, 0, 3);
    pager.poison(3 * PAGE_SIZE).unwrap();
    mapping.discard(PAGE_SIZE, PAGE_SIZE).unwrap();
    mapping.discard(3 * PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(present(&pager), [0, 2]);
    pager.install(PAGE_SIZE, &bytes(7, PAGE), Install::Clean).unwrap();
    pager.install(3 * PAGE_SIZE, &bytes(9, PAGE), Install::Clean).unwrap();
    assert_eq!(written(&pager), [0; 0], "filled clean");
    let view = mapping.as_mut_slice().unwrap();
    assert_eq!((&view[PAGE..2 * PAGE], &view[3 * PAGE..]), (&bytes(7, PAGE)[..], &bytes(9, PAGE)[..]));
    view[PAGE] = 0;
    assert_eq!(written(&pager), [1]);
    assert_eq!(mapping.discard(1, PAGE_SIZE).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(mapping.discard(3 * PAGE_SIZE, 2 * PAGE_SIZE).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn what_was_written_before_it_was_frozen_is_found_and_so_is_what_is_written_after() {
    let mut mapping = tracked(4);
    let pager = mapping.pager().clone();
    install(&pager, 0, 3);
    mapping.as_mut_slice().unwrap()[PAGE] = 0;
    pager.freeze().unwrap();
    install(&pager, 3, 1);
    assert_eq!(mapping.as_slice()[2 * PAGE..], bytes(2 * PAGE, 2 * PAGE), "it can be read and filled");
    assert_eq!(written(&pager), [1]);
    assert_eq!(written(&pager), [0; 0]);
    pager.thaw().unwrap();
    mapping.as_mut_slice().unwrap()[2 * PAGE] = 0;
    mapping.as_mut_slice().unwrap()[3 * PAGE] = 0;
    assert_eq!(written(&pager), [2, 3]);
}

#[test]
fn writing_to_frozen_memory_is_a_segmentation_fault() {
    let test = "mapping::writing_to_frozen_memory_is_a_segmentation_fault";
    let Some(status) = in_child(test, &[]) else {
        let mut mapping = tracked(1);
        install(&mapping.pager().clone(), 0, 1);
        mapping.pager().freeze().unwrap();
        std::hint::black_box(mapping.as_mut_slice().unwrap())[0] = 1;
        std::process::exit(0);
    };
    assert_eq!(status.signal(), Some(11), "{status}");
}
