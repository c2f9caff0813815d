//! The server dies, and comes back or not: the mount waits and goes on, gives errors after the limit that the user set,
//! and loses nothing that was acknowledged.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use r3map::{Backend, Result};
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::random::Random;

use crate::support::{Expected, Lent, MIB, Mounted, SOON, Scene, block_on, make_file, open, wait_until};
use crate::whole_region::{GIB_AND_A_BYTE, through_mmap, through_read};

const LONG: Duration = Duration::from_secs(180);
const SIZE: u64 = 64 * MIB + 1;
/// EIO.
const IO_ERROR: i32 = 5;
/// EBUSY.
const BUSY: i32 = 16;

#[test]
fn killed_in_the_middle_of_pulling() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 1);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        // One chunk at a time: a GiB takes long enough for the server to be killed in the middle.
        let mut mounted = scene.mount(&server.uri, "region", &["--pull-workers", "1"]);
        let mut first = vec![0; usize::try_from(MIB).expect("it fits")];
        mounted.open().read_exact_at(&mut first, 0).expect("it has begun");
        expected.check(0, &first).unwrap_or_else(|wrong| panic!("{wrong}"));
        let address = server.kill();
        let reader = {
            let (path, expected) = (mounted.path.clone(), expected.clone());
            std::thread::spawn(move || expected.check_file(&path))
        };
        let mapped = {
            let (mapping, expected) = (map(&mounted), expected.clone());
            std::thread::spawn(move || expected.check_all(|offset, buf| mapping.read(index(offset), buf)))
        };
        mounted.program.wait_for_event(SOON, "waiting");
        assert!(!reader.is_finished() && !mapped.is_finished(), "the readers wait");
        let server = scene.serve_again(&source, address);
        mounted.program.wait_for_event(SOON, "resumed");
        reader.join().expect("it reads on as if nothing had happened");
        mapped.join().expect("so does the mapping");
        mounted.wait_pulled();
        through_mmap(&mounted, &mut expected, scene);
        mounted.unmount();
        server.stop();
    });
}

#[test]
fn killed_in_the_middle_of_pushing() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 2);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        let arguments = ["--pull-workers", "0", "--push-interval", "1h", "--dirty-budget", "2GiB"];
        let mut mounted = scene.mount(&server.uri, "region", &arguments);
        let file = mounted.open();
        let at_source = File::open(scene.path("source")).expect("it is there");
        let first = at_source.metadata().expect("it is open").modified().expect("it has a time");
        for offset in (0..GIB_AND_A_BYTE - MIB).step_by(1 << 20) {
            let bytes = expected.write(offset..offset + MIB, 3);
            file.write_all_at(&bytes, offset).expect("it can be written");
        }
        let syncing = std::thread::spawn(move || file.sync_all());
        // It has begun when the first new byte is at the source.
        let begun = || at_source.metadata().and_then(|now| now.modified()).is_ok_and(|now| now != first);
        wait_until(SOON, "pushing begins", begun);
        let address = server.kill();
        mounted.program.wait_for_event(SOON, "waiting");
        assert!(!syncing.is_finished(), "nothing is acknowledged that is not stored");
        let server = scene.serve_again(&source, address);
        mounted.program.wait_for_event(SOON, "resumed");
        syncing.join().expect("no panic").expect("in the end everything is stored");
        expected.keep();
        expected.check_file(&scene.path("source"));
        through_read(&mounted, &mut expected, scene);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
        server.stop();
    });
}

#[test]
fn after_the_limit_readers_get_an_error_and_recover() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 4);
        let source = format!("file:{}", scene.name("source"));
        for mode in ["managed", "direct"] {
            let server = scene.serve(&source, &[]);
            let mut arguments = vec!["--retry", "2s", "--mode", mode];
            if mode == "managed" {
                arguments.extend(["--pull-workers", "0"]);
            }
            let mounted = scene.mount(&server.uri, "region", &arguments);
            let file = mounted.open();
            let mut piece = vec![0; 4096];
            file.read_exact_at(&mut piece, 0).expect("the server is there");
            let address = server.kill();
            let start = Instant::now();
            let error = file.read_exact_at(&mut piece, 10 * MIB).expect_err("the server is gone");
            assert_eq!(error.raw_os_error(), Some(IO_ERROR), "{error}");
            assert!(start.elapsed() >= Duration::from_secs(1), "it waited for the server first");
            let server = scene.serve_again(&source, address);
            wait_until(SOON, "reading again", || file.read_exact_at(&mut piece, 10 * MIB).is_ok());
            expected.check(10 * MIB, &piece).unwrap_or_else(|wrong| panic!("{wrong}"));
            drop(file);
            mounted.unmount();
            server.stop();
        }
    });
}

