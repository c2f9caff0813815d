//! The cache file: against the contract, with everything that it must refuse, and after `kill -9`.

mod common;

use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{SmallDisk, assert_says, fresh, scratch};
use r3map_core::{BLOCK_SIZE, Backend, ChunkSize, Error, ErrorKind, Geometry, MAX_REGION_SIZE};
use r3map_local::CacheFile;
use r3map_pipeline::{Local, Recorded, StateRecord};
use r3map_testkit::{conformance, crash, fill, model, skip};
use tempfile::TempDir;

fn geometry(size: u64) -> Geometry {
    Geometry::new(size, ChunkSize::DEFAULT).unwrap()
}

fn open(path: &Path, size: u64) -> Result<CacheFile, Error> {
    CacheFile::open(path, "grpc://host:1337", geometry(size))
}

fn runs(cache: &CacheFile) -> Vec<(Range<u64>, Recorded)> {
    let mut found = Vec::new();
    cache.load(&mut |blocks, state| found.push((blocks, state))).unwrap();
    found
}

#[tokio::test]
async fn keeps_the_contract() {
    let dir = scratch();
    for size in [1, 300_001] {
        conformance::backend(async || Arc::new(open(&fresh(&dir), size).unwrap()) as _).await;
    }
    let make = async || Arc::new(open(&fresh(&dir), 300_001).unwrap()) as _;
    model::check(make, model::Settings { runs: 4, ..model::Settings::default() }).await;
    let path = fresh(&dir);
    conformance::durable(async || Arc::new(open(&path, 300_001).unwrap()) as _).await;
}

#[tokio::test]
async fn remembers_bytes_and_states() {
    let dir = scratch();
    let path = fresh(&dir);
    let size = 300_001;
    let cache = open(&path, size).unwrap();
    assert_eq!(runs(&cache), []);
    cache.install(65536, &fill::bytes(65536, 131_072, 1)).await.unwrap();
    cache.record(16..48, Recorded::Clean).unwrap();
    cache.record(20..21, Recorded::Dirty).unwrap();
    cache.write_at(20 * BLOCK_SIZE, &fill::bytes(20 * BLOCK_SIZE, 4096, 2)).await.unwrap();
    cache.record(73..74, Recorded::Dirty).unwrap();
    let expected =
        [(16..20, Recorded::Clean), (20..21, Recorded::Dirty), (21..48, Recorded::Clean), (73..74, Recorded::Dirty)];
    assert_eq!(runs(&cache), expected);
    drop(cache);
    let cache = open(&path, size).unwrap();
    assert_eq!(runs(&cache), expected);
    cache.record(20..21, Recorded::Clean).unwrap();
    cache.checkpoint().await.unwrap();
    drop(cache);
    let cache = open(&path, size).unwrap();
    assert_eq!(runs(&cache)[0], (16..48, Recorded::Clean));
    let mut buf = vec![0; 4096];
    cache.read_at(20 * BLOCK_SIZE, &mut buf).await.unwrap();
    assert_eq!(fill::check(&buf, 20 * BLOCK_SIZE, 2), Ok(()));
}

#[tokio::test]
async fn what_is_forgotten_is_absent_and_can_be_put_in_place_anew() {
    let dir = scratch();
    let (path, size) = (fresh(&dir), 300_001);
    let cache = open(&path, size).unwrap();
    cache.record(0..74, Recorded::Clean).unwrap();
    cache.forget(3..5).unwrap();
    cache.forget(60..74).unwrap();
    cache.forget(60..60).unwrap();
    let expected = [(0..3, Recorded::Clean), (5..60, Recorded::Clean)];
    assert_eq!(runs(&cache), expected);
    drop(cache);
    let cache = open(&path, size).unwrap();
    assert_eq!(runs(&cache), expected);
    cache.record(4..5, Recorded::Dirty).unwrap();
    cache.forget(4..5).unwrap();
    cache.record(3..5, Recorded::Clean).unwrap();
    assert_eq!(runs(&cache), [(0..60, Recorded::Clean)], "nothing is left of what it was");
}

