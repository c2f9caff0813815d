//! `r3map seed`, `r3map leech` and `r3map demo migrate`: regions that change hosts while they are used.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::process::Process;
use r3map_testkit::proxy::DelayProxy;
use rustix::process::{Pid, Signal, kill_process};

use crate::commands::processes_in_group;
use crate::support::{MIB, Outcome, Program, SOON, Scene, Stamps, is_mounted, make_file, wait_until};

pub(crate) const LISTEN: [&str; 2] = ["--listen", "grpc://127.0.0.1:0"];
const SIZE: u64 = 8 * MIB;
/// Bytes a second of a link on which the region takes long, also as a busy machine sees it.
const SLOW: u64 = MIB / 2;
/// A few stamps.
const FEW: usize = 100;

/// `r3map seed`, or `r3map leech --then-seed`, and where it can be reached.
pub(crate) struct Seeder {
    pub(crate) program: Program,
    pub(crate) uri: String,
}

impl Seeder {
    pub(crate) fn address(&self) -> SocketAddr {
        self.uri.trim_start_matches("grpc://").parse().expect("it is a TCP address")
    }

    /// It has handed the region over and has nothing to do any more.
    pub(crate) fn ends(self) {
        let gone = self.program.end_well(SOON);
        gone.event("handed_over");
        gone.event("gone");
    }
}

/// Seeds a file of `size` bytes on the path `here`.
fn seed_file(scene: &Scene, size: u64, more: &[&str]) -> (Seeder, PathBuf, Stamps) {
    seed_file_at(scene, ("disk.img", "here"), size, more)
}

/// The same with these names of the file and the path.
pub(crate) fn seed_file_at(
    scene: &Scene,
    (image, path): (&str, &str),
    size: u64,
    more: &[&str],
) -> (Seeder, PathBuf, Stamps) {
    make_file(&scene.path(image), size, 1);
    let (region, here) = (format!("file:{}", scene.name(image)), scene.name(path));
    let seeder = seed(scene, &[&[region.as_str(), &here], &LISTEN[..], more].concat());
    (seeder, scene.path(path), Stamps::new(size, 1))
}

fn seed(scene: &Scene, arguments: &[&str]) -> Seeder {
    let mut program = scene.r3map(&[&["--json", "seed"], arguments].concat());
    let uri = address(&mut program, "ready");
    Seeder { program, uri }
}

fn address(program: &mut Program, event: &str) -> String {
    program.wait_for_event(SOON, event)["uri"].as_str().expect("it tells its address").to_owned()
}

pub(crate) fn leech(scene: &Scene, uri: &str, path: &str, more: &[&str]) -> Program {
    scene.r3map(&[&["--json", "leech", uri, &scene.name(path)], more].concat())
}

/// A leech that moves the region as soon as it knows of it, over a slow line that stalls then: nearly all of it is
/// missing, and does not come.
fn leech_at_once(scene: &Scene, seeder: &Seeder, path: &str, more: &[&str]) -> (Program, DelayProxy) {
    let line = DelayProxy::tcp(seeder.address(), Duration::ZERO).expect("a port is free");
    line.set_rate(NonZeroU64::new(SLOW));
    let uri = format!("grpc://{}", line.socket_addr());
    let mut leecher = leech(scene, &uri, path, &[&["--finalize", "manual"], more].concat());
    leecher.wait_for_event(SOON, "connected");
    tell(&leecher);
    leecher.wait_for_event(SOON, "running");
    line.stall();
    (leecher, line)
}

/// Sends SIGUSR1.
pub(crate) fn tell(leecher: &Program) {
    let id = Pid::from_raw(leecher.id().try_into().expect("process ids are small")).expect("it is one");
    kill_process(id, Signal::USR1).expect("it runs");
}

/// That something went wrong is said in one line.
fn complains(outcome: &Outcome, what: &str) {
    let errors: Vec<_> = outcome.err.iter().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(what), "{outcome:?}");
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
}

