//! Remotes and local sides that fail: errors where they belong, never zeros, nothing lost, and everything goes on when
//! they are back.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_testkit::faults::{Faults, Rule, cancel_after};
use r3map_testkit::random::Random;
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};

use super::fakes::{Record, SOON, flushing, joined, quiet, read, reading};
use super::{Side, open};
use crate::{Cached, CachedParts, CachedSettings, PullSettings, PushSettings, Workers};

const CHUNK: u64 = 64 << 10;
const SIZE: u64 = 20 * CHUNK + 100;

fn filled() -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(SIZE).filled(7)))
}

fn plain() -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(SIZE).filled(7).plain()))
}

#[tokio::test]
async fn a_chunk_that_cannot_be_had_fails_its_readers_and_no_others() {
    for remote in [filled(), plain()] {
        for kind in [ErrorKind::Corrupt, ErrorKind::NotFound, ErrorKind::Cancelled] {
            let local = Side::vector(SIZE);
            let cached = open(local.clone(), remote.clone(), quiet()).await;
            remote.add(Rule::on(Operation::Read).touching(5 * CHUNK..5 * CHUNK + 1).fail(kind));
            let mut buf = vec![0; SIZE as usize];
            let error = deadline(SOON, "a read", cached.read_at(0, &mut buf)).await.unwrap_err();
            assert_eq!(error.kind(), kind);
            assert_eq!(*local.failed.lock().unwrap(), [Range { start: 5 * CHUNK, end: 6 * CHUNK }]);
            fill::check(&read(&cached, 4 * CHUNK, CHUNK as usize).await, 4 * CHUNK, 7).unwrap();
            fill::check(&read(&cached, 6 * CHUNK, CHUNK as usize).await, 6 * CHUNK, 7).unwrap();
            assert!(!cached.is_local(&(5 * CHUNK..6 * CHUNK)));
            remote.clear();
            fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
        }
    }
}

