//! The process of a leecher is killed with signal 9 while it copies, while it asks for the region, and while it pulls the
//! rest, over real gRPC, and the next one goes on.

use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map::migration::{
    Guarded, Hooks, LeecherSettings, Migration, Place, SeederPhase, Seeding, Source, Standing, open_cache,
};
use r3map::{Backend, Cache, ChunkSize, ErrorKind, Registry, Result, Uri};
use r3map_pipeline::Workers;
use r3map_testkit::process::Process;
use r3map_testkit::random::{Random, fresh_seed};
use r3map_testkit::store::Store;
use r3map_testkit::{crash, deadline, fill};
use tokio::sync::{Semaphore, watch};

const BLOCK: u64 = 4096;
const CHUNK: u64 = 64 << 10;
/// The last block is short.
const SIZE: u64 = 64 * CHUNK - 1000;
const LIMIT: Duration = Duration::from_secs(120);

/// A region of which so many blocks can be read, and then no more until more are allowed.
struct Dripping {
    inner: Store,
    blocks: Semaphore,
    dry: watch::Sender<bool>,
}

impl Dripping {
    fn allow(&self, blocks: usize) {
        self.dry.send_replace(false);
        self.blocks.add_permits(blocks);
    }

    /// Waits until somebody wants more than is allowed.
    async fn dry(&self) {
        let mut dry = self.dry.subscribe();
        deadline(LIMIT, "a read that has to wait", dry.wait_for(|dry| *dry)).await.unwrap();
    }
}

#[async_trait]
impl Backend for Dripping {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let blocks = u32::try_from((buf.len() as u64).div_ceil(BLOCK)).unwrap();
        match self.blocks.try_acquire_many(blocks) {
            Ok(permits) => permits.forget(),
            Err(_) => {
                self.dry.send_replace(true);
                self.blocks.acquire_many(blocks).await.unwrap().forget();
            }
        }
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

/// The host of the seeder, in this process.
struct Host {
    region: Arc<Dripping>,
    guarded: Arc<Guarded>,
    /// What the region must hold.
    expected: Mutex<Vec<u8>>,
    /// The application is to stop.
    suspended: AtomicBool,
    /// How often it was asked to, and how often it may do so.
    asked: watch::Sender<u32>,
    stops: Semaphore,
}

impl Host {
    fn new() -> Arc<Self> {
        let (inner, blocks) = (Store::new(SIZE).filled(1), Semaphore::new(0));
        let region = Arc::new(Dripping { inner, blocks, dry: watch::Sender::new(false) });
        let guarded = Arc::new(Guarded::new(region.clone(), ChunkSize::new(CHUNK).unwrap()).unwrap());
        let expected = Mutex::new(fill::bytes(0, usize::try_from(SIZE).unwrap(), 1));
        let (suspended, asked, stops) = (AtomicBool::new(false), watch::Sender::new(0), Semaphore::new(1));
        Arc::new(Self { region, guarded, expected, suspended, asked, stops })
    }

    async fn seed(self: &Arc<Self>, migration: Migration) -> Seeding {
        let host = self.clone();
        let hooks = Hooks::default().on_suspend(move || {
            let host = host.clone();
            async move {
                host.asked.send_modify(|asked| *asked += 1);
                host.stops.acquire().await.unwrap().forget();
                host.suspended.store(true, Ordering::SeqCst);
                Ok(())
            }
        });
        let uri = "grpc://127.0.0.1:0".parse().unwrap();
        let regions = vec![("region".into(), self.guarded.clone() as Arc<dyn Source>)];
        migration.hooks(hooks).seed(&Registry::standard(), &[uri], regions).await.unwrap()
    }

    /// What the application does. Nothing once it is suspended.
    async fn write(&self, block: u64, stamp: u64) {
        if self.suspended.load(Ordering::SeqCst) {
            return;
        }
        let start = block * BLOCK;
        let len = usize::try_from(BLOCK.min(SIZE - start)).unwrap();
        let bytes: Vec<u8> = stamp.to_le_bytes().into_iter().cycle().take(len).collect();
        // Refused is a write only when the region has left, and then it changes nothing.
        if self.guarded.front().write_at(start, &bytes).await.is_ok() {
            self.expect(block, &bytes);
        }
    }

