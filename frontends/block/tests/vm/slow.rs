//! A remote that takes longer than the half minute after which the kernel takes any request for lost.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use r3map_block::{BlockDevice, Kind};
use r3map_core::{Backend, Operation};
use r3map_nbd::kernel::{self, Device, Disk, Interface, Settings};
use r3map_nbd::{Server, ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use rustix::fs::OFlags;
use tokio::net::UnixStream;

use crate::support::{SOON, aligned, app, device, open_direct, unmount};

const SIZE: u64 = 1 << 20;
const LEN: usize = 4096;
/// Where a write hangs, and where a read.
const WRITTEN: u64 = 0;
const READ: u64 = 8192;
const ELSEWHERE: u64 = 65_536;
/// The kernel's half minute, which ends at a whole second after it, and some.
const SLOW: Duration = Duration::from_secs(32);

/// A device whose remote can be held.
struct Slow {
    name: &'static str,
    calls: Arc<Faults>,
    pause: Pause,
    path: PathBuf,
    by: By,
}

/// What keeps the device.
enum By {
    Mount(BlockDevice),
    /// What the mount does not do: several connections, and a device of which the kernel is the owner.
    Kernel(Device, Server),
}

fn faults() -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(SIZE).filled(1)))
}

async fn mounted(name: &'static str, kind: Kind) -> Slow {
    let calls = faults();
    let device = device(kind, calls.clone()).await;
    Slow { name, calls, pause: Pause::new(), path: device.path().to_owned(), by: By::Mount(device) }
}

async fn attached(name: &'static str, interface: Interface) -> Slow {
    let calls = faults();
    let server = Server::new(vec![ServerExport::new("", calls.clone())], ServerSettings::default()).unwrap();
    let (one, disk) = connection(&server);
    let settings = Settings { interface, request_timeout: None, ..Settings::default() };
    let sockets = vec![one, connection(&server).0];
    let device = app(move || kernel::attach(sockets, disk, &settings).unwrap()).await;
    Slow { name, calls, pause: Pause::new(), path: device.path(), by: By::Kernel(device, server) }
}

fn connection(server: &Server) -> (OwnedFd, Disk) {
    let (ours, kernels) = UnixStream::pair().unwrap();
    let (export, _) = server.serve_export(ours, "").unwrap();
    (kernels.into_std().unwrap().into(), Disk { size: export.size, block_size: 4096, flags: export.flags })
}

fn write(path: &Path, seed: u64) -> io::Result<()> {
    let (mut buffer, at) = aligned(LEN);
    buffer[at..at + LEN].copy_from_slice(&fill::bytes(WRITTEN, LEN, seed));
    open_direct(path, OFlags::empty()).write_all_at(&buffer[at..at + LEN], WRITTEN)
}

fn read(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    let (mut buffer, at) = aligned(LEN);
    open_direct(path, OFlags::empty()).read_exact_at(&mut buffer[at..at + LEN], offset)?;
    Ok(buffer[at..at + LEN].to_vec())
}

impl Slow {
    /// Holds a write and a read, and gives back who waits for them.
    async fn hold(&self) -> [JoinHandle<io::Result<Vec<u8>>>; 2] {
        self.calls.add(Rule::on(Operation::Write).touching(WRITTEN..WRITTEN + LEN as u64).hold(&self.pause));
        self.calls.add(Rule::on(Operation::Read).touching(READ..READ + LEN as u64).hold(&self.pause));
        let (writer, reader) = (self.path.clone(), self.path.clone());
        let users = [
            std::thread::spawn(move || write(&writer, 2).map(|()| Vec::new())),
            std::thread::spawn(move || read(&reader, READ)),
        ];
        deadline(SOON, "both are under way", self.pause.wait_held(2)).await;
        users
    }

    /// Everything is as if it had not been slow, also for what comes later.
    fn check(&self, [writer, reader]: [JoinHandle<io::Result<Vec<u8>>>; 2]) {
        let name = self.name;
        let elsewhere = read(&self.path, ELSEWHERE).unwrap_or_else(|error| panic!("{name}: {error}"));
        fill::check(&elsewhere, ELSEWHERE, 1).unwrap();
        assert_eq!(self.pause.held(), 2, "{name}: nothing is asked twice");
        self.pause.release();
        writer.join().unwrap().unwrap_or_else(|error| panic!("{name}: {error}"));
        fill::check(&reader.join().unwrap().unwrap(), READ, 1).unwrap();
        fill::check(&read(&self.path, WRITTEN).unwrap(), WRITTEN, 2).unwrap();
        write(&self.path, 3).unwrap();
        fill::check(&read(&self.path, WRITTEN).unwrap(), WRITTEN, 3).unwrap();
    }

    /// Detaches it; nothing old has landed by then.
    async fn end(self) {
        match self.by {
            By::Mount(device) => unmount(device).await,
            By::Kernel(device, server) => {
                app(move || device.detach().unwrap()).await;
                server.close(SOON).await.unwrap();
            }
        }
        let mut bytes = vec![0; LEN];
        self.calls.read_at(WRITTEN, &mut bytes).await.unwrap();
        fill::check(&bytes, WRITTEN, 3).unwrap();
        assert_eq!(self.calls.count(Operation::Write), 2, "{}: each write is made once", self.name);
    }
}

pub(crate) async fn a_remote_that_takes_longer_than_half_a_minute_is_waited_for() {
    let all = [
        mounted("a mount by NBD", Kind::Nbd).await,
        mounted("a mount by ublk", Kind::Ublk).await,
        attached("two connections by netlink", Interface::Netlink).await,
        attached("two connections by ioctl", Interface::Ioctl).await,
    ];
    let mut held = Vec::new();
    for slow in all {
        held.push((slow.hold().await, slow));
    }
    tokio::time::sleep(SLOW).await;
    for (users, slow) in held {
        assert!(users.iter().all(|user| !user.is_finished()), "{}: somebody gave up", slow.name);
        let slow = app(move || {
            slow.check(users);
            slow
        });
        slow.await.end().await;
    }
}
