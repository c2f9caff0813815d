//! The file backend against the contract, and against everything that can happen to a file.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use common::{SmallDisk, assert_says, fresh, run};
use r3map_core::{Backend, Error, ErrorKind, ExtentKind, is_zero};
use r3map_local::{File, FileSettings, Stored};
use r3map_testkit::{conformance, crash, fill, model, skip};
use tempfile::TempDir;

const SIZE: u64 = 300_001;

fn open(path: &Path) -> Result<File, Error> {
    File::open(path, &FileSettings::default())
}

fn read_only(path: &Path) -> Result<File, Error> {
    File::open(path, &FileSettings { read_only: true, ..FileSettings::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    let dir = TempDir::new().unwrap();
    for size in [1, SIZE] {
        conformance::backend(async || Arc::new(File::create(fresh(&dir), size).unwrap()) as _).await;
    }
    let stored = async || Arc::new(Stored::new(Arc::new(File::create(fresh(&dir), SIZE).unwrap()))) as _;
    conformance::backend(stored).await;
}

#[tokio::test]
async fn keeps_the_contract_read_only_and_on_tmpfs() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    fs::write(&path, fill::bytes(0, 300_001, 5)).unwrap();
    conformance::filled(async || Arc::new(read_only(&path).unwrap()) as _, 5).await;
    match TempDir::new_in("/dev/shm") {
        Ok(tmpfs) => conformance::backend(async || Arc::new(File::create(fresh(&tmpfs), SIZE).unwrap()) as _).await,
        Err(_) => skip("no tmpfs at /dev/shm"),
    }
}

#[tokio::test]
async fn what_was_flushed_is_there_when_it_is_opened_again() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    conformance::durable(async || Arc::new(File::create(&path, SIZE).unwrap()) as _).await;
}

#[tokio::test]
async fn agrees_with_the_model() {
    let dir = TempDir::new().unwrap();
    for size in [4095, SIZE] {
        let make = async || Arc::new(File::create(fresh(&dir), size).unwrap()) as _;
        model::check(make, model::Settings { runs: 4, ..model::Settings::default() }).await;
    }
}

#[tokio::test]
async fn a_terabyte_takes_no_room_and_trimming_gives_it_back() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    let file = File::create(&path, 1 << 40).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
    let (at, len) = ((1 << 40) - (1 << 20), 1 << 20);
    file.write_at(at, &fill::bytes(at, len, 1)).await.unwrap();
    file.flush().await.unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= len as u64);
    let capabilities = file.capabilities();
    let kinds = async || {
        let extents = capabilities.extents.unwrap().extents(0, 1 << 40).await.unwrap();
        extents.into_iter().map(|extent| (extent.range.start, extent.kind)).collect::<Vec<_>>()
    };
    assert_eq!(kinds().await, [(0, ExtentKind::Hole), (at, ExtentKind::Data)]);
    capabilities.trim.unwrap().trim(0, 1 << 40).await.unwrap();
    assert_eq!(kinds().await, [(0, ExtentKind::Hole)]);
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 40);
}

#[tokio::test]
async fn a_file_that_was_cut_gives_errors_never_zeros() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    let file = File::create(&path, SIZE).unwrap();
    file.write_at(0, &fill::bytes(0, 300_001, 1)).await.unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100_000).unwrap();

    let mut buf = vec![0; 8192];
    file.read_at(0, &mut buf).await.unwrap();
    assert_eq!(fill::check(&buf, 0, 1), Ok(()));
    let cut = "it was truncated";
    assert_says(file.read_at(99_999, &mut buf).await, ErrorKind::Corrupt, cut);
    assert_says(file.read_at(200_000, &mut buf).await, ErrorKind::Corrupt, cut);
    // Writing would make the file long again, with a hole where the bytes were.
    assert_says(file.write_at(200_000, &buf).await, ErrorKind::Corrupt, cut);
    let capabilities = file.capabilities();
    assert_says(capabilities.trim.unwrap().trim(0, SIZE).await, ErrorKind::Corrupt, cut);
    assert_says(capabilities.write_zeroes.unwrap().write_zeroes(0, 5).await, ErrorKind::Corrupt, cut);
    assert_says(capabilities.extents.unwrap().extents(0, SIZE).await, ErrorKind::Corrupt, cut);
    assert_says(file.flush().await, ErrorKind::Corrupt, cut);
    assert_eq!(fs::metadata(&path).unwrap().len(), 100_000);
}

