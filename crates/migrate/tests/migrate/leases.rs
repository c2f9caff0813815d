//! A leecher that vanishes does not cost the seeder's application anything for ever, and one that is only slow is noticed.

use std::sync::Arc;
use std::time::Duration;

use r3map_core::ErrorKind;
use r3map_migrate::protocol::{Description, MigrationId};
use r3map_migrate::{
    Ledger, Leecher, LeecherParts, LeecherSettings, PullPhase, Pulling, Running, Seeder, SeederParts, SeederPhase,
    Standing,
};
use tokio::time::{Instant, sleep, timeout};

use crate::support::application::Application;
use crate::support::disk::{Disk, Life};
use crate::support::host::{Here, Place, hooks, seed};
use crate::support::link::{Fault, Link, MortalEnd, Step};
use crate::support::{LEASE, fresh_id, settings};

const LONG: Duration = Duration::from_secs(600);

async fn leech(link: &Arc<Link>, life: &Arc<Life>, settings: LeecherSettings) -> Leecher<Pulling<Place>> {
    let disk = Disk::new();
    let targets = async move |_: &Description| Ok(vec![Place { disk }]);
    let peer = Arc::new(MortalEnd(link.clone(), life.clone()));
    Leecher::start(peer, fresh_id(), targets, settings, LeecherParts::default()).await.unwrap()
}

/// An application on host A that writes now and then, and a link to it.
async fn busy(link: impl FnOnce(Seeder) -> Arc<Link>) -> (Arc<Application>, impl Sized, Seeder, Arc<Link>) {
    let app = Application::new();
    let (here, seeder): (Here, _) = seed(&app, "A", &Disk::new()).await;
    let running = app.start(1, Duration::from_millis(500));
    sleep(Duration::from_secs(20)).await;
    let link = link(seeder.clone());
    (app, (here, running), seeder, link)
}

/// Waits until nothing is recorded; how long that took.
async fn until_untracked(seeder: &Seeder) -> Duration {
    let (since, mut progress) = (Instant::now(), seeder.progress());
    let untracked = progress.wait_for(|progress| progress.phase == SeederPhase::Owner);
    timeout(LONG, untracked).await.expect("it does not record for ever").unwrap();
    since.elapsed()
}

#[tokio::test(start_paused = true)]
async fn nothing_is_recorded_any_more_for_a_leecher_that_vanished_and_its_application_never_notices() {
    for ready in [false, true] {
        let (app, _running, seeder, link) = busy(Link::healthy).await;
        let life = Life::new();
        let leecher = leech(&link, &life, settings()).await;
        if ready {
            leecher.ready().await.unwrap();
            // It polls on while it waits, for as long as it takes.
            sleep(20 * LEASE).await;
        }
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
        assert!(seeder.describe().await.unwrap().busy);
        life.kill();
        drop(leecher);
        let took = until_untracked(&seeder).await;
        assert!(took > LEASE - Duration::from_secs(1) && took <= LEASE + Duration::from_secs(1), "{took:?}");
        assert!(!seeder.describe().await.unwrap().busy);
        assert_eq!((app.host().await, app.refused()), (Some("A"), 0));
        app.check().await.unwrap();
        let running = leech(&link, &Life::new(), settings()).await.finalize().await.unwrap();
        app.resume("B", running.regions()[0].guarded.front()).await;
        running.pulled().await.unwrap();
        app.check().await.unwrap();
    }
}

/// One that asks for records less often than the lease allows asks more often.
#[tokio::test(start_paused = true)]
async fn one_who_waits_to_be_finalized_keeps_its_lease_however_seldom_it_would_ask() {
    let (app, _running, seeder, link) = busy(Link::healthy).await;
    let mut settings = settings();
    settings.precopy.recheck = 30 * LEASE;
    let leecher = leech(&link, &Life::new(), settings).await;
    leecher.ready().await.unwrap();
    sleep(50 * LEASE).await;
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
    let progress = leecher.progress().borrow().clone();
    assert!(progress.restarts == 0 && (140..170).contains(&progress.rounds), "{progress:?}");
    let running = leecher.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn reads_alone_keep_a_lease_of_whoever_holds_it() {
    let (_app, _running, seeder, _) = busy(Link::healthy).await;
    let (region, calls, id) = (seeder.region(0), seeder.admit(b"").unwrap(), fresh_id());
    calls.track(id, None).await.unwrap();
    let read_for = async |id: MigrationId| {
        sleep(LEASE * 2 / 3).await;
        calls.heard(id).unwrap();
        region.read_at(0, &mut [0; 10]).await.unwrap();
    };
    for _ in 0..10 {
        read_for(id).await;
    }
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
    // Those of others do not: of one who was replaced, or of somebody who only looks.
    for other in [fresh_id(), MigrationId([0; 16])] {
        read_for(other).await;
    }
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Owner);
}

