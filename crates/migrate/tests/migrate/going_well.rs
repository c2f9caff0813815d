//! Migrations that nothing happens to.

use std::collections::BTreeSet;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use r3map_core::{BLOCK_SIZE, Backend, ChunkSize, ErrorKind, Result};
use r3map_migrate::{
    Arrival, Downtime, Fencing, Guarded, Hooks, Leecher, LeecherParts, LeecherSettings, Precopy, PullPhase, Pulling,
    Seeder, SeederParts, SeederPhase, Source, Target, Unconverged, Verdict,
};
use r3map_pipeline::{BlockSet, Local, Priority, Workers};
use tokio::time::timeout;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, hooks, seed};
use crate::support::link::{End, Link};
use crate::support::{fresh_id, geometry, settings};

async fn leech(link: &Arc<Link>, settings: LeecherSettings, parts: LeecherParts) -> Leecher<Pulling<Place>> {
    let disk = Disk::new();
    let targets = async move |_: &_| Ok(vec![Place { disk }]);
    Leecher::start(Arc::new(End(link.clone())), fresh_id(), targets, settings, parts).await.unwrap()
}

/// A busy application on host A, and a link to it.
async fn busy(pause: Duration) -> (Arc<Application>, impl Sized, Seeder, Arc<Link>) {
    let app = Application::new();
    let (here, seeder) = seed(&app, "A", &Disk::new()).await;
    let running = app.start(1, pause);
    tokio::time::sleep(pause * 200).await;
    let link = Link::healthy(seeder.clone());
    (app, (here, running), seeder, link)
}

#[tokio::test(start_paused = true)]
async fn the_application_goes_on_where_it_was_and_the_report_says_what_it_took() {
    let (app, _running, seeder, link) = busy(Duration::from_millis(3)).await;
    let leecher = leech(&link, settings(), LeecherParts::default()).await;
    let ready = leecher.ready().await.unwrap();
    assert_eq!((ready.phase, ready.size), (PullPhase::Ready, geometry().size()));
    assert!(app.refused() == 0 && app.host().await == Some("A"));
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked);
    let running = leecher.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    let report = running.pulled().await.unwrap();
    assert!(report.pulled_before >= ready.pulled && ready.pulled >= geometry().size(), "{report:?}");
    assert!(report.rounds >= 1 && report.downtime.total() >= Duration::from_millis(10), "{report:?}");
    assert!(report.downtime.total() < Duration::from_millis(30), "a round trip and little else: {report:?}");
    assert!(report.dirty <= report.pulled_after + 4096, "{report:?}");
    running.confirmed().unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Gone);
    tokio::time::sleep(Duration::from_secs(1)).await;
    app.check().await.unwrap();
    assert_eq!((app.refused(), app.host().await), (0, Some("B")));
}

/// A region on which flushing takes its time.
struct SlowToFlush(Arc<Guarded>);

#[async_trait]
impl Source for SlowToFlush {
    fn backend(&self) -> Arc<dyn Backend> {
        self.0.backend()
    }

    fn chunk_size(&self) -> ChunkSize {
        self.0.chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.0.track().await
    }

    async fn take(&self) -> Result<BlockSet> {
        self.0.take().await
    }

    async fn untrack(&self) {
        self.0.untrack().await;
    }

    async fn flush(&self) -> Result<()> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.0.flush().await
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        self.0.fence(fencing).await
    }

    async fn unfence(&self) {
        self.0.unfence().await;
    }
}

