//! How the command ends: asked once, asked twice, unmounted from outside, with a full disk; and what it says meanwhile.

use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;
use rustix::mount::{MountFlags, mount_remount};

use crate::support::{
    Expected, MIB, Mounted, SOON, Scene, Served, event, is_mounted, make_file, wait_until, wait_until_it_listens,
};

const LONG: Duration = Duration::from_secs(120);
const SIZE: u64 = 32 * MIB + 1;

/// A server, a mount that pushes only when it must, and some changes that are not pushed.
fn changed(scene: &Scene, arguments: &[&str]) -> (Served, Mounted, Expected) {
    let mut expected = make_file(&scene.path("source"), SIZE, 1);
    let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
    let mut all = vec!["--push-interval", "1h", "--dirty-budget", "1GiB"];
    all.extend(arguments);
    let mounted = scene.mount(&server.uri, "region", &all);
    let file = mounted.open();
    for offset in (0..SIZE - MIB).step_by(2 << 20) {
        let bytes = expected.write(offset..offset + MIB, 2);
        file.write_all_at(&bytes, offset).expect("it can be written");
    }
    (server, mounted, expected)
}

#[test]
fn asked_once_it_stores_everything() {
    Scene::with_fuse(LONG, |scene| {
        for how in ["SIGINT", "SIGTERM", "SIGHUP"] {
            let (server, mut mounted, mut expected) = changed(scene, &[]);
            match how {
                "SIGINT" => mounted.program.interrupt(),
                "SIGTERM" => {
                    // What sends more than one at once, as timeout(1) does, has not lost patience either.
                    mounted.program.freeze();
                    mounted.program.terminate();
                    mounted.program.interrupt();
                    mounted.program.thaw();
                }
                _ => {
                    // The shell sends one and the kernel another; neither is somebody who has lost patience.
                    server.program.freeze();
                    mounted.program.hang_up();
                    mounted.program.wait_for_event(SOON, "stopping");
                    mounted.program.hang_up();
                    mounted.program.wait_for_event(SOON, "progress");
                    server.program.thaw();
                }
            }
            let outcome = mounted.wait_for_end();
            let names: Vec<_> = outcome.events().iter().map(|event| event["event"].clone()).collect();
            assert!(names.iter().any(|name| name == "stopping"), "{outcome:?}");
            assert_eq!(names.last().expect("there are events"), "stopped");
            expected.keep();
            expected.check_file(&scene.path("source"));
            server.stop();
        }
    });
}

/// While it stores, it counts what is left.
#[test]
fn it_counts_what_is_left() {
    Scene::with_fuse(LONG, |scene| {
        let (server, mut mounted, mut expected) = changed(scene, &[]);
        server.program.freeze();
        mounted.program.terminate();
        let progress = loop {
            let progress = mounted.program.wait_for_event(SOON, "progress");
            if progress["what"] == "storing" {
                break progress;
            }
        };
        let (done, size) = (progress["done"].as_u64().expect("a number"), progress["size"].as_u64().expect("a number"));
        assert!(done < size && size >= 16 * MIB, "{progress}");
        server.program.thaw();
        mounted.wait_for_end();
        expected.keep();
        expected.check_file(&scene.path("source"));
        server.stop();

        // The same for people.
        let (server, mounted, _) = changed(scene, &[]);
        mounted.unmount();
        let mut person = scene.r3map(&["mount", &server.uri, &scene.name("region"), "--push-interval", "1h"]);
        person.wait_for_line(SOON, "ready: ");
        let file = std::fs::File::options().write(true).open(scene.path("region")).expect("it is there");
        file.write_all_at(&fill::bytes(0, 1 << 20, 3), 0).expect("it can be written");
        drop(file);
        server.program.freeze();
        person.interrupt();
        let line = person.wait_for_line(SOON, "storing: ");
        assert!(line.contains(" % of ") && line.contains(" left"), "{line}");
        server.program.thaw();
        let outcome = person.end_well(SOON);
        assert!(outcome.text().contains("everything is stored"), "{outcome:?}");
    });
}

#[test]
fn asked_twice_it_gives_up() {
    Scene::with_fuse(LONG, |scene| {
        let (server, mut mounted, _) = changed(scene, &[]);
        server.program.freeze();
        mounted.program.interrupt();
        mounted.program.wait_for_event(SOON, "stopping");
        mounted.program.interrupt();
        let path = mounted.path.clone();
        let outcome = mounted.program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let message = outcome.event("error")["message"].as_str().expect("a message").to_owned();
        assert!(message.contains("gave up") && message.contains("bytes) of changes not pushed"), "{message}");
        assert!(!is_mounted(&path), "nothing is left mounted");
    });
}

