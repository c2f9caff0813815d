//! What is read and written, flushed, discarded and zeroed, and what happens when the backend fails.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use r3map_block::{BlockSettings, Kind};
use r3map_core::{Backend, ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Link, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{fill, in_vm};
use rustix::fs::OFlags;

use crate::support::{KINDS, aligned, app, device, name, open_direct, run, try_device, unmount};

const SIZE: u64 = 8 << 20;
const LEN: usize = 8 << 20;
const WEEK: Duration = Duration::from_secs(7 * 24 * 60 * 60);

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_is_read_and_written() {
    if !in_vm() {
        return;
    }
    // What lends its bytes, and what does not and takes time for each request.
    for (kind, slow) in [(Kind::Ublk, false), (Kind::Ublk, true), (Kind::Nbd, false), (Kind::Nbd, true)] {
        let store = Arc::new(Store::new(SIZE).filled(1));
        let backend: Arc<dyn Backend> = match slow {
            false => store.clone(),
            true => Link::new(store.clone(), Duration::from_millis(2), None),
        };
        let device = device(kind, backend).await;
        let path = device.path().to_owned();
        assert_eq!((device.size(), device.kind()), (SIZE, kind));
        app(move || {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut seen = vec![0; LEN];
            file.read_exact_at(&mut seen, 0).unwrap();
            assert!(seen == fill::bytes(0, LEN, 1));
            file.write_all_at(&fill::bytes(12345, 1 << 20, 2), 12345).unwrap();
            file.sync_all().unwrap();
            assert!(file.read_exact_at(&mut [0], SIZE).is_err(), "past the end");
        })
        .await;
        let mut expected = fill::bytes(0, LEN, 1);
        expected[12345..12345 + (1 << 20)].copy_from_slice(&fill::bytes(12345, 1 << 20, 2));
        assert!(store.snapshot() == expected, "{kind}, slow: {slow}");
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapping_is_the_region() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let store = Arc::new(Store::new(SIZE).filled(1));
        let device = device(kind, store.clone()).await;
        let mapping = device.map().await.unwrap();
        app(move || {
            let mut seen = vec![0; LEN];
            mapping.read(0, &mut seen).unwrap();
            assert!(seen == fill::bytes(0, LEN, 1));
            mapping.write(4090, &fill::bytes(4090, 10_000, 3)).unwrap();
            mapping.sync().unwrap();
        })
        .await;
        assert!(store.snapshot()[4090..14_090] == fill::bytes(4090, 10_000, 3));
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_synced_or_written_through_survives_the_remotes_crash() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let store = Arc::new(Store::new(SIZE).volatile_cache());
        let faults = Faults::new(store.clone());
        let device = device(kind, faults.clone()).await;
        let path = device.path().to_owned();
        app(move || {
            let (mut buffer, at) = aligned(4096);
            buffer[at..].fill(7);
            // Past the cache and durable at once: a write with FUA.
            open_direct(&path, OFlags::DSYNC).write_all_at(&buffer[at..at + 4096], 0).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[8; 4096], 4096).unwrap();
            file.sync_all().unwrap();
            // Never made durable.
            open_direct(&path, OFlags::empty()).write_all_at(&buffer[at..at + 4096], 8192).unwrap();
        })
        .await;
        assert!(faults.count(Operation::Flush) >= 2, "{kind}");
        store.lose_unflushed();
        let kept = store.snapshot();
        assert!(
            kept[..4096] == [7; 4096] && kept[4096..8192] == [8; 4096] && kept[8192..12_288] == [0; 4096],
            "{kind}"
        );
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn discards_trim_and_zeros_are_zeros() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let store = Arc::new(Store::new(SIZE).filled(1));
        let faults = Faults::new(store.clone());
        let device = device(kind, faults.clone()).await;
        let path = name(device.path());
        app(move || {
            run("blkdiscard", &["--offset", "4096", "--length", "1048576", &path]);
            run("blkdiscard", &["--zeroout", "--offset", "2097152", "--length", "65536", &path]);
        })
        .await;
        assert_eq!(faults.bytes(Operation::Trim), 1 << 20, "{kind}");
        // The kernel's NBD client knows no writing of zeros: they arrive as bytes.
        let sent = if kind == Kind::Ublk { (1 << 16, 0) } else { (0, 1 << 16) };
        assert_eq!((faults.bytes(Operation::WriteZeroes), faults.bytes(Operation::Write)), sent, "{kind}");
        let mut expected = fill::bytes(0, LEN, 1);
        expected[4096..4096 + (1 << 20)].fill(0);
        expected[2 << 20..(2 << 20) + (1 << 16)].fill(0);
        assert!(store.snapshot() == expected, "{kind}");
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_can_do_less_is_not_asked_for_more() {
    if !in_vm() {
        return;
    }
    let store = Arc::new(Store::new(SIZE).filled(1).plain());
    let device = device(Kind::Ublk, store.clone()).await;
    let path = name(device.path());
    app(move || {
        let discarded = std::process::Command::new("blkdiscard").arg(&path).output().unwrap();
        assert!(!discarded.status.success(), "there is no trim to offer");
        run("blkdiscard", &["--zeroout", "--length", "65536", &path]);
    })
    .await;
    let mut expected = fill::bytes(0, LEN, 1);
    expected[..1 << 16].fill(0);
    assert!(store.snapshot() == expected);
    unmount(device).await;

    let read_only = Arc::new(Store::new(SIZE).filled(1).read_only());
    for kind in KINDS {
        let device = crate::support::device(kind, read_only.clone()).await;
        assert!(device.is_read_only());
        let path = device.path().to_owned();
        app(move || {
            let opened = std::fs::OpenOptions::new().write(true).open(path);
            let written = opened.and_then(|file| file.write_all_at(&[1; 512], 0).and_then(|()| file.sync_all()));
            assert!(written.is_err());
        })
        .await;
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_errors_and_never_zeros() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let store = Arc::new(Store::new(SIZE).filled(1));
        let faults = Faults::new(store.clone());
        let device = device(kind, faults.clone()).await;
        faults.add(Rule::on(Operation::Read).fail(ErrorKind::Corrupt));
        faults.add(Rule::on(Operation::Flush).fail(ErrorKind::Unavailable));
        let path = device.path().to_owned();
        let file = app(move || {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut seen = vec![9; 4096];
            file.read_exact_at(&mut seen, 1 << 20).unwrap_err();
            assert!(seen == [9; 4096]);
            file.write_all_at(&[5; 4096], 4 << 20).unwrap();
            file.sync_all().unwrap_err();
            file
        })
        .await;
        faults.clear();
        app(move || {
            let mut seen = vec![9; 4096];
            file.read_exact_at(&mut seen, 1 << 20).unwrap();
            assert!(seen == fill::bytes(1 << 20, 4096, 1), "it works again");
            file.sync_all().unwrap();
        })
        .await;
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_served_at_the_same_time_and_a_slow_one_holds_up_nobody() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1).plain()));
        let settings = BlockSettings { queues: std::num::NonZeroU16::new(1), ..BlockSettings::default() };
        let device = try_device(kind, faults.clone(), settings).await.unwrap();
        let pause = r3map_testkit::faults::Pause::new();
        faults.add(Rule::on(Operation::Read).touching(0..4096).hold(&pause));
        let path = device.path().to_owned();
        let held = std::thread::spawn({
            let path = path.clone();
            move || {
                let (mut buffer, at) = aligned(4096);
                open_direct(&path, OFlags::empty()).read_exact_at(&mut buffer[at..at + 4096], 0).unwrap();
                assert!(buffer[at..at + 4096] == fill::bytes(0, 4096, 1));
            }
        });
        app(move || {
            let (mut buffer, at) = aligned(4096);
            let file = open_direct(&path, OFlags::empty());
            for block in 1..20 {
                file.read_exact_at(&mut buffer[at..at + 4096], block * 4096).unwrap();
                assert!(buffer[at..at + 4096] == fill::bytes(block * 4096, 4096, 1));
            }
        })
        .await;
        assert!(!held.is_finished());
        pause.release();
        app(move || held.join().unwrap()).await;
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_is_asked_at_once_than_queues_and_depth_allow() {
    if !in_vm() {
        return;
    }
    let slow = Link::new(Arc::new(Store::new(SIZE).filled(1)), Duration::from_millis(5), None);
    let faults = Faults::new(slow);
    let settings = BlockSettings {
        queues: std::num::NonZeroU16::new(2),
        depth: std::num::NonZeroU16::new(4).unwrap(),
        ..BlockSettings::default()
    };
    let device = try_device(Kind::Ublk, faults.clone(), settings).await.unwrap();
    let queues = std::fs::read_dir(sys_block(device.path()).join("mq")).unwrap().count();
    assert_eq!(queues, 2, "the virtual machine has two processors");
    let path = device.path().to_owned();
    app(move || {
        std::thread::scope(|scope| {
            for user in 0..16 {
                let file = open_direct(&path, OFlags::empty());
                scope.spawn(move || {
                    let (mut buffer, at) = aligned(4096);
                    for block in (user..SIZE / 4096).step_by(97) {
                        file.read_exact_at(&mut buffer[at..at + 4096], block * 4096).unwrap();
                        assert!(buffer[at..at + 4096] == fill::bytes(block * 4096, 4096, 1));
                    }
                });
            }
        });
    })
    .await;
    let most = faults.most_in_flight();
    assert!((2..=8).contains(&most), "{most} at once");
    unmount(device).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_sets_no_limit_of_its_own_and_has_one_connection() {
    if !in_vm() {
        return;
    }
    let device = device(Kind::Nbd, Arc::new(Store::new(SIZE))).await;
    let device_of_the_kernel = sys_block(device.path());
    let limit = std::fs::read_to_string(device_of_the_kernel.join("queue/io_timeout")).unwrap();
    assert!(Duration::from_millis(limit.trim().parse().unwrap()) > WEEK, "{limit} ms");
    // There is no second one to try again on, while the first is still at it.
    assert_eq!(std::fs::read_dir(device_of_the_kernel.join("mq")).unwrap().count(), 1);
    unmount(device).await;
}

/// What the kernel tells of a device.
fn sys_block(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(device.file_name().unwrap())
}
