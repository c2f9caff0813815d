//! The main job through memory: a region in one process, a slice of it in another.

use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use r3map::{
    Backend, Cache, ErrorKind, Mount, PullSettings, PushSettings, RetrySettings, Settings, SliceMount, Workers,
};
use r3map_testkit::crash;
use r3map_testkit::process::Process;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::random::Random;

use crate::support::{Expected, MIB, SOON, Scene, block_on, make_file, open, wait_until};
use crate::whole_region::{GIB_AND_A_BYTE, RTT, SMALL};

const LONG: Duration = Duration::from_secs(240);
const WRITES: usize = 150;

/// Plays a test that maps memory.
fn play(act: impl FnOnce(&Scene) + Send + 'static) {
    Scene::play(LONG, |scene| match block_on(Mount::direct(open("null:?size=1MiB")).slice()) {
        Ok(_) => act(scene),
        Err(error) => r3map_testkit::skip(&error.to_string()),
    });
}

#[test]
fn a_gib_and_a_byte() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let slice = block_on(Mount::managed(open(&server.uri)).slice()).expect("it can be mapped");
        through_memory(slice, &mut expected, scene);
        server.stop();
    });
}

#[test]
fn a_gib_and_a_byte_over_a_round_trip_of_20_ms() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 2);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let proxy = DelayProxy::tcp(server.address(), RTT).expect("it can listen");
        let remote = open(&format!("grpc://{}", proxy.socket_addr()));
        let slice = block_on(Mount::managed(remote).slice()).expect("it can be mapped");
        through_memory(slice, &mut expected, scene);
    });
}

#[test]
fn directly() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 3);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let slice = block_on(Mount::direct(open(&server.uri)).slice()).expect("it can be mapped");
        through_memory(slice, &mut expected, scene);
    });
}

#[test]
fn directly_over_a_round_trip_of_20_ms() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), SMALL / 5, 4);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let proxy = DelayProxy::tcp(server.address(), RTT).expect("it can listen");
        let remote = open(&format!("grpc://{}", proxy.socket_addr()));
        let slice = block_on(Mount::direct(remote).slice()).expect("it can be mapped");
        through_memory(slice, &mut expected, scene);
    });
}

/// Reads every byte, writes here and there, flushes, and compares at the source while it is still mapped.
fn through_memory(mut slice: SliceMount, expected: &mut Expected, scene: &Scene) {
    assert_eq!(slice.as_slice().len() as u64, expected.size());
    check_memory(&slice, expected);
    let mut random = Random::new(expected.size());
    let memory = slice.as_mut_slice().expect("it can be written");
    expected.write_randomly(WRITES, &mut random, |offset, bytes| {
        memory[span(offset..offset + bytes.len() as u64)].copy_from_slice(bytes);
        Ok(())
    });
    scene.step("flush");
    block_on(slice.flush()).expect("it can be flushed");
    expected.keep();
    expected.check_file(&scene.path("source"));
    // What is written later is found too, and closing stores it.
    let end = expected.size() - 1;
    let last = expected.write(end..end + 1, 99);
    slice.as_mut_slice().expect("it can be written")[span(end..end + 1)].copy_from_slice(&last);
    check_memory(&slice, expected);
    scene.step("close");
    block_on(slice.close()).expect("it can be closed");
    expected.keep();
    expected.check_file(&scene.path("source"));
}

fn check_memory(slice: &SliceMount, expected: &Expected) {
    let memory = slice.as_slice();
    expected.check_all(|offset, buf| {
        buf.copy_from_slice(&memory[span(offset..offset + buf.len() as u64)]);
        Ok(())
    });
}

fn span(bytes: Range<u64>) -> Range<usize> {
    usize::try_from(bytes.start).expect("it is mapped")..usize::try_from(bytes.end).expect("it is mapped")
}

