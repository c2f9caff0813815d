//! What `stat`, `truncate`, `fallocate`, `lseek` and the rest answer.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use r3map_core::{MAX_REGION_SIZE, Operation};
use r3map_file::{Caching, FileSettings, Show};
use r3map_local::Memory;
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::faults::Faults;
use r3map_testkit::fill;
use r3map_testkit::store::Store;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek, statvfs};
use rustix::io::Errno;

use crate::support::{World, content, errno, faulty, filled, need_fuse, open, open_direct};

const SIZE: u64 = 300_001;
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE;
const KEEP: FallocateFlags = FallocateFlags::KEEP_SIZE;

#[test]
fn stat_says_what_it_is() {
    need_fuse!();
    let world = World::new();
    let before = SystemTime::now();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    let found = fs::metadata(mount.path()).unwrap();
    assert!(found.is_file());
    assert_eq!((found.len(), found.blocks(), found.blksize()), (SIZE, SIZE.div_ceil(512), 65_536));
    assert_eq!((found.mode() & 0o7777, found.uid(), found.gid(), found.nlink()), (0o644, 0, 0, 1));
    assert_eq!(found.ino(), fs::metadata(mount.path()).unwrap().ino());
    assert!(found.modified().unwrap() >= before - Duration::from_secs(1));
    let file_system = statvfs(mount.path()).unwrap();
    assert_eq!((file_system.f_blocks * file_system.f_frsize, file_system.f_bavail), (SIZE.next_multiple_of(4096), 0));
}

#[test]
fn attributes_can_be_changed_for_as_long_as_it_is_mounted() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    fs::set_permissions(mount.path(), Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(mount.path(), Some(12), Some(34)).unwrap();
    let past = UNIX_EPOCH + Duration::new(1_000_000_000, 7);
    let file = open(mount.path());
    file.set_modified(past).unwrap();
    let found = fs::metadata(mount.path()).unwrap();
    assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o640, 12, 34));
    assert_eq!(found.modified().unwrap(), past);
    file.write_all_at(b"x", 5).unwrap();
    assert!(fs::metadata(mount.path()).unwrap().modified().unwrap() > past);
    drop(file);
    world.unmount(&mount);
}

#[test]
fn the_size_cannot_be_changed() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    for size in [0, 1, SIZE - 1, SIZE + 1, 1 << 40] {
        assert_eq!(errno(file.set_len(size)), Errno::PERM, "{size}");
    }
    assert_eq!(errno(File::create(mount.path())), Errno::PERM, "O_TRUNC would empty it");
    file.set_len(SIZE).unwrap();
    assert_eq!(fs::metadata(mount.path()).unwrap().len(), SIZE);
    fill::check(&content(&memory), 0, 1).unwrap();
}

#[test]
fn writes_end_at_the_end() {
    need_fuse!();
    let world = World::new();
    for direct in [false, true] {
        let memory = filled(SIZE, 1);
        let mount = world.mount(memory.clone(), FileSettings::default());
        let file = if direct { open_direct(mount.path()) } else { open(mount.path()) };
        for at in [SIZE, SIZE + 1, SIZE + 5000, 1 << 40] {
            assert_eq!(errno(file.write_at(b"beyond", at)), Errno::NOSPC, "{at}");
        }
        let over = file.write_at(&fill::bytes(SIZE - 3, 10, 1), SIZE - 3);
        match direct {
            false => assert_eq!(over.unwrap(), 3),
            true => assert_eq!(errno(over), Errno::NOSPC),
        }
        assert_eq!(errno(file.write_all_at(&fill::bytes(SIZE - 3, 10, 1), SIZE - 3)), Errno::NOSPC);
        assert_eq!(fs::metadata(mount.path()).unwrap().len(), SIZE);
        fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
        fill::check(&content(&memory), 0, 1).unwrap();
        let mut appending = OpenOptions::new().append(true).open(mount.path()).unwrap();
        assert_eq!(errno(appending.write(b"more")), Errno::NOSPC);
    }
}