#[tokio::test]
async fn a_deleted_file_still_holds_what_it_held() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    let file = File::create(&path, SIZE).unwrap();
    file.write_at(0, &fill::bytes(0, 8192, 1)).await.unwrap();
    fs::remove_file(&path).unwrap();
    let mut buf = vec![0; 8192];
    file.read_at(0, &mut buf).await.unwrap();
    assert_eq!(fill::check(&buf, 0, 1), Ok(()));
}

#[test]
fn what_cannot_be_opened_is_refused_in_one_line() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    assert_says(open(&path), ErrorKind::NotFound, "cannot open");
    assert_says(open(dir.path()), ErrorKind::InvalidInput, "cannot open");
    assert_says(read_only(dir.path()), ErrorKind::InvalidInput, "is a directory");
    assert_says(open(&dir.path().join("no/such/dir")), ErrorKind::NotFound, "cannot open");
    assert_says(File::create(dir.path().join("no/such"), 5), ErrorKind::NotFound, "cannot create");
    assert_says(File::create(&path, 0), ErrorKind::InvalidInput, "");
    assert!(!path.exists());

    fs::write(&path, "").unwrap();
    assert_says(open(&path), ErrorKind::InvalidInput, "is empty");
    fs::write(&path, "12345").unwrap();
    let settings = FileSettings { size: Some(6), ..FileSettings::default() };
    assert_says(File::open(&path, &settings), ErrorKind::InvalidInput, "has 5 bytes, not 6");
    assert_says(File::create(&path, 4), ErrorKind::InvalidInput, "has 5 bytes, not 4");
    assert_eq!(File::create(&path, 5).unwrap().size(), 5);
    assert_eq!(fs::read(&path).unwrap(), b"12345");

    let fifo = fresh(&dir);
    run("mkfifo", &[fifo.as_os_str()]).unwrap();
    assert_says(open(&fifo), ErrorKind::InvalidInput, "is no file and no block device");
    assert_says(read_only(Path::new("/dev/null")), ErrorKind::InvalidInput, "is no file and no block device");
    assert_says(read_only(Path::new("/proc/self/status")), ErrorKind::InvalidInput, "is empty");
}

#[test]
fn permissions_are_respected() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    fs::write(&path, "12345").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    let immutable = |sign: &str| run("chattr", &[sign.as_ref(), path.as_os_str()]);
    if fs::read(&path).is_ok() && immutable("+i").is_none() {
        return r3map_testkit::skip_allowed("root may open everything here");
    }
    let result = open(&path);
    let _ = immutable("-i");
    assert_says(result, ErrorKind::Denied, "cannot open");
}

#[test]
fn too_large_for_the_file_system_is_exhausted_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    match File::create(&path, r3map_core::MAX_REGION_SIZE) {
        Ok(_) => r3map_testkit::skip_allowed("this file system takes files of 1 EiB"),
        Err(error) => {
            assert_says::<()>(Err(error), ErrorKind::Exhausted, "cannot hold 1152921504606846976 bytes");
            assert!(!path.exists());
        }
    }
}

#[tokio::test]
async fn one_writer_or_several_readers() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    let writer = File::create(&path, 5).unwrap();
    assert_says(open(&path), ErrorKind::Conflict, "is in use by someone else");
    assert_says(File::create(&path, 5), ErrorKind::Conflict, "is in use by someone else");
    assert_says(read_only(&path), ErrorKind::Conflict, "is being written by someone else");
    drop(writer);
    let readers = [read_only(&path).unwrap(), read_only(&path).unwrap()];
    assert_says(open(&path), ErrorKind::Conflict, "is in use by someone else");
    let reader = &readers[0];
    assert_says(reader.write_at(0, &[1]).await, ErrorKind::Denied, "was opened read-only");
    assert_says(reader.capabilities().trim.unwrap().trim(0, 1).await, ErrorKind::Denied, "was opened read-only");
    drop(readers);
    open(&path).unwrap();
}

