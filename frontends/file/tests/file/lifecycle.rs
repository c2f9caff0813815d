//! From mounting to unmounting: whose path it is, who is using it, and what is left when something dies.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use r3map_core::{ChunkSize, ErrorKind, Operation};
use r3map_file::{FileMount, FileSettings, OpenedFile, Show};
use r3map_local::Memory;
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::faults::{Pause, Rule};
use r3map_testkit::process::Process;
use r3map_testkit::{crash, fill, skip};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::support::{LIMIT, World, content, errno, faulty, filled, need_fuse, open};

const SIZE: u64 = 300_001;

/// The types and sources of what is mounted on a path, the topmost last.
pub(crate) fn mounts(path: &Path) -> Vec<(String, String)> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let lines = table.lines().filter(|line| line.split(' ').nth(4).map(OsStr::new) == Some(path.as_os_str()));
    lines
        .map(|line| {
            let mut end = line.split(" - ").nth(1).unwrap().split(' ');
            (end.next().unwrap().to_owned(), end.next().unwrap().to_owned())
        })
        .collect()
}

/// A mount whose process has gone.
fn mount_dead(path: &Path, kind: &str) {
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!("fd={},rootmode=100644,user_id=0,group_id=0", device.as_raw_fd());
    let data = std::ffi::CString::new(data).unwrap();
    rustix::mount::mount("dead", path, kind, MountFlags::empty(), data.as_c_str()).unwrap();
    drop(OwnedFd::from(device));
    assert_eq!(errno(fs::metadata(path)), Errno::NOTCONN);
}

#[test]
fn the_mount_says_what_it_is_and_leaves_nothing() {
    need_fuse!();
    let world = World::new();
    let source = "grpc://host:1337?a=1,b=2 3\\4".to_owned();
    let mount = world.mount(filled(SIZE, 1), FileSettings { source, ..FileSettings::default() });
    let expected = ("fuse.r3map".to_owned(), "grpc://host:1337?a=1,b=2\\0403\\1344".to_owned());
    assert_eq!(mounts(&world.path()), [expected]);
    world.unmount(&mount);
    world.wait("the end", mount.unmounted());
    assert!(mounts(&world.path()).is_empty());
    assert!(!world.path().exists());
    world.unmount(&mount);
}

#[test]
fn what_existed_before_stays() {
    need_fuse!();
    let world = World::new();
    fs::write(world.path(), "").unwrap();
    let inode = fs::metadata(world.path()).unwrap().ino();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    assert_eq!(fs::metadata(world.path()).unwrap().len(), SIZE);
    world.unmount(&mount);
    let found = fs::metadata(world.path()).unwrap();
    assert_eq!((found.ino(), found.len()), (inode, 0));
}

#[test]
fn a_live_mount_is_not_taken_over() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    for show in [Show::File, Show::Entry("x".into())] {
        let error = world.try_mount(filled(SIZE, 2), FileSettings { show, ..FileSettings::default() }).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(error.to_string().contains("mounted on it already"), "{error}");
    }
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
}

#[test]
fn of_two_at_once_one_wins() {
    need_fuse!();
    let world = World::new();
    for _ in 0..10 {
        let both = async {
            let open = |seed| FileMount::open(filled(SIZE, seed), world.path(), FileSettings::default());
            tokio::join!(open(1), open(2))
        };
        let (first, second) = world.wait("mounting", both);
        let error = match (&first, &second) {
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => error,
            _ => panic!("{:?} {:?}", first.err(), second.err()),
        };
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert_eq!(mounts(&world.path()).len(), 1);
        drop((first, second));
        assert!(mounts(&world.path()).is_empty());
        // If the loser made the placeholder, the winner does not know that it may remove it.
        assert!(fs::metadata(world.path()).map_or(0, |found| found.len()) == 0);
    }
}

