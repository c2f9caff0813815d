//! What is not allowed, and what a seeder says no to.

use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation};
use r3map_migrate::{Hooks, Leecher, LeecherParts, Secret, Seeder, SeederParts, SeederPhase, Unsettled};

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Place, seed};
use crate::support::link::{End, Fault, Link, Step};
use crate::support::{fresh_id, settings};

fn place() -> impl AsyncFnOnce(&r3map_migrate::protocol::Description) -> r3map_core::Result<Vec<Place>> {
    async |_: &_| Ok(vec![Place { disk: Disk::new() }])
}

#[tokio::test]
async fn only_who_knows_the_secret_is_let_in() {
    let app = Application::new();
    let (here, _) = seed(&app, "A", &Disk::new()).await;
    let parts = SeederParts { secret: Some(Secret::new("open sesame")), ..SeederParts::default() };
    let seeder = Seeder::new(vec![("a".into(), here.guarded.clone() as _)], parts).await.unwrap();
    assert!(seeder.admit(b"open sesame").is_ok());
    for wrong in [&b""[..], b"open", b"open sesamo"] {
        assert_eq!(seeder.admit(wrong).err().unwrap().kind(), ErrorKind::Denied);
    }
    let peer = Arc::new(End(Link::healthy(seeder)));
    let error = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_cannot_stop_is_not_moved_and_the_copying_goes_on() {
    let app = Application::new();
    let (here, _) = seed(&app, "A", &Disk::new()).await;
    let stubborn = std::sync::atomic::AtomicBool::new(true);
    let stubborn = Arc::new(stubborn);
    let asked = stubborn.clone();
    let hooks = Hooks::default().on_suspend(move || {
        let refuses = asked.swap(false, std::sync::atomic::Ordering::SeqCst);
        async move {
            match refuses {
                true => Err(Error::new(ErrorKind::Unavailable, Operation::Close, "in the middle of something")),
                false => Ok(()),
            }
        }
    });
    let parts = SeederParts { hooks, ..SeederParts::default() };
    let seeder = Seeder::new(vec![("a".into(), here.guarded.clone() as _)], parts).await.unwrap();
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap();
    leecher.ready().await.unwrap();
    here.guarded.front().write_at(5 * 4096, &[7; 10]).await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(left.error.to_string().contains("in the middle of something"), "{left}");
    here.guarded.front().write_at(0, &[8]).await.expect("it goes on over there");
    let Unsettled::Refused(leecher) = left.then else { panic!("it was refused: {:?}", left.then) };
    leecher.ready().await.unwrap();
    let running = leecher.finalize().await.unwrap();
    let mut bytes = [0; 1];
    for (offset, expected) in [(5 * 4096 + 9, 7), (0, 8)] {
        running.regions()[0].guarded.front().read_at(offset, &mut bytes).await.unwrap();
        assert_eq!(bytes, [expected]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_application_that_does_not_stop_in_time_is_not_moved() {
    let app = Application::new();
    let (here, _) = seed(&app, "A", &Disk::new()).await;
    let hooks = Hooks::default().on_suspend(std::future::pending);
    let parts = SeederParts { hooks, limit: Some(Duration::from_secs(3)), ..SeederParts::default() };
    let seeder = Seeder::new(vec![("a".into(), here.guarded.clone() as _)], parts).await.unwrap();
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(left.error.to_string().contains("longer than 3s"), "{left}");
    assert!(matches!(left.then, Unsettled::Refused(_)) && seeder.owns());
    here.guarded.front().write_at(0, &[8]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_goes_on_writing_after_the_handover_is_refused() {
    let app = Application::new();
    let (here, seeder) = seed(&app, "A", &Disk::new()).await;
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap();
    let running = leecher.finalize().await.unwrap();
    let error = here.guarded.front().write_at(0, &[1]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    running.regions()[0].guarded.front().write_at(0, &[2]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_second_leecher_takes_over_and_the_first_gets_nothing() {
    let app = Application::new();
    let (_here, seeder) = seed(&app, "A", &Disk::new()).await;
    let start = async || {
        let peer = Arc::new(End(Link::healthy(seeder.clone())));
        Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await
    };
    let first = start().await.unwrap();
    first.ready().await.unwrap();
    let second = start().await.unwrap();
    second.ready().await.unwrap();
    let left = first.finalize().await.unwrap_err();
    assert_eq!(left.error.kind(), ErrorKind::Conflict, "{left}");
    let running = second.finalize().await.unwrap();
    running.pulled().await.unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Gone);
    assert_eq!(start().await.unwrap_err().kind(), ErrorKind::Conflict, "it is somewhere else");
}

#[tokio::test(start_paused = true)]
async fn a_person_can_take_back_what_a_leecher_never_got() {
    let app = Application::new();
    let (here, seeder) = seed(&app, "A", &Disk::new()).await;
    assert!(seeder.take_back().await.is_err(), "nothing was handed over");
    let link = Link::new(seeder.clone(), Step::Finalize, Fault::SilentReply, 0, 1000);
    let peer = Arc::new(End(link));
    let leecher = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert!(matches!(left.then, Unsettled::Unknown(_)), "{left}");
    assert!(!seeder.owns() && here.guarded.front().write_at(0, &[1]).await.is_err());
    seeder.take_back().await.unwrap();
    assert!(seeder.owns() && seeder.progress().borrow().epoch == 3);
    here.guarded.front().write_at(0, &[1]).await.unwrap();
    let Unsettled::Unknown(leecher) = left.then else { panic!() };
    let left = leecher.finalize().await.unwrap_err();
    assert!(!matches!(left.then, Unsettled::Returned), "it never gets it");
}

#[tokio::test(start_paused = true)]
async fn a_ledger_that_cannot_be_written_hands_nothing_over() {
    let app = Application::new();
    let disk = Disk::new();
    let (here, seeder) = seed(&app, "A", &disk).await;
    disk.fail_ledger(0, 1);
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher = Leecher::start(peer, fresh_id(), place(), settings(), LeecherParts::default()).await.unwrap();
    let left = leecher.finalize().await.unwrap_err();
    assert_eq!(left.error.kind(), ErrorKind::Cancelled, "{left}");
    assert!(seeder.owns());
    here.guarded.front().write_at(0, &[1]).await.unwrap();
    let Unsettled::Refused(leecher) = left.then else { panic!() };
    leecher.finalize().await.unwrap();
}
