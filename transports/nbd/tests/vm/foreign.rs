//! The kernel's client on other people's servers, over what `connect` negotiates.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use r3map_nbd::kernel::{self, Device, Readiness, Settings};
use r3map_testkit::in_vm;
use r3map_testkit::process::Process;
use rustix::fs::OFlags;

use crate::support::{
    Aligned, attach, by_either_interface, check, connect, exercise, open_direct, read_direct, run, until,
};

/// A server on a Unix socket in a folder of its own.
struct Server {
    folder: tempfile::TempDir,
    /// Killed on drop.
    _process: Process,
}

impl Server {
    fn nbdkit(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(folder.path().join("socket"));
        Self::start(folder, command.args(arguments))
    }

    fn start(folder: tempfile::TempDir, command: &mut Command) -> Self {
        let process = Process::start(command);
        let socket = folder.path().join("socket");
        until("the server listens", || socket.exists());
        Self { folder, _process: process }
    }

    fn attach(&self, settings: &Settings) -> Device {
        attach(connect(&self.folder.path().join("socket"), 4), settings)
    }
}

#[test]
fn nbdkit_by_every_way() {
    if !in_vm() {
        return;
    }
    by_either_interface(|interface| {
        let server = Server::nbdkit(&["memory", "64M"]);
        for readiness in [Readiness::Polling, Readiness::Events] {
            let device = server.attach(&Settings { interface, readiness, ..Settings::default() });
            assert_eq!(device.interface(), interface);
            assert!(device.is_alive() && kernel::is_attached(device.index()).unwrap());
            let sectors = run("blockdev", &["--getsz", device.path().to_str().unwrap()]);
            assert_eq!(sectors.trim(), (64 * 2048).to_string());
            let path = device.path();
            match readiness {
                Readiness::Polling => exercise(&path),
                Readiness::Events => drop(read_direct(&path, 0).unwrap()),
            }
            device.detach().unwrap();
            until("it is free", || !Path::new("/sys/block").join(path.file_name().unwrap()).join("pid").exists());
        }
    });
}

#[test]
fn what_was_written_is_there_when_it_is_attached_again() {
    if !in_vm() {
        return;
    }
    let server = Server::nbdkit(&["memory", "64M"]);
    let device = server.attach(&Settings::default());
    exercise(&device.path());
    let old = device.index();
    device.detach().unwrap();
    let device = server.attach(&Settings { device: Some(old), ..Settings::default() });
    assert_eq!(device.index(), old);
    check(&device.path());
    device.detach().unwrap();
}

#[test]
fn qemu_nbd() {
    if !in_vm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let socket = folder.path().join("socket");
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--persistent", "--shared=4", "--socket"]).arg(socket).arg(image);
    let server = Server::start(folder, &mut command);
    let device = server.attach(&Settings::default());
    exercise(&device.path());
    device.detach().unwrap();
}

#[test]
fn flush_fua_and_discard_are_on_the_wire() {
    if !in_vm() {
        return;
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let option = format!("logfile={}", log.path().display());
    let server = Server::nbdkit(&["--filter=log", "memory", "64M", &option]);
    let device = server.attach(&Settings::default());
    let path = device.path();
    let has = |words: &[&str]| {
        let text = std::fs::read_to_string(log.path()).unwrap();
        text.lines().any(|line| words.iter().all(|word| line.contains(word)))
    };
    let page = Box::new(Aligned([7; 4096]));
    std::os::unix::fs::FileExt::write_all_at(&open_direct(&path, OFlags::empty()), &page.0, 8192).unwrap();
    assert!(has(&[" Write ", "offset=0x2000", "fua=0"]) && !has(&[" Write ", "fua=1"]));
    std::os::unix::fs::FileExt::write_all_at(&open_direct(&path, OFlags::DSYNC), &page.0, 4096).unwrap();
    assert!(has(&[" Write ", "offset=0x1000", "fua=1"]));
    open_direct(&path, OFlags::empty()).sync_all().unwrap();
    assert!(has(&[" Flush "]));
    run("blkdiscard", &["--offset", "4096", "--length", "1M", path.to_str().unwrap()]);
    assert!(has(&[" Trim ", "offset=0x1000", "count=0x100000"]));
    assert_eq!(read_direct(&path, 4096).unwrap(), [0; 4096]);
    device.detach().unwrap();
}

#[test]
fn an_error_of_the_server_is_one_of_the_device() {
    if !in_vm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trigger = folder.path().join("fail");
    let option = format!("error-file={}", trigger.display());
    let server = Server::nbdkit(&["--filter=error", "memory", "64M", "error=EIO", "error-rate=100%", &option]);
    let device = server.attach(&Settings::default());
    read_direct(&device.path(), 0).unwrap();
    std::fs::write(&trigger, "").unwrap();
    let error = read_direct(&device.path(), 0).map(drop).expect_err("the read fails");
    assert_eq!(error.raw_os_error(), Some(5));
    std::fs::remove_file(&trigger).unwrap();
    read_direct(&device.path(), 0).unwrap();
    device.detach().unwrap();
}

#[test]
fn a_server_that_is_slow_is_no_dead_one() {
    if !in_vm() {
        return;
    }
    let server = Server::nbdkit(&["--filter=delay", "memory", "64M", "rdelay=1500ms"]);
    let settings = Settings { request_timeout: Some(Duration::from_secs(20)), ..Settings::default() };
    let device = server.attach(&settings);
    read_direct(&device.path(), 1 << 20).unwrap();
    assert!(device.is_alive());
    device.detach().unwrap();
}
