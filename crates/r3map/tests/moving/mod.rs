//! Applications that are moved again and again while they run. What they know of their bytes they keep to themselves, so
//! that a byte that is lost, or of yesterday, shows wherever they find themselves.
//!
//! `R3MAP_MIGRATE_HOPS` asks for another number of moves than a test makes by itself, `R3MAP_MIGRATE_SEED` replays the choices of a
//! run.

mod stamps;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use r3map::migration::{
    Arrived, Hooks, Leecher, LeecherSettings, Migration, Place, Running, SeederPhase, Seeding, Source,
};
use r3map::{Registry, Uri};
use r3map_testkit::deadline;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::random::{Random, fresh_seed};
use tokio::sync::oneshot;

pub(crate) use stamps::{BLOCK, Front, Stamps};

const LIMIT: Duration = Duration::from_secs(120);

/// Something that uses a region. It blocks, on threads of its own.
pub(crate) trait Application: Send + 'static {
    /// What it had on the side that it left.
    type Left: Send + 'static;

    /// Changes something, and remembers what.
    fn step(&mut self);

    /// Stops: nothing that it wrote is anywhere but in the region, or in what the kernel holds of that.
    fn suspend(&mut self) {}

    /// Goes on with a region that has arrived.
    fn resume(&mut self, here: &Arrived) -> Self::Left;

    /// Looks at everything that it has ever changed.
    fn check(&self);
}

/// An application on a thread of its own, until it is suspended.
struct Thread<A> {
    stop: Arc<AtomicBool>,
    stopped: oneshot::Receiver<A>,
}

impl<A: Application> Thread<A> {
    fn run(mut application: A) -> Self {
        let (stop, (tell, stopped)) = (Arc::new(AtomicBool::new(false)), oneshot::channel());
        let asked = stop.clone();
        std::thread::spawn(move || {
            while !asked.load(Ordering::SeqCst) {
                application.step();
                std::thread::sleep(Duration::from_micros(50)); // not to take the whole machine
            }
            application.suspend();
            let _ = tell.send(application);
        });
        Self { stop, stopped }
    }
}

/// Where an application runs, and where it is when it does not.
pub(crate) struct Stage<A> {
    running: Arc<Mutex<Option<Thread<A>>>>,
    left: Arc<Mutex<Option<A>>>,
}

impl<A> Clone for Stage<A> {
    fn clone(&self) -> Self {
        Self { running: self.running.clone(), left: self.left.clone() }
    }
}

impl<A> Default for Stage<A> {
    fn default() -> Self {
        Self { running: Arc::default(), left: Arc::default() }
    }
}

impl<A: Application> Stage<A> {
    fn start(&self, application: A) {
        *self.running.lock().unwrap() = Some(Thread::run(application));
    }

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

    fn take(&self) -> A {
        self.left.lock().unwrap().take().expect("it was suspended")
    }
}

/// Names the seed when a test fails.
pub(crate) struct Replay(pub(crate) u64);

impl Replay {
    pub(crate) fn new() -> Self {
        Self(number("R3MAP_MIGRATE_SEED").unwrap_or_else(fresh_seed))
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "to replay: R3MAP_MIGRATE_SEED={}", self.0);
        }
    }
}

/// What a variable says, which must be a number if it is there.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

pub(crate) fn anywhere() -> Vec<Uri> {
    vec!["grpc://127.0.0.1:0".parse().unwrap()]
}

pub(crate) fn settings() -> LeecherSettings {
    let mut settings = LeecherSettings::default();
    settings.precopy.recheck = Duration::from_millis(20);
    settings
}

pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    deadline(LIMIT, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}

/// Where an application is that was moved, and what it stands on.
pub(crate) struct Moved<A> {
    pub(crate) application: A,
    pub(crate) regions: Vec<Arc<Arrived>>,
}

/// Moves an application `hops` times, or as often as the environment says, from where `source` is. Each region that has
/// arrived is offered to the next place at once, while the application goes on with it. Some moves are given up first, and
/// at times the line breaks in the middle of one.
pub(crate) async fn move_again_and_again<A: Application>(
    mut application: A,
    source: Arc<dyn Source>,
    replay: &Replay,
    hops: u64,
    place: impl Fn(u64, &mut Random) -> Place,
) -> Moved<A> {
    let (mut random, hops) = (Random::new(replay.0), number("R3MAP_MIGRATE_HOPS").unwrap_or(hops));
    let (registry, mut stage) = (Registry::standard(), Stage::default());
    let sources = vec![("region".into(), source)];
    let mut seeding = Migration::new().hooks(stage.hooks()).seed(&registry, &anywhere(), sources).await.unwrap();
    let mut kept: Vec<Arc<Arrived>> = Vec::new();
    for hop in 0..hops {
        stage.start(application);
        tokio::time::sleep(Duration::from_millis(random.below(16))).await;
        let line = Line::to(&seeding);
        let moving = hop_once(&line, &stage, &mut random, |random| place(hop, random));
        let (running, left) = deadline(LIMIT, "a move", moving).await;
        (application, kept) = settle(left, running, &mut seeding, &mut stage, kept).await;
        if hop % 10 == 9 {
            application = checked(application).await;
        }
    }
    application = checked(application).await;
    assert_eq!(seeding.seeder().progress().borrow().epoch, 1 + hops);
    Moved { application, regions: kept }
}

