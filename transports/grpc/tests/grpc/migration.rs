//! Regions that change hands: over our own service, and over that of the Go programs, from both sides.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_grpc::{
    ClientSettings, GoRegion, GoRequests, Handed, Seeded, SeededRegion, SeederClient, Seeding, Server, ServerSettings,
    Target,
};
use r3map_local::Memory;
use r3map_pipeline::BlockSet;
use r3map_testkit::{deadline, fill};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::common::peer::go_seeder::seeder_client::SeederClient as GoLeecher;
use crate::common::peer::go_seeder::seeder_server::{Seeder as GoSeeder, SeederServer};
use crate::common::peer::go_seeder::{
    CloseArgs, CloseReply, ReadAtArgs, ReadAtReply, SyncArgs, SyncReply, TrackArgs, TrackReply,
};
use crate::common::{LIMIT, any_port, serve, tonic_go};

/// Not a multiple of anything.
const SIZE: usize = 10 * 4096 + 100;
const ID: [u8; 16] = [7; 16];

fn filled(size: usize, seed: u64) -> Arc<Memory> {
    let memory = Memory::new(size as u64).unwrap();
    memory.write_now(0, &fill::bytes(0, size, seed)).unwrap();
    Arc::new(memory)
}

fn blocks(runs: &[std::ops::Range<u64>]) -> BlockSet {
    let mut blocks = BlockSet::default();
    runs.iter().for_each(|run| blocks.insert(run.clone()));
    blocks
}

fn block(index: u64) -> BlockSet {
    blocks(std::slice::from_ref(&(index..index + 1)))
}

/// A seeder of two regions that remembers what it was asked, and knows what a leecher must show.
struct Scripted {
    regions: [Arc<Memory>; 2],
    secret: &'static [u8],
    calls: Mutex<Vec<String>>,
    handed_over: AtomicBool,
}

impl Scripted {
    fn new(secret: &'static [u8]) -> Arc<Self> {
        let (regions, handed_over) = ([filled(SIZE, 1), filled(5000, 2)], AtomicBool::default());
        Arc::new(Self { regions, secret, calls: Mutex::default(), handed_over })
    }

    fn called(&self, secret: &[u8], call: String) -> Result<()> {
        if secret != self.secret {
            return Err(Error::new(ErrorKind::Denied, Operation::Open, "who are you?"));
        }
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

#[async_trait]
impl Seeding for Scripted {
    async fn describe(&self) -> Result<Seeded> {
        let region = |name: &str, size| SeededRegion { name: name.into(), size, chunk_size: ChunkSize::MIN };
        let regions = vec![region("memory", SIZE as u64), region("disk", 5000)];
        Ok(Seeded { epoch: 5, regions, precopy: true, busy: true, lease: Some(Duration::from_millis(1500)) })
    }

    fn region(&self, index: usize) -> Arc<dyn Backend> {
        self.regions[index].clone()
    }

    async fn track(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.called(secret, format!("track {}", id[0]))
    }

    async fn track_for_ever(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.called(secret, format!("track for ever {}", String::from_utf8_lossy(&id)))
    }

    async fn dirty(&self, secret: &[u8], id: [u8; 16], round: u64) -> Result<Vec<BlockSet>> {
        self.called(secret, format!("dirty {} {round}", id[0]))?;
        Ok(vec![blocks(&[0..1, 10..11]), BlockSet::default()])
    }

    async fn finalize(&self, secret: &[u8], id: [u8; 16], rounds: u64) -> Result<Handed> {
        self.called(secret, format!("finalize {} {rounds}", id[0]))?;
        let dirty = vec![blocks(&[1..4, 6..7]), block(1)];
        Ok(Handed { epoch: 6, dirty, suspend: Duration::from_millis(3), flush: Duration::from_micros(7) })
    }

    async fn finalize_once(&self, secret: &[u8], id: [u8; 16]) -> Result<Handed> {
        match self.handed_over.swap(true, Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Conflict, Operation::Open, "it is somewhere else")),
            false => self.finalize(secret, id, 0).await,
        }
    }

    async fn confirm(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.called(secret, format!("confirm {}", id[0]))
    }

    async fn abort(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.called(secret, format!("abort {}", id[0]))
    }
}

async fn seed(seeder: Arc<Scripted>) -> (Server, Target) {
    let server = Server::seeding(seeder, ServerSettings::default()).await.unwrap();
    let target = server.listen(&any_port()).await.unwrap();
    (server, target)
}

