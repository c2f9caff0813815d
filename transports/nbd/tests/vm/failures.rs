//! What must not go wrong for ever: servers that are killed, devices in use, wrong requests.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::ErrorKind;
use r3map_local::File;
use r3map_nbd::kernel::{self, Device, Disk, Interface, Settings, index_of};
use r3map_nbd::{Address, Server, ServerExport, ServerSettings};
use r3map_testkit::crash;
use r3map_testkit::in_vm;
use r3map_testkit::process::Process;

use crate::support::{
    LONG, Mounted, Netem, SIZE, attach, by_either_interface, check, connect, connect_to, io_timeout, node, read_direct,
    run, runtime, until,
};

/// How long a request may take: of a server that lives, on a machine that is busy, or whose connections end with it.
const REQUEST: Duration = Duration::from_secs(6);
/// The same of a server that nothing ends the connections of, so that all of it passes.
const SILENT: Duration = Duration::from_secs(2);
/// How long one waits for another server.
const WAIT: Duration = Duration::from_secs(2);

/// What the machine may add to that.
const SLACK: Duration = Duration::from_secs(20);

/// A folder with the file that is served, and the socket that it is served on.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        std::fs::File::create(this.image()).unwrap().set_len(SIZE).unwrap();
        this
    }

    fn image(&self) -> PathBuf {
        self.0.path().join("image")
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }

    /// Starts the server in a process of its own, as the child of `test`.
    fn serve(&self, test: &str) -> Process {
        let mut child = crash::child(&format!("failures::{test}"), "server", self.0.path().to_str().unwrap());
        child.wait_for_line(LONG, "serving");
        child
    }

    fn attach(&self, settings: &Settings) -> Device {
        attach(connect(&self.socket(), 2), settings)
    }
}

/// In a child that [`Place::serve`] started: serves until it is killed.
fn serve_if_child() {
    let Some(folder) = crash::role("server") else { return };
    let folder = Path::new(&folder);
    let runtime = runtime();
    let file = File::open(folder.join("image"), &r3map_local::FileSettings::default()).unwrap();
    let server = Server::new(vec![ServerExport::new("", Arc::new(file))], ServerSettings::default()).unwrap();
    runtime.block_on(server.listen(&Address::Unix(folder.join("socket")))).unwrap();
    crash::stop("serving");
}

fn short() -> Settings {
    Settings { request_timeout: Some(REQUEST), dead_connection_timeout: WAIT, ..Settings::default() }
}

/// Reads all of a device again and again until that fails; gives back when it did.
fn reader(device: &Path) -> std::thread::JoinHandle<Instant> {
    let path = device.to_owned();
    std::thread::spawn(move || {
        for offset in (0..SIZE).step_by(4096).cycle() {
            if read_direct(&path, offset).is_err() {
                break;
            }
        }
        Instant::now()
    })
}

#[test]
fn a_killed_server_fails_its_readers_in_time_and_leaves_a_usable_device() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    let test = "a_killed_server_fails_its_readers_in_time_and_leaves_a_usable_device";
    by_either_interface(|interface| {
        let place = Place::new();
        let mut server = place.serve(test);
        let device = place.attach(&Settings { interface, ..short() });
        let index = device.index();
        let readers = [reader(&device.path()), reader(&device.path())];
        std::thread::sleep(Duration::from_millis(300));
        assert!(readers.iter().all(|reader| !reader.is_finished()), "{interface:?}: reads fail with a server");
        server.kill();
        let killed = Instant::now();
        for reader in readers {
            let took = reader.join().unwrap().duration_since(killed);
            assert!(took < REQUEST + WAIT + SLACK, "{interface:?}: an error only after {took:?}");
        }
        let _ = device.detach();
        until("it is free", || !kernel::is_attached(index).unwrap());
        let _server = place.serve(test);
        let device = place.attach(&Settings { interface, device: Some(index), ..short() });
        read_direct(&device.path(), 0).unwrap();
        device.detach().unwrap();
    });
}

