//! Block devices that are moved again and again while they are used: by an application that stamps blocks, and by one that
//! works on a file system.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use r3map::migration::{Arrived, Migration, Place};
use r3map::{BlockMount, BlockOptions, ErrorKind, Kind, Mount, Registry, Settings, Uri};
use r3map_testkit::random::Random;
use r3map_testkit::store::Store;
use r3map_testkit::{fill, in_vm};

use crate::moving::{Application, BLOCK, Front, Replay, Stamps, anywhere, blocking, move_again_and_again, settings};
use crate::run;

/// The last block is short.
const SIZE: usize = 700 * BLOCK - 1024;
/// What ext4 needs to have a journal.
const DISK: u64 = 32 << 20;

async fn migratable(size: u64, kind: Kind) -> BlockMount {
    let block = BlockOptions { kind: Some(kind), ..BlockOptions::default() };
    let mount = Mount::direct(Arc::new(Store::new(size))).migratable();
    mount.settings(Settings { block, ..Settings::default() }).block().await.unwrap()
}

/// Moves a stamped device from kind to kind.
async fn stamped(kinds: &'static [Kind], hops: u64) {
    if !in_vm() {
        return;
    }
    let (replay, mount) = (Replay::new(), migratable(SIZE as u64, kinds[0]).await);
    let device = mount.path().to_owned();
    let front = blocking(move || Front::device(&device)).await;
    let stamps = Stamps::new(front, SIZE, replay.0);
    let place = |hop, _: &mut Random| Place::block(Some(kinds[usize::try_from(hop).unwrap() % kinds.len()]));
    let moved = move_again_and_again(stamps, mount.source().unwrap(), &replay, hops, place).await;
    let last = moved.regions[0].block().expect("it is a device");
    assert!(kinds.contains(&last.kind()));
    drop(moved.application);
    last.close().await.unwrap();
    mount.abandon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ublk_device_is_moved_again_and_again_and_no_stamp_is_lost() {
    stamped(&[Kind::Ublk], 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nbd_device_is_moved_again_and_again_and_no_stamp_is_lost() {
    stamped(&[Kind::Nbd], 8).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_becomes_one_of_another_kind_with_each_move() {
    stamped(&[Kind::Loop, Kind::Ublk, Kind::Nbd], 6).await;
}

fn name(path: &Path) -> &str {
    path.to_str().expect("plain names")
}

/// A file system that is mounted. Dropping it thaws and unmounts it, also when its device has left.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount(device: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-t", "ext4", name(device), name(folder.path())]);
        Self(folder)
    }

    fn path(&self, file: usize) -> PathBuf {
        self.0.path().join(format!("file{file}"))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").args(["--unfreeze", name(self.0.path())]).status(); // it may not be frozen
        let unmounted = Command::new("umount").arg(self.0.path()).status().unwrap();
        assert!(unmounted.success() || std::thread::panicking(), "umount: {unmounted}");
    }
}

const FILES: usize = 20;

/// What a file has.
#[derive(Clone)]
struct Written {
    len: usize,
    version: u64,
    durable: bool,
}

/// Writes files anew, some of them durably.
struct Writer {
    disk: Disk,
    /// Whether the file system is frozen when it is suspended.
    freeze: bool,
    written: Vec<Option<Written>>,
    version: u64,
    random: Random,
}

impl Writer {
    fn new(disk: Disk, freeze: bool, seed: u64) -> Self {
        Self { disk, freeze, written: vec![None; FILES], version: 0, random: Random::new(seed) }
    }

    fn check_file(&self, file: usize) {
        let Some(Written { len, version, .. }) = self.written[file] else { return };
        let found = std::fs::read(self.disk.path(file)).unwrap();
        assert_eq!(found.len(), len, "file {file}");
        fill::check(&found, 0, version).unwrap();
    }
}

impl Application for Writer {
    type Left = Disk;

    fn step(&mut self) {
        let (file, len) = (self.random.below(FILES as u64), self.random.below(40_000));
        let (file, len) = (usize::try_from(file).unwrap(), usize::try_from(len).unwrap());
        self.check_file(file);
        self.version += 1;
        std::fs::write(self.disk.path(file), fill::bytes(0, len, self.version)).unwrap();
        let durable = self.random.chance(0.25);
        if durable {
            std::fs::File::open(self.disk.path(file)).unwrap().sync_all().unwrap();
        }
        self.written[file] = Some(Written { len, version: self.version, durable });
    }

    /// What the file system holds goes to the device, or what was not made durable may be lost.
    fn suspend(&mut self) {
        match self.freeze {
            true => run("fsfreeze", &["--freeze", name(self.disk.0.path())]),
            false => {
                let is_durable = |written: &Written| written.durable;
                self.written.iter_mut().for_each(|file| *file = file.take().filter(is_durable));
            }
        }
    }

    fn resume(&mut self, here: &Arrived) -> Disk {
        std::mem::replace(&mut self.disk, Disk::mount(here.block().expect("it is a device").path()))
    }

    fn check(&self) {
        (0..FILES).for_each(|file| self.check_file(file));
    }
}

async fn with_a_file_system(kind: Kind, freeze: bool) {
    if !in_vm() {
        return;
    }
    let (replay, mount) = (Replay::new(), migratable(DISK, kind).await);
    let (device, seed) = (mount.path().to_owned(), replay.0);
    let writer = blocking(move || {
        run("mkfs.ext4", &["-q", "-F", name(&device)]);
        Writer::new(Disk::mount(&device), freeze, seed)
    });
    let place = |_, _: &mut Random| Place::block(Some(kind));
    let moved = move_again_and_again(writer.await, mount.source().unwrap(), &replay, 4, place).await;
    let last = moved.regions[0].block().expect("it is a device");
    let (device, application) = (last.path().to_owned(), moved.application);
    blocking(move || {
        drop(application);
        run("e2fsck", &["-fn", name(&device)]);
    })
    .await;
    last.close().await.unwrap();
    mount.abandon().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_on_ublk_is_moved_while_it_is_written() {
    with_a_file_system(Kind::Ublk, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_on_nbd_is_moved_while_it_is_written() {
    with_a_file_system(Kind::Nbd, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_is_not_frozen_has_what_was_durable() {
    with_a_file_system(Kind::Ublk, false).await;
}

/// A partition table with one partition, in the form of the DOS.
fn partition_table() -> [u8; 512] {
    let (mut table, first, sectors) = ([0; 512], 8u32, 800u32);
    table[450] = 0x83;
    table[454..458].copy_from_slice(&first.to_le_bytes());
    table[458..462].copy_from_slice(&sectors.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    table
}

/// It looks for them when the device appears, before anything may be written.
#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_finds_the_partitions_of_a_device_that_arrives() {
    if !in_vm() {
        return;
    }
    let mount = migratable(SIZE as u64, Kind::Ublk).await;
    let file = mount.file().await.unwrap();
    blocking(move || file.write_all_at(&partition_table(), 0).unwrap()).await;
    let sources = vec![("disk".into(), mount.source().unwrap())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), sources).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let places = vec![Place::block(Some(Kind::Ublk))];
    let leeching = Migration::new().settings(settings()).leech(&Registry::standard(), &uri, places).await;
    let running = leeching.unwrap().finalize().await.unwrap();
    let here = running.regions()[0].block().unwrap();
    assert!(Path::new(&format!("{}p1", name(here.path()))).exists(), "there is no partition");
    running.pulled().await.unwrap();
    here.close().await.unwrap();
    mount.abandon().await;
}

/// The old device takes nothing more, and what cannot be a device is refused while the application still runs there.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_has_left_cannot_be_written() {
    if !in_vm() {
        return;
    }
    let mount = migratable(SIZE as u64, Kind::Ublk).await;
    let sources = vec![("disk".into(), mount.source().unwrap())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), sources).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let leech =
        async |place| Migration::new().settings(settings()).leech(&Registry::standard(), &uri, vec![place]).await;
    let block = BlockOptions { logical_block_size: Some(4096), ..BlockOptions::default() };
    let wrong = Place::block(None).settings(Settings { block, ..Settings::default() });
    let refused = leech(wrong).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");

    let running = leech(Place::block(None)).await.unwrap().finalize().await.unwrap();
    assert_eq!(running.regions()[0].block().unwrap().kind(), Kind::Ublk, "the best that works");
    let device = mount.path().to_owned();
    let error = blocking(move || {
        let Front::Device { cached, .. } = Front::device(&device) else { unreachable!("it is a device") };
        cached.write_all_at(&[1; BLOCK], 0).and_then(|()| cached.sync_all())
    });
    assert!(error.await.is_err(), "the old side is fenced");
    running.pulled().await.unwrap();
    running.regions()[0].block().unwrap().close().await.unwrap();
    mount.abandon().await;
}
