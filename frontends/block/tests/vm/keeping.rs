//! ublk devices that outlive their daemon.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use r3map_block::{BlockSettings, Keep, Kind, Meanwhile};
use r3map_core::ErrorKind;
use r3map_local::{File, FileSettings};
use r3map_testkit::process::Process;
use r3map_testkit::store::Store;
use r3map_testkit::{crash, in_vm};
use rustix::fs::OFlags;

use crate::support::{SOON, aligned, app, name, open_direct, try_device, unmount, wait_until};

const SIZE: u64 = 8 << 20;
const TEST: &str = "keeping::a_restarted_daemon_takes_its_device_over_under_load";

fn settings(id: u32, region: &str, meanwhile: Meanwhile) -> BlockSettings {
    BlockSettings { keep: Some(Keep { id, region: region.to_owned(), meanwhile }), ..BlockSettings::default() }
}

/// Serves a file as a kept device in this process, says so, and waits to be killed.
fn serve(file: &str) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let backend = File::open(Path::new(file), &FileSettings::default()).unwrap();
    let device = runtime.block_on(try_device(Kind::Ublk, Arc::new(backend), settings(7, file, Meanwhile::Wait)));
    let device = device.unwrap();
    crash::stop(&format!("device {}", device.path().display()));
}

fn daemon(file: &Path) -> Process {
    let mut child = crash::child(TEST, "daemon", &name(file));
    child.wait_for_line(SOON, "device /dev/ublkb7");
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
    if let Some(file) = crash::role("daemon") {
        serve(&file);
    }
    if !in_vm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("region");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let mut child = daemon(&path);
    let (stop, reached) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let file = open_direct(Path::new("/dev/ublkb7"), OFlags::empty());
        let (stop, reached) = (&stop, &reached);
        let user = scope.spawn(move || count_up(&file, stop, reached));
        for _ in 0..2 {
            let before = reached.load(Relaxed);
            wait_until("the user gets on", || reached.load(Relaxed) > before + 20);
            child.kill();
            child = daemon(&path);
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
    let device = try_device(Kind::Ublk, store.clone(), settings(8, "one", Meanwhile::Wait)).await.unwrap();
    assert_eq!(device.path(), PathBuf::from("/dev/ublkb8"));
    let other = try_device(Kind::Ublk, store.clone(), settings(8, "two", Meanwhile::Wait)).await.err().unwrap();
    assert_eq!(other.kind(), ErrorKind::Conflict);
    assert!(other.message().contains("another region"), "{other}");
    let again = try_device(Kind::Ublk, store.clone(), settings(8, "one", Meanwhile::Wait)).await.err().unwrap();
    assert_eq!(again.kind(), ErrorKind::Conflict);
    assert!(again.message().contains("is served by process"), "{again}");
    // What the device's users were told goes on to hold.
    let same = settings(8, "one", Meanwhile::Wait);
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
    let device = try_device(Kind::Ublk, store, settings(8, "two", Meanwhile::Wait)).await.unwrap();
    unmount(device).await;
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
