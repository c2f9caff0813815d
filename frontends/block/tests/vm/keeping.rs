//! ublk devices that outlive their daemon.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use r3map_block::{BlockDevice, BlockSettings, Keep, Kind, Meanwhile};
use r3map_core::{Backend, ErrorKind, Operation, Result};
use r3map_local::{File, FileSettings};
use r3map_sys::ublk::DeviceState;
use r3map_testkit::faults::{Faults, Rule};
use r3map_testkit::process::Process;
use r3map_testkit::store::Store;
use r3map_testkit::{crash, deadline, fill, in_vm};
use rustix::fs::OFlags;

use crate::support::{SOON, aligned, app, name, open_direct, try_device, unmount, wait_until};

const SIZE: u64 = 8 << 20;
const TEST: &str = "keeping::a_restarted_daemon_takes_its_device_over_under_load";

fn settings(id: u32, region: &str, meanwhile: Meanwhile) -> BlockSettings {
    BlockSettings { keep: Some(Keep { id, region: region.to_owned(), meanwhile }), ..BlockSettings::default() }
}

/// Of a device whose requests wait while nobody serves it.
fn waiting(id: u32, region: &str) -> BlockSettings {
    settings(id, region, Meanwhile::Wait)
}

/// Serves a file as a kept device in this process, says so, and waits to be killed. Both are in the argument.
fn serve(argument: &str) -> ! {
    let (id, file) = argument.split_once(' ').unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let backend = File::open(Path::new(file), &FileSettings::default()).unwrap();
    let device = runtime.block_on(try_device(Kind::Ublk, Arc::new(backend), waiting(id.parse().unwrap(), file)));
    let device = device.unwrap();
    crash::stop(&format!("device {}", device.path().display()));
}

fn daemon(id: u32, file: &Path) -> Process {
    let mut child = crash::child(TEST, "daemon", &format!("{id} {}", name(file)));
    child.wait_for_line(SOON, &format!("device /dev/ublkb{id}"));
    child
}

/// Writes numbered blocks, one after the other, and reads each back; fails at the first error.
fn count_up(file: &std::fs::File, stop: &AtomicBool, reached: &AtomicU64) {
    let (mut buffer, at) = aligned(4096);
    for number in 1u64.. {
        if stop.load(Relaxed) {
            return;
        }
        let place = number % (SIZE / 4096) * 4096;
        let part = &mut buffer[at..at + 4096];
        part.fill(number.to_le_bytes()[0]);
        part[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all_at(part, place).unwrap();
        part.fill(0);
        file.read_exact_at(part, place).unwrap();
        assert_eq!(part[..8], number.to_le_bytes());
        reached.store(number, Relaxed);
    }
}

#[test]
fn a_restarted_daemon_takes_its_device_over_under_load() {
    if let Some(argument) = crash::role("daemon") {
        serve(&argument);
    }
    if !in_vm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("region");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let mut child = daemon(7, &path);
    let (stop, reached) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let file = open_direct(Path::new("/dev/ublkb7"), OFlags::empty());
        let (stop, reached) = (&stop, &reached);
        let user = scope.spawn(move || count_up(&file, stop, reached));
        for _ in 0..2 {
            let before = reached.load(Relaxed);
            wait_until("the user gets on", || reached.load(Relaxed) > before + 20);
            child.kill();
            child = daemon(7, &path);
        }
        let before = reached.load(Relaxed);
        wait_until("the user gets on again", || reached.load(Relaxed) > before + 20);
        stop.store(true, Relaxed);
        user.join().unwrap();
    });
    child.kill();
    // Nobody takes it over: who waits for it gets an error once it is removed.
    let waiting = std::thread::spawn(|| {
        let (mut buffer, at) = aligned(4096);
        open_direct(Path::new("/dev/ublkb7"), OFlags::empty()).read_exact_at(&mut buffer[at..at + 4096], 0)
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished());
    wait_until("it is removed", || r3map_block::remove(Path::new("/dev/ublkb7")).is_ok());
    assert!(waiting.join().unwrap().is_err());
    let written = std::fs::read(&path).unwrap();
    let last = reached.load(Relaxed);
    let place = usize::try_from(last % (SIZE / 4096) * 4096).unwrap();
    assert_eq!(written[place..place + 8], last.to_le_bytes(), "the file has what was acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_same_region_gets_a_kept_device_and_only_once() {
    if !in_vm() {
        return;
    }
    let store = Arc::new(Store::new(SIZE).filled(1));
    let device = try_device(Kind::Ublk, store.clone(), waiting(8, "one")).await.unwrap();
    assert_eq!(device.path(), PathBuf::from("/dev/ublkb8"));
    let other = try_device(Kind::Ublk, store.clone(), waiting(8, "two")).await.err().unwrap();
    assert_eq!(other.kind(), ErrorKind::Conflict);
    assert!(other.message().contains("another region"), "{other}");
    let again = try_device(Kind::Ublk, store.clone(), waiting(8, "one")).await.err().unwrap();
    assert_eq!(again.kind(), ErrorKind::Conflict);
    assert!(again.message().contains("is served by process"), "{again}");
    // What the device's users were told goes on to hold.
    let same = waiting(8, "one");
    for (wrong, says) in [
        (BlockSettings { read_only: true, ..same.clone() }, "made with writes allowed"),
        (BlockSettings { max_request: 4096, ..same.clone() }, "made with requests of up to 1048576 bytes"),
        (BlockSettings { logical_block_size: 4096, ..same }, "made with logical blocks of 512 bytes"),
    ] {
        let error = try_device(Kind::Ublk, store.clone(), wrong).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.message().contains(says), "{error}");
    }
    unmount(device).await;
    assert!(!Path::new("/dev/ublkb8").exists(), "a good end keeps nothing");
    let device = try_device(Kind::Ublk, store, waiting(8, "two")).await.unwrap();
    unmount(device).await;
}

