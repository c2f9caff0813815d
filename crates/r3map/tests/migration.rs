//! Migrations of real memory and real files, over real gRPC: an application that stamps blocks is moved again and again
//! while it runs, and every block holds its last stamp wherever the application finds itself.
//!
//! `R3MAP_MIGRATE_HOPS` asks for more moves than CI makes, `R3MAP_MIGRATE_SEED` replays a run.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use r3map::migration::{
    Arrived, Hooks, Leecher, LeecherSettings, Migration, Place, Running, SeederPhase, Seeding, Unsettled,
};
use r3map::{Backend, Cache, ErrorKind, Mount, Registry, SliceMount, Uri};
use r3map_testkit::random::{Random, fresh_seed};
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tokio::sync::oneshot;

const BLOCK: usize = 4096;
const BLOCKS: usize = 700;
/// The last block is short.
const SIZE: usize = BLOCKS * BLOCK - 1000;
const LIMIT: Duration = Duration::from_secs(120);

/// What the application works on.
enum Front {
    Slice(SliceMount),
    File(File),
}

impl Front {
    fn read(&self, at: usize, buf: &mut [u8]) {
        match self {
            Self::Slice(slice) => buf.copy_from_slice(&slice.as_slice()[at..at + buf.len()]),
            Self::File(file) => file.read_exact_at(buf, at as u64).unwrap(),
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        match self {
            Self::Slice(slice) => slice.as_mut_slice().unwrap()[at..at + bytes.len()].copy_from_slice(bytes),
            Self::File(file) => file.write_all_at(bytes, at as u64).unwrap(),
        }
    }
}

fn open(path: &Path) -> Front {
    Front::File(OpenOptions::new().read(true).write(true).open(path).unwrap())
}

/// What the application knows: the last stamp of each block.
struct State {
    stamps: Vec<u64>,
    next: u64,
    random: Random,
}

impl State {
    fn new(seed: u64) -> Self {
        Self { stamps: vec![0; BLOCKS], next: 1, random: Random::new(seed) }
    }

    /// Stamps some block, whose last stamp it must still have.
    fn step(&mut self, front: &mut Front) {
        let block = usize::try_from(self.random.below(BLOCKS as u64)).unwrap();
        self.check(front, block);
        let stamp = self.next;
        self.next += 1;
        front.write(block * BLOCK, &block_of(block, stamp));
        self.stamps[block] = stamp;
    }

    fn check(&self, front: &Front, block: usize) {
        let expected = block_of(block, self.stamps[block]);
        let mut found = vec![0; expected.len()];
        front.read(block * BLOCK, &mut found);
        let stamp = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(found == expected, "block {block} has {} and not {}", stamp(&found), stamp(&expected));
    }

    fn check_all(&self, front: &Front) {
        (0..BLOCKS).for_each(|block| self.check(front, block));
    }
}

fn block_of(block: usize, stamp: u64) -> Vec<u8> {
    let len = (SIZE - block * BLOCK).min(BLOCK);
    match stamp {
        0 => vec![0; len],
        _ => stamp.to_le_bytes().into_iter().cycle().take(len).collect(),
    }
}

/// The application, running on a thread of its own until it is suspended.
struct Application {
    stop: Arc<AtomicBool>,
    stopped: oneshot::Receiver<(State, Front)>,
}

impl Application {
    fn run(mut state: State, mut front: Front) -> Self {
        let (stop, (tell, stopped)) = (Arc::new(AtomicBool::new(false)), oneshot::channel());
        let asked = stop.clone();
        std::thread::spawn(move || {
            while !asked.load(Ordering::SeqCst) {
                state.step(&mut front);
                std::thread::sleep(Duration::from_micros(50));
            }
            let _ = tell.send((state, front));
        });
        Self { stop, stopped }
    }
}

/// Where the application is, for hooks.
#[derive(Clone, Default)]
struct Stage {
    running: Arc<Mutex<Option<Application>>>,
    left: Arc<Mutex<Option<(State, Front)>>>,
}

impl Stage {
    fn start(&self, state: State, front: Front) {
        *self.running.lock().unwrap() = Some(Application::run(state, front));
    }

    /// Suspends the application, and keeps what it had.
    fn hooks(&self) -> Hooks {
        let stage = self.clone();
        Hooks::default().on_suspend(move || {
            let stage = stage.clone();
            async move {
                let application = stage.running.lock().unwrap().take().expect("it runs here");
                application.stop.store(true, Ordering::SeqCst);
                let left = application.stopped.await.expect("the application has not failed");
                *stage.left.lock().unwrap() = Some(left);
                Ok(())
            }
        })
    }

    fn take(&self) -> (State, Front) {
        self.left.lock().unwrap().take().expect("it was suspended")
    }
}

/// Names the seed when a test fails.
struct Replay(u64);

impl Replay {
    fn new() -> Self {
        let given = std::env::var("R3MAP_MIGRATE_SEED").ok().and_then(|seed| seed.parse().ok());
        Self(given.unwrap_or_else(fresh_seed))
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "to replay: R3MAP_MIGRATE_SEED={}", self.0);
        }
    }
}

fn hops() -> usize {
    std::env::var("R3MAP_MIGRATE_HOPS").ok().and_then(|hops| hops.parse().ok()).unwrap_or(100)
}

fn anywhere() -> Vec<Uri> {
    vec!["grpc://127.0.0.1:0".parse().unwrap()]
}

