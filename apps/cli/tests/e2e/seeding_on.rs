//! `r3map leech --then-seed`: where the regions are to be offered next. And what a seeder says that nobody else can know.

use crate::migrate::{leech, seed_file_at, tell};
use crate::support::{MIB, SOON, Scene, is_mounted};

/// What is used here does not end because an address is taken at the moment.
#[test]
fn a_region_that_cannot_be_offered_yet_is_used_until_it_can() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, _, stamps) = seed_file_at(scene, ("disk.img", "here"), MIB, &[]);
        let address = format!("grpc+unix://{}", scene.name("next"));
        let places = ["--then-seed", &address, "--then-seed", "grpc://127.0.0.1:0"];
        let mut b = leech(scene, &seeder.uri, "b", &[&["--finalize", "manual"], &places[..]].concat());
        b.wait_for_event(SOON, "copied");
        std::fs::write(scene.path("next"), "somebody else's").expect("there is room");
        tell(&b);
        let waiting = b.wait_for_event(SOON, "waiting");
        assert!(waiting["message"].as_str().is_some_and(|text| text.contains("next")), "{waiting}");
        let elsewhere = b.wait_for_event(SOON, "seeding");
        assert!(elsewhere["uri"].as_str().is_some_and(|uri| uri.starts_with("grpc://")), "{elsewhere}");
        seeder.ends();
        stamps.check(&scene.path("b"));
        std::fs::remove_file(scene.path("next")).expect("it is there");
        b.wait_for_event(SOON, "seeding");
        let mut c = leech(scene, &address, "c", &[]);
        c.wait_for_event(SOON, "pulled");
        stamps.check(&scene.path("c"));
        b.end_well(SOON);
    });
}

/// Where they never can be is said before anything moves.
#[test]
fn a_place_where_nothing_can_be_offered_is_refused_at_once() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, here, stamps) = seed_file_at(scene, ("disk.img", "here"), MIB, &[]);
        for (place, hint) in [(seeder.uri.as_str(), "in use"), ("nbd://127.0.0.1/x", "migrated"), ("grpc://x", "PORT")]
        {
            let outcome = leech(scene, &seeder.uri, "b", &["--then-seed", place]).end(SOON);
            assert!(outcome.code != Some(0) && outcome.text().contains(hint), "{place}: {outcome:?}");
        }
        assert!(is_mounted(&here) && !scene.path("b").exists());
        stamps.check(&here);
    });
}

/// The region stays, and its application does not run: only the seeder's user can do something about it.
#[test]
fn a_seeder_says_that_its_application_could_not_be_resumed() {
    Scene::with_fuse(SOON, |scene| {
        let hooks = ["--on-suspend", "false", "--on-resume", "exit 3"];
        let (mut seeder, _, _) = seed_file_at(scene, ("disk.img", "here"), MIB, &hooks);
        let outcome = leech(scene, &seeder.uri, "there", &[]).end(SOON);
        assert!(outcome.code != Some(0) && outcome.text().contains("--on-suspend"), "{outcome:?}");
        let warning = seeder.program.wait_for_event(SOON, "warning");
        assert!(warning["message"].as_str().is_some_and(|text| text.contains("--on-resume")), "{warning}");
    });
}
