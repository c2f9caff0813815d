//! Ctrl-C, at each point.

use r3map_testkit::proxy::DelayProxy;

use super::{
    LISTEN, SIZE, Seeder, address, complains_as_event, leech, leech_at_once, seed, seed_again, seed_file, slow_to_stop,
};
use crate::support::{MIB, Program, SOON, Scene, is_mounted};

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
        let seeder = seed_again(scene, &[]);
        stamps.check(&scene.path("here"));
        seeder.program.terminate();
        seeder.program.end_well(SOON).event("stopped");
    });
}
