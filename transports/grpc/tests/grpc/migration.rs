//! Regions that change hands: over our own service, and over that of the Go programs, from both sides.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_grpc::{
    Client, ClientSettings, GoRegion, GoRequests, Handed, Leeching, Seeded, SeededRegion, SeederClient, Seeding,
    Server, ServerSettings, Service, Target,
};
use r3map_local::Memory;
use r3map_pipeline::BlockSet;
use r3map_testkit::faults::{Faults, Rule};
use r3map_testkit::{deadline, fill};
use tokio::io::AsyncReadExt;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::common::peer::go::SyncArgs as BackendSyncArgs;
use crate::common::peer::go::backend_client::BackendClient;
use crate::common::peer::go_seeder::seeder_client::SeederClient as GoLeecher;
use crate::common::peer::go_seeder::seeder_server::{Seeder as GoSeeder, SeederServer};
use crate::common::peer::go_seeder::{
    CloseArgs, CloseReply, ReadAtArgs, ReadAtReply, SyncArgs, SyncReply, TrackArgs, TrackReply,
};
use crate::common::{LIMIT, any_port, raw, serve, tonic_go};

/// Not a multiple of anything.
const SIZE: usize = 10 * 4096 + 100;
const ID: [u8; 16] = [7; 16];
/// The migration from which the regions were taken back.
const REVOKED: [u8; 16] = [66; 16];

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

/// A seeder of two regions that knows what must be shown, and lets Go programs in without that or not.
struct Scripted {
    regions: [Arc<dyn Backend>; 2],
    secret: &'static [u8],
    open_to_go: bool,
    script: Arc<Script>,
}

/// Remembers what was asked.
#[derive(Default)]
struct Script {
    calls: Mutex<Vec<String>>,
    handed_over: AtomicBool,
}

impl Scripted {
    fn new(secret: &'static [u8]) -> Arc<Self> {
        Arc::new(Self::closed(secret))
    }

    fn closed(secret: &'static [u8]) -> Self {
        Self { regions: [filled(SIZE, 1), filled(5000, 2)], secret, open_to_go: false, script: Arc::default() }
    }

    fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.script.calls.lock().unwrap())
    }
}

#[async_trait]
impl Seeding for Scripted {
    async fn describe(&self) -> Result<Seeded> {
        let region = |name: &str, size| SeededRegion { name: name.into(), size, chunk_size: ChunkSize::MIN };
        let regions = vec![region("memory", SIZE as u64), region("disk", 5000)];
        Ok(Seeded {
            epoch: 5,
            regions,
            precopy: true,
            busy: true,
            lease: Some(Duration::from_millis(1500)),
            revoked: Some(REVOKED),
            last: Some([0; 16]),
        })
    }

    fn region(&self, index: usize) -> Arc<dyn Backend> {
        self.regions[index].clone()
    }

    fn admit(&self, secret: &[u8], service: Service) -> Result<Arc<dyn Leeching>> {
        match secret == self.secret || (service == Service::Go && self.open_to_go) {
            true => Ok(self.script.clone()),
            false => Err(Error::new(ErrorKind::Denied, Operation::Open, "who are you?")),
        }
    }
}

impl Script {
    fn called(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

#[async_trait]
impl Leeching for Script {
    fn heard(&self, id: [u8; 16]) -> Result<()> {
        self.called(format!("heard {}", id[0]));
        match id == REVOKED {
            true => Err(Error::new(ErrorKind::Conflict, Operation::Open, "it was taken back")),
            false => Ok(()),
        }
    }

    async fn track(&self, id: [u8; 16], after: Option<[u8; 16]>) -> Result<()> {
        let after = after.map_or(String::new(), |id| format!(" after {}", id[0]));
        self.called(format!("track {}{after}", id[0]));
        Ok(())
    }

    async fn track_for_ever(&self, id: [u8; 16]) -> Result<()> {
        self.called(format!("track for ever {}", String::from_utf8_lossy(&id)));
        Ok(())
    }

    async fn dirty(&self, id: [u8; 16], round: u64) -> Result<Vec<BlockSet>> {
        self.called(format!("dirty {} {round}", id[0]));
        Ok(vec![blocks(&[0..1, 10..11]), BlockSet::default()])
    }

    async fn finalize(&self, id: [u8; 16], rounds: u64) -> Result<Handed> {
        self.called(format!("finalize {} {rounds}", id[0]));
        let dirty = vec![blocks(&[1..4, 6..7]), block(1)];
        Ok(Handed { epoch: 6, dirty, suspend: Duration::from_millis(3), flush: Duration::from_micros(7) })
    }

    async fn finalize_once(&self, id: [u8; 16]) -> Result<Handed> {
        match self.handed_over.swap(true, Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Conflict, Operation::Open, "it is somewhere else")),
            false => self.finalize(id, 0).await,
        }
    }

