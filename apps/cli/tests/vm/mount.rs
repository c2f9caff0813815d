//! `r3map mount` as a block device, and `r3map remove`: what is killed, taken over, chosen and refused.

use std::fs::{File, read_link};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use r3map_testkit::in_vm;
use r3map_testkit::process::Process;
use rustix::fs::OFlags;
use serde_json::Value;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
/// How many blocks are written, one after the other and from the beginning again.
const BLOCKS: u64 = 64;
const SIZE: u64 = 4 << 20;

/// A file that is served, and a folder for what else is needed.
struct Scene {
    folder: TempDir,
    uri: String,
    _server: Process,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let uri = format!("grpc+unix://{}/socket", folder.path().display());
        let mut server = start(&["serve", &format!("file:{}", image.display()), "--listen", &uri]);
        server.wait_for_line(LONG, "ready");
        Self { folder, uri, _server: server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Mounts the region; gives back what the command said when it was ready, too.
    fn mount(&self, arguments: &[&str]) -> (Process, Value) {
        let mut command = start(&[&["--json", "mount", &self.uri], arguments].concat());
        let ready = command.wait_for_line(LONG, r#""event":"ready""#);
        (command, serde_json::from_str(&ready).unwrap())
    }

    /// Whether a file or device has every block that was made durable, or what was written there later.
    fn check(&self, synced: u64, place: &Path) {
        let (file, mut block) = (File::open(place).unwrap(), [0; 8]);
        for number in synced.saturating_sub(BLOCKS) + 1..=synced {
            file.read_exact_at(&mut block, number % BLOCKS * BLOCK as u64).unwrap();
            let found = u64::from_le_bytes(block);
            assert!(found >= number && found % BLOCKS == number % BLOCKS, "{found} where {number} was synced");
        }
    }
}

fn start(arguments: &[&str]) -> Process {
    Process::start(Command::new(env!("CARGO_BIN_EXE_r3map")).args(arguments))
}

/// Runs the command to its end; whether it succeeded, and what it said.
fn r3map(arguments: &[&str]) -> (bool, String) {
    let mut process = start(arguments);
    let succeeded = process.wait(LONG).success();
    (succeeded, [process.stdout(), process.stderr()].concat().join("\n"))
}

fn end_well(mut command: Process) {
    command.terminate();
    let status = command.wait(LONG);
    assert!(status.success(), "{status}: {:?} {:?}", command.stdout(), command.stderr());
}

fn device_of(ready: &Value) -> PathBuf {
    ready["path"].as_str().unwrap().into()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not after {LONG:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Writes numbered blocks past the kernel's cache and makes each durable, until it is told to stop or that fails.
fn write_on(device: &Path, synced: &AtomicU64, stop: &AtomicBool) -> std::io::Result<()> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let file = File::options().write(true).custom_flags(direct).open(device)?;
    let mut memory = vec![0; 2 * BLOCK];
    let at = memory.as_ptr().align_offset(BLOCK);
    while !stop.load(Relaxed) {
        let number = synced.load(Relaxed) + 1;
        memory[at..at + 8].copy_from_slice(&number.to_le_bytes());
        file.write_all_at(&memory[at..at + BLOCK], number % BLOCKS * BLOCK as u64)?;
        file.sync_all()?;
        synced.store(number, Relaxed);
    }
    Ok(())
}

/// Waits until more was made durable: a round over all blocks.
fn gets_on(synced: &AtomicU64) {
    let before = synced.load(Relaxed);
    until("the writer gets on", || synced.load(Relaxed) > before + BLOCKS);
}

#[test]
fn a_killed_command_takes_its_device_over_with_all_that_was_synced() {
    if !in_vm() {
        return;
    }
    let scene = Scene::new();
    let cache = scene.path("cache").display().to_string();
    // Synced is what is in the cache file: nothing is pushed before the end.
    let local = ["--cache", &cache, "--fsync", "local", "--push-interval", "1h"];
    let kept = [&["--as", "ublk", "--keep", "3", "--meanwhile", "wait"], &local[..]].concat();
    let (mut command, ready) = scene.mount(&kept);
    let device = device_of(&ready);
    assert_eq!(device, Path::new("/dev/ublkb3"));
    let (succeeded, said) = r3map(&["remove", "/dev/ublkb3"]);
    assert!(!succeeded && said.contains("is served by process"), "{said}");
    let (synced, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_on(&device, &synced, &stop));
        gets_on(&synced);
        command.kill();
        command = scene.mount(&kept).0;
        gets_on(&synced);
        stop.store(true, Relaxed);
        writer.join().unwrap().expect("the writer notices a pause");
    });
    scene.check(synced.load(Relaxed), &device);
    command.kill();
    let (succeeded, said) = r3map(&["remove", "/dev/ublkb3"]);
    assert!(succeeded && said.contains("removed: /dev/ublkb3"), "{said}");
    until("it is gone", || !device.exists());
    // Nothing was pushed, and nothing is lost: the cache file has it.
    end_well(scene.mount(&kept).0);
    scene.check(synced.load(Relaxed), &scene.path("image"));
}

#[test]
fn users_of_a_killed_command_get_errors_and_the_next_one_has_all_that_was_synced() {
    if !in_vm() {
        return;
    }
    for kind in ["ublk", "nbd"] {
        let scene = Scene::new();
        let (cache, link) = (scene.path("cache").display().to_string(), scene.path("disk"));
        let local = ["--cache", &cache, "--fsync", "local", "--push-interval", "1h"];
        let arguments = [&["--as", kind, link.to_str().unwrap()], &local[..]].concat();
        let (mut command, ready) = scene.mount(&arguments);
        let device = device_of(&ready);
        let synced = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| write_on(&device, &synced, &AtomicBool::new(false)));
            gets_on(&synced);
            command.kill();
            writer.join().unwrap().expect_err("nobody serves it");
        });
        let (command, ready) = scene.mount(&arguments);
        assert_eq!(read_link(&link).unwrap(), device_of(&ready), "{kind}: the link leads to where it is now");
        scene.check(synced.load(Relaxed), &link);
        end_well(command);
        assert!(link.symlink_metadata().is_err(), "{kind}");
        scene.check(synced.load(Relaxed), &scene.path("image"));
    }
}

#[test]
fn the_best_kind_is_taken_and_has_the_queues_that_were_asked_for() {
    if !in_vm() {
        return;
    }
    let scene = Scene::new();
    let (command, ready) = scene.mount(&["--as", "auto", "--queues", "2", "--queue-depth", "4"]);
    assert_eq!(ready["as"], "ublk");
    let device = device_of(&ready);
    let queues = Path::new("/sys/block").join(device.file_name().unwrap());
    assert_eq!(std::fs::read_dir(queues.join("mq")).unwrap().count(), 2);
    assert_eq!(std::fs::read_to_string(queues.join("queue/nr_requests")).unwrap().trim(), "4");
    File::options().write(true).open(&device).unwrap().write_all_at(b"by the device", 12_345).unwrap();
    end_well(command);
    let mut bytes = [0; 13];
    File::open(scene.path("image")).unwrap().read_exact_at(&mut bytes, 12_345).unwrap();
    assert_eq!(&bytes, b"by the device");
    let (succeeded, said) = r3map(&["mount", &scene.uri, "--as", "nbd", "--queues", "2"]);
    assert!(!succeeded && said.contains("only ublk devices have queues"), "{said}");
    let (succeeded, said) = r3map(&["mount", &scene.uri, "--as", "ublk", "--queue-depth", "5000"]);
    assert!(!succeeded && said.contains("depth is 5000, it must be at most 4096"), "{said}");
}