/// A hook that takes so many milliseconds.
fn takes(milliseconds: u64) -> impl Fn() -> BoxFuture<'static, Result<()>> + Send + Sync + 'static {
    move || {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            Ok(())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn the_report_tells_each_part_apart() {
    let here = Here::whole(&Disk::new()).await;
    let write = async |block: u64| here.guarded.front().write_at(block * BLOCK_SIZE, &[1; 4096]).await.unwrap();
    let parts = SeederParts { hooks: Hooks::default().on_suspend(takes(30)), ..SeederParts::default() };
    let regions = vec![("a".into(), Arc::new(SlowToFlush(here.guarded.clone())) as Arc<dyn Source>)];
    let link = Link::healthy(Seeder::new(regions, parts).await.unwrap());
    // It does not ask again by itself.
    let rarely = Precopy { recheck: Duration::from_secs(3600), ..settings().precopy };
    let parts = LeecherParts { hooks: Hooks::default().on_resume(takes(40)), ..LeecherParts::default() };
    let leecher = leech(&link, LeecherSettings { precopy: rarely, ..settings() }, parts).await;
    let ready = leecher.ready().await.unwrap();
    for block in [3, 30, 31] {
        write(block).await;
    }
    let running = leecher.finalize().await.unwrap();
    let report = running.pulled().await.unwrap();
    let Downtime { suspend, flush, round_trip, resume } = report.downtime;
    let parts = [suspend, flush, round_trip, resume].map(|part| part.as_millis());
    assert_eq!(parts, [30, 20, 10, 40], "the link takes 5 ms each way");
    assert_eq!(report.downtime.total(), suspend + flush + round_trip + resume);
    assert_eq!((report.size, report.rounds, ready.rounds, ready.dirty), (geometry().size(), 1, 1, 0));
    assert_eq!((report.pulled_before, report.pulled_after), (geometry().size(), 3 * BLOCK_SIZE));
    assert_eq!(report.dirty, 3 * BLOCK_SIZE);
    assert!(report.total >= report.downtime.total(), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn it_can_be_finalized_before_anything_was_pulled() {
    let (app, _running, _, link) = busy(Duration::from_millis(1)).await;
    let running = leech(&link, settings(), LeecherParts::default()).await.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    app.check().await.unwrap();
    running.pulled().await.unwrap();
    app.check().await.unwrap();
    assert_eq!(app.refused(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_application_that_writes_too_fast_is_moved_all_the_same_or_left_alone() {
    let fast = Duration::from_micros(20);
    let tight = |unconverged| {
        let precopy = Precopy { target: Duration::from_micros(1), unconverged, ..settings().precopy };
        LeecherSettings { precopy, ..settings() }
    };
    let (app, _running, seeder, link) = busy(fast).await;
    let leecher = leech(&link, tight(Unconverged::GiveUp), LeecherParts::default()).await;
    let error = leecher.ready().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    let left = leecher.finalize().await.unwrap_err();
    assert!(left.to_string().contains("runs on over there"), "{left}");
    assert_eq!((seeder.progress().borrow().phase, app.refused()), (SeederPhase::Owner, 0));

    let leecher = leech(&link, tight(Unconverged::Finalize), LeecherParts::default()).await;
    let ready = leecher.ready().await.unwrap();
    assert!(ready.verdict.is_some_and(Verdict::is_unconverged), "{ready:?}");
    let running = leecher.finalize().await.unwrap();
    app.resume("B", running.regions()[0].guarded.front()).await;
    running.pulled().await.unwrap();
    app.check().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn copying_ends_when_the_user_s_time_is_over() {
    let (_app, _running, _seeder, link) = busy(Duration::from_micros(20)).await;
    let (target, max_time) = (Duration::from_nanos(1), Some(Duration::from_millis(25)));
    let precopy = Precopy { target, max_time, ..settings().precopy };
    let leecher = leech(&link, LeecherSettings { precopy, ..settings() }, LeecherParts::default()).await;
    assert_eq!(leecher.ready().await.unwrap().verdict, Some(Verdict::Time));
}

/// A place that must be emptied where it is to be filled anew, as memory must.
struct Once {
    place: Place,
    /// Bytes that were taken back.
    taken_back: Arc<AtomicU64>,
}

#[async_trait]
impl Target for Once {
    type Shown = Here;

    fn local(&self) -> Arc<dyn Local> {
        self.place.local()
    }

    fn forget(&mut self, bytes: std::ops::Range<u64>) -> Result<()> {
        self.taken_back.fetch_add(bytes.end - bytes.start, Ordering::SeqCst);
        Ok(())
    }

    async fn show(self, arrival: Arrival) -> Result<Here> {
        self.place.show(arrival).await
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_written_is_taken_back_before_the_application_is_asked_to_stop() {
    let (_app, _running, _seeder, link) = busy(Duration::from_micros(100)).await;
    let precopy = Precopy { target: Duration::from_nanos(1), max_rounds: NonZeroU32::MIN, ..settings().precopy };
    let taken_back = Arc::new(AtomicU64::new(0));
    let target = Once { place: Place { disk: Disk::new() }, taken_back: taken_back.clone() };
    let targets = async move |_: &_| Ok(vec![target]);
    let settings = LeecherSettings { precopy, ..settings() };
    let peer = Arc::new(End(link.clone()));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings, LeecherParts::default()).await.unwrap();
    let ready = leecher.ready().await.unwrap();
    assert_eq!(ready.verdict, Some(Verdict::Rounds), "{ready:?}");
    assert!(ready.dirty > 0);
    assert_eq!(taken_back.load(Ordering::SeqCst), ready.dirty, "all of it was here");
}

#[tokio::test(start_paused = true)]
async fn hooks_are_called_in_their_order() {
    let app = Application::new();
    let disk = Disk::new();
    let (here, _) = seed(&app, "A", &disk).await;
    let told: Arc<Mutex<Vec<&str>>> = Arc::default();
    let tell = |what: &'static str| {
        let told = told.clone();
        move || {
            told.lock().unwrap().push(what);
            async { Ok(()) }
        }
    };
    let hooks_of = Hooks::default().on_suspend(tell("suspend")).on_before_close(tell("before close"));
    let parts = SeederParts { hooks: hooks_of, ..Default::default() };
    let seeder = Seeder::new(vec![("a".into(), here.guarded.clone() as _)], parts).await.unwrap();
    let chunks = Arc::new(AtomicU64::new(0));
    let counted = chunks.clone();
    let hooks = Hooks::default().on_resume(tell("resume")).on_chunk_local(move |region, _| {
        assert_eq!(region, 0);
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let leecher = leech(&Link::healthy(seeder), settings(), LeecherParts { hooks, ..Default::default() }).await;
    leecher.ready().await.unwrap();
    assert_eq!(chunks.load(Ordering::SeqCst), geometry().chunk_count());
    let running = leecher.finalize().await.unwrap();
    running.pulled().await.unwrap();
    running.resumed().unwrap();
    assert_eq!(*told.lock().unwrap(), ["suspend", "resume", "before close"]);
}

#[tokio::test(start_paused = true)]
async fn what_has_priority_is_pulled_first() {
    let (_, _running, _, link) = busy(Duration::from_secs(1)).await;
    let (settings, mut parts, order) = one_by_one();
    parts.priorities = vec![Priority::Function(Arc::new(|chunk| i64::try_from(chunk).unwrap()))];
    let leecher = leech(&link, settings, parts).await;
    leecher.ready().await.unwrap();
    let expected: Vec<u64> = (0..geometry().chunk_count()).rev().collect();
    assert_eq!(order.lock().unwrap()[..expected.len()], expected);
}

/// Settings with which one chunk is pulled after the other; and a hook that notes in which order.
fn one_by_one() -> (LeecherSettings, LeecherParts, Arc<Mutex<Vec<u64>>>) {
    let order: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = order.clone();
    let hooks = Hooks::default().on_chunk_local(move |_, chunk| seen.lock().unwrap().push(chunk));
    let mut settings = settings();
    settings.pull.workers = Workers::Fixed(NonZeroUsize::MIN);
    settings.pull.max_request = NonZeroU64::MIN;
    (settings, LeecherParts { hooks, ..LeecherParts::default() }, order)
}

/// An application that rests, and what it uses.
async fn resting() -> (Here, Arc<Link>) {
    let (here, seeder) = seed(&Application::new(), "A", &Disk::new()).await;
    (here, Link::healthy(seeder))
}

/// The application writes to chunks.
async fn write_to(here: &Here, chunks: &[u64]) {
    for chunk in chunks {
        here.guarded.front().write_at(chunk * geometry().chunk_size().bytes(), &[1]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_written_often_is_pulled_last() {
    let (here, link) = resting().await;
    let (settings, parts, order) = one_by_one();
    let leecher = leech(&link, settings, parts).await;
    leecher.ready().await.unwrap();
    let mut progress = leecher.progress();
    for (written, expected) in [(&[4, 2][..], &[2, 4][..]), (&[2], &[2]), (&[9, 2, 4], &[9, 4, 2])] {
        order.lock().unwrap().clear();
        let rounds = progress.borrow_and_update().rounds;
        write_to(&here, written).await;
        // The record that names them, and the next.
        let pulled = progress.wait_for(|progress| progress.rounds >= rounds + 2);
        timeout(Duration::from_secs(600), pulled).await.unwrap().unwrap();
        assert_eq!(*order.lock().unwrap(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn after_the_move_what_is_touched_comes_first_then_what_was_written_last_then_the_rest() {
    let (here, link) = resting().await;
    let (mut settings, mut parts, order) = one_by_one();
    settings.precopy.recheck = Duration::from_secs(3600);
    parts.priorities = vec![Priority::List(Arc::from([7]))];
    let leecher = leech(&link, settings, parts).await;
    write_to(&here, &[11, 5]).await;
    let running = leecher.finalize().await.unwrap();
    let before = std::mem::take(&mut *order.lock().unwrap());
    assert!(before.len() < 3, "hardly anything came before: {before:?}");
    let front = running.regions()[0].guarded.front();
    front.read_at(13 * geometry().chunk_size().bytes(), &mut [0]).await.unwrap();
    running.pulled().await.unwrap();
    let order = order.lock().unwrap().clone();
    let place = |chunk| order.iter().position(|came| *came == chunk).unwrap();
    // One may have been under way.
    assert!(place(13) <= 1, "{order:?}");
    assert!(place(5).max(place(11)) <= 3 && place(7) == 3, "{order:?}");
    let came: BTreeSet<_> = order.iter().chain(&before).collect();
    assert_eq!(came.len() as u64, geometry().chunk_count());
    assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), order.len(), "none of them twice");
}

#[tokio::test(start_paused = true)]
async fn a_leecher_that_is_dropped_leaves_the_application_alone() {
    let (app, _running, seeder, link) = busy(Duration::from_millis(1)).await;
    let leecher = leech(&link, settings(), LeecherParts::default()).await;
    leecher.ready().await.unwrap();
    drop(leecher);
    tokio::time::sleep(Duration::from_secs(1)).await;
    seeder.stop_tracking().await.unwrap();
    assert_eq!((seeder.progress().borrow().phase, app.refused()), (SeederPhase::Owner, 0));
    let leecher = leech(&link, settings(), LeecherParts::default()).await;
    leecher.ready().await.unwrap();
    leecher.abort().await.unwrap();
    assert_eq!((seeder.progress().borrow().phase, app.refused()), (SeederPhase::Owner, 0));
}

#[tokio::test(start_paused = true)]
async fn several_regions_are_one_migration() {
    let app = Application::new();
    let (first, second) = (Disk::new(), Disk::new());
    let (a, _) = seed(&app, "A", &first).await;
    let (b, _) = seed(&app, "A", &second).await;
    let parts = SeederParts { hooks: hooks(&app, "A", b.guarded.front()), ..Default::default() };
    let regions = vec![("memory".into(), a.guarded.clone() as _), ("disk".into(), b.guarded.clone() as _)];
    let seeder = Seeder::new(regions, parts).await.unwrap();
    a.guarded.front().write_at(5000, &[1]).await.unwrap();
    b.guarded.front().write_at(5000, &[2]).await.unwrap();
    let targets = async |description: &r3map_migrate::protocol::Description| {
        let names: Vec<_> = description.regions.iter().map(|region| region.name.as_str()).collect();
        assert_eq!(names, ["memory", "disk"]);
        Ok(names.iter().map(|_| Place { disk: Disk::new() }).collect())
    };
    let peer = Arc::new(End(Link::healthy(seeder.clone())));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    leecher.ready().await.unwrap();
    a.guarded.front().write_at(9000, &[3]).await.unwrap();
    b.guarded.front().write_at(70_000, &[4]).await.unwrap();
    let running = leecher.finalize().await.unwrap();
    for (region, offset, value) in [(0, 5000, 1), (1, 5000, 2), (0, 9000, 3), (1, 70_000, 4)] {
        let mut byte = [0];
        running.regions()[region].guarded.front().read_at(offset, &mut byte).await.unwrap();
        assert_eq!(byte, [value], "region {region} at {offset}");
    }
    for region in [&a, &b] {
        assert!(region.guarded.front().write_at(0, &[1]).await.is_err(), "both are fenced");
    }
    assert_eq!(app.stops(), 1, "one downtime");
    running.pulled().await.unwrap();
    assert_eq!(seeder.progress().borrow().phase, SeederPhase::Gone);
}
