//! From host to host to host, and back.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use r3map_migrate::{Leecher, LeecherParts, Seeder, SeederParts};
use r3map_testkit::random;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::host::{Here, Place, hooks, seed};
use crate::support::link::{End, Link};
use crate::support::{fresh_id, settings};

/// Names the seed when a test fails.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "to replay: R3MAP_MIGRATE_SEED={}", self.0);
        }
    }
}

fn replayed() -> Option<u64> {
    std::env::var("R3MAP_MIGRATE_SEED").ok()?.parse().ok()
}

/// How often to move: `R3MAP_MIGRATE_HOPS` asks for more.
fn hops() -> usize {
    std::env::var("R3MAP_MIGRATE_HOPS").ok().and_then(|hops| hops.parse().ok()).unwrap_or(300)
}

/// Moves what `seeder` has to `disk` on `host`, which seeds it then.
async fn hop(app: &Arc<Application>, seeder: Seeder, host: &'static str, disk: &Arc<Disk>) -> (Arc<Here>, Seeder) {
    let place = Place { disk: disk.clone() };
    let (peer, targets) = (Arc::new(End(Link::healthy(seeder))), async move |_: &_| Ok(vec![place]));
    let leecher = Leecher::start(peer, fresh_id(), targets, settings(), LeecherParts::default()).await.unwrap();
    leecher.ready().await.unwrap();
    let running = leecher.finalize().await.unwrap();
    let front = running.regions()[0].guarded.front();
    app.resume(host, front.clone()).await;
    let parts = SeederParts { hooks: hooks(app, host, front), ..SeederParts::default() };
    let (mut here, seeder, _) = running.release(vec!["disk".into()], parts).await.unwrap();
    (here.remove(0), seeder)
}

#[tokio::test(start_paused = true)]
async fn no_stamp_is_lost_however_often_it_moves() {
    let seed_of = replayed().unwrap_or_else(random::fresh_seed);
    let _replay = Replay(seed_of);
    let app = Application::new();
    let disks = [Disk::new(), Disk::new(), Disk::new()];
    let (_here, mut seeder) = seed(&app, "A", &disks[0]).await;
    let _running = app.start(seed_of, Duration::from_micros(700));
    let mut epoch = 1;
    let mut kept;
    for hops in 1..=hops() {
        let to = hops % 3;
        disks[to].erase();
        (kept, seeder) = hop(&app, seeder, ["A", "B", "C"][to], &disks[to]).await;
        epoch += 1;
        assert_eq!(seeder.progress().borrow().epoch, epoch);
        app.check().await.unwrap();
        drop(kept);
    }
    assert_eq!(app.refused(), 0);
    assert!(app.stamps() > 1000);
}
