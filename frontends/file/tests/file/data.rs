//! Every byte where it belongs: reads, writes and mappings of any size and place, by several threads, in every mode.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use r3map_core::{Backend, Operation};
use r3map_file::{Caching, FileSettings};
use r3map_local::Null;
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::faults::{Call, Faults, Pause, Rule};
use r3map_testkit::random::Random;
use r3map_testkit::store::Store;
use r3map_testkit::{conformance, deadline, fill, model};

use crate::region::{Region, Way};
use crate::server::Server;
use crate::support::{World, content, filled, need_fuse, open, open_direct};

const MIB: u64 = 1 << 20;
const MODES: [Caching; 3] = [Caching::Keep, Caching::UntilOpened, Caching::Never];

fn settings(caching: Caching) -> FileSettings {
    FileSettings { caching, ..FileSettings::default() }
}

fn len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

#[test]
fn every_size_is_read_back_whole() {
    need_fuse!();
    let world = World::new();
    for size in [1, 4095, 4096, 4097, 65_537, MIB + 1, 3 * MIB + 4095] {
        let memory = filled(size, 1);
        let mount = world.mount(memory.clone(), FileSettings::default());
        let bytes = fs::read(mount.path()).unwrap();
        assert_eq!(bytes.len() as u64, size);
        fill::check(&bytes, 0, 1).unwrap();
        let file = open(mount.path());
        file.write_all_at(&fill::bytes(size - 1, 1, 2), size - 1).unwrap();
        let mapping = FileMapping::new(&file, bytes.len(), Sharing::Shared, true).unwrap();
        let mut last = [0];
        mapping.read(bytes.len() - 1, &mut last).unwrap();
        fill::check(&last, size - 1, 2).unwrap();
        drop((mapping, file));
        world.unmount(&mount);
        fill::check(&content(&memory)[bytes.len() - 1..], size - 1, 2).unwrap();
    }
}

fn conforms(way: Way, caching: Caching) {
    let world = World::new();
    let make = async || Region::new(300_001, way, caching) as Arc<dyn Backend>;
    world.runtime.block_on(conformance::backend(make));
}

#[test]
fn the_mounted_file_is_a_backend_itself() {
    need_fuse!();
    for caching in MODES {
        conforms(Way::Calls, caching);
    }
}

#[test]
fn so_is_a_shared_mapping_of_it() {
    need_fuse!();
    conforms(Way::Mapping, Caching::Keep);
    conforms(Way::Both, Caching::Keep);
}

fn follows_the_model(way: Way, caching: Caching) {
    let world = World::new();
    let make = async || Region::new(200_003, way, caching) as Arc<dyn Backend>;
    world.runtime.block_on(model::check(make, model::Settings { runs: 3, ..model::Settings::default() }));
}

#[test]
fn random_calls_follow_the_model() {
    need_fuse!();
    for caching in MODES {
        follows_the_model(Way::Calls, caching);
    }
}

#[test]
fn random_calls_and_accesses_to_a_mapping_follow_the_model() {
    need_fuse!();
    follows_the_model(Way::Mapping, Caching::Keep);
    follows_the_model(Way::Both, Caching::Keep);
    follows_the_model(Way::Both, Caching::UntilOpened);
}

/// One of the ways to write.
type Write<'a> = dyn Fn(u64, &[u8]) + Sync + 'a;

