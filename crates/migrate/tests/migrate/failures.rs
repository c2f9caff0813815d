//! Every step of the protocol × everything that can go wrong there, with two regions that move as one.
//!
//! Whatever happens, the application never runs on two hosts (`Application::resume` sees to that), nothing that was
//! acknowledged is lost, and when everything heals the migration comes to its end. As long as nothing was handed over,
//! the application on the seeder notices nothing, unless its own process dies.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use r3map_core::{ErrorKind, Result};
use r3map_migrate::protocol::Description;
use r3map_migrate::{
    Ledger, Leecher, LeecherParts, LeecherSettings, PullProgress, Pulling, Running, Seeder, SeederPhase, Standing,
    Unsettled,
};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::support::application::Application;
use crate::support::disk::{Disk, Life};
use crate::support::host::{Here, Place, fronts, seed, seed_all};
use crate::support::link::{End, Fault, Link, MortalEnd, Step};
use crate::support::{chunk_by_chunk, fresh_id, geometry, settings};

/// One thing that goes wrong, at one call of one step.
#[derive(Debug, Clone, Copy)]
struct Scenario {
    step: Step,
    fault: Fault,
    /// How many calls of that step go well first.
    skip: u32,
    /// How many are hit.
    hits: u32,
    /// The leecher's disk is full when the region arrives, so that it is given back once.
    gives_back: bool,
}

impl Scenario {
    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for step in Step::ALL {
            for fault in Fault::ALL {
                let repeats = matches!(fault, Fault::LinkCut | Fault::ReplyLost | Fault::Silence | Fault::SilentReply);
                let hits: &[u32] = if repeats { &[1, 3] } else { &[1] };
                let skips: &[u32] = match step {
                    Step::ReadBefore | Step::ReadAfter | Step::Dirty => &[0, 1, 3],
                    _ => &[0],
                };
                for (hits, skip) in hits.iter().flat_map(|hits| skips.iter().map(move |skip| (*hits, *skip))) {
                    all.push(Self { step, fault, skip, hits, gives_back: step == Step::Abort });
                }
            }
        }
        all
    }
}

/// The two hosts of a scenario.
struct World {
    app: Arc<Application>,
    /// Those of the leecher's host, one for each region; the first has the ledger.
    leechers: Vec<Arc<Disk>>,
    link: Arc<Link>,
    settings: LeecherSettings,
    /// The application is moved before everything is copied.
    at_once: bool,
    /// How often a leecher's process had to copy everything again.
    restarts: AtomicU64,
}

impl World {
    /// With an application that runs on the first host, and has written to some of its blocks.
    async fn new(seed_of: u64, pause: Duration, fault: impl FnOnce(Seeder) -> Arc<Link>) -> (Self, impl Sized) {
        let app = Application::new();
        let (seeders, leechers) = ([Disk::new(), Disk::new()], vec![Disk::new(), Disk::new()]);
        let (here, seeder) = seed_all(&app, "A", &seeders).await;
        let writing = app.start(seed_of, pause);
        tokio::time::sleep(Duration::from_millis(300)).await;
        let link = fault(seeder);
        let seeding = keep_seeding(app.clone(), seeders, link.clone(), here);
        let filling = fill_disks(leechers.clone(), link.clone());
        let background = [tokio::spawn(seeding), tokio::spawn(filling)].map(AbortOnDropHandle::new);
        let world = Self { app, leechers, link, settings: settings(), at_once: false, restarts: AtomicU64::new(0) };
        (world, (background, writing))
    }

