//! Every option of `mount` and `serve` does what it says.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use r3map_core::Operation;
use r3map_testkit::faults::{Pause, Rule};

use crate::support::{Lent, MIB, SOON, Scene, make_file, wait_until};

const LONG: Duration = Duration::from_secs(120);
const SIZE: u64 = 8 * MIB + 1;

/// The ranges that were read, in their order.
fn reads(lent: &Lent) -> Vec<Range<u64>> {
    let calls = lent.faults.calls();
    calls.into_iter().filter(|call| call.operation == Operation::Read).flat_map(|call| call.ranges).collect()
}

#[test]
fn pull_first() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 1);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let pause = Pause::new();
        lent.faults.add(Rule::on(Operation::Read).touching(MIB..MIB + 1).hold(&pause));
        let mut mounting = scene.mounting(&lent.uri, "region", &["--pull-first"]);
        wait_until(SOON, "all but one chunk is read", || lent.bytes_read() >= SIZE);
        std::thread::sleep(Duration::from_millis(300));
        assert!(mounting.program.stdout().iter().all(|line| !line.contains("ready")), "not before the last chunk");
        pause.release();
        mounting.program.wait_for_event(SOON, "ready");
        lent.forget();
        expected.check_file(&mounting.path);
        assert_eq!(lent.bytes_read(), 0, "everything was here");
        mounting.unmount();
    });
}

#[test]
fn pull_order() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 2);
        std::fs::write(scene.path("order"), "# warm these up first\n4MiB\n7MiB-7296KiB\n128KiB\n")
            .expect("there is room");
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let mut mounted =
            scene.mount(&lent.uri, "region", &["--pull-workers", "1", "--pull-order", &scene.name("order")]);
        mounted.wait_pulled();
        let reads = reads(&lent);
        let when = |offset: u64| reads.iter().position(|read| read.contains(&offset)).expect("it was read");
        let others = [0, MIB, 2 * MIB, 6 * MIB, SIZE - 1].map(when);
        let first = [4 * MIB, 7 * MIB, 7 * MIB + (64 << 10), 128 << 10].map(when);
        assert!(first.is_sorted(), "in the order of the file: {reads:?}");
        assert!(others.iter().all(|other| *other > first[3]), "and before all others: {reads:?}");
        mounted.unmount();
    });
}

#[test]
fn no_pull_workers() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 3);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let mounted = scene.mount(&lent.uri, "region", &["--pull-workers", "0", "--direct-io"]);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(lent.bytes_read(), 0, "nothing is pulled that nothing touches: {:?}", lent.faults.calls());
        let mut byte = [0];
        mounted.open().read_exact_at(&mut byte, 5 * MIB + 77).expect("it can be read");
        expected.check(5 * MIB + 77, &byte).unwrap_or_else(|wrong| panic!("{wrong}"));
        let chunk = 5 * MIB..5 * MIB + (64 << 10);
        assert_eq!(reads(&lent), std::slice::from_ref(&chunk), "one chunk");
        mounted.unmount();
    });
}

#[test]
fn chunk_size() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 4);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        for (chunk, len) in [("4KiB", 4096), ("1MiB", MIB)] {
            let arguments = ["--pull-workers", "0", "--direct-io", "--chunk-size", chunk];
            let mounted = scene.mount(&lent.uri, "region", &arguments);
            lent.forget();
            mounted.open().read_exact_at(&mut [0], 3 * MIB).expect("it can be read");
            assert_eq!(lent.bytes_read(), len, "one chunk of {chunk}");
            mounted.unmount();
        }
        drop(lent);
        // The server's own, where nothing else is asked for.
        let server = scene.serve(&format!("file:{}", scene.name("source")), &["--chunk-size", "256KiB"]);
        let info = scene.ended(&["--json", "info", &server.uri]).event("info");
        assert_eq!(info["chunk_size"], 256 << 10, "{info}");
        server.stop();
    });
}

#[test]
fn pull_workers() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 5);
        for (workers, most) in [("1", 1..=1), ("4", 2..=4)] {
            let lent = Lent::new(&format!("file:{}", scene.name("source")));
            lent.faults.add(Rule::on(Operation::Read).delay(Duration::from_millis(5)));
            let mut mounted = scene.mount(&lent.uri, "region", &["--pull-workers", workers, "--chunk-size", "64KiB"]);
            mounted.wait_pulled();
            assert!(most.contains(&lent.faults.most_in_flight()), "{workers}: {}", lent.faults.most_in_flight());
            mounted.unmount();
        }
    });
}

#[test]
fn read_only() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 6);
        let source = format!("file:{}", scene.name("source"));
        let ways: [(&[&str], &[&str]); 3] =
            [(&[], &["--read-only"]), (&["--read-only"], &[]), (&["--read-only"], &["--mode", "direct"])];
        for (serving, mounting) in ways {
            let server = scene.serve(&source, serving);
            let mut mounting = scene.mounting(&server.uri, "region", mounting);
            let ready = mounting.program.wait_for_event(SOON, "ready");
            assert_eq!(ready["read_only"], true);
            let error = std::fs::File::options().write(true).open(&mounting.path).expect_err("nobody may write");
            assert!([1, 13, 30].contains(&error.raw_os_error().expect("an errno")), "EPERM, EACCES or EROFS: {error}");
            expected.check_file(&mounting.path);
            mounting.unmount();
            server.stop();
        }
        make_file(&scene.path("other"), SIZE, 7);
        let closed = scene.serve(&source, &["--read-only"]);
        let outcome = scene.ended(&["copy", &format!("file:{}", scene.name("other")), &closed.uri]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn push_interval() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 7);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &["--push-interval", "200ms"]);
        let bytes = expected.write(MIB..2 * MIB, 8);
        mounted.open().write_all_at(&bytes, MIB).expect("it can be written");
        expected.keep();
        let source = std::fs::File::open(scene.path("source")).expect("it is there");
        let mut found = vec![0; bytes.len()];
        wait_until(SOON, "it is pushed by itself", || {
            source.read_exact_at(&mut found, MIB).expect("it can be read");
            found == bytes
        });
        expected.check_file(&scene.path("source"));
        mounted.unmount();
    });
}

