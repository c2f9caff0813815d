//! The kernel's client on our own server: over a socket pair in one process, and over a slow link.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::{Backend, ErrorKind, Operation};
use r3map_nbd::kernel::{self, Device, Disk, Interface, Settings, block_size};
use r3map_nbd::{Address, Server, ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{fill, in_vm};
use rustix::fs::OFlags;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::support::{
    Aligned, LONG, Netem, SIZE, attach, by_either_interface, connect_to, exercise, io_timeout, node, open_direct,
    read_direct, run, runtime, until,
};

const WEEK: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// A server in this process, and what its backend is asked.
struct Own {
    runtime: Runtime,
    server: Server,
    calls: Arc<Faults>,
}

impl Own {
    fn new(store: Store) -> Self {
        let calls = Faults::new(Arc::new(store));
        let backend: Arc<dyn Backend> = calls.clone();
        let server = Server::new(vec![ServerExport::new("", backend)], ServerSettings::default()).unwrap();
        Self { runtime: runtime(), server, calls }
    }

    /// Connects twice.
    fn pairs(&self) -> (Vec<OwnedFd>, Disk) {
        let ((mut sockets, disk), (more, _)) = (self.pair(), self.pair());
        sockets.extend(more);
        (sockets, disk)
    }

    /// The kernel's end of a socket pair whose other end is served.
    fn pair(&self) -> (Vec<OwnedFd>, Disk) {
        let _inside = self.runtime.enter();
        let (ours, kernels) = UnixStream::pair().unwrap();
        let (export, _) = self.server.serve_export(ours, "").unwrap();
        let disk = Disk { size: export.size, block_size: block_size(export.size).unwrap(), flags: export.flags };
        (vec![kernels.into_std().unwrap().into()], disk)
    }

    fn attach(&self, settings: &Settings) -> Device {
        attach(self.pair(), settings)
    }
}

#[test]
fn a_file_system_over_a_socket_pair() {
    if !in_vm() {
        return;
    }
    by_either_interface(|interface| {
        let own = Own::new(Store::new(SIZE));
        let device = own.attach(&Settings { interface, ..Settings::default() });
        exercise(&device.path());
        device.detach().unwrap();
    });
}

#[test]
fn every_byte_is_where_it_belongs_and_the_end_is_the_end() {
    if !in_vm() {
        return;
    }
    // A size that only 512 divides.
    let size = (1 << 20) + 512;
    let own = Own::new(Store::new(size).filled(3));
    let device = own.attach(&Settings::default());
    let file = std::fs::File::open(device.path()).unwrap();
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    fill::check(&bytes, 0, 3).unwrap();
    assert_eq!(file.read_at(&mut bytes, size).unwrap(), 0);
    drop(file);
    device.detach().unwrap();
}

#[test]
fn flush_fua_and_discard_reach_the_backend() {
    if !in_vm() {
        return;
    }
    let own = Own::new(Store::new(SIZE).filled(1));
    let device = own.attach(&Settings::default());
    let page = Box::new(Aligned([9; 4096]));
    let count = |operation| own.calls.count(operation);
    open_direct(&device.path(), OFlags::empty()).write_all_at(&page.0, 0).unwrap();
    let before = (count(Operation::Write), count(Operation::Flush));
    open_direct(&device.path(), OFlags::DSYNC).write_all_at(&page.0, 4096).unwrap();
    let after = (count(Operation::Write), count(Operation::Flush));
    assert!(after.0 > before.0 && after.1 > before.1, "a write with FUA is flushed: {before:?}, {after:?}");
    open_direct(&device.path(), OFlags::empty()).sync_all().unwrap();
    assert!(count(Operation::Flush) > after.1, "fsync is a flush");
    run("blkdiscard", &["--offset", "65536", "--length", "1M", device.path().to_str().unwrap()]);
    let trimmed = own.calls.take_calls().into_iter().filter(|call| call.operation == Operation::Trim);
    let bytes: u64 = trimmed.map(|call| call.len()).sum();
    assert_eq!(bytes, 1 << 20);
    assert_eq!(read_direct(&device.path(), 65536).unwrap(), [0; 4096]);
    device.detach().unwrap();
}

#[test]
fn what_was_written_is_flushed_when_it_is_detached() {
    if !in_vm() {
        return;
    }
    for interface in [Interface::Netlink, Interface::Ioctl] {
        let own = Own::new(Store::new(SIZE).volatile_cache());
        let device = own.attach(&Settings { interface, ..Settings::default() });
        let file = std::fs::File::options().write(true).open(device.path()).unwrap();
        let bytes = fill::bytes(0, 1 << 20, 5);
        file.write_all_at(&bytes, 0).unwrap();
        drop(file);
        device.detach().unwrap();
        let flushed = own.calls.take_calls().iter().rposition(|call| call.operation == Operation::Flush);
        assert!(flushed.is_some(), "{interface:?}: nothing was flushed");
        let mut read = vec![0; bytes.len()];
        own.runtime.block_on(own.calls.read_at(0, &mut read)).unwrap();
        assert!(read == bytes, "{interface:?}: what was written is not there");
    }
}

#[test]
fn a_request_is_tried_elsewhere_after_its_time_and_never_where_it_has_none() {
    if !in_vm() {
        return;
    }
    let own = Own::new(Store::new(SIZE).plain());
    let hasty = Settings { request_timeout: Some(Duration::from_secs(2)), ..Settings::default() };
    let device = attach(own.pairs(), &hasty);
    drop(own.calls.take_calls());
    own.calls.add(Rule::on(Operation::Read).touching(0..4096).hold(&Pause::new()));
    read_direct(&device.path(), 0).unwrap_err();
    assert_eq!(own.calls.count(Operation::Read), 2, "once on each connection");
    own.calls.clear();
    let index = device.index();
    // Its connections are gone, and it says so; nothing was written.
    let _ = device.detach();
    until("it is free", || !kernel::is_attached(index).unwrap());
    // The same device, which would still know the time of before.
    for interface in [Interface::Netlink, Interface::Ioctl] {
        let settings = Settings { interface, device: Some(index), request_timeout: None, ..Settings::default() };
        let device = attach(own.pairs(), &settings);
        let limit = Duration::from_millis(io_timeout(index));
        assert!(limit > WEEK, "{interface:?}: {limit:?}");
        read_direct(&device.path(), 0).unwrap();
        device.detach().unwrap();
        until("it is free", || !kernel::is_attached(index).unwrap());
    }
}

#[test]
fn nobody_can_mount_a_device_that_is_being_detached() {
    if !in_vm() {
        return;
    }
    let own = Own::new(Store::new(SIZE).plain());
    // By ioctl the end waits for what is under way.
    let device = own.attach(&Settings { interface: Interface::Ioctl, ..Settings::default() });
    let path = device.path();
    let pause = Pause::new();
    own.calls.add(Rule::on(Operation::Read).touching(0..4096).hold(&pause));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_direct(&path, 0));
        until("the read is under way", || pause.held() > 0);
        let flushes = own.calls.count(Operation::Flush);
        let leaving = scope.spawn(move || device.detach());
        until("what was written is flushed", || own.calls.count(Operation::Flush) > flushes);
        for _ in 0..50 {
            let mut exclusive = std::fs::OpenOptions::new();
            let exclusive = exclusive.read(true).custom_flags(OFlags::EXCL.bits().cast_signed());
            assert!(exclusive.open(&path).is_err());
            std::thread::sleep(Duration::from_millis(10));
        }
        pause.release();
        leaving.join().unwrap().unwrap();
        // Whoever merely has it open is not waited for by promise.
        let _ = reader.join().unwrap();
    });
}

