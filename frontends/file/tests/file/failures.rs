//! Every way for the backend to fail is an error for the program, never zeros and never a hang; and what is slow holds
//! up nobody else.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ErrorKind, Operation, Result};
use r3map_file::{Caching, FileSettings, OpenedFile};
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::faults::{Link, Pause, Rule};
use r3map_testkit::fill;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::lifecycle::mounts;
use crate::support::{World, content, errno, faulty, filled, need_fuse, open, open_direct};

const SIZE: u64 = 1 << 20;

#[test]
fn a_read_error_is_an_error_and_heals() {
    need_fuse!();
    let world = World::new();
    for kind in [ErrorKind::Unavailable, ErrorKind::Corrupt, ErrorKind::Internal] {
        let faults = faulty(SIZE, 1);
        let mount = world.mount(faults.clone(), FileSettings::default());
        let file = open(mount.path());
        let mapping = FileMapping::new(&file, 1 << 20, Sharing::Shared, false).unwrap();
        faults.add(Rule::on(Operation::Read).touching(500_000..500_001).fail(kind));
        let mut seen = vec![0; 4096];
        assert_eq!(errno(file.read_exact_at(&mut seen, 500_000)), Errno::IO);
        assert_eq!(errno(mapping.read(500_000, &mut seen)), Errno::FAULT, "a SIGBUS for a plain access");
        assert_eq!(errno(open_direct(mount.path()).read_exact_at(&mut seen, 500_000)), Errno::IO);
        file.read_exact_at(&mut seen, 0).unwrap();
        fill::check(&seen, 0, 1).unwrap();
        faults.clear();
        file.read_exact_at(&mut seen, 500_000).unwrap();
        fill::check(&seen, 500_000, 1).unwrap();
        mapping.read(500_000, &mut seen).unwrap();
        fill::check(&seen, 500_000, 1).unwrap();
    }
}

#[test]
fn a_short_read_is_an_error() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    faults.add(Rule::on(Operation::Read).short(100));
    assert_eq!(errno(fs::read(mount.path())), Errno::IO);
    faults.clear();
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
}

#[test]
fn kinds_of_errors_have_their_numbers() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    let file = open(mount.path());
    for (kind, number) in [
        (ErrorKind::Denied, Errno::PERM),
        (ErrorKind::Exhausted, Errno::NOSPC),
        (ErrorKind::Conflict, Errno::BUSY),
        (ErrorKind::Unavailable, Errno::IO),
    ] {
        faults.add(Rule::on(Operation::Write).fail(kind));
        faults.add(Rule::on(Operation::Trim).fail(kind));
        faults.add(Rule::on(Operation::Flush).fail(kind));
        assert_eq!(errno(file.write_all_at(b"x", 7)), number);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(&file, punch, 0, 4096), Err(number));
        assert_eq!(errno(file.sync_all()), number);
        faults.clear();
    }
    file.write_all_at(&fill::bytes(7, 1, 1), 7).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_failed_flush_fails_each_fsync_until_it_is_done() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    let file = open(mount.path());
    faults.add(Rule::on(Operation::Flush).times(2).fail(ErrorKind::Unavailable));
    assert_eq!(errno(file.sync_all()), Errno::IO);
    assert_eq!(errno(file.sync_data()), Errno::IO);
    file.sync_all().unwrap();
}

/// What a mapping wrote is handed over later; if that fails, `fsync` and `msync` say so.
#[test]
fn a_failed_write_of_a_mapping_is_reported() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    let file = open(mount.path());
    let mapping = FileMapping::new(&file, 1 << 20, Sharing::Shared, true).unwrap();
    mapping.write(4096, b"lost?").unwrap();
    faults.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    assert_eq!(errno(mapping.sync()), Errno::IO);
    faults.clear();
    mapping.write(4096, b"kept!").unwrap();
    mapping.sync().unwrap();
    let mut seen = [0; 5];
    open_direct(mount.path()).read_exact_at(&mut seen, 4096).unwrap();
    assert_eq!(&seen, b"kept!");
}

struct Panics;

#[async_trait]
impl Backend for Panics {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        assert_ne!(offset, 0, "a bug at the start of the region");
        tokio::task::yield_now().await;
        assert!(offset < SIZE / 2, "a bug in the second half, noticed late");
        buf.fill(7);
        Ok(())
    }

    async fn write_at(&self, _offset: u64, _buf: &[u8]) -> Result<()> {
        panic!("a bug in writing");
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_of_the_backend_is_an_error_and_no_more() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(Arc::new(Panics), FileSettings { caching: Caching::Never, ..FileSettings::default() });
    let file = open(mount.path());
    let mut seen = [0; 512];
    for _ in 0..20 {
        assert_eq!(errno(file.read_exact_at(&mut seen, 0)), Errno::IO);
        assert_eq!(errno(file.read_exact_at(&mut seen, SIZE / 2)), Errno::IO);
        assert_eq!(errno(file.write_all_at(b"x", 0)), Errno::IO);
    }
    file.read_exact_at(&mut seen, 4096).unwrap();
    assert_eq!(seen, [7; 512]);
}