/// As [`complains`], of a command that was started with `--json`.
fn complains_as_event(outcome: &Outcome, what: &str) {
    let error = outcome.event("error")["message"].to_string();
    assert!(outcome.code == Some(1) && error.contains(what), "{outcome:?}");
}

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

fn leech_ended(scene: &Scene, arguments: &[&str]) -> Outcome {
    scene.ended(&[&["leech"], arguments].concat())
}

#[test]
fn a_leecher_that_is_killed_before_the_move_changes_nothing() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let writer = stamps.start(here);
        let cache = ["--cache", &scene.name("cache")];
        let mut killed = leech(scene, &seeder.uri, "there", &[&["--finalize", "manual"], &cache[..]].concat());
        killed.wait_for_event(SOON, "copied");
        killed.kill();
        writer.goes_on();
        scene.step("a new one, into the same cache");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "running");
        let stamps = writer.refused();
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

#[test]
fn a_leecher_that_is_killed_after_the_move_goes_on_where_it_was() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, mut stamps) = seed_file(scene, SIZE, &[]);
        let cache = ["--cache", &scene.name("cache")];
        let (mut killed, line) = leech_at_once(scene, &seeder, "there", &cache);
        stamps.stamp_durably(&scene.path("there"), FEW);
        killed.kill();
        complains(
            &scene.ended(&[&["seed", &scene.name("x"), "--cache", cache[1]], &LISTEN[..]].concat()),
            "not arrived",
        );
        drop(line);
        scene.step("the same command again");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "resuming");
        leecher.wait_for_event(SOON, "running");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
        leecher.terminate();
        leecher.end_well(SOON);
    });
}

/// Kills the seeder while much is missing, and starts it again with `arguments`.
fn restart(scene: &Scene, mut seeder: Seeder, mut stamps: Stamps, arguments: &[&str]) {
    let (mut leecher, line) = leech_at_once(scene, &seeder, "there", &[]);
    stamps.stamp_durably(&scene.path("there"), FEW);
    seeder.program.kill();
    line.cut();
    leecher.wait_for_event(SOON, "waiting");
    scene.step("the seeder is back, somewhere else");
    let mut program = scene.r3map(&[&["--json", "seed"], arguments, &LISTEN[..]].concat());
    let ready = program.wait_for_event(SOON, "ready");
    assert_eq!(ready["owner"], false, "it knows that it has handed over: {ready}");
    let seeder = Seeder { uri: ready["uri"].as_str().expect("it tells its address").to_owned(), program };
    line.retarget(seeder.address());
    line.set_rate(None);
    line.heal();
    leecher.wait_for_event(SOON, "pulled");
    stamps.check(&scene.path("there"));
    seeder.program.end_well(SOON).event("gone");
}

#[test]
fn a_seeder_that_is_killed_after_the_move_is_started_again_and_the_rest_comes() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = seed_file(scene, SIZE, &[]);
        let region = format!("file:{}", scene.name("disk.img"));
        restart(scene, seeder, stamps, &[&region, &scene.name("here")]);
    });
}

#[test]
fn so_is_one_that_had_been_a_leecher() {
    Scene::with_fuse(SOON, |scene| {
        let (first, _, mut stamps) = seed_file(scene, SIZE, &[]);
        let cache = scene.name("cache");
        let mut b = leech(scene, &first.uri, "b", &["--cache", &cache, "--then-seed", "grpc://127.0.0.1:0"]);
        let b = Seeder { uri: address(&mut b, "seeding"), program: b };
        first.ends();
        stamps.stamp_durably(&scene.path("b"), FEW);
        restart(scene, b, stamps, &[&scene.name("b"), "--cache", &cache]);
    });
}