#[test]
fn reads_end_at_the_end() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    let file = open(mount.path());
    let mut buf = [0; 10];
    assert_eq!(file.read_at(&mut buf, SIZE).unwrap(), 0);
    assert_eq!(file.read_at(&mut buf, 1 << 50).unwrap(), 0);
    assert_eq!(file.read_at(&mut buf, SIZE - 4).unwrap(), 4);
    fill::check(&buf[..4], SIZE - 4, 1).unwrap();
}

#[test]
fn fallocate_zeroes_releases_and_never_extends() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    for (flags, at, len) in [(PUNCH, 65_000, 70_000), (ZERO, 5, 4096), (ZERO | KEEP, 200_000, 1), (PUNCH, SIZE - 9, 99)]
    {
        fallocate(&file, flags, at, len).unwrap();
        let end = (at + len).min(SIZE);
        let mut seen = vec![1; usize::try_from(end - at).unwrap()];
        file.read_exact_at(&mut seen, at).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0), "{flags:?} at {at}");
        file.write_all_at(&fill::bytes(at, seen.len(), 1), at).unwrap();
    }
    fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
    fallocate(&file, KEEP, 100, 5).unwrap();
    for (flags, at, len) in [(FallocateFlags::empty(), 0, SIZE + 1), (KEEP, SIZE, 1), (ZERO, SIZE - 1, 2)] {
        assert_eq!(fallocate(&file, flags, at, len), Err(Errno::NOSPC), "{flags:?} at {at}");
    }
    for flags in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(fallocate(&file, flags, 4096, 4096), Err(Errno::OPNOTSUPP));
    }
    fallocate(&file, PUNCH, SIZE + 5, 10).unwrap();
    fill::check(&content(&memory), 0, 1).unwrap();
    assert_eq!(fs::metadata(mount.path()).unwrap().len(), SIZE);
}

#[test]
fn fallocate_says_so_where_the_backend_cannot() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(Arc::new(Store::new(SIZE).plain()), FileSettings::default());
    let file = open(mount.path());
    for flags in [PUNCH, ZERO] {
        assert_eq!(fallocate(&file, flags, 0, 4096), Err(Errno::OPNOTSUPP));
    }
    fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
}

#[test]
fn holes_are_found_where_they_are_known() {
    need_fuse!();
    let world = World::new();
    let memory = Arc::new(Memory::new(10 << 20).unwrap());
    memory.write_now(3 << 20, &[1; 70_000]).unwrap();
    memory.write_now((10 << 20) - 1, &[1]).unwrap();
    let mount = world.mount(memory, FileSettings::default());
    let file = File::open(mount.path()).unwrap();
    let mib = 1 << 20;
    let data_end = 3 * mib + 2 * 65_536;
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(3 * mib));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(&file, SeekFrom::Hole(3 * mib)), Ok(data_end));
    assert_eq!(seek(&file, SeekFrom::Data(3 * mib + 5)), Ok(3 * mib + 5));
    assert_eq!(seek(&file, SeekFrom::Data(data_end)), Ok(10 * mib - 65_536));
    assert_eq!(seek(&file, SeekFrom::Hole(10 * mib - 1)), Ok(10 * mib));
    for at in [10 * mib, 11 * mib] {
        assert_eq!(seek(&file, SeekFrom::Data(at)), Err(Errno::NXIO));
        assert_eq!(seek(&file, SeekFrom::Hole(at)), Err(Errno::NXIO));
    }
    // The kernel says that a file was closed some time after it was.
    let first_data = |expected| world.wait_until("the next hole", || seek(&file, SeekFrom::Data(0)) == expected);
    fallocate(open(mount.path()), PUNCH, 3 * mib, 2 * 65_536).unwrap();
    first_data(Ok(10 * mib - 65_536));
    fallocate(open(mount.path()), PUNCH, 9 * mib, mib).unwrap();
    first_data(Err(Errno::NXIO));

    let mapping = FileMapping::new(&open(mount.path()), 10 << 20, Sharing::Shared, true).unwrap();
    mapping.write(2 << 20, b"hello").unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(0), "the kernel holds something, and nobody else knows where");
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(10 * mib));
    let mut seen = [0; 5];
    file.read_exact_at(&mut seen, 2 * mib).unwrap();
    assert_eq!(&seen, b"hello");
    mapping.sync().unwrap();
    drop(mapping);
    first_data(Ok(2 * mib));
}