#[test]
fn a_file_in_use_is_not_unmounted_but_can_be_detached() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    let mapping = FileMapping::new(&file, 300_001, Sharing::Shared, true).unwrap();
    let error = world.wait("unmounting", mount.unmount()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("in use"), "{error}");
    file.write_all_at(&fill::bytes(10, 100, 2), 10).unwrap();
    mapping.write(100_000, &fill::bytes(100_000, 5000, 2)).unwrap();
    world.wait("detaching", mount.detach()).unwrap();
    assert!(!world.path().exists());
    fill::check(&content(&memory)[10..110], 10, 2).unwrap();
    fill::check(&content(&memory)[100_000..105_000], 100_000, 2).unwrap();
    assert_eq!(errno(file.write_all_at(b"x", 0)), Errno::NOTCONN);
    assert_eq!(errno(file.sync_all()), Errno::NOTCONN);
    fill::check(&content(&memory)[..10], 0, 1).unwrap();
    let again = world.mount(filled(SIZE, 3), FileSettings::default());
    drop((mapping, file, mount));
    fill::check(&fs::read(again.path()).unwrap(), 0, 3).unwrap();
}

/// Also a thread that this process starts for a call of its own has open what the process has, for a moment.
#[test]
fn a_file_that_is_just_being_closed_is_given_a_moment() {
    need_fuse!();
    let world = World::new();
    // Several times, since the closer may get no processor for longer than that moment.
    let unmounted = (0..10).any(|_| {
        let mount = world.mount(filled(SIZE, 1), FileSettings::default());
        let file = open(mount.path());
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(20));
                drop(file);
            });
            world.wait("unmounting", mount.unmount()).is_ok()
        })
    });
    assert!(unmounted);
}

#[test]
fn the_last_thing_of_unmounting_is_a_flush() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let mount = world.mount(faults.clone(), FileSettings::default());
    open(mount.path()).write_all_at(b"unflushed", 5).unwrap();
    world.unmount(&mount);
    assert_eq!(faults.calls().last().map(|call| call.operation), Some(Operation::Flush));
}

#[test]
fn dropping_it_unmounts_wherever_that_happens() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let written = |seed| {
        let file = open(&world.path());
        let mapping = FileMapping::new(&file, 300_001, Sharing::Shared, true).unwrap();
        mapping.write(5, &fill::bytes(5, 1000, seed)).unwrap();
    };
    let check = |seed| {
        assert!(!world.path().exists());
        fill::check(&content(&memory)[5..1005], 5, seed).unwrap();
    };

    let mount = world.mount(memory.clone(), FileSettings::default());
    written(2);
    drop(mount);
    check(2);

    let mount = world.mount(memory.clone(), FileSettings::default());
    written(3);
    let busy = File::open(world.path()).unwrap();
    world.wait("dropping in a task", async move { tokio::spawn(async move { drop(mount) }).await.unwrap() });
    check(3);
    drop(busy);

    let single = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    single.block_on(async {
        let mount = FileMount::open(memory.clone(), world.path(), FileSettings::default()).await.unwrap();
        drop(mount);
        while world.path().exists() {
            tokio::task::yield_now().await;
        }
    });

    let other = World::new();
    let mount = other.mount(memory.clone(), FileSettings::default());
    let path = other.path();
    drop(other.runtime);
    drop(mount);
    assert!(!path.exists());
}

#[test]
fn others_may_unmount_it() {
    need_fuse!();
    let world = World::new();
    for command in [&["umount"][..], &["fusermount3", "-u"], &["umount", "-l"]] {
        let faults = faulty(SIZE, 1);
        let mount = world.mount(faults.clone(), FileSettings::default());
        let status = Command::new(command[0]).args(&command[1..]).arg(world.path()).status().unwrap();
        assert!(status.success());
        world.wait("the end", mount.unmounted());
        let _ = faults.take_calls();
        world.unmount(&mount);
        assert_eq!(faults.count(Operation::Flush), 1);
        assert!(!world.path().exists());
    }
}

