//! What a seeder asks of what its regions stand on: how firmly writing is ended, and that nothing hangs when that panics.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, ErrorKind, Result};
use r3map_migrate::{Fencing, Guarded, Hooks, Ledger, Seeder, SeederParts, SeederPhase, Source, Standing};
use r3map_pipeline::BlockSet;

use crate::support::application::Application;
use crate::support::disk::Disk;
use crate::support::fresh_id;
use crate::support::host::seed;

/// A source that remembers how it was fenced, and panics when it is told to.
struct Watched {
    inner: Arc<Guarded>,
    fencings: Mutex<Vec<Fencing>>,
    panics: Panics,
}

/// Where something panics, once.
#[derive(Default)]
struct Panics {
    fence: AtomicBool,
    take: AtomicBool,
    unfence: AtomicBool,
    ledger: AtomicBool,
}

fn panic_once(panics: &AtomicBool) {
    assert!(!panics.swap(false, Ordering::SeqCst), "it was told to panic");
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
        self.inner.track().await
    }

    async fn take(&self) -> Result<BlockSet> {
        panic_once(&self.panics.take);
        self.inner.take().await
    }

    async fn untrack(&self) {
        self.inner.untrack().await;
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        self.fencings.lock().unwrap().push(fencing);
        self.inner.fence(fencing).await?;
        panic_once(&self.panics.fence);
        Ok(())
    }

    async fn unfence(&self) {
        self.inner.unfence().await;
        panic_once(&self.panics.unfence);
    }
}

/// A ledger that panics once what it is told is in it.
impl Ledger for Watched {
    fn load(&self) -> Result<Option<Standing>> {
        Ok(None)
    }

    fn save(&self, _: &Standing) -> Result<()> {
        panic_once(&self.panics.ledger);
        Ok(())
    }
}

async fn watched() -> Arc<Watched> {
    let (here, _) = seed(&Application::new(), "A", &Disk::new()).await;
    Arc::new(Watched { inner: here.guarded.clone(), fencings: Mutex::default(), panics: Panics::default() })
}

async fn seeder(source: &Arc<Watched>, parts: SeederParts) -> Seeder {
    Seeder::new(vec![("a".into(), source.clone() as _)], parts).await.unwrap()
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
        calls.track(id).await.unwrap();
        calls.finalize(id, 0).await.unwrap();
        assert_eq!(*source.fencings.lock().unwrap(), [fencing]);
    }
}

#[tokio::test]
async fn whatever_panics_at_the_handover_the_application_goes_on() {
    type Where = fn(&Panics) -> &AtomicBool;
    let places: [Where; 4] =
        [|panics| &panics.fence, |panics| &panics.take, |panics| &panics.unfence, |panics| &panics.ledger];
    for (place, of) in places.into_iter().enumerate() {
        let (source, id) = (watched().await, fresh_id());
        let resumed = Arc::new(AtomicBool::new(false));
        let tell = resumed.clone();
        let hooks = Hooks::default().on_resume(move || {
            tell.store(true, Ordering::SeqCst);
            async { Ok(()) }
        });
        let seeder =
            seeder(&source, SeederParts { hooks, ledger: Some(source.clone()), ..SeederParts::default() }).await;
        let calls = seeder.admit(b"").unwrap();
        calls.track(id).await.unwrap();
        source.inner.front().write_at(0, &[1]).await.unwrap();
        of(&source.panics).store(true, Ordering::SeqCst);
        // What lifts the fence is called only after something else.
        source.panics.take.fetch_or(place == 2, Ordering::SeqCst);
        assert_eq!(calls.finalize(id, 0).await.unwrap_err().kind(), ErrorKind::Cancelled, "place {place}");
        assert_eq!(seeder.progress().borrow().phase, SeederPhase::Tracked, "place {place}");
        assert!(resumed.load(Ordering::SeqCst), "place {place}");
        source.inner.front().write_at(4096, &[1]).await.unwrap();
        let handover = calls.finalize(id, 0).await.unwrap();
        assert_eq!(handover.dirty[0].len(), 2, "nothing is forgotten, place {place}");
    }
}
