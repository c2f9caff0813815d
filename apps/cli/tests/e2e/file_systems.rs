//! A file system on a loop device on the mounted file, and programs that trust it: a source tree and a database.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::fill;
use r3map_testkit::process::Process;
use r3map_testkit::random::Random;

use crate::support::{FileSystem, LoopDevice, MIB, Mounted, SOON, Scene, wait_until};

const LONG: Duration = Duration::from_secs(240);
const SIZE: u64 = 192 * MIB;
/// How many files the tree has.
const FILES: usize = 3000;
/// How many transactions there are before something is killed.
const TRANSACTIONS: u64 = 25;

fn make_empty(path: &Path, size: u64) {
    File::create(path).and_then(|file| file.set_len(size)).expect("a sparse file can be made");
}

/// No file of a source tree is longer.
const LONGEST: u64 = 1 << 20;

/// Copies the sources in a folder, which somebody may be working in: what is built and what is hidden is left out, and so
/// is what has gone since it was listed.
fn copy_sources(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("there is room");
    for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        if name == "target" || name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        match entry.metadata() {
            Ok(found) if found.is_dir() => copy_sources(&path, &to.join(name)),
            Ok(found) if found.is_file() && found.len() <= LONGEST => match std::fs::read(&path) {
                Ok(bytes) => std::fs::write(to.join(name), bytes).expect("there is room"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{}: {error}", path.display()),
            },
            _ => {}
        }
    }
}

/// A source tree in a tar file: some thousand small files in folders of folders, a few larger ones, and r3map's own.
fn make_tree(scene: &Scene) -> String {
    let mut random = Random::new(1);
    for number in 0..FILES {
        let folder = scene.path(&format!("tree/module{}/part{}", number / 100, number / 10 % 10));
        std::fs::create_dir_all(&folder).expect("there is room");
        let len = if number % 500 == 0 { 2 << 20 } else { random.below(9000) };
        let bytes = fill::bytes(0, usize::try_from(len).expect("it is short"), random.next_u64());
        std::fs::write(folder.join(format!("file{number}.rs")), bytes).expect("there is room");
    }
    copy_sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")), &scene.path("tree/r3map"));
    assert!(scene.path("tree/r3map/Cargo.lock").exists(), "that is a source tree");
    scene.run(SOON, "tar", &["-C", &scene.name("."), "-cf", &scene.name("tree.tar"), "tree"]);
    scene.name("tree.tar")
}

#[test]
fn a_source_tree_on_ext4() {
    Scene::with_root(LONG, |scene| {
        make_empty(&scene.path("source"), SIZE);
        let tar = make_tree(scene);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &["--push-interval", "500ms"]);
        let device = LoopDevice::attach(scene, mounted.name());
        FileSystem::make(scene, &device);
        let disk = FileSystem::mount(scene, &device, "disk");
        scene.run(SOON, "tar", &["-C", &scene.name("disk"), "-xf", &tar]);
        scene.run(SOON, "sync", &["-f", &scene.name("disk")]);
        scene.run(SOON, "diff", &["-r", &scene.name("tree"), &scene.name("disk/tree")]);
        disk.unmount(scene);
        device.detach(scene);
        mounted.unmount();
        server.stop();

        scene.run(SOON, "e2fsck", &["-fn", &scene.name("source")]);
        let device = LoopDevice::attach(scene, &scene.name("source"));
        let disk = FileSystem::mount(scene, &device, "disk");
        scene.run(SOON, "diff", &["-r", &scene.name("tree"), &scene.name("disk/tree")]);
        disk.unmount(scene);
    });
}

/// A writer that commits numbered transactions and says so after each.
struct Database {
    process: Process,
    /// The number of the last transaction that was acknowledged.
    last: u64,
}

impl Database {
    fn open(scene: &Scene, path: &str) -> Self {
        let mut process = scene.start(Command::new("sqlite3").args(["-bail", path]));
        // What it says on its standard error comes at once. EXTRA also syncs that the journal is gone: without that, a
        // transaction that was acknowledged may be rolled back after a loss of power.
        process.send(
            ".output stderr\nPRAGMA synchronous=EXTRA;\n\
             CREATE TABLE IF NOT EXISTS entries(number INTEGER PRIMARY KEY, body BLOB);\n\
             SELECT 'last ' || coalesce(max(number), 0) FROM entries;\n",
        );
        let last = process.wait_for_line(SOON, "last ")["last ".len()..].parse().expect("a number");
        Self { process, last }
    }

    /// Commits one more, and waits until that is acknowledged.
    fn commit(&mut self) {
        self.begin_commit();
        let next = self.last + 1;
        self.process.wait_for_line(SOON, &format!("done {next}"));
        self.last = next;
    }

