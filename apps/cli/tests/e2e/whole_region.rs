//! The main job: a region in one process, used in another, byte for byte. Through the file, through a mapping of the
//! file, and (in `slices.rs`) through memory.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::random::Random;

use crate::support::{Expected, MIB, Mounted, Scene, make_file};

/// No multiple of anything.
pub(crate) const GIB_AND_A_BYTE: u64 = (1 << 30) + 1;
/// For what is slow or done often.
pub(crate) const SMALL: u64 = 40 * MIB + 1;
/// The simulated round trip.
pub(crate) const RTT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(240);
const WRITES: usize = 150;

#[test]
fn a_gib_and_a_byte_through_read() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        through_read(&mounted, &mut expected, scene);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
        server.stop();
    });
}

#[test]
fn a_gib_and_a_byte_through_mmap() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, 2);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        through_mmap(&mounted, &mut expected, scene);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn over_a_unix_socket() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 3);
        let listen = format!("grpc+unix://{}", scene.name("socket"));
        let server = scene.serve_at(&format!("file:{}", scene.name("source")), &listen, &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        through_read(&mounted, &mut expected, scene);
        mounted.unmount();
        server.stop();
        assert!(!scene.path("socket").exists(), "the server takes its socket away");
    });
}

#[test]
fn a_gib_and_a_byte_through_read_over_a_round_trip_of_20_ms() {
    over_a_round_trip_of_20_ms(4, through_read);
}

#[test]
fn a_gib_and_a_byte_through_mmap_over_a_round_trip_of_20_ms() {
    over_a_round_trip_of_20_ms(11, through_mmap);
}

fn over_a_round_trip_of_20_ms(seed: u64, through: fn(&Mounted, &mut Expected, &Scene)) {
    Scene::with_fuse(LONG, move |scene| {
        let mut expected = make_file(&scene.path("source"), GIB_AND_A_BYTE, seed);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let proxy = DelayProxy::tcp(server.address(), RTT).expect("it can listen");
        let mounted = scene.mount(&format!("grpc://{}", proxy.socket_addr()), "region", &[]);
        through(&mounted, &mut expected, scene);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}

#[test]
fn directly() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 5);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &["--mode", "direct"]);
        through_read(&mounted, &mut expected, scene);
        through_mmap(&mounted, &mut expected, scene);
        mounted.unmount();
    });
}

#[test]
fn directly_over_a_round_trip_of_20_ms() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SMALL / 5, 6);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let proxy = DelayProxy::tcp(server.address(), RTT).expect("it can listen");
        let uri = format!("grpc://{}", proxy.socket_addr());
        let mounted = scene.mount(&uri, "region", &["--mode", "direct"]);
        through_read(&mounted, &mut expected, scene);
        mounted.unmount();
        let mounted = scene.mount(&uri, "region", &["--mode", "direct"]);
        through_mmap(&mounted, &mut expected, scene);
        mounted.unmount();
    });
}

#[test]
fn regions_of_awkward_sizes() {
    Scene::with_fuse(LONG, |scene| {
        for (number, size) in [1, 4095, 4096, 4097, 65_536, 65_537, 1_000_003].into_iter().enumerate() {
            let source = scene.path(&format!("source{number}"));
            let mut expected = make_file(&source, size, 7);
            let server = scene.serve(&format!("file:{}", source.display()), &[]);
            for mode in ["managed", "direct"] {
                let mounted = scene.mount(&server.uri, "region", &["--mode", mode]);
                assert_eq!(std::fs::read(&mounted.path).expect("it can be read").len() as u64, size);
                expected.check_file(&mounted.path);
                let file = mounted.open();
                let bytes = expected.write(size - 1..size, 8);
                file.write_all_at(&bytes, size - 1).expect("the last byte can be written");
                assert!(file.write_all_at(&[1], size).is_err(), "a region does not grow");
                drop(file);
                mounted.unmount();
                expected.keep();
                expected.check_file(&source);
            }
        }
    });
}

/// A region in chunks on disk, served as such: every layer cuts it in another way.
#[test]
fn a_directory_of_chunks() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), SMALL, 9);
        let chunks = format!("directory:{}?size={SMALL}&chunk=128KiB", scene.name("chunks"));
        let copied = scene.ended(&["copy", &format!("file:{}", scene.name("source")), &chunks]);
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let server = scene.serve(&chunks, &[]);
        let mounted = scene.mount(&server.uri, "region", &["--chunk-size", "32KiB"]);
        through_read_without_source(&mounted, &mut expected);
        mounted.unmount();
        server.stop();
        let back = scene.ended(&["copy", &chunks, &format!("file:{}", scene.name("back"))]);
        assert_eq!(back.code, Some(0), "{back:?}");
        expected.check_file(&scene.path("back"));
    });
}

/// Reads all of it, writes here and there, syncs, and compares at the source while it is still mounted.
pub(crate) fn through_read(mounted: &Mounted, expected: &mut Expected, scene: &Scene) {
    through_read_without_source(mounted, expected);
    scene.step("compare at the source");
    expected.check_file(&scene.path("source"));
}

fn through_read_without_source(mounted: &Mounted, expected: &mut Expected) {
    expected.check_file(&mounted.path);
    let file = mounted.open();
    let mut random = Random::new(expected.size());
    expected.write_randomly(WRITES, &mut random, |offset, bytes| file.write_all_at(bytes, offset));
    file.sync_all().expect("it can be synced");
    expected.keep();
    let mut end = [0; 2];
    assert_eq!(file.read_at(&mut end, expected.size() - 1).expect("the end can be read"), 1);
    assert_eq!((&file).take(1).read(&mut end).expect("the start can be read"), 1);
    expected.check_file(&mounted.path);
}

/// The same through a shared mapping.
pub(crate) fn through_mmap(mounted: &Mounted, expected: &mut Expected, scene: &Scene) {
    let file = mounted.open();
    let len = usize::try_from(expected.size()).expect("it can be mapped");
    let mapping = FileMapping::new(&file, len, Sharing::Shared, true).expect("it can be mapped");
    let read = |offset: u64, buf: &mut [u8]| mapping.read(offset.try_into().expect("it fits"), buf);
    expected.check_all(read);
    let mut random = Random::new(expected.size() + 1);
    expected
        .write_randomly(WRITES, &mut random, |offset, bytes| mapping.write(offset.try_into().expect("it fits"), bytes));
    mapping.sync().expect("it can be synced");
    expected.keep();
    expected.check_all(read);
    scene.step("compare at the source");
    expected.check_file(&scene.path("source"));
}

/// What a private mapping writes stays its own.
#[test]
fn a_private_mapping_changes_nothing() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), MIB, 10);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        let len = usize::try_from(MIB).expect("it fits");
        let mapping = FileMapping::new(&mounted.open(), len, Sharing::Private, true).expect("it can be mapped");
        mapping.write(5000, &[0; 3000]).expect("its own copy can be written");
        let mut own = [1; 3000];
        mapping.read(5000, &mut own).expect("and read");
        assert_eq!(own, [0; 3000]);
        expected.check_file(&mounted.path);
        drop(mapping);
        mounted.unmount();
        expected.check_file(&scene.path("source"));
    });
}
