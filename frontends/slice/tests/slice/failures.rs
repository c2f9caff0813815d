//! Bytes that cannot be had: an error or a signal, never zeros, never for ever; and back again when they can.

use std::hint::black_box;
use std::time::Duration;

use r3map_core::{Backend, ErrorKind, Operation};
use r3map_slice::{Slice, SliceSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::fill;

use crate::common::{
    CHUNK, SEED, SIGBUS, assert_killed_by, assert_same, contents, filled, in_child, open, until, with_chunks,
};

fn broken(kind: ErrorKind) -> (std::sync::Arc<Faults>, Slice) {
    let remote = Faults::new(filled(8 * CHUNK));
    remote.add(Rule::on(Operation::Read).touching(2 * CHUNK as u64..3 * CHUNK as u64).fail(kind));
    let settings = SliceSettings { heal_after: Duration::from_millis(20), ..SliceSettings::direct() };
    (remote.clone(), open(remote, settings))
}

#[test]
fn touching_bytes_that_cannot_be_had_raises_sigbus() {
    let status = in_child("failures::touching_bytes_that_cannot_be_had_raises_sigbus", || {
        let (_remote, slice) = broken(ErrorKind::Unavailable);
        fill::check(&slice[..2 * CHUNK], 0, SEED).unwrap();
        fill::check(&slice[3 * CHUNK..], 3 * CHUNK as u64, SEED).unwrap();
        black_box(slice[2 * CHUNK + 5]);
    });
    assert_killed_by(SIGBUS, status);
}

#[test]
fn writing_to_bytes_that_cannot_be_had_raises_sigbus() {
    let status = in_child("failures::writing_to_bytes_that_cannot_be_had_raises_sigbus", || {
        let (_remote, mut slice) = broken(ErrorKind::Corrupt);
        black_box(slice.as_mut_slice().unwrap())[2 * CHUNK] = 1;
    });
    assert_killed_by(SIGBUS, status);
}

#[test]
fn a_remote_that_panics_raises_sigbus() {
    struct Panics;

    #[async_trait::async_trait]
    impl Backend for Panics {
        fn size(&self) -> u64 {
            CHUNK as u64
        }
        async fn read_at(&self, _: u64, _: &mut [u8]) -> r3map_core::Result<()> {
            panic!("for the test")
        }
        async fn write_at(&self, _: u64, _: &[u8]) -> r3map_core::Result<()> {
            Ok(())
        }
        async fn flush(&self) -> r3map_core::Result<()> {
            Ok(())
        }
    }

    let status = in_child("failures::a_remote_that_panics_raises_sigbus", || {
        let slice = open(std::sync::Arc::new(Panics), SliceSettings::direct());
        black_box(slice[0]);
    });
    assert_killed_by(SIGBUS, status);
}

#[test]
fn copies_answer_with_the_remotes_error_and_work_again_once_it_does() {
    let (remote, mut slice) = broken(ErrorKind::Unavailable);
    let mut buf = [0; 10];
    let at = 3 * CHUNK as u64 - 5;
    assert_eq!(slice.read_at(at, &mut buf).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(slice.write_at(at, &buf).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(slice.demand(at..at + 1).wait().unwrap_err().kind(), ErrorKind::Unavailable);
    remote.clear();
    slice.read_at(at, &mut buf).unwrap();
    fill::check(&buf, at, SEED).unwrap();
    slice.write_at(at, &[1; 10]).unwrap();
    slice.flush().wait().unwrap();
    assert_eq!(slice[3 * CHUNK - 5..3 * CHUNK + 5], [1; 10]);
}

/// The kernel reads for us, so that what would be a signal is EFAULT.
#[test]
fn a_page_that_failed_is_asked_for_anew() {
    use std::io::Write;

    let (remote, slice) = broken(ErrorKind::Unavailable);
    let mut file = tempfile::tempfile().unwrap();
    for _ in 0..3 {
        let error = file.write(&slice[2 * CHUNK..2 * CHUNK + 10]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(14), "{error}");
    }
    let before = remote.count(Operation::Read);
    until("asking anew", || {
        assert!(file.write(&slice[2 * CHUNK..2 * CHUNK + 10]).is_err());
        remote.count(Operation::Read) > before
    });
    remote.clear();
    until("healing", || file.write(&slice[2 * CHUNK..2 * CHUNK + 10]).is_ok());
    fill::check(&slice, 0, SEED).unwrap();
}

#[test]
fn a_page_that_failed_heals_as_soon_as_its_chunk_comes_for_another_reason() {
    use std::io::Write;

    let remote = Faults::new(filled(8 * CHUNK));
    remote.add(Rule::on(Operation::Read).times(1).fail(ErrorKind::Corrupt));
    let settings = SliceSettings { heal_after: Duration::from_secs(3600), ..SliceSettings::direct() };
    let slice = open(remote, settings);
    let mut file = tempfile::tempfile().unwrap();
    assert!(file.write(&slice[..10]).is_err());
    slice.demand(0..1).wait().unwrap();
    file.write_all(&slice[..10]).unwrap();
    fill::check(&slice, 0, SEED).unwrap();
}

/// If one fault waited for the next, this would never end: all of them are answered together.
#[test]
fn many_faults_wait_for_the_remote_at_once() {
    let threads = 64;
    let remote = Faults::new(filled(threads * CHUNK));
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Read).hold(&pause));
    let slice = open(remote.clone(), SliceSettings::direct());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let slice = &slice;
            scope.spawn(move || fill::check(&slice[thread * CHUNK..][..100], (thread * CHUNK) as u64, SEED).unwrap());
        }
        until("faults that wait", || pause.held() == threads);
        remote.clear();
        pause.release();
    });
    assert_eq!(remote.count(Operation::Read), threads);
}

#[test]
fn faults_on_one_chunk_share_one_read() {
    let remote = Faults::new(filled(4 * CHUNK));
    let pause = Pause::new();
    remote.add(Rule::on(Operation::Read).hold(&pause));
    let slice = open(remote.clone(), SliceSettings::direct());
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let slice = &slice;
            scope.spawn(move || fill::check(&slice[thread * 4000..][..100], thread as u64 * 4000, SEED).unwrap());
        }
        until("a fault that waits", || pause.held() == 1);
        std::thread::sleep(Duration::from_millis(20));
        pause.release();
    });
    assert_eq!(remote.count(Operation::Read), 1);
}

#[test]
fn a_push_that_fails_is_told_by_the_flush_and_nothing_is_lost() {
    let memory = filled(4 * CHUNK);
    let remote = Faults::new(memory.clone());
    let mut slice = open(remote.clone(), with_chunks(SliceSettings::direct(), 4096));
    slice.write_at(10, &[7; 10_000]).unwrap();
    remote.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    assert_eq!(slice.flush().wait().unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(slice.close().wait().unwrap_err().kind(), ErrorKind::Unavailable);
    remote.clear();
    slice.close().wait().unwrap();
    assert_same(&contents(&memory)[10..10_010], &[7; 10_000]);
}

#[test]
fn an_access_after_the_slice_was_given_up_raises_sigbus() {
    let status = in_child("failures::an_access_after_the_slice_was_given_up_raises_sigbus", || {
        let slice = open(filled(4 * CHUNK), SliceSettings::direct());
        fill::check(&slice[..10], 0, SEED).unwrap();
        slice.handle().abandon();
        fill::check(&slice[..10], 0, SEED).unwrap();
        black_box(slice[2 * CHUNK]);
    });
    assert_killed_by(SIGBUS, status);
}
