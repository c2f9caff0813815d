//! What is not moved: because a command fails, because it is written too fast, because something is wrong.

use std::num::NonZeroU64;
use std::time::Duration;

use r3map_testkit::proxy::DelayProxy;

use super::{LISTEN, SLOW, complains, leech, leech_ended, seed_file};
use crate::support::{MIB, SOON, Scene};

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

/// Which is looked at after each round; what ends copying otherwise are several rounds that do not become smaller.
#[test]
fn what_is_written_too_fast_is_not_copied_for_longer_than_the_user_says() {
    Scene::with_fuse(SOON, |scene| {
        let (seeder, here, stamps) = seed_file(scene, 2 * MIB, &[]);
        let writer = stamps.start(here);
        let line = DelayProxy::tcp(seeder.address(), Duration::ZERO).expect("a port is free");
        line.set_rate(NonZeroU64::new(4 * SLOW));
        let uri = format!("grpc://{}", line.socket_addr());
        // Over when the first round is.
        let limits = ["--max-time", "10ms", "--finalize", "downtime=0s", "--unconverged", "give-up"];
        let outcome = leech_ended(scene, &[&[uri.as_str(), &scene.name("there")], &limits[..]].concat());
        complains(&outcome, "after 1 round)");
        writer.goes_on();
        let mut leecher = leech(scene, &uri, "there", &limits[..4]);
        let copied = leecher.wait_for_event(SOON, "copied");
        assert_eq!((&copied["converged"], &copied["rounds"]), (&false.into(), &1.into()), "{copied}");
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