async fn connect(target: &Target, secret: &[u8], settings: ClientSettings) -> Result<SeederClient> {
    deadline(LIMIT, "connecting", SeederClient::connect(target.clone(), secret, settings)).await
}

#[tokio::test]
async fn every_call_and_every_region_goes_there_and_back() {
    let seeder = Scripted::new(b"sesame");
    let (_server, target) = seed(seeder.clone()).await;
    let client = connect(&target, b"sesame", ClientSettings::default()).await.unwrap();
    assert_eq!(client.describe().await.unwrap(), seeder.describe().await.unwrap());
    client.track(ID).await.unwrap();
    assert_eq!(client.dirty(ID, 3).await.unwrap(), seeder.dirty(b"sesame", ID, 3).await.unwrap());
    for (index, (size, seed)) in [(SIZE, 1), (5000, 2)].into_iter().enumerate() {
        let mut bytes = vec![0; size];
        client.region(index).read_at(0, &mut bytes).await.unwrap();
        fill::check(&bytes, 0, seed).unwrap();
        assert!(client.region(index).write_at(0, &[1]).await.is_err(), "it is only read");
    }
    assert_eq!(client.finalize(ID, 3).await.unwrap(), seeder.finalize(b"sesame", ID, 3).await.unwrap());
    client.confirm(ID).await.unwrap();
    client.abort([9; 16]).await.unwrap();
    let calls = seeder.take_calls();
    assert_eq!(calls, ["track 7", "dirty 7 3", "dirty 7 3", "finalize 7 3", "finalize 7 3", "confirm 7", "abort 9"]);
}

#[tokio::test]
async fn who_does_not_know_the_secret_is_refused_each_time() {
    let seeder = Scripted::new(b"sesame");
    let (_server, target) = seed(seeder.clone()).await;
    let client = connect(&target, b"guess", ClientSettings::default()).await.unwrap();
    let refused = [
        client.track(ID).await.err(),
        client.dirty(ID, 1).await.err(),
        client.finalize(ID, 1).await.err(),
        client.confirm(ID).await.err(),
        client.abort(ID).await.err(),
    ];
    assert!(refused.into_iter().all(|error| error.is_some_and(|error| error.kind() == ErrorKind::Denied)));
    let mut go = go_leecher(&target).await;
    assert!(go.track(TrackArgs {}).await.is_err() && go.sync(SyncArgs {}).await.is_err());
    assert_eq!(seeder.take_calls(), [""; 0]);
}

#[tokio::test]
async fn a_server_that_does_not_seed_says_so() {
    let (_server, target) = serve(filled(SIZE, 1), ServerSettings::default()).await;
    let error = connect(&target, b"", ClientSettings::default()).await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.message().contains("is it a seeder?"), "{error}");
}

#[tokio::test]
async fn after_the_server_was_started_again_calls_go_on() {
    let seeder = Scripted::new(b"");
    let settings = ServerSettings { identity: Some("it".into()), ..ServerSettings::default() };
    let server = Server::seeding(seeder.clone(), settings.clone()).await.unwrap();
    let target = server.listen(&any_port()).await.unwrap();
    let client = connect(&target, b"", ClientSettings::default()).await.unwrap();
    client.track(ID).await.unwrap();
    server.close(LIMIT).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let server = Server::seeding(seeder, settings).await.unwrap();
    server.listen(&target).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap().epoch, 6);
    client.region(1).read_at(0, &mut [0; 10]).await.unwrap();
}

async fn go_leecher(target: &Target) -> GoLeecher<tonic::transport::Channel> {
    let endpoint = tonic::transport::Endpoint::new(format!("http://{target}")).unwrap();
    GoLeecher::new(endpoint.connect().await.unwrap())
}