#[test]
fn over_a_link_with_a_round_trip_of_40_ms() {
    if !in_vm() {
        return;
    }
    let own = Own::new(Store::new(SIZE));
    let any = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let Address::Tcp { port, .. } = own.runtime.block_on(own.server.listen(&any)).unwrap() else { panic!("no port") };
    let _delayed = Netem::new(&["delay", "20ms"]);
    let device = attach(connect_to(&format!("nbd://127.0.0.1:{port}"), 4), &Settings::default());
    let start = Instant::now();
    read_direct(&device.path(), 0).unwrap();
    assert!(start.elapsed().as_millis() >= 40, "the link is not slow");
    exercise(&device.path());
    device.detach().unwrap();
}

/// The program that people attach devices with.
#[test]
fn nbd_client_attaches_our_exports() {
    if !in_vm() {
        return;
    }
    let own = Own::new(Store::new(SIZE).filled(1));
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    own.runtime.block_on(own.server.listen(&Address::Unix(socket.clone()))).unwrap();
    // One that nobody else takes: devices are taken from the first on.
    let index = 15;
    let device = node(index);
    let (device_name, socket) = (device.to_str().unwrap(), socket.to_str().unwrap());
    for more in [&["-connections", "2"][..], &["-nonetlink"]] {
        run("nbd-client", &[&["-unix", socket, device_name, "-name", ""], more].concat());
        until("it is attached", || {
            std::fs::read_to_string("/sys/block/nbd15/size").is_ok_and(|size| size.trim() != "0")
        });
        let page = read_direct(&device, 8192).unwrap();
        exercise(&device);
        run("nbd-client", &["-d", device_name]);
        until("it is free", || !kernel::is_attached(index).unwrap());
        until("the server knows", || own.server.connections() == 0);
        if more[0] == "-connections" {
            fill::check(&page, 8192, 1).unwrap();
        }
    }
}

