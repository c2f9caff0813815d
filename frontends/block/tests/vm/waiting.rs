//! Remotes that do not answer, for a while or at all. What is shown of them takes seconds in which nothing is done: it all happens
//! at once, in one test.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use r3map_block::{BlockDevice, BlockSettings, Kind};
use r3map_core::{ErrorKind, Operation};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, in_vm};
use rustix::fs::OFlags;
use tokio::task::JoinSet;

use crate::slow::a_remote_that_takes_longer_than_half_a_minute_is_waited_for;
use crate::support::{SOON, aligned, app, each_kind, open_direct, try_device, unmount, wait_until};

const SIZE: u64 = 16 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn remotes_that_do_not_answer() {
    if !in_vm() {
        return;
    }
    let mut all = JoinSet::new();
    all.spawn(a_remote_that_takes_longer_than_half_a_minute_is_waited_for());
    all.spawn(a_remote_that_does_not_answer_cannot_hold_a_device_for_ever());
    all.spawn(an_unmount_that_takes_too_long_leaves_the_device_as_it_was());
    all.spawn(an_unmount_does_not_take_a_device_from_others_whose_requests_hang());
    all.spawn(a_detach_ends_what_hangs_with_errors_and_stores_what_was_acknowledged());
    // To the end, whoever fails: each has said by then what went wrong.
    let mut failed = 0;
    while let Some(done) = all.join_next().await {
        failed += usize::from(done.is_err());
    }
    assert_eq!(failed, 0, "some of them failed, as is said above");
}

async fn a_remote_that_does_not_answer_cannot_hold_a_device_for_ever() {
    each_kind(async |kind| {
        let faults = Faults::new(Arc::new(Store::new(SIZE).plain()));
        let settings = BlockSettings { detach_limit: Duration::from_secs(3), ..BlockSettings::default() };
        let device = try_device(kind, faults.clone(), settings).await.unwrap();
        faults.add(Rule::on(Operation::Write).hang());
        let path = device.path().to_owned();
        let written = faults.clone();
        // It waits, when it closes the device, until that is given up.
        let user = std::thread::spawn(move || {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[3; 4096], 0).unwrap();
            file.sync_all().unwrap_err();
        });
        app(move || wait_until("the write reaches the backend", || written.in_flight() > 0)).await;
        let start = Instant::now();
        device.detach().await.expect_err("something was not stored");
        assert!(start.elapsed() < Duration::from_secs(30), "{kind}");
        app(move || user.join().unwrap()).await;
        drop(device);
    })
    .await;
}

async fn an_unmount_that_takes_too_long_leaves_the_device_as_it_was() {
    each_kind(async |kind| {
        let store = Arc::new(Store::new(SIZE).plain());
        let faults = Faults::new(store.clone());
        let settings = BlockSettings { detach_limit: Duration::from_secs(3), ..BlockSettings::default() };
        let device = try_device(kind, faults.clone(), settings).await.unwrap();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Write).hold(&pause));
        let path = device.path().to_owned();
        // Open until the end: closing it would wait for the write.
        let file = app(move || {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[3; 4096], 0).unwrap();
            file
        })
        .await;
        let error = device.unmount().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}: {error}");
        assert!(device.is_there(), "{kind}");
        pause.release();
        let path = device.path().to_owned();
        app(move || {
            let (mut buffer, at) = aligned(4096);
            let direct = open_direct(&path, OFlags::empty());
            for block in 1..100 {
                direct.write_all_at(&buffer[at..at + 4096], block * 4096).unwrap();
                direct.read_exact_at(&mut buffer[at..at + 4096], block * 4096).unwrap();
            }
            file.sync_all().unwrap();
        })
        .await;
        assert!(device.is_there(), "{kind}");
        unmount(device).await;
        assert!(store.snapshot()[..4096] == [3; 4096], "{kind}");
    })
    .await;
}

/// A device over a remote on which a read hangs and a write was acknowledged, and what the read gives in the end.
struct Hanging {
    store: Arc<Store>,
    device: BlockDevice,
    pause: Pause,
    reader: JoinHandle<std::io::Result<()>>,
}

impl Hanging {
    async fn new(kind: Kind) -> Self {
        let store = Arc::new(Store::new(SIZE).volatile_cache());
        let faults = Faults::new(store.clone());
        let settings = BlockSettings { detach_limit: Duration::from_secs(3), ..BlockSettings::default() };
        let device = try_device(kind, faults.clone(), settings).await.unwrap();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Read).touching(0..4096).hold(&pause));
        let path = device.path().to_owned();
        let reader = std::thread::spawn({
            let path = path.clone();
            move || {
                let (mut buffer, at) = aligned(4096);
                open_direct(&path, OFlags::empty()).read_exact_at(&mut buffer[at..at + 4096], 0)
            }
        });
        deadline(SOON, "reading", pause.wait_held(1)).await;
        app(move || write_direct(&path, 7)).await;
        Self { store, device, pause, reader }
    }
}

fn write_direct(path: &Path, byte: u8) {
    let (mut buffer, at) = aligned(4096);
    buffer[at..].fill(byte);
    open_direct(path, OFlags::empty()).write_all_at(&buffer[at..at + 4096], 8192).unwrap();
}

async fn an_unmount_does_not_take_a_device_from_others_whose_requests_hang() {
    each_kind(async |kind| {
        let Hanging { store, device, pause, reader } = Hanging::new(kind).await;
        let error = deadline(SOON, "unmounting in vain", device.unmount()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}: {error}");
        assert!(error.message().contains("what others ask the device for"), "{kind}: {error}");
        assert!(device.is_there() && !reader.is_finished(), "{kind}");
        let path = device.path().to_owned();
        app(move || write_direct(&path, 8)).await;
        pause.release();
        app(move || reader.join().unwrap()).await.unwrap_or_else(|error| panic!("{kind}: {error}"));
        unmount(device).await;
        store.lose_unflushed();
        assert!(store.snapshot()[8192..12_288] == [8; 4096], "{kind}");
    })
    .await;
}

async fn a_detach_ends_what_hangs_with_errors_and_stores_what_was_acknowledged() {
    each_kind(async |kind| {
        let Hanging { store, device, pause: _held, reader } = Hanging::new(kind).await;
        let error = deadline(SOON, "detaching", device.detach()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{kind}: {error}");
        assert!(!device.is_there(), "{kind}");
        assert!(app(move || reader.join().unwrap()).await.is_err(), "{kind}");
        store.lose_unflushed();
        assert!(store.snapshot()[8192..12_288] == [7; 4096], "{kind}");
    })
    .await;
}