#[test]
fn where_holes_are_not_known_all_is_data() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(Arc::new(Store::new(SIZE).plain()), FileSettings::default());
    let file = open(mount.path());
    assert_eq!(seek(&file, SeekFrom::Data(77)), Ok(77));
    assert_eq!(seek(&file, SeekFrom::Hole(77)), Ok(SIZE));
    assert_eq!(seek(&file, SeekFrom::Data(SIZE)), Err(Errno::NXIO));
}

#[test]
fn read_only_means_read_only() {
    need_fuse!();
    let world = World::new();
    let asked = FileSettings { read_only: true, ..FileSettings::default() };
    let given = Arc::new(Store::new(SIZE).filled(1).read_only());
    for (backend, settings) in [(filled(SIZE, 1) as _, asked), (given as _, FileSettings::default())] {
        let mount = world.mount(backend, settings);
        assert_eq!(fs::metadata(mount.path()).unwrap().mode() & 0o7777, 0o444);
        for options in [OpenOptions::new().write(true), OpenOptions::new().append(true)] {
            assert_eq!(errno(options.open(mount.path())), Errno::ROFS);
        }
        assert_eq!(errno(fs::set_permissions(mount.path(), Permissions::from_mode(0o666))), Errno::ROFS);
        let file = File::open(mount.path()).unwrap();
        fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
        file.sync_all().unwrap();
        drop(file);
        world.unmount(&mount);
    }
}

#[test]
fn fsync_and_fdatasync_reach_the_backend_and_close_does_not() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    let file = open(mount.path());
    let flushes = || faults.count(Operation::Flush);
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(flushes(), 0);
    file.sync_all().unwrap();
    assert_eq!(flushes(), 1);
    file.sync_data().unwrap();
    assert_eq!(flushes(), 2);
    drop(file);
    assert_eq!(flushes(), 2);
    world.unmount(&mount);
    assert!(flushes() > 2);
}

#[test]
fn synchronous_writes_are_flushed_before_they_return() {
    need_fuse!();
    let world = World::new();
    for caching in [Caching::Keep, Caching::Never] {
        for flags in [OFlags::DSYNC, OFlags::SYNC, OFlags::DSYNC | OFlags::DIRECT] {
            let faults = faulty(SIZE, 1);
            let mount = world.mount(faults.clone(), FileSettings { caching, ..FileSettings::default() });
            let flags = i32::try_from(flags.bits()).unwrap();
            let file = OpenOptions::new().write(true).custom_flags(flags).open(mount.path()).unwrap();
            for _ in 0..2 {
                let _ = faults.take_calls();
                file.write_all_at(&[7; 5000], 4000).unwrap();
                let calls: Vec<_> = faults.calls().iter().map(|call| call.operation).collect();
                assert_eq!(calls.last(), Some(&Operation::Flush), "{caching:?} {flags:x}: {calls:?}");
            }
        }
    }
}