#[tokio::test]
async fn a_short_read_is_an_error_and_not_zeros() {
    for remote in [filled(), plain()] {
        let cached = open(Side::vector(SIZE), remote.clone(), quiet()).await;
        remote.add(Rule::on(Operation::Read).short(1000));
        let error = joined(reading(&cached, 0, 5000)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(!cached.is_local(&(0..1)));
    }
}

#[tokio::test(start_paused = true)]
async fn the_background_goes_on_when_the_remote_is_back() {
    let remote = filled();
    remote.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let settings = CachedSettings { pull: PullSettings::default(), ..quiet() };
    let cached = open(Side::vector(SIZE), remote.clone(), settings).await;
    assert_eq!(cached.pulled().await.unwrap_err().kind(), ErrorKind::Unavailable);
    tokio::time::sleep(Duration::from_secs(60)).await;
    let asked = remote.count(Operation::Read);
    assert!(asked < 60, "it is left alone in between: {asked}");
    remote.clear();
    deadline(SOON, "pulling", cached.pulled()).await.unwrap();
    fill::check(&read(&cached, 0, SIZE as usize).await, 0, 7).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_background_leaves_out_a_bad_chunk_and_tries_it_again() {
    let remote = filled();
    remote.add(Rule::on(Operation::Read).touching(5 * CHUNK..5 * CHUNK + 1).fail(ErrorKind::Corrupt));
    let settings = CachedSettings { pull: PullSettings::default(), ..quiet() };
    let cached = open(Side::vector(SIZE), remote.clone(), settings).await;
    let mut progress = cached.progress();
    let rest = progress.wait_for(|progress| progress.valid_bytes == 20 * CHUNK - CHUNK + BLOCK_OF_TAIL);
    deadline(SOON, "the others", rest).await.unwrap();
    tokio::time::sleep(Duration::from_secs(20)).await;
    remote.clear();
    deadline(SOON, "the last one", cached.pulled()).await.unwrap();
}

/// The region's short last block counts whole until everything is there.
const BLOCK_OF_TAIL: u64 = 4096;

#[tokio::test]
async fn a_local_side_that_is_full_fails_reads_and_leaves_nothing_valid() {
    let local = Side::vector(SIZE);
    let cached = open(local.clone(), filled(), quiet()).await;
    local.refuses_installs.store(true, Ordering::SeqCst);
    assert_eq!(joined(reading(&cached, 0, 10)).await.unwrap_err().kind(), ErrorKind::Exhausted);
    assert!(!cached.is_local(&(0..1)));
    local.refuses_installs.store(false, Ordering::SeqCst);
    fill::check(&read(&cached, 0, 10).await, 0, 7).unwrap();
}

#[tokio::test]
async fn a_failed_local_write_leaves_an_absent_block_absent() {
    let bytes = Faults::new(Arc::new(Store::new(SIZE)));
    let cached = open(Side::over(bytes.clone()), filled(), quiet()).await;
    bytes.add(Rule::on(Operation::Write).times(1).fail_after(ErrorKind::Exhausted));
    assert_eq!(cached.write_at(0, &[1; 8192]).await.unwrap_err().kind(), ErrorKind::Exhausted);
    assert!(!cached.is_local(&(0..1)));
    fill::check(&read(&cached, 0, 8192).await, 0, 7).unwrap();
    assert_eq!(cached.progress().borrow().dirty_bytes, 0);
}

#[tokio::test]
async fn a_write_that_is_given_up_is_there_or_not_and_the_same_everywhere() {
    let (store, bytes) = (Arc::new(Store::new(SIZE).filled(7)), Faults::new(Arc::new(Store::new(SIZE))));
    let cached = open(Side::over(bytes), store.clone(), quiet()).await;
    read(&cached, 0, CHUNK as usize).await;
    for polls in 1..6 {
        cancel_after(polls, cached.write_at(0, &[polls as u8; 4096])).await;
        let seen = read(&cached, 0, 4096).await;
        cached.flush().await.unwrap();
        assert!(store.snapshot()[..4096] == seen, "after {polls} polls");
    }
}

#[tokio::test]
async fn a_record_that_refuses_fails_the_flush_and_what_lies_elsewhere_is_pushed() {
    // Whole chunks only: a push takes clean blocks along, which must be recorded as dirty first.
    let store = Arc::new(Store::new(SIZE).filled(7).whole_chunks(ChunkSize::new(CHUNK).unwrap()));
    let record = Arc::new(Record::default());
    let parts = CachedParts { record: Some(record.clone()), ..CachedParts::default() };
    let cached = Cached::open(Side::vector(SIZE), store.clone(), quiet(), parts).await.unwrap();
    read(&cached, 0, SIZE as usize).await;
    let (refused, other) = (2 * CHUNK + 5, 4 * CHUNK + 5);
    let before = store.snapshot()[refused as usize];
    let new = before.wrapping_add(1);
    cached.write_at(refused, &[new]).await.unwrap();
    cached.write_at(other, &[0]).await.unwrap();
    *record.refused.lock().unwrap() = cached.geometry().blocks_of_chunk(2);
    for _ in 0..2 {
        assert_eq!(joined(flushing(&cached)).await.unwrap_err().kind(), ErrorKind::Exhausted);
    }
    assert_eq!((store.snapshot()[refused as usize], store.snapshot()[other as usize]), (before, 0));
    *record.refused.lock().unwrap() = 0..0;
    joined(flushing(&cached)).await.unwrap();
    assert_eq!(store.snapshot()[refused as usize], new);
    joined(tokio::spawn(async move { cached.close().await })).await.unwrap();
}

/// Random operations over a remote that fails, delays and loses what was not flushed, with calls that are given up. A
/// model knows of each byte which values it may have; in the end the remote must hold what the region shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_whatever_fails() {
    for seed in 0..12 {
        deadline(SOON, format!("seed {seed}"), storm(seed)).await;
    }
}

const STORM: u64 = 40 * 4096 + 77;

async fn storm(seed: u64) {
    let mut random = Random::new(seed);
    let mortal = Arc::new(Mortal::new());
    let store = mortal.store.clone();
    let remote = Faults::new(mortal.clone());
    let local = match seed % 3 {
        0 => Side::vector(STORM),
        _ => Side::over(Faults::new(Arc::new(Store::new(STORM)))),
    };
    let settings = CachedSettings {
        chunk_size: ChunkSize::new(8192 << (seed % 3)).unwrap(),
        pull: PullSettings {
            workers: if seed.is_multiple_of(2) { Workers::Off } else { Workers::Adaptive },
            retry_pause: Duration::from_millis(1),
            ..PullSettings::default()
        },
        push: PushSettings {
            interval: Duration::from_millis(3),
            dirty_budget: std::num::NonZeroU64::new(20 * 4096).unwrap(),
            ..PushSettings::default()
        },
        ..CachedSettings::default()
    };
    let cached = open(local, remote.clone(), settings).await;
    trouble(&remote, seed);
    let mut model = vec![Some(0u8); STORM as usize];
    for step in 0..150 {
        let offset = random.below(STORM);
        let longest = if random.chance(0.5) { 9000 } else { 100 };
        let len = (1 + random.below(longest)).min(STORM - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(10) {
            0..5 => {
                let value = 1 + (step % 250) as u8;
                let polls = if random.chance(0.2) { 1 + random.below(4) as usize } else { usize::MAX };
                let written = cancel_after(polls, cached.write_at(offset, &vec![value; len as usize])).await;
                let known = matches!(written, Some(Ok(()))).then_some(value);
                model[range].fill(known);
            }
            5..9 => {
                let mut buf = vec![0xbd; len as usize];
                if cached.read_at(offset, &mut buf).await.is_ok() {
                    check(&buf, &mut model[range], seed, step);
                }
            }
            _ if random.chance(0.3) => mortal.restart().await,
            _ => drop(cached.flush().await),
        }
    }
    remote.clear();
    let mut shown = vec![0; STORM as usize];
    while cached.read_at(0, &mut shown).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    check(&shown, &mut model, seed, usize::MAX);
    while cached.close().await.is_err() {}
    store.lose_unflushed();
    assert!(store.snapshot() == shown, "seed {seed}: the remote has something else than the region showed");
}

/// A server that may die and come back without what was not flushed; the next flush says so.
struct Mortal {
    store: Arc<Store>,
    /// Whether it has died since the last flush; held for writing while it dies.
    died: tokio::sync::RwLock<AtomicBool>,
}

impl Mortal {
    fn new() -> Self {
        Self { store: Arc::new(Store::new(STORM).volatile_cache()), died: tokio::sync::RwLock::default() }
    }

    async fn restart(&self) {
        let died = self.died.write().await;
        died.store(true, Ordering::SeqCst);
        self.store.lose_unflushed();
    }
}

#[async_trait]
impl Backend for Mortal {
    fn size(&self) -> u64 {
        STORM
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.store.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.store.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        let died = self.died.read().await;
        if died.swap(false, Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Conflict,
                Operation::Flush,
                "this is another server than was written to",
            ));
        }
        self.store.flush().await
    }
}