#[test]
fn a_process_that_is_killed_leaves_no_wedged_device() {
    if let Some(name) = crash::role("everything") {
        // Server, client and the device's owner are one process, as in a mount.
        let interface = if name == "Ioctl" { Interface::Ioctl } else { Interface::Netlink };
        let runtime = runtime();
        let server = Server::new(
            vec![ServerExport::new("", Arc::new(r3map_testkit::store::Store::new(SIZE)))],
            ServerSettings::default(),
        );
        let server = server.unwrap();
        let socket = tempfile::tempdir().unwrap().keep().join("socket");
        runtime.block_on(server.listen(&Address::Unix(socket.clone()))).unwrap();
        let settings = Settings { interface, dead_connection_timeout: Duration::ZERO, ..short() };
        let device = attach(connect(&socket, 1), &settings);
        crash::reached(&format!("attached {}", device.path().display()));
        crash::stop("waiting");
    }
    if !in_vm() {
        return;
    }
    let test = "failures::a_process_that_is_killed_leaves_no_wedged_device";
    by_either_interface(|interface| {
        let mut child = crash::child(test, "everything", &format!("{interface:?}"));
        let line = child.wait_for_line(LONG, "attached ");
        let path = Path::new(line.rsplit(' ').next().unwrap()).to_owned();
        let reader = reader(&path);
        std::thread::sleep(Duration::from_millis(300));
        assert!(!reader.is_finished());
        child.kill();
        let killed = Instant::now();
        let took = reader.join().unwrap().duration_since(killed);
        assert!(took < REQUEST + SLACK, "{interface:?}: an error only after {took:?}");
        let index = index_of(&path).unwrap();
        if kernel::is_attached(index).unwrap() {
            let _ = kernel::detach(index, true);
        }
        until("it is free", || !kernel::is_attached(index).unwrap());
    });
}

#[test]
fn a_restarted_server_takes_its_device_over_under_load() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    let test = "a_restarted_server_takes_its_device_over_under_load";
    let place = Place::new();
    let mut server = place.serve(test);
    let identifier = place.image().display().to_string();
    let patient = Settings { dead_connection_timeout: LONG, identifier: Some(identifier.clone()), ..short() };
    let device = place.attach(&patient);
    let (index, path) = (device.index(), device.path());
    device.keep().unwrap();
    run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap()]);
    let dead_links = kernel::dead_links().unwrap();
    let mounted = Mounted::new(&path);
    let filename = format!("--filename={}", mounted.path().join("file").display());
    let load = ["--name=load", &filename, "--size=8M", "--rw=randwrite", "--bs=16k", "--direct=1", "--verify=crc32c"];
    let more = ["--verify_fatal=1", "--ioengine=libaio", "--iodepth=4", "--time_based", "--runtime=4"];
    let mut fio = Process::start(Command::new("fio").args(load).args(more));
    std::thread::sleep(Duration::from_secs(1));
    server.kill();
    assert_eq!(dead_links.next(LONG).unwrap(), Some(index));
    let _server = place.serve(test);
    assert_eq!(kernel::find(&identifier), Some(index));
    let (sockets, disk) = connect(&place.socket(), 2);
    let longer = Settings { request_timeout: Some(REQUEST * 3), ..patient };
    let device = kernel::take_over(index, sockets, disk, &longer).unwrap();
    assert_eq!(Duration::from_millis(io_timeout(index)), REQUEST * 3);
    let status = fio.wait(LONG);
    assert!(status.success(), "{:?}", fio.stdout());
    drop(mounted);
    check(&path);
    device.detach().unwrap();
}

/// Over a link on which everything is lost: no connection ends, nothing is refused.
#[test]
fn a_server_that_vanishes_fails_its_readers_in_time_or_is_waited_for() {
    if !in_vm() {
        return;
    }
    let runtime = runtime();
    let store = r3map_testkit::store::Store::new(SIZE).filled(1);
    let settings = ServerSettings { stall_limit: SILENT, ..ServerSettings::default() };
    let server = Server::new(vec![ServerExport::new("", Arc::new(store))], settings).unwrap();
    let any = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let uri = format!("nbd://{}", runtime.block_on(server.listen(&any)).unwrap());
    // Both at once: one that has no patience, and one that has.
    let devices = [Duration::ZERO, LONG].map(|dead_connection_timeout| {
        let settings = Settings { request_timeout: Some(SILENT), dead_connection_timeout, ..short() };
        let device = attach(connect_to(&uri, 2), &settings);
        read_direct(&device.path(), 0).unwrap();
        device
    });
    let indices = devices.each_ref().map(Device::index);
    let dead_links = kernel::dead_links().unwrap();
    let lost = Netem::new(&["loss", "100%"]);
    let start = Instant::now();
    let [fails, waits] = devices.each_ref().map(|device| {
        let path = device.path();
        std::thread::spawn(move || read_direct(&path, 8192))
    });
    let mut dead = BTreeSet::new();
    while dead.len() < indices.len() {
        dead.insert(dead_links.next(LONG).unwrap().expect("a dead link is told"));
    }
    assert_eq!(dead, BTreeSet::from(indices));
    fails.join().unwrap().unwrap_err();
    let took = start.elapsed();
    assert!(took < SILENT + SILENT + SLACK, "an error only after {took:?}");
    until("the server has given its clients up", || server.connections() == 0);
    assert!(!waits.is_finished(), "its reader waits for a take-over");
    drop(lost);
    let (sockets, disk) = connect_to(&uri, 2);
    let again = kernel::take_over(indices[1], sockets, disk, &short()).unwrap();
    r3map_testkit::fill::check(&waits.join().unwrap().unwrap(), 8192, 1).unwrap();
    let [impatient, taken_over] = devices;
    let _ = impatient.detach();
    taken_over.keep().unwrap();
    again.detach().unwrap();
    until("both are free", || indices.iter().all(|index| !kernel::is_attached(*index).unwrap()));
    until("nobody is connected", || server.connections() == 0);
}