#[test]
fn who_knows_that_the_leecher_is_gone_takes_the_region_back() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let (mut leecher, _line) = leech_at_once(scene, &seeder, "there", &[]);
        leecher.kill();
        seeder.program.kill();
        let (region, shown) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let again = [&[region.as_str(), &shown, "--take-back"], &LISTEN[..]].concat();
        let seeder = seed(scene, &again);
        let writer = stamps.start(here);
        writer.goes_on();
        writer.stop().check(&scene.path("here"));
        seeder.program.terminate();
        seeder.program.end_well(SOON).event("stopped");
        complains(&scene.ended(&[&["seed"], &again[..]].concat()), "leave out --take-back");
    });
}

#[test]
fn ctrl_c_before_the_move_leaves_the_region_where_it_is() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let writer = stamps.start(here);
        let more = ["--finalize", "manual", "--cache", &scene.name("cache")];
        let mut leecher = leech(scene, &seeder.uri, "there", &more);
        leecher.wait_for_event(SOON, "copied");
        leecher.interrupt();
        let outcome = leecher.end(SOON);
        complains_as_event(&outcome, "runs on over there");
        for left in ["there", "cache", "cache.ledger"] {
            assert!(!scene.path(left).exists(), "{left} is of no use to anybody");
        }
        seeder.program.wait_for_event(SOON, "kept");
        writer.goes_on();
        scene.step("and the seeder stores what it has");
        let stamps = writer.stop();
        seeder.program.interrupt();
        seeder.program.end_well(SOON).event("stopped");
        stamps.check(&scene.path("disk.img"));
    });
}

#[test]
fn ctrl_c_after_the_move_fetches_the_rest_and_twice_it_gives_up() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = seed_file(scene, SIZE, &[]);
        let cache = ["--cache", &scene.name("cache")];
        let (mut leecher, line) = leech_at_once(scene, &seeder, "there", &cache);
        leecher.interrupt();
        leecher.wait_for_event(SOON, "stopping");
        leecher.interrupt();
        let outcome = leecher.end(SOON);
        complains_as_event(&outcome, "run the same command again");
        assert!(!is_mounted(&scene.path("there")), "it is gone");
        drop(line);
        scene.step("again, and once");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "running");
        leecher.interrupt();
        let outcome = leecher.end_well(SOON);
        outcome.event("pulled");
        outcome.event("stopped");
        seeder.ends();
        let again = seed(scene, &[&[scene.name("again").as_str(), "--cache", cache[1]], &LISTEN[..]].concat());
        stamps.check(&scene.path("again"));
        drop(again);
    });
}

#[test]
fn a_region_in_memory_is_not_lost_by_one_ctrl_c() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = seed_file(scene, MIB, &[]);
        let mut leecher = leech(scene, &seeder.uri, "there", &["--then-seed", "grpc://127.0.0.1:0"]);
        let uri = address(&mut leecher, "seeding");
        seeder.ends();
        leecher.interrupt();
        leecher.wait_for_event(SOON, "stopping");
        scene.step("so that it can be saved");
        let mut saved = leech(scene, &uri, "saved", &[]);
        saved.wait_for_event(SOON, "pulled");
        leecher.end_well(SOON);
        stamps.check(&scene.path("saved"));
        saved.interrupt();
        saved.wait_for_event(SOON, "stopping");
        saved.interrupt();
        let outcome = saved.end(SOON);
        complains_as_event(&outcome, "is lost");
    });
}

#[test]
fn commands_are_run_and_a_failing_one_keeps_the_region_where_it_is() {
    Scene::with_fuse(SOON, |scene| {
        let suspend = format!("test -e {}", scene.name("may-go"));
        let (seeder, here, stamps) = seed_file(scene, MIB, &["--on-suspend", &suspend]);
        let writer = stamps.start(here);
        let cache = ["--cache", &scene.name("cache")];
        let there = scene.name("there");
        complains(&leech_ended(scene, &[&[seeder.uri.as_str(), &there], &cache[..]].concat()), "--on-suspend");
        writer.goes_on();
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        let resume = format!("echo \"$R3MAP_PATH\" > {}", scene.name("resumed"));
        let mut leecher = leech(scene, &seeder.uri, "there", &[&["--on-resume", &resume], &cache[..]].concat());
        leecher.wait_for_event(SOON, "running");
        let resumed = std::fs::read_to_string(scene.path("resumed")).expect("the command was run before");
        assert_eq!(resumed.trim(), there);
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        writer.refused().check(&scene.path("there"));
    });
}

