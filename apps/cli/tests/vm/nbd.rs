//! `r3map nbd attach` and `detach`, with foreign servers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use r3map_testkit::in_vm;
use r3map_testkit::process::Process;
use serde_json::Value;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);

/// A server of a file, which is what it serves again when it is started again.
struct Server {
    folder: TempDir,
    process: Process,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("image")).unwrap().set_len(8 << 20).unwrap();
        let process = Self::start(&folder);
        Self { folder, process }
    }

    fn start(folder: &TempDir) -> Process {
        let socket = folder.path().join("socket");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--persistent", "--shared=8", "--socket"]).arg(&socket);
        let process = Process::start(command.arg(folder.path().join("image")));
        let end = Instant::now() + LONG;
        while !socket.exists() {
            assert!(Instant::now() < end, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        process
    }

    fn restart(&mut self) {
        self.process.kill();
        self.process = Self::start(&self.folder);
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}/socket", self.folder.path().display())
    }
}

/// Runs the command; gives back its standard output if it succeeded, its standard error otherwise.
fn r3map(arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_r3map")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn fails(arguments: &[&str], hint: &str) {
    let error = r3map(arguments).expect_err("it must fail");
    assert!(
        error.starts_with("error: ") && error.lines().count() == 1 && error.contains(hint),
        "{arguments:?}: {error}"
    );
}

fn write(device: &str) {
    let file = File::options().write(true).open(device).unwrap();
    file.write_all_at(b"by the device", 4096).unwrap();
}

#[test]
fn a_device_is_attached_used_and_detached() {
    if !in_vm() {
        return;
    }
    let server = Server::new();
    let device = r3map(&["nbd", "attach", &server.uri()]).unwrap();
    assert!(device.starts_with("/dev/nbd"), "{device}");
    write(&device);
    // The page cache has it, and nobody has asked for a flush yet.
    r3map(&["nbd", "detach", &device]).unwrap();
    let mut bytes = [0; 13];
    File::open(server.folder.path().join("image")).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"by the device");
    fails(&["nbd", "detach", &device], "is not attached");
}

#[test]
fn a_device_of_ones_choice_and_events_for_scripts() {
    if !in_vm() {
        return;
    }
    let server = Server::new();
    let line = r3map(&["--json", "nbd", "attach", &server.uri(), "/dev/nbd7"]).unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["event"], &event["device"]), (&"attached".into(), &"/dev/nbd7".into()));
    assert_eq!(event["uri"], server.uri());
    fails(&["nbd", "attach", &server.uri(), "/dev/nbd7"], "/dev/nbd7 is in use");
    fails(&["nbd", "attach", &server.uri(), "/dev/loop0"], "/dev/nbdN is wanted");
    let held = File::options().read(true).write(true).custom_exclusive().open("/dev/nbd7").unwrap();
    fails(&["nbd", "detach", "/dev/nbd7"], "/dev/nbd7 is in use");
    drop(held);
    let line = r3map(&["--json", "nbd", "detach", "/dev/nbd7"]).unwrap();
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&event["event"], &event["device"]), (&"detached".into(), &"/dev/nbd7".into()));
}

/// Opening as a mount does: nobody else may have it so.
trait Exclusive {
    fn custom_exclusive(&mut self) -> &mut Self;
}

impl Exclusive for std::fs::OpenOptions {
    fn custom_exclusive(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt;
        self.custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed())
    }
}

#[test]
fn a_restarted_server_takes_its_device_over() {
    if !in_vm() {
        return;
    }
    let mut server = Server::new();
    let uri = server.uri();
    fails(&["nbd", "attach", &uri, "--take-over"], "attach it without taking over");
    let device = r3map(&["nbd", "attach", &uri, "--wait", "60s"]).unwrap();
    write(&device);
    fails(&["nbd", "attach", &uri, "--take-over"], "its connections live");
    server.restart();
    let reader = {
        let device = device.clone();
        std::thread::spawn(move || File::open(device)?.read_exact_at(&mut [0; 512], 1 << 20))
    };
    // The device keeps its own patience.
    assert_eq!(r3map(&["nbd", "attach", &uri, "--take-over"]).unwrap(), device);
    reader.join().unwrap().unwrap();
    r3map(&["nbd", "detach", &device]).unwrap();
}

#[test]
fn what_the_kernel_cannot_have() {
    if !in_vm() {
        return;
    }
    fails(&["nbd", "attach", "nbds://127.0.0.1:1/x"], "does not speak TLS");
    fails(&["nbd", "attach", "nbd://127.0.0.1:1/x"], "127.0.0.1:1");
    fails(&["nbd", "detach", "/dev/nbd15"], "/dev/nbd15 is not attached");
    fails(&["nbd", "detach", "/dev/nbd999"], "there is no /dev/nbd999");
}
