//! Migrations between `r3map` and the r3map programs written in Go, which a program on gRPC's C core plays.

use std::process::Command;

use r3map_testkit::process::Process;
use r3map_testkit::{fill, skip};

use crate::migrate::{LISTEN, Seeder, leech, seed_file_at, tell};
use crate::support::{MIB, SOON, Scene};

/// The last chunk is short.
const SIZE: u64 = MIB + 4096;
/// Theirs, which is not ours.
const CHUNK: u64 = 8192;

/// The other side, if this machine has gRPC's C core.
fn peer(arguments: &[&str]) -> Option<Process> {
    let has_grpc = |python: &&str| {
        let probe = Command::new(python).args(["-c", "import grpc"]).output();
        probe.is_ok_and(|output| output.status.success())
    };
    let Some(python) = ["/usr/bin/python3", "python3"].into_iter().find(has_grpc) else {
        skip("there is no python3 with grpc (apt-get install python3-grpcio)");
        return None;
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/peer/go_seeder.py");
    Some(Process::start(Command::new(python).arg(script).args(arguments)))
}

fn go_leecher(seeder: &Seeder, file: &str) -> Option<Process> {
    let target = seeder.address().to_string();
    peer(&["leech", &target, &SIZE.to_string(), &CHUNK.to_string(), file])
}

#[test]
fn a_program_in_go_takes_a_region_that_is_written_and_no_write_is_lost() {
    Scene::with_fuse(SOON, |scene| {
        std::fs::write(scene.path("secret"), "open sesame\n").expect("it can be made");
        let secret = ["--secret-file", &scene.name("secret")];
        for (number, options) in [&[][..], &[secret[0], secret[1], "--open-to-go"]].into_iter().enumerate() {
            let (image, here) = (format!("disk{number}.img"), format!("here{number}"));
            let (mut seeder, here, stamps) = seed_file_at(scene, (&image, &here), SIZE, options);
            let there = scene.path("there");
            let Some(mut go) = go_leecher(&seeder, &scene.name("there")) else { return };
            let writer = stamps.start(here);
            go.wait_for_line(SOON, "copied");
            seeder.program.wait_for_event(SOON, "tracked");
            writer.goes_on();
            go.send("\n");
            let stamps = writer.refused();
            let all = go.wait_for_line(SOON, "has all of it");
            assert!(!all.contains("which 0 chunks"), "it was written meanwhile: {all}");
            assert!(go.wait(SOON).success(), "{:?}", go.stderr());
            seeder.ends();
            stamps.check(&there);
        }
    });
}

#[test]
fn a_program_in_go_is_refused_where_there_is_a_secret_that_it_cannot_show() {
    Scene::with_fuse(SOON, |scene| {
        std::fs::write(scene.path("secret"), "open sesame\n").expect("it can be made");
        let (seeder, here, stamps) =
            seed_file_at(scene, ("disk.img", "here"), SIZE, &["--secret-file", &scene.name("secret")]);
        let writer = stamps.start(here);
        let Some(mut go) = go_leecher(&seeder, &scene.name("there")) else { return };
        go.wait_for_line(SOON, "refused: PERMISSION_DENIED");
        writer.goes_on();
        drop(seeder);
        writer.refused();
    });
}

#[test]
fn a_region_is_taken_from_a_program_in_go_that_writes_it() {
    Scene::with_fuse(SOON, |scene| {
        let size = SIZE + 100;
        let mut expected = fill::bytes(0, usize::try_from(size).expect("it is small"), 7);
        std::fs::write(scene.path("region"), &expected).expect("it can be made");
        let Some(mut go) = peer(&["seed", &scene.name("region"), &CHUNK.to_string()]) else { return };
        let line = go.wait_for_line(SOON, "listens on ");
        let uri = format!("grpc://{}", line.trim_start_matches("listens on "));
        let (bytes, chunk, cache) = (size.to_string(), CHUNK.to_string(), scene.name("cache"));
        let options = ["--size", &bytes, "--chunk-size", &chunk, "--cache", &cache, "--finalize", "manual"];
        let mut leecher = leech(scene, &uri, "there", &[&options[..], &["--then-seed", LISTEN[1]]].concat());
        leecher.wait_for_event(SOON, "copied");
        for (offset, text) in [(5, "early"), (20_000, "later"), (size - 4, "last")] {
            go.send(&format!("write {offset} {text}\n"));
            go.wait_for_line(SOON, &format!("written at {offset}"));
            let at = usize::try_from(offset).expect("it is small");
            expected[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        tell(&leecher);
        go.wait_for_line(SOON, "suspended");
        leecher.wait_for_event(SOON, "running");
        let report = leecher.wait_for_event(SOON, "pulled");
        assert_eq!(report["rounds"], 0, "it cannot say what was written before: {report}");
        assert!(report["pulled_after"].as_u64().is_some_and(|bytes| (1..=4 * CHUNK).contains(&bytes)), "{report}");
        go.wait_for_line(SOON, "closed");
        assert!(go.wait(SOON).success(), "{:?}", go.stderr());
        leecher.wait_for_event(SOON, "seeding");
        assert!(std::fs::read(scene.path("there")).expect("it is shown") == expected);
    });
}
