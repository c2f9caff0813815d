//! Every byte, of every size, however it is read.

use std::sync::Arc;

use r3map_core::pull::Priority;
use r3map_core::{Backend, ErrorKind, Operation};
use r3map_local::Memory;
use r3map_pipeline::CachedParts;
use r3map_slice::{FaultScope, ScopeWanted, Slice, SliceParts, SliceSettings};
use r3map_testkit::faults::{Faults, Link};
use r3map_testkit::random::Random;
use r3map_testkit::{conformance, crash, fill};

use crate::common::{CHUNK, LIMIT, PAGE, SEED, assert_same, busy, contents, filled, open, until, with_chunks};

#[test]
fn every_byte_of_many_sizes() {
    for size in [1, 2, PAGE - 1, PAGE, PAGE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 17, 3_000_001] {
        for settings in [SliceSettings::direct(), SliceSettings::default(), SliceSettings::default().read_only()] {
            let slice = open(filled(size), settings);
            assert_eq!(slice.len(), size);
            fill::check(&slice, 0, SEED).unwrap();
        }
    }
}

#[test]
fn every_byte_of_256_mib_and_one() {
    let size = (256 << 20) + 1;
    let slice = open(filled(size), SliceSettings::default());
    fill::check(&slice[size / 3..size / 3 + CHUNK], (size / 3) as u64, SEED).unwrap();
    slice.pulled().wait().unwrap();
    fill::check(&slice, 0, SEED).unwrap();
    assert_eq!(slice.progress().borrow().valid_bytes, size as u64);
}

#[test]
fn every_chunk_size() {
    for chunk in [PAGE, 8 * PAGE, 1 << 20, 64 << 20] {
        let slice = open(filled(3_000_001), with_chunks(SliceSettings::direct(), chunk));
        fill::check(&slice, 0, SEED).unwrap();
    }
}

#[test]
fn a_remote_that_lends_nothing_and_answers_late() {
    let remote = Link::new(filled(40 * CHUNK + 5), std::time::Duration::from_millis(2), None);
    for settings in [SliceSettings::direct(), SliceSettings::default()] {
        let slice = open(remote.clone(), settings);
        fill::check(&slice, 0, SEED).unwrap();
    }
}

#[test]
fn many_threads_read_at_random_while_it_is_pulled() {
    let slice = open(Link::new(filled(200 * CHUNK + 1), std::time::Duration::from_millis(1), None), busy());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let slice = &slice;
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for _ in 0..500 {
                    let at = random.below(slice.len() as u64 - 100) as usize;
                    fill::check(&slice[at..at + 100], at as u64, SEED).unwrap();
                }
            });
        }
    });
    slice.pulled().wait().unwrap();
    fill::check(&slice, 0, SEED).unwrap();
}

#[test]
fn a_region_of_a_tebibyte_is_mapped_and_only_what_is_touched_is_read() {
    let remote = Faults::new(Arc::new(Memory::new(1 << 40).unwrap()));
    let slice = open(remote.clone(), SliceSettings::direct());
    assert_eq!(slice[1 << 39], 0);
    assert_eq!(remote.bytes(Operation::Read), CHUNK as u64);
}

#[test]
fn zeros_are_zeros_and_clean() {
    let memory = Arc::new(Memory::new(64 << 20).unwrap());
    memory.write_now(20 << 20, &[5; 100]).unwrap();
    let remote = Faults::new(memory.clone());
    let mut slice = open(remote.clone(), SliceSettings::default());
    slice.pulled().wait().unwrap();
    slice.flush().wait().unwrap();
    assert_same(&slice, &contents(&memory));
    slice.flush().wait().unwrap();
    assert_eq!(remote.count(Operation::Write) + remote.count(Operation::WriteZeroes), 0);
    // And what is written to them is found, even if it is zeros over zeros.
    slice.as_mut_slice().unwrap()[40 << 20] = 9;
    slice.as_mut_slice().unwrap()[50 << 20] = 0;
    slice.flush().wait().unwrap();
    assert_same(&slice, &contents(&memory));
    assert_eq!(remote.bytes(Operation::Write) + remote.bytes(Operation::WriteZeroes), 2 * PAGE as u64);
}