#[tokio::test]
async fn a_leecher_in_go_gets_what_it_expects() {
    let seeder = Scripted::new(b"");
    let (_server, target) = seed(seeder.clone()).await;
    let mut go = go_leecher(&target).await;
    go.close(CloseArgs {}).await.expect("before anything else it means nothing");
    go.track(TrackArgs {}).await.unwrap();
    for (off, there) in [(0, 8192), (40_960, 100)] {
        let reply = go.read_at(ReadAtArgs { length: 8192, off }).await.unwrap().into_inner();
        assert_eq!((reply.n, reply.p.len()), (8192, 8192), "always as long as was asked for");
        fill::check(&reply.p[..there], off.cast_unsigned(), 1).unwrap();
        assert!(reply.p[there..].iter().all(|byte| *byte == 0));
    }
    let dirty = go.sync(SyncArgs {}).await.unwrap().into_inner().dirty_offsets;
    assert_eq!(dirty, [0, 8192, 24_576], "its own chunks of 8 KiB, each once");
    assert!(go.sync(SyncArgs {}).await.is_err(), "it never asks again: this is another one of the same name");
    go.close(CloseArgs {}).await.unwrap();
    let calls = seeder.take_calls();
    let first = &calls[1];
    assert!(first.starts_with("track for ever") && calls.last().unwrap().starts_with("confirm"), "{calls:?}");
}

/// The seeder of the Go programs, played by tonic.
struct PlayedInGo {
    region: Arc<Memory>,
    /// Answers to `Sync` that get lost.
    lost: AtomicU32,
    closed: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl GoSeeder for PlayedInGo {
    async fn read_at(&self, request: Request<ReadAtArgs>) -> Result<Response<ReadAtReply>, Status> {
        let ReadAtArgs { length, off } = request.into_inner();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        let there = (SIZE - usize::try_from(off).unwrap()).min(bytes.len());
        self.region.read_now(off.cast_unsigned(), &mut bytes[..there]).unwrap();
        Ok(Response::new(ReadAtReply { n: length, p: bytes.into() }))
    }

    async fn track(&self, _: Request<TrackArgs>) -> Result<Response<TrackReply>, Status> {
        Ok(Response::new(TrackReply {}))
    }

    async fn sync(&self, _: Request<SyncArgs>) -> Result<Response<SyncReply>, Status> {
        match self.lost.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lost| lost.checked_sub(1)) {
            Ok(_) => Err(Status::unavailable("the line broke")),
            Err(_) => Ok(Response::new(SyncReply { dirty_offsets: vec![8192, 40_960] })),
        }
    }

    async fn close(&self, _: Request<CloseArgs>) -> Result<Response<CloseReply>, Status> {
        self.closed.fetch_add(1, Ordering::SeqCst);
        Err(Status::unavailable("it has ended"))
    }
}

#[tokio::test]
async fn a_seeder_in_go_is_understood() {
    let closed = Arc::new(AtomicU32::new(0));
    let played = PlayedInGo { region: filled(SIZE, 1), lost: AtomicU32::new(0), closed: closed.clone() };
    let target = tonic_go::serve_with(Routes::new(SeederServer::new(played))).await;
    assert!(connect(&target, b"", ClientSettings::default()).await.is_err(), "its size is not known");
    let go = Some(GoRegion { size: SIZE as u64, chunk_size: ChunkSize::new(8192).unwrap(), requests: GoRequests::Any });
    let client = connect(&target, b"", ClientSettings { go, ..ClientSettings::default() }).await.unwrap();
    let seeded = client.describe().await.unwrap();
    assert_eq!((seeded.precopy, seeded.regions.len(), seeded.regions[0].size), (false, 1, SIZE as u64));
    client.track(ID).await.unwrap();
    assert!(client.dirty(ID, 1).await.is_err());
    let mut bytes = vec![0; SIZE];
    client.region(0).read_at(0, &mut bytes).await.unwrap();
    fill::check(&bytes, 0, 1).unwrap();
    client.abort(ID).await.expect("it has not been asked to stop");
    let handed = client.finalize(ID, 0).await.unwrap();
    assert_eq!(handed.dirty, [blocks(&[2..4, 10..11])]);
    assert_eq!(client.abort(ID).await.unwrap_err().kind(), ErrorKind::Denied);
    client.confirm(ID).await.expect("that it ends without an answer is no error");
    assert_eq!(closed.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn where_the_answer_of_a_seeder_in_go_is_lost_everything_counts_as_written() {
    let played = PlayedInGo { region: filled(SIZE, 1), lost: AtomicU32::new(1), closed: Arc::default() };
    let target = tonic_go::serve_with(Routes::new(SeederServer::new(played))).await;
    let go = Some(GoRegion { size: SIZE as u64, chunk_size: ChunkSize::MIN, requests: GoRequests::Any });
    let client = connect(&target, b"", ClientSettings { go, ..ClientSettings::default() }).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(client.finalize(ID, 0).await.unwrap().dirty, [blocks(&[0..5, 5..11])]);
}