/// In the middle of pulling, and in the middle of pushing.
#[test]
fn the_server_dies_and_comes_back() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 5);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        // One chunk at a time: a GiB takes long enough for the server to be killed in the middle.
        let mut settings = Settings::default();
        settings.pull.workers = Workers::Fixed(std::num::NonZeroUsize::MIN);
        let mount = Mount::managed(open(&server.uri)).settings(settings);
        let mut slice = block_on(mount.slice()).expect("it can be mapped");
        let mut first = vec![0; span(0..MIB).len()];
        slice.read_at(0, &mut first).expect("it has begun");
        expected.check(0, &first).unwrap_or_else(|wrong| panic!("{wrong}"));
        let address = server.kill();
        let server = std::thread::scope(|threads| {
            let reader = threads.spawn(|| check_memory(&slice, &expected));
            wait_until(SOON, "it notices", || slice.region().outage().borrow().is_some());
            assert!(!reader.is_finished(), "the reader waits");
            let server = scene.serve_again(&source, address);
            reader.join().expect("it reads on as if nothing had happened");
            server
        });

        for offset in (0..GIB_AND_A_BYTE - MIB).step_by(1 << 20) {
            let bytes = expected.write(offset..offset + MIB, 6);
            slice.write_at(offset, &bytes).expect("it can be written");
        }
        let written = || scene.path("source").metadata().and_then(|now| now.modified()).expect("it has a time");
        let before = written();
        let server = std::thread::scope(|threads| {
            let flushing = threads.spawn(|| block_on(slice.flush()));
            wait_until(SOON, "pushing begins", || written() != before);
            let address = server.kill();
            wait_until(SOON, "it notices", || slice.region().outage().borrow().is_some());
            assert!(!flushing.is_finished(), "nothing is acknowledged that is not stored");
            let server = scene.serve_again(&source, address);
            flushing.join().expect("no panic").expect("in the end everything is stored");
            server
        });
        expected.keep();
        expected.check_file(&scene.path("source"));
        through_memory(slice, &mut expected, scene);
        server.stop();
    });
}

/// The server stays away for longer than the limit: what is missing is an error, and in the end all is there.
#[test]
fn after_the_limit_nothing_acknowledged_is_lost() {
    const LIMIT: Duration = Duration::from_secs(3);
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 6);
        on_disk(scene);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        let mount = Mount::managed(open(&server.uri)).settings(impatient(LIMIT));
        let mut slice = block_on(mount.slice()).expect("it can be mapped");
        let bytes = expected.write(MIB..3 * MIB, 7);
        slice.write_at(MIB, &bytes).expect("it can be written");
        block_on(slice.flush()).expect("it can be flushed");
        expected.keep();

        let address = server.kill();
        let error = slice.read_at(GIB_AND_A_BYTE - 1, &mut [0]).expect_err("the server is gone");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        let bytes = expected.write(2 * MIB + 5..3 * MIB - 5, 8);
        slice.write_at(2 * MIB + 5, &bytes).expect("what is there can be written");
        block_on(slice.flush()).expect_err("nothing can be stored");
        expected.check_file(&scene.path("source"));

        let server = scene.serve_again(&source, address);
        wait_until(SOON, "flushing again", || block_on(slice.flush()).is_ok());
        expected.keep();
        expected.check_file(&scene.path("source"));
        wait_until(SOON, "reading again", || slice.read_at(GIB_AND_A_BYTE - 1, &mut [0]).is_ok());
        through_memory(slice, &mut expected, scene);
        server.stop();
    });
}

/// Has the source stored, so that flushing it takes no longer than the little that is written to it.
fn on_disk(scene: &Scene) {
    std::fs::File::open(scene.path("source")).and_then(|file| file.sync_all()).expect("it can be synced");
}

/// Settings that pull and push nothing unasked, and give up soon.
fn impatient(limit: Duration) -> Settings {
    Settings {
        retry: RetrySettings { limit: Some(limit), ..RetrySettings::default() },
        pull: PullSettings { workers: Workers::Off, ..PullSettings::default() },
        push: PushSettings { interval: Duration::from_secs(3600), ..PushSettings::default() },
        ..Settings::default()
    }
}

/// What a child process does with a slice; its argument is the server's name.
fn in_child(role: &str, work: fn(&mut SliceMount)) {
    if let Some(uri) = crash::role(role) {
        let mut slice = block_on(Mount::managed(open(&uri)).settings(impatient(Duration::from_secs(1))).slice())
            .expect("it can be mapped");
        work(&mut slice);
        crash::reached("done");
        std::process::exit(0);
    }
}

/// Starts the calling test as a child in a role.
fn child(scene: &Scene, test: &str, role: &str, uri: &str) -> Process {
    scene.step(format!("{test} as {role}"));
    crash::child(&format!("slices::{test}"), role, uri)
}

#[test]
fn what_cannot_be_had_is_a_signal_and_never_zeros() {
    in_child("reader", |slice| {
        assert_eq!(slice.as_slice()[0], r3map_testkit::fill::bytes(0, 1, 7)[0]);
        crash::reached("read one");
        let chunks = (1..).map(|chunk| chunk * (64 << 10));
        for place in chunks.take_while(|place| *place < SMALL) {
            std::thread::sleep(Duration::from_millis(10));
            if block_on(slice.demand(place..place + 1)).is_err() {
                crash::reached("the server is gone");
                let byte = slice.as_slice()[span(place..place + 1)][0];
                crash::reached(&format!("read {byte}"));
            }
        }
    });
    play(|scene| {
        make_file(&scene.path("source"), SMALL, 7);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let test = "what_cannot_be_had_is_a_signal_and_never_zeros";
        let mut reader = child(scene, test, "reader", &server.uri);
        reader.wait_for_line(SOON, "read one");
        server.kill();
        reader.wait_for_line(SOON, "the server is gone");
        let status = reader.wait(SOON);
        const SIGBUS: i32 = 7;
        assert_eq!(status.signal(), Some(SIGBUS), "{:?} {:?}", reader.stdout(), reader.stderr());
    });
}