#[test]
fn copies_out_and_in_answer_with_errors_past_the_end() {
    let mut slice = open(filled(CHUNK + 10), SliceSettings::direct());
    let mut buf = [0; 20];
    slice.read_at(CHUNK as u64 - 10, &mut buf).unwrap();
    fill::check(&buf, CHUNK as u64 - 10, SEED).unwrap();
    for offset in [CHUNK as u64 - 9, u64::MAX, u64::MAX - 19] {
        assert_eq!(slice.read_at(offset, &mut buf).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(slice.write_at(offset, &buf).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    slice.read_at(CHUNK as u64 + 10, &mut []).unwrap();
    slice.write_at(CHUNK as u64 - 1, &[1, 2, 3]).unwrap();
    assert_eq!(slice[CHUNK - 1..CHUNK + 2], [1, 2, 3]);
}

#[test]
fn a_read_only_slice_cannot_be_written_to() {
    let mut slice = open(filled(100), SliceSettings::direct().read_only());
    assert_eq!(slice.as_mut_slice().unwrap_err().kind(), ErrorKind::Denied);
    assert_eq!(slice.write_at(0, &[1]).unwrap_err().kind(), ErrorKind::Denied);
    slice.flush().wait().unwrap();
    slice.close().wait().unwrap();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let refused = |settings: SliceSettings, parts| {
        let error = Slice::open(filled(100), settings, parts).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    };
    refused(SliceSettings { heal_after: std::time::Duration::ZERO, ..SliceSettings::default() }, SliceParts::default());
    let mut settings = SliceSettings::default();
    settings.region.push.interval = std::time::Duration::ZERO;
    refused(settings, SliceParts::default());
    let huge = Slice::open(Arc::new(Memory::new(1 << 60).unwrap()), SliceSettings::direct(), SliceParts::default());
    assert_eq!(huge.unwrap_err().kind(), ErrorKind::Exhausted);
}

#[test]
fn what_is_wanted_first_comes_first() {
    let remote = Faults::new(Link::new(filled(64 * CHUNK), std::time::Duration::from_millis(1), None));
    let priority = Priority::List([60, 3].into());
    let region = CachedParts { priority, ..CachedParts::default() };
    let parts = SliceParts { region, ..SliceParts::default() };
    let slice = Slice::open(remote.clone(), SliceSettings::default(), parts).unwrap();
    slice.pulled().wait().unwrap();
    let first = remote.calls().into_iter().find(|call| call.operation == Operation::Read).unwrap();
    assert_eq!(first.ranges[0].start, 60 * CHUNK as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_works_beside_asynchronous_code() {
    let memory = filled(20 * CHUNK);
    let mut slice = open(memory.clone(), SliceSettings::default());
    slice.pulled().await.unwrap();
    let mut slice = tokio::task::spawn_blocking(move || {
        slice.as_mut_slice().unwrap()[5] = 77;
        slice
    })
    .await
    .unwrap();
    slice.flush().await.unwrap();
    assert_eq!(contents(&memory)[5], 77);
    slice.close().await.unwrap();
    drop(slice);
}

#[test]
fn it_works_on_a_runtime_that_is_given() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let parts = SliceParts { runtime: Some(runtime.handle().clone()), ..SliceParts::default() };
    let mut slice = Slice::open(filled(9 * CHUNK), SliceSettings::default(), parts).unwrap();
    fill::check(&slice, 0, SEED).unwrap();
    slice.close().wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_slice_keeps_the_contract_of_a_backend() {
    for settings in [SliceSettings::direct(), SliceSettings::default(), busy()] {
        conformance::filled(
            async || {
                let remote = Arc::new(r3map_testkit::store::Store::new(300_001).filled(SEED));
                Arc::new(open(remote, settings.clone()).share()) as Arc<dyn Backend>
            },
            SEED,
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handle_keeps_the_contract_of_a_backend_that_is_read_only() {
    let slices = std::sync::Mutex::new(Vec::new());
    conformance::filled(
        async || {
            let slice = open(filled(200_003), SliceSettings::direct());
            let handle = Arc::new(slice.handle());
            slices.lock().unwrap().push(slice);
            handle as Arc<dyn Backend>
        },
        SEED,
    )
    .await;
}

/// Root is told to be nobody, which `setpriv` does.
#[test]
fn without_privilege_it_works_and_says_what_that_excludes() {
    if let Some(_argument) = crash::role("nobody") {
        let slice = open(filled(10 * CHUNK + 1), SliceSettings::default());
        let all_allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap().trim() == "1";
        if !all_allowed {
            assert_eq!(slice.scope(), FaultScope::UserOnly);
            let settings = SliceSettings { scope: ScopeWanted::UserAndKernel, ..SliceSettings::default() };
            let refused = Slice::open(filled(1), settings, SliceParts::default()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Denied);
            for advice in ["vm.unprivileged_userfaultfd", "/dev/userfaultfd", "CAP_SYS_PTRACE"] {
                assert!(refused.to_string().contains(advice), "{refused}");
            }
        }
        fill::check(&slice, 0, SEED).unwrap();
        slice.flush().wait().unwrap();
        std::process::exit(0);
    }
    let mut nobody = std::process::Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    nobody.arg(std::env::current_exe().unwrap());
    nobody.args(["bytes::without_privilege_it_works_and_says_what_that_excludes", "--exact", "--nocapture"]);
    nobody.env("R3MAP_CRASH_ROLE", "nobody").env("R3MAP_CRASH_ARGUMENT", "");
    let status = r3map_testkit::process::Process::start(&mut nobody).wait(LIMIT);
    assert!(status.success(), "{status}");
}

#[test]
fn progress_is_told() {
    let slice = open(filled(30 * CHUNK), SliceSettings::default());
    let progress = slice.progress();
    until("being pulled", || progress.borrow().pulled);
    assert_eq!(progress.borrow().valid_bytes, 30 * CHUNK as u64);
    assert_eq!(slice.geometry().chunk_count(), 30);
}