/// Far more requests wait at once than there are threads that take them, and one that need not wait gets through.
#[test]
fn slow_requests_wait_at_once_and_hold_up_nobody() {
    need_fuse!();
    const READERS: u64 = 24;
    let world = World::new();
    let faults = faulty(64 << 20, 1);
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Read).touching(SIZE..64 << 20).hold(&pause));
    let mount = world.mount(faults.clone(), FileSettings { caching: Caching::Never, ..FileSettings::default() });
    let file = open(mount.path());
    thread::scope(|scope| {
        for reader in 0..READERS {
            let file = &file;
            scope.spawn(move || {
                let (at, mut seen) = (SIZE * (1 + reader), vec![0; 10_000]);
                file.read_exact_at(&mut seen, at).unwrap();
                fill::check(&seen, at, 1).unwrap();
            });
        }
        world.wait("all readers are in flight", pause.wait_held(usize::try_from(READERS).unwrap()));
        let mut seen = [0; 4096];
        file.read_exact_at(&mut seen, 0).unwrap();
        fill::check(&seen, 0, 1).unwrap();
        file.write_all_at(&fill::bytes(0, 4096, 1), 0).unwrap();
        pause.release();
    });
}

/// Writes for which the backend waits are made with a copy; their order and bytes must not suffer, and neither must
/// those after it has become quick again.
#[test]
fn writes_are_right_whether_they_wait_or_not() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let slow = Link::new(memory.clone(), Duration::from_millis(1), None);
    let mount = world.mount(slow, FileSettings::default());
    let file = open(mount.path());
    for round in 2..8 {
        file.write_all_at(&fill::bytes(1000, 100_000, round), 1000).unwrap();
        fill::check(&content(&memory)[1000..101_000], 1000, round).unwrap();
    }
    drop(file);
    world.unmount(&mount);

    let faults = r3map_testkit::faults::Faults::new(memory.clone());
    faults.add(Rule::on(Operation::Write).after(2).times(3).delay(Duration::from_millis(1)));
    let mount = world.mount(faults, FileSettings::default());
    let file = open(mount.path());
    for round in 8..20 {
        file.write_all_at(&fill::bytes(1000, 100_000, round), 1000).unwrap();
        fill::check(&content(&memory)[1000..101_000], 1000, round).unwrap();
    }
}

#[test]
fn unmounting_does_not_wait_for_ever_for_a_backend_that_hangs() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let settings = FileSettings { unmount_limit: Duration::from_millis(300), ..FileSettings::default() };
    let mount = world.mount(faults.clone(), settings);
    let path = mount.path().to_owned();
    faults.add(Rule::on(Operation::Flush).hang());
    let error = world.wait("unmounting", mount.unmount()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    fill::check(&fs::read(&path).unwrap(), 0, 1).expect("it is still mounted and works");
    let error = world.wait("detaching", mount.detach()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(!path.exists());
}

/// Nobody is asked again what could not be had, which may take as long as a remote is waited for.
#[test]
fn a_flush_that_fails_is_asked_for_once_and_says_why() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    open(mount.path()).write_all_at(b"changed", 5).unwrap();
    faults.add(Rule::on(Operation::Flush).fail(ErrorKind::Unavailable));
    for calls in 1..=3 {
        let error = world.wait("flushing", mount.flush()).unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Unavailable, Operation::Flush), "{error}");
        assert_eq!(faults.count(Operation::Flush), calls, "{error}");
    }
    faults.clear();
    world.unmount(&mount);
}

/// What a mapping wrote fails before the backend is flushed: that the last flush failed too is not why.
#[test]
fn what_a_flush_says_is_not_what_an_earlier_one_said() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Unavailable));
    let error = world.wait("flushing", mount.flush()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let file = open(mount.path());
    let mapping = FileMapping::new(&file, 1 << 18, Sharing::Shared, true).unwrap();
    mapping.write(4096, b"lost?").unwrap();
    faults.add(Rule::on(Operation::Write).fail(ErrorKind::Exhausted));
    let error = world.wait("flushing", mount.flush()).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::Unavailable, "{error}");
    faults.clear();
    drop((mapping, file));
    world.unmount(&mount);
}