/// A seeder whose application takes its time to stop, until `may-go` or `may-not` is there.
fn slow_to_stop(scene: &Scene) -> (Seeder, PathBuf, Stamps) {
    let (go, no) = (scene.name("may-go"), scene.name("may-not"));
    let suspend = format!("until test -e {go} -o -e {no}; do sleep 0.01; done; test -e {go}");
    seed_file(scene, MIB, &["--on-suspend", &suspend, "--hook-timeout", "1h"])
}

#[test]
fn a_leecher_that_is_killed_while_it_asks_asks_again() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, _, stamps) = slow_to_stop(scene);
        let cache = ["--cache", &scene.name("cache")];
        let mut killed = leech(scene, &seeder.uri, "there", &cache);
        seeder.program.wait_for_event(SOON, "suspending");
        killed.kill();
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        seeder.program.wait_for_event(SOON, "handed_over");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        assert_eq!(leecher.wait_for_event(SOON, "running")["resumed"], true);
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

#[test]
fn what_cannot_be_shown_comes_back_also_to_a_seeder_that_was_started_again() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, _, stamps) = slow_to_stop(scene);
        let line = DelayProxy::tcp(seeder.address(), Duration::ZERO).expect("a port is free");
        let uri = format!("grpc://{}", line.socket_addr());
        let leecher = leech(scene, &uri, "there", &[]);
        seeder.program.wait_for_event(SOON, "suspending");
        line.stall();
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        seeder.program.wait_for_event(SOON, "handed_over");
        seeder.program.kill();
        std::fs::write(scene.path("there"), "somebody else was faster").expect("it can be made");
        let (region, here) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let mut seeder = seed(scene, &[&[region.as_str(), &here], &LISTEN[..]].concat());
        line.retarget(seeder.address());
        line.heal();
        line.reset();
        complains_as_event(&leecher.end(SOON), "runs on there");
        let ready = seeder.program.wait_for_event(SOON, "ready");
        assert_eq!(ready["owner"], true, "it is shown again: {ready}");
        let writer = stamps.start(scene.path("here"));
        writer.goes_on();
        writer.stop().check(&scene.path("here"));
        seeder.program.terminate();
        seeder.program.end_well(SOON).event("stopped");
    });
}

#[test]
fn ctrl_c_while_it_asks_waits_for_the_answer_and_twice_it_gives_up() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = slow_to_stop(scene);
        let cache = ["--cache", &scene.name("cache")];
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        seeder.program.wait_for_event(SOON, "suspending");
        leecher.interrupt();
        leecher.wait_for_event(SOON, "stopping");
        leecher.interrupt();
        let outcome = leecher.end(SOON);
        complains_as_event(&outcome, "not known who owns the region");
        scene.step("it stays there, and who asks again goes on copying");
        std::fs::write(scene.path("may-not"), "").expect("it can be made");
        seeder.program.wait_for_event(SOON, "kept");
        let writer = stamps.start(here);
        writer.goes_on();
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "resuming");
        leecher.wait_for_event(SOON, "copied");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        writer.refused().check(&scene.path("there"));
    });
}

#[test]
fn a_command_has_as_long_as_it_is_given() {
    Scene::with_fuse(SOON, |scene| {
        let commands = ["--on-suspend", "sleep 600", "--hook-timeout", "500ms"];
        let (seeder, here, stamps) = seed_file(scene, MIB, &commands);
        let writer = stamps.start(here);
        let there = scene.name("there");
        complains(&leech_ended(scene, &[&seeder.uri, &there]), "took longer than 500ms");
        writer.goes_on();
        drop(seeder);
        writer.refused();
    });
}

