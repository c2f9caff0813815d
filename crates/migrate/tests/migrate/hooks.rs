//! Hooks that hang, and hooks that panic: nobody waits for them for ever, and everything else goes its way.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation};
use r3map_migrate::protocol::Description;
use r3map_migrate::{
    FinalizeError, Hooks, Leecher, LeecherParts, Pulling, Running, Seeder, SeederParts, SeederPhase, Unsettled,
};
use tokio::time::timeout;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, seed};
use crate::support::link::{End, Link};
use crate::support::{fresh_id, settings};

const LONG: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(3);

async fn seeding(hooks: Hooks) -> (Here, Seeder) {
    let (here, _) = seed(&Application::new(), "A", &Disk::new()).await;
    let parts = SeederParts { hooks, limit: Some(LIMIT), ..SeederParts::default() };
    let seeder = Seeder::new(vec![("a".into(), here.guarded.clone())], parts).await.unwrap();
    (here, seeder)
}

/// Moves the application as soon as it can be.
async fn moved(seeder: &Seeder, hooks: Hooks) -> Result<Leecher<Running<Here>>, FinalizeError<Place>> {
    let parts = LeecherParts { hooks, limit: Some(LIMIT), ..LeecherParts::default() };
    let targets = async |_: &Description| Ok(vec![Place { disk: Disk::new() }]);
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher: Leecher<Pulling<Place>> = Leecher::start(peer, fresh_id(), targets, settings(), parts).await.unwrap();
    timeout(LONG, leecher.finalize()).await.expect("it comes to an end")
}

fn refuses() -> Hooks {
    Hooks::default()
        .on_suspend(|| async { Err(Error::new(ErrorKind::Exhausted, Operation::Close, "in the middle of something")) })
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_come_back_blocks_no_call() {
    let (here, seeder) = seeding(refuses().on_resume(pending)).await;
    let left = moved(&seeder, Hooks::default()).await.unwrap_err();
    assert!(left.error.to_string().contains("in the middle of something"), "{left}");
    assert!(matches!(left.then, Unsettled::Refused(_)), "{left:?}");
    timeout(LONG, seeder.stop_tracking()).await.expect("the next call goes its way").unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Owner);
    here.guarded.front().write_at(0, &[1]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hook_before_closing_that_hangs_keeps_nobody_from_going() {
    let (_here, seeder) = seeding(Hooks::default().on_before_close(pending)).await;
    let running = moved(&seeder, Hooks::default()).await.unwrap();
    running.pulled().await.unwrap();
    let gone = timeout(LONG, seeder.gone()).await.expect("it ends");
    assert_eq!(gone.phase, SeederPhase::Gone);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_start_over_there_has_its_region_there_all_the_same() {
    type Hang = fn() -> std::future::Pending<r3map_core::Result<()>>;
    let panics: Hang = || panic!("a hook that panics");
    for (hook, why) in [(pending as Hang, "longer than 3s"), (panics, "panicked")] {
        let (_here, seeder) = seeding(Hooks::default()).await;
        let running = moved(&seeder, Hooks::default().on_resume(hook)).await.unwrap();
        let error = running.resumed().unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        running.pulled().await.unwrap();
        running.regions()[0].guarded.front().write_at(0, &[1]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_hook_that_panics_the_application_is_resumed() {
    let resumed = Arc::new(AtomicU32::new(0));
    let counts = resumed.clone();
    let panics = Hooks::default().on_suspend(|| async { panic!("a hook that panics") }).on_resume(move || {
        counts.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    });
    let (here, seeder) = seeding(panics).await;
    let left = moved(&seeder, Hooks::default()).await.unwrap_err();
    assert!(matches!(left.then, Unsettled::Refused(_)), "{left:?}");
    assert!(seeder.owns() && seeder.progress().borrow().phase == SeederPhase::Tracked);
    assert_eq!(resumed.load(Ordering::SeqCst), 1);
    here.guarded.front().write_at(0, &[1]).await.unwrap();
}