#[test]
fn after_the_limit_fsync_says_so_and_works_later() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 5);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        let mounted = scene.mount(&server.uri, "region", &["--retry", "1s", "--push-interval", "1h"]);
        let file = mounted.open();
        let address = server.kill();
        let mut random = Random::new(5);
        // Whole blocks: they need nothing from the remote.
        for _ in 0..20 {
            let offset = random.below(SIZE / 4096 - 16) * 4096;
            let bytes = expected.write(offset..offset + 65_536, random.next_u64());
            file.write_all_at(&bytes, offset).expect("writing whole blocks needs no server");
        }
        file.sync_all().expect_err("nothing can be stored");
        let server = scene.serve_again(&source, address);
        wait_until(SOON, "syncing again", || file.sync_all().is_ok());
        expected.keep();
        expected.check_file(&scene.path("source"));
        drop(file);
        mounted.unmount();
        server.stop();
    });
}

/// What was acknowledged before, and what was written meanwhile and could not be stored: all of it is there in the end,
/// whichever way it is looked at.
#[test]
fn after_the_limit_nothing_acknowledged_is_lost() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 6);
        // Else the first flush would have to store all of it, and take longer than the limit.
        File::open(scene.path("source")).and_then(|file| file.sync_all()).expect("it can be synced");
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&source, &[]);
        let arguments = ["--retry", "3s", "--pull-workers", "0", "--push-interval", "1h"];
        let mounted = scene.mount(&server.uri, "region", &arguments);
        let (file, mapping) = (mounted.open(), map(&mounted));
        let mut random = Random::new(6);
        expected.write_randomly(40, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
        expected.write_randomly(40, &mut random, |offset, bytes| mapping.write(index(offset), bytes));
        file.sync_all().expect("it can be synced");
        expected.keep();

        let address = server.kill();
        let untouched = untouched(&expected);
        let error = file.read_exact_at(&mut [0; 4096], untouched).expect_err("the server is gone");
        assert_eq!(error.raw_os_error(), Some(IO_ERROR), "{error}");
        mapping.read(index(untouched), &mut [0; 100]).expect_err("nor through a mapping");
        // Whole blocks need nothing from the remote.
        for _ in 0..40 {
            let offset = random.below(GIB_AND_A_BYTE / 4096 - 16) * 4096;
            let bytes = expected.write(offset..offset + 65_536, random.next_u64());
            file.write_all_at(&bytes, offset).expect("writing whole blocks needs no server");
        }
        let error = file.sync_all().expect_err("nothing can be stored");
        assert_eq!(error.raw_os_error(), Some(IO_ERROR), "{error}");
        expected.check_file(&scene.path("source"));

        let server = scene.serve_again(&source, address);
        wait_until(SOON, "syncing again", || file.sync_all().is_ok());
        expected.keep();
        expected.check_file(&scene.path("source"));
        expected.check_all(|offset, buf| mapping.read(index(offset), buf));
        drop((file, mapping));
        through_read(&mounted, &mut expected, scene);
        mounted.unmount();
        server.stop();
    });
}

/// All of the mounted file, as memory.
fn map(mounted: &Mounted) -> FileMapping {
    let file = mounted.open();
    let len = file.metadata().expect("it is open").len();
    FileMapping::new(&file, index(len), Sharing::Shared, true).expect("it can be mapped")
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("it can be mapped")
}

/// A place whose chunk, and those around it, nothing was written to.
fn untouched(expected: &Expected) -> u64 {
    let written = expected.written();
    let far = |place: &u64| written.iter().all(|range| range.end + 4 * MIB < *place || *place + 4 * MIB < range.start);
    (8 * MIB..expected.size()).step_by(1 << 20).find(far).expect("most of it is untouched")
}

/// A region that keeps in memory what was not flushed: it is lost with the server.
struct Volatile {
    disk: Arc<dyn Backend>,
    unflushed: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Volatile {
    fn new(disk: &Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self { disk: disk.clone(), unflushed: Mutex::default() })
    }

    fn unflushed(&self) -> MutexGuard<'_, Vec<(u64, Vec<u8>)>> {
        self.unflushed.lock().expect("nobody panicked")
    }
}