#[test]
fn what_others_mount_over_it_is_left_alone() {
    need_fuse!();
    let world = World::new();
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    let other = world.home.path().join("other");
    fs::write(&other, "theirs").unwrap();
    rustix::mount::mount_bind(&other, world.path()).unwrap();
    let error = world.wait("unmounting", mount.unmount()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(fs::read_to_string(world.path()).unwrap(), "theirs");
    rustix::mount::unmount(world.path(), UnmountFlags::empty()).unwrap();
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
    world.unmount(&mount);
}

#[test]
fn a_killed_process_leaves_errors_and_a_path_that_can_be_taken_over() {
    if let Some(path) = crash::role("server") {
        let world = World::beside(&path);
        let mount = world.wait("mounting", FileMount::open(filled(SIZE, 1), path, FileSettings::default())).unwrap();
        let _open_itself = open(mount.path());
        crash::stop("mounted");
    }
    need_fuse!();
    let world = World::new();
    let test = "lifecycle::a_killed_process_leaves_errors_and_a_path_that_can_be_taken_over";
    let path = world.path();
    let mut server = crash::child(test, "server", path.to_str().unwrap());
    server.wait_for_line(LIMIT, "mounted");
    let file = open(&path);
    let mut seen = vec![0; 4096];
    file.read_exact_at(&mut seen, 0).unwrap();
    let mapping = FileMapping::new(&file, 300_001, Sharing::Shared, true).unwrap();
    let error = world.try_mount(filled(SIZE, 2), FileSettings::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");

    server.kill();
    for result in [file.read_exact_at(&mut seen, 200_000), file.write_all_at(b"x", 0), file.sync_all()] {
        assert_eq!(errno(result), Errno::NOTCONN);
    }
    assert_eq!(errno(mapping.read(200_000, &mut seen)), Errno::FAULT, "a SIGBUS for a plain access");
    assert_eq!(errno(File::open(&path)), Errno::NOTCONN);

    let mount = world.mount(filled(SIZE, 2), FileSettings::default());
    fill::check(&fs::read(&path).unwrap(), 0, 2).unwrap();
    assert_eq!(mounts(&path).len(), 1);
    drop((mapping, file));
    fill::check(&fs::read(&path).unwrap(), 0, 2).unwrap();
    world.unmount(&mount);
    assert!(mounts(&path).is_empty());
    assert_eq!(fs::metadata(&path).unwrap().len(), 0, "what the dead one mounted on looks like somebody's own");
}

#[test]
fn several_dead_mounts_are_cleared_and_strange_ones_are_not() {
    need_fuse!();
    let world = World::new();
    let path = world.path();
    fs::write(&path, "").unwrap();
    mount_dead(&path, "fuse.r3map");
    mount_dead(&path, "fuse.r3map");
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    assert_eq!(mounts(&path).len(), 1);
    world.unmount(&mount);

    mount_dead(&path, "fuse.sshfs");
    let error = world.try_mount(filled(SIZE, 1), FileSettings::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("dead fuse.sshfs"), "{error}");
    assert_eq!(mounts(&path).len(), 1);
    rustix::mount::unmount(&path, UnmountFlags::DETACH).unwrap();
}

#[test]
fn bad_settings_and_paths_touch_nothing() {
    need_fuse!();
    let world = World::new();
    let bad = FileSettings { max_request: 1, ..FileSettings::default() };
    assert_eq!(world.try_mount(filled(SIZE, 1), bad).err().unwrap().kind(), ErrorKind::InvalidInput);
    assert!(!world.path().exists());
    fs::write(world.path(), "something").unwrap();
    let error = world.try_mount(filled(SIZE, 1), FileSettings::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert_eq!(fs::read_to_string(world.path()).unwrap(), "something");
    assert!(mounts(&world.path()).is_empty());
}

/// Also in the moment in which the kernel has not let go yet.
#[test]
fn unmounting_again_flushes_and_does_nothing_else() {
    need_fuse!();
    let world = World::new();
    for _ in 0..20 {
        let faults = faulty(SIZE, 1);
        let mount = world.try_mount(faults.clone(), FileSettings::default()).unwrap();
        world.wait("unmounting", mount.unmount()).unwrap();
        let flushes = faults.count(Operation::Flush);
        world.wait("unmounting again", mount.unmount()).unwrap();
        assert!(faults.count(Operation::Flush) > flushes);
    }
}

/// Who comes second would find the path empty, or somebody else's mount on it.
#[test]
fn two_that_unmount_at_once_both_find_it_unmounted() {
    need_fuse!();
    let world = World::new();
    for _ in 0..10 {
        let (faults, pause) = (faulty(SIZE, 1), Pause::new());
        faults.add(Rule::on(Operation::Flush).hold(&pause));
        let mount = world.try_mount(faults, FileSettings::default()).unwrap();
        let held = async {
            pause.wait_held(1).await;
            pause.release();
        };
        let both = async { tokio::join!(mount.unmount(), mount.detach(), held) };
        let (unmounted, detached, ()) = world.wait("unmounting", both);
        unmounted.and(detached).unwrap();
        assert!(!world.path().exists());
    }
}

/// As by `umount -f`: whoever has the file open gets errors, and the dead mount stays on the path.
#[test]
fn what_somebody_has_ended_by_force_does_not_stay_on_the_path() {
    need_fuse!();
    let world = World::new();
    for detach in [false, true] {
        let mount = world.mount(filled(SIZE, 1), FileSettings::default());
        let file = open(mount.path());
        let error = rustix::mount::unmount(world.path(), UnmountFlags::FORCE).unwrap_err();
        assert_eq!(error, Errno::BUSY);
        assert_eq!(errno(file.read_at(&mut [0; 10], 0)), Errno::NOTCONN);
        world.wait("it is known", mount.unmounted());
        world.wait("flushing", mount.flush()).unwrap();
        if detach {
            world.wait("detaching", mount.detach()).unwrap();
        } else {
            world.unmount(&mount);
        }
        assert!(mounts(&world.path()).is_empty());
        assert!(!world.path().exists());
    }
}

fn opened(world: &World, memory: &Arc<Memory>, settings: FileSettings) -> OpenedFile {
    world.wait("opening", OpenedFile::open(memory.clone(), settings)).unwrap()
}

fn our_mounts() -> usize {
    fs::read_to_string("/proc/self/mountinfo").unwrap().matches("opened-file-test").count()
}

#[test]
fn an_opened_file_is_on_no_path() {
    need_fuse!();
    let world = World::new();
    let memory = filled(SIZE, 1);
    let settings = FileSettings { source: "opened-file-test".to_owned(), ..FileSettings::default() };
    let file = opened(&world, &memory, settings);
    assert_eq!(our_mounts(), 0);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    let mut bytes = vec![0; 300_001];
    file.read_exact_at(&mut bytes, 0).unwrap();
    fill::check(&bytes, 0, 1).unwrap();
    let again = open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
    again.write_all_at(&fill::bytes(7, 70, 2), 7).unwrap();
    let mapping = FileMapping::new(&file, 300_001, Sharing::Shared, true).unwrap();
    mapping.write(200_000, &fill::bytes(200_000, 50_000, 2)).unwrap();
    memory.write_now(100, &fill::bytes(100, 10, 3)).unwrap();
    world.wait("invalidating", file.invalidate(100..110)).unwrap();
    file.read_exact_at(&mut bytes[..10], 100).unwrap();
    fill::check(&bytes[..10], 100, 3).unwrap();
    world.wait("closing", file.close()).unwrap();
    fill::check(&content(&memory)[7..77], 7, 2).unwrap();
    fill::check(&content(&memory)[200_000..250_000], 200_000, 2).unwrap();
    assert_eq!(errno(again.write_all_at(b"x", 0)), Errno::NOTCONN);
}

#[test]
fn an_opened_file_flushes_when_it_ends_and_says_if_it_cannot() {
    need_fuse!();
    let world = World::new();
    let faults = faulty(SIZE, 1);
    let open = || world.wait("opening", OpenedFile::open(faults.clone(), FileSettings::default())).unwrap();
    drop(open());
    assert!(faults.count(Operation::Flush) > 0);
    faults.add(Rule::on(Operation::Flush).fail(ErrorKind::Unavailable));
    let error = world.wait("closing", open().close()).unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Unavailable, Operation::Flush), "{error}");
}

#[test]
fn an_opened_file_of_what_is_read_only_cannot_be_written() {
    need_fuse!();
    let world = World::new();
    let file = opened(&world, &filled(SIZE, 1), FileSettings { read_only: true, ..FileSettings::default() });
    assert_eq!(errno(file.write_all_at(b"x", 0)), Errno::BADF);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3).unwrap();
    fill::check(&byte, 3, 1).unwrap();
}