/// On a terminal: bars while it pulls and stores, Ctrl-C as a key, and the second one gives up.
#[test]
fn on_a_terminal() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let (region, screen) = (scene.path("region"), scene.path("screen"));
        // A line so slow that the bar is seen while it is pulled.
        let proxy = DelayProxy::tcp(server.address(), Duration::from_millis(1)).expect("it can listen");
        proxy.set_rate(NonZeroU64::new(16 << 20));
        let uri = format!("grpc://{}", proxy.socket_addr());
        // In the shell's place: a shell that waits for it is ended by Ctrl-C at once.
        let line = format!("exec {} mount {uri} {} --push-interval 1h", env!("CARGO_BIN_EXE_r3map"), region.display());
        let script = ["--quiet", "--return", "--flush", "--command", &line];
        let mut terminal = scene.start(Command::new("script").args(script).arg(&screen).env("TERM", "xterm"));
        let shows = |text: &str| {
            wait_until(SOON, text, || {
                String::from_utf8_lossy(&std::fs::read(&screen).unwrap_or_default()).contains(text)
            });
        };
        shows("ready: ");
        shows("pulling [");
        shows("pulled: all ");
        server.program.freeze();
        let file = std::fs::File::options().write(true).open(&region).expect("it is there");
        file.write_all_at(&fill::bytes(0, 1 << 20, 3), 0).expect("it can be written");
        drop(file);
        terminal.send("\x03");
        shows("stopping: storing what is left; Ctrl-C again gives up");
        shows("storing [");
        shows("(1.0 MiB left)");
        terminal.send("\x03");
        let status = terminal.wait(SOON);
        assert_eq!(status.code(), Some(1), "{status}");
        shows("error: gave up with 1.0 MiB (1048576 bytes) of changes not pushed");
        assert!(!is_mounted(&region), "nothing is left mounted");
        server.program.thaw();
    });
}

/// A remote that stays away: after the limit that the user set it ends by itself, and says what is lost.
#[test]
fn asked_once_with_nobody_to_store_it() {
    Scene::with_fuse(LONG, |scene| {
        let (server, mounted, _) = changed(scene, &["--retry", "1s"]);
        server.kill();
        mounted.program.terminate();
        let path = mounted.path.clone();
        let outcome = mounted.program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let waiting = outcome.event("waiting")["message"].as_str().expect("a message").to_owned();
        assert!(waiting.starts_with("the remote does not answer"), "it says why it takes so long: {waiting}");
        let message = outcome.event("error")["message"].as_str().expect("a message").to_owned();
        assert!(message.contains("bytes) of changes not pushed"), "{message}");
        assert!(!is_mounted(&path) && !path.exists(), "nothing is left");

        // The same if it is frozen and there is no copy; then nobody refuses, and nothing may be waited for.
        let server = scene.serve("memory:?size=8MiB", &[]);
        let mounted = scene.mount(&server.uri, "region", &["--mode", "direct", "--retry", "1s"]);
        mounted.open().write_all_at(&[1; 5000], 0).expect("it can be written");
        server.program.freeze();
        mounted.program.terminate();
        let outcome = mounted.program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(!is_mounted(&path) && !path.exists(), "nothing is left");
        server.kill();

        // The same if another one is there instead.
        let server = scene.serve("memory:?size=8MiB", &[]);
        let mounted = scene.mount(&server.uri, "region", &["--push-interval", "1h"]);
        mounted.open().write_all_at(&[1; 5000], 0).expect("it can be written");
        let address = server.kill();
        let _other = scene.serve_again("memory:?size=8MiB", address);
        mounted.program.terminate();
        let outcome = mounted.program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(!is_mounted(&path) && !path.exists(), "nothing is left");
    });
}

