//! Block devices on the host, which has loop devices; the better kinds are tested in the virtual machine.

use std::fs::{File, read_link};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use r3map_testkit::fill;
use serde_json::Value;

use crate::support::{MIB, Program, SOON, Scene, make_file, wait_until};

const LONG: Duration = Duration::from_secs(240);
const SIZE: u64 = 8 * MIB;

/// What the `ready` event says, and the command.
fn mount(scene: &Scene, uri: &str, arguments: &[&str]) -> (Program, Value) {
    let mut all = vec!["--json", "mount", uri];
    all.extend(arguments);
    let mut program = scene.r3map(&all);
    let ready = program.wait_for_event(SOON, "ready");
    (program, ready)
}

fn has_device(device: &Path) -> bool {
    let name = device.file_name().and_then(|name| name.to_str()).expect("devices have plain names");
    Path::new("/sys/block").join(name).join("loop/backing_file").exists()
}

fn device_of(ready: &Value) -> PathBuf {
    ready["path"].as_str().expect("the ready line has a path").into()
}

#[test]
fn the_best_device_is_chosen_and_the_others_are_explained() {
    Scene::with_root(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let link = scene.name("disk");
        let (mut program, ready) = mount(scene, &server.uri, &["--as", "auto", &link]);
        let device = device_of(&ready);
        assert_eq!((&ready["size"], &ready["link"]), (&SIZE.into(), &link.clone().into()));
        assert_eq!(read_link(&link).expect("there is a link"), device);
        let kind = ready["as"].as_str().expect("it says what it is").to_owned();
        if !Path::new("/dev/ublk-control").exists() && !Path::new("/sys/module/nbd").exists() {
            assert_eq!(kind, "loop");
            let direct = Path::new("/sys/block").join(device.file_name().expect("a name")).join("loop/dio");
            assert_eq!(std::fs::read_to_string(direct).expect("a loop device").trim(), "1", "not cached twice");
            let said = program.stdout().join("\n");
            assert!(said.contains("modprobe ublk_drv") && said.contains("modprobe nbd"), "{said}");
        }
        let file = File::options().read(true).write(true).open(&link).expect("the link leads to the device");
        let mut seen = vec![0; 100_000];
        file.read_exact_at(&mut seen, MIB).expect("it reads");
        assert!(seen == fill::bytes(MIB, 100_000, 1));
        file.write_all_at(b"through the device", 12_345).expect("it writes");
        drop(file);
        program.terminate();
        program.end_well(SOON);
        assert!(!has_device(&device) && !Path::new(&link).exists(), "what it makes it removes");
        server.stop();
        let mut stored = [0; 18];
        File::open(scene.path("source")).and_then(|file| file.read_exact_at(&mut stored, 12_345)).expect("it is there");
        assert_eq!(&stored, b"through the device");
    });
}

#[test]
fn a_killed_daemon_leaves_errors_and_no_device() {
    Scene::with_root(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let link = scene.name("disk");
        let arguments = ["--as", "loop", "--mode", "direct", &link];
        let (mut program, ready) = mount(scene, &server.uri, &arguments);
        let device = device_of(&ready);
        let file = File::options().read(true).write(true).open(&device).expect("it can be opened");
        file.write_all_at(&[7; 8192], 4096).expect("it is cached");
        program.kill();
        // What the kernel has not read yet cannot be had any more.
        let mut seen = vec![0; 4096];
        wait_until(SOON, "reading fails", || file.read_exact_at(&mut seen, SIZE / 2).is_err());
        drop(file);
        wait_until(SOON, "the device goes with its last user", || !has_device(&device));
        // The link that is left over is taken over.
        let (program, _) = mount(scene, &server.uri, &arguments);
        program.terminate();
        program.end_well(SOON);
        server.stop();
    });
}

#[test]
fn what_cannot_be_a_device_is_refused_in_one_line() {
    Scene::with_root(LONG, |scene| {
        make_file(&scene.path("odd"), MIB + 1, 1);
        make_file(&scene.path("even"), MIB, 1);
        let (odd, even) = (format!("file:{}", scene.name("odd")), format!("file:{}", scene.name("even")));
        std::fs::write(scene.path("taken"), "mine").expect("there is room");
        let taken = scene.name("taken");
        for (arguments, says) in [
            (vec![&*odd, "--as", "block"], "whole sectors"),
            (vec![&*even, "--as", "loop", &taken], "exists already"),
            (vec![&*even, "--as", "loop", "--block-size", "3000"], "512, 1024, 2048 or 4096"),
            (vec![&*even, "--as", "loop", "--keep", "1"], "only ublk devices can be kept"),
            (vec![&*even, "--as", "ublk", "--keep", "1"], "dies with the process"),
            (vec![&*even, "--as", "loop", "--allow-other"], "are for files"),
        ] {
            let outcome = scene.ended(&[&["mount"], &arguments[..]].concat());
            assert_eq!(outcome.code, Some(1), "{arguments:?}: {outcome:?}");
            assert!(outcome.text().contains(says), "{arguments:?}: {}", outcome.text());
        }
        let outcome = scene.ended(&["remove", "/dev/loop0"]);
        assert!(outcome.text().contains("no device that can be kept"), "{}", outcome.text());
    });
}

#[test]
fn ordinary_users_are_told_that_they_need_root() {
    Scene::with_root(LONG, |scene| {
        make_file(&scene.path("even"), MIB, 1);
        let uri = "memory:?size=1MiB";
        let outcome = scene.r3map_as_nobody(&["mount", uri, "--as", "loop"]).end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.text().contains("made by root"), "{}", outcome.text());
    });
}
