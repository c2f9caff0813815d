//! Regions that a person takes back in the belief that the leecher is gone for ever, when it is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use r3map_core::{Error, ErrorKind};
use r3map_migrate::protocol::Description;
use r3map_migrate::{Hooks, Ledger, Leecher, LeecherParts, Running, Seeder, SeederParts, Standing};
use tokio::time::{sleep, timeout};

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, seed};
use crate::support::link::{End, Fault, Link, Step};
use crate::support::{fresh_id, settings};

const LONG: Duration = Duration::from_secs(600);

/// A region that was handed over from A to B, over a link on which one step of the rest does not arrive.
struct Handed {
    app: Arc<Application>,
    seeder: Seeder,
    link: Arc<Link>,
    /// Of B, with its ledger.
    disk: Arc<Disk>,
    running: Leecher<Running<Here>>,
    /// How often the application was told to stop on B.
    told: Arc<AtomicU32>,
    _there: Here,
}

async fn handed_over(step: Step) -> Handed {
    let (app, disk, told) = (Application::new(), Disk::new(), Arc::new(AtomicU32::new(0)));
    let (there, seeder) = seed(&app, "A", &Disk::new()).await;
    app.write(5).await;
    let link = Link::new(seeder.clone(), step, Fault::LinkCut, 0, u32::MAX);
    let place = Place { disk: disk.clone() };
    let targets = async move |_: &Description| Ok(vec![place]);
    let count = told.clone();
    let hooks = Hooks::default().on_suspend(move || {
        count.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    });
    let parts = LeecherParts { hooks, ledger: Some(disk.clone()), ..LeecherParts::default() };
    let leecher = Leecher::start(Arc::new(End(link.clone())), fresh_id(), targets, settings(), parts).await.unwrap();
    let running = leecher.finalize().await.unwrap();
    Handed { app, seeder, link, disk, running, told, _there: there }
}

impl Handed {
    fn told(&self) -> u32 {
        self.told.load(Ordering::SeqCst)
    }

    async fn write_here(&self) -> r3map_core::Result<()> {
        self.running.regions()[0].guarded.front().write_at(0, &[1; 4096]).await
    }

    /// The application runs on A again, and cannot here; nor can it when this process has ended.
    async fn is_stopped_here(&self) {
        let lost = timeout(LONG, self.running.taken_back()).await.expect("it hears of it");
        says_so(&lost);
        says_so(&self.running.confirmed().unwrap_err());
        says_so(&self.running.pulled().await.unwrap_err());
        assert_eq!((self.told(), self.app.host().await), (1, Some("A")));
        self.write_here().await.expect_err("it may run over there");
        let standing = Ledger::load(&*self.disk).unwrap().unwrap();
        assert!(matches!(standing, Standing::Arrived { epoch: 2, .. }), "{standing:?}");
        self.app.check().await.unwrap();
    }
}

fn says_so(error: &Error) {
    assert!(error.kind() == ErrorKind::Conflict && error.to_string().contains("taken the region back"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_leecher_that_lives_is_stopped_when_it_reads_what_it_does_not_have_any_more() {
    let handed = handed_over(Step::ReadAfter).await;
    handed.write_here().await.unwrap();
    handed.seeder.take_back().await.unwrap();
    handed.app.write(5).await;
    sleep(LONG).await;
    handed.write_here().await.expect("it can hear of nothing");
    handed.link.heal();
    handed.is_stopped_here().await;
}

#[tokio::test(start_paused = true)]
async fn so_is_one_that_has_everything_when_it_says_so() {
    let handed = handed_over(Step::Confirm).await;
    timeout(LONG, handed.running.pulled()).await.unwrap().unwrap();
    assert!(matches!(Ledger::load(&*handed.disk).unwrap(), Some(Standing::Owner { .. })));
    handed.seeder.take_back().await.unwrap();
    sleep(LONG).await;
    handed.write_here().await.expect("it can hear of nothing");
    handed.link.heal();
    handed.is_stopped_here().await;
}

/// A seeder that is started anew knows from its ledger whom it took the region back from.
#[tokio::test(start_paused = true)]
async fn so_it_is_by_a_seeder_that_was_started_again() {
    let handed = handed_over(Step::ReadAfter).await;
    handed.seeder.take_back().await.unwrap();
    let ledger = Disk::new();
    let Standing::Arrived { id, .. } = Ledger::load(&*handed.disk).unwrap().unwrap() else { panic!("it is here") };
    ledger.save(&Standing::Owner { epoch: 3, revoked: Some(id) }).unwrap();
    let (_there, again) = seed(&handed.app, "A", &ledger).await;
    handed.link.connect(Some(again));
    handed.link.heal();
    let lost = timeout(LONG, handed.running.taken_back()).await.expect("it hears of it");
    says_so(&lost);
    handed.write_here().await.expect_err("it may run over there");
}

/// Who answers in the place of the seeder may be anybody: another region's, by the same address.
#[tokio::test(start_paused = true)]
async fn a_stranger_who_refuses_stops_nobody() {
    let handed = handed_over(Step::Confirm).await;
    timeout(LONG, handed.running.pulled()).await.unwrap().unwrap();
    let (_other, stranger) = seed(&Application::new(), "X", &Disk::new()).await;
    handed.link.connect(Some(stranger));
    handed.link.heal();
    let refused = timeout(LONG, handed.running.former().told()).await.unwrap().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    handed.write_here().await.unwrap();
    assert_eq!(handed.told(), 0);
    assert!(matches!(Ledger::load(&*handed.disk).unwrap(), Some(Standing::Owner { .. })));
}

/// Whoever has the region now cannot be told.
#[tokio::test(start_paused = true)]
async fn who_has_passed_it_on_says_that_it_was_taken_back() {
    let handed = handed_over(Step::Confirm).await;
    let (told, link) = (handed.told.clone(), handed.link.clone());
    let (regions, next, mut former) =
        handed.running.release(vec!["disk".into()], SeederParts::default()).await.unwrap();
    handed.seeder.take_back().await.unwrap();
    link.heal();
    says_so(&timeout(LONG, former.told()).await.unwrap().unwrap_err());
    assert_eq!(told.load(Ordering::SeqCst), 0);
    regions[0].guarded.front().write_at(0, &[1]).await.unwrap();
    assert!(next.owns());
}