/// A device that another program has attached without a time-out, whose server can be started again.
struct Foreign {
    own: Option<Own>,
    folder: TempDir,
    calls: Arc<Faults>,
    index: u32,
}

impl Foreign {
    fn new(index: u32) -> Self {
        let own = Own::new(Store::new(SIZE).filled(1));
        let calls = own.calls.clone();
        let mut foreign = Self { own: Some(own), folder: tempfile::tempdir().unwrap(), calls, index };
        foreign.listen();
        let socket = foreign.socket();
        run("nbd-client", &["-unix", socket.to_str().unwrap(), node(index).to_str().unwrap(), "-name", ""]);
        until("it is attached", || kernel::is_attached(index).unwrap() && read_direct(&node(index), 0).is_ok());
        foreign
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn listen(&mut self) {
        let Own { runtime, server, .. } = self.own.as_ref().unwrap();
        runtime.block_on(server.listen(&Address::Unix(self.socket()))).unwrap();
    }

    /// Another server in place of the first one, once the kernel has noticed that that is gone.
    fn restart(&mut self) {
        let dead_links = kernel::dead_links().unwrap();
        let Own { runtime, server, calls } = self.own.take().unwrap();
        runtime.block_on(server.close(LONG)).unwrap();
        assert_eq!(dead_links.next(LONG).unwrap(), Some(self.index));
        let server = Server::new(vec![ServerExport::new("", calls.clone())], ServerSettings::default()).unwrap();
        self.own = Some(Own { runtime, server, calls });
        self.listen();
    }

    fn take_over(&self, settings: &Settings) -> r3map_core::Result<Device> {
        let (sockets, disk) = connect_to(&format!("nbd+unix:///?socket={}", self.socket().display()), 1);
        kernel::take_over(self.index, sockets, disk, settings)
    }

    fn connections(&self) -> usize {
        self.own.as_ref().unwrap().server.connections()
    }
}

/// The time-out of requests in the NBD client's own words.
fn client_timeout(index: u32) -> String {
    std::fs::read_to_string(format!("/sys/kernel/debug/nbd/nbd{index}/timeout")).unwrap().trim().to_owned()
}

#[test]
fn a_device_that_others_attached_without_a_time_out_is_taken_over_when_it_is_not_served() {
    if !in_vm() {
        return;
    }
    let mut foreign = Foreign::new(14);
    let index = foreign.index;
    let before = io_timeout(index);
    let error = foreign.take_over(&Settings::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    until("only the first is connected", || foreign.connections() == 1);
    assert_eq!((io_timeout(index), client_timeout(index)), (before, "0".to_owned()), "it is as it was");
    fill::check(&read_direct(&node(index), 8192).unwrap(), 8192, 1).unwrap();

    foreign.restart();
    read_direct(&node(index), 1 << 20).expect_err("nobody serves it");
    let device = foreign.take_over(&Settings::default()).unwrap();
    fill::check(&read_direct(&node(index), 1 << 20).unwrap(), 1 << 20, 1).unwrap();
    assert_eq!(Duration::from_millis(io_timeout(index)), Settings::default().request_timeout.unwrap());
    assert!(foreign.calls.count(Operation::Read) > 0);
    device.detach().unwrap();
}

/// Without debugfs the kernel does not say of such a device whether it has taken connections: they must not be left to it.
#[test]
fn a_device_that_others_attached_without_a_time_out_is_refused_without_debugfs_and_left_as_it_was() {
    if !in_vm() {
        return;
    }
    let mut foreign = Foreign::new(14);
    let index = foreign.index;
    let before = io_timeout(index);
    foreign.restart();
    run("umount", &["/sys/kernel/debug"]);
    let refused = foreign.take_over(&Settings::default());
    run("mount", &["-t", "debugfs", "debugfs", "/sys/kernel/debug"]);
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.message().contains("without a time-out"), "{error}");
    until("nobody is connected", || foreign.connections() == 0);
    assert_eq!((io_timeout(index), client_timeout(index)), (before, "0".to_owned()));
    read_direct(&node(index), 8192).expect_err("nobody serves it");
    let _ = kernel::detach(index, true);
    until("it is free", || !kernel::is_attached(index).unwrap());
}

#[test]
fn several_devices_at_once() {
    if !in_vm() {
        return;
    }
    let owns: Vec<Own> = (0..4).map(|seed| Own::new(Store::new(1 << 20).filled(seed))).collect();
    let devices: Vec<Device> = std::thread::scope(|scope| {
        let attached: Vec<_> = owns.iter().map(|own| scope.spawn(|| own.attach(&Settings::default()))).collect();
        attached.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (device, seed) in devices.iter().zip(0..) {
        fill::check(&read_direct(&device.path(), 8192).unwrap(), 8192, seed).unwrap();
    }
    for device in devices {
        device.detach().unwrap();
    }
}
