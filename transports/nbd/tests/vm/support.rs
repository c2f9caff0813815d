//! What the tests share: devices that are tidied up, programs that must succeed, and a file system put through its paces.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use r3map_nbd::NbdUri;
use r3map_nbd::kernel::{self, Device, Disk, Interface, Settings};
use rustix::fs::OFlags;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Everything takes several times as long under emulation.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// The size of a region in bytes: enough for a file system with a journal.
pub(crate) const SIZE: u64 = 64 << 20;

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Runs a program that must succeed, and gives back what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}: {text}", output.status);
    text
}

/// Does the same by netlink and by ioctl, at once: for what mostly waits.
pub(crate) fn by_either_interface(work: impl Fn(Interface) + Sync) {
    std::thread::scope(|scope| {
        for interface in [Interface::Netlink, Interface::Ioctl] {
            let work = &work;
            scope.spawn(move || work(interface));
        }
    });
}

/// Connections to a server on a Unix socket, ready for the kernel.
pub(crate) fn connect(socket: &Path, connections: usize) -> (Vec<OwnedFd>, Disk) {
    connect_to(&format!("nbd+unix:///?socket={}", socket.display()), connections)
}

pub(crate) fn connect_to(uri: &str, connections: usize) -> (Vec<OwnedFd>, Disk) {
    let uri: NbdUri = uri.parse().unwrap();
    let connections = NonZeroUsize::new(connections).unwrap();
    runtime().block_on(kernel::connect(uri, connections, LONG)).unwrap()
}

pub(crate) fn attach(connected: (Vec<OwnedFd>, Disk), settings: &Settings) -> Device {
    kernel::attach(connected.0, connected.1, settings).unwrap()
}

/// Waits until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not after {LONG:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Puts a file system on the device, has fio write and verify files on it, and checks it afterwards.
pub(crate) fn exercise(device: &Path) {
    let name = device.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", name]);
    let mounted = Mounted::new(device);
    let file = mounted.path().join("file");
    let filename = format!("--filename={}", file.display());
    let common = ["--name=verify", &filename, "--size=2M", "--ioengine=libaio", "--iodepth=8", "--bsrange=4k-128k"];
    let verify = ["--rw=randwrite", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--end_fsync=1"];
    let output = run("fio", &[&common[..], &verify[..]].concat());
    assert!(output.contains("err= 0"), "{output}");
    drop(mounted);
    check(device);
}

/// Checks the file system on a device without changing it.
pub(crate) fn check(device: &Path) {
    run("e2fsck", &["-fn", device.to_str().unwrap()]);
}

/// A mounted file system, unmounted on drop.
pub(crate) struct Mounted(TempDir);

impl Mounted {
    pub(crate) fn new(device: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-t", "ext4", device.to_str().unwrap(), folder.path().to_str().unwrap()]);
        Self(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let path = self.0.path().to_str().unwrap();
        if std::thread::panicking() {
            let _ = Command::new("umount").args(["-l", path]).status();
        } else {
            run("umount", &[path]);
        }
    }
}

/// A device that is opened past the page cache. Direct requests need aligned memory: [`Aligned`].
pub(crate) fn open_direct(device: &Path, more: OFlags) -> File {
    let flags = (OFlags::DIRECT | more).bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags.cast_signed()).open(device).unwrap()
}

/// A page of memory at a multiple of its size.
#[repr(align(4096))]
pub(crate) struct Aligned(pub(crate) [u8; 4096]);

/// Reads a page past the page cache.
pub(crate) fn read_direct(device: &Path, offset: u64) -> io::Result<[u8; 4096]> {
    let mut page = Box::new(Aligned([0; 4096]));
    open_direct(device, OFlags::empty()).read_exact_at(&mut page.0, offset)?;
    Ok(page.0)
}

/// What every packet to this machine itself suffers, until this is dropped.
pub(crate) struct Netem;

impl Netem {
    pub(crate) fn new(what: &[&str]) -> Self {
        run("tc", &[&["qdisc", "add", "dev", "lo", "root", "netem"], what].concat());
        Self
    }
}

impl Drop for Netem {
    fn drop(&mut self) {
        run("tc", &["qdisc", "del", "dev", "lo", "root"]);
    }
}

/// How long a device's requests may take, as the kernel says it: in milliseconds.
pub(crate) fn io_timeout(index: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/queue/io_timeout")).unwrap();
    text.trim().parse().unwrap()
}

/// The device node of an index, as tests name it.
pub(crate) fn node(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}
