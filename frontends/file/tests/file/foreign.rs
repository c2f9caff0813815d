//! Programs that know nothing of us: ext4 on a loop device, fio, SQLite, and the tools that copy files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use r3map_core::Operation;
use r3map_file::{Caching, FileSettings};
use r3map_local::Memory;
use r3map_testkit::faults::Faults;
use r3map_testkit::{fill, skip};

use crate::support::{World, content, filled, need_fuse};

const MIB: u64 = 1 << 20;

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}{}", text(&output.stdout), text(&output.stderr));
    output
}

/// Whether the programs are there; says so if not.
fn have(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |program: &&&str| std::env::split_paths(&path).any(|directory| directory.join(program).exists());
    match programs.iter().find(|program| !there(program)) {
        None => true,
        Some(program) => {
            skip(&format!("{program} is not installed"));
            false
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A loop device on a file, gone when dropped.
struct Loop {
    device: String,
}

impl Loop {
    /// None where the kernel has no loop devices.
    fn new(file: &Path, direct: bool) -> Option<Self> {
        if !Path::new("/dev/loop-control").exists() {
            skip("there are no loop devices");
            return None;
        }
        let direct = if direct { "--direct-io=on" } else { "--direct-io=off" };
        let output = run("losetup", &["--find", "--show", direct, text(file)]);
        Some(Self { device: String::from_utf8(output.stdout).unwrap().trim().to_owned() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

/// A file system mounted from a device, unmounted when dropped.
struct Disk {
    point: PathBuf,
}

impl Disk {
    fn new(world: &World, device: &str) -> Self {
        let point = world.home.path().join("disk");
        fs::create_dir_all(&point).unwrap();
        run("mount", &[device, text(&point)]);
        Self { point }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.point).status();
    }
}

/// Fills a directory with files of many sizes.
fn fill_disk(disk: &Path, seed: u64) {
    for index in 0..60 {
        let directory = disk.join(format!("directory{}", index % 7));
        fs::create_dir_all(&directory).unwrap();
        let len = usize::try_from(index * index * 97).unwrap();
        fs::write(directory.join(format!("file{index}")), fill::bytes(index, len, seed)).unwrap();
    }
}

fn check_disk(disk: &Path, seed: u64) {
    for index in 0..60 {
        let path = disk.join(format!("directory{}/file{index}", index % 7));
        let bytes = fs::read(path).unwrap();
        assert_eq!(bytes.len() as u64, index * index * 97);
        fill::check(&bytes, index, seed).unwrap();
    }
}

#[test]
fn ext4_on_a_loop_device_on_the_file() {
    need_fuse!();
    if !have(&["losetup", "mkfs.ext4", "e2fsck", "mount"]) {
        return;
    }
    for direct in [false, true] {
        let world = World::new();
        let memory = Arc::new(Memory::new(64 * MIB).unwrap());
        let faults = Faults::new(memory.clone());
        let mount = world.mount(faults.clone(), FileSettings::default());
        let Some(device) = Loop::new(mount.path(), direct) else { return };
        run("mkfs.ext4", &["-q", "-F", &device.device]);
        let disk = Disk::new(&world, &device.device);
        fill_disk(&disk.point, 1);
        run("sync", &["--file-system", text(&disk.point)]);
        assert!(faults.count(Operation::Flush) > 0, "a barrier of the file system is a flush of the backend");
        drop(disk);
        let disk = Disk::new(&world, &device.device);
        check_disk(&disk.point, 1);
        let trimmed = Command::new("fstrim").arg(&disk.point).status();
        assert!(trimmed.is_ok_and(|status| status.success()));
        assert!(faults.count(Operation::Trim) > 0);
        drop((disk, device));
        world.unmount(&mount);
        let image = world.home.path().join("image");
        fs::write(&image, content(&memory)).unwrap();
        run("e2fsck", &["-fn", text(&image)]);
        let again = world.mount(memory, FileSettings { read_only: true, ..FileSettings::default() });
        run("e2fsck", &["-fn", text(again.path())]);
    }
}

#[test]
fn fio_finds_what_it_wrote() {
    need_fuse!();
    if !have(&["fio"]) {
        return;
    }
    let world = World::new();
    for (caching, engine, pattern, direct, jobs) in [
        (Caching::Keep, "psync", "randrw", 0, 4),
        // fio itself mixes up the parts of a file that several jobs map.
        (Caching::Keep, "mmap", "randwrite", 0, 1),
        (Caching::Keep, "libaio", "randwrite", 1, 4),
        (Caching::Never, "psync", "write", 0, 4),
    ] {
        let mount =
            world.mount(Arc::new(Memory::new(16 * MIB).unwrap()), FileSettings { caching, ..FileSettings::default() });
        let output = run(
            "fio",
            &[
                "--name=verify",
                &format!("--filename={}", text(mount.path())),
                &format!("--ioengine={engine}"),
                &format!("--rw={pattern}"),
                &format!("--direct={direct}"),
                "--bsrange=4k-128k",
                "--iodepth=8",
                &format!("--size={}m", 16 / jobs),
                &format!("--offset_increment={}m", 16 / jobs),
                &format!("--numjobs={jobs}"),
                "--verify=crc32c",
                "--verify_state_save=0",
                "--do_verify=1",
                "--verify_fatal=1",
                "--overwrite=1",
                "--fallocate=none",
                "--allow_file_create=0",
                "--group_reporting",
            ],
        );
        assert!(String::from_utf8_lossy(&output.stdout).contains("err= 0"), "{engine} {pattern}");
        world.unmount(&mount);
    }
}

#[test]
fn sqlite_on_ext4_on_it() {
    need_fuse!();
    if !have(&["sqlite3", "losetup", "mkfs.ext4", "mount"]) {
        return;
    }
    let world = World::new();
    let mount = world.mount(Arc::new(Memory::new(64 * MIB).unwrap()), FileSettings::default());
    let Some(device) = Loop::new(mount.path(), false) else { return };
    run("mkfs.ext4", &["-q", "-F", &device.device]);
    let disk = Disk::new(&world, &device.device);
    let database = disk.point.join("test.db");
    let rows = "CREATE TABLE t(i INTEGER PRIMARY KEY, b BLOB);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<2000)
        INSERT INTO t SELECT i, randomblob(500) FROM n; DELETE FROM t WHERE i % 3 = 0;";
    run("sqlite3", &[text(&database), rows]);
    let answer = run("sqlite3", &[text(&database), "PRAGMA integrity_check; SELECT count(*) FROM t;"]);
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "ok\n1334\n");
}

#[test]
fn tools_copy_it_in_and_out() {
    need_fuse!();
    if !have(&["dd", "cp", "cmp"]) {
        return;
    }
    let world = World::new();
    let memory = filled(3 * MIB + 5, 1);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let copy = world.home.path().join("copy");
    run("cp", &["--sparse=always", text(mount.path()), text(&copy)]);
    run("cmp", &[text(mount.path()), text(&copy)]);
    fs::write(&copy, fill::bytes(0, 3 * 1024 * 1024 + 5, 2)).unwrap();
    let (from, to) = (format!("if={}", text(&copy)), format!("of={}", text(mount.path())));
    run("dd", &[&from, &to, "bs=64k", "conv=notrunc,fsync", "status=none"]);
    fill::check(&content(&memory), 0, 2).unwrap();
    let too_long = Command::new("dd").args(["if=/dev/zero", &to, "bs=1M", "count=4", "conv=notrunc"]).output().unwrap();
    assert!(String::from_utf8_lossy(&too_long.stderr).contains("No space left on device"));
}
