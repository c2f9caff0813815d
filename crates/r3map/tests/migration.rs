//! Migrations of real memory and real files, over real gRPC: an application that stamps blocks is moved again and again
//! while it runs, and every block holds its last stamp wherever the application finds itself.

mod moving;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use moving::{BLOCK, Front, Replay, Stamps, anywhere, blocking, move_again_and_again, settings};
use r3map::migration::{FileLedger, Ledger, Migration, MigrationId, Place, Seeding, Standing, Unsettled};
use r3map::{Backend, Cache, ErrorKind, Mount, OpenOptions as RegionOptions, PathMount, Registry, SliceMount, Uri};
use r3map_testkit::fill;
use r3map_testkit::store::Store;

/// The last block is short.
const SIZE: usize = 700 * BLOCK - 1000;
/// How often an application is moved.
const HOPS: u64 = 150;

fn empty() -> Arc<dyn Backend> {
    Arc::new(Store::new(SIZE as u64))
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_moved_again_and_again_and_no_stamp_is_lost() {
    let replay = Replay::new();
    let mount = Mount::managed(empty()).slice().await.unwrap();
    let source = mount.source();
    let stamps = Stamps::new(Front::Slice(mount), SIZE, replay.0);
    move_again_and_again(stamps, source, &replay, HOPS, |_, _| Place::slice()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_moved_again_and_again_and_no_stamp_is_lost() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let (replay, folder) = (Replay::new(), tempfile::tempdir().unwrap());
    let path = folder.path().join("first");
    let mount = Mount::direct(empty()).migratable().path(&path).await.unwrap();
    let front = blocking(move || Front::file(&path)).await;
    let stamps = Stamps::new(front, SIZE, replay.0);
    let moved = move_again_and_again(stamps, mount.source().unwrap(), &replay, HOPS, |hop, random| {
        let place = Place::path(folder.path().join(format!("hop-{hop}")));
        match random.chance(0.5) {
            true => place,
            false => place.cache(Cache::File(folder.path().join(format!("cache-{hop}")))),
        }
    });
    let moved = moved.await;
    drop(moved.application);
    moved.regions[0].path().expect("it is on a path").close().await.unwrap();
    mount.abandon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mapping_wrote_is_moved_though_the_kernel_held_it() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("region");
    let mount = Mount::direct(Arc::new(Store::new(SIZE as u64).filled(1)) as Arc<dyn Backend>);
    let mount = mount.migratable().path(&path).await.unwrap();
    let regions = vec![("disk".into(), mount.source().unwrap())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let places = vec![Place::path(folder.path().join("there"))];
    let leecher = Migration::new().settings(settings()).leech(&Registry::standard(), &uri, places).await.unwrap();
    leecher.ready().await.unwrap();
    // Another process, because one must not map shared what it serves itself.
    let script =
        "import mmap,sys\nf=open(sys.argv[1],'r+b')\nm=mmap.mmap(f.fileno(),0)\nm[123456:123459]=b'abc'\nm.close()";
    let file = path.clone();
    let wrote = blocking(move || std::process::Command::new("python3").args(["-c", script]).arg(file).status()).await;
    assert!(wrote.unwrap().success());
    let running = leecher.finalize().await.unwrap();
    let there = running.regions()[0].path().unwrap().path().to_owned();
    let read = blocking(move || {
        let mut bytes = vec![0; SIZE];
        File::open(there).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    })
    .await;
    let mut expected = fill::bytes(0, SIZE, 1);
    expected[123_456..123_459].copy_from_slice(b"abc");
    assert!(read == expected);
    let refused = blocking(move || OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"x", 0)).await;
    assert!(refused.is_err(), "the old side is fenced");
    running.pulled().await.unwrap();
    running.regions()[0].path().unwrap().close().await.unwrap();
    mount.abandon().await;
}

/// Offers memory, and a file on the path `disk` in a folder, as one.
async fn seed_both(folder: &Path) -> (SliceMount, PathMount, Seeding) {
    let memory = Mount::managed(empty()).slice().await.unwrap();
    let disk = Mount::direct(empty()).migratable().path(folder.join("disk")).await.unwrap();
    let regions = vec![("memory".into(), memory.source()), ("disk".into(), disk.source().unwrap())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    (memory, disk, seeding)
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_a_disk_are_moved_as_one() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let (mut memory, disk, seeding) = seed_both(folder.path()).await;
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let places = vec![Place::slice(), Place::path(folder.path().join("there"))];
    let leecher = Migration::new().settings(settings()).leech(&Registry::standard(), &uri, places).await.unwrap();
    leecher.ready().await.unwrap();
    memory.as_mut_slice().unwrap()[9 * BLOCK] = 7;
    let file = folder.path().join("disk");
    blocking(move || OpenOptions::new().write(true).open(file).unwrap().write_all_at(&[8], 5).unwrap()).await;
    let running = leecher.finalize().await.unwrap();
    let names: Vec<_> = running.regions().iter().map(|region| region.name().to_owned()).collect();
    assert_eq!(names, ["memory", "disk"]);
    let there = running.regions()[0].take_slice().unwrap();
    let file = folder.path().join("there");
    let found = blocking(move || {
        let mut byte = [0];
        File::open(file).unwrap().read_exact_at(&mut byte, 5).unwrap();
        (there.as_slice()[9 * BLOCK], byte[0])
    })
    .await;
    assert_eq!(found, (7, 8));
    disk.abandon().await;
    running.regions()[1].path().unwrap().abandon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_knows_the_secret_gets_the_region() {
    let mount = Mount::managed(empty()).slice().await.unwrap();
    let regions = vec![("memory".into(), mount.source())];
    let seeding =
        Migration::new().secret("open sesame").seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    for wrong in [Migration::new(), Migration::new().secret("open")] {
        let error = wrong.leech(&Registry::standard(), &uri, vec![Place::slice()]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    let read = Registry::standard().open(&uri, &RegionOptions::default()).await;
    assert_eq!(read.err().map(|error| error.kind()), Some(ErrorKind::Denied), "reading it is refused too");
    let right = Migration::new().secret("open sesame").settings(settings());
    let leecher = right.leech(&Registry::standard(), &uri, vec![Place::slice()]).await.unwrap();
    leecher.finalize().await.unwrap().pulled().await.unwrap();
}

/// Stores a number that grows into the blocks of `memory`, one after another, until a store is refused: how many were not.
/// A system call makes them, which gets an error where a store of the program itself would be a signal.
fn store_until_refused(memory: &mut [u8], numbers: &File, stored: &AtomicU64) -> u64 {
    let blocks = memory.len() / BLOCK;
    for number in 1u64.. {
        let block = usize::try_from(number).unwrap() % blocks;
        let place = &mut memory[block * BLOCK..block * BLOCK + 8];
        numbers.write_all_at(&number.to_le_bytes(), 0).unwrap();
        if numbers.read_exact_at(place, 0).is_err() {
            return number - 1;
        }
        stored.store(number, Ordering::SeqCst);
    }
    unreachable!("there is always a next number")
}

/// Much memory, so that it takes a while to protect it.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_told_to_stop_is_refused_and_loses_no_store() {
    let size = 128 << 20;
    let mut mount = Mount::managed(Arc::new(Store::new(size as u64)) as Arc<dyn Backend>).slice().await.unwrap();
    let regions = vec![("memory".into(), mount.source())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let stored = Arc::new(AtomicU64::new(0));
    let counter = stored.clone();
    let writer = std::thread::spawn(move || {
        let numbers = tempfile::tempfile().unwrap();
        let memory = mount.as_mut_slice().unwrap();
        memory.chunks_mut(BLOCK).for_each(|block| block.fill(0xff));
        let last = store_until_refused(memory, &numbers, &counter);
        (last, mount)
    });
    let begun = stored.clone();
    blocking(move || {
        while begun.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now()
        }
    })
    .await;
    let (registry, migration) = (Registry::standard(), Migration::new().settings(settings()));
    let leecher = migration.leech(&registry, &uri, vec![Place::slice()]).await.unwrap();
    leecher.ready().await.unwrap();
    let running = leecher.finalize().await.unwrap();
    let (last, _mount) = blocking(move || writer.join().unwrap()).await;
    let there = running.regions()[0].take_slice().unwrap();
    let blocks = (size / BLOCK) as u64;
    blocking(move || {
        for number in last.saturating_sub(blocks - 1).max(1)..=last {
            let at = usize::try_from(number % blocks).unwrap() * BLOCK;
            assert_eq!(there.as_slice()[at..at + 8], number.to_le_bytes(), "store {number} of {last}");
        }
    })
    .await;
}

/// The devices of all mounts of this machine, also of those that are on no path.
fn devices() -> Vec<String> {
    let listed = std::fs::read_dir("/sys/class/bdi").unwrap();
    listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_region_is_here_there_is_nothing_on_its_path_that_could_be_opened() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let (absent, present) = (folder.path().join("absent"), folder.path().join("present"));
    std::fs::write(&present, "").unwrap();
    let is_bare = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounted = table.contains(folder.path().file_name().unwrap().to_str().unwrap());
        !mounted && !absent.exists() && std::fs::metadata(&present).unwrap().len() == 0
    };
    let mut mount = Mount::managed(empty()).slice().await.unwrap();
    for path in [&absent, &present] {
        let regions = vec![("memory".into(), mount.source())];
        let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
        let uri: Uri = seeding.uris()[0].parse().unwrap();
        let leech = async || {
            let (registry, places) = (Registry::standard(), vec![Place::path(path)]);
            let leecher = Migration::new().settings(settings()).leech(&registry, &uri, places).await.unwrap();
            leecher.ready().await.unwrap();
            assert!(is_bare(), "everything has been copied");
            leecher
        };
        leech().await.abort().await.unwrap();
        assert!(is_bare(), "it was given up");
        drop(leech().await);
        assert!(is_bare(), "it was dropped");

        mount.as_mut_slice().unwrap()[5] = 7;
        let (leecher, before) = (leech().await, devices());
        let running = leecher.finalize().await.unwrap();
        let file = path.clone();
        let (first, device) = blocking(move || {
            let (mut bytes, facts) = ([0; 6], std::fs::metadata(&file).unwrap());
            File::open(file).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            (bytes, facts.dev())
        })
        .await;
        assert_eq!(first, [0, 0, 0, 0, 0, 7]);
        let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let in_advance = before.contains(&device);
        assert!(in_advance || !rustix::process::geteuid().is_root(), "it was not mounted while everything waited");
        running.pulled().await.unwrap();
        running.regions()[0].path().unwrap().close().await.unwrap();
        assert!(is_bare());
        mount = Mount::managed(empty()).slice().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_shown_gives_the_region_back() {
    let (folder, mut mount) = (tempfile::tempdir().unwrap(), Mount::managed(empty()).slice().await.unwrap());
    let regions = vec![("memory".into(), mount.source())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let place = |name: &str| vec![Place::path(folder.path().join(name))];
    let wrong = Migration::new().leech(&Registry::standard(), &uri, place("no/such/folder/region")).await.unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::NotFound, "it is known before anything is copied: {wrong}");
    let leecher =
        Migration::new().settings(settings()).leech(&Registry::standard(), &uri, place("region")).await.unwrap();
    leecher.ready().await.unwrap();
    std::fs::write(folder.path().join("region"), "somebody else was faster").unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(matches!(left.then, Unsettled::Returned), "{left}");
    assert!(seeding.seeder().owns());
    mount.as_mut_slice().unwrap()[0] = 1;
    assert_eq!(mount.as_slice()[0], 1, "it can be written as before");
}

/// Of several regions that move as one, none stays where another one cannot be shown.
#[tokio::test(flavor = "multi_thread")]
async fn where_one_of_two_cannot_be_shown_both_go_back() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let (mut memory, disk, seeding) = seed_both(folder.path()).await;
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let leech = async || {
        let (migration, places) =
            (Migration::new().settings(settings()), vec![Place::path(&first), Place::path(&second)]);
        let leecher = migration.leech(&Registry::standard(), &uri, places).await.unwrap();
        leecher.ready().await.unwrap();
        leecher
    };
    let leecher = leech().await;
    std::fs::write(&second, "somebody else was faster").unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(matches!(left.then, Unsettled::Returned), "{left}");
    assert!(seeding.seeder().owns() && !first.exists(), "nothing of it is left");
    memory.as_mut_slice().unwrap()[0] = 1;
    let file = folder.path().join("disk");
    blocking(move || OpenOptions::new().write(true).open(file).unwrap().write_all_at(&[2], 5).unwrap()).await;

    std::fs::remove_file(&second).unwrap();
    let running = leech().await.finalize().await.unwrap();
    let (memory, file) = (first.clone(), second.clone());
    let found = blocking(move || {
        let (mut one, mut two) = ([0], [0]);
        File::open(memory).unwrap().read_exact_at(&mut one, 0).unwrap();
        File::open(file).unwrap().read_exact_at(&mut two, 5).unwrap();
        (one, two)
    });
    assert_eq!(found.await, ([1], [2]));
    running.pulled().await.unwrap();
    for region in running.regions() {
        region.path().unwrap().close().await.unwrap();
    }
    disk.abandon().await;
}

#[tokio::test]
async fn what_a_ledger_speaks_of_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let ledger = FileLedger::new(folder.path().join("ledger"));
    let nobody: Uri = "grpc://127.0.0.1:1".parse().unwrap();
    let id = MigrationId([1; 16]);
    let leech = async || {
        let migration = Migration::new().ledger(folder.path().join("ledger"));
        migration.leech(&Registry::standard(), &nobody, vec![Place::slice()]).await.unwrap_err().kind()
    };
    for standing in [
        Standing::Owner { epoch: 1, revoked: None },
        Standing::HandedOver { id, epoch: 2, dirty: Vec::new() },
        Standing::Asking { id, rounds: 1 },
        Standing::Arrived { id, epoch: 2 },
    ] {
        ledger.save(&standing).unwrap();
        assert_eq!(leech().await, ErrorKind::Conflict, "{standing:?}");
    }
    ledger.save(&Standing::Gone { id, epoch: 2 }).unwrap();
    assert_ne!(leech().await, ErrorKind::Conflict, "what has gone is nobody's loss");
}
