//! How long a seeder is waited for that does not answer.

use r3map_testkit::proxy::DelayProxy;

use super::{FEW, SIZE, Seeder, address, complains_as_event, goes_on, leech, leech_at_once, seed_file, slow_to_stop};
use crate::support::{Program, SOON, Scene, is_mounted};

#[test]
fn a_seeder_that_does_not_say_what_came_of_it_is_asked_for_as_long_as_the_user_says() {
    for retry in ["4s", "forever"] {
        Scene::with_fuse(SOON, |scene| {
            let (mut seeder, _, stamps) = slow_to_stop(scene);
            let cache = ["--cache", &scene.name("cache")];
            let patience = ["--retry", retry, "--give-up-after", "4s"];
            let leecher = leech(scene, &seeder.uri, "there", &[&cache[..], &patience].concat());
            let outcome = leecher.end(SOON);
            complains_as_event(&outcome, "whether it has handed over");
            complains_as_event(&outcome, "run the same command again");
            assert!(
                scene.path("cache").exists() && scene.path("cache.ledger").exists(),
                "there is something to go on with"
            );
            scene.step("nor is it asked for longer when that is gone on with");
            let again = leech(scene, &seeder.uri, "there", &[&cache[..], &patience].concat()).end(SOON);
            complains_as_event(&again, "run the same command again");
            scene.step("when the seeder has come to an end with it");
            std::fs::write(scene.path("may-go"), "").expect("it can be made");
            seeder.program.wait_for_event(SOON, "handed_over");
            goes_on(scene, seeder, &cache, &stamps);
        });
    }
}

/// What is missing is waited for as long as the user says, and not longer.
#[test]
fn a_seeder_that_is_gone_after_the_move_is_waited_for_as_long_as_the_user_says() {
    for retry in ["1s", "forever"] {
        Scene::with_fuse(SOON, |scene| {
            let (seeder, _, mut stamps) = seed_file(scene, SIZE, &[]);
            let cache = ["--cache", &scene.name("cache")];
            let patience = ["--retry", retry, "--attempt-timeout", "1s", "--give-up-after", "10s"];
            let (leecher, line) = leech_at_once(scene, &seeder, "there", &[&cache[..], &patience].concat());
            stamps.stamp_durably(&scene.path("there"), FEW);
            let outcome = leecher.end(SOON);
            complains_as_event(&outcome, "nothing has come from the seeder");
            complains_as_event(&outcome, "run the same command again");
            outcome.event("waiting");
            assert!(
                outcome.events().iter().all(|event| event["event"] != "resumed"),
                "nobody has answered: {outcome:?}"
            );
            assert!(!is_mounted(&scene.path("there")), "it is gone");
            drop(line);
            goes_on(scene, seeder, &cache, &stamps);
        });
    }
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
