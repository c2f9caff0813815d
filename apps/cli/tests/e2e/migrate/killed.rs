//! Programs that are killed on either side, and started again.

use std::time::Duration;

use r3map_testkit::proxy::DelayProxy;

use super::{
    FEW, LISTEN, SIZE, Seeder, address, complains, complains_as_event, goes_on, leech, leech_at_once, seed_again,
    seed_file, slow_to_stop,
};
use crate::support::{SOON, Scene, Stamps};

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
        let leecher = goes_on(scene, seeder, &cache, &stamps);
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
fn a_leecher_that_is_killed_while_it_asks_asks_again() {
    Scene::with_fuse(SOON, |scene| {
        let (mut seeder, _, stamps) = slow_to_stop(scene);
        let cache = ["--cache", &scene.name("cache")];
        let mut killed = leech(scene, &seeder.uri, "there", &cache);
        seeder.program.wait_for_event(SOON, "suspending");
        killed.kill();
        std::fs::write(scene.path("may-go"), "").expect("it can be made");
        seeder.program.wait_for_event(SOON, "handed_over");
        goes_on(scene, seeder, &cache, &stamps);
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
        let mut seeder = seed_again(scene, &[]);
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
