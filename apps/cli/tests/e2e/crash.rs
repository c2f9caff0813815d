//! The mount dies (kill -9), and what a cache file keeps: nothing valid is pulled again, nothing that was acknowledged
//! is lost, and the cache file of anything else is refused.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use r3map_testkit::random::Random;

use crate::support::{Expected, Lent, MIB, Mounted, PIECE, SOON, Scene, make_file};
use crate::whole_region::{GIB_AND_A_BYTE, through_mmap, through_read};

const LONG: Duration = Duration::from_secs(180);
const SIZE: u64 = 48 * MIB + 1;

#[test]
fn what_was_pulled_is_not_pulled_again() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 1);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let cache = scene.name("cache");
        let mut mounted = scene.mount(&lent.uri, "region", &["--cache", &cache]);
        mounted.wait_pulled();
        mounted.kill();

        lent.forget();
        let mounted = scene.mount(&lent.uri, "region", &["--cache", &cache]);
        expected.check_file(&mounted.path);
        assert_eq!(lent.bytes_read(), 0, "{:?}", lent.faults.calls());
        mounted.unmount();
    });
}

/// The whole comparison, killed before everything was pulled, and after everything was written.
#[test]
fn a_gib_and_a_byte_whose_mount_is_killed() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 11);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.name("cache");
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache, "--pull-workers", "1"]);
        let (quarter, file) = (usize::try_from(GIB_AND_A_BYTE / 4).expect("it fits"), mounted.open());
        let mut bytes = vec![0; quarter];
        file.read_exact_at(&mut bytes, GIB_AND_A_BYTE / 2).expect("it can be read");
        expected.check(GIB_AND_A_BYTE / 2, &bytes).unwrap_or_else(|wrong| panic!("{wrong}"));
        drop(file);
        mounted.kill();

        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        through_read(&mounted, &mut expected, scene);
        mounted.kill();
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        through_mmap(&mounted, &mut expected, scene);
        mounted.kill();
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        expected.check_file(&mounted.path);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn what_was_pulled_in_part_is_not_pulled_again() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 2);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let cache = scene.name("cache");
        let arguments = ["--cache", &cache, "--pull-workers", "0"];
        let mounted = scene.mount(&lent.uri, "region", &arguments);
        let half = |file: &File| {
            for offset in (0..SIZE - PIECE).step_by(3 << 20) {
                let mut piece = vec![0; 1 << 20];
                file.read_exact_at(&mut piece, offset).expect("it can be read");
                expected.check(offset, &piece).unwrap_or_else(|wrong| panic!("{wrong}"));
            }
        };
        let file = mounted.open();
        half(&file);
        file.sync_all().expect("it can be synced");
        drop(file);
        mounted.kill();
        let pulled = lent.bytes_read();
        assert!(pulled < SIZE, "only what was touched was pulled: {pulled}");

        lent.forget();
        let mounted = scene.mount(&lent.uri, "region", &arguments);
        half(&mounted.open());
        let again = lent.bytes_read();
        // The kernel may read ahead a little further than last time; what was valid stays so.
        assert!(again < pulled / 4, "{again} of {pulled} bytes were pulled again");
        expected.check_file(&mounted.path);
        assert!(lent.bytes_read() <= SIZE + PIECE - pulled, "{} of {SIZE} were pulled", lent.bytes_read());
        mounted.unmount();
    });
}

#[test]
fn what_fsync_acknowledged_locally_survives() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 3);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.name("cache");
        let arguments = ["--cache", &cache, "--fsync", "local", "--push-interval", "1h", "--pull-workers", "0"];
        for round in 0..3 {
            let mounted = scene.mount(&server.uri, "region", &arguments);
            expected.check_file(&mounted.path);
            acknowledge_some(&mounted, &mut expected, round);
            mounted.kill();
            expected.crash();
        }
        let mounted = scene.mount(&server.uri, "region", &arguments);
        expected.check_file(&mounted.path);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn what_fsync_acknowledged_remotely_is_at_the_source() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 4);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        for (round, cache) in (0..).zip(["memory", &scene.name("cache"), &scene.name("cache")]) {
            let mounted = scene.mount(&server.uri, "region", &["--cache", cache, "--push-interval", "50ms"]);
            acknowledge_some(&mounted, &mut expected, round);
            mounted.kill();
            expected.crash();
            expected.check_file(&scene.path("source"));
        }
    });
}