#[async_trait]
impl Backend for Volatile {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buf).await?;
        for (start, bytes) in self.unflushed().iter() {
            for (at, byte) in (*start..).zip(bytes) {
                if let Some(slot) = at.checked_sub(offset).and_then(|at| buf.get_mut(usize::try_from(at).ok()?)) {
                    *slot = *byte;
                }
            }
        }
        Ok(())
    }

    async fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.unflushed().push((offset, bytes.to_vec()));
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let writes = std::mem::take(&mut *self.unflushed());
        for (offset, bytes) in writes {
            self.disk.write_at(offset, &bytes).await?;
        }
        self.disk.flush().await
    }
}

#[test]
fn killed_between_write_and_flush() {
    Scene::with_fuse(LONG, |scene| {
        let disk = open("memory:?size=8MiB");
        let server = Volatile::new(&disk);
        let lent = Lent::at("grpc://127.0.0.1:0", server.clone()).expect("it can listen");
        // What is over the budget is pushed, but not flushed before the interval ends.
        let arguments = ["--push-interval", "1h", "--dirty-budget", "256KiB", "--retry", "30s"];
        let mut mounted = scene.mount(&lent.uri, "region", &arguments);
        mounted.wait_pulled();
        let file = mounted.open();
        let written = fill::bytes(MIB, 1 << 20, 6);
        file.write_all_at(&written, MIB).expect("it can be written");
        wait_until(SOON, "a part is pushed", || !server.unflushed().is_empty());
        assert!(r3map_core::is_zero(&read(&*disk)), "nothing is flushed");
        let place = lent.kill();
        let mut next = None;
        wait_until(SOON, "its port is free", || {
            next = Lent::at(&place, Volatile::new(&disk)).ok();
            next.is_some()
        });
        file.sync_all().expect("what the server forgot is pushed again");
        assert!(read(&*disk)[1 << 20..2 << 20] == written, "what was acknowledged is there");
        drop(file);
        mounted.unmount();
    });
}

/// Nobody but the application has what the server forgot: every fsync says so until it is written again, and so does the
/// end of the mount.
#[test]
fn killed_between_write_and_flush_of_a_direct_mount() {
    Scene::with_fuse(LONG, |scene| {
        let disk = open("memory:?size=8MiB");
        let mut lent = Lent::at("grpc://127.0.0.1:0", Volatile::new(&disk)).expect("it can listen");
        for written_again in [true, false] {
            let mounted = scene.mount(&lent.uri, "region", &["--mode", "direct", "--retry", "30s"]);
            let file = mounted.open();
            let written = fill::bytes(MIB, 1 << 20, 6 + u64::from(written_again));
            file.write_all_at(&written, MIB).expect("it can be written");
            let place = lent.kill();
            let mut next = None;
            wait_until(SOON, "its port is free", || {
                next = Lent::at(&place, Volatile::new(&disk)).ok();
                next.is_some()
            });
            lent = next.expect("it listens");
            for _ in 0..2 {
                let error = file.sync_all().expect_err("the server has forgotten it");
                assert_eq!(error.raw_os_error(), Some(BUSY), "{error}");
            }
            if written_again {
                file.write_all_at(&written, MIB).expect("it can be written again");
                file.sync_all().expect("and is there");
                assert!(read(&*disk)[1 << 20..2 << 20] == written);
                drop(file);
                mounted.unmount();
            } else {
                drop(file);
                mounted.program.terminate();
                let outcome = mounted.program.end(SOON);
                assert_eq!(outcome.code, Some(1), "{outcome:?}");
                let message = outcome.text();
                assert!(message.contains("not everything that was lost before has been written again"), "{message}");
            }
        }
    });
}

/// The same behind a server that serves it on: whoever has written something hears of it, and over gRPC nobody else.
#[test]
fn killed_between_write_and_flush_behind_another_server() {
    Scene::with_fuse(LONG, |scene| {
        for listen in ["grpc://127.0.0.1:0", "nbd://127.0.0.1:0"] {
            killed_behind_a_server_at(scene, listen);
        }
    });
}