/// Whoever writes faster than the remote takes it is slowed down, and never refused.
#[test]
fn dirty_budget() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 9);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let pause = Pause::new();
        let arguments = ["--push-interval", "1h", "--dirty-budget", "1MiB", "--pull-workers", "0"];
        let mounted = scene.mount(&lent.uri, "region", &arguments);
        lent.faults.add(Rule::on(Operation::Write).hold(&pause));
        let writes: Vec<_> = (0..6).map(|at| (at * MIB, expected.write(at * MIB..(at + 1) * MIB, 10))).collect();
        let file = mounted.open();
        let writer = std::thread::spawn(move || {
            for (offset, bytes) in writes {
                file.write_all_at(&bytes, offset).expect("it is slowed down, not refused");
            }
        });
        wait_until(SOON, "it pushes long before the interval", || lent.faults.count(Operation::Write) > 0);
        std::thread::sleep(Duration::from_millis(500));
        assert!(!writer.is_finished(), "the writer waits");
        pause.release();
        writer.join().expect("it can go on");
        mounted.unmount();
        expected.keep();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn retry_forever() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 11);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        let mounted = scene.mount(&server.uri, "region", &["--retry", "forever", "--pull-workers", "0"]);
        let address = server.kill();
        let path = mounted.path.clone();
        let start = Instant::now();
        let reader = std::thread::spawn(move || expected.check_file(&path));
        std::thread::sleep(Duration::from_secs(3));
        assert!(!reader.is_finished(), "it waits");
        let _server = scene.serve_again(&source, address);
        reader.join().expect("it reads on");
        assert!(start.elapsed() >= Duration::from_secs(3));
        mounted.unmount();
    });
}

#[test]
fn create_and_size() {
    Scene::with_fuse(LONG, |scene| {
        for region in [format!("file:{}", scene.name("new")), format!("directory:{}", scene.name("chunks"))] {
            let server = scene.serve(&region, &["--create", "--size", "3MiB"]);
            let mounted = scene.mount(&server.uri, "region", &["--size", "3MiB"]);
            assert_eq!(mounted.path.metadata().expect("it is there").len(), 3 * MIB);
            assert!(r3map_core::is_zero(&std::fs::read(&mounted.path).expect("it can be read")), "never written");
            mounted.open().write_all_at(b"hello", 2 * MIB).expect("it can be written");
            mounted.unmount();
            server.stop();
            // It is not made anew.
            let server = scene.serve(&region, &["--create", "--size", "3MiB"]);
            let mounted = scene.mount(&server.uri, "region", &[]);
            let mut hello = [0; 5];
            mounted.open().read_exact_at(&mut hello, 2 * MIB).expect("it can be read");
            assert_eq!(&hello, b"hello");
            mounted.unmount();
            server.stop();
        }
    });
}

/// Several kinds of them in one command: all of the region is read through each.
#[test]
fn several_listeners() {
    Scene::play(LONG, |scene| {
        let expected = make_file(&scene.path("region"), 3 * MIB + 1, 1);
        let places = [
            "grpc://127.0.0.1:0".to_owned(),
            "grpc://[::1]:0".to_owned(),
            format!("grpc+unix://{}", scene.name("grpc.sock")),
            "nbd://127.0.0.1:0/disk".to_owned(),
            format!("nbd+unix:///disk?socket={}", scene.name("nbd.sock")),
        ];
        let region = format!("file:{}", scene.name("region"));
        let mut arguments = vec!["--json", "serve", &region];
        arguments.extend(places.iter().flat_map(|place| ["--listen", place]));
        let mut program = scene.r3map(&arguments);
        let uris = places.each_ref().map(|place| {
            let ready = program.wait_for_event(SOON, "ready");
            let uri = ready["uri"].as_str().expect("an address").to_owned();
            let scheme = |uri: &str| uri.split(':').next().map(str::to_owned);
            assert_eq!(scheme(&uri), scheme(place), "they are told in this order");
            uri
        });
        for (number, uri) in uris.iter().enumerate() {
            let copy = format!("copy{number}");
            scene.ended(&["--json", "copy", uri, &format!("file:{}", scene.name(&copy))]).event("copied");
            expected.check_file(&scene.path(&copy));
        }
        program.terminate();
        program.end_well(SOON);
    });
}

/// Only the mount's owner can reach it, unless others are let in.
#[test]
fn allow_other() {
    Scene::with_root(LONG, |scene| {
        let server = scene.serve("memory:?size=1MiB", &[]);
        for (arguments, reachable) in [([].as_slice(), false), (&["--allow-other"], true)] {
            let mounted = scene.mount(&server.uri, "region", arguments);
            let reads = ["--reuid=65534", "--regid=65534", "--clear-groups", "cat", mounted.name()];
            let mut other = scene.start(std::process::Command::new("setpriv").args(reads));
            let status = other.wait(SOON);
            assert_eq!(status.success(), reachable, "{arguments:?}: {}", other.stderr().join("\n"));
            mounted.unmount();
        }
    });
}