#[test]
fn a_seeder_that_does_not_say_what_came_of_it_is_asked_for_as_long_as_the_user_says() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, _, stamps) = slow_to_stop(scene);
        let cache = ["--cache", &scene.name("cache")];
        let patience = ["--retry", "4s", "--give-up-after", "4s"];
        let leecher = leech(scene, &seeder.uri, "there", &[&cache[..], &patience].concat());
        let outcome = leecher.end(SOON);
        complains_as_event(&outcome, "whether it has handed over");
        complains_as_event(&outcome, "run the same command again");
        assert!(
            scene.path("cache").exists() && scene.path("cache.ledger").exists(),
            "there is something to go on with"
        );
        scene.step("the same command again, when the seeder has come to an end with it");
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        seeder.program.wait_for_event(SOON, "handed_over");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "running");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

/// What is missing is waited for as long as the user says, and not longer.
#[test]
fn a_seeder_that_is_gone_after_the_move_is_waited_for_as_long_as_the_user_says() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, mut stamps) = seed_file(scene, SIZE, &[]);
        let cache = ["--cache", &scene.name("cache")];
        let patience = ["--retry", "1s", "--attempt-timeout", "1s", "--give-up-after", "4s"];
        let (leecher, line) = leech_at_once(scene, &seeder, "there", &[&cache[..], &patience].concat());
        stamps.stamp_durably(&scene.path("there"), FEW);
        let outcome = leecher.end(SOON);
        complains_as_event(&outcome, "nothing has come from the seeder");
        complains_as_event(&outcome, "run the same command again");
        outcome.event("waiting");
        assert!(outcome.events().iter().all(|event| event["event"] != "resumed"), "nobody has answered: {outcome:?}");
        assert!(!is_mounted(&scene.path("there")), "it is gone");
        drop(line);
        scene.step("the same command again, when the seeder can be reached");
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "running");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

/// What is in memory only would be lost if nobody waited for it any more.
#[test]
fn what_is_in_memory_only_is_waited_for_whatever_the_user_says() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, mut stamps) = seed_file(scene, SIZE, &[]);
        let patience = ["--retry", "3s", "--attempt-timeout", "1s", "--give-up-after", "0s"];
        let (mut leecher, line) = leech_at_once(scene, &seeder, "there", &patience);
        leecher.wait_for_event(SOON, "waiting");
        std::fs::read(scene.path("there")).expect_err("something is missing");
        stamps.stamp_durably(&scene.path("there"), FEW);
        line.set_rate(None);
        line.heal();
        leecher.wait_for_event(SOON, "resumed");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
    });
}

/// A person has said that the leecher would never run again.
#[test]
fn what_was_taken_back_over_there_does_not_run_here_again() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let cache = ["--cache", &scene.name("cache")];
        let (mut leecher, _line) = leech_at_once(scene, &seeder, "there", &cache);
        leecher.kill();
        seeder.program.kill();
        let (region, shown) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let seeder = seed(scene, &[&[region.as_str(), &shown, "--take-back"], &LISTEN[..]].concat());
        let writer = stamps.start(here);
        scene.step("the leecher's host is back all the same");
        let outcome = leech_ended(scene, &[&[seeder.uri.as_str(), &scene.name("there")], &cache[..]].concat());
        complains(&outcome, "has taken the region back");
        std::fs::read(scene.path("there")).expect_err("nothing is shown");
        assert!(scene.path("cache").exists(), "what was written there is kept");
        writer.goes_on();
        drop(seeder);
        writer.refused();
    });
}