    fn expect(&self, block: u64, bytes: &[u8]) {
        let start = usize::try_from(block * BLOCK).unwrap();
        self.expected.lock().unwrap()[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Compares all that has arrived in a folder.
    async fn check(&self, folder: &Path) {
        let (region, _) = open_cache(folder.join("cache")).await.unwrap();
        let mut found = vec![0; usize::try_from(SIZE).unwrap()];
        region.read_at(0, &mut found).await.unwrap();
        let expected = self.expected.lock().unwrap();
        let wrong = found.iter().zip(expected.iter()).position(|(found, expected)| found != expected);
        assert_eq!(wrong.map(|at| at as u64 / BLOCK), None, "the first block that differs");
    }
}

/// Makes a cache file one that was in use when the machine lost its power: of another boot, and never closed. What its
/// header looks like is said in `backends/local/src/cache_file/header.rs`.
fn lose_power(folder: &Path) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(folder.join("cache")).unwrap();
    let mut header = [0; 4096];
    file.read_exact_at(&mut header, 0).unwrap();
    header[12..16].fill(0);
    header[28..32].copy_from_slice(&1u32.to_le_bytes());
    header[32..68].fill(b'0');
    let checksum = crc_fast::crc32_iscsi(&header);
    header[12..16].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&header, 0).unwrap();
}

/// What the application of a leecher's process writes, and where.
const WRITTEN: (u64, [u8; 4096]) = (17, [0x55; 4096]);

/// What a leecher's process does, until it is killed or has done it.
fn leech(argument: &str) {
    let words: Vec<_> = argument.split(' ').collect();
    let (uri, folder, then) = (words[0].parse::<Uri>().unwrap(), PathBuf::from(words[1]), words[2]);
    let mut settings = LeecherSettings::default();
    settings.precopy.recheck = Duration::from_millis(20);
    settings.pull.workers = Workers::Fixed(std::num::NonZeroUsize::MIN);
    settings.pull.max_request = std::num::NonZeroU64::MIN;
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        // A file on no path: whoever is killed leaves nothing mounted.
        let place = Place::file().cache(Cache::File(folder.join("cache")));
        let migration = Migration::new().settings(settings).ledger(folder.join("ledger"));
        let running = if then == "resume" {
            migration.resume(&Registry::standard(), &uri, vec![place]).await.unwrap().expect("it was handed over")
        } else {
            let leecher = migration.leech(&Registry::standard(), &uri, vec![place]).await.unwrap();
            if then != "take" {
                let ready = leecher.ready().await.unwrap();
                crash::reached(&format!("ready {} {}", ready.restarts, ready.pulled));
            }
            if then == "wait" {
                std::future::pending::<()>().await;
            }
            leecher.finalize().await.unwrap()
        };
        if then == "take" {
            let file = running.regions()[0].file().unwrap().file().try_clone().unwrap();
            let write = move || {
                file.write_all_at(&WRITTEN.1, WRITTEN.0 * BLOCK).unwrap();
                file.sync_all().unwrap();
            };
            tokio::task::spawn_blocking(write).await.unwrap();
            crash::reached("written");
        }
        let report = running.pulled().await.unwrap();
        running.confirmed().unwrap();
        running.regions()[0].file().unwrap().flush().await.unwrap();
        crash::reached(&format!("done {}", report.pulled_after));
    });
}

fn start(test: &str, seeding: &Seeding, folder: &Path, then: &str) -> Process {
    let uri = &seeding.uris()[0];
    crash::child(test, "leecher", &format!("{uri} {} {then}", folder.display()))
}

/// Waits until a leecher is ready; how often it began again, and how many bytes it has pulled.
async fn until_ready(child: Process) -> (Process, u64, u64) {
    let waiting = tokio::task::spawn_blocking(move || {
        let mut child = child;
        let line = child.wait_for_line(LIMIT, "ready ");
        let numbers = line.rsplit("ready ").next().unwrap().split(' ').map(|number| number.parse().unwrap());
        let numbers: Vec<u64> = numbers.collect();
        (child, numbers[0], numbers[1])
    });
    waiting.await.unwrap()
}

/// Waits until a leecher has everything; how much of it came after it was asked for.
async fn until_done(mut child: Process) -> u64 {
    let waiting = tokio::task::spawn_blocking(move || {
        let line = child.wait_for_line(LIMIT, "done ");
        assert!(child.wait(LIMIT).success());
        line.rsplit("done ").next().unwrap().parse().unwrap()
    });
    waiting.await.unwrap()
}

