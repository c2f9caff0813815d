//! The process that serves a device is killed under load: its users get errors soon, and nothing is left wedged.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use r3map_block::Kind;
use r3map_testkit::crash;
use r3map_testkit::faults::Link;
use r3map_testkit::in_vm;
use r3map_testkit::store::Store;
use rustix::fs::OFlags;

use crate::support::{SOON, aligned, device, open_direct, wait_until};

const SIZE: u64 = 16 << 20;

/// Serves a slow device in this process, says its path, and waits to be killed.
fn serve(kind: Kind) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let backend = Link::new(Arc::new(Store::new(SIZE).filled(1)), Duration::from_millis(20), None);
    let device = runtime.block_on(device(kind, backend));
    crash::stop(&format!("device {}", device.path().display()));
}

/// Reads or writes until that fails.
fn use_up(path: &Path, write: bool, number: u64) -> JoinHandle<std::io::Error> {
    let file = open_direct(path, OFlags::empty());
    std::thread::spawn(move || {
        let (mut buffer, at) = aligned(4096);
        for block in 0.. {
            let place = (number * 97 + block * 13) % (SIZE / 4096) * 4096;
            let part = &mut buffer[at..at + 4096];
            let done = if write { file.write_all_at(part, place) } else { file.read_exact_at(part, place) };
            if let Err(error) = done {
                return error;
            }
        }
        unreachable!("it is endless")
    })
}

fn kill_under_load(kind: Kind, test: &str) {
    let mut child = crash::child(test, "daemon", "");
    let line = child.wait_for_line(SOON, "device ");
    let path = PathBuf::from(&line["device ".len()..]);
    let users: Vec<_> = (0..8).map(|number| use_up(&path, number % 2 == 0, number)).collect();
    std::thread::sleep(Duration::from_millis(500));
    assert!(users.iter().all(|user| !user.is_finished()), "all are at work");
    let start = Instant::now();
    child.kill();
    wait_until("everybody gets an error", || users.iter().all(JoinHandle::is_finished));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    users.into_iter().for_each(|user| drop(user.join().unwrap()));
    // The device is gone or usable again, and a new one works.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(device(kind, Arc::new(Store::new(SIZE).filled(2))));
    assert_eq!(device.path(), path, "what was left behind is used again");
    let mut seen = [0; 512];
    std::fs::File::open(device.path()).unwrap().read_exact_at(&mut seen, 0).unwrap();
    assert!(seen[..] == r3map_testkit::fill::bytes(0, 512, 2));
    runtime.block_on(crate::support::unmount(device));
}

#[test]
fn users_of_a_killed_ublk_daemon_get_errors() {
    if crash::role("daemon").is_some() {
        serve(Kind::Ublk);
    }
    if in_vm() {
        kill_under_load(Kind::Ublk, "killed::users_of_a_killed_ublk_daemon_get_errors");
    }
}

#[test]
fn users_of_a_killed_nbd_daemon_get_errors() {
    if crash::role("daemon").is_some() {
        serve(Kind::Nbd);
    }
    if in_vm() {
        kill_under_load(Kind::Nbd, "killed::users_of_a_killed_nbd_daemon_get_errors");
    }
}