#[test]
fn a_killed_process_leaves_nothing_of_an_opened_file() {
    if crash::role("opener").is_some() {
        let world = World::new();
        let settings = FileSettings { source: "opened-file-killed".to_owned(), ..FileSettings::default() };
        let file = opened(&world, &filled(SIZE, 1), settings);
        crash::stop(&format!("opened {}", file.metadata().unwrap().len()));
    }
    need_fuse!();
    let world = World::new();
    let test = "lifecycle::a_killed_process_leaves_nothing_of_an_opened_file";
    let temporary = format!("TMPDIR={}", world.home.path().display());
    let mut opener = crash::child_through(&["env", &temporary], test, "opener", "");
    opener.wait_for_line(LIMIT, &format!("opened {SIZE}"));
    let path = format!("/proc/{}/fd", opener.id());
    assert!(fs::read_dir(path).unwrap().count() > 3);
    opener.kill();
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains("opened-file-killed"));
    let left: Vec<_> = fs::read_dir(world.home.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The test's own temporary directory, which the killed process could not remove, and nothing in it.
    assert!(left.iter().all(|path| fs::read_dir(path).unwrap().next().is_none()), "{left:?}");
}

/// So that a process which is killed as it opens one leaves nothing either.
#[test]
fn an_opened_file_needs_no_folder_where_it_can_be_mounted_on_no_path() {
    if let Some(beside) = crash::role("opener") {
        let world = World::beside(&beside);
        let file = opened(&world, &filled(SIZE, 1), FileSettings::default());
        crash::stop(&format!("opened {}", file.metadata().unwrap().len()));
    }
    need_fuse!();
    if !rustix::process::geteuid().is_root() {
        return skip("only root mounts FUSE on no path");
    }
    let world = World::new();
    let test = "lifecycle::an_opened_file_needs_no_folder_where_it_can_be_mounted_on_no_path";
    let beside = world.path();
    let mut opener = crash::child_through(&["env", "TMPDIR=/nowhere"], test, "opener", beside.to_str().unwrap());
    opener.wait_for_line(LIMIT, &format!("opened {SIZE}"));
}