async fn kill(mut child: Process) {
    tokio::task::spawn_blocking(move || child.kill()).await.unwrap();
}

/// Names the seed when a test fails.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "to replay: R3MAP_MIGRATE_SEED={}", self.0);
        }
    }
}

fn can_mount() -> bool {
    Path::new("/dev/fuse").exists()
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Runtime::new().unwrap().block_on(test);
}

#[test]
fn a_process_that_is_killed_while_it_pulls_and_between_rounds_is_followed_by_one_that_goes_on() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    if !can_mount() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    const TEST: &str = "a_process_that_is_killed_while_it_pulls_and_between_rounds_is_followed_by_one_that_goes_on";
    run(async {
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        let seeding = host.seed(Migration::new()).await;
        host.region.allow(40 * 16);
        let first = start(TEST, &seeding, folder.path(), "wait");
        host.region.dry().await;
        kill(first).await;
        host.write(3, 7).await;
        host.write(900, 8).await;

        host.region.allow(Semaphore::MAX_PERMITS / 2);
        let (second, restarts, pulled) = until_ready(start(TEST, &seeding, folder.path(), "wait")).await;
        assert_eq!(restarts, 0);
        // What was under way when the first one was killed, and what was written.
        assert!(pulled <= SIZE - 36 * CHUNK + 2 * BLOCK, "{pulled} bytes");
        assert!(pulled >= SIZE - 41 * CHUNK, "{pulled} bytes");
        host.write(5, 9).await;
        kill(second).await;
        host.write(6, 10).await;

        let (third, restarts, pulled) = until_ready(start(TEST, &seeding, folder.path(), "finish")).await;
        assert_eq!(restarts, 0);
        assert!(pulled <= 2 * CHUNK, "{pulled} bytes");
        until_done(third).await;
        assert_eq!(seeding.seeder().progress().borrow().phase, SeederPhase::Gone);
        host.check(folder.path()).await;
    });
}

/// The seeder has forgotten the region: what was pulled of it is nowhere else.
#[test]
fn what_has_arrived_is_there_after_a_loss_of_power_and_is_not_overwritten() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    if !can_mount() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    const TEST: &str = "what_has_arrived_is_there_after_a_loss_of_power_and_is_not_overwritten";
    run(async {
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        let seeding = host.seed(Migration::new()).await;
        host.region.allow(Semaphore::MAX_PERMITS / 2);
        host.write(3, 7).await;
        until_done(start(TEST, &seeding, folder.path(), "finish")).await;
        assert_eq!(seeding.seeder().progress().borrow().phase, SeederPhase::Gone);
        lose_power(folder.path());
        host.check(folder.path()).await;
        lose_power(folder.path());

        // A ledger that knows nothing of it.
        let other = Host::new();
        let seeding = other.seed(Migration::new()).await;
        let (uri, cache) = (seeding.uris()[0].parse().unwrap(), folder.path().join("cache"));
        let place = Place::file().cache(Cache::File(cache));
        let migration = Migration::new().ledger(folder.path().join("another ledger"));
        let refused = migration.leech(&Registry::standard(), &uri, vec![place]).await.unwrap_err();
        assert!(refused.kind() == ErrorKind::Conflict && refused.to_string().contains("nowhere else"), "{refused}");
        host.check(folder.path()).await;
    });
}