#[test]
fn what_does_not_exist_is_answered_sanely() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    let path = mount.path();
    let mut none: [u8; 0] = [];
    assert_eq!(rustix::fs::getxattr(path, "user.x", &mut none).unwrap_err(), Errno::OPNOTSUPP);
    assert!(matches!(rustix::fs::listxattr(path, &mut none), Ok(0) | Err(Errno::OPNOTSUPP)));
    let set = rustix::fs::setxattr(path, "user.x", b"1", rustix::fs::XattrFlags::empty());
    assert_eq!(set.unwrap_err(), Errno::OPNOTSUPP);
    assert_eq!(errno(fs::remove_file(path)), Errno::BUSY);
    assert_eq!(errno(fs::rename(path, path.with_extension("x"))), Errno::BUSY);
    assert_eq!(errno(fs::hard_link(path, path.with_extension("x"))), Errno::XDEV);
    assert_eq!(errno(fs::create_dir(path.join("x"))), Errno::NOTDIR);
    let file = open(path);
    assert_eq!(rustix::fs::copy_file_range(&file, Some(&mut 5), &file, Some(&mut 100_000), 1000), Ok(1000));
    let mut copied = [0; 1000];
    file.read_exact_at(&mut copied, 100_000).unwrap();
    fill::check(&copied, 5, 1).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let other = open(path);
    let locked = rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(locked, Err(Errno::WOULDBLOCK));
}

#[test]
fn as_an_entry_of_a_directory() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let settings = FileSettings { show: Show::Entry("disk.img".into()), ..FileSettings::default() };
    let mount = world.mount(memory.clone(), settings);
    assert_eq!(mount.path(), world.path().join("disk.img"));
    let names: Vec<_> = fs::read_dir(world.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [OsStr::new("disk.img")]);
    let directory = fs::metadata(world.path()).unwrap();
    assert!(directory.is_dir() && directory.nlink() == 2);
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
    open(mount.path()).write_all_at(&fill::bytes(9, 99, 2), 9).unwrap();
    fill::check(&content(&memory)[9..108], 9, 2).unwrap();
    assert_eq!(errno(File::open(world.path().join("other"))), Errno::NOENT);
    assert_eq!(errno(File::create(world.path().join("other"))), Errno::PERM);
    assert_eq!(errno(fs::create_dir(world.path().join("other"))), Errno::PERM);
    assert_eq!(errno(fs::remove_file(mount.path())), Errno::PERM);
    assert_eq!(errno(fs::rename(mount.path(), world.path().join("other"))), Errno::PERM);
    assert_eq!(errno(fs::hard_link(mount.path(), world.path().join("other"))), Errno::PERM);
    world.wait("invalidating", mount.invalidate(0..SIZE)).unwrap();
    world.unmount(&mount);
    assert!(!world.path().exists());
}

#[test]
fn a_huge_region_costs_nothing_and_works_to_its_last_byte() {
    need_fuse!();
    let world = World::new();
    for size in [1 << 40, MAX_REGION_SIZE] {
        let mount = world.mount(Arc::new(Memory::new(size).unwrap()), FileSettings::default());
        assert_eq!(fs::metadata(mount.path()).unwrap().len(), size);
        let file = open(mount.path());
        file.write_all_at(b"end", size - 3).unwrap();
        let mut seen = [0; 5];
        file.read_exact_at(&mut seen, size - 5).unwrap();
        assert_eq!(&seen, b"\0\0end");
        assert_eq!(errno(file.write_all_at(b"!", size)), Errno::NOSPC);
        drop(file);
        world.unmount(&mount);
    }
}

/// A backend that is asked outside of its region would answer with an error, not with what the caller wants.
#[test]
fn the_backend_is_never_asked_past_its_end() {
    need_fuse!();
    let world = World::new();
    let faults = Faults::new(filled(4097, 1));
    let mount = world.mount(faults.clone(), FileSettings::default());
    let _ = fs::read(mount.path()).unwrap();
    let direct = open_direct(mount.path());
    let _ = direct.read_at(&mut [0; 8192], 4096).unwrap();
    assert_eq!(errno(direct.write_at(&[0; 8192], 4096)), Errno::NOSPC);
    assert_eq!(open(mount.path()).write_at(&[0; 8192], 4096).unwrap(), 1);
    fallocate(&direct, PUNCH, 4096, 1 << 30).unwrap();
    for call in faults.calls() {
        assert!(call.ranges.iter().all(|range| range.end <= 4097 && range.start < range.end), "{call:?}");
    }
}