const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// Runs a role of a test as an ordinary user, with a directory of its own.
fn as_nobody(world: &World, more: &[&str], test: &str, role: &str) -> Process {
    std::os::unix::fs::chown(world.home.path(), Some(65_534), Some(65_534)).unwrap();
    let wrapper: Vec<_> = NOBODY.iter().chain(more).copied().collect();
    crash::child_through(&wrapper, test, role, world.path().to_str().unwrap())
}

/// Makes `/dev/fuse` what it is everywhere where udev runs, open to all, for one process and what it starts.
const OPEN_DEVICE: &str = "mknod -m 666 \"$0/fuse\" c 10 229 && mount --bind \"$0/fuse\" /dev/fuse && exec \"$@\"";

/// Runs `conduct`, which starts ordinary users, where these may open `/dev/fuse`: here, or in a namespace of its own.
fn for_ordinary_users(test: &str, conduct: impl FnOnce(&World)) {
    let world = World::new();
    if fs::metadata("/dev/fuse").unwrap().mode() & 0o666 == 0o666 {
        conduct(&world);
        return crash::reached("all is well");
    }
    assert_eq!(crash::role("conductor"), None, "the namespace has an open device");
    let home = world.home.path().to_str().unwrap();
    let wrapper = ["unshare", "--mount", "sh", "-c", OPEN_DEVICE, home];
    let mut conductor = crash::child_through(&wrapper, test, "conductor", "");
    conductor.wait_for_line(2 * LIMIT, "all is well");
    assert!(conductor.wait(LIMIT).success());
}

