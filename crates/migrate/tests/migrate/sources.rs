//! What a seeder asks of what its regions stand on: how firmly writing is ended, and that nothing hangs when that panics or
//! hangs itself.

use std::future::pending;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Result};
use r3map_migrate::protocol::Description;
use r3map_migrate::{
    Arrival, Fencing, Guarded, Hooks, Ledger, Leecher, LeecherParts, Seeder, SeederParts, SeederPhase, Shown, Source,
    Standing, Target,
};
use r3map_pipeline::{BlockSet, Local, Progress, StateRecord};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, seed};
use crate::support::link::{End, Link};
use crate::support::{fresh_id, settings};

const LONG: Duration = Duration::from_secs(600);
const LIMIT: Duration = Duration::from_secs(3);

/// What a source, or a ledger, is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Track,
    Take,
    Untrack,
    Flush,
    Fence,
    Unfence,
    Ledger,
}

/// What goes wrong with it, once it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Panic,
    /// Before it is done.
    Hang,
}

/// A source that remembers how it was fenced, and fails as it is told to, each time once.
struct Watched {
    inner: Arc<Guarded>,
    fencings: Mutex<Vec<Fencing>>,
    faults: Mutex<Vec<(Call, Fault)>>,
}

impl Watched {
    fn new(inner: &Arc<Guarded>) -> Arc<Self> {
        Arc::new(Self { inner: inner.clone(), fencings: Mutex::default(), faults: Mutex::default() })
    }

    fn fails(&self, call: Call, fault: Fault) {
        self.faults.lock().unwrap().push((call, fault));
    }

    fn strikes(&self, call: Call, fault: Fault) -> bool {
        let mut faults = self.faults.lock().unwrap();
        let found = faults.iter().position(|planned| *planned == (call, fault));
        found.map(|found| faults.swap_remove(found)).is_some()
    }

    async fn hang(&self, call: Call) {
        if self.strikes(call, Fault::Hang) {
            pending().await
        }
    }

    fn panic(&self, call: Call) {
        assert!(!self.strikes(call, Fault::Panic), "it was told to panic");
    }

    /// Whether everything that it was told to do has happened.
    fn is_done(&self) -> bool {
        self.faults.lock().unwrap().is_empty()
    }
}

#[async_trait]
impl Source for Watched {
    fn backend(&self) -> Arc<dyn Backend> {
        self.inner.backend()
    }

    fn chunk_size(&self) -> ChunkSize {
        self.inner.chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.hang(Call::Track).await;
        self.panic(Call::Track);
        self.inner.track().await
    }

    async fn take(&self) -> Result<BlockSet> {
        self.hang(Call::Take).await;
        self.panic(Call::Take);
        self.inner.take().await
    }

    async fn untrack(&self) {
        self.hang(Call::Untrack).await;
        self.inner.untrack().await;
        self.panic(Call::Untrack);
    }

    async fn flush(&self) -> Result<()> {
        self.hang(Call::Flush).await;
        self.inner.flush().await
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        self.hang(Call::Fence).await;
        self.fencings.lock().unwrap().push(fencing);
        self.inner.fence(fencing).await?;
        self.panic(Call::Fence);
        Ok(())
    }

    async fn unfence(&self) {
        self.hang(Call::Unfence).await;
        self.inner.unfence().await;
        self.panic(Call::Unfence);
    }
}

/// A ledger that panics once what it is told is in it.
impl Ledger for Watched {
    fn load(&self) -> Result<Option<Standing>> {
        Ok(None)
    }

    fn save(&self, _: &Standing) -> Result<()> {
        self.panic(Call::Ledger);
        Ok(())
    }
}

async fn here() -> Here {
    seed(&Application::new(), "A", &Disk::new()).await.0
}

async fn watched() -> Arc<Watched> {
    Watched::new(&here().await.guarded)
}

async fn seeder(source: &Arc<Watched>, parts: SeederParts) -> Seeder {
    Seeder::new(vec![("a".into(), source.clone() as _)], parts).await.unwrap()
}

/// A hook that lets an application run, and how often it did.
fn counting() -> (Hooks, Arc<AtomicU32>) {
    let resumed = Arc::new(AtomicU32::new(0));
    let count = resumed.clone();
    let hooks = Hooks::default().on_resume(move || {
        count.fetch_add(1, Ordering::SeqCst);
        async { Ok(()) }
    });
    (hooks, resumed)
}