#[tokio::test]
async fn looking_keeps_nobody_out() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    assert_says(File::look(&path, None), ErrorKind::NotFound, "cannot open");
    let writer = File::create(&path, SIZE).unwrap();
    let look = File::look(&path, None).unwrap();
    assert!(look.size() == SIZE && look.may_be_written() && writer.may_be_written());
    assert_eq!(look.capabilities().extents.unwrap().extents(0, SIZE).await.unwrap()[0].kind, ExtentKind::Hole);
    assert_says(look.write_at(0, &[1]).await, ErrorKind::Denied, "was opened read-only");
    assert_says(File::look(&path, Some(5)), ErrorKind::InvalidInput, "has 300001 bytes, not 5");
    drop(writer);
    drop((open(&path).unwrap(), look));
}

#[tokio::test]
async fn what_cannot_be_written_is_known_without_trying() {
    let Some(disk) = SmallDisk::new(1) else { return skip("no file system can be mounted (are you root?)") };
    let path = disk.path().join("file");
    drop(File::create(&path, 5).unwrap());
    run("mount", &["-o".as_ref(), "remount,ro".as_ref(), disk.path().as_os_str()]).unwrap();
    assert!(!File::look(&path, None).unwrap().may_be_written());
}

/// A runtime whose only thread for blocking calls is busy until the sender is used or dropped.
fn with_a_stuck_disk<T>(test: impl AsyncFnOnce(mpsc::Sender<()>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let (go, wait) = mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || wait.recv());
        test(go).await
    })
}

fn poll_once(future: &mut std::pin::Pin<Box<impl Future<Output = Result<(), Error>>>>) -> Poll<Result<(), Error>> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn a_cancelled_change_never_lands_after_a_later_one() {
    let dir = TempDir::new().unwrap();
    let file = File::create(fresh(&dir), SIZE).unwrap();
    with_a_stuck_disk(async |disk| {
        let trim = file.capabilities().trim.unwrap();
        // A trim always goes to a thread; a write does where the file system cannot write without waiting.
        let mut trimming = Box::pin(trim.trim(0, 200_000));
        assert!(poll_once(&mut trimming).is_pending());
        drop(trimming);
        let old = vec![9; 100_000];
        let mut cancelled = Box::pin(file.write_at(200_000, &old));
        let _ = poll_once(&mut cancelled);
        drop(cancelled);

        let new = fill::bytes(100_000, 150_000, 3);
        let mut writing = Box::pin(file.write_at(100_000, &new));
        assert!(poll_once(&mut writing).is_pending(), "it must wait for what may still happen");
        let mut elsewhere = Box::pin(file.write_at(300_000, &[1]));
        let _ = poll_once(&mut elsewhere);
        disk.send(()).unwrap();
        writing.await.unwrap();
        elsewhere.await.unwrap();
        // Anything that is still queued runs before this does.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        let mut buf = vec![0; 250_000];
        file.read_at(0, &mut buf).await.unwrap();
        assert!(is_zero(&buf[..100_000]));
        assert_eq!(fill::check(&buf[100_000..], 100_000, 3), Ok(()));
    });
}

#[test]
fn what_is_in_memory_is_read_without_waiting_for_the_disk() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    fs::write(&path, fill::bytes(0, 300_001, 4)).unwrap();
    let probe = fs::File::open(&path).unwrap();
    let mut byte = [0];
    let now =
        rustix::io::preadv2(&probe, &mut [std::io::IoSliceMut::new(&mut byte)], 0, rustix::io::ReadWriteFlags::NOWAIT);
    if now.is_err() {
        return skip("this file system cannot read without waiting");
    }
    let file = open(&path).unwrap();
    with_a_stuck_disk(async |_disk| {
        let mut buf = vec![0; 300_001];
        let mut reading = Box::pin(file.read_at(0, &mut buf));
        assert!(matches!(poll_once(&mut reading), Poll::Ready(Ok(()))));
        drop(reading);
        assert_eq!(fill::check(&buf, 0, 4), Ok(()));
    });
}

#[tokio::test]
async fn a_full_disk_is_exhausted_and_changes_nothing_else() {
    for disk in [SmallDisk::new(4), SmallDisk::ext4(8)] {
        match disk {
            Some(disk) => fill_up(&disk).await,
            None => skip("a small file system cannot be mounted (are you root?)"),
        }
    }
}