/// What an ordinary user does with a mount, from the beginning to the end.
fn use_as_nobody(path: String) {
    let world = World::beside(&path);
    let memory = filled(SIZE, 1);
    let settings = FileSettings { source: "memory:?a=1,b=2".to_owned(), ..FileSettings::default() };
    let mount = world.wait("mounting", FileMount::open(memory.clone(), path, settings)).unwrap();
    let expected = ("fuse.r3map".to_owned(), "memory:?a=1,b=2".to_owned());
    assert_eq!(mounts(mount.path()), [expected]);
    assert_eq!(fs::metadata(mount.path()).unwrap().uid(), 65_534);
    fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
    let file = open(mount.path());
    file.write_all_at(&fill::bytes(3, 30, 2), 3).unwrap();
    file.sync_all().unwrap();
    fill::check(&content(&memory)[3..33], 3, 2).unwrap();
    assert_eq!(world.wait("unmounting", mount.unmount()).unwrap_err().kind(), ErrorKind::Conflict);
    world.wait("detaching", mount.detach()).unwrap();
    assert_eq!(errno(file.write_all_at(b"x", 0)), Errno::NOTCONN);
    drop(file);
    let again = world.wait("mounting", FileMount::open(memory, mount.path(), FileSettings::default())).unwrap();
    world.unmount(&again);
    assert!(!mount.path().exists());
    assert_eq!(our_mounts(), 0);
    // Nothing can be done in advance, and it works all the same.
    let preparing = FileMount::prepare(SIZE, ChunkSize::DEFAULT, FileSettings::default());
    let prepared = world.wait("preparing", preparing).unwrap();
    assert_eq!(our_mounts(), 0);
    let mount = world.wait("showing", prepared.show(filled(SIZE, 3), mount.path())).unwrap();
    fill::check(&fs::read(mount.path()).unwrap(), 0, 3).unwrap();
    world.unmount(&mount);
    assert!(!mount.path().exists());
    let file = opened(&world, &filled(SIZE, 1), FileSettings::default());
    world.wait("closing", file.close()).unwrap();
}

#[test]
fn an_ordinary_user_mounts_through_the_helper() {
    if let Some(path) = crash::role("user") {
        use_as_nobody(path);
        return crash::reached("all is well");
    }
    need_fuse!();
    let test = "lifecycle::an_ordinary_user_mounts_through_the_helper";
    for_ordinary_users(test, |world| {
        let mut user = as_nobody(world, &[], test, "user");
        user.wait_for_line(LIMIT, "all is well");
        assert!(user.wait(LIMIT).success());
        assert!(mounts(&world.path()).is_empty());
    });
}

#[test]
fn an_ordinary_user_takes_over_what_a_killed_process_left() {
    let open_mount =
        |world: &World, path| world.wait("mounting", FileMount::open(filled(SIZE, 1), path, FileSettings::default()));
    if let Some(path) = crash::role("killed") {
        let world = World::beside(&path);
        let _mount = open_mount(&world, path).unwrap();
        crash::stop("mounted");
    }
    if let Some(path) = crash::role("heir") {
        let world = World::beside(&path);
        let mount = open_mount(&world, path).unwrap();
        fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
        world.unmount(&mount);
        return crash::reached("taken over");
    }
    need_fuse!();
    let test = "lifecycle::an_ordinary_user_takes_over_what_a_killed_process_left";
    for_ordinary_users(test, |world| {
        let mut killed = as_nobody(world, &[], test, "killed");
        killed.wait_for_line(LIMIT, "mounted");
        assert_eq!(errno(fs::metadata(world.path())), Errno::ACCESS, "not for others, not even for root");
        killed.kill();
        as_nobody(world, &[], test, "heir").wait_for_line(LIMIT, "taken over");
        assert!(mounts(&world.path()).is_empty());
    });
}

