//! Loop devices over plain files, which work on the host.

#![cfg(target_os = "linux")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use r3map_block::{BlockDevice, BlockSettings, Kind, check};
use r3map_core::{Error, ErrorKind, Operation};
use r3map_testkit::{deadline, fill};
use rustix::fs::OFlags;
use tempfile::NamedTempFile;

const SOON: Duration = Duration::from_secs(60);

/// A file with test bytes; nothing, and a word about it, where there are no loop devices.
fn file(size: usize) -> Option<NamedTempFile> {
    if let Err(error) = check(Kind::Loop) {
        r3map_testkit::skip(&error.to_string());
        return None;
    }
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&fill::bytes(0, size, 1), 0).unwrap();
    Some(file)
}

async fn over(file: &Path, settings: BlockSettings) -> Result<BlockDevice, Error> {
    deadline(SOON, "attaching", BlockDevice::over_file(file, settings)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_a_device_and_detaching_stores_what_was_written() {
    let Some(file) = file(1 << 20) else { return };
    let device = over(file.path(), BlockSettings::default()).await.unwrap();
    assert_eq!((device.kind(), device.size(), device.is_read_only()), (Kind::Loop, 1 << 20, false));
    let opened = device.open_file().await.unwrap();
    let mut seen = vec![0; 1 << 20];
    opened.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == fill::bytes(0, 1 << 20, 1));
    opened.write_all_at(&fill::bytes(0, 10_000, 2), 777).unwrap();
    drop(opened);
    let mapping = device.map().await.unwrap();
    mapping.write(500_000, b"mapped").unwrap();
    drop(mapping);
    deadline(SOON, "unmounting", device.unmount()).await.unwrap();
    let mut expected = fill::bytes(0, 1 << 20, 1);
    expected[777..10_777].copy_from_slice(&fill::bytes(0, 10_000, 2));
    expected[500_000..500_006].copy_from_slice(b"mapped");
    assert!(std::fs::read(file.path()).unwrap() == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_in_use_stays() {
    let Some(file) = file(1 << 20) else { return };
    let device = over(file.path(), BlockSettings::default()).await.unwrap();
    let claim = || {
        let flags = OFlags::EXCL.bits().cast_signed();
        std::os::unix::fs::OpenOptionsExt::custom_flags(OpenOptions::new().read(true), flags)
            .open(device.path())
            .unwrap()
    };
    let user = claim();
    let error = device.unmount().await.unwrap_err();
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Conflict, Operation::Close), "{error}");
    assert!(error.message().contains("is in use"), "{error}");
    drop(user);
    let reader = device.open_file().await.unwrap();
    let error = device.unmount().await.unwrap_err();
    assert!(error.message().contains("still open elsewhere"), "{error}");
    drop(reader);
    device.unmount().await.unwrap();
    device.unmount().await.expect("again is the same as once");
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_and_block_sizes_are_honest() {
    let Some(file) = file(4096 + 512) else { return };
    let large = BlockSettings { logical_block_size: 4096, ..BlockSettings::default() };
    let error = over(file.path(), large.clone()).await.err().unwrap();
    assert!(error.message().contains("leave 512 over; choose a logical block size of 512"), "{error}");
    let device = over(file.path(), BlockSettings { read_only: true, ..BlockSettings::default() }).await.unwrap();
    assert_eq!((device.size(), device.is_read_only()), (4608, true));
    // Where it can be opened for writing, writing fails.
    let opened = OpenOptions::new().write(true).open(device.path());
    assert!(opened.and_then(|file| file.write_all_at(&[0; 512], 0)).is_err());
    device.unmount().await.unwrap();
    file.as_file().set_len(4096 + 100).unwrap();
    let error = over(file.path(), BlockSettings::default()).await.err().unwrap();
    assert!(error.message().contains("leave 100 over; show it as a file instead"), "{error}");
    file.as_file().set_len(8192).unwrap();
    let device = over(file.path(), large).await.unwrap();
    let name = device.path().file_name().unwrap().to_str().unwrap().to_owned();
    let block = std::fs::read_to_string(format!("/sys/block/{name}/queue/logical_block_size")).unwrap();
    assert_eq!(block.trim(), "4096");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_file_is_refused() {
    if file(512).is_none() {
        return;
    }
    let error = over(Path::new("/absent/file"), BlockSettings::default()).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    let backend = std::sync::Arc::new(r3map_testkit::store::Store::new(512));
    let error = BlockDevice::open(Kind::Loop, backend, BlockSettings::default()).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}
