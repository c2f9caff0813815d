//! A leecher that is started again before it was finalized goes on from where it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use r3map_core::{BLOCK_SIZE, ErrorKind, Result};
use r3map_migrate::protocol::Description;
use r3map_migrate::{Ledger, Leecher, LeecherParts, Pulling, Running, Seeder, SeederPhase, Standing};
use tokio::time::{sleep, timeout};

use crate::support::application::Application;
use crate::support::disk::{Disk, Life};
use crate::support::host::{Here, Place, seed};
use crate::support::link::{Fault, Link, MortalEnd, Step};
use crate::support::{LEASE, SIZE, chunk_by_chunk, fresh_id, geometry, settings};

const LONG: Duration = Duration::from_secs(600);

/// A process of the leecher.
struct Process {
    link: Arc<Link>,
    disk: Arc<Disk>,
    life: Arc<Life>,
}

impl Process {
    fn new(link: &Arc<Link>, disk: &Disk, steps: u64) -> Self {
        let life = Life::of(steps);
        Self { link: link.clone(), disk: disk.in_process(&life), life }
    }

    fn peer(&self) -> Arc<MortalEnd> {
        Arc::new(MortalEnd(self.link.clone(), self.life.clone()))
    }

    fn parts(&self) -> LeecherParts {
        LeecherParts { ledger: Some(self.disk.clone()), ..LeecherParts::default() }
    }

    async fn leech(&self) -> Result<Leecher<Pulling<Place>>> {
        let disk = self.disk.clone();
        let targets = async move |_: &Description| Ok(vec![Place { disk }]);
        let (peer, parts) = (self.peer(), self.parts());
        match Ledger::load(&*self.disk)? {
            Some(standing) => Leecher::go_on(peer, &standing, targets, chunk_by_chunk(), parts).await,
            None => Leecher::start(peer, fresh_id(), targets, chunk_by_chunk(), parts).await,
        }
    }

    async fn resume(&self, standing: &Standing) -> Result<Option<Leecher<Running<Here>>>> {
        let disk = self.disk.clone();
        let targets = async move |_: &Description| Ok(vec![Place { disk }]);
        Leecher::<Pulling<Place>>::resume(self.peer(), standing, targets, chunk_by_chunk(), self.parts()).await
    }

    /// Leeches until it is killed, or ready.
    async fn until_killed(&self) {
        self.killed_together_with(()).await;
    }

    async fn killed_together_with(&self, other: impl Sized) {
        let ready = async {
            // The error of one that was killed is nobody's.
            if let Ok(leecher) = self.leech().await {
                let _ = leecher.ready().await;
            }
        };
        tokio::select! {
            () = ready => {}
            () = self.life.killed() => {}
        }
        self.life.kill();
        drop(other);
        sleep(Duration::from_secs(1)).await;
    }
}

/// An application that has written to all blocks, and rests.
async fn resting() -> (Arc<Application>, Here, Seeder) {
    let app = Application::new();
    let (here, seeder) = seed(&app, "A", &Disk::new()).await;
    for block in 0..geometry().block_count() {
        app.write(block).await;
    }
    (app, here, seeder)
}

async fn finish(app: &Application, leecher: Leecher<Pulling<Place>>) {
    leecher.ready().await.unwrap();
    let running = leecher.finalize().await.unwrap();
    app.suspend("A").await;
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}

/// Whether the first process was killed by itself.
async fn resumes_after(steps: u64) -> bool {
    let (app, _here, seeder) = resting().await;
    let (link, disk) = (Link::healthy(seeder), Disk::new());
    let first = Process::new(&link, &disk, steps);
    timeout(LONG, first.until_killed()).await.unwrap();
    let (kept, read) = (disk.present().len() * BLOCK_SIZE, link.read.load(Ordering::SeqCst));
    assert!(read.saturating_sub(kept) <= 2 * geometry().chunk_size().bytes(), "{steps}: {read} bytes, {kept} kept");
    let again = Process::new(&link, &disk, u64::MAX);
    let leecher = again.leech().await.unwrap();
    finish(&app, leecher).await;
    let twice = link.read.load(Ordering::SeqCst) - SIZE;
    assert!(twice <= 2 * geometry().chunk_size().bytes(), "killed after {steps} steps it pulled {twice} bytes again");
    first.life.ran_out()
}

