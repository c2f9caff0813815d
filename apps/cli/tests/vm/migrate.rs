//! `r3map seed` and `r3map leech` with block devices: what is written on one device is on the other, of whatever kind.

use std::fs::{File, read_link};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::in_vm;
use r3map_testkit::process::Process;
use serde_json::Value;

const LONG: Duration = Duration::from_secs(60);
const SIZE: u64 = 4 << 20;

fn start(arguments: &[&str]) -> Process {
    Process::start(Command::new(env!("CARGO_BIN_EXE_r3map")).arg("--json").args(arguments))
}

fn event(program: &mut Process, name: &str) -> Value {
    serde_json::from_str(&program.wait_for_line(LONG, &format!(r#""event":"{name}""#))).unwrap()
}

fn write(link: &Path, bytes: &[u8], at: u64) {
    let device = File::options().write(true).open(link).unwrap();
    device.write_all_at(bytes, at).unwrap();
    device.sync_all().unwrap();
}

fn read(link: &Path, at: u64) -> [u8; 5] {
    let mut bytes = [0; 5];
    File::open(link).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn a_device_becomes_one_over_there_whatever_kinds_they_are() {
    if !in_vm() {
        return;
    }
    for (from, to) in [("ublk", "nbd"), ("nbd", "loop"), ("loop", "auto")] {
        let folder = tempfile::tempdir().unwrap();
        let name = |file: &str| folder.path().join(file).display().to_string();
        let (here, there) = (name("here"), name("there"));
        File::create(name("image")).unwrap().set_len(SIZE).unwrap();
        let (image, uri) = (format!("file:{}", name("image")), format!("grpc+unix://{}", name("socket")));
        let mut seeder = start(&["seed", &image, &here, "--as", from, "--listen", &uri]);
        let ready = event(&mut seeder, "ready");
        assert_eq!((&ready["as"][0], &ready["links"][0]), (&from.into(), &here.as_str().into()));
        write(Path::new(&here), b"early", 12_288);
        let mut leecher = start(&[
            "leech",
            &uri,
            &there,
            "--as",
            to,
            "--cache",
            &name("cache"),
            "--finalize",
            "manual",
            "--on-resume",
            "test -b \"$R3MAP_PATH\"",
        ]);
        event(&mut leecher, "copied");
        write(Path::new(&here), b"later", 200_704);
        leecher.send("\n");
        let running = event(&mut leecher, "running");
        let kind = if to == "auto" { "ublk" } else { to };
        assert_eq!((&running["as"][0], &running["paths"][0]), (&kind.into(), &there.as_str().into()));
        let stale = File::options().write(true).open(&here).and_then(|old| {
            old.write_all_at(b"stale", 0)?;
            old.sync_all()
        });
        assert!(stale.is_err(), "{from}: the old device is fenced");
        assert!(read_link(&there).unwrap().starts_with("/dev"));
        assert_eq!((&read(Path::new(&there), 12_288), &read(Path::new(&there), 200_704)), (b"early", b"later"));
        event(&mut leecher, "pulled");
        event(&mut seeder, "gone");
        assert!(seeder.wait(LONG).success());
        assert!(Path::new(&here).symlink_metadata().is_err(), "{from}: the link goes with the device");
        assert!(
            !leecher.stderr().iter().any(|line| line.contains("could not be started")),
            "{to}: {:?}",
            leecher.stderr()
        );
        write(Path::new(&there), b"there", 4096);
        leecher.terminate();
        assert!(leecher.wait(LONG).success(), "{:?} {:?}", leecher.stdout(), leecher.stderr());
        assert!(Path::new(&there).symlink_metadata().is_err(), "{to}: the link goes with the device");
    }
}
