//! Mounts as block devices, with a remote behind a link that delays by 20 ms each way, and their migrations. They run in the
//! virtual machine of `cargo xtask vm`; elsewhere these tests say that they are skipped.

#![cfg(target_os = "linux")]

mod migration;
#[path = "../moving/mod.rs"]
mod moving;

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map::{
    BlockMount, BlockOptions, Kind, ListenOptions, Listener, Mount, OpenOptions, Operation, Registry, Settings,
};
use r3map_testkit::faults::Faults;
use r3map_testkit::process::Process;
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill, in_vm};

const SIZE: u64 = 8 << 20;
const LEN: usize = 8 << 20;
const LIMIT: Duration = Duration::from_secs(100);

/// Runs a program to its good end.
fn run(program: &str, arguments: &[&str]) {
    let mut process = Process::start(Command::new(program).args(arguments));
    let status = process.wait(LIMIT);
    let said = [process.stdout().join("\n"), process.stderr().join("\n")].join("\n");
    assert!(status.success(), "{program} {arguments:?}: {status}\n{said}");
}

/// How long the loopback takes each way: a round trip is 40 ms.
const DELAY: Duration = Duration::from_millis(20);

/// That delay on the loopback. Dropping it takes it away.
struct Delay;

impl Delay {
    fn new() -> Self {
        run("tc", &["qdisc", "add", "dev", "lo", "root", "netem", "delay", &format!("{}ms", DELAY.as_millis())]);
        Self
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        let _ = Command::new("tc").args(["qdisc", "del", "dev", "lo", "root"]).status();
    }
}

/// A region served by gRPC, and what is asked of it.
struct Remote {
    store: Arc<Store>,
    faults: Arc<Faults>,
    _listeners: Vec<Box<dyn Listener>>,
    uri: String,
}

impl Remote {
    async fn new() -> Self {
        let store = Arc::new(Store::new(SIZE).filled(1).volatile_cache());
        let faults = Faults::new(store.clone());
        let at = ["grpc://127.0.0.1:0".parse().unwrap()];
        let listeners = Registry::standard().listen(&at, faults.clone(), &ListenOptions::default()).await.unwrap();
        let uri = listeners[0].uri().to_string();
        Self { store, faults, _listeners: listeners, uri }
    }

    /// A device of a kind over it.
    async fn mount(&self, managed: bool, kind: Kind) -> BlockMount {
        let remote = Registry::standard().open(&self.uri.parse().unwrap(), &OpenOptions::default()).await.unwrap();
        let mount = if managed { Mount::managed(remote) } else { Mount::direct(remote) };
        let block = BlockOptions { kind: Some(kind), ..BlockOptions::default() };
        let settings = Settings { block, ..Settings::default() }.dirty_budget(NonZeroU64::new(4 << 20).unwrap());
        deadline(LIMIT, "mounting", mount.settings(settings).block()).await.unwrap()
    }
}

/// Blocking work, as an application does it, off the runtime.
async fn app<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    deadline(LIMIT, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}

fn use_as_disk(device: &Path) {
    let device = device.to_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", device]);
    run("mount", &["-t", "ext4", device, at]);
    let file = format!("--filename={at}/file");
    let job = ["--name=v", &file, "--size=512k", "--rw=randwrite", "--bs=16k", "--verify=crc32c", "--end_fsync=1"];
    run("fio", &[&job[..], &["--ioengine=libaio", "--iodepth=16", "--direct=1"]].concat());
    run("umount", &[at]);
    run("e2fsck", &["-fn", device]);
}