/// Writes and syncs, then writes more that nothing acknowledges.
fn acknowledge_some(mounted: &Mounted, expected: &mut Expected, round: u64) {
    let file = mounted.open();
    let mut random = Random::new(round);
    for _ in 0..5 {
        expected.write_randomly(10, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
        file.sync_data().expect("it can be synced");
        expected.keep();
    }
    expected.write_randomly(10, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
}

#[test]
fn the_cache_of_something_else_is_refused() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 5);
        make_file(&scene.path("other"), SIZE, 6);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.name("cache");
        let mut mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        mounted.wait_pulled();
        refused(scene, &server.uri, &cache, "in use");
        mounted.unmount();
        let other = scene.serve(&format!("file:{}", scene.name("other")), &[]);
        refused(scene, &other.uri, &cache, "is the cache of");
        other.stop();

        // The same place, but not the same region, or not the same size.
        let address = server.kill();
        let server = scene.serve_again(&format!("file:{}", scene.name("other")), address);
        refused(scene, &server.uri, &cache, "is the cache of");
        server.stop();
        std::fs::rename(scene.path("source"), scene.path("kept")).expect("it is there");
        make_file(&scene.path("source"), SIZE + 1, 5);
        let server = scene.serve_again(&format!("file:{}", scene.name("source")), address);
        refused(scene, &server.uri, &cache, "bytes, not");
        server.stop();
        std::fs::rename(scene.path("kept"), scene.path("source")).expect("it is there");
        let server = scene.serve_again(&format!("file:{}", scene.name("source")), address);

        // No cache file at all.
        std::fs::write(scene.path("letter"), "Dear reader,\n".repeat(1000)).expect("there is room");
        refused(scene, &server.uri, &scene.name("letter"), "letter");
        std::fs::write(scene.path("short"), "x").expect("there is room");
        refused(scene, &server.uri, &scene.name("short"), "short");
        std::fs::create_dir(scene.path("folder")).expect("it is not there");
        let outcome = scene.ended(&["mount", &server.uri, &scene.name("region"), "--cache", &scene.name("folder")]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");

        // After all that, the cache is as good as before.
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        mounted.unmount();
    });
}

#[test]
fn the_cache_of_a_file_is_refused_for_one_of_the_same_name_elsewhere() {
    Scene::with_fuse(LONG, |scene| {
        let (region, cache) = (scene.name("region"), scene.name("cache"));
        let expected = ["one", "other"].map(|folder| {
            std::fs::create_dir(scene.path(folder)).expect("it is not there");
            make_file(&scene.path(folder).join("disk"), MIB, folder.len() as u64)
        });
        let mount = |folder, uri| scene.r3map_in(folder, &["--json", "mount", uri, &region, "--cache", &cache]);
        let mut first = mount("one", "file:disk");
        first.wait_for_event(SOON, "pulled");
        first.terminate();
        first.end_well(SOON);
        let refused = mount("other", "file:disk").end(SOON);
        assert!(refused.code == Some(1) && refused.text().contains("is the cache of"), "{refused:?}");
        let mut again = mount("other", "file:../one/disk");
        again.wait_for_event(SOON, "pulled");
        expected[0].check_file(&scene.path("region"));
        again.terminate();
        again.end_well(SOON);
    });
}

/// A cache file that was damaged, wherever, is refused or does no harm.
#[test]
fn a_damaged_cache_is_refused_or_harmless() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), MIB, 7);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.path("cache");
        let arguments = ["--cache", cache.to_str().expect("it has a plain name")];
        let mut mounted = scene.mount(&server.uri, "region", &arguments);
        mounted.wait_pulled();
        mounted.unmount();
        let len = cache.metadata().expect("it is there").len();
        File::options().write(true).open(&cache).and_then(|file| file.set_len(len / 2)).expect("it can be cut");
        refused(scene, &server.uri, arguments[1], "cache");
        std::fs::remove_file(&cache).expect("it is there");
        let mounted = scene.mount(&server.uri, "region", &arguments);
        expected.check_file(&mounted.path);
        mounted.unmount();
    });
}