    /// Sends one more, and does not wait.
    fn begin_commit(&mut self) {
        let next = self.last + 1;
        self.process.send(&format!(
            "BEGIN; INSERT INTO entries VALUES({next}, randomblob({})); COMMIT; SELECT 'done {next}';\n",
            500 + next * 37 % 20_000
        ));
    }
}

/// Checks the database, and that it has at least every transaction that was acknowledged.
fn check(scene: &Scene, path: &str, acknowledged: u64) {
    assert_eq!(scene.run(SOON, "sqlite3", &[path, "PRAGMA integrity_check"]), "ok");
    let found: u64 = scene.run(SOON, "sqlite3", &[path, "SELECT count(*) FROM entries"]).parse().expect("a number");
    let last: u64 = scene.run(SOON, "sqlite3", &[path, "SELECT max(number) FROM entries"]).parse().expect("a number");
    assert_eq!(found, last, "none is missing in between");
    assert!(last >= acknowledged, "{acknowledged} were acknowledged, {last} are there");
}

#[test]
fn a_database_whose_writer_is_killed() {
    Scene::with_root(LONG, |scene| {
        make_empty(&scene.path("source"), SIZE / 2);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &["--push-interval", "200ms"]);
        let device = LoopDevice::attach(scene, mounted.name());
        FileSystem::make(scene, &device);
        let disk = FileSystem::mount(scene, &device, "disk");
        let path = scene.name("disk/entries.db");
        let mut acknowledged = 0;
        for _ in 0..2 {
            let mut database = Database::open(scene, &path);
            assert!(database.last >= acknowledged);
            (0..TRANSACTIONS).for_each(|_| database.commit());
            database.begin_commit();
            database.process.kill();
            acknowledged = database.last;
            check(scene, &path, acknowledged);
        }
        disk.unmount(scene);
        device.detach(scene);
        mounted.unmount();
        server.stop();
        scene.run(SOON, "e2fsck", &["-fn", &scene.name("source")]);
        let device = LoopDevice::attach(scene, &scene.name("source"));
        let disk = FileSystem::mount(scene, &device, "disk");
        check(scene, &path, acknowledged);
        disk.unmount(scene);
    });
}

#[test]
fn a_database_whose_mount_is_killed_with_fsync_remote() {
    killed_mount("remote");
}

#[test]
fn a_database_whose_mount_is_killed_with_fsync_local() {
    killed_mount("local");
}

fn killed_mount(fsync: &'static str) {
    Scene::with_root(LONG, move |scene| {
        make_empty(&scene.path("source"), SIZE / 2);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.name("cache");
        let arguments = ["--cache", &cache, "--fsync", fsync, "--push-interval", "1s"];
        let path = scene.name("disk/entries.db");
        let mut acknowledged = 0;
        for life in 0..3 {
            let mounted = scene.mount(&server.uri, "region", &arguments);
            let device = LoopDevice::attach(scene, mounted.name());
            if life == 0 {
                FileSystem::make(scene, &device);
                scene.run(SOON, "sync", &[&device.name]);
            }
            let disk = FileSystem::mount(scene, &device, "disk");
            let mut database = Database::open(scene, &path);
            assert!(database.last >= acknowledged, "life {life}: {acknowledged} acknowledged, {} there", database.last);
            (0..TRANSACTIONS).for_each(|_| database.commit());
            database.begin_commit();
            acknowledged = database.last;
            abandon(scene, mounted, disk, device, database);
        }
        // The last life ends well, and everything is at the source.
        let mounted = scene.mount(&server.uri, "region", &arguments);
        let device = LoopDevice::attach(scene, mounted.name());
        let disk = FileSystem::mount(scene, &device, "disk");
        check(scene, &path, acknowledged);
        disk.unmount(scene);
        device.detach(scene);
        mounted.unmount();
        server.stop();
        scene.run(SOON, "e2fsck", &["-fn", &scene.name("source")]);
        let device = LoopDevice::attach(scene, &scene.name("source"));
        let disk = FileSystem::mount(scene, &device, "disk");
        check(scene, &path, acknowledged);
        disk.unmount(scene);
    });
}

/// Kills the mount under everything that stands on it, and clears away what is left.
fn abandon(scene: &Scene, mounted: Mounted, disk: FileSystem, device: LoopDevice, mut database: Database) {
    mounted.kill();
    scene.step("the writer ends, for its disk is gone");
    database.process.wait(SOON);
    drop(database);
    drop(disk);
    let name = device.name.clone();
    drop(device);
    // The device is free once the file system has given up.
    wait_until(SOON, "the loop device is free", || {
        let devices = scene.run(SOON, "losetup", &["--list", "--noheadings", "--output", "NAME"]);
        !devices.lines().any(|line| line == name)
    });
}
