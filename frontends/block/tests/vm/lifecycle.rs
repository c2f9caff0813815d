//! Making, detaching, and doing so at the wrong time.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_block::{BlockSettings, Keep, Kind, Meanwhile};
use r3map_core::{ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, in_vm};
use rustix::fs::OFlags;

use crate::support::{
    KINDS, Mounted, SOON, aligned, app, device, each_kind, name, open_direct, run, try_device, unmount, wait_until,
};

const SIZE: u64 = 16 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn detaching_stores_what_the_kernel_has_cached() {
    if !in_vm() {
        return;
    }
    for kind in KINDS {
        let store = Arc::new(Store::new(SIZE).volatile_cache());
        let device = device(kind, store.clone()).await;
        let path = device.path().to_owned();
        // Written to the kernel's cache only, and closed; the last close may write it, but makes nothing durable.
        app(move || {
            std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[3; 8192], 4096).unwrap()
        })
        .await;
        unmount(device).await;
        store.lose_unflushed();
        assert!(store.snapshot()[4096..12_288] == [3; 8192], "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_device_is_not_detached_unless_that_is_forced() {
    if !in_vm() {
        return;
    }
    each_kind(async |kind| {
        let store = Arc::new(Store::new(4 << 20));
        let device = device(kind, store.clone()).await;
        let path = device.path().to_owned();
        let mounted = app(move || {
            run("mkfs.ext4", &["-q", "-F", &name(&path)]);
            Mounted::new(&path)
        })
        .await;
        let error = device.unmount().await.unwrap_err();
        assert_eq!((error.kind(), error.operation()), (ErrorKind::Conflict, Operation::Close), "{kind}: {error}");
        let file = mounted.path("file");
        app(move || std::fs::write(file, "it works as before").unwrap()).await;
        // What is mounted sees errors from then on; nothing hangs.
        let _ = deadline(SOON, "forcing", device.detach()).await;
        // As the kernel ends a ublk device, the file system on it writes what it holds.
        let holds = |bytes: &[u8]| store.snapshot().windows(bytes.len()).any(|window| window == bytes);
        assert!(kind != Kind::Ublk || holds(b"it works as before"));
        let file = mounted.path("file");
        app(move || {
            let written = std::fs::write(&file, vec![1; 1 << 20]);
            let synced = written.and_then(|()| std::fs::File::open(&file)?.sync_all());
            assert!(synced.is_err(), "there is nothing below any more");
            drop(mounted);
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_mount_a_device_that_is_being_detached() {
    if !in_vm() {
        return;
    }
    each_kind(async |kind| {
        let faults = Faults::new(Arc::new(Store::new(SIZE).plain()));
        let device = device(kind, faults.clone()).await;
        let path = device.path().to_owned();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Read).touching(0..4096).hold(&pause));
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let (mut buffer, at) = aligned(4096);
                open_direct(&path, OFlags::empty()).read_exact_at(&mut buffer[at..at + 4096], 0)
            }
        });
        deadline(SOON, "reading", pause.wait_held(1)).await;
        let flushes = faults.count(Operation::Flush);
        let leaving = tokio::spawn(unmount(device));
        app(move || {
            wait_until("what was written is flushed", || faults.count(Operation::Flush) > flushes);
            // It is not gone yet, because the read is under way.
            for _ in 0..50 {
                let mut exclusive = std::fs::OpenOptions::new();
                let exclusive = exclusive.read(true).custom_flags(OFlags::EXCL.bits().cast_signed());
                assert!(exclusive.open(&path).is_err(), "{kind}");
                std::thread::sleep(Duration::from_millis(10));
            }
        })
        .await;
        pause.release();
        leaving.await.unwrap();
        // Its user merely had it open: whether it is still answered is not promised.
        let _ = app(move || reader.join().unwrap()).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_somebody_removes_is_noticed() {
    if !in_vm() {
        return;
    }
    let device = device(Kind::Ublk, Arc::new(Store::new(SIZE))).await;
    let error = r3map_block::remove(device.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}: it is being served");
    let id = name(device.path())["/dev/ublkb".len()..].parse().unwrap();
    app(move || r3map_sys::ublk::Control::open(SOON).unwrap().stop(id).unwrap()).await;
    deadline(SOON, "noticing", device.gone()).await;
    unmount(device).await;
}

/// The names of all ublk devices and their channels.
fn ublk_nodes() -> BTreeSet<OsString> {
    let nodes = ["/sys/class/ublk-char", "/dev"].into_iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let names = nodes.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| ["ublkb", "ublkc"].iter().any(|start| name.as_encoded_bytes().starts_with(start.as_bytes())))
        .collect()
}

fn kept(id: u32) -> BlockSettings {
    let keep = Keep { id, region: "one".to_owned(), meanwhile: Meanwhile::Wait };
    BlockSettings { keep: Some(keep), ..BlockSettings::default() }
}

/// The kernel reads the partition table before it says that a device has started.
#[tokio::test(flavor = "multi_thread")]
async fn a_remote_that_does_not_answer_cannot_hold_up_the_start_of_a_device_for_ever() {
    if !in_vm() {
        return;
    }
    let before = ublk_nodes();
    let open = async |settings: BlockSettings| {
        let faults = Faults::new(Arc::new(Store::new(SIZE)));
        faults.add(Rule::on(Operation::Read).hang());
        let hasty = BlockSettings { start_limit: Duration::from_secs(2), ..settings.clone() };
        let start = Instant::now();
        let error = try_device(Kind::Ublk, faults.clone(), hasty).await.err().expect("the table cannot be read");
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.message().contains("does not start in time"), "{error}");
        assert!(faults.count(Operation::Read) > 0, "it was a read that did not end");
        deadline(SOON, "giving up what hangs", faults.wait_idle()).await;
        settings
    };
    let tried = tokio::join!(open(BlockSettings::default()), open(kept(6)));
    app(move || wait_until("nothing stays behind", || ublk_nodes().is_subset(&before))).await;
    for settings in <[_; 2]>::from(tried) {
        let device = try_device(Kind::Ublk, Arc::new(Store::new(SIZE).filled(1)), settings).await.unwrap();
        let path = device.path().to_owned();
        let mut seen = [0; 512];
        let seen = app(move || std::fs::File::open(path).unwrap().read_exact_at(&mut seen, 0).map(|()| seen)).await;
        r3map_testkit::fill::check(&seen.unwrap(), 0, 1).unwrap();
        unmount(device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_whose_node_does_not_appear_is_removed() {
    if !in_vm() {
        return;
    }
    let before = ublk_nodes();
    // The kernel does not replace what has the name already.
    std::fs::write("/dev/ublkb5", "").unwrap();
    let hasty = BlockSettings { start_limit: Duration::from_secs(2), ..kept(5) };
    let tried = try_device(Kind::Ublk, Arc::new(Store::new(SIZE)), hasty).await;
    std::fs::remove_file("/dev/ublkb5").unwrap();
    let error = tried.err().expect("there is no node");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert!(error.message().contains("does not appear"), "{error}");
    app(move || wait_until("nothing stays behind", || ublk_nodes().is_subset(&before))).await;
}

/// Each clears away what killed processes left behind; what another one is just making is none of that.
#[tokio::test(flavor = "multi_thread")]
async fn devices_that_are_made_at_the_same_time_do_not_disturb_each_other() {
    if !in_vm() {
        return;
    }
    for _ in 0..3 {
        let made = (0..4u64).map(|seed| {
            let store = Arc::new(Store::new(SIZE).filled(seed));
            tokio::spawn(async move { (seed, device(Kind::Ublk, store).await) })
        });
        for made in made.collect::<Vec<_>>() {
            let (seed, device) = made.await.unwrap();
            let path = device.path().to_owned();
            let mut seen = [0; 512];
            app(move || std::fs::File::open(path).unwrap().read_exact_at(&mut seen, 0).map(|()| seen))
                .await
                .map(|seen| assert!(seen[..] == r3map_testkit::fill::bytes(0, 512, seed)))
                .unwrap();
            unmount(device).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_devices_at_once() {
    if !in_vm() {
        return;
    }
    let mut devices = Vec::new();
    for number in 0..3u8 {
        for kind in KINDS {
            let store = Arc::new(Store::new(SIZE));
            let device = device(kind, store.clone()).await;
            let path = device.path().to_owned();
            app(move || {
                std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[number; 512], 0).unwrap()
            })
            .await;
            devices.push((number, store, device));
        }
    }
    for (number, store, device) in devices {
        unmount(device).await;
        assert_eq!(store.snapshot()[..512], [number; 512]);
    }
}
