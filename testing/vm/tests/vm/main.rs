//! What tests in the virtual machine rely on: that they are in it, and that it has what `contents` lists.

use std::path::Path;
use std::process::Command;

use r3map_testkit::in_vm;
use r3map_vm::contents::{MODULES, PROGRAMS};

#[test]
fn modules_are_loaded() {
    if !in_vm() {
        return;
    }
    let loaded = std::fs::read_to_string("/proc/modules").unwrap();
    for (name, _) in MODULES {
        assert!(loaded.lines().any(|line| line.split(' ').next() == Some(name)), "{name} is not in:\n{loaded}");
    }
    for device in ["/dev/nbd0", "/dev/ublk-control", "/dev/loop0"] {
        assert!(Path::new(device).exists(), "{device}");
    }
}

#[test]
fn programs_start() {
    if !in_vm() {
        return;
    }
    for program in PROGRAMS {
        let output = Command::new(program).arg("--version").output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains("cannot open shared object"), "{program}: {text}");
        assert!(!text.is_empty(), "{program} says nothing");
    }
}

#[test]
fn a_link_can_be_delayed() {
    if !in_vm() {
        return;
    }
    let tc = |arguments: &str| Command::new("tc").args(arguments.split(' ')).status().unwrap().success();
    let ping = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let start = std::time::Instant::now();
        std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        start.elapsed()
    };
    assert!(tc("qdisc add dev lo root netem delay 50ms"));
    let delayed = ping();
    assert!(tc("qdisc del dev lo root"));
    assert!(delayed.as_millis() >= 100, "a round trip of {delayed:?} over a link with 50 ms each way");
    assert!(ping() < delayed);
}