/// One clear line, and the file is left as it is.
fn refused(scene: &Scene, uri: &str, cache: &str, why: &str) {
    let before = (std::fs::read(cache).expect("it is there"), modified(cache));
    let outcome = scene.r3map(&["mount", uri, &scene.name("refused"), "--cache", cache]).end(SOON);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.err.len() == 1 && outcome.err[0].starts_with("error: "), "one line: {outcome:?}");
    assert!(outcome.err[0].contains(why), "{:?} does not say {why:?}", outcome.err[0]);
    assert!(outcome.err[0].contains(cache), "{:?} does not name the file", outcome.err[0]);
    assert!(before == (std::fs::read(cache).expect("it is there"), modified(cache)), "it was changed");
    assert!(!scene.path("refused").exists(), "nothing was mounted");
}

fn modified(path: &str) -> (i64, i64) {
    let metadata = std::fs::metadata(path).expect("it is there");
    (metadata.mtime(), metadata.mtime_nsec())
}

#[test]
fn a_mount_that_a_dead_one_left_behind_is_taken_over() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), MIB, 8);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        let path = mounted.path.clone();
        let file = mounted.open();
        mounted.kill();
        let error = std::fs::metadata(&path).expect_err("nobody answers there");
        assert_eq!(error.kind(), std::io::ErrorKind::NotConnected);
        file.read_at(&mut [0; 1], 0).expect_err("nor to an open file");

        let mounted = scene.mount(&server.uri, "region", &[]);
        expected.check_file(&path);
        mounted.unmount();
        // Who made the file is not known any more; it may be somebody's own, and so it stays.
        assert_eq!(path.metadata().expect("it is there").len(), 0);
    });
}

/// A process that waits for its own file system must still be there to be killed.
#[test]
fn killed_while_it_stores_it_is_gone() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), MIB, 9);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        for way in [["--push-interval", "1h"], ["--mode", "direct"]] {
            for patience in [0, 3, 300] {
                let mut mounted = scene.mount(&server.uri, "region", &way);
                mounted.open().write_all_at(&[1; 4096], 0).expect("it can be written");
                server.program.freeze();
                mounted.program.terminate();
                if patience > 0 {
                    mounted.program.wait_for_event(SOON, "stopping");
                }
                std::thread::sleep(Duration::from_millis(patience));
                let path = mounted.path.clone();
                mounted.kill();
                let left = std::fs::metadata(&path).map(|metadata| metadata.len());
                assert!(left.as_ref().is_ok_and(|len| *len == 0) || left.is_err(), "nobody serves it: {left:?}");
                server.program.thaw();
            }
        }
    });
}

#[test]
fn a_mount_that_lives_is_not_taken_over() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), MIB, 9);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        let outcome = scene.ended(&["mount", &server.uri, mounted.name()]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");
        expected.check_file(&mounted.path);
        mounted.unmount();
    });
}

/// Every few writes the mount is killed; a fast loop of short lives.
#[test]
fn many_short_lives() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), 3 * MIB + 1, 10);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let cache = scene.name("cache");
        let mut random = Random::new(10);
        for life in 0..12 {
            let durability = if life % 3 == 2 { "remote" } else { "local" };
            let arguments = ["--cache", &cache, "--fsync", durability, "--push-interval", "20ms"];
            let mounted = scene.mount(&server.uri, "region", &arguments);
            let file = mounted.open();
            for _ in 0..random.below(4) {
                expected.write_randomly(4, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
                file.sync_all().expect("it can be synced");
                expected.keep();
            }
            std::thread::sleep(Duration::from_millis(random.below(60)));
            mounted.kill();
            expected.crash();
        }
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        expected.check_file(&mounted.path);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}