/// A leecher in Go asks for nothing while it waits.
#[tokio::test(start_paused = true)]
async fn who_is_known_to_be_silent_has_no_lease() {
    let (_app, _running, seeder, _) = busy(Link::healthy).await;
    let (calls, go) = (seeder.admit(b"").unwrap(), MigrationId(*b"a leecher in Go\0"));
    for _ in 0..2 {
        calls.track_for_ever(go).await.unwrap();
        sleep(100 * LEASE).await;
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
        seeder.stop_tracking().await.unwrap();
    }
    calls.track_for_ever(go).await.unwrap();
    calls.finalize(go, 0).await.unwrap();
}

/// The link is down for longer than the lease, but not for longer than the leecher tries.
#[tokio::test(start_paused = true)]
async fn one_who_comes_back_too_late_learns_it_and_begins_again() {
    for step in [Step::ReadBefore, Step::Dirty] {
        let (app, _running, seeder, link) = busy(|seeder| Link::new(seeder, step, Fault::LinkCut, 2, 1_000_000)).await;
        let mut settings = settings();
        settings.before.limit = Some(4 * LEASE);
        let leecher = leech(&link, &Life::new(), settings).await;
        until_untracked(&seeder).await;
        link.heal();
        let mut progress = leecher.progress();
        let restarted = progress.wait_for(|progress| progress.restarts == 1 && progress.phase == PullPhase::Ready);
        timeout(LONG, restarted).await.unwrap().unwrap();
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
        let running = leecher.finalize().await.unwrap();
        app.resume("B", running.regions()[0].guarded.front()).await;
        running.pulled().await.unwrap();
        app.check().await.unwrap();
        assert_eq!(app.refused(), 0);
    }
}

/// Where the application was to be moved, but was not, and nobody asked for anything for long.
#[tokio::test(start_paused = true)]
async fn one_who_asks_to_finalize_too_late_is_refused_and_begins_again() {
    let (app, _running, seeder, link) = busy(|seeder| Link::new(seeder, Step::Finalize, Fault::LinkCut, 0, 1000)).await;
    let leecher = leech(&link, &Life::new(), settings()).await;
    leecher.ready().await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    let r3map_migrate::Unsettled::Unknown(leecher) = left.then else { panic!("nobody answered: {left}") };
    until_untracked(&seeder).await;
    link.heal();
    let left = leecher.finalize().await.unwrap_err();
    assert!(left.error.kind() == ErrorKind::Conflict && left.to_string().contains("silent for too long"), "{left}");
    let r3map_migrate::Unsettled::Refused(leecher) = left.then else { panic!("it was refused: {left}") };
    let mut progress = leecher.progress();
    let ready = progress.wait_for(|progress| progress.restarts == 1 && progress.phase == PullPhase::Ready);
    timeout(LONG, ready).await.unwrap().unwrap();
    let running = leecher.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_was_replaced_does_not_replace_the_other() {
    let (_app, _running, seeder, link) = busy(Link::healthy).await;
    let first = leech(&link, &Life::new(), settings()).await;
    first.ready().await.unwrap();
    let second = leech(&link, &Life::new(), settings()).await;
    let mut progress = first.progress();
    let ended = progress.wait_for(|progress| progress.phase == PullPhase::Stopped);
    let ended = timeout(LONG, ended).await.unwrap().unwrap().clone();
    let error = ended.error.expect("it says why");
    assert!(error.kind() == ErrorKind::Conflict && error.to_string().contains("another leecher"), "{error}");
    second.ready().await.unwrap();
    assert_eq!(second.progress().borrow().restarts, 0);
    second.finalize().await.unwrap().pulled().await.unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Gone);
}

/// Nor does one who is dead, with a call that comes late.
#[tokio::test(start_paused = true)]
async fn a_late_call_of_one_who_is_dead_replaces_nobody() {
    let (app, _running, seeder, link) = busy(|seeder| Link::new(seeder, Step::Track, Fault::LateOfTheDead, 0, 1)).await;
    let life = Life::new();
    tokio::select! {
        _ = leech(&link, &life, settings()) => panic!("it is killed while it asks"),
        () = link.kill_leecher.notified() => life.kill(),
    }
    let second = leech(&link, &Life::new(), settings()).await;
    second.ready().await.unwrap();
    sleep(LEASE).await;
    let progress = second.progress().borrow().clone();
    assert!(progress.restarts == 0 && progress.phase == PullPhase::Ready, "{progress:?}");
    let running = second.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Gone);
}

