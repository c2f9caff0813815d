//! A leecher on whose disk there is no room, which is a small tmpfs.

use rustix::mount::{MountFlags, mount_remount};

use super::{FEW, SIZE, complains, leech, leech_at_once, leech_ended, seed_file};
use crate::support::{SOON, Scene, is_mounted};

#[test]
fn a_region_for_which_there_is_no_room_stays_where_it_is_and_goes_to_one_that_has_room() {
    Scene::with_root(SOON, |scene| {
        let (mut seeder, here, stamps) = seed_file(scene, SIZE, &[]);
        let writer = stamps.start(here);
        let disk = scene.tmpfs("disk", SIZE / 2);
        let (cache, there) = (scene.name("disk/cache"), scene.name("there"));
        let outcome = leech_ended(scene, &[&seeder.uri, &there, "--cache", &cache]);
        complains(&outcome, "No space left");
        complains(&outcome, "runs on there");
        seeder.program.wait_for_event(SOON, "kept");
        writer.goes_on();
        assert!(!is_mounted(&scene.path("there")) && !scene.path("there").exists(), "nothing was ever shown");
        let left: Vec<_> = std::fs::read_dir(&disk).expect("it is there").flatten().collect();
        assert!(left.is_empty(), "what takes the room and is of no use is removed: {left:?}");
        scene.step("the next one has room");
        let roomy = scene.tmpfs("roomy", 4 * SIZE);
        let cache = roomy.join("cache");
        let cache = ["--cache", cache.to_str().expect("temporary folders have plain names")];
        let mut leecher = leech(scene, &seeder.uri, "there", &cache);
        leecher.wait_for_event(SOON, "running");
        let writer = writer.refused().start(scene.path("there"));
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        writer.goes_on();
        writer.stop().check(&scene.path("there"));
        leecher.terminate();
        leecher.end_well(SOON).event("stopped");
    });
}

/// Then the region is here, and only its missing part is not: nobody gives up, and nothing is lost.
#[test]
fn a_disk_that_is_full_after_the_move_is_waited_for_until_there_is_room() {
    Scene::with_root(SOON, |scene| {
        let (mut seeder, _, mut stamps) = seed_file(scene, SIZE, &[]);
        let disk = scene.tmpfs("disk", SIZE / 2);
        let cache = ["--cache", &scene.name("disk/cache"), "--retry", "2s"];
        let (mut leecher, line) = leech_at_once(scene, &seeder, "there", &cache);
        stamps.stamp_durably(&scene.path("there"), FEW);
        line.set_rate(None);
        line.heal();
        let trouble = leecher.wait_for_event(SOON, "trouble");
        assert!(trouble["message"].as_str().is_some_and(|why| why.contains("No space left")), "{trouble}");
        assert!(leecher.is_running() && seeder.program.is_running(), "both go on");
        assert!(is_mounted(&scene.path("there")), "the application may go on too");
        scene.step("room is made");
        mount_remount(&disk, MountFlags::empty(), "size=64M").expect("a tmpfs can grow");
        leecher.wait_for_event(SOON, "pulled");
        seeder.ends();
        stamps.check(&scene.path("there"));
        leecher.terminate();
        leecher.end_well(SOON).event("stopped");
    });
}
