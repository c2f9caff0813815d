//! `r3map seed`, `r3map leech` and `r3map demo migrate`: regions that change hosts while they are used.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use r3map_testkit::fill;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Program, SOON, Scene, make_file};

const BLOCK: usize = 4096;
/// What is looked at of each end.
const EDGE: usize = 1 << 20;

/// A command that is ready, and the address that it told.
fn ready(program: &mut Program, event: &str) -> String {
    program.wait_for_event(SOON, event)["uri"].as_str().expect("it tells its address").to_owned()
}

fn seed(scene: &Scene, arguments: &[&str]) -> (Program, String) {
    let mut program = scene.r3map(&[&["--json", "seed"], arguments].concat());
    let uri = ready(&mut program, "ready");
    (program, uri)
}

fn read(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    OpenOptions::new().read(true).open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Stamps one block after another until the file no longer takes it; the last stamp that each block has.
fn stamp_until_refused(path: &Path, blocks: u64) -> Vec<u64> {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let mut last = vec![0; usize::try_from(blocks).unwrap()];
    for stamp in 1u64.. {
        let block = stamp * 7919 % blocks;
        if file.write_all_at(&stamp.to_le_bytes(), block * BLOCK as u64).is_err() {
            break;
        }
        last[usize::try_from(block).unwrap()] = stamp;
    }
    last
}

#[test]
fn a_file_moves_while_it_is_written_and_no_write_is_lost() {
    Scene::with_fuse(SOON, |scene| {
        let size = 16 * MIB;
        make_file(&scene.path("disk.img"), size, 1);
        let region = format!("file:{}", scene.name("disk.img"));
        let (here, there) = (scene.path("here"), scene.path("there"));
        let (seeder, uri) = seed(scene, &[&region, &scene.name("here"), "--listen", "grpc://127.0.0.1:0"]);
        let writer = std::thread::spawn(move || stamp_until_refused(&here, size / BLOCK as u64));
        let cache = scene.name("cache");
        let mut leecher = scene.r3map(&["--json", "leech", &uri, &scene.name("there"), "--cache", &cache]);
        let running = leecher.wait_for_event(SOON, "running");
        assert!(running["downtime"]["total_seconds"].as_f64().unwrap() < 30.0, "{running}");
        let report = leecher.wait_for_event(SOON, "pulled");
        assert!(report["pulled_before"].as_u64().unwrap() > 0, "{report}");
        let gone = seeder.end_well(SOON);
        gone.event("handed_over");
        gone.event("gone");
        let (stamps, bytes) = (writer.join().unwrap(), read(&there, usize::try_from(size).unwrap()));
        for (block, stamp) in stamps.iter().enumerate() {
            let found = u64::from_le_bytes(bytes[block * BLOCK..][..8].try_into().unwrap());
            assert!(*stamp == 0 || found == *stamp, "block {block} has {found} and not {stamp}");
            fill::check(&bytes[block * BLOCK + 8..(block + 1) * BLOCK], (block * BLOCK + 8) as u64, 1).unwrap();
        }
        scene.step("the region is kept, and seeded by another process");
        leecher.terminate();
        leecher.end_well(SOON);
        let refused = scene.ended(&["seed", &region, &scene.name("here"), "--listen", "grpc://127.0.0.1:0"]);
        assert!(refused.code == Some(1) && refused.text().contains("the region has left"), "{refused:?}");
        let place = scene.name("there");
        let arguments = [&place, "--listen", "grpc://127.0.0.1:0", "--cache", &cache];
        let (mut seeder, _) = seed(scene, &arguments);
        assert!(read(&there, usize::try_from(size).unwrap()) == bytes);
        seeder.terminate();
        assert!(seeder.wait(SOON).success());
    });
}

#[test]
fn a_seeder_that_is_killed_after_the_handover_is_started_again_and_the_rest_comes() {
    Scene::with_fuse(SOON, |scene| {
        let size = 64 * MIB;
        make_file(&scene.path("disk.img"), size, 1);
        let region = format!("file:{}", scene.name("disk.img"));
        let (mut seeder, uri) = seed(scene, &[&region, &scene.name("here"), "--listen", "grpc://127.0.0.1:0"]);
        let mut leecher = scene.r3map(&["--json", "leech", &uri, &scene.name("there"), "--finalize", "manual"]);
        std::thread::sleep(Duration::from_millis(100));
        while leecher.is_running() && leecher.stdout().is_empty() {
            let id = Pid::from_raw(leecher.id().try_into().unwrap()).unwrap();
            kill_process(id, Signal::USR1).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        leecher.wait_for_event(SOON, "running");
        seeder.kill();
        std::thread::sleep(Duration::from_millis(300));
        let (seeder, again) = seed(scene, &[&region, &scene.name("here"), "--listen", &uri]);
        assert_eq!(again, uri);
        leecher.wait_for_event(SOON, "pulled");
        seeder.end_well(SOON);
        let bytes = read(&scene.path("there"), usize::try_from(size).unwrap());
        fill::check(&bytes[..EDGE], 0, 1).unwrap();
        fill::check(&bytes[bytes.len() - EDGE..], size - EDGE as u64, 1).unwrap();
    });
}

#[test]
fn commands_are_run_and_a_failing_one_keeps_the_region_where_it_is() {
    Scene::with_fuse(SOON, |scene| {
        make_file(&scene.path("disk.img"), MIB, 1);
        let region = format!("file:{}", scene.name("disk.img"));
        let listen = ["--listen", "grpc://127.0.0.1:0"];
        let suspend = format!("test -e {}", scene.name("may-go"));
        let here = scene.name("here");
        let (seeder, uri) = seed(scene, &[&[&region, &here, "--on-suspend", &suspend][..], &listen].concat());
        let refused = scene.ended(&["leech", &uri, &scene.name("there")]);
        assert!(refused.code == Some(1) && refused.text().contains("the region stays where it is"), "{refused:?}");
        std::fs::write(scene.path("may-go"), "").unwrap();
        let resume = format!("echo \"$R3MAP_PATH\" > {}", scene.name("resumed"));
        let there = scene.name("there");
        let mut leecher = scene.r3map(&[
            "--json",
            "leech",
            &uri,
            &there,
            "--on-resume",
            &resume,
            "--then-seed",
            "grpc://127.0.0.1:0",
        ]);
        leecher.wait_for_event(SOON, "running");
        assert_eq!(std::fs::read_to_string(scene.path("resumed")).unwrap().trim(), there);
        seeder.end_well(SOON);
        scene.step("and on to the next");
        let next = ready(&mut leecher, "seeding");
        let mut last = scene.r3map(&["--json", "leech", &next, &scene.name("last")]);
        last.wait_for_event(SOON, "pulled");
        leecher.end_well(SOON);
        fill::check(&read(&scene.path("last"), EDGE), 0, 1).unwrap();
    });
}

#[test]
fn both_sides_must_know_the_secret() {
    Scene::with_fuse(SOON, |scene| {
        std::fs::write(scene.path("secret"), "open sesame\n").unwrap();
        std::fs::write(scene.path("guess"), "open\n").unwrap();
        let secret = scene.name("secret");
        let here = scene.name("here");
        let (_seeder, uri) =
            seed(scene, &["memory:?size=1MiB", &here, "--listen", "grpc://127.0.0.1:0", "--secret-file", &secret]);
        for wrong in [vec![], vec!["--secret-file".to_owned(), scene.name("guess")]] {
            let wrong: Vec<_> = wrong.iter().map(String::as_str).collect();
            let refused = scene.ended(&[&["leech", &uri, &scene.name("there")], &wrong[..]].concat());
            assert!(refused.code == Some(1) && refused.text().contains("secret"), "{refused:?}");
        }
        let mut leecher = scene.r3map(&["--json", "leech", &uri, &scene.name("there"), "--secret-file", &secret]);
        leecher.wait_for_event(SOON, "pulled");
    });
}

#[test]
fn the_demo_proves_that_no_count_is_lost() {
    Scene::play(SOON, |scene| {
        let outcome = scene.r3map(&["--json", "demo", "migrate", "--size", "8MiB", "--rtt", "5ms"]).end_well(SOON);
        let proved = outcome.event("proved");
        assert!(proved["before"].as_u64().unwrap() > 0 && proved["after"].as_u64().unwrap() > 0, "{proved}");
    });
}