/// Giving up with a cache file loses nothing that it holds.
#[test]
fn asked_twice_with_a_cache_file_it_can_go_on_later() {
    Scene::with_fuse(LONG, |scene| {
        let cache = scene.name("cache");
        let (server, mut mounted, mut expected) = changed(scene, &["--cache", &cache, "--fsync", "local"]);
        mounted.open().sync_all().expect("it is kept locally");
        expected.keep();
        server.program.freeze();
        mounted.program.interrupt();
        mounted.program.wait_for_event(SOON, "stopping");
        mounted.program.interrupt();
        assert_eq!(mounted.program.end(SOON).code, Some(1));
        server.program.thaw();
        let mounted = scene.mount(&server.uri, "region", &["--cache", &cache]);
        expected.check_file(&mounted.path);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn unmounted_from_outside() {
    Scene::with_root(LONG, |scene| {
        for arguments in [["umount"].as_slice(), &["umount", "-l"], &["fusermount3", "-u"]] {
            let (server, mounted, mut expected) = changed(scene, &[]);
            let mut all = arguments[1..].to_vec();
            all.push(mounted.name());
            scene.run(SOON, arguments[0], &all);
            mounted.wait_for_end();
            expected.keep();
            expected.check_file(&scene.path("source"));
            server.stop();
        }
    });
}

/// Whoever has the file open keeps it from being unmounted; it says so, and goes on when it is closed.
#[test]
fn it_waits_for_those_who_use_the_file() {
    Scene::with_fuse(LONG, |scene| {
        let (_server, mut mounted, mut expected) = changed(scene, &[]);
        let file = mounted.open();
        mounted.program.terminate();
        mounted.program.wait_for_event(SOON, "busy");
        let bytes = expected.write(5..6000, 9);
        file.write_all_at(&bytes, 5).expect("it still works");
        drop(file);
        mounted.wait_for_end();
        expected.keep();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn a_server_stops_when_asked() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 1);
        for interrupt in [true, false] {
            let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
            // Also while somebody is connected.
            let mounted = scene.mount(&server.uri, "region", &["--retry", "1s"]);
            if interrupt {
                server.program.interrupt()
            } else {
                server.program.terminate()
            }
            let outcome = server.program.end_well(SOON);
            assert_eq!(outcome.events().last().expect("there are events")["event"], "stopped");
            drop(mounted);
        }
    });
}

#[test]
fn stopped_before_it_is_ready() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        server.program.freeze();
        let mounting = scene.mounting(&server.uri, "region", &["--pull-first"]);
        wait_until_it_listens(mounting.program.id());
        mounting.program.interrupt();
        let outcome = mounting.program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(!mounting.path.exists(), "nothing is left");
    });
}

/// Everything that a life of a server and a mount says with `--json` is an event, and standard error is silent.
#[test]
fn json_and_nothing_else() {
    Scene::with_fuse(LONG, |scene| {
        let (server, mut mounted, _) = changed(scene, &["--retry", "1s"]);
        mounted.wait_pulled();
        let address = server.address();
        server.program.interrupt();
        let outcome = server.program.end_well(SOON);
        assert!(outcome.err.is_empty() && !outcome.events().is_empty(), "{outcome:?}");
        mounted.open().sync_all().expect_err("nobody answers");
        mounted.program.wait_for_event(SOON, "waiting");
        let _server = scene.serve_again(&format!("file:{}", scene.name("source")), address);
        wait_until(SOON, "syncing again", || mounted.open().sync_all().is_ok());
        mounted.program.wait_for_event(SOON, "resumed");
        let outcome = mounted.unmount();
        assert!(outcome.err.is_empty(), "{outcome:?}");
        outcome.out.iter().for_each(|line| drop(event(line)));
        let ready = outcome.event("ready");
        assert_eq!(ready["size"], SIZE);
        assert_eq!(ready["mode"], "managed");
        assert_eq!(ready["read_only"], false);
        assert!(ready["path"].as_str().is_some_and(|path| path.ends_with("/region")), "{ready}");
    });
}

