//! Every step of the protocol × everything that can go wrong there.
//!
//! Whatever happens, the application never runs on two hosts (`Application::resume` sees to that), nothing that was
//! acknowledged is lost, and when everything heals the migration comes to its end. As long as nothing was handed over,
//! the application on the seeder notices nothing, unless its own process dies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use r3map_core::ErrorKind;
use r3map_migrate::{Ledger, Leecher, LeecherParts, Pulling, Standing, Unsettled};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Place, seed};
use crate::support::link::{End, Fault, Link, Step};
use crate::support::{fresh_id, settings};

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
    seeders: Arc<Disk>,
    leechers: Arc<Disk>,
    link: Arc<Link>,
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_at_whichever_step() {
    let scenarios = Scenario::all();
    assert!(scenarios.len() > 100);
    for (seed, scenario) in scenarios.into_iter().enumerate() {
        let run = timeout(Duration::from_secs(600), run(scenario, seed as u64));
        run.await.unwrap_or_else(|_| panic!("{scenario:?} does not come to its end"));
    }
}

async fn run(scenario: Scenario, seed_of: u64) {
    let app = Application::new();
    let (seeders, leechers) = (Disk::new(), Disk::new());
    let (here, seeder) = seed(&app, "A", &seeders).await;
    let writing = app.start(seed_of, Duration::from_millis(7));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let Scenario { step, fault, skip, hits, .. } = scenario;
    let link = Link::new(seeder.clone(), step, fault, skip, hits);
    let world = Arc::new(World { app: app.clone(), seeders, leechers, link });
    let restarts = AbortOnDropHandle::new(tokio::spawn(keep_seeding(world.clone(), here)));
    drop(seeder);

    let mut gives_back = scenario.gives_back;
    loop {
        let process = leech(&world, &mut gives_back);
        let killed = world.link.kill_leecher.notified();
        tokio::select! {
            () = process => break,
            () = killed => {}
        }
        // The process is gone, and with it the application if it ran there.
        app.suspend("B").await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(app.host().await, Some("B"), "{scenario:?}");
    app.check().await.unwrap();
    let may_notice = matches!(fault, Fault::SeederKilled { .. } | Fault::LeecherKilled { .. });
    assert!(may_notice || app.refused() == 0, "{scenario:?}: {} writes were refused", app.refused());
    let struck = world.link.struck.load(Ordering::SeqCst);
    assert!(struck > 0 || skip > 0 || matches!(step, Step::ReadAfter), "{scenario:?} never happened");
    drop((restarts, writing));
}

/// The seeder's host: a process that dies is started again two seconds later.
async fn keep_seeding(world: Arc<World>, mut here: crate::support::host::Here) {
    loop {
        world.link.kill_seeder.notified().await;
        world.app.suspend("A").await;
        here.kill();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (again, seeder) = seed(&world.app, "A", &world.seeders).await;
        here = again;
        world.link.connect(Some(seeder));
    }
}

/// The leecher's process, from its start to where it has everything.
async fn leech(world: &World, gives_back: &mut bool) {
    loop {
        if goes_on(world).await || starts_anew(world, gives_back).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Goes on as the ledger says. Whether that led to the end.
async fn goes_on(world: &World) -> bool {
    let Some(standing) = Ledger::load(&*world.leechers).unwrap() else { return false };
    if let Standing::Owner { .. } = standing {
        // Everything is here, and only the seeder may not know.
        let here = crate::support::host::Here::whole(&world.leechers).await;
        world.app.resume("B", here.guarded.front()).await;
        std::mem::forget(here);
        return true;
    }
    if let Standing::Asking { .. } = standing {
        world.leechers.forget_blocks();
    }
    loop {
        let disk = world.leechers.clone();
        let targets = async move |_: &_| Ok(vec![Place { disk }]);
        let peer = Arc::new(End(world.link.clone()));
        let parts = LeecherParts { ledger: Some(world.leechers.clone()), ..LeecherParts::default() };
        match Leecher::<Pulling<Place>>::resume(peer, &standing, targets, settings(), parts).await {
            Ok(running) => {
                world.app.resume("B", running.regions()[0].guarded.front()).await;
                running.pulled().await.unwrap();
                std::mem::forget(running);
                return true;
            }
            Err(error) if error.kind() == ErrorKind::Conflict => {
                world.leechers.erase();
                return false;
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

/// A new migration. Whether it came to its end.
async fn starts_anew(world: &World, gives_back: &mut bool) -> bool {
    world.leechers.erase();
    let disk = world.leechers.clone();
    let targets = async move |_: &_| Ok(vec![Place { disk }]);
    let peer = Arc::new(End(world.link.clone()));
    let parts = LeecherParts { ledger: Some(world.leechers.clone()), ..LeecherParts::default() };
    let Ok(mut leecher) = Leecher::start(peer, fresh_id(), targets, settings(), parts).await else { return false };
    if leecher.ready().await.is_err() {
        // Nothing was asked for: there is nothing to settle.
        return false;
    }
    if std::mem::take(gives_back) {
        // Once for the asking, once for the arriving.
        world.leechers.fail_ledger(1, 1);
    }
    loop {
        match leecher.finalize().await {
            Ok(running) => {
                world.app.resume("B", running.regions()[0].guarded.front()).await;
                running.pulled().await.unwrap();
                std::mem::forget(running);
                return true;
            }
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

#[tokio::test(start_paused = true)]
async fn a_full_disk_on_the_leecher_stops_the_copying_and_nothing_else() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let _writing = app.start(1, Duration::from_millis(2));
    let disk = Disk::new();
    disk.full.store(true, Ordering::SeqCst);
    let targets = async move |_: &_| Ok(vec![Place { disk }]);
    let peer = Arc::new(End(Link::healthy(seeder)));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    assert_eq!(leecher.ready().await.unwrap_err().kind(), ErrorKind::Exhausted);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((app.host().await, app.refused()), (Some("A"), 0));
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
    disk.full.store(true, Ordering::SeqCst);
    app.resume("B", running.regions()[0].guarded.front()).await;
    assert!(timeout(Duration::from_secs(30), running.pulled()).await.is_err(), "something is missing");
    disk.full.store(false, Ordering::SeqCst);
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}