/// Bytes through the device, its mapping and its opened file; flushing reaches the remote, with writes that are to be
/// durable at once too, and so does discarding.
async fn exchange(remote: &Remote, mount: &BlockMount, managed: bool) {
    let file = mount.file().await.unwrap();
    let mapping = mount.map().await.unwrap();
    app(move || {
        let mut seen = vec![0; 100_000];
        file.read_exact_at(&mut seen, 1 << 20).unwrap();
        assert!(seen == fill::bytes(1 << 20, 100_000, 1));
        mapping.write(4090, &fill::bytes(4090, 9000, 2)).unwrap();
        mapping.sync().unwrap();
        file.write_all_at(&fill::bytes(2 << 20, 5000, 2), 2 << 20).unwrap();
        file.sync_all().unwrap();
    })
    .await;
    let device = mount.path().to_owned();
    // A write with FUA: past the kernel's cache, which takes whole blocks in aligned memory, and durable at once.
    let open = app(move || {
        let options = (rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC).bits().cast_signed();
        let file = File::options().write(true).custom_flags(options).open(device).unwrap();
        let mut memory = vec![0; 8192];
        let at = memory.as_ptr().align_offset(4096);
        memory[at..at + 4096].copy_from_slice(&fill::bytes(3 << 20, 4096, 2));
        file.write_all_at(&memory[at..at + 4096], 3 << 20).unwrap();
        // Closing it might make it durable, too.
        file
    })
    .await;
    remote.store.lose_unflushed();
    drop(open);
    let count = |operation| remote.faults.bytes(operation);
    let before = (count(Operation::Trim), count(Operation::WriteZeroes));
    let device = mount.path().to_str().unwrap().to_owned();
    app(move || run("blkdiscard", &["--offset", "4194304", "--length", "65536", &device])).await;
    mount.flush().await.unwrap();
    // What a managed mount pushes is its local copy, in which what was discarded is zeros: these are not sent as bytes.
    let arrived = if managed { (before.0, before.1 + 65_536) } else { (before.0 + 65_536, before.1) };
    assert_eq!((count(Operation::Trim), count(Operation::WriteZeroes)), arrived);
    let mut expected = fill::bytes(0, LEN, 1);
    expected[4090..13_090].copy_from_slice(&fill::bytes(4090, 9000, 2));
    expected[2 << 20..(2 << 20) + 5000].copy_from_slice(&fill::bytes(2 << 20, 5000, 2));
    expected[3 << 20..(3 << 20) + 4096].copy_from_slice(&fill::bytes(3 << 20, 4096, 2));
    expected[4 << 20..(4 << 20) + 65_536].fill(0);
    assert!(remote.store.snapshot() == expected);
}

async fn works(kind: Kind, managed: bool) {
    let remote = Remote::new().await;
    let mount = remote.mount(managed, kind).await;
    assert_eq!(mount.kind(), kind);
    let start = Instant::now();
    mount.flush().await.unwrap();
    assert!(managed || start.elapsed() >= 2 * DELAY, "{kind}: the link is not slow");
    exchange(&remote, &mount, managed).await;
    let device = mount.path().to_owned();
    app(move || use_as_disk(&device)).await;
    let flushes = remote.faults.count(Operation::Flush);
    assert!(flushes > 0, "fsync is the remote's flush");
    deadline(LIMIT, "closing", mount.close()).await.unwrap();
    remote.store.lose_unflushed();
    // What the remote has durably is the file system.
    let image = remote.store.snapshot();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    app(move || run("e2fsck", &["-fn", file.path().to_str().unwrap()])).await;
}

/// Both ways at once: most of it waits for the link.
async fn works_direct_and_managed(kind: Kind) {
    if !in_vm() {
        return;
    }
    let _delay = Delay::new();
    tokio::join!(works(kind, false), works(kind, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_and_a_managed_ublk_device_behind_a_delay_of_20_ms() {
    works_direct_and_managed(Kind::Ublk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_direct_and_a_managed_nbd_device_behind_a_delay_of_20_ms() {
    works_direct_and_managed(Kind::Nbd).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_kind_is_chosen() {
    if !in_vm() {
        return;
    }
    let mount = Mount::direct(Arc::new(Store::new(SIZE))).block().await.unwrap();
    assert_eq!((mount.kind(), mount.refused().len()), (Kind::Ublk, 0));
    mount.close().await.unwrap();
}
