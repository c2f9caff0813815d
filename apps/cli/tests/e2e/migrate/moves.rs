//! Regions that are moved while they are written, as files, in directories, several as one; and what is said of it.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::process::Process;
use r3map_testkit::proxy::DelayProxy;

use super::{LISTEN, SIZE, SLOW, Seeder, address, complains, leech, leech_ended, seed, seed_file};
use crate::support::{MIB, SOON, Scene, is_mounted, make_file};

#[test]
fn a_region_goes_round_while_it_is_written_and_no_write_is_lost() {
    Scene::with_fuse(2 * SOON, |scene| {
        let (first, here, stamps) = seed_file(scene, SIZE, &[]);
        let writer = stamps.start(here);
        scene.step("from a to b");
        let (cache, next) = (scene.name("b.cache"), ["--then-seed", "grpc://127.0.0.1:0"]);
        let mut b = leech(scene, &first.uri, "b", &[&["--cache", &cache], &next[..]].concat());
        let running = b.wait_for_event(SOON, "running");
        assert!(running["downtime"]["total_seconds"].as_f64().is_some_and(|time| time > 0.0), "{running}");
        let stamps = writer.refused();
        let writer = stamps.start(scene.path("b"));
        let report = b.wait_for_event(SOON, "pulled");
        assert!(report["rounds"].as_u64().is_some_and(|rounds| rounds > 0), "{report}");
        assert!(report["pulled_before"].as_u64().is_some_and(|bytes| bytes >= SIZE), "{report}");
        let b = Seeder { uri: address(&mut b, "seeding"), program: b };
        first.ends();
        writer.goes_on();
        scene.step("from b to c, in memory");
        let mut c = leech(scene, &b.uri, "c", &next);
        c.wait_for_event(SOON, "running");
        let writer = writer.refused().start(scene.path("c"));
        let c = Seeder { uri: address(&mut c, "seeding"), program: c };
        b.ends();
        writer.goes_on();
        scene.step("from c to a");
        let back = scene.name("a.cache");
        let mut a = leech(scene, &c.uri, "here", &["--cache", &back]);
        assert_eq!(a.wait_for_event(SOON, "running")["epoch"], 4, "each owner has an epoch of its own");
        let writer = writer.refused().start(scene.path("here"));
        a.wait_for_event(SOON, "pulled");
        c.ends();
        writer.goes_on();
        let stamps = writer.stop();
        stamps.check(&scene.path("here"));
        a.terminate();
        a.end_well(SOON).event("stopped");
        scene.step("what arrived is kept, and what has left is not shown again");
        let old = format!("file:{}", scene.name("disk.img"));
        complains(&scene.ended(&[&["seed", &old, &scene.name("old")], &LISTEN[..]].concat()), "the region has left");
        let once_more = leech_ended(scene, &["grpc://127.0.0.1:1", &scene.name("x"), "--cache", &back]);
        complains(&once_more, "has arrived here already");
        let again = seed(scene, &[&[scene.name("again").as_str(), "--cache", &back], &LISTEN[..]].concat());
        stamps.check(&scene.path("again"));
        again.program.terminate();
        again.program.end_well(SOON).event("stopped");
    });
}

#[test]
fn a_region_is_moved_as_a_file_in_a_directory() {
    Scene::with_fuse(SOON, |scene| {
        let entry = ["--entry", "disk.raw"];
        let (seeder, here, stamps) = seed_file(scene, MIB, &entry);
        let writer = stamps.start(here.join("disk.raw"));
        let resume = format!("echo \"$R3MAP_PATH\" > {}", scene.name("resumed"));
        let mut leecher = leech(scene, &seeder.uri, "there", &[&entry[..], &["--on-resume", &resume]].concat());
        let running = leecher.wait_for_event(SOON, "running");
        let shown = scene.name("there/disk.raw");
        assert_eq!((&running["paths"][0], &running["as"][0]), (&shown.as_str().into(), &"file".into()));
        let resumed = std::fs::read_to_string(scene.path("resumed")).expect("the command was run before");
        assert_eq!(resumed.trim(), shown);
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        writer.refused().check(&scene.path("there/disk.raw"));
    });
}

#[test]
fn enter_moves_it_and_every_step_is_said_in_words() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = seed_file(scene, MIB, &[]);
        let mut leecher = scene.r3map(&["leech", &seeder.uri, &scene.name("there"), "--finalize", "manual"]);
        leecher.wait_for_line(SOON, "Enter or SIGUSR1 moves it");
        leecher.send("\n");
        let running = leecher.wait_for_line(SOON, "running: ");
        for part in ["downtime", "suspend", "flush", "round trip", "resume"] {
            assert!(running.contains(part), "{running}");
        }
        let report = leecher.wait_for_line(SOON, "pulled: ");
        assert!(report.contains("before the move") && report.contains("after it"), "{report}");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