async fn fill_up(disk: &SmallDisk) {
    let file = File::create(disk.path().join("region"), 16 << 20).unwrap();
    file.write_at(0, &fill::bytes(0, 1 << 20, 1)).await.unwrap();
    let too_much = fill::bytes(1 << 20, 8 << 20, 1);
    assert_says(file.write_at(1 << 20, &too_much).await, ErrorKind::Exhausted, "input/output failed");
    let mut buf = vec![0; 1 << 20];
    file.read_at(0, &mut buf).await.unwrap();
    assert_eq!(fill::check(&buf, 0, 1), Ok(()));
    file.capabilities().trim.unwrap().trim(1 << 20, 8 << 20).await.unwrap();
    file.write_at(2 << 20, &fill::bytes(2 << 20, 1 << 20, 1)).await.unwrap();
    file.flush().await.unwrap();
}

#[test]
fn a_limit_on_the_size_of_files_is_exhausted() {
    if let Some(path) = crash::role("limited") {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        return runtime.block_on(write_past_the_limit(Path::new(&path)));
    }
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    drop(File::create(&path, 1 << 20).unwrap());
    let test = "a_limit_on_the_size_of_files_is_exhausted";
    let mut child = crash::child(test, "limited", path.to_str().unwrap());
    child.wait_for_line(Duration::from_secs(60), "exhausted");
}

/// `ulimit -f`. The signal that goes with it would end the process if nobody asked for it.
async fn write_past_the_limit(path: &Path) {
    const SIGXFSZ: i32 = 25;
    let _asked = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(SIGXFSZ)).unwrap();
    let limit = rustix::process::Rlimit { current: Some(1 << 19), maximum: Some(1 << 19) };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
    let file = open(path).unwrap();
    file.write_at(0, &[1; 4096]).await.unwrap();
    assert_says(file.write_at(1 << 19, &[1; 4096]).await, ErrorKind::Exhausted, "input/output failed");
    assert_says(File::create(path.with_extension("new"), 1 << 20), ErrorKind::Exhausted, "cannot hold 1048576 bytes");
    crash::stop("exhausted");
}

/// A loop device on a file of `size` bytes, or `None`.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(backing: &Path) -> Option<Self> {
        run("losetup", &["-f".as_ref(), "--show".as_ref(), backing.as_os_str()]).map(|device| Self(device.into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // That would outlive the device, and be found by whoever has its number next.
        let _ = run("blockdev", &["--setrw".as_ref(), self.0.as_os_str()]);
        let _ = run("losetup", &["-d".as_ref(), self.0.as_os_str()]);
    }
}

#[tokio::test]
async fn block_devices_are_regions_too() {
    let dir = TempDir::new().unwrap();
    let backing = fresh(&dir);
    fs::File::create(&backing).unwrap().set_len(1 << 20).unwrap();
    let Some(device) = LoopDevice::new(&backing) else { return skip("no loop device can be had (are you root?)") };
    let conform = async || {
        // A device has no fresh state of its own.
        fs::OpenOptions::new().write(true).open(&device.0).unwrap().write_all_at(&vec![0; 1 << 20], 0).unwrap();
        Arc::new(open(&device.0).unwrap()) as _
    };
    conformance::backend(conform).await;

    let file = open(&device.0).unwrap();
    assert_eq!(file.size(), 1 << 20);
    file.write_at(1000, &fill::bytes(1000, 10_000, 2)).await.unwrap();
    file.flush().await.unwrap();
    drop(file);
    let mut bytes = vec![0; 10_000];
    fs::File::open(&backing).unwrap().read_exact_at(&mut bytes, 1000).unwrap();
    assert_eq!(fill::check(&bytes, 1000, 2), Ok(()));
    assert!(File::look(&device.0, None).unwrap().may_be_written());
    run("blockdev", &["--setro".as_ref(), device.0.as_os_str()]).unwrap();
    assert!(!File::look(&device.0, None).unwrap().may_be_written());
    let settings = FileSettings { size: Some(5), read_only: true };
    assert_says(File::open(&device.0, &settings), ErrorKind::InvalidInput, "has 1048576 bytes, not 5");
}