#[tokio::test]
async fn only_who_was_told_to_stop_is_trusted_to_have_stopped() {
    let told = || Hooks::default().on_suspend(async || Ok(()));
    for (hooks, set, fencing) in [
        (Hooks::default(), None, Fencing::Strict),
        (told(), None, Fencing::Trusting),
        (told(), Some(Fencing::Strict), Fencing::Strict),
        (Hooks::default(), Some(Fencing::Trusting), Fencing::Trusting),
    ] {
        let (source, id) = (watched().await, fresh_id());
        let seeder = seeder(&source, SeederParts { hooks, fencing: set, ..SeederParts::default() }).await;
        let calls = seeder.admit(b"").unwrap();
        calls.track(id, None).await.unwrap();
        calls.finalize(id, 0).await.unwrap();
        assert_eq!(*source.fencings.lock().unwrap(), [fencing]);
    }
}

#[tokio::test]
async fn whatever_panics_at_the_handover_the_application_goes_on() {
    // What lifts the fence is called only after something else.
    let places = [&[Call::Fence][..], &[Call::Take], &[Call::Take, Call::Unfence], &[Call::Ledger]];
    for place in places {
        let (source, id) = (watched().await, fresh_id());
        let (hooks, resumed) = counting();
        let seeder =
            seeder(&source, SeederParts { hooks, ledger: Some(source.clone()), ..SeederParts::default() }).await;
        let calls = seeder.admit(b"").unwrap();
        calls.track(id, None).await.unwrap();
        source.inner.front().write_at(0, &[1]).await.unwrap();
        place.iter().for_each(|call| source.fails(*call, Fault::Panic));
        assert_eq!(calls.finalize(id, 0).await.unwrap_err().kind(), ErrorKind::Cancelled, "{place:?}");
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked, "{place:?}");
        assert!(source.is_done() && resumed.load(Ordering::SeqCst) == 1, "{place:?}");
        source.inner.front().write_at(4096, &[1]).await.unwrap();
        let handover = calls.finalize(id, 0).await.unwrap();
        assert_eq!(handover.dirty[0].len(), 2, "nothing is forgotten, {place:?}");
    }
}

/// A call that must come to an end.
async fn ends<T>(call: impl Future<Output = T>) -> T {
    timeout(LONG, call).await.expect("it comes to an end")
}

