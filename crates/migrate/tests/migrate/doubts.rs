//! Where it is in doubt what has happened: entries into a ledger that fail and are there all the same, answers that cannot be
//! read, panics, and names that several have. Nobody takes the doubt for a yes or a no.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{ErrorKind, Result};
use r3map_migrate::protocol::{Description, MAX_EPOCH, MigrationId};
use r3map_migrate::{
    Admitted, Arrival, Ledger, Leecher, LeecherParts, Pulling, Seeder, SeederParts, SeederPhase, Standing, Target,
    Unsettled,
};
use r3map_pipeline::{Local, StateRecord};
use tokio::time::{sleep, timeout};

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, seed};
use crate::support::link::{End, Fault, Lies, Link, Step};
use crate::support::{fresh_id, settings};

const LONG: Duration = Duration::from_secs(600);

async fn leech<T: Target>(link: &Arc<Link>, target: T, disk: &Arc<Disk>) -> Result<Leecher<Pulling<T>>> {
    let parts = LeecherParts { ledger: Some(disk.clone()), ..LeecherParts::default() };
    let targets = async move |_: &Description| Ok(vec![target]);
    Leecher::start(Arc::new(End(link.clone())), fresh_id(), targets, settings(), parts).await
}

/// A leecher that is ready, and the disk that it has.
async fn ready(link: &Arc<Link>) -> (Leecher<Pulling<Place>>, Arc<Disk>) {
    let disk = Disk::new();
    let leecher = leech(link, Place { disk: disk.clone() }, &disk).await.unwrap();
    leecher.ready().await.unwrap();
    (leecher, disk)
}

/// An application on host A, what it writes being recorded for a leecher.
struct Recorded {
    app: Arc<Application>,
    disk: Arc<Disk>,
    here: Here,
    seeder: Seeder,
    /// The leecher's.
    calls: Admitted,
    id: MigrationId,
}

async fn recorded() -> Recorded {
    let (app, disk, id) = (Application::new(), Disk::new(), fresh_id());
    let (here, seeder) = seed(&app, "A", &disk).await;
    let calls = seeder.admit(b"").unwrap();
    calls.track(id, None).await.unwrap();
    Recorded { app, disk, here, seeder, calls, id }
}

#[tokio::test(start_paused = true)]
async fn a_handover_that_was_refused_is_in_no_ledger_afterwards() {
    let Recorded { app, disk, here, calls, id, .. } = recorded().await;
    disk.fail_ledger_late(0, 1);
    assert_eq!(calls.finalize(id, 0).await.unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(app.host().await, Some("A"));
    app.write(3).await;
    app.suspend("A").await;
    here.kill();
    let (_here, again) = seed(&app, "A", &disk).await;
    assert!(again.owns());
    let refused = again.admit(b"").unwrap().finalize(id, 0).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "what was written since would be lost: {refused}");
    app.check().await.unwrap();
}

/// Waits until the application runs again where it was.
async fn runs_again(seeder: &Seeder) {
    let mut progress = seeder.progress();
    let runs = progress.wait_for(|progress| progress.phase != SeederPhase::Suspending);
    timeout(LONG, runs).await.expect("it goes on").unwrap();
}

#[tokio::test(start_paused = true)]
async fn as_long_as_a_ledger_may_say_something_else_nothing_changes_hands() {
    let Recorded { app, disk, here: _here, seeder, calls, id } = recorded().await;
    // The handover, what held before it, and that twice again.
    disk.fail_ledger_late(0, 4);
    for _ in 0..2 {
        let silence = calls.finalize(id, 0).await.unwrap_err();
        assert_eq!(silence.kind(), ErrorKind::Unavailable, "it is no refusal: {silence}");
        assert_eq!((app.host().await, seeder.owns()), (None, true), "what it wrote would be lost after a crash");
    }
    runs_again(&seeder).await;
    assert_eq!((app.host().await, seeder.owns()), (Some("A"), true));
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Owner { .. })));
    app.write(3).await;
    let handover = calls.finalize(id, 0).await.unwrap();
    assert_eq!((handover.dirty[0].len(), app.host().await), (1, None));
    disk.fail_ledger_late(0, 3);
    calls.abort(id).await.unwrap_err();
    assert_eq!((app.host().await, seeder.owns()), (None, false), "it has not come back");
    let silence = calls.finalize(id, 0).await.unwrap_err();
    assert_eq!(silence.kind(), ErrorKind::Unavailable, "it is no refusal: {silence}");
    assert_eq!(calls.finalize(id, 0).await.unwrap(), handover);
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::HandedOver { id: to, .. }) if to == id));
    calls.abort(id).await.unwrap();
    assert_eq!(app.host().await, Some("A"));
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Owner { .. })));
}