#[tokio::test]
async fn a_terabyte_opens_without_taking_room_and_zeros_take_none() {
    let dir = scratch();
    let path = fresh(&dir);
    let cache = open(&path, 1 << 40).unwrap();
    cache.install(1 << 39, &vec![0; 1 << 20]).await.unwrap();
    let last = (1 << 40) / BLOCK_SIZE - 1;
    cache.record(last..last + 1, Recorded::Dirty).unwrap();
    cache.checkpoint().await.unwrap();
    assert_eq!(runs(&cache), [(last..last + 1, Recorded::Dirty)]);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o077, 0, "what is cached is nobody else's");
    // A whole terabyte that is present is one run.
    cache.record(0..last + 1, Recorded::Clean).unwrap();
    drop(cache);
    assert_eq!(runs(&open(&path, 1 << 40).unwrap()), [(0..last + 1, Recorded::Clean)]);
}

#[tokio::test]
async fn what_was_installed_before_is_replaced_by_zeros() {
    let dir = scratch();
    let cache = open(&fresh(&dir), 100_000).unwrap();
    cache.install(0, &fill::bytes(0, 100_000, 1)).await.unwrap();
    cache.install(4096, &[0; 8192]).await.unwrap();
    let mut buf = vec![1; 8192];
    cache.read_at(4096, &mut buf).await.unwrap();
    assert!(r3map_core::is_zero(&buf));
    assert!(cache.install(99_999, &[0; 2]).await.is_err());
}

#[test]
fn another_region_size_chunk_or_format_is_refused_and_left_alone() {
    let dir = scratch();
    let path = fresh(&dir);
    drop(open(&path, 300_001).unwrap());
    let before = fs::read(&path).unwrap();
    let chunk = |bytes| Geometry::new(300_001, ChunkSize::new(bytes).unwrap()).unwrap();
    let other = |identity, geometry| CacheFile::open(&path, identity, geometry);
    let (host, invalid) = ("grpc://host:1337", ErrorKind::InvalidInput);
    assert_says(
        other("grpc://host:1338", geometry(300_001)),
        ErrorKind::Conflict,
        "is the cache of \"grpc://host:1337\"",
    );
    let mounted = "grpc://host:1337 66696c65";
    drop(CacheFile::open(dir.path().join("mounted"), mounted, geometry(300_001)).unwrap());
    assert_says(
        CacheFile::open(dir.path().join("mounted"), "grpc://host:1337 66696c66", geometry(300_001)),
        ErrorKind::Conflict,
        "another region that was at \"grpc://host:1337\"; give another file",
    );
    assert_says(other(host, geometry(300_000)), invalid, "is the cache of a region of 300001 bytes, not 300000");
    assert_says(other(host, chunk(4096)), invalid, "was made for chunks of 64KiB, not 4KiB");
    assert_says(other(&"x".repeat(5000), geometry(300_001)), invalid, "cannot hold an identity");
    assert_eq!(fs::read(&path).unwrap(), before);

    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[2], 8).unwrap();
    assert_says(open(&path, 300_001), invalid, "is a cache file of format 2; this version knows format 1 only");
    file.write_all_at(&[1], 8).unwrap();
    file.write_all_at(&[9], 600).unwrap();
    assert_says(open(&path, 300_001), ErrorKind::Corrupt, "has a damaged header");
    file.write_all_at(&[0], 600).unwrap();
    file.set_len(before.len() as u64 - 1).unwrap();
    assert_says(open(&path, 300_001), ErrorKind::Corrupt, "was truncated or extended");
    file.set_len(before.len() as u64).unwrap();
    open(&path, 300_001).unwrap();
}

#[test]
fn other_peoples_files_are_never_overwritten() {
    let dir = scratch();
    let path = fresh(&dir);
    for foreign in [&b"x"[..], &[0; 4095], &[0; 4096], &[0; 1 << 20], "SQLite format 3\0".repeat(1000).as_bytes()] {
        fs::write(&path, foreign).unwrap();
        assert_says(open(&path, 300_001), ErrorKind::InvalidInput, "is not a cache file, and is left as it is");
        assert_eq!(fs::read(&path).unwrap(), foreign);
    }
    assert_says(open(dir.path(), 300_001), ErrorKind::InvalidInput, "");
    assert_says(open(&dir.path().join("no/such"), 300_001), ErrorKind::NotFound, "cannot create");
}