#[test]
fn who_gives_up_waits_for_no_backend_and_leaves_nothing() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    let file = open(mount.path());
    file.write_all_at(b"changed", 5).unwrap();
    faults.add(Rule::any().hang());
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 10], 100_000).unwrap_err());
        let flusher = scope.spawn(|| file.sync_all().unwrap_err());
        world.wait("the calls", faults.wait_in_flight(2));
        world.wait("giving up", mount.abandon()).unwrap();
        assert!(reader.join().unwrap().raw_os_error().is_some());
        assert!(flusher.join().unwrap().raw_os_error().is_some());
    });
    assert!(mounts(mount.path()).is_empty() && !mount.path().exists(), "nothing is left");
    assert_eq!(faults.count(Operation::Flush), 1, "only the user's");
    world.wait("the requests are given up", faults.wait_idle());
    world.wait("giving up again", mount.abandon()).unwrap();
}

/// Nor for somebody else who asks a backend that hangs, as whoever unmounts does.
#[test]
fn who_gives_up_ends_also_what_others_wait_for() {
    need_fuse!();
    let world = World::new();
    for detach in [false, true] {
        let faults = faulty(SIZE, 1);
        let settings = FileSettings { unmount_limit: Duration::from_secs(3600), ..FileSettings::default() };
        let mount = world.mount(faults.clone(), settings);
        faults.add(Rule::on(Operation::Flush).hang());
        let leaving = async { if detach { mount.detach().await } else { mount.unmount().await } };
        let giving_up = async {
            faults.wait_in_flight(1).await;
            mount.abandon().await
        };
        let all = async { tokio::join!(leaving, giving_up) };
        let (left, given_up) = world.wait("giving up", all);
        assert!(left.is_err());
        given_up.unwrap();
        assert!(mounts(mount.path()).is_empty() && !mount.path().exists(), "nothing is left");
        world.wait("the requests are given up", faults.wait_idle());
    }
}

#[test]
fn closing_an_opened_file_does_not_wait_for_ever_for_a_backend_that_hangs() {
    need_fuse!();
    let world = World::new();
    for close in [true, false] {
        let faults = faulty(SIZE, 1);
        let settings = FileSettings { unmount_limit: Duration::from_millis(300), ..FileSettings::default() };
        let file = world.wait("opening", OpenedFile::open(faults.clone(), settings)).unwrap();
        file.write_all_at(b"not flushed yet", 0).unwrap();
        faults.add(Rule::on(Operation::Flush).hang());
        if close {
            let error = world.wait("closing", file.close()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
            assert_eq!(faults.count(Operation::Flush), 1, "it is not waited for again");
        } else {
            world.wait("dropping", async { tokio::task::spawn_blocking(|| drop(file)).await }).unwrap();
        }
    }
}

#[test]
fn an_opened_file_is_given_up_at_once() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let file = world.wait("opening", OpenedFile::open(faults.clone(), FileSettings::default())).unwrap();
    faults.add(Rule::any().hang());
    let clone = file.try_clone().unwrap();
    thread::scope(|scope| {
        let flusher = scope.spawn(|| clone.sync_all().unwrap_err());
        world.wait("the flush", faults.wait_in_flight(1));
        world.wait("giving up", file.abandon()).unwrap();
        assert!(flusher.join().unwrap().raw_os_error().is_some());
    });
    assert_eq!(faults.count(Operation::Flush), 1, "only the user's");
    world.wait("the requests are given up", faults.wait_idle());
}

#[test]
fn a_reader_that_waits_gets_an_error_when_the_file_is_detached() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    faults.add(Rule::on(Operation::Read).hang());
    let settings = FileSettings { unmount_limit: Duration::from_secs(5), ..FileSettings::default() };
    let mount = world.mount(faults.clone(), settings);
    let file = File::open(mount.path()).unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 10], 0).unwrap_err());
        world.wait("the read", faults.wait_in_flight(1));
        world.wait("detaching", mount.detach()).unwrap();
        let error = reader.join().unwrap();
        assert!(error.raw_os_error().is_some(), "{error}");
    });
    assert_eq!(errno(file.read_at(&mut [0; 10], 500_000)), Errno::NOTCONN);
    world.wait("the last request is given up", faults.wait_idle());
}

#[test]
fn an_unmount_that_cannot_flush_leaves_it_mounted() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    faults.add(Rule::on(Operation::Flush).fail(ErrorKind::Unavailable));
    let error = world.wait("unmounting", mount.unmount()).unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Unavailable, Operation::Flush), "{error}");
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
    faults.clear();
    world.unmount(&mount);
    assert!(!mount.path().exists());
}