    /// The leecher's host: a process that dies is started again a second later. The first one dies after so many things
    /// that it does to its disk. Whether it did.
    async fn leech_to_the_end(&self, steps: u64, mut gives_back: bool) -> bool {
        let mut life = Life::of(steps);
        let mut died_by_itself = false;
        loop {
            let disks = self.leechers.iter().map(|disk| disk.in_process(&life)).collect();
            let process = Process { world: self, disks, life: life.clone() };
            tokio::select! {
                () = process.leech(&mut gives_back) => return died_by_itself,
                () = self.link.kill_leecher.notified() => life.kill(),
                () = life.killed() => died_by_itself = true,
            }
            // The process is gone, and with it the application if it ran there.
            self.app.suspend("B").await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            life = Life::new();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_at_whichever_step() {
    let scenarios = Scenario::all();
    let mut struck = HashSet::new();
    for (seed, scenario) in scenarios.into_iter().enumerate() {
        let run = timeout(Duration::from_secs(600), run(scenario, seed as u64)).await;
        if run.unwrap_or_else(|_| panic!("{scenario:?} does not come to its end")) {
            struck.insert((scenario.step, scenario.fault));
        }
    }
    for pair in Step::ALL.into_iter().flat_map(|step| Fault::ALL.map(|fault| (step, fault))) {
        assert!(struck.contains(&pair), "{pair:?} never happened");
    }
}

/// Whether it happened.
async fn run(scenario: Scenario, seed_of: u64) -> bool {
    let Scenario { step, fault, skip, hits, gives_back } = scenario;
    let link = |seeder| Link::new(seeder, step, fault, skip, hits);
    let (world, _running) = World::new(seed_of, Duration::from_millis(7), link).await;
    world.leech_to_the_end(u64::MAX, gives_back).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(world.app.host().await, Some("B"), "{scenario:?}");
    world.app.check().await.unwrap();
    // Who dies when everything is here, before it has said so, does not say it later.
    let untold = (step, fault) == (Step::Confirm, Fault::LeecherKilled { before: true });
    let expected = if untold { SeederPhase::HandedOver } else { SeederPhase::Gone };
    assert_eq!(world.link.seeder().unwrap().progress().borrow().phase, expected, "{scenario:?}");
    let kills = [
        Fault::SeederKilled { before: true },
        Fault::SeederKilled { before: false },
        Fault::LeecherKilled { before: true },
        Fault::LeecherKilled { before: false },
        Fault::LateOfTheDead,
    ];
    let (refused, stops) = (world.app.refused(), world.app.stops());
    assert!(kills.contains(&fault) || refused == 0, "{scenario:?}: {refused} writes were refused");
    // Of what goes wrong before it leaves, unless that is the end of its own process, the application notices nothing: it
    // writes on, and is stopped once, to be moved. A disk that is full may send it back when it has left.
    let before = [Step::Describe, Step::Track, Step::ReadBefore, Step::Dirty].contains(&step);
    if before && !matches!(fault, Fault::SeederKilled { .. } | Fault::DiskFull) {
        assert_eq!((refused, stops), (0, 1), "{scenario:?}");
    }
    world.link.struck.load(Ordering::SeqCst) > 0
}

/// A process that dies between any two things that it does to its disk is followed by one that goes on: nothing is lost,
/// and it never begins again.
#[tokio::test(start_paused = true)]
async fn the_leecher_is_killed_after_whatever_it_does_to_its_disk() {
    for at_once in [false, true] {
        let mut steps = 0;
        while is_killed_after(steps, at_once).await {
            steps += 1;
        }
        assert!(steps > 50, "it does more than {steps} things");
    }
}

/// Whether the first process lived so short.
async fn is_killed_after(steps: u64, at_once: bool) -> bool {
    let (mut world, _running) = World::new(steps, Duration::from_millis(7), Link::healthy).await;
    (world.settings, world.at_once) = (chunk_by_chunk(), at_once);
    let died = timeout(Duration::from_secs(600), world.leech_to_the_end(steps, false)).await;
    let died = died.unwrap_or_else(|_| panic!("killed after {steps} steps it does not come to its end"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.app.host().await, Some("B"), "killed after {steps} steps");
    world.app.check().await.unwrap();
    assert!(!world.link.seeder().unwrap().owns());
    assert_eq!(world.restarts.load(Ordering::SeqCst), 0, "killed after {steps} steps it began again");
    died
}

/// The seeder's host: a process that dies is started again two seconds later.
async fn keep_seeding(app: Arc<Application>, disks: [Arc<Disk>; 2], link: Arc<Link>, mut here: Vec<Here>) {
    loop {
        link.kill_seeder.notified().await;
        app.suspend("A").await;
        here.iter().for_each(Here::kill);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (again, seeder) = seed_all(&app, "A", &disks).await;
        here = again;
        link.connect(Some(seeder));
    }
}

/// The leecher's disks: when they are full, there is room again three seconds later.
async fn fill_disks(disks: Vec<Arc<Disk>>, link: Arc<Link>) {
    loop {
        link.fill_disk.notified().await;
        disks.iter().for_each(|disk| disk.fill(true));
        tokio::time::sleep(Duration::from_secs(3)).await;
        disks.iter().for_each(|disk| disk.fill(false));
    }
}

/// A process of the leecher's host.
struct Process<'a> {
    world: &'a World,
    disks: Vec<Arc<Disk>>,
    life: Arc<Life>,
}

impl Process<'_> {
    /// From its start to where it has everything.
    async fn leech(&self, gives_back: &mut bool) {
        while !self.goes_on(gives_back).await {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    fn settings(&self) -> LeecherSettings {
        self.world.settings.clone()
    }

    fn peer(&self) -> Arc<MortalEnd> {
        Arc::new(MortalEnd(self.world.link.clone(), self.life.clone()))
    }

    fn targets(&self) -> impl AsyncFnOnce(&Description) -> Result<Vec<Place>> + use<> {
        let disks = self.disks.clone();
        async move |_: &_| Ok(disks.into_iter().map(|disk| Place { disk }).collect())
    }

    fn parts(&self) -> LeecherParts {
        LeecherParts { ledger: Some(self.disks[0].clone()), ..LeecherParts::default() }
    }

    /// Does what there is to do as the ledger says. Whether that led to the end.
    async fn goes_on(&self, gives_back: &mut bool) -> bool {
        match Ledger::load(&*self.disks[0]).unwrap() {
            None => {
                let start = Leecher::start(self.peer(), fresh_id(), self.targets(), self.settings(), self.parts());
                match start.await {
                    Ok(leecher) => self.copies(leecher, gives_back).await,
                    Err(_) => false,
                }
            }
            Some(standing @ Standing::Pulling { .. }) => {
                let goes_on = Leecher::go_on(self.peer(), &standing, self.targets(), self.settings(), self.parts());
                match goes_on.await {
                    Ok(leecher) => self.copies(leecher, gives_back).await,
                    Err(_) => false,
                }
            }
            Some(standing @ (Standing::Asking { .. } | Standing::Arrived { .. })) => {
                let (peer, targets) = (self.peer(), self.targets());
                let resumed =
                    Leecher::<Pulling<Place>>::resume(peer, &standing, targets, self.settings(), self.parts());
                match resumed.await {
                    Ok(Some(running)) => self.runs(running).await,
                    Ok(None) | Err(_) => false,
                }
            }
            Some(Standing::Owner { .. }) => {
                // Everything is here, and only the seeder may not know.
                let mut here = Vec::new();
                for disk in &self.disks {
                    here.push(Here::whole(disk).await);
                }
                self.world.app.resume_with("B", fronts(&here)).await;
                std::mem::forget(here);
                true
            }
            Some(standing) => panic!("a leecher does not write {standing:?}"),
        }
    }

    /// Copies, and moves the application. Whether it came to its end.
    async fn copies(&self, mut leecher: Leecher<Pulling<Place>>, gives_back: &mut bool) -> bool {
        let ready = if self.world.at_once { Ok(PullProgress::default()) } else { leecher.ready().await };
        self.world.restarts.fetch_add(leecher.progress().borrow().restarts, Ordering::SeqCst);
        if ready.is_err() {
            // Nothing was asked for: there is nothing to settle.
            return false;
        }
        if std::mem::take(gives_back) {
            // Let it arrive nowhere once: after the asking.
            self.disks[0].fail_ledger(1, 1);
        }
        loop {
            match leecher.finalize().await {
                Ok(running) => return self.runs(running).await,
                Err(left) => match left.then {
                    Unsettled::Refused(again) | Unsettled::Unknown(again) => leecher = again,
                    Unsettled::Returned => return false,
                    Unsettled::Owed(owed) => {
                        while owed.abort().await.is_err() {
                            tokio::time::sleep(Duration::from_millis(500)).await;
                        }
                        return false;
                    }
                },
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Has the application run here until everything is here.
    async fn runs(&self, running: Leecher<Running<Here>>) -> bool {
        self.world.app.resume_with("B", fronts(running.regions())).await;
        running.pulled().await.unwrap();
        while running.confirmed().is_err() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        std::mem::forget(running);
        true
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_on_the_leecher_stops_the_copying_and_nothing_else() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let _writing = app.start(1, Duration::from_millis(2));
    let disk = Disk::new();
    disk.fill(true);
    let targets = async move |_: &_| Ok(vec![Place { disk }]);
    let peer = Arc::new(End(Link::healthy(seeder)));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    assert_eq!(leecher.ready().await.unwrap_err().kind(), ErrorKind::Exhausted);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((app.host().await, app.refused(), app.stops()), (Some("A"), 0, 0));
    app.check().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fills_up_after_the_move_keeps_what_was_written_and_goes_on_when_there_is_room() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let writing = app.start(1, Duration::from_millis(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(writing);
    let disk = Disk::new();
    let place = Place { disk: disk.clone() };
    let peer = Arc::new(End(Link::healthy(seeder)));
    let targets = async move |_: &_| Ok(vec![place]);
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    let running = leecher.finalize().await.unwrap();
    disk.fill(true);
    app.resume("B", running.regions()[0].guarded.front()).await;
    assert!(timeout(Duration::from_secs(30), running.pulled()).await.is_err(), "something is missing");
    disk.fill(false);
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}

/// The seeder is away for longer than readers wait.
#[tokio::test(start_paused = true)]
async fn when_the_leecher_s_patience_is_spent_readers_get_an_error_and_nothing_is_lost() {
    let app = Application::new();
    let (seeders, leechers) = (Disk::new(), Disk::new());
    let (here, seeder) = seed(&app, "A", &seeders).await;
    for block in 0..geometry().block_count() {
        app.write(block).await;
    }
    let link = Link::new(seeder, Step::ReadAfter, Fault::SeederKilled { before: true }, 0, 1);
    let (life, parts) =
        (Life::new(), |disk: &Arc<Disk>| LeecherParts { ledger: Some(disk.clone()), ..Default::default() });
    let disk = leechers.in_process(&life);
    let (place, peer) = (Place { disk: disk.clone() }, Arc::new(MortalEnd(link.clone(), life.clone())));
    let leecher = Leecher::start(peer, fresh_id(), async move |_: &_| Ok(vec![place]), settings(), parts(&disk));
    let running = leecher.await.unwrap().finalize().await.unwrap();
    let front = running.regions()[0].guarded.front();
    app.resume("B", front.clone()).await;
    timeout(Duration::from_secs(60), link.kill_seeder.notified()).await.unwrap();
    here.kill();
    // Writes of whole blocks need nothing from over there, and reads do.
    app.write(60).await;
    for _ in 0..2 {
        let (asked, mut block) = (Instant::now(), vec![0; 4096]);
        let error = front.read_at(59 * 4096, &mut block).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(asked.elapsed() <= Duration::from_secs(7), "{:?}", asked.elapsed());
    }
    assert!(running.pulled().now_or_never().is_none(), "something is missing");
    // Its process ends too, and comes back first.
    app.suspend("B").await;
    life.kill();
    drop((front, running));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let standing = Ledger::load(&*leechers).unwrap().unwrap();
    let resume = async || {
        let disk = leechers.clone();
        let (peer, parts) = (Arc::new(End(link.clone())), parts(&disk));
        let targets = async move |_: &_| Ok(vec![Place { disk }]);
        Leecher::<Pulling<Place>>::resume(peer, &standing, targets, settings(), parts).await
    };
    assert_eq!(resume().await.unwrap_err().kind(), ErrorKind::Unavailable);
    let (_here, again) = seed(&app, "A", &seeders).await;
    assert!(!again.owns());
    link.connect(Some(again.clone()));
    let running = resume().await.unwrap().expect("it was handed over");
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
    assert_eq!((app.refused(), again.progress().borrow().phase), (0, SeederPhase::Gone));
}