async fn checked<A: Application>(application: A) -> A {
    blocking(move || {
        application.check();
        application
    })
    .await
}

/// An application that was suspended, and what it left.
type Left<A> = (A, <A as Application>::Left);

/// A line to a seeder, which breaks now and then.
struct Line {
    proxy: DelayProxy,
    uri: Uri,
}

impl Line {
    fn to(seeding: &Seeding) -> Self {
        let uri = seeding.uris()[0].clone();
        let address = uri.strip_prefix("grpc://").and_then(|rest| rest.split('/').next()).expect("it has an address");
        let target: SocketAddr = address.parse().unwrap();
        let proxy = DelayProxy::tcp(target, Duration::ZERO).unwrap();
        let uri = uri.replace(address, &proxy.socket_addr().to_string()).parse().unwrap();
        Self { proxy, uri }
    }

    fn break_perhaps(&self, random: &mut Random) {
        if random.chance(0.05) {
            self.proxy.reset();
        }
    }
}

/// One move, perhaps after one that comes to nothing.
async fn hop_once<A: Application>(
    line: &Line,
    stage: &Stage<A>,
    random: &mut Random,
    place: impl Fn(&mut Random) -> Place,
) -> (Leecher<Running<Arrived>>, Left<A>) {
    let leech = async |place| {
        let migration = Migration::new().settings(settings());
        migration.leech(&Registry::standard(), &line.uri, vec![place]).await.unwrap()
    };
    if random.chance(0.125) {
        let given_up = leech(place(random)).await;
        if random.chance(0.5) {
            given_up.ready().await.unwrap();
        }
        given_up.abort().await.map_err(|(error, _)| error).unwrap();
    }
    let leecher = leech(place(random)).await;
    line.break_perhaps(random);
    if random.chance(0.7) {
        leecher.ready().await.unwrap();
    }
    let (running, ()) = tokio::join!(leecher.finalize(), async { line.break_perhaps(random) });
    let running = running.unwrap();
    running.resumed().unwrap();
    line.break_perhaps(random);
    let (mut application, here) = (stage.take(), running.regions()[0].clone());
    // The application runs before everything is there.
    let left = blocking(move || {
        let left = application.resume(&here);
        (0..50).for_each(|_| application.step());
        (application, left)
    })
    .await;
    (running, left)
}

/// When everything is there: offers it to the next, and clears away what was before.
async fn settle<A: Application>(
    (application, left): Left<A>,
    running: Leecher<Running<Arrived>>,
    seeding: &mut Seeding,
    stage: &mut Stage<A>,
    kept: Vec<Arc<Arrived>>,
) -> (A, Vec<Arc<Arrived>>) {
    deadline(LIMIT, "the rest", running.pulled()).await.unwrap();
    running.confirmed().unwrap();
    assert_eq!(seeding.seeder().progress().borrow().phase, SeederPhase::Gone);
    *stage = Stage::default();
    let next = Migration::new().hooks(stage.hooks()).release(&Registry::standard(), &anywhere(), running).await;
    let (regions, next) = next.unwrap();
    blocking(move || drop(left)).await;
    std::mem::replace(seeding, next).close().await.unwrap();
    for gone in kept {
        abandon(&gone).await;
    }
    (application, regions)
}

/// Ends what shows a region that is not here any more.
async fn abandon(gone: &Arrived) {
    if let Some(mount) = gone.path() {
        mount.abandon().await;
    }
    if let Some(mount) = gone.block() {
        mount.abandon().await;
    }
}

/// What has arrived, as an application opens it.
fn open(here: &Arrived) -> Front {
    let path = |path: &Path| path.to_owned();
    match (here.take_slice(), here.path(), here.block()) {
        (Some(slice), ..) => Front::Slice(slice),
        (_, Some(mount), _) => Front::file(&path(mount.path())),
        (_, _, Some(mount)) => Front::device(mount.path()),
        _ => panic!("it is shown in no way that these tests ask for"),
    }
}
