//! A host: a disk that survives, and a process that does not.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use r3map_local::{Memory, Stored};
use r3map_migrate::{Arrival, Fencing, Guarded, Hooks, Seeder, SeederParts, Shown, Source, Target};
use r3map_pipeline::{BlockSet, Cached, CachedParts, CachedSettings, Progress, StateRecord, Workers, Writes};
use tokio::sync::watch;

use super::application::Application;
use super::disk::Disk;
use super::{LEASE, geometry};

/// A region on a host that has arrived, or was always there.
pub(crate) struct Here {
    pub(crate) guarded: Arc<Guarded>,
    cached: Arc<Cached>,
    disk: Arc<Disk>,
}

/// A place for a region on a disk.
pub(crate) struct Place {
    pub(crate) disk: Arc<Disk>,
}

#[async_trait]
impl Target for Place {
    type Shown = Here;

    fn local(&self) -> Arc<dyn r3map_pipeline::Local> {
        self.disk.clone()
    }

    fn record(&self) -> Option<Arc<dyn StateRecord>> {
        Some(self.disk.clone())
    }

    async fn show(self, arrival: Arrival) -> Result<Here> {
        let parts = CachedParts { record: Some(self.disk.clone()), ..arrival.parts() };
        let cached = Cached::open(self.disk.clone(), arrival.remote.clone(), arrival.settings(), parts).await?;
        let guarded = Arc::new(Guarded::new(cached.clone(), geometry().chunk_size())?);
        guarded.fence(Fencing::Strict).await?;
        Ok(Here { guarded, cached, disk: self.disk })
    }
}

#[async_trait]
impl Shown for Here {
    fn source(&self) -> Arc<dyn Source> {
        self.guarded.clone()
    }

    async fn pulled(&self) -> Result<()> {
        self.cached.pulled().await
    }

    async fn keep(&self) -> Result<()> {
        self.disk.keep()
    }

    fn progress(&self) -> watch::Receiver<Progress> {
        self.cached.progress()
    }
}

impl AsRef<Here> for Here {
    fn as_ref(&self) -> &Here {
        self
    }
}

impl Here {
    /// A region that is wholly on a disk, which a process has opened.
    pub(crate) async fn whole(disk: &Arc<Disk>) -> Self {
        let nothing: Arc<dyn Backend> = Arc::new(Stored::memory(Arc::new(Memory::new(disk.size()).unwrap())));
        let mut present = BlockSet::default();
        present.insert(0..geometry().block_count());
        let mut settings =
            CachedSettings { chunk_size: geometry().chunk_size(), writes: Writes::Kept, ..CachedSettings::default() };
        settings.pull.workers = Workers::Off;
        let parts = CachedParts { present, record: Some(disk.clone()), ..CachedParts::default() };
        let cached = Cached::open(disk.clone(), nothing, settings, parts).await.unwrap();
        let guarded = Arc::new(Guarded::new(cached.clone(), geometry().chunk_size()).unwrap());
        Self { guarded, cached, disk: disk.clone() }
    }

    /// Ends what the process was doing.
    pub(crate) fn kill(&self) {
        self.cached.abandon();
    }
}

/// Hooks that move the application away from `host` and back.
pub(crate) fn hooks(app: &Arc<Application>, host: &'static str, front: Arc<dyn Backend>) -> Hooks {
    hooks_with(app, host, vec![front])
}

fn hooks_with(app: &Arc<Application>, host: &'static str, fronts: Vec<Arc<dyn Backend>>) -> Hooks {
    let (leaving, coming) = (app.clone(), app.clone());
    Hooks::default()
        .on_suspend(move || {
            let app = leaving.clone();
            async move {
                app.stop(host).await;
                Ok(())
            }
        })
        .on_resume(move || {
            let (app, fronts) = (coming.clone(), fronts.clone());
            async move {
                app.resume_with(host, fronts).await;
                Ok(())
            }
        })
}

/// Starts a process that seeds what is on `disk`, with the application if it may run there.
pub(crate) async fn seed(app: &Arc<Application>, host: &'static str, disk: &Arc<Disk>) -> (Here, Seeder) {
    let (mut here, seeder) = seed_all(app, host, std::slice::from_ref(disk)).await;
    (here.remove(0), seeder)
}

/// The same with a region on each of the disks, of which the first has the ledger.
pub(crate) async fn seed_all(app: &Arc<Application>, host: &'static str, disks: &[Arc<Disk>]) -> (Vec<Here>, Seeder) {
    let mut here = Vec::new();
    for disk in disks {
        here.push(Here::whole(disk).await);
    }
    let parts = SeederParts {
        hooks: hooks_with(app, host, fronts(&here)),
        ledger: Some(disks[0].clone()),
        lease: Some(LEASE),
        ..SeederParts::default()
    };
    let regions = here.iter().map(|here| ("disk".into(), here.guarded.clone() as Arc<dyn Source>));
    let seeder = Seeder::new(regions.collect(), parts).await.unwrap();
    if seeder.owns() {
        app.resume_with(host, fronts(&here)).await;
    }
    (here, seeder)
}

/// What an application uses of regions.
pub(crate) fn fronts<H: AsRef<Here>>(here: &[H]) -> Vec<Arc<dyn Backend>> {
    here.iter().map(|here| here.as_ref().guarded.front()).collect()
}