#[test]
fn killed_again_and_again_while_the_application_writes_nothing_is_lost() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    if !can_mount() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    const TEST: &str = "killed_again_and_again_while_the_application_writes_nothing_is_lost";
    let given = std::env::var("R3MAP_MIGRATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let replay = Replay(given.unwrap_or_else(fresh_seed));
    run(async {
        let mut random = Random::new(replay.0);
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        let seeding = host.seed(Migration::new()).await;
        let application = tokio::spawn({
            let (host, mut random) = (host.clone(), Random::new(random.below(u64::MAX)));
            async move {
                for stamp in 1.. {
                    host.write(random.below(SIZE.div_ceil(BLOCK)), stamp).await;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        for _ in 0..8 {
            host.region.allow(usize::try_from(100 + random.below(300)).unwrap());
            let child = start(TEST, &seeding, folder.path(), "wait");
            host.region.dry().await;
            kill(child).await;
        }
        host.region.allow(Semaphore::MAX_PERMITS / 2);
        let (last, restarts, _) = until_ready(start(TEST, &seeding, folder.path(), "finish")).await;
        assert_eq!(restarts, 0);
        until_done(last).await;
        application.abort();
        assert!(application.await.unwrap_err().is_cancelled());
        host.check(folder.path()).await;
    });
}

#[test]
fn a_process_that_is_killed_while_it_asks_is_followed_by_one_that_has_the_region() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    if !can_mount() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    const TEST: &str = "a_process_that_is_killed_while_it_asks_is_followed_by_one_that_has_the_region";
    run(async {
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        host.stops.forget_permits(1);
        let seeding = host.seed(Migration::new()).await;
        host.region.allow(Semaphore::MAX_PERMITS / 2);
        let (first, ..) = until_ready(start(TEST, &seeding, folder.path(), "finish")).await;
        let mut asked = host.asked.subscribe();
        deadline(LIMIT, "the question", asked.wait_for(|asked| *asked == 1)).await.unwrap();
        kill(first).await;
        host.write(30, 7).await;
        // The answer finds nobody, and is the same when it is asked for again.
        host.stops.add_permits(1);
        let mut progress = seeding.seeder().progress();
        let handed_over = progress.wait_for(|progress| progress.phase == SeederPhase::HandedOver);
        deadline(LIMIT, "the handover", handed_over).await.unwrap();
        let pulled = until_done(start(TEST, &seeding, folder.path(), "resume")).await;
        assert!((BLOCK..=CHUNK).contains(&pulled), "{pulled} bytes were missing still");
        assert_eq!((seeding.seeder().progress().borrow().phase, *host.asked.borrow()), (SeederPhase::Gone, 1));
        host.check(folder.path()).await;
    });
}

#[test]
fn a_process_that_is_killed_while_its_application_runs_is_followed_by_one_that_has_what_it_wrote() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    if !can_mount() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    const TEST: &str = "a_process_that_is_killed_while_its_application_runs_is_followed_by_one_that_has_what_it_wrote";
    run(async {
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        let seeding = host.seed(Migration::new()).await;
        host.region.allow(20 * 16);
        let first = start(TEST, &seeding, folder.path(), "take");
        let first = tokio::task::spawn_blocking(move || {
            let mut first = first;
            first.wait_for_line(LIMIT, "written");
            first
        });
        let first = first.await.unwrap();
        host.region.dry().await;
        kill(first).await;
        host.expect(WRITTEN.0, &WRITTEN.1);
        assert!(!seeding.seeder().owns());
        host.region.allow(Semaphore::MAX_PERMITS / 2);
        let pulled = until_done(start(TEST, &seeding, folder.path(), "resume")).await;
        assert!((SIZE - 22 * CHUNK..=SIZE - 16 * CHUNK).contains(&pulled), "{pulled} bytes were missing still");
        assert_eq!(seeding.seeder().progress().borrow().phase, SeederPhase::Gone);
        host.check(folder.path()).await;
    });
}

#[test]
fn for_a_process_that_never_comes_back_nothing_is_recorded_for_ever() {
    if let Some(argument) = crash::role("leecher") {
        return leech(&argument);
    }
    const TEST: &str = "for_a_process_that_never_comes_back_nothing_is_recorded_for_ever";
    run(async {
        let (host, folder) = (Host::new(), tempfile::tempdir().unwrap());
        let seeding = host.seed(Migration::new().lease(Duration::from_secs(2))).await;
        host.region.allow(Semaphore::MAX_PERMITS / 2);
        let (child, ..) = until_ready(start(TEST, &seeding, folder.path(), "wait")).await;
        let mut progress = seeding.seeder().progress();
        assert_eq!(progress.borrow().phase, SeederPhase::Tracked);
        kill(child).await;
        let owner = progress.wait_for(|progress| progress.phase == SeederPhase::Owner);
        deadline(LIMIT, "the end of recording", owner).await.unwrap();
        let standing = Migration::new().ledger(folder.path().join("ledger")).standing().unwrap();
        assert!(matches!(standing, Some(Standing::Pulling { .. })), "{standing:?}");
        let (_child, restarts, pulled) = until_ready(start(TEST, &seeding, folder.path(), "wait")).await;
        assert!(restarts >= 1 && pulled >= SIZE, "{restarts} {pulled}");
    });
}