#[test]
fn what_a_flush_acknowledged_survives_the_process() {
    in_child("writer", |slice| {
        slice.write_at(MIB, &r3map_testkit::fill::bytes(MIB, 100_000, 9)).expect("it can be written");
        block_on(slice.flush()).expect("it can be flushed");
        slice.write_at(5 * MIB, &r3map_testkit::fill::bytes(5 * MIB, 100_000, 10)).expect("it can be written");
        crash::stop("flushed");
    });
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 8);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mut writer = child(scene, "what_a_flush_acknowledged_survives_the_process", "writer", &server.uri);
        writer.wait_for_line(SOON, "flushed");
        writer.kill();
        expected.write(MIB..MIB + 100_000, 9);
        expected.keep();
        expected.write(5 * MIB..5 * MIB + 100_000, 10);
        expected.check_file(&scene.path("source"));
    });
}

/// A slice with a cache file pulls nothing again that the file has.
#[test]
fn a_slice_with_a_cache_file() {
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 11);
        let lent = crate::support::Lent::new(&format!("file:{}", scene.name("source")));
        for life in 0..2 {
            lent.forget();
            let remote: Arc<dyn Backend> = open(&lent.uri);
            let mount = Mount::managed(remote).identity(&lent.uri).cache(Cache::File(scene.path("cache")));
            let mut slice = block_on(mount.slice()).expect("it can be mapped");
            check_memory(&slice, &expected);
            assert_eq!(lent.bytes_read() == 0, life > 0, "life {life}: {} bytes were read", lent.bytes_read());
            let bytes = expected.write(life * MIB..life * MIB + 5000, 12);
            slice.write_at(life * MIB, &bytes).expect("it can be written");
            block_on(slice.close()).expect("it can be closed");
            expected.keep();
            expected.check_file(&scene.path("source"));
        }
    });
}

/// The cache file of a slice whose process is killed: of what was pulled, in the middle of pulling; of what a flush has
/// acknowledged, after it.
#[test]
fn a_gib_and_a_byte_whose_process_is_killed() {
    if let Some(argument) = crash::role("holder") {
        let (uri, cache) = argument.split_once(' ').expect("a name and a path");
        let mut slice = cached(uri, cache.into());
        slice.read_at(0, &mut [0]).expect("it can be read");
        crash::reached("pulling");
        // Once everything is there, it is as good as memory.
        assert!(slice.as_slice().iter().step_by(4096).map(|byte| usize::from(*byte)).sum::<usize>() > 0);
        slice
            .write_at(GIB_AND_A_BYTE / 2, &r3map_testkit::fill::bytes(GIB_AND_A_BYTE / 2, 1 << 20, 22))
            .expect("it fits");
        block_on(slice.flush()).expect("it can be flushed");
        slice
            .write_at(GIB_AND_A_BYTE / 4, &r3map_testkit::fill::bytes(GIB_AND_A_BYTE / 4, 1 << 20, 23))
            .expect("it fits");
        crash::stop("flushed");
    }
    play(|scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 21);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let argument = format!("{} {}", server.uri, scene.name("cache"));
        let test = "a_gib_and_a_byte_whose_process_is_killed";
        let mut holder = child(scene, test, "holder", &argument);
        holder.wait_for_line(SOON, "pulling");
        holder.kill();
        scene.step("map again");
        let mut slice = cached(&server.uri, scene.path("cache"));
        check_memory(&slice, &expected);
        block_on(slice.close()).expect("it can be closed");
        drop(slice);

        let mut holder = child(scene, test, "holder", &argument);
        holder.wait_for_line(LONG, "flushed");
        holder.kill();
        expected.write(GIB_AND_A_BYTE / 2..GIB_AND_A_BYTE / 2 + MIB, 22);
        expected.keep();
        expected.write(GIB_AND_A_BYTE / 4..GIB_AND_A_BYTE / 4 + MIB, 23);
        expected.crash();
        expected.check_file(&scene.path("source"));
        scene.step("map once more");
        let slice = cached(&server.uri, scene.path("cache"));
        check_memory(&slice, &expected);
        through_memory(slice, &mut expected, scene);
        server.stop();
    });
}

fn cached(uri: &str, cache: std::path::PathBuf) -> SliceMount {
    let mount = Mount::managed(open(uri)).identity(uri).cache(Cache::File(cache));
    block_on(mount.slice()).expect("it can be mapped")
}