/// And was wrong: it ran all the time, and only could not be reached.
#[test]
fn what_was_taken_back_over_there_is_stopped_here() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let told = scene.name("told");
        let more = ["--cache", &scene.name("cache"), "--on-suspend", &format!("echo stop >> {told}")];
        let (mut leecher, line) = leech_at_once(scene, &seeder, "there", &more);
        seeder.program.kill();
        line.cut();
        leecher.wait_for_event(SOON, "waiting");
        let (region, shown) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let again = seed(scene, &[&[region.as_str(), &shown, "--take-back"], &LISTEN[..]].concat());
        let writer = stamps.start(here);
        scene.step("the line is back");
        line.retarget(again.address());
        line.set_rate(None);
        line.heal();
        complains_as_event(&leecher.end(SOON), "has taken the region back");
        assert_eq!(std::fs::read_to_string(&told).expect("the command was run"), "stop\n");
        assert!(!is_mounted(&scene.path("there")) && scene.path("cache").exists(), "what was written there is kept");
        let outcome = leech_ended(scene, &[&[again.uri.as_str(), &scene.name("there")], &more[..2]].concat());
        complains(&outcome, "has taken the region back");
        writer.goes_on();
        drop(again);
        writer.refused();
    });
}

/// A region on its way from A over B to C, where A cannot take in that all of it has arrived: B, which has nothing any more
/// but that to tell, A, and the line between them.
fn unheard(scene: &Scene, more: &[&str]) -> (Program, Seeder, DelayProxy) {
    std::fs::create_dir(scene.path("ledgers")).expect("it can be made");
    let (first, _, stamps) = seed_file(scene, SIZE, &["--ledger", &scene.name("ledgers/a")]);
    let more = [&["--then-seed", "grpc://127.0.0.1:0"], more].concat();
    let (mut b, line) = leech_at_once(scene, &first, "b", &more);
    std::fs::rename(scene.path("ledgers"), scene.path("away")).expect("it can be moved");
    line.set_rate(None);
    line.heal();
    let uri = address(&mut b, "seeding");
    let mut c = leech(scene, &uri, "c", &[]);
    c.wait_for_event(SOON, "pulled");
    b.wait_for_event(SOON, "gone");
    stamps.check(&scene.path("c"));
    (b, first, line)
}

#[test]
fn who_has_passed_a_region_on_stays_until_the_seeder_that_it_came_from_knows() {
    Scene::with_fuse(SOON, |scene| {
        let (mut b, first, _line) = unheard(scene, &[]);
        b.wait_for_event(SOON, "waiting");
        std::fs::rename(scene.path("away"), scene.path("ledgers")).expect("it can be moved");
        first.ends();
        b.end_well(SOON).event("told");
    });
}

#[test]
fn or_for_as_long_as_the_user_says() {
    Scene::with_fuse(SOON, |scene| {
        let (b, _first, _line) = unheard(scene, &["--give-up-after", "1s"]);
        complains_as_event(&b.end(SOON), "do not take the region back there");
    });
}

/// A region that has come from A to B, where A cannot take in that it has: B, which somebody tells to stop, A, and the line between
/// them.
fn stopped_unheard(scene: &Scene, more: &[&str]) -> (Program, Seeder, DelayProxy) {
    std::fs::create_dir(scene.path("ledgers")).expect("it can be made");
    let (first, _, _) = seed_file(scene, SIZE, &["--ledger", &scene.name("ledgers/a")]);
    let (mut b, line) = leech_at_once(scene, &first, "b", &[&["--cache", &scene.name("cache")], more].concat());
    std::fs::rename(scene.path("ledgers"), scene.path("away")).expect("it can be moved");
    line.set_rate(None);
    line.heal();
    b.wait_for_event(SOON, "warning");
    b.terminate();
    b.wait_for_event(SOON, "stopped");
    b.wait_for_event(SOON, "waiting");
    (b, first, line)
}