/// One who lives looks again, and replaces whoever came while he made ready.
#[tokio::test(start_paused = true)]
async fn who_was_overtaken_while_he_made_ready_looks_again() {
    let (_app, _running, seeder, link) = busy(Link::healthy).await;
    let (peer, calls) = (Arc::new(MortalEnd(link, Life::new())), seeder.admit(b"").unwrap());
    let targets = async |_: &Description| {
        calls.track(fresh_id(), None).await?;
        Ok(vec![Place { disk: Disk::new() }])
    };
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    leecher.ready().await.unwrap();
    leecher.finalize().await.unwrap().pulled().await.unwrap();
}

/// What was handed over is the leecher's, however long it is silent.
#[tokio::test(start_paused = true)]
async fn what_was_handed_over_has_no_lease() {
    let (app, _running, seeder, link) =
        busy(|seeder| Link::new(seeder, Step::Confirm, Fault::Silence, 0, u32::MAX)).await;
    let running = leech(&link, &Life::new(), settings()).await.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    sleep(100 * LEASE).await;
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::HandedOver);
    running.pulled().await.unwrap();
    assert!(running.confirmed().is_err());
    link.heal();
    timeout(LONG, seeder.gone()).await.expect("it is told when it answers again");
    app.check().await.unwrap();
}

/// Moves the application to host B, which writes down how it stands on a disk.
async fn take(app: &Arc<Application>, link: &Arc<Link>, disk: &Arc<Disk>) -> Leecher<Running<Here>> {
    let place = Place { disk: disk.clone() };
    let parts = LeecherParts { ledger: Some(disk.clone()), ..LeecherParts::default() };
    let peer = Arc::new(MortalEnd(link.clone(), Life::new()));
    let targets = async move |_: &Description| Ok(vec![place]);
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), parts).await.unwrap();
    let running = leecher.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    running
}

/// What is here is all there is once the seeder knows.
#[tokio::test(start_paused = true)]
async fn the_seeder_hears_of_nothing_before_all_that_is_here_is_kept() {
    let (app, _running, seeder, link) = busy(Link::healthy).await;
    let disk = Disk::new();
    disk.fail_to_keep(3);
    let running = take(&app, &link, &disk).await;
    running.pulled().await.unwrap();
    assert_eq!(running.confirmed().unwrap_err().kind(), ErrorKind::Exhausted);
    assert!(matches!(disk.load().unwrap(), Some(Standing::Arrived { .. })) && !disk.is_kept());
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::HandedOver);
    timeout(LONG, seeder.gone()).await.expect("it is tried again");
    assert!(matches!(disk.load().unwrap(), Some(Standing::Owner { .. })) && disk.is_kept());
    app.check().await.unwrap();
}

/// However it is away, and though the region is elsewhere by then.
#[tokio::test(start_paused = true)]
async fn who_passes_a_region_on_still_tells_the_seeder_that_it_came_from() {
    for fault in [Fault::Silence, Fault::Ending] {
        let (app, _running, seeder, link) = busy(|seeder| Link::new(seeder, Step::Confirm, fault, 0, u32::MAX)).await;
        let disk = Disk::new();
        let running = take(&app, &link, &disk).await;
        let front = running.regions()[0].guarded.front();
        let parts =
            SeederParts { hooks: hooks(&app, "B", front), ledger: Some(disk.clone()), ..SeederParts::default() };
        let (_regions, next, mut former) = running.release(vec!["disk".into()], parts).await.unwrap();
        let onward = leech(&Link::healthy(next.clone()), &Life::new(), settings()).await.finalize().await.unwrap();
        app.resume("C", onward.regions()[0].guarded.front()).await;
        onward.pulled().await.unwrap();
        timeout(LONG, next.gone()).await.expect("the next one has everything");
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::HandedOver, "{fault:?}");
        assert!(!former.knows());
        link.heal();
        timeout(LONG, former.told()).await.expect("somebody tells it").unwrap();
        timeout(LONG, seeder.gone()).await.expect("it is told when it answers again");
        assert!(matches!(disk.load().unwrap(), Some(Standing::Gone { .. })), "the region is not here any more");
        app.check().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn who_has_ended_tells_nobody_any_more() {
    let (app, _running, _seeder, link) =
        busy(|seeder| Link::new(seeder, Step::Confirm, Fault::Ending, 0, u32::MAX)).await;
    let running = take(&app, &link, &Disk::new()).await;
    let (regions, next, mut former) = running.release(vec!["disk".into()], SeederParts::default()).await.unwrap();
    let told = || link.struck.load(std::sync::atomic::Ordering::SeqCst);
    let before = told();
    sleep(LONG).await;
    assert!(told() > before, "it is told again and again");
    drop((regions, next));
    timeout(LONG, former.told()).await.expect("it does not wait for nobody").unwrap_err();
    sleep(Duration::from_secs(1)).await;
    let last = told();
    sleep(LONG).await;
    assert_eq!(told(), last);
}