#[test]
fn the_disk_of_the_source_is_full() {
    Scene::with_root(LONG, |scene| {
        let disk = scene.tmpfs("disk", 8 * MIB);
        let source = disk.join("source");
        std::fs::File::create(&source).and_then(|file| file.set_len(SIZE)).expect("a sparse file takes no room");
        let server = scene.serve(&format!("file:{}", source.display()), &[]);
        let mut mounted = scene.mount(&server.uri, "region", &["--retry", "2s", "--push-interval", "100ms"]);
        let file = mounted.open();
        let bytes = fill::bytes(0, 16 << 20, 5);
        file.write_all_at(&bytes, 0).expect("there is room here");
        let error = file.sync_all().expect_err("but not there");
        assert_eq!(error.raw_os_error(), Some(28), "ENOSPC: {error}");
        let trouble = mounted.program.wait_for_event(SOON, "trouble");
        assert!(trouble["message"].as_str().is_some_and(|why| why.contains("No space left")), "{trouble}");
        let mut again = vec![0; bytes.len()];
        file.read_exact_at(&mut again, 0).expect("it is still here");
        assert!(again == bytes, "and whole");
        // Room is made, and everything goes on.
        mount_remount(&disk, MountFlags::empty(), "size=64M").expect("a tmpfs can grow");
        wait_until(SOON, "syncing again", || file.sync_all().is_ok());
        drop(file);
        mounted.unmount();
        server.stop();
        assert!(std::fs::read(&source).expect("it is there")[..bytes.len()] == bytes, "every byte is there");
    });
}

/// What is not stored when it ends may be nowhere, so that it waits for room as for a remote that does not answer.
#[test]
fn asked_once_with_no_room_it_waits_for_room() {
    Scene::with_root(LONG, |scene| {
        let disk = scene.tmpfs("disk", 8 * MIB);
        let source = disk.join("source");
        std::fs::File::create(&source).and_then(|file| file.set_len(SIZE)).expect("a sparse file takes no room");
        let server = scene.serve(&format!("file:{}", source.display()), &[]);
        let bytes = fill::bytes(0, 16 << 20, 5);
        let stopped = |retry| {
            let mut mounted = scene.mount(&server.uri, "region", &["--retry", retry, "--push-interval", "1h"]);
            mounted.open().write_all_at(&bytes, 0).expect("there is room here");
            mounted.program.terminate();
            let full = mounted.program.wait_for_event(SOON, "full");
            let why = full["message"].as_str().expect("a message");
            assert!(why.contains("No space left") && why.ends_with("waiting for room, Ctrl-C gives up"), "{why}");
            mounted
        };

        let outcome = stopped("2s").program.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let message = outcome.event("error")["message"].as_str().expect("a message").to_owned();
        assert!(message.starts_with("gave up with ") && message.contains("No space left"), "{message}");

        let mounted = stopped("forever");
        mount_remount(&disk, MountFlags::empty(), "size=64M").expect("a tmpfs can grow");
        let outcome = mounted.program.end(SOON);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        server.stop();
        assert!(std::fs::read(&source).expect("it is there")[..bytes.len()] == bytes, "every byte is there");
    });
}

#[test]
fn the_disk_of_the_cache_is_full() {
    Scene::with_root(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 6);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let disk = scene.tmpfs("disk", 8 * MIB);
        let cache = disk.join("cache");
        let local = ["--cache", cache.to_str().expect("a plain name"), "--fsync", "local", "--retry", "2s"];
        // Only what is touched takes room: else there may be none before the first write.
        let arguments = [&local[..], &["--pull-workers", "0"]].concat();
        let mounted = scene.mount(&server.uri, "region", &arguments);
        let file = mounted.open();
        // Some of it works, some does not; nothing is wrong.
        let (mut kept, mut refused) = (0, 0);
        for offset in (0..SIZE - MIB).step_by(1 << 20) {
            let mut piece = vec![0; 1 << 20];
            match file.read_exact_at(&mut piece, offset) {
                Ok(()) => expected.check(offset, &piece).unwrap_or_else(|wrong| panic!("{wrong}")),
                Err(error) => assert!([5, 28].contains(&error.raw_os_error().expect("an errno")), "{error}"),
            }
            let bytes = fill::bytes(offset, 4096, 7);
            let stored = file.write_all_at(&bytes, offset).and_then(|()| file.sync_data());
            expected.write(offset..offset + 4096, 7);
            match stored {
                Ok(()) => {
                    expected.keep();
                    kept += 1;
                }
                Err(error) => {
                    assert!([5, 28].contains(&error.raw_os_error().expect("an errno")), "{error}");
                    refused += 1;
                    break;
                }
            }
        }
        assert!(kept > 0, "there was room for some");
        assert!(refused > 0, "and not for all");
        drop(file);
        mounted.kill();
        expected.crash();
        mount_remount(&disk, MountFlags::empty(), "size=128M").expect("a tmpfs can grow");
        let mounted = scene.mount(&server.uri, "region", &arguments);
        expected.check_file(&mounted.path);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}