#[test]
fn one_that_is_in_use_is_refused() {
    let dir = scratch();
    let path = fresh(&dir);
    let cache = open(&path, 5).unwrap();
    assert_says(open(&path, 5), ErrorKind::Conflict, "is in use by someone else");
    drop(cache);
    open(&path, 5).unwrap();
}

#[test]
fn what_cannot_be_made_leaves_something_that_can_be_made_later() {
    let dir = TempDir::new().unwrap();
    let path = fresh(&dir);
    match open(&path, MAX_REGION_SIZE) {
        Ok(_) => return r3map_testkit::skip_allowed("this file system takes files of 1 EiB"),
        Err(error) => assert_says::<()>(Err(error), ErrorKind::Exhausted, "cannot hold a cache of"),
    }
    // It is there, and known to be unfinished; so is an empty one.
    assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
    drop(CacheFile::open(&path, "another", geometry(5)).unwrap());
    fs::write(&path, "").unwrap();
    drop(CacheFile::open(&path, "yet another", geometry(6)).unwrap());
}

#[tokio::test]
async fn a_file_that_was_cut_gives_errors_never_zeros() {
    let dir = scratch();
    let path = fresh(&dir);
    let cache = open(&path, 300_001).unwrap();
    cache.install(0, &fill::bytes(0, 300_001, 1)).await.unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 200_000).unwrap();
    let mut buf = vec![0; 4096];
    assert_says(cache.read_at(200_000, &mut buf).await, ErrorKind::Corrupt, "it was truncated");
    assert_says(cache.write_at(200_000, &buf).await, ErrorKind::Corrupt, "it was truncated");
    assert_says(cache.install(0, &buf).await, ErrorKind::Corrupt, "it was truncated");
    assert_says(cache.flush().await, ErrorKind::Corrupt, "it was truncated");
    file.set_len(4096).unwrap();
    assert_says(cache.record(0..5, Recorded::Clean), ErrorKind::Corrupt, "it was truncated");
}

#[tokio::test]
async fn a_full_disk_is_exhausted_and_room_heals_it() {
    let Some(disk) = SmallDisk::new(4) else { return skip("a tmpfs cannot be mounted (are you root?)") };
    let cache = open(&disk.path().join("cache"), 16 << 30).unwrap();
    let mut at = 0;
    let chunk = 1 << 20;
    let full = loop {
        if let Err(error) = cache.install(at, &fill::bytes(at, chunk, 1)).await {
            break error;
        }
        cache.record(at / BLOCK_SIZE..at / BLOCK_SIZE + 256, Recorded::Dirty).unwrap();
        at += chunk as u64;
    };
    assert_says::<()>(Err(full), ErrorKind::Exhausted, "input/output failed");
    assert!(at >= 2 << 20, "the disk has room for some");
    assert_eq!(runs(&cache), [(0..at / BLOCK_SIZE, Recorded::Dirty)]);
    // A table that finds no room says so, and nothing counts as recorded.
    fs::write(disk.path().join("rest"), vec![1; 4 << 20]).unwrap_err();
    let far = 1_000_000;
    assert_says(cache.record(far..far + 1, Recorded::Dirty), ErrorKind::Exhausted, "cannot record");
    assert_says(cache.checkpoint().await, ErrorKind::Exhausted, "cannot make durable");
    assert_eq!(runs(&cache), [(0..at / BLOCK_SIZE, Recorded::Dirty)]);
    fs::remove_file(disk.path().join("rest")).unwrap();
    // What could not be installed whole takes room, too.
    cache.install(at, &vec![0; chunk]).await.unwrap();
    cache.checkpoint().await.unwrap();
    let mut buf = vec![0; 1 << 20];
    cache.read_at(0, &mut buf).await.unwrap();
    assert_eq!(fill::check(&buf, 0, 1), Ok(()));
}