/// Runs the command on a terminal of its own.
fn on_a_terminal(arguments: &[&str]) -> Process {
    let command = format!("stty columns 150; exec {} {}", env!("CARGO_BIN_EXE_r3map"), arguments.join(" "));
    let script = ["--quiet", "--flush", "--return", "--command", &command, "/dev/null"];
    // Where the terminal is not known nothing is drawn.
    Process::start(Command::new("script").args(script).env("TERM", "xterm"))
}

#[test]
fn both_sides_draw_a_bar_on_a_terminal() {
    Scene::with_fuse(SOON, |scene| {
        make_file(&scene.path("disk.img"), SIZE, 1);
        let (region, here) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let mut seeder = on_a_terminal(&["seed", &region, &here, LISTEN[0], LISTEN[1]]);
        let ready = seeder.wait_for_line(SOON, "to be taken over at ");
        let address = ready.rsplit("grpc://").next().expect("it tells its address").trim().to_owned();
        let line =
            DelayProxy::tcp(address.parse::<SocketAddr>().expect("it is one"), Duration::ZERO).expect("a port is free");
        line.set_rate(NonZeroU64::new(4 * SLOW));
        let uri = format!("grpc://{}", line.socket_addr());
        let mut leecher = on_a_terminal(&["leech", &uri, &scene.name("there"), "--cache", &scene.name("cache")]);
        leecher.wait_for_line(SOON, "pulled: ");
        assert!(seeder.wait(SOON).success());
        leecher.send("\x03");
        leecher.wait_for_line(SOON, "stopped: ");
        assert!(leecher.wait(SOON).success());
        for (program, bar) in [(&mut seeder, "sending ["), (&mut leecher, "copying [")] {
            let said = program.stdout().join("\n");
            assert!(said.contains(bar) && said.contains("8.00 MiB"), "{said:?}");
        }
    });
}

/// Also where the one in memory is named first: otherwise the old file would be shown again, beside the new one.
#[test]
fn one_of_two_that_is_a_file_has_the_ledger_of_both() {
    Scene::with_fuse(SOON, |scene| {
        make_file(&scene.path("disk.img"), MIB, 1);
        let (file, disk, memory) =
            (format!("file:{}", scene.name("disk.img")), scene.name("disk"), scene.name("memory"));
        let both = ["memory:?size=300001", memory.as_str(), "--also", &file, &disk];
        let arguments = [&both[..], &LISTEN[..]].concat();
        let seeder = seed(scene, &arguments);
        let mut leecher = leech(scene, &seeder.uri, "there", &["--also", &scene.name("there-too")]);
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        complains(&scene.ended(&[&["seed"], &arguments[..]].concat()), "the region has left");
        assert!(!is_mounted(&scene.path("disk")));
    });
}

/// What another server has is still there when this process has ended, and nothing lies beside it.
#[test]
fn who_seeds_what_has_no_ledger_is_told_so() {
    Scene::with_fuse(SOON, |scene| {
        let server = scene.serve("memory:?size=1MiB", &[]);
        let note = "give it a --ledger FILE";
        let said = |arguments: &[&str]| {
            let mut seeder = scene.r3map(&[&["--json", "seed"], arguments, &LISTEN[..]].concat());
            seeder.wait_for_event(SOON, "ready");
            seeder.terminate();
            seeder.end(SOON).text().contains(note)
        };
        let (here, ledger) = (scene.name("here"), scene.name("ledger"));
        assert!(said(&[&server.uri, &here]));
        assert!(!said(&[&server.uri, &here, "--ledger", &ledger]));
    });
}

#[test]
fn two_regions_are_moved_as_one() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = {
            let memory = scene.name("memory");
            seed_file(scene, MIB, &["--also", "memory:?size=300001", &memory])
        };
        std::fs::OpenOptions::new()
            .write(true)
            .open(scene.path("memory"))
            .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, b"last", 299_997))
            .expect("it can be written");
        complains(&leech_ended(scene, &[&seeder.uri, &scene.name("one")]), "2 regions are seeded");
        let caches = ["--cache", &scene.name("disk.cache"), "--cache", &scene.name("memory.cache")];
        let also = ["--also", &scene.name("there-too")];
        complains(
            &leech_ended(scene, &[&[seeder.uri.as_str(), "x"], &also[..], &caches[..2]].concat()),
            "once for each",
        );
        let mut leecher = leech(scene, &seeder.uri, "there", &[&also[..], &caches].concat());
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        leecher.terminate();
        leecher.end_well(SOON);
        let (disk, memory) = (scene.name("again"), scene.name("again-too"));
        let arguments = [&[disk.as_str(), "--cache", caches[1], "--also", caches[3], &memory], &LISTEN[..]].concat();
        let _again = seed(scene, &arguments);
        stamps.check(&scene.path("again"));
        let bytes = std::fs::read(&memory).expect("it can be read");
        assert!(bytes.len() == 300_001 && bytes.ends_with(b"last") && bytes[..299_997].iter().all(|byte| *byte == 0));
    });
}
