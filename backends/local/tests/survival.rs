//! A cached region on a cache file, in a process that is killed: nothing that was there is pulled again, nothing that a
//! flush acknowledged is lost, and the remote gets all of it in the end.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{fresh, scratch};
use r3map_core::{BLOCK_SIZE, Backend, ChunkSize, ErrorKind, Geometry, Operation};
use r3map_local::{CacheFile, File, FileSettings};
use r3map_pipeline::{Cached, CachedParts, CachedSettings, Durability, Local, StateRecord};
use r3map_testkit::faults::{Faults, Link, Rule};
use r3map_testkit::{crash, deadline, fill};

const SIZE: u64 = (4 << 20) - 5;
const LIMIT: Duration = Duration::from_secs(60);
/// What the remote holds at first.
const ORIGINAL: u64 = 1_000_000;

fn geometry() -> Geometry {
    Geometry::new(SIZE, ChunkSize::DEFAULT).unwrap()
}

fn cache_of(remote: &Path) -> PathBuf {
    remote.with_extension("cache")
}

fn make_remote(path: &Path) {
    fs::write(path, fill::bytes(0, usize::try_from(SIZE).unwrap(), ORIGINAL)).unwrap();
}

async fn open(path: &Path, remote: Arc<dyn Backend>, durability: Durability) -> Arc<Cached> {
    let cache = Arc::new(CacheFile::open(cache_of(path), "remote", geometry()).unwrap());
    let mut settings = CachedSettings { durability, ..CachedSettings::default() };
    settings.push.interval = Duration::from_millis(20);
    let parts = CachedParts { record: Some(cache.clone() as Arc<dyn StateRecord>), ..CachedParts::default() };
    Cached::open(cache as Arc<dyn Local>, remote, settings, parts).await.unwrap()
}

fn open_remote(path: &Path) -> Arc<Faults> {
    Faults::new(Arc::new(File::open(path, &FileSettings::default()).unwrap()))
}

fn block_bytes(block: u64, seed: u64) -> (u64, Vec<u8>) {
    let range = geometry().block_range(block);
    (range.start, fill::bytes(range.start, usize::try_from(range.end - range.start).unwrap(), seed))
}

/// The child: writes every third block in each round, and flushes after it.
async fn write_and_flush(path: &Path, durability: Durability) {
    let remote = open_remote(path);
    if durability == Durability::Local {
        remote.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    }
    let region = open(path, remote, durability).await;
    region.pulled().await.unwrap();
    for round in 1.. {
        for block in (0..geometry().block_count()).step_by(3) {
            let (at, bytes) = block_bytes(block, round);
            region.write_at(at, &bytes).await.unwrap();
        }
        region.flush().await.unwrap();
        crash::reached(&format!("flushed {round}"));
    }
}

/// What a block has: the original, or the first round from `rounds` on.
fn check(bytes: &[u8], rounds: u64) {
    for (block, found) in (0..).zip(bytes.chunks(usize::try_from(BLOCK_SIZE).unwrap())) {
        let right = match block % 3 {
            0 => (rounds..rounds + 10_000).any(|round| block_bytes(block, round).1 == found),
            _ => block_bytes(block, ORIGINAL).1 == found,
        };
        assert!(right, "block {block} lost what a flush of round {rounds} had acknowledged, or is another's");
    }
}

/// The parent: reads everything with a remote that gives nothing, then lets it have what is new.
async fn look(path: &Path, rounds: u64) {
    let remote = open_remote(path);
    remote.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let region = open(path, remote.clone(), Durability::Remote).await;
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    region.read_at(0, &mut bytes).await.unwrap();
    check(&bytes, rounds);
    assert_eq!(remote.count(Operation::Read), 0, "what was there is not pulled again");
    deadline(LIMIT, "closing", region.close()).await.unwrap();
    assert!(fs::read(path).unwrap() == bytes, "the remote has what the region showed");
}

fn survives(test: &str, durability: Durability) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let Some(path) = crash::role("writer") {
        return runtime.block_on(write_and_flush(Path::new(&path), durability));
    }
    let dir = scratch();
    for rounds in [1, 3] {
        let path = fresh(&dir);
        make_remote(&path);
        let mut child = crash::child(test, "writer", path.to_str().unwrap());
        child.wait_for_line(LIMIT, &format!("flushed {rounds}"));
        std::thread::sleep(Duration::from_millis(3));
        child.kill();
        runtime.block_on(look(&path, rounds));
    }
}

#[test]
fn what_only_the_cache_has_survives() {
    survives("what_only_the_cache_has_survives", Durability::Local);
}

#[test]
fn what_the_remote_has_survives() {
    survives("what_the_remote_has_survives", Durability::Remote);
}

/// The child: pulls slowly until it is killed.
async fn pull_slowly(path: &Path) {
    let slow = Link::new(open_remote(path), Duration::from_millis(1), Some(2 << 20));
    let region = open(path, slow, Durability::Remote).await;
    let mut progress = region.progress();
    progress.wait_for(|progress| progress.valid_bytes >= SIZE / 3).await.unwrap();
    crash::reached("a third");
    region.pulled().await.unwrap();
}

#[test]
fn what_was_pulled_before_the_kill_is_not_pulled_again() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let Some(path) = crash::role("puller") {
        return runtime.block_on(pull_slowly(Path::new(&path)));
    }
    let dir = scratch();
    let path = fresh(&dir);
    make_remote(&path);
    let test = "what_was_pulled_before_the_kill_is_not_pulled_again";
    let mut child = crash::child(test, "puller", path.to_str().unwrap());
    child.wait_for_line(LIMIT, "a third");
    child.kill();
    runtime.block_on(async {
        let remote = open_remote(&path);
        let region = open(&path, remote.clone(), Durability::Remote).await;
        deadline(LIMIT, "pulling the rest", region.pulled()).await.unwrap();
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        region.read_at(0, &mut bytes).await.unwrap();
        assert_eq!(fill::check(&bytes, 0, ORIGINAL), Ok(()));
        assert!(remote.bytes(Operation::Read) <= SIZE - SIZE / 3, "a third was there");
        region.close().await.unwrap();
        assert_eq!(remote.count(Operation::Write), 0, "nothing was written");
    });
}