fn given_up<T: std::fmt::Debug>(result: Result<T>) {
    let error: Error = result.unwrap_err();
    assert!(error.kind() == ErrorKind::Cancelled && error.to_string().contains("longer than 3s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn whatever_hangs_is_given_up_and_forgets_nothing() {
    let (source, id) = (watched().await, fresh_id());
    let (hooks, resumed) = counting();
    let seeder = seeder(&source, SeederParts { hooks, limit: Some(LIMIT), ..SeederParts::default() }).await;
    let calls = seeder.admit(b"").unwrap();
    source.fails(Call::Track, Fault::Hang);
    given_up(ends(calls.track(id, None)).await);
    calls.track(id, None).await.unwrap();
    let write = async |block: u64| source.inner.front().write_at(block << 12, &[1]).await;
    write(0).await.unwrap();
    source.fails(Call::Take, Fault::Hang);
    given_up(ends(calls.dirty(id, 1)).await);
    assert_eq!(calls.dirty(id, 1).await.unwrap()[0].len(), 1);
    for (done, call) in [(1, Call::Flush), (2, Call::Fence), (3, Call::Take)] {
        write(u64::from(done)).await.unwrap();
        source.fails(call, Fault::Hang);
        given_up(ends(calls.finalize(id, 1)).await);
        assert_eq!((seeder.progress().borrow().phase, resumed.load(Ordering::SeqCst)), (SeederPhase::Tracked, done));
    }
    // Now the application cannot write any more; it is told to go on all the same.
    source.fails(Call::Take, Fault::Hang);
    source.fails(Call::Unfence, Fault::Hang);
    given_up(ends(calls.finalize(id, 1)).await);
    assert_eq!((seeder.progress().borrow().phase, resumed.load(Ordering::SeqCst)), (SeederPhase::Tracked, 4));
    assert!(source.inner.is_fenced());
    source.fails(Call::Untrack, Fault::Hang);
    let handover = ends(calls.finalize(id, 1)).await.expect("it was handed over before that");
    assert_eq!(handover.dirty[0].len(), 3);
    source.fails(Call::Unfence, Fault::Hang);
    ends(calls.abort(id)).await.unwrap();
    assert!(source.is_done() && seeder.owns() && resumed.load(Ordering::SeqCst) == 5);
    calls.track(fresh_id(), None).await.unwrap();
    source.fails(Call::Untrack, Fault::Hang);
    ends(seeder.stop_tracking()).await.unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Owner);
}

#[tokio::test(start_paused = true)]
async fn one_region_that_hangs_or_panics_keeps_no_other_from_being_written() {
    for fault in [Fault::Hang, Fault::Panic] {
        let (bad, good, id) = (watched().await, watched().await, fresh_id());
        let regions = vec![("bad".into(), bad.clone() as _), ("good".into(), good.clone() as _)];
        let parts = SeederParts { limit: Some(LIMIT), ..SeederParts::default() };
        let seeder = Seeder::new(regions, parts).await.unwrap();
        let calls = seeder.admit(b"").unwrap();
        calls.track(id, None).await.unwrap();
        bad.fails(Call::Untrack, fault);
        bad.fails(Call::Unfence, fault);
        ends(calls.finalize(id, 0)).await.unwrap();
        assert!(good.inner.is_fenced());
        ends(calls.abort(id)).await.unwrap();
        assert!(bad.is_done() && !good.inner.is_fenced(), "{fault:?}");
    }
}

/// A leecher that comes has what was recorded for another forgotten, region by region.
#[tokio::test(start_paused = true)]
async fn where_a_panic_keeps_a_record_from_beginning_the_one_before_has_ended() {
    let (good, bad, id) = (watched().await, watched().await, fresh_id());
    let regions = vec![("good".into(), good.clone() as _), ("bad".into(), bad.clone() as _)];
    let seeder = Seeder::new(regions, SeederParts::default()).await.unwrap();
    let calls = seeder.admit(b"").unwrap();
    calls.track(id, None).await.unwrap();
    good.inner.front().write_at(0, &[1]).await.unwrap();
    bad.fails(Call::Track, Fault::Panic);
    calls.track(fresh_id(), None).await.unwrap_err();
    let error = calls.dirty(id, 1).await.expect_err("a record without what was written");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Owner);
    calls.track(fresh_id(), None).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_seeder_that_is_started_again_does_not_hang_where_its_region_does() {
    let (app, disk, id) = (Application::new(), Disk::new(), fresh_id());
    let (here, seeder) = seed(&app, "A", &disk).await;
    let calls = seeder.admit(b"").unwrap();
    calls.track(id, None).await.unwrap();
    calls.finalize(id, 0).await.unwrap();
    let source = Watched::new(&here.guarded);
    source.fails(Call::Fence, Fault::Hang);
    let parts = SeederParts { ledger: Some(disk), limit: Some(LIMIT), ..SeederParts::default() };
    given_up(ends(Seeder::new(vec![("a".into(), source as _)], parts)).await);
}

/// A place whose region hangs when it is to be opened.
struct Stuck(Place);

struct StuckHere(Here, Arc<Watched>);

#[async_trait]
impl Target for Stuck {
    type Shown = StuckHere;

    fn local(&self) -> Arc<dyn Local> {
        self.0.local()
    }

    fn record(&self) -> Option<Arc<dyn StateRecord>> {
        self.0.record()
    }

    async fn show(self, arrival: Arrival) -> Result<StuckHere> {
        let here = self.0.show(arrival).await?;
        let source = Watched::new(&here.guarded);
        source.fails(Call::Unfence, Fault::Hang);
        Ok(StuckHere(here, source))
    }
}

#[async_trait]
impl Shown for StuckHere {
    fn source(&self) -> Arc<dyn Source> {
        self.1.clone()
    }

    async fn pulled(&self) -> Result<()> {
        self.0.pulled().await
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.0.progress()
    }
}

#[tokio::test(start_paused = true)]
async fn a_region_that_arrives_and_hangs_is_there_all_the_same() {
    let (_there, seeder) = seed(&Application::new(), "A", &Disk::new()).await;
    let (hooks, resumed) = counting();
    let parts = LeecherParts { hooks, limit: Some(LIMIT), ..LeecherParts::default() };
    let targets = async |_: &Description| Ok(vec![Stuck(Place { disk: Disk::new() })]);
    let peer = Arc::new(End(Link::healthy(seeder)));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), parts).await.unwrap();
    let running = ends(leecher.finalize()).await.unwrap();
    given_up(running.resumed());
    assert_eq!(resumed.load(Ordering::SeqCst), 1);
    ends(running.pulled()).await.unwrap();
}