/// What was under way is one chunk, and maybe one that was put in place and not written down.
#[tokio::test(start_paused = true)]
async fn what_was_written_down_is_not_pulled_again() {
    let mut steps = 0;
    while resumes_after(steps).await {
        steps += 1;
    }
    assert!(steps > 30, "it does more than {steps} things");
}

/// The application writes until the leecher is killed, and not after: whatever a record named that was taken before is
/// named no more.
#[tokio::test(start_paused = true)]
async fn no_record_is_lost_with_a_process_that_is_killed_after_whatever_it_does_to_its_disk() {
    let mut steps = 0;
    loop {
        let (app, _here, seeder) = resting().await;
        let (link, disk) = (Link::healthy(seeder), Disk::new());
        let first = Process::new(&link, &disk, steps);
        timeout(LONG, first.killed_together_with(app.start(steps, Duration::from_millis(3)))).await.unwrap();
        let leecher = Process::new(&link, &disk, u64::MAX).leech().await.unwrap();
        assert_eq!(leecher.progress().borrow().restarts, 0);
        finish(&app, leecher).await;
        if !first.life.ran_out() {
            break;
        }
        steps += 1;
    }
    assert!(steps > 50, "it does more than {steps} things");
}

/// A chunk that is written to while it is pulled may be torn, and is named only by the record after that: a process that
/// was killed in between must ask for it before anything else.
#[tokio::test(start_paused = true)]
async fn what_was_written_while_the_leecher_was_dead_is_pulled_again() {
    let (app, _here, seeder) = resting().await;
    let (link, disk) = (Link::healthy(seeder), Disk::new());
    let first = Process::new(&link, &disk, u64::MAX);
    let leecher = first.leech().await.unwrap();
    leecher.ready().await.unwrap();
    first.life.kill();
    drop(leecher);
    let written = [0, 7, 8, 61];
    for block in written {
        app.write(block).await;
    }
    let before = link.read.load(Ordering::SeqCst);
    let again = Process::new(&link, &disk, u64::MAX);
    finish(&app, again.leech().await.unwrap()).await;
    let pulled = link.read.load(Ordering::SeqCst) - before;
    assert!(pulled <= written.len() as u64 * geometry().chunk_size().bytes(), "{pulled} bytes");
}

/// The reply with a record is lost with the process that asked for it.
#[tokio::test(start_paused = true)]
async fn a_record_that_was_taken_and_never_arrived_is_asked_for_again() {
    for round in 0..3 {
        let (app, _here, seeder) = resting().await;
        let link = Link::new(seeder, Step::Dirty, Fault::LeecherKilled { before: false }, round, 1);
        let disk = Disk::new();
        let writing = app.start(u64::from(round), Duration::from_millis(3));
        let first = Process::new(&link, &disk, u64::MAX);
        let leecher = first.leech().await.unwrap();
        timeout(LONG, link.kill_leecher.notified()).await.unwrap();
        first.life.kill();
        drop(leecher);
        drop(writing);
        let standing = Ledger::load(&*disk).unwrap();
        assert!(
            matches!(standing, Some(Standing::Pulling { rounds, .. }) if rounds == u64::from(round)),
            "{standing:?}"
        );
        let again = Process::new(&link, &disk, u64::MAX);
        let leecher = again.leech().await.unwrap();
        assert_eq!(leecher.progress().borrow().restarts, 0);
        finish(&app, leecher).await;
    }
}

/// A seeder that was started anew knows nothing of what was written before.
#[tokio::test(start_paused = true)]
async fn where_the_seeder_no_longer_records_everything_is_copied_again() {
    let (app, _here, seeder) = resting().await;
    let (link, disk) = (Link::healthy(seeder.clone()), Disk::new());
    Process::new(&link, &disk, u64::MAX).until_killed().await;
    seeder.stop_tracking().await.unwrap();
    app.write(5).await;
    let before = link.read.load(Ordering::SeqCst);
    let again = Process::new(&link, &disk, u64::MAX);
    let leecher = again.leech().await.unwrap();
    assert_eq!(leecher.progress().borrow().restarts, 1);
    leecher.ready().await.unwrap();
    assert_eq!(link.read.load(Ordering::SeqCst) - before, SIZE);
    finish(&app, leecher).await;
}