fn trouble(remote: &Faults, seed: u64) {
    remote.add(Rule::on(Operation::Read).chance(0.1, seed).fail(ErrorKind::Unavailable));
    remote.add(Rule::on(Operation::Read).chance(0.05, seed + 1).short(100));
    remote.add(Rule::on(Operation::Read).chance(0.1, seed + 2).delay(Duration::from_micros(300)));
    remote.add(Rule::on(Operation::Write).chance(0.1, seed + 3).fail(ErrorKind::Unavailable));
    remote.add(Rule::on(Operation::Write).chance(0.1, seed + 4).fail_after(ErrorKind::Unavailable));
    remote.add(Rule::on(Operation::Write).chance(0.1, seed + 5).delay(Duration::from_micros(300)));
    remote.add(Rule::on(Operation::Flush).chance(0.3, seed + 6).fail(ErrorKind::Conflict));
    remote.add(Rule::on(Operation::Flush).chance(0.2, seed + 7).fail(ErrorKind::Unavailable));
}

/// What was read must be what the model knows; where it did not know, it does now.
fn check(buf: &[u8], model: &mut [Option<u8>], seed: u64, step: usize) {
    for (at, (byte, known)) in buf.iter().zip(model).enumerate() {
        match known {
            Some(value) => assert!(byte == value, "seed {seed}, step {step}, byte {at}: {byte} and not {value}"),
            None => *known = Some(*byte),
        }
    }
}
