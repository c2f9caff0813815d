//! Regions that a person takes back.

use super::{LISTEN, SIZE, complains, complains_as_event, leech_at_once, leech_ended, seed_again, seed_file};
use crate::support::{SOON, Scene, is_mounted};

#[test]
fn who_knows_that_the_leecher_is_gone_takes_the_region_back() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let (mut leecher, _line) = leech_at_once(scene, &seeder, "there", &[]);
        leecher.kill();
        seeder.program.kill();
        let seeder = seed_again(scene, &["--take-back"]);
        let writer = stamps.start(here);
        writer.goes_on();
        writer.stop().check(&scene.path("here"));
        seeder.program.terminate();
        seeder.program.end_well(SOON).event("stopped");
        let (region, shown) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
        let again = [&["seed", &region, &shown, "--take-back"], &LISTEN[..]].concat();
        complains(&scene.ended(&again), "leave out --take-back");
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
        let seeder = seed_again(scene, &["--take-back"]);
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

/// The person was wrong: it ran all the time, and only could not be reached.
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
        let again = seed_again(scene, &["--take-back"]);
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