#[test]
fn who_is_stopped_tells_the_seeder_that_it_came_from_or_says_that_it_did_not() {
    let both: [&[&str]; 2] = [&[], &["--then-seed", "grpc://127.0.0.1:0"]];
    for more in both {
        Scene::with_fuse(SOON, |scene| {
            let (b, first, _line) = stopped_unheard(scene, more);
            std::fs::rename(scene.path("away"), scene.path("ledgers")).expect("it can be moved");
            first.ends();
            b.end_well(SOON).event("told");
        });
        Scene::with_fuse(SOON, |scene| {
            let (b, _first, _line) = stopped_unheard(scene, more);
            b.interrupt();
            complains_as_event(&b.end(SOON), "do not take the region back there");
        });
    }
    Scene::with_fuse(SOON, |scene| {
        let (b, _first, _line) = stopped_unheard(scene, &["--give-up-after", "1s"]);
        complains_as_event(&b.end(SOON), "do not take the region back there");
    });
}

#[test]
fn ctrl_c_while_the_ledger_is_in_doubt_says_so_and_resumes_nothing() {
    Scene::with_fuse(SOON, |scene| {
        let (go, resumed) = (scene.name("may-go"), scene.name("resumed"));
        let suspend = format!("until test -e {go}; do sleep 0.01; done");
        let ledger = scene.path("disk.img.ledger");
        let hooks = ["--on-suspend", &suspend, "--on-resume", &format!("touch {resumed}"), "--hook-timeout", "1h"];
        let (mut seeder, _, stamps) = seed_file(scene, MIB, &hooks);
        let mut leecher = leech(scene, &seeder.uri, "there", &[]);
        seeder.program.wait_for_event(SOON, "suspending");
        // It can be neither written nor read.
        std::fs::create_dir(&ledger).expect("nothing was written yet");
        std::fs::write(&go, "").expect("it can be made");
        seeder.program.terminate();
        let outcome = seeder.program.end(SOON);
        complains_as_event(&outcome, "the application stays suspended");
        assert!(!scene.path("resumed").exists() && !is_mounted(&scene.path("here")), "{outcome:?}");
        assert!(outcome.events().iter().all(|event| event["event"] != "stopped"), "{outcome:?}");
        leecher.kill();
        scene.step("the next one goes by what the ledger says");
        std::fs::remove_dir(&ledger).expect("it is empty");
        let (region, here) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let seeder = seed(scene, &[&[region.as_str(), &here], &LISTEN[..]].concat());
        stamps.check(&scene.path("here"));
        seeder.program.terminate();
        seeder.program.end_well(SOON).event("stopped");
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

#[test]
fn what_is_written_too_fast_can_be_left_alone() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, here, stamps) = seed_file(scene, 2 * MIB, &[]);
        let writer = stamps.start(here);
        let line = DelayProxy::tcp(seeder.address(), Duration::ZERO).expect("a port is free");
        line.set_rate(NonZeroU64::new(4 * SLOW));
        let uri = format!("grpc://{}", line.socket_addr());
        let limits = ["--max-rounds", "2", "--finalize", "downtime=0s", "--unconverged", "give-up"];
        complains(&leech_ended(scene, &[&[uri.as_str(), &scene.name("there")], &limits[..]].concat()), "writes faster");
        writer.goes_on();
        let mut leecher = leech(scene, &uri, "there", &limits[..4]);
        // Slow until then: in a short round a busy machine may not let the writer write at all.
        assert_eq!(leecher.wait_for_event(SOON, "copied")["converged"], false);
        line.set_rate(None);
        leecher.wait_for_event(SOON, "pulled");
        writer.refused().check(&scene.path("there"));
    });
}