/// A process that is killed when it has asked to finalize, which does not arrive before it is dead for a while; and what
/// the ledger says.
async fn dies_asking(link: &Arc<Link>, disk: &Disk) -> (Process, Standing) {
    let process = Process::new(link, disk, u64::MAX);
    let asking = async {
        let leecher = process.leech().await.unwrap();
        leecher.ready().await.unwrap();
        let _ = leecher.finalize().await;
    };
    tokio::select! {
        () = asking => panic!("it is killed before"),
        () = link.kill_leecher.notified() => process.life.kill(),
    }
    let standing = Ledger::load(disk).unwrap().unwrap();
    assert!(matches!(standing, Standing::Asking { .. }), "{standing:?}");
    (process, standing)
}

#[tokio::test(start_paused = true)]
async fn one_who_was_killed_while_he_asked_in_vain_goes_on_copying() {
    let (app, _here, seeder) = resting().await;
    let link = Link::new(seeder.clone(), Step::Finalize, Fault::LateOfTheDead, 0, 1);
    let disk = Disk::new();
    let (_first, standing) = dies_asking(&link, &disk).await;
    let again = Process::new(&link, &disk, u64::MAX);
    assert!(again.resume(&standing).await.unwrap().is_none(), "it is still over there");
    let read = link.read.load(Ordering::SeqCst);
    let leecher = again.leech().await.unwrap();
    leecher.ready().await.unwrap();
    assert_eq!(link.read.load(Ordering::SeqCst), read, "everything is here");
    sleep(Duration::from_secs(5)).await;
    assert!(seeder.owns(), "what the dead one asked for came too late");
    finish(&app, leecher).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_dead_one_has_asked_for_is_undone_by_the_one_who_goes_on() {
    let (app, _here, seeder) = resting().await;
    let link = Link::new(seeder.clone(), Step::Finalize, Fault::LateOfTheDead, 0, 1);
    let disk = Disk::new();
    let (first, standing) = dies_asking(&link, &disk).await;
    drop(first);
    let again = Process::new(&link, &disk, u64::MAX);
    assert!(again.resume(&standing).await.unwrap().is_none(), "it is still over there");
    let handed_over = async {
        let mut progress = seeder.progress();
        progress.wait_for(|progress| progress.phase == SeederPhase::HandedOver).await.unwrap();
    };
    timeout(LONG, handed_over).await.unwrap();
    let leecher = again.leech().await.unwrap();
    assert_eq!((leecher.progress().borrow().restarts, app.host().await), (1, Some("A")));
    app.write(9).await;
    finish(&app, leecher).await;
    assert_eq!((seeder.progress().borrow().phase, seeder.progress().borrow().epoch), (SeederPhase::Gone, 4));
}

/// A place that was written to since is none for a region that has not arrived, whatever its seeder can say of what was
/// written: it is another region's, which may be nowhere else.
#[tokio::test(start_paused = true)]
async fn a_place_in_which_the_application_has_written_is_refused() {
    for go in [false, true] {
        let (app, _here, seeder) = resting().await;
        let (link, disk) = (Link::healthy(seeder), Disk::new());
        link.lies.lock().unwrap().go = go;
        Process::new(&link, &disk, u64::MAX).until_killed().await;
        let standing = Ledger::load(&*disk).unwrap().unwrap();
        let Standing::Pulling { id, rounds } = standing else { panic!("{standing:?}") };
        let own = Here::whole(&disk).await;
        own.guarded.front().write_at(0, &[1]).await.unwrap();
        let (own, present) = (disk.own(), disk.present());
        assert!(!own.is_empty());
        let refused = Process::new(&link, &disk, u64::MAX).leech().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
        assert_eq!(Ledger::load(&*disk).unwrap(), Some(standing));
        assert_eq!((disk.own(), disk.present()), (own.clone(), present.clone()), "nothing of it is forgotten");
        // Nor where the regions were asked for, nor by one who begins.
        link.seeder().unwrap().admit(b"").unwrap().finalize(id, rounds).await.unwrap();
        let process = Process::new(&link, &disk, u64::MAX);
        let refused = process.resume(&Standing::Asking { id, rounds }).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
        let place = Place { disk: disk.clone() };
        let targets = async move |_: &Description| Ok(vec![place]);
        let begun = Leecher::start(process.peer(), fresh_id(), targets, settings(), LeecherParts::default()).await;
        assert_eq!(begun.unwrap_err().kind(), ErrorKind::Conflict);
        assert_eq!((disk.own(), disk.present()), (own, present), "nothing of it is forgotten");
        drop(app);
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_lease_it_begins_again() {
    let (app, _here, seeder) = resting().await;
    let (link, disk) = (Link::healthy(seeder.clone()), Disk::new());
    for (dead, restarts) in [(LEASE / 2, 0), (2 * LEASE, 1)] {
        Process::new(&link, &disk, u64::MAX).until_killed().await;
        sleep(dead).await;
        let tracked = seeder.progress().borrow().phase == SeederPhase::Tracked;
        assert_eq!(tracked, restarts == 0);
        let again = Process::new(&link, &disk, u64::MAX);
        let leecher = again.leech().await.unwrap();
        assert_eq!(leecher.progress().borrow().restarts, restarts);
        again.life.kill();
        drop(leecher);
        sleep(Duration::from_secs(1)).await;
    }
    app.write(3).await;
    finish(&app, Process::new(&link, &disk, u64::MAX).leech().await.unwrap()).await;
}

/// A person said that the leecher would never run again, and the application has gone on over there.
#[tokio::test(start_paused = true)]
async fn what_was_taken_back_over_there_does_not_run_here_again() {
    let (app, _here, seeder) = resting().await;
    let (link, disk) = (Link::new(seeder.clone(), Step::ReadAfter, Fault::LinkCut, 1, u32::MAX), Disk::new());
    let first = Process::new(&link, &disk, u64::MAX);
    drop(first.leech().await.unwrap().finalize().await.unwrap());
    first.life.kill();
    let standing = Ledger::load(&*disk).unwrap().unwrap();
    assert!(matches!(standing, Standing::Arrived { epoch: 2, .. }), "{standing:?}");
    seeder.take_back().await.unwrap();
    assert_eq!(app.host().await, Some("A"));
    link.heal();
    let refused = Process::new(&link, &disk, u64::MAX).resume(&standing).await.unwrap_err();
    assert!(
        refused.kind() == ErrorKind::Conflict && refused.to_string().contains("taken the region back"),
        "{refused}"
    );
    assert_eq!(Ledger::load(&*disk).unwrap(), Some(standing), "what is here is for whoever has a look at it");
}

/// One without a ledger that is started anew takes itself for the owner, in the epoch before the handover.
#[tokio::test(start_paused = true)]
async fn where_the_seeder_has_forgotten_the_handover_the_leecher_does_not_run_too() {
    let (app, there, disk) = (Application::new(), Disk::new(), Disk::new());
    let (here, seeder) = seed(&app, "A", &there).await;
    let link = Link::new(seeder, Step::ReadAfter, Fault::LinkCut, 1, u32::MAX);
    let first = Process::new(&link, &disk, u64::MAX);
    drop(first.leech().await.unwrap().finalize().await.unwrap());
    first.life.kill();
    let standing = Ledger::load(&*disk).unwrap().unwrap();
    here.kill();
    there.erase();
    let (_here, again) = seed(&app, "A", &there).await;
    assert!(again.owns() && again.progress().borrow().epoch == 1);
    link.connect(Some(again));
    link.heal();
    let resumed = async || Process::new(&link, &disk, u64::MAX).resume(&standing).await;
    let refused = resumed().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused}");
    assert_eq!(Ledger::load(&*disk).unwrap().as_ref(), Some(&standing));
    // Those in Go know of no epoch: theirs is always the first.
    link.lies.lock().unwrap().go = true;
    assert!(resumed().await.unwrap().is_some());
}