#[test]
fn only_who_knows_a_device_takes_it_over() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    let place = Place::new();
    let _server = place.serve("only_who_knows_a_device_takes_it_over");
    let named = Settings { identifier: Some("mine".into()), ..short() };
    let device = place.attach(&named);
    let refused = |size: u64, settings: &Settings| {
        let (sockets, disk) = connect(&place.socket(), 2);
        let error = kernel::take_over(device.index(), sockets, Disk { size, ..disk }, settings).unwrap_err();
        error.kind()
    };
    let longer = Settings { request_timeout: Some(REQUEST * 3), ..named.clone() };
    assert_eq!(refused(SIZE, &longer), ErrorKind::Conflict, "its connections live");
    assert_eq!(Duration::from_millis(io_timeout(device.index())), REQUEST, "who is refused has changed nothing");
    assert_eq!(refused(SIZE, &Settings { identifier: Some("yours".into()), ..short() }), ErrorKind::NotFound);
    assert_eq!(kernel::find("yours"), None);
    assert_eq!(refused(SIZE * 2, &named), ErrorKind::InvalidInput);
    let index = device.index();
    device.detach().unwrap();
    let (sockets, disk) = connect(&place.socket(), 1);
    let error = kernel::take_over(index, sockets, disk, &named).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[test]
fn a_device_in_use_is_neither_taken_nor_let_go() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    by_either_interface(|interface| {
        let place = Place::new();
        let _server = place.serve("a_device_in_use_is_neither_taken_nor_let_go");
        let device = place.attach(&Settings { interface, ..short() });
        let same = Settings { interface, device: Some(device.index()), ..short() };
        let (sockets, disk) = connect(&place.socket(), 1);
        let error = kernel::attach(sockets, disk, &same).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(error.message().contains(&format!("{} is in use", device.path().display())), "{error}");
        run("mkfs.ext4", &["-q", "-F", device.path().to_str().unwrap()]);
        let mounted = Mounted::new(&device.path());
        let (error, device) = device.detach().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        drop(mounted);
        let device = device.unwrap();
        check(&device.path());
        device.detach().unwrap();
    });
}

#[test]
fn anybody_may_detach_by_name() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    let place = Place::new();
    let _server = place.serve("anybody_may_detach_by_name");
    for (interface, force) in [(Interface::Netlink, false), (Interface::Netlink, true), (Interface::Ioctl, false)] {
        let device = place.attach(&Settings { interface, ..short() });
        let index = device.index();
        kernel::detach(index, force).unwrap();
        until("it is free", || !kernel::is_attached(index).unwrap());
        assert_eq!(kernel::detach(index, force).unwrap_err().kind(), ErrorKind::NotFound);
        until("its owner knows", || !device.is_alive());
    }
    assert_eq!(kernel::detach(9999, false).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn without_privilege_it_says_so() {
    serve_if_child();
    if let Some(folder) = crash::role("nobody") {
        rustix::thread::set_thread_res_uid(
            rustix::fs::Uid::from_raw(65534),
            rustix::fs::Uid::from_raw(65534),
            rustix::fs::Uid::from_raw(65534),
        )
        .unwrap();
        let (sockets, disk) = connect(&Path::new(&folder).join("socket"), 1);
        let error = kernel::attach(sockets, disk, &short()).unwrap_err();
        crash::reached(&format!("{:?}: {error}", error.kind()));
        return;
    }
    if !in_vm() {
        return;
    }
    let place = Place::new();
    let _server = place.serve("without_privilege_it_says_so");
    run("chmod", &["-R", "a+rwx", place.0.path().to_str().unwrap()]);
    let folder = place.0.path().to_str().unwrap();
    let mut child = crash::child("failures::without_privilege_it_says_so", "nobody", folder);
    let line = child.wait_for_line(LONG, "Denied: ");
    assert!(line.contains("needs root"), "{line}");
}

#[test]
fn dropping_a_device_detaches_it() {
    serve_if_child();
    if !in_vm() {
        return;
    }
    let place = Place::new();
    let _server = place.serve("dropping_a_device_detaches_it");
    for interface in [Interface::Netlink, Interface::Ioctl] {
        let device = place.attach(&Settings { interface, ..short() });
        let index = device.index();
        drop(device);
        until("it is free", || !kernel::is_attached(index).unwrap());
        assert_eq!(std::fs::File::open(node(index)).and_then(|mut file| file.read(&mut [0])).unwrap_or(0), 0);
    }
}