fn settings() -> LeecherSettings {
    let mut settings = LeecherSettings::default();
    settings.precopy.recheck = Duration::from_millis(20);
    settings
}

fn empty() -> Arc<dyn Backend> {
    Arc::new(Store::new(SIZE as u64))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    deadline(LIMIT, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}

/// Moves what `seeding` has to a new place, where it is shown as `front` says.
async fn arrive(seeding: &Seeding, place: Place, finalize_at_once: bool) -> Leecher<Running<Arrived>> {
    let registry = Registry::standard();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let leecher = Migration::new().settings(settings()).leech(&registry, &uri, vec![place]).await.unwrap();
    if !finalize_at_once {
        leecher.ready().await.unwrap();
    }
    let running = leecher.finalize().await.unwrap();
    running.resumed().unwrap();
    running
}

/// Moves an application `hops` times.
async fn move_again_and_again(
    mut front: Front,
    mut seeding: Seeding,
    mut stage: Stage,
    place: impl Fn(usize) -> Place,
) {
    let replay = Replay::new();
    let (mut state, mut kept): (_, Vec<Arc<Arrived>>) = (State::new(replay.0), Vec::new());
    for hop in 0..hops() {
        stage.start(state, front);
        tokio::time::sleep(Duration::from_millis(replay.0 >> (hop % 32) & 15)).await;
        let running = deadline(LIMIT, "a move", arrive(&seeding, place(hop), hop % 3 == 2)).await;
        let (left, old) = stage.take();
        front = match running.regions()[0].take_slice() {
            Some(slice) => Front::Slice(slice),
            None => {
                let path = running.regions()[0].path().expect("it is on a path").path().to_owned();
                blocking(move || open(&path)).await
            }
        };
        // The application runs before everything is there.
        (state, front) = blocking(move || {
            let (mut left, mut front) = (left, front);
            (0..50).for_each(|_| left.step(&mut front));
            (left, front)
        })
        .await;
        let report = deadline(LIMIT, "the rest", running.pulled()).await.unwrap();
        assert!(report.downtime.total() < Duration::from_secs(5), "{report:?}");
        running.confirmed().unwrap();
        assert_eq!(seeding.seeder().progress().borrow().phase, SeederPhase::Gone);
        stage = Stage::default();
        let next = Migration::new().hooks(stage.hooks()).release(&Registry::standard(), &anywhere(), running).await;
        let (regions, next) = next.unwrap();
        drop(old);
        std::mem::replace(&mut seeding, next).close().await.unwrap();
        for gone in std::mem::replace(&mut kept, regions) {
            if let Some(mount) = gone.path() {
                mount.abandon().await;
            }
        }
        if hop % 10 == 9 {
            (state, front) = blocking(move || {
                state.check_all(&front);
                (state, front)
            })
            .await;
        }
    }
    blocking(move || state.check_all(&front)).await;
    assert_eq!(seeding.seeder().progress().borrow().epoch, 1 + hops() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_moved_again_and_again_and_no_stamp_is_lost() {
    let stage = Stage::default();
    let mount = Mount::managed(empty()).slice().await.unwrap();
    let regions = vec![("memory".into(), mount.source())];
    let seeding =
        Migration::new().hooks(stage.hooks()).seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    move_again_and_again(Front::Slice(mount), seeding, stage, |_| Place::slice()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_moved_again_and_again_and_no_stamp_is_lost() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let (stage, folder) = (Stage::default(), tempfile::tempdir().unwrap());
    let path = folder.path().join("first");
    let mount = Mount::direct(empty()).migratable().path(&path).await.unwrap();
    let regions = vec![("disk".into(), mount.source().unwrap())];
    let seeding =
        Migration::new().hooks(stage.hooks()).seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let front = blocking(move || open(&path)).await;
    let place = |hop: usize| {
        let place = Place::path(folder.path().join(format!("hop-{hop}")));
        match hop % 2 {
            0 => place,
            _ => place.cache(Cache::File(folder.path().join(format!("cache-{hop}")))),
        }
    };
    move_again_and_again(front, seeding, stage, place).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_a_disk_are_moved_as_one() {
    if !Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let mut memory = Mount::managed(empty()).slice().await.unwrap();
    let disk = Mount::direct(empty()).migratable().path(folder.path().join("disk")).await.unwrap();
    let regions = vec![("memory".into(), memory.source()), ("disk".into(), disk.source().unwrap())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
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
    let right = Migration::new().secret("open sesame").settings(settings());
    let leecher = right.leech(&Registry::standard(), &uri, vec![Place::slice()]).await.unwrap();
    leecher.finalize().await.unwrap().pulled().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_shown_gives_the_region_back() {
    let (folder, mut mount) = (tempfile::tempdir().unwrap(), Mount::managed(empty()).slice().await.unwrap());
    let regions = vec![("memory".into(), mount.source())];
    let seeding = Migration::new().seed(&Registry::standard(), &anywhere(), regions).await.unwrap();
    let uri: Uri = seeding.uris()[0].parse().unwrap();
    let nowhere = Place::path(folder.path().join("no/such/folder/region"));
    let leecher =
        Migration::new().settings(settings()).leech(&Registry::standard(), &uri, vec![nowhere]).await.unwrap();
    leecher.ready().await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(matches!(left.then, Unsettled::Returned), "{left}");
    assert!(seeding.seeder().owns());
    mount.as_mut_slice().unwrap()[0] = 1;
    assert_eq!(mount.as_slice()[0], 1, "it can be written as before");
}