/// Four threads, each with its own quarter: two by calls, one by a mapping, one around the kernel's cache. What they
/// wrote is compared with what is stored after unmounting, without any `fsync`.
#[test]
fn threads_do_not_disturb_one_another() {
    need_fuse!();
    const QUARTER: u64 = 2 * MIB;
    let server = Server::start(4 * QUARTER + 1, Caching::Keep);
    let file = open(&server.path());
    let direct = open_direct(&server.path());
    let mapping = FileMapping::new(&file, len(4 * QUARTER), Sharing::Shared, true).unwrap();
    let by_calls = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    let by_mapping = |at: u64, bytes: &[u8]| mapping.write(len(at), bytes).unwrap();
    let around = |at: u64, bytes: &[u8]| direct.write_all_at(bytes, at).unwrap();
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let ways: [&Write<'_>; 4] = [&by_calls, &by_mapping, &around, &by_calls];
        let threads: Vec<_> =
            (0..).zip(ways).map(|(index, way)| scope.spawn(move || scribble(index, QUARTER, way))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    drop((mapping, file, direct));
    let stored = server.end();
    for (index, model) in models.iter().enumerate() {
        assert!(stored[index * model.len()..][..model.len()] == model[..], "quarter {index} differs");
    }
}

/// Writes at random places of one quarter, and returns what must be there then.
fn scribble(index: u64, quarter: u64, write: &Write<'_>) -> Vec<u8> {
    let mut random = Random::new(index);
    let mut model = vec![0; len(quarter)];
    for step in 1..200 {
        let at = random.below(quarter);
        let bytes = fill::bytes(at, len(1 + random.below(100_000).min(quarter - at - 1)), step);
        write(index * quarter + at, &bytes);
        model[len(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
    model
}

#[test]
fn a_private_mapping_keeps_its_writes_to_itself() {
    need_fuse!();
    let world = World::new();
    let memory = filled(MIB, 3);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    let private = FileMapping::new(&file, len(MIB), Sharing::Private, true).unwrap();
    private.write(5000, &[0xaa; 10_000]).unwrap();
    let mut seen = vec![0; 10_000];
    private.read(5000, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0xaa));
    file.read_exact_at(&mut seen, 5000).unwrap();
    fill::check(&seen, 5000, 3).unwrap();
    drop((private, file));
    world.unmount(&mount);
    fill::check(&content(&memory), 0, 3).unwrap();
}

#[test]
fn around_the_cache_any_offset_and_length_works() {
    need_fuse!();
    let world = World::new();
    let memory = filled(3 * MIB + 777, 4);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open_direct(mount.path());
    for (at, count) in [(0, 1), (511, 513), (4096, 65_536), (MIB - 1, MIB + 2), (3 * MIB, 777), (1, 3 * MIB)] {
        let mut seen = vec![0; len(count)];
        file.read_exact_at(&mut seen, at).unwrap();
        fill::check(&seen, at, 4).unwrap();
        file.write_all_at(&fill::bytes(at, len(count), 4), at).unwrap();
    }
    fill::check(&content(&memory), 0, 4).unwrap();
    let mut past = [0; 100];
    assert_eq!(file.read_at(&mut past, 3 * MIB + 777).unwrap(), 0);
    assert_eq!(file.read_at(&mut past, 3 * MIB + 770).unwrap(), 7);
}

/// Backends that lend in pieces, that lend nothing, that know only zeros: the answer is put together differently.
#[test]
fn it_does_not_matter_how_the_backend_gives_its_bytes() {
    need_fuse!();
    let world = World::new();
    let size = 2 * MIB + 5;
    let backends: [Arc<dyn Backend>; 2] = [filled(size, 5), Arc::new(Store::new(size).filled(5).plain())];
    for backend in backends {
        let mount = world.mount(backend, FileSettings::default());
        fill::check(&fs::read(mount.path()).unwrap(), 0, 5).unwrap();
        world.unmount(&mount);
    }
    let mount = world.mount(Arc::new(Null::new(size).unwrap()), FileSettings::default());
    assert!(fs::read(mount.path()).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn requests_as_long_as_the_kernel_likes() {
    need_fuse!();
    let world = World::new();
    for max_request in [4096, 16 << 20] {
        let memory = filled(5 * MIB + 3, 6);
        let mount = world.mount(memory.clone(), FileSettings { max_request, ..FileSettings::default() });
        fill::check(&fs::read(mount.path()).unwrap(), 0, 6).unwrap();
        let file = open_direct(mount.path());
        file.write_all_at(&fill::bytes(1, len(5 * MIB), 7), 1).unwrap();
        fill::check(&content(&memory)[1..=len(5 * MIB)], 1, 7).unwrap();
        drop(file);
        world.unmount(&mount);
    }
}

#[test]
fn long_reads_become_several_at_once() {
    need_fuse!();
    let world = World::new();
    let faults = Faults::new(Arc::new(Store::new(2 * MIB).filled(6)));
    let mount = world.mount(faults.clone(), FileSettings { max_read: 100_000, ..FileSettings::default() });
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let path = mount.path().to_owned();
    let reader = thread::spawn(move || {
        let mut seen = vec![0; len(MIB)];
        open_direct(&path).read_exact_at(&mut seen, 0).map(|()| seen)
    });
    // Whole pages, all of them under way before the first is answered.
    world.runtime.block_on(deadline(Duration::from_secs(20), "all are under way", pause.wait_held(11)));
    assert_eq!(faults.calls().iter().map(Call::len).max(), Some(98_304));
    pause.release();
    fill::check(&reader.join().unwrap().unwrap(), 0, 6).unwrap();
}

/// Where the kernel would ask for the second part only when it has the first.
#[test]
fn long_reads_past_the_cache_stay_whole() {
    need_fuse!();
    let world = World::new();
    let faults = Faults::new(Arc::new(Store::new(MIB).filled(6)));
    let settings = FileSettings { max_read: 100_000, ..settings(Caching::Never) };
    let mount = world.mount(faults.clone(), settings);
    let mut seen = vec![0; len(MIB / 2)];
    open(mount.path()).read_exact_at(&mut seen, 0).unwrap();
    fill::check(&seen, 0, 6).unwrap();
    assert_eq!(faults.calls().iter().map(Call::len).max(), Some(MIB / 2));
}

#[test]
fn requests_are_no_longer_than_the_backend_takes() {
    need_fuse!();
    let world = World::new();
    let size = 3 * MIB + 3;
    let store = Arc::new(Store::new(size).filled(6).max_request(10_000));
    let faults = Faults::new(store);
    let mount = world.mount(faults.clone(), FileSettings::default());
    fill::check(&fs::read(mount.path()).unwrap(), 0, 6).unwrap();
    let direct = open_direct(mount.path());
    let mut seen = vec![0; len(size)];
    direct.read_exact_at(&mut seen, 0).unwrap();
    fill::check(&seen, 0, 6).unwrap();
    direct.write_all_at(&seen[1..], 1).unwrap();
    open(mount.path()).write_all_at(&seen[5..], 5).unwrap();
    assert_eq!(faults.calls().iter().map(Call::len).max(), Some(8192));
}

/// The region changes other than through the file; the kernel has cached it in a file and in a mapping.
#[test]
fn a_change_underneath_is_seen_after_invalidation() {
    need_fuse!();
    let world = World::new();
    let memory = filled(MIB, 8);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    let mapping = FileMapping::new(&file, len(MIB), Sharing::Shared, true).unwrap();
    let mut seen = vec![0; len(MIB)];
    file.read_exact_at(&mut seen, 0).unwrap();
    mapping.read(0, &mut seen).unwrap();
    memory.write_now(100_000, &fill::bytes(100_000, 50_000, 9)).unwrap();
    file.read_exact_at(&mut seen, 0).unwrap();
    fill::check(&seen, 0, 8).expect("the kernel answers from its cache as long as it may");
    world.wait("invalidating", mount.invalidate(100_000..150_000)).unwrap();
    file.read_exact_at(&mut seen, 0).unwrap();
    fill::check(&seen[..100_000], 0, 8).unwrap();
    fill::check(&seen[100_000..150_000], 100_000, 9).unwrap();
    fill::check(&seen[150_000..], 150_000, 8).unwrap();
    mapping.read(100_000, &mut seen[..50_000]).unwrap();
    fill::check(&seen[..50_000], 100_000, 9).unwrap();
    assert!(world.wait("invalidating", mount.invalidate(MIB - 1..MIB + 1)).is_err());
    world.wait("invalidating", mount.invalidate(7..7)).unwrap();
}

#[test]
fn what_a_mapping_wrote_survives_an_invalidation() {
    need_fuse!();
    let world = World::new();
    let memory = filled(MIB, 8);
    let mount = world.mount(memory.clone(), FileSettings::default());
    let file = open(mount.path());
    let mapping = FileMapping::new(&file, len(MIB), Sharing::Shared, true).unwrap();
    mapping.write(8192, &fill::bytes(8192, 4096, 10)).unwrap();
    world.wait("invalidating", mount.invalidate(0..MIB)).unwrap();
    let mut seen = vec![0; 4096];
    mapping.read(8192, &mut seen).unwrap();
    fill::check(&seen, 8192, 10).unwrap();
    fill::check(&content(&memory)[8192..12_288], 8192, 10).unwrap();
}

/// What each mode of caching promises to an `open` after a change underneath.
#[test]
fn opening_again_sees_changes_unless_the_cache_is_kept() {
    need_fuse!();
    let world = World::new();
    for (caching, sees) in [(Caching::Keep, false), (Caching::UntilOpened, true), (Caching::Never, true)] {
        let memory = filled(MIB, 11);
        let mount = world.mount(memory.clone(), settings(caching));
        fill::check(&fs::read(mount.path()).unwrap(), 0, 11).unwrap();
        memory.write_now(0, &fill::bytes(0, len(MIB), 12)).unwrap();
        let seen = fs::read(mount.path()).unwrap();
        assert_eq!(fill::check(&seen, 0, 12).is_ok(), sees, "{caching:?}");
        world.unmount(&mount);
    }
}