fn killed_behind_a_server_at(scene: &Scene, listen: &str) {
    let disk = open("memory:?size=8MiB");
    let lent = Lent::at("grpc://127.0.0.1:0", Volatile::new(&disk)).expect("it can listen");
    let between = scene.serve_at(&lent.uri, listen, &[]);
    let mount = |name: &str| scene.mount(&between.uri, name, &["--mode", "direct", "--retry", "30s"]);
    let mounts = ["innocent", "one", "other"].map(mount);
    let files: Vec<_> = mounts.iter().map(Mounted::open).collect();
    let (innocent, writers) = files.split_first().expect("there are some");
    let written = fill::bytes(0, 1 << 20, 8);
    let write = |file: &File| file.write_all_at(&written, 0).expect("it can be written");
    writers.iter().for_each(write);
    let place = lent.kill();
    let mut next = None;
    wait_until(SOON, "its port is free", || {
        next = Lent::at(&place, Volatile::new(&disk)).ok();
        next.is_some()
    });
    let flushed = innocent.sync_all();
    // NBD does not say whose writes were lost.
    assert_eq!(flushed.is_ok(), listen.starts_with("grpc"), "it has written nothing: {flushed:?}");
    for writer in writers {
        let sync = || writer.sync_all().expect_err("the server has forgotten it");
        // Over NBD the first errors may be those of a server that has not found its own again.
        wait_until(SOON, "it is known to be lost", || sync().raw_os_error() == Some(BUSY));
    }
    for writer in writers {
        write(writer);
        writer.sync_all().expect("it was written again");
    }
    assert!(read(&*disk)[..1 << 20] == written);
    wait_until(SOON, "it has heard of it too", || innocent.sync_all().is_ok());
    drop(files);
    mounts.into_iter().for_each(|mounted| drop(mounted.unmount()));
}

fn read(backend: &dyn Backend) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(backend.size()).expect("it fits")];
    block_on(backend.read_at(0, &mut bytes)).expect("it can be read");
    bytes
}

/// The region was in the memory of a server that died: whoever serves there now has another one.
#[test]
fn killed_with_the_region_in_its_memory() {
    Scene::with_fuse(LONG, |scene| {
        let server = scene.serve("memory:?size=8MiB", &[]);
        let mounted = scene.mount(&server.uri, "region", &["--pull-workers", "0", "--retry", "2s"]);
        let file = mounted.open();
        file.write_all_at(&fill::bytes(0, 1 << 20, 7), 0).expect("it can be written");
        file.sync_all().expect("it can be synced");
        let address = server.kill();
        let _server = scene.serve_again("memory:?size=8MiB", address);
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 0).expect("what is local is as it was");
        fill::check(&page, 0, 7).unwrap_or_else(|wrong| panic!("{wrong}"));
        file.read_exact_at(&mut page, 4 * MIB).expect_err("zeros would be another region's");
        file.write_all_at(&page, 0).expect("it is written locally");
        file.sync_all().expect_err("and nobody can store it");
    });
}

#[test]
fn a_line_that_breaks_again_and_again() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SIZE, 7);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let target: std::net::SocketAddr = lent.uri["grpc://".len()..].parse().expect("an address");
        let proxy = DelayProxy::tcp(target, Duration::from_millis(1)).expect("it can listen");
        let uri = format!("grpc://{}", proxy.socket_addr());
        let mounted = scene.mount(&uri, "region", &["--push-interval", "20ms"]);
        let file = mounted.open();
        let mut random = Random::new(7);
        for _ in 0..15 {
            proxy.reset();
            expected.write_randomly(5, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
            proxy.reset();
            file.sync_all().expect("it is tried again");
            expected.keep();
        }
        expected.check_file(&scene.path("source"));
        expected.check_file(&mounted.path);
        drop(file);
        mounted.unmount();
    });
}

/// A server that is frozen answers nothing and refuses nothing: attempts must have a limit of their own.
#[test]
fn frozen_and_thawed() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 8);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let arguments = ["--pull-workers", "0", "--retry", "2s", "--direct-io"];
        let mut mounted = scene.mount(&server.uri, "region", &arguments);
        let file = mounted.open();
        server.program.freeze();
        let mut piece = vec![0; 4096];
        // Twice, so that it has the time to take giving up for an answer.
        for _ in 0..2 {
            let error = file.read_exact_at(&mut piece, MIB).expect_err("nobody answers");
            assert_eq!(error.raw_os_error(), Some(IO_ERROR), "{error}");
        }
        mounted.program.wait_for_event(SOON, "waiting");
        let said = mounted.program.stdout().join("\n");
        assert!(!said.contains("resumed"), "nobody has answered: {said}");
        server.program.thaw();
        wait_until(SOON, "reading again", || file.read_exact_at(&mut piece, MIB).is_ok());
        mounted.program.wait_for_event(SOON, "resumed");
        expected.check(MIB, &piece).unwrap_or_else(|wrong| panic!("{wrong}"));
        drop(file);
        mounted.unmount();
    });
}
