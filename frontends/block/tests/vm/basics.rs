//! What is read and written, flushed, discarded and zeroed.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use r3map_core::Operation;
use r3map_testkit::faults::Faults;
use r3map_testkit::fill;
use r3map_testkit::store::Store;

use crate::support::{app, device, has_ublk, run};

const SIZE: u64 = 64 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_is_read_and_written() {
    if !has_ublk() {
        return;
    }
    let store = Arc::new(Store::new(SIZE).filled(1));
    let device = device(store.clone()).await;
    let path = device.path().to_owned();
    assert_eq!(device.size(), SIZE);
    app(move || {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut seen = vec![0; SIZE as usize];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == fill::bytes(0, SIZE as usize, 1));
        file.write_all_at(&fill::bytes(12345, 1 << 20, 2), 12345).unwrap();
        file.sync_all().unwrap();
    })
    .await;
    let mut expected = fill::bytes(0, SIZE as usize, 1);
    expected[12345..12345 + (1 << 20)].copy_from_slice(&fill::bytes(12345, 1 << 20, 2));
    assert!(store.snapshot() == expected);
    let path = device.path().to_owned();
    device.unmount().await.unwrap();
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_is_sound() {
    if !has_ublk() {
        return;
    }
    let faults = Faults::new(Arc::new(Store::new(SIZE)));
    let device = device(faults.clone()).await;
    let path = device.path().to_str().unwrap().to_owned();
    app(move || {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().to_str().unwrap();
        run("mkfs.ext4", &["-q", "-F", &path]);
        run("mount", &["-t", "ext4", "-o", "discard", &path, at]);
        let file = format!("--filename={at}/file");
        run(
            "fio",
            &[
                "--name=verify",
                &file,
                "--size=16M",
                "--rw=randwrite",
                "--bs=4k",
                "--verify=crc32c",
                "--iodepth=8",
                "--ioengine=psync",
                "--end_fsync=1",
            ],
        );
        run("umount", &[at]);
        run("e2fsck", &["-fn", &path]);
    })
    .await;
    assert!(faults.count(Operation::Flush) > 0);
    device.unmount().await.unwrap();
}