#[test]
fn an_ordinary_user_is_told_what_to_do() {
    for (role, allow_other, kind) in [
        ("without helper", false, ErrorKind::NotFound),
        ("for others", true, ErrorKind::Denied),
        ("elsewhere", false, ErrorKind::Denied),
    ] {
        if let Some(path) = crash::role(role) {
            let world = World::beside(&path);
            let settings = FileSettings { allow_other, ..FileSettings::default() };
            let error = world.wait("mounting", FileMount::open(filled(SIZE, 1), &path, settings)).err().unwrap();
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(Path::new(&path).exists(), role == "elsewhere");
            return crash::reached(&format!("told: {error}"));
        }
    }
    need_fuse!();
    let test = "lifecycle::an_ordinary_user_is_told_what_to_do";
    for_ordinary_users(test, |world| {
        let told = |more: &[&str], role| as_nobody(world, more, test, role).wait_for_line(LIMIT, "told:");
        let told_without_helper = told(&["env", "PATH=/nonexistent"], "without helper");
        assert!(told_without_helper.contains("apt install fuse3"), "{told_without_helper}");
        let configuration = fs::read_to_string("/etc/fuse.conf").unwrap_or_default();
        if !configuration.lines().any(|line| line == "user_allow_other") {
            let told_for_others = told(&[], "for others");
            assert!(told_for_others.contains("user_allow_other"), "{told_for_others}");
        }
        fs::write(world.path(), "").unwrap();
        let told_elsewhere = told(&[], "elsewhere");
        assert!(told_elsewhere.contains(world.path().to_str().unwrap()), "{told_elsewhere}");
    });
}

/// Mounts, and waits for ever where it is to unmount.
const HELPER: &str = "#!/bin/sh\ncase $1 in -o) PATH=/usr/bin:/bin exec fusermount3 \"$@\";; *) exec sleep 60;; esac\n";

#[test]
fn an_ordinary_user_does_not_wait_for_ever_for_a_helper_that_hangs() {
    if let Some(path) = crash::role("user") {
        let world = World::beside(&path);
        let settings = FileSettings { unmount_limit: Duration::from_millis(300), ..FileSettings::default() };
        let mount = world.wait("mounting", FileMount::open(filled(SIZE, 1), path, settings)).unwrap();
        let (begun, detached) = (Instant::now(), world.wait("detaching", mount.detach()));
        assert_eq!(detached.unwrap_err().kind(), ErrorKind::Unavailable);
        assert!(begun.elapsed() < Duration::from_secs(50), "it did not wait for the helper to end");
        crash::stop("not detached");
    }
    need_fuse!();
    let test = "lifecycle::an_ordinary_user_does_not_wait_for_ever_for_a_helper_that_hangs";
    for_ordinary_users(test, |world| {
        let helper = world.home.path().join("fusermount3");
        fs::write(&helper, HELPER).unwrap();
        fs::set_permissions(&helper, Permissions::from_mode(0o755)).unwrap();
        let path = format!("PATH={}:/usr/bin:/bin:/usr/sbin:/sbin", world.home.path().display());
        let mut user = as_nobody(world, &["env", &path], test, "user");
        user.wait_for_line(LIMIT, "not detached");
        user.kill();
        rustix::mount::unmount(world.path(), UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn root_lets_others_in_when_asked() {
    need_fuse!();
    let world = World::new();
    fs::set_permissions(world.home.path(), Permissions::from_mode(0o755)).unwrap();
    let read = || {
        let [setpriv, arguments @ ..] = NOBODY;
        Command::new(setpriv).args(arguments).arg("cat").arg(world.path()).output().unwrap()
    };
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    assert!(!read().status.success());
    world.unmount(&mount);
    let mount = world.mount(filled(SIZE, 1), FileSettings { allow_other: true, ..FileSettings::default() });
    fill::check(&read().stdout, 0, 1).unwrap();
    let write = Command::new("setpriv")
        .args(&NOBODY[1..])
        .args(["dd", "conv=notrunc", "status=none", "if=/dev/zero", "count=1"])
        .arg(format!("of={}", world.path().display()))
        .output();
    assert!(!write.unwrap().status.success(), "mode 0644 lets others only read");
    world.unmount(&mount);
}