/// A refusal would be taken for "it is still over there", be it by a leecher that is started again and asks so.
#[tokio::test(start_paused = true)]
async fn nobody_is_refused_while_a_ledger_is_in_doubt() {
    let Recorded { app, disk, here: _here, seeder, calls, id } = recorded().await;
    let others = [(id, u64::MAX), (fresh_id(), 0)];
    // The handover, what held before it, that once more, and once for each who asks.
    disk.fail_ledger_late(0, 3 + 2);
    calls.finalize(id, 0).await.unwrap_err();
    for (who, rounds) in others {
        assert_eq!(app.host().await, None, "the ledger may say that it was handed over");
        assert_eq!(calls.finalize(who, rounds).await.unwrap_err().kind(), ErrorKind::Unavailable, "{rounds}");
    }
    runs_again(&seeder).await;
    for (who, rounds) in others {
        assert_eq!(calls.finalize(who, rounds).await.unwrap_err().kind(), ErrorKind::Conflict, "{rounds}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_a_ledger_has_by_mistake_is_still_true_after_a_crash() {
    let Recorded { app, disk, here, seeder, calls, id } = recorded().await;
    app.write(3).await;
    disk.fail_ledger_late(0, u32::MAX);
    calls.finalize(id, 0).await.unwrap_err();
    sleep(LONG).await;
    app.write(5).await;
    assert_eq!(app.host().await, None, "it would have written what the answer does not name");
    seeder.stop_tracking().await.expect_err("whoever ends the process must know of it");
    assert_eq!((app.host().await, seeder.progress().borrow().phase), (None, SeederPhase::Suspending));
    here.kill();
    drop((seeder, calls));
    disk.fail_ledger(0, 0);
    let (_here, again) = seed(&app, "A", &disk).await;
    assert!(!again.owns());
    let answer = again.admit(b"").unwrap().finalize(id, 0).await.unwrap();
    assert_eq!(answer.dirty[0].runs().collect::<Vec<_>>().as_slice(), std::slice::from_ref(&(3..4)));
}

#[tokio::test(start_paused = true)]
async fn whoever_stops_a_seeder_whose_ledger_is_in_doubt_has_it_written_once_more() {
    let Recorded { app, disk, here: _here, seeder, calls, id } = recorded().await;
    // The handover, and what held before it, twice.
    disk.fail_ledger_late(0, 3);
    calls.finalize(id, 0).await.unwrap_err();
    assert_eq!(app.host().await, None);
    seeder.stop_tracking().await.unwrap();
    assert_eq!((app.host().await, seeder.progress().borrow().phase), (Some("A"), SeederPhase::Owner));
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Owner { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_ledger_that_takes_nothing_keeps_nobody_from_running() {
    let Recorded { app, disk, here: _here, seeder, calls, id } = recorded().await;
    disk.fail_ledger(0, u32::MAX);
    for _ in 0..2 {
        assert_eq!(calls.finalize(id, 0).await.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!((app.host().await, seeder.progress().borrow().phase), (Some("A"), SeederPhase::Tracked));
    }
}

#[tokio::test(start_paused = true)]
async fn an_abort_counts_only_when_the_ledger_says_so() {
    let Recorded { app, disk, here: _here, calls, id, .. } = recorded().await;
    disk.fail_ledger_late(0, 4);
    calls.finalize(id, 0).await.unwrap_err();
    assert_eq!(calls.abort(id).await.unwrap_err().kind(), ErrorKind::Unavailable);
    calls.abort(id).await.unwrap();
    assert_eq!(app.host().await, Some("A"));
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Owner { .. })));
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_is_not_in_the_leecher_s_ledger() {
    // The entry that it has arrived fails, and then perhaps the one that takes it back.
    for fails in [1, 2] {
        let app = Application::new();
        let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
        let (leecher, disk) = ready(&Link::healthy(seeder.clone())).await;
        disk.fail_ledger_late(1, fails);
        let left = leecher.finalize().await.unwrap_err();
        match left.then {
            Unsettled::Returned => assert_eq!(fails, 1),
            Unsettled::Owed(owed) => {
                assert_eq!((fails, seeder.owns()), (2, false), "the next process would take itself for the owner");
                owed.abort().await.unwrap();
            }
            then => panic!("{then:?}"),
        }
        assert_eq!(app.host().await, Some("A"));
        assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Asking { .. })));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_cannot_be_read_is_no_refusal() {
    for kind in [ErrorKind::Corrupt, ErrorKind::Exhausted, ErrorKind::Internal] {
        let app = Application::new();
        let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
        let link = Link::healthy(seeder.clone());
        let (leecher, disk) = ready(&link).await;
        link.lies.lock().unwrap().garbled = Some(kind);
        let left = leecher.finalize().await.unwrap_err();
        assert_eq!((left.error.kind(), seeder.owns()), (kind, false));
        let Unsettled::Unknown(leecher) = left.then else { panic!("it was handed over: {left:?}") };
        // That does not become a refusal when the next attempt is not even made.
        disk.fail_ledger(0, 1);
        let left = leecher.finalize().await.unwrap_err();
        let Unsettled::Unknown(leecher) = left.then else { panic!("it was handed over: {left:?}") };
        *link.lies.lock().unwrap() = Lies::default();
        leecher.finalize().await.unwrap().pulled().await.unwrap();
    }
}

/// A place that panics when the region is to be shown there.
struct Cursed(Place);

#[async_trait]
impl Target for Cursed {
    type Shown = Here;

    fn local(&self) -> Arc<dyn Local> {
        self.0.local()
    }

    fn record(&self) -> Option<Arc<dyn StateRecord>> {
        self.0.record()
    }

    async fn show(self, _: Arrival) -> Result<Here> {
        panic!("a place that panics")
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_panic_the_region_is_owed() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let disk = Disk::new();
    let leecher = leech(&Link::healthy(seeder.clone()), Cursed(Place { disk: disk.clone() }), &disk).await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert_eq!((app.host().await, seeder.owns()), (None, false));
    let Unsettled::Owed(owed) = left.then else { panic!("nobody runs: {left:?}") };
    owed.abort().await.unwrap();
    assert_eq!((app.host().await, seeder.owns()), (Some("A"), true));
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_copying_does_not_wait_for_a_seeder_that_is_silent() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let link = Link::new(seeder, Step::Abort, Fault::Silence, 0, u32::MAX);
    let disk = Disk::new();
    let leecher = leech(&link, Place { disk: disk.clone() }, &disk).await.unwrap();
    disk.fill(true);
    leecher.ready().await.unwrap_err();
    let left = timeout(LONG, leecher.finalize()).await.expect("it comes to an end").unwrap_err();
    assert!(matches!(left.then, Unsettled::Returned), "{left:?}");
    assert_eq!(app.host().await, Some("A"));
}

#[tokio::test(start_paused = true)]
async fn epochs_that_cannot_be_are_refused_wherever_they_come_from() {
    let app = Application::new();
    let (here, seeder) = seed(&app, "A", &Disk::new()).await;
    let parts = SeederParts { epoch: Some(u64::MAX), ..SeederParts::default() };
    let error = Seeder::new(vec![("a".into(), here.guarded.clone())], parts).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let link = Link::healthy(seeder.clone());
    let (leecher, disk) = ready(&link).await;
    link.lies.lock().unwrap().epoch = Some(MAX_EPOCH + 1);
    let error = leech(&link, Place { disk: Disk::new() }, &Disk::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let left = leecher.finalize().await.unwrap_err();
    assert_eq!(left.error.kind(), ErrorKind::Corrupt, "{left}");
    assert!(matches!(left.then, Unsettled::Returned) && seeder.owns(), "{left:?}");
    assert!(matches!(Ledger::load(&*disk).unwrap(), Some(Standing::Asking { .. })));
    assert_eq!(app.host().await, Some("A"));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_absurdly_short_keeps_nobody_busy() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let link = Link::healthy(seeder.clone());
    link.lies.lock().unwrap().lease = Some(Duration::from_millis(1));
    let (_leecher, _) = ready(&link).await;
    let rounds = || seeder.progress().borrow().rounds;
    let before = rounds();
    sleep(Duration::from_secs(10)).await;
    let asked = rounds() - before;
    assert!(asked > 1 && asked <= 101, "asked {asked} times in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn of_those_who_have_one_name_only_the_first_gets_the_region() {
    let (app, disk, name) = (Application::new(), Disk::new(), fresh_id());
    let (here, seeder) = seed(&app, "A", &disk).await;
    let calls = seeder.admit(b"").unwrap();
    for _ in ["the first", "the second"] {
        calls.track_for_ever(name).await.unwrap();
    }
    calls.finalize_once(name, 0).await.unwrap();
    assert_eq!(calls.finalize_once(name, 0).await.unwrap_err().kind(), ErrorKind::Conflict);
    here.kill();
    let (_here, again) = seed(&app, "A", &disk).await;
    let calls = again.admit(b"").unwrap();
    assert_eq!(calls.finalize_once(name, 0).await.unwrap_err().kind(), ErrorKind::Conflict, "nor after a restart");
    calls.confirm(name).await.unwrap();
}
