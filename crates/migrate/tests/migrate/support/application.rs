//! The application: it stamps blocks with increasing numbers, wherever it runs, and knows which of them were
//! acknowledged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::try_join_all;
use r3map_core::{Backend, Result};
use r3map_testkit::random::Random;
use tokio_util::task::AbortOnDropHandle;

use super::geometry;

/// Where it runs, and its regions there.
struct Place {
    host: &'static str,
    fronts: Vec<Arc<dyn Backend>>,
}

/// One application. It can be moved, and it can be killed; it is never in two places.
pub(crate) struct Application {
    place: tokio::sync::Mutex<Option<Place>>,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    next: u64,
    /// For each block the last stamp that was acknowledged, and the last that was tried.
    acknowledged: BTreeMap<u64, u64>,
    tried: BTreeMap<u64, u64>,
    refused: u64,
    /// How often it was asked to stop.
    stops: u32,
}

impl Application {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { place: tokio::sync::Mutex::default(), known: Mutex::default() })
    }

    /// Runs it from now on: a write every `pause`.
    pub(crate) fn start(self: &Arc<Self>, seed: u64, pause: Duration) -> AbortOnDropHandle<()> {
        let app = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut random = Random::new(seed);
            loop {
                tokio::time::sleep(pause).await;
                app.write(random.below(geometry().block_count())).await;
            }
        }))
    }

    /// Stamps a block of each of its regions, if it runs.
    pub(crate) async fn write(&self, block: u64) {
        let place = self.place.lock().await;
        let Some(place) = &*place else { return };
        let stamp = {
            let mut known = self.known.lock().unwrap();
            known.next += 1;
            let stamp = known.next;
            known.tried.insert(block, stamp);
            stamp
        };
        let (start, bytes) = (geometry().block_range(block).start, stamped(block, stamp));
        let written = try_join_all(place.fronts.iter().map(|front| front.write_at(start, &bytes))).await;
        let mut known = self.known.lock().unwrap();
        match written {
            Ok(_) => drop(known.acknowledged.insert(block, stamp)),
            Err(_) => known.refused += 1,
        }
    }

    /// Stops it, because somebody asks for that.
    pub(crate) async fn stop(&self, host: &'static str) {
        self.known.lock().unwrap().stops += 1;
        self.suspend(host).await;
    }

    /// Stops it; what it was writing is written.
    pub(crate) async fn suspend(&self, host: &'static str) {
        let mut place = self.place.lock().await;
        if place.as_ref().is_some_and(|place| place.host == host) {
            *place = None;
        }
    }

    /// Lets it run.
    pub(crate) async fn resume(&self, host: &'static str, front: Arc<dyn Backend>) {
        self.resume_with(host, vec![front]).await;
    }

    /// Lets it run with several regions.
    pub(crate) async fn resume_with(&self, host: &'static str, fronts: Vec<Arc<dyn Backend>>) {
        let mut place = self.place.lock().await;
        let already = place.as_ref().map(|place| place.host);
        assert!(already.is_none_or(|already| already == host), "it runs on {already:?} and on {host}");
        *place = Some(Place { host, fronts });
    }

    pub(crate) async fn host(&self) -> Option<&'static str> {
        self.place.lock().await.as_ref().map(|place| place.host)
    }

    /// Writes that were not taken.
    pub(crate) fn refused(&self) -> u64 {
        self.known.lock().unwrap().refused
    }

    /// How often it was asked to stop.
    pub(crate) fn stops(&self) -> u32 {
        self.known.lock().unwrap().stops
    }

    /// Stamps so far.
    pub(crate) fn stamps(&self) -> u64 {
        self.known.lock().unwrap().next
    }

    /// Reads everything where it runs: no stamp is lost, none went back, none is torn.
    pub(crate) async fn check(&self) -> Result<()> {
        let place = self.place.lock().await;
        let fronts = &place.as_ref().expect("it runs somewhere").fronts;
        for (front, block) in
            fronts.iter().flat_map(|front| (0..geometry().block_count()).map(move |block| (front, block)))
        {
            let range = geometry().block_range(block);
            let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
            front.read_at(range.start, &mut bytes).await?;
            let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let known = self.known.lock().unwrap();
            let acknowledged = known.acknowledged.get(&block).copied().unwrap_or(0);
            let tried = known.tried.get(&block).copied().unwrap_or(0);
            assert!(
                (acknowledged..=tried).contains(&stamp),
                "block {block}: {stamp} is not in {acknowledged}..={tried}"
            );
            let expected = if stamp == 0 { vec![0; bytes.len()] } else { stamped(block, stamp) };
            assert!(bytes == expected, "block {block} is torn");
        }
        Ok(())
    }
}

/// A block full of its stamp.
fn stamped(block: u64, stamp: u64) -> Vec<u8> {
    let range = geometry().block_range(block);
    stamp.to_le_bytes().into_iter().cycle().take(usize::try_from(range.end - range.start).unwrap()).collect()
}