/// A kept device whose daemon was killed, and who waits for it.
struct Orphan {
    id: u32,
    path: PathBuf,
    file: tempfile::NamedTempFile,
    reader: JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Orphan {
    async fn new(id: u32) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), fill::bytes(0, usize::try_from(SIZE).unwrap(), 1)).unwrap();
        let path = PathBuf::from(format!("/dev/ublkb{id}"));
        let (region, device) = (file.path().to_owned(), path.clone());
        let reader = app(move || {
            let mut child = daemon(id, &region);
            let opened = open_direct(&device, OFlags::empty());
            child.kill();
            std::thread::spawn(move || {
                let (mut buffer, at) = aligned(4096);
                opened.read_exact_at(&mut buffer[at..at + 4096], 8192).map(|()| buffer[at..at + 4096].to_vec())
            })
        });
        let orphan = Self { id, path, file, reader: reader.await };
        orphan.is_served_by_nobody().await;
        orphan
    }

    /// Waits until the kernel is done with who served it.
    async fn is_served_by_nobody(&self) {
        let id = self.id;
        let state = move || r3map_sys::ublk::Control::open(SOON).unwrap().info(id).unwrap().state();
        app(move || wait_until("the kernel notices", || state() == DeviceState::Quiesced)).await;
    }

    async fn take_over(&self, backend: Arc<dyn Backend>, start_limit: Duration) -> Result<BlockDevice> {
        let settings = BlockSettings { start_limit, ..waiting(self.id, &name(self.file.path())) };
        try_device(Kind::Ublk, backend, settings).await
    }

    /// Another size is refused before anything is done. The other one fails when all but its last step has been done: it
    /// has been asked for what the reader waits for, from a remote that does not answer.
    async fn take_over_in_vain(&self) {
        let larger = self.take_over(Arc::new(Store::new(SIZE * 2)), SOON).await.err().expect("it is another size");
        assert_eq!(larger.kind(), ErrorKind::Conflict, "{larger}");
        assert!(larger.message().contains(&format!("another size, {SIZE} bytes; remove it first")), "{larger}");

        let silent = Faults::new(Arc::new(Store::new(SIZE)));
        silent.add(Rule::on(Operation::Read).hang());
        let aside = self.path.with_extension("aside");
        std::fs::rename(&self.path, &aside).unwrap();
        let failed = self.take_over(silent.clone(), Duration::from_secs(2)).await;
        std::fs::rename(&aside, &self.path).unwrap();
        let failed = failed.err().expect("its node is not there");
        assert_eq!(failed.kind(), ErrorKind::NotFound, "{failed}");
        assert!(failed.message().contains("does not appear"), "{failed}");
        assert_eq!(silent.count(Operation::Read), 1, "it had begun");
        deadline(SOON, "giving up what hangs", silent.wait_idle()).await;
        self.is_served_by_nobody().await;
        assert!(!self.reader.is_finished(), "its user notices nothing but a pause");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_take_over_that_fails_leaves_the_device_to_the_next_one() {
    if !in_vm() {
        return;
    }
    let taken_over = async {
        let orphan = Orphan::new(10).await;
        orphan.take_over_in_vain().await;
        let backend = File::open(orphan.file.path(), &FileSettings::default()).unwrap();
        let device = orphan.take_over(Arc::new(backend), SOON).await.unwrap();
        assert_eq!(device.path(), orphan.path);
        let seen = app(move || orphan.reader.join().unwrap()).await.unwrap();
        fill::check(&seen, 8192, 1).unwrap();
        unmount(device).await;
    };
    let removed = async {
        let orphan = Orphan::new(11).await;
        orphan.take_over_in_vain().await;
        let path = orphan.path.clone();
        app(move || r3map_block::remove(&path).unwrap()).await;
        app(move || orphan.reader.join().unwrap()).await.expect_err("it is gone");
        app(move || wait_until("its node is gone", || !orphan.path.exists())).await;
    };
    tokio::join!(taken_over, removed);
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_meanwhile_works_or_says_what_it_needs() {
    if !in_vm() {
        return;
    }
    let able = app(|| r3map_sys::ublk::Control::open(SOON).unwrap().features().unwrap()).await;
    let made = try_device(Kind::Ublk, Arc::new(Store::new(SIZE)), settings(9, "one", Meanwhile::Fail)).await;
    match made {
        Ok(device) => unmount(device).await,
        Err(error) => {
            assert!(!able.contains(r3map_sys::ublk::Features::RECOVERY_FAIL_IO));
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.message().contains("Linux 6.13"), "{error}");
        }
    }
}