    async fn confirm(&self, id: [u8; 16]) -> Result<()> {
        self.called(format!("confirm {}", id[0]));
        Ok(())
    }

    async fn abort(&self, id: [u8; 16]) -> Result<()> {
        self.called(format!("abort {}", id[0]));
        Ok(())
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
    client.track(ID, None).await.unwrap();
    client.track(ID, Some([0; 16])).await.unwrap();
    assert_eq!(client.dirty(ID, 3).await.unwrap(), seeder.script.dirty(ID, 3).await.unwrap());
    assert_eq!(client.finalize(ID, 3).await.unwrap(), seeder.script.finalize(ID, 3).await.unwrap());
    client.confirm(ID).await.unwrap();
    client.abort([9; 16]).await.unwrap();
    let calls = seeder.take_calls();
    assert_eq!(calls[..2], ["track 7", "track 7 after 0"]);
    assert_eq!(calls[2..], ["dirty 7 3", "dirty 7 3", "finalize 7 3", "finalize 7 3", "confirm 7", "abort 9"]);
    for (index, (size, seed)) in [(SIZE, 1), (5000, 2)].into_iter().enumerate() {
        let mut bytes = vec![0; size];
        client.region(index, ID).read_at(0, &mut bytes).await.unwrap();
        fill::check(&bytes, 0, seed).unwrap();
        assert!(client.region(index, ID).write_at(0, &[1]).await.is_err(), "it is only read");
    }
}

#[tokio::test]
async fn reads_say_for_whom_they_are_made() {
    let seeder = Scripted::new(b"");
    let (_server, target) = seed(seeder.clone()).await;
    let client = connect(&target, b"", ClientSettings::default()).await.unwrap();
    let read = async |region: &dyn Backend| region.read_at(0, &mut [0; 10]).await;
    for (id, heard) in [(ID, "heard 7"), ([8; 16], "heard 8")] {
        read(&*client.region(1, id)).await.unwrap();
        assert_eq!(seeder.take_calls(), [heard, heard], "before it and after it");
    }
    let region = client.region(0, ID);
    client.track([9; 16], None).await.unwrap();
    read(&*region).await.unwrap();
    assert_eq!(seeder.take_calls(), ["track 9", "heard 9", "heard 9"], "it is known by another name now");
    let refused = read(&*client.region(0, REVOKED)).await.unwrap_err();
    assert!(refused.kind() == ErrorKind::Conflict && refused.to_string().contains("it was taken back"), "{refused}");
    assert_eq!(seeder.take_calls(), ["heard 66"]);
    read(&Client::connect(target.clone(), ClientSettings::default()).await.unwrap()).await.unwrap();
    let mut go = go_leecher(&target).await;
    go.read_at(ReadAtArgs { length: 8192, off: 0 }).await.unwrap();
    assert_eq!(seeder.take_calls(), [""; 0], "somebody else");
}

/// All methods that a server has.
const METHODS: [(&str, &[&str]); 4] = [
    ("r3map.region.v1.Region", &["Describe", "Read", "Write", "Flush", "Trim", "WriteZeroes", "Extents"]),
    ("r3map.migration.v1.Migration", &["Describe", "Track", "Dirty", "Finalize", "Confirm", "Abort"]),
    ("com.pojtinger.felicitas.r3map.migration.v1.Seeder", &["ReadAt", "Track", "Sync", "Close"]),
    ("com.pojtinger.felicitas.r3map.mount.v1.Backend", &["ReadAt", "WriteAt", "Sync"]),
];

/// An empty message with its prefix.
const EMPTY: [u8; 5] = [0; 5];

/// Whether each method of a service lets somebody in who shows nothing.
async fn lets_in(target: &Target, (service, methods): (&str, &[&str])) -> Vec<bool> {
    let mut answers = Vec::new();
    for method in methods {
        let (_, status) = raw::call(target, &format!("/{service}/{method}"), "application/grpc", &EMPTY).await;
        answers.push(status.is_none_or(|status| status != (tonic::Code::PermissionDenied as i32).to_string()));
    }
    answers
}

#[tokio::test]
async fn who_does_not_know_the_secret_is_refused_each_time() {
    let seeder = Scripted::new(b"sesame");
    let (_server, target) = seed(seeder.clone()).await;
    for wrong in [&b""[..], b"guess", b"sesame2"] {
        let error = connect(&target, wrong, ClientSettings::default()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    }
    for (length, expected) in [(4096, ErrorKind::Denied), (4097, ErrorKind::InvalidInput)] {
        let error = connect(&target, &vec![1; length], ClientSettings::default()).await.unwrap_err();
        assert_eq!(error.kind(), expected, "{error}");
    }
    let error = Client::connect(target.clone(), ClientSettings::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied, "reading is refused too: {error}");
    for service in METHODS {
        assert!(lets_in(&target, service).await.iter().all(|lets_in| !lets_in), "{service:?}");
    }
    assert_eq!(seeder.take_calls(), [""; 0]);
}

/// They have no way to show it, but who writes one has: gRPC's own.
#[tokio::test]
async fn programs_in_go_are_refused_where_there_is_a_secret_unless_they_show_it_or_it_is_open_to_them() {
    let seeder = Scripted::new(b"sesame");
    let (_server, target) = seed(seeder.clone()).await;
    let mut go = go_leecher(&target).await;
    assert_eq!(go.track(TrackArgs {}).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    let mut shows = Request::new(TrackArgs {});
    shows.metadata_mut().insert("authorization", "Bearer c2VzYW1l".parse().unwrap());
    go.track(shows).await.unwrap();
    assert_eq!(seeder.take_calls().len(), 1);
    let open = Arc::new(Scripted { open_to_go: true, ..Scripted::closed(b"sesame") });
    let (_server, target) = seed(open.clone()).await;
    for (service, methods) in METHODS {
        // The region is served to be read.
        let expected = methods.iter().map(|method| service.starts_with("com.pojtinger") && *method != "WriteAt");
        assert_eq!(lets_in(&target, (service, methods)).await, expected.collect::<Vec<_>>(), "{service}");
    }
    let mut go = go_leecher(&target).await;
    go.read_at(ReadAtArgs { length: 8192, off: 0 }).await.unwrap();
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
    client.track(ID, None).await.unwrap();
    server.close(LIMIT).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let server = Server::seeding(seeder, settings).await.unwrap();
    server.listen(&target).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap().epoch, 6);
    client.region(1, ID).read_at(0, &mut [0; 10]).await.unwrap();
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
    let first = &calls[0];
    assert!(first.starts_with("track for ever") && calls.last().unwrap().starts_with("confirm"), "{calls:?}");
}

/// What one region has lost is told to whoever flushes that one.
#[tokio::test]
async fn a_call_for_one_region_syncs_that_region() {
    let faults = [1, 2].map(|seed| Faults::new(filled(SIZE, seed)));
    let regions = faults.clone().map(|faults| faults as Arc<dyn Backend>);
    let (_server, target) = seed(Arc::new(Scripted { regions, ..Scripted::closed(b"") })).await;
    let endpoint = tonic::transport::Endpoint::new(format!("http://{target}")).unwrap();
    let mut go = BackendClient::new(endpoint.connect().await.unwrap());
    let mut sync = async |region: usize| {
        let mut request = Request::new(BackendSyncArgs {});
        request.metadata_mut().insert("r3map-region", region.to_string().parse().unwrap());
        go.sync(request).await.map(drop).map_err(|status| status.code())
    };
    faults[1].add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
    sync(0).await.unwrap();
    assert_eq!(faults.each_ref().map(|region| region.count(Operation::Flush)), [1, 0]);
    sync(1).await.expect_err("it has lost something");
    sync(1).await.expect("that has been told");
    sync(0).await.unwrap();
    assert_eq!(faults.each_ref().map(|region| region.count(Operation::Flush)), [2, 2]);
    assert_eq!(sync(2).await, Err(tonic::Code::NotFound));
}

/// Each of them says that it ends, and the one that got nothing may be the first to do so.
#[tokio::test]
async fn only_the_leecher_in_go_that_got_the_region_can_say_that_it_has_everything() {
    let seeder = Scripted::new(b"");
    let (_server, target) = seed(seeder.clone()).await;
    let mut leechers = [go_leecher(&target).await, go_leecher(&target).await];
    let [first, second] = &mut leechers;
    for (go, length) in [(&mut *first, 8192), (&mut *second, 16_384)] {
        go.track(TrackArgs {}).await.unwrap();
        go.read_at(ReadAtArgs { length, off: 0 }).await.unwrap();
    }
    second.close(CloseArgs {}).await.expect("before anything else it means nothing");
    let dirty = first.sync(SyncArgs {}).await.unwrap().into_inner().dirty_offsets;
    assert_eq!(dirty, [0, 8192, 24_576], "in its own chunks, whatever others read");
    assert!(second.sync(SyncArgs {}).await.is_err());
    let confirmed = || seeder.take_calls().iter().any(|call| call.starts_with("confirm"));
    second.close(CloseArgs {}).await.unwrap();
    let mut again = go_leecher(&target).await;
    again.close(CloseArgs {}).await.unwrap();
    assert!(!confirmed(), "somebody else has it");
    first.close(CloseArgs {}).await.unwrap();
    assert!(confirmed());
}

/// The seeder of the Go programs, played by tonic.
struct PlayedInGo {
    region: Arc<Memory>,
    /// Answers to `Sync` that get lost.
    lost: AtomicU32,
    closed: Arc<AtomicU32>,
    /// It is asked and does not answer.
    hangs: bool,
}

impl PlayedInGo {
    fn new() -> Self {
        Self { region: filled(SIZE, 1), lost: AtomicU32::new(0), closed: Arc::default(), hangs: false }
    }
}

#[tonic::async_trait]
impl GoSeeder for PlayedInGo {
    async fn read_at(&self, request: Request<ReadAtArgs>) -> Result<Response<ReadAtReply>, Status> {
        if self.hangs {
            std::future::pending::<()>().await;
        }
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
    let played = PlayedInGo::new();
    let closed = played.closed.clone();
    let target = tonic_go::serve_with(Routes::new(SeederServer::new(played))).await;
    assert!(connect(&target, b"", ClientSettings::default()).await.is_err(), "its size is not known");
    let go = Some(GoRegion { size: SIZE as u64, chunk_size: ChunkSize::new(8192).unwrap(), requests: GoRequests::Any });
    let client = connect(&target, b"", ClientSettings { go, ..ClientSettings::default() }).await.unwrap();
    let seeded = client.describe().await.unwrap();
    assert_eq!((seeded.precopy, seeded.regions.len(), seeded.regions[0].size), (false, 1, SIZE as u64));
    client.track(ID, None).await.unwrap();
    assert!(client.dirty(ID, 1).await.is_err());
    let mut bytes = vec![0; SIZE];
    client.region(0, ID).read_at(0, &mut bytes).await.unwrap();
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
    let played = PlayedInGo { lost: AtomicU32::new(1), ..PlayedInGo::new() };
    let target = tonic_go::serve_with(Routes::new(SeederServer::new(played))).await;
    let go = Some(GoRegion { size: SIZE as u64, chunk_size: ChunkSize::MIN, requests: GoRequests::Any });
    let client = connect(&target, b"", ClientSettings { go, ..ClientSettings::default() }).await.unwrap();
    assert_eq!(client.finalize(ID, 0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(client.finalize(ID, 0).await.unwrap().dirty, [blocks(&[0..5, 5..11])]);
}

#[tokio::test]
async fn a_seeder_that_does_not_answer_is_given_up_in_time_and_nothing_is_left_of_it() {
    let go = Some(GoRegion { size: SIZE as u64, chunk_size: ChunkSize::MIN, requests: GoRequests::Any });
    let hasty = ClientSettings { connect_timeout: Duration::from_millis(300), go, ..ClientSettings::default() };
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let in_go = Routes::new(SeederServer::new(PlayedInGo { hangs: true, ..PlayedInGo::new() }));
    let targets = [silent.local_addr().unwrap().to_string().parse().unwrap(), tonic_go::serve_with(in_go).await];
    for target in targets {
        let connecting = connect(&target, b"", hasty.clone());
        let error = deadline(LIMIT, "giving up", connecting).await.expect_err("it does not answer");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.message().contains("does not answer within"), "{error}");
    }
    let (mut left, _) = silent.accept().await.unwrap();
    let mut said = Vec::new();
    deadline(LIMIT, "the end of the connection", left.read_to_end(&mut said)).await.unwrap();
}