#[test]
fn whatever_is_wrong_is_one_line_and_the_region_stays() {
    Scene::with_fuse(SOON, |scene| {
        std::fs::write(scene.path("secret"), "open sesame\n").expect("it can be made");
        std::fs::write(scene.path("guess"), "open\n").expect("it can be made");
        std::fs::write(scene.path("empty"), "\n").expect("it can be made");
        let secret = scene.name("secret");
        let (seeder, here, stamps) = seed_file(scene, MIB, &["--secret-file", &secret]);
        let writer = stamps.start(here);
        let server = scene.serve("memory:?size=1MiB", &[]);
        let [there, guess, empty] = ["there", "guess", "empty"].map(|name| scene.name(name));
        let (nowhere, full) = (scene.name("no/such/folder"), scene.name("secret"));
        let uri = seeder.uri.as_str();
        let wrong: [(&[&str], &str); 11] = [
            (&[uri, &there], "secret"),
            (&[uri, &there, "--secret-file", &guess], "secret"),
            (&[uri, &there, "--secret-file", &empty], "is empty"),
            (&[uri, &there, "--secret-file", "/no/such/file"], "cannot read the secret"),
            (&[uri, &nowhere, "--secret-file", &secret], "no/such"),
            (&[uri, &full, "--secret-file", &secret], "something in it"),
            (&["grpc://127.0.0.1:1", &there], "127.0.0.1:1"),
            (&[&server.uri, &there], "is it a seeder?"),
            (&["memory:", &there], "no region can be migrated over it"),
            (&[uri, &there, "--as", "nbd", "--entry", "x"], "are for files"),
            (&[uri, &there, "--ledger", &there], "--cache"),
        ];
        let cache = scene.name("cache");
        for (arguments, what) in wrong {
            complains(&leech_ended(scene, arguments), what);
            if !arguments.contains(&"--ledger") {
                complains(&leech_ended(scene, &[arguments, &["--cache", &cache]].concat()), what);
            }
        }
        let folder = std::fs::read_dir(scene.path(".")).expect("it is there").flatten();
        let mut names: Vec<_> = folder.map(|entry| entry.file_name()).collect();
        names.sort();
        assert_eq!(names, ["disk.img", "empty", "guess", "here", "secret"], "nothing is left");
        for (arguments, what) in [
            (&["file:/no/such/file", &there, LISTEN[0], LISTEN[1]][..], "/no/such/file"),
            (&["memory:?size=1MiB", &nowhere, LISTEN[0], LISTEN[1]], "no/such"),
            (&["memory:?size=1MiB", &there, LISTEN[0], "nbd://127.0.0.1:0/x"], "no region can be migrated over it"),
            (&["memory:?size=1MiB", &there, LISTEN[0], LISTEN[1], "--take-back"], "--ledger"),
            (&[&there, "--cache", &secret, LISTEN[0], LISTEN[1]], "secret"),
        ] {
            complains(&scene.ended(&[&["seed"], arguments].concat()), what);
        }
        writer.goes_on();
        scene.step("and who knows it gets it");
        let mut leecher = leech(scene, uri, "there", &["--secret-file", &secret]);
        leecher.wait_for_event(SOON, "pulled");
        writer.refused().check(&scene.path("there"));
    });
}

#[test]
fn the_demo_proves_that_no_count_is_lost() {
    Scene::play(SOON, |scene| {
        let outcome = scene.r3map(&["--json", "demo", "migrate", "--size", "8MiB", "--rtt", "5ms"]).end_well(SOON);
        let proved = outcome.event("proved");
        let number = |name: &str| proved[name].as_f64().unwrap_or_else(|| panic!("{proved}"));
        assert!(number("before") > 0.0 && number("after") > 0.0 && number("pause_seconds") > 0.0, "{proved}");
        assert!(outcome.event("moved")["pulled_before"].as_u64().is_some_and(|bytes| bytes >= 8 * MIB), "{outcome:?}");
    });
}

/// Whether it is interrupted or killed, the process that the program moves to ends too.
#[test]
fn the_demo_leaves_no_process_behind() {
    Scene::play(SOON, |scene| {
        for kill in [false, true] {
            let mut demo = scene.r3map(&["--json", "demo", "migrate", "--size", "8MiB", "--rtt", "5ms"]);
            // From here on the other process counts for some time.
            demo.wait_for_event(SOON, "moved");
            if kill {
                demo.kill();
            } else {
                demo.interrupt();
            }
            demo.wait(SOON);
            wait_until(SOON, "the other process ends", || processes_in_group(demo.id()) == 0);
        }
    });
}