const CRASH_BLOCKS: u64 = 512;

fn block_range(block: u64) -> Range<u64> {
    geometry(CRASH_BLOCKS * BLOCK_SIZE - 7).block_range(block)
}

/// Pulls, writes and pushes blocks for ever; says how many rounds it has done.
fn use_until_killed(path: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = open(Path::new(path), CRASH_BLOCKS * BLOCK_SIZE - 7).unwrap();
    runtime.block_on(async {
        for round in 1.. {
            for block in 0..CRASH_BLOCKS {
                write_block(&cache, block, round).await;
            }
            if round % 4 == 0 {
                cache.checkpoint().await.unwrap();
            }
            crash::reached(&format!("round {round}"));
        }
    });
}

/// The first round pulls; in the others every third block is written and stays dirty, every third is pushed.
async fn write_block(cache: &CacheFile, block: u64, round: u64) {
    let range = block_range(block);
    let bytes = fill::bytes(range.start, usize::try_from(range.end - range.start).unwrap(), round);
    match (round, block % 3) {
        (1, _) => {
            cache.install(range.start, &bytes).await.unwrap();
            cache.record(block..block + 1, Recorded::Clean).unwrap();
        }
        (_, 0) => {}
        (_, kind) => {
            cache.record(block..block + 1, Recorded::Dirty).unwrap();
            cache.write_at(range.start, &bytes).await.unwrap();
            if kind == 2 {
                cache.record(block..block + 1, Recorded::Clean).unwrap();
            }
        }
    }
}

#[test]
fn after_kill_9_every_block_is_there_with_what_it_had() {
    if let Some(path) = crash::role("user") {
        return use_until_killed(&path);
    }
    let dir = TempDir::new().unwrap();
    for rounds in [1, 3, 6] {
        let path = fresh(&dir);
        let mut child =
            crash::child("after_kill_9_every_block_is_there_with_what_it_had", "user", path.to_str().unwrap());
        child.wait_for_line(Duration::from_secs(60), &format!("round {rounds}"));
        std::thread::sleep(Duration::from_millis(7));
        child.kill();
        check_what_is_left(&path, rounds);
    }
}

fn check_what_is_left(path: &Path, rounds: u64) {
    let cache = open(path, CRASH_BLOCKS * BLOCK_SIZE - 7).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let runs = runs(&cache);
    for block in 0..CRASH_BLOCKS {
        let (_, state) = runs.iter().find(|(run, _)| run.contains(&block)).expect("it was there before the kill");
        if block % 3 == 0 {
            assert_eq!(*state, Recorded::Clean);
        }
        if block % 3 == 1 && rounds > 1 {
            assert_eq!(*state, Recorded::Dirty);
        }
        let range = block_range(block);
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        runtime.block_on(cache.read_at(range.start, &mut bytes)).unwrap();
        let oldest = if block % 3 == 0 { 1 } else { rounds };
        let found = (oldest..oldest + 10_000).find(|seed| bytes == fill::bytes(range.start, bytes.len(), *seed));
        assert!(found.is_some(), "block {block} has neither what was written last nor what was being written");
    }
}

/// Makes and removes the file for ever.
#[test]
fn a_kill_while_it_is_made_leaves_something_that_can_be_opened() {
    if let Some(path) = crash::role("maker") {
        crash::reached("started");
        loop {
            drop(open(Path::new(&path), 1 << 30).unwrap());
            fs::remove_file(&path).unwrap();
        }
    }
    let dir = scratch();
    for wait in 0..12 {
        let path = fresh(&dir);
        let test = "a_kill_while_it_is_made_leaves_something_that_can_be_opened";
        let mut child = crash::child(test, "maker", path.to_str().unwrap());
        child.wait_for_line(Duration::from_secs(60), "started");
        std::thread::sleep(Duration::from_micros(wait * 300));
        child.kill();
        assert_eq!(runs(&open(&path, 1 << 30).unwrap()), []);
    }
}
