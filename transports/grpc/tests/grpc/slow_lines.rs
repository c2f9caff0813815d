//! Slow lines: what moves gets through, however long it takes, and what does not move is given up.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::{Backend, ChunkSize, ErrorKind, Operation, Result};
use r3map_grpc::{Client, ClientSettings, Server, ServerSettings, Target};
use r3map_local::Memory;
use r3map_pipeline::{Backoff, Retry, RetrySettings};
use r3map_testkit::faults::Faults;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::{deadline, fill};

use crate::common::{LIMIT, lasting, serve, settings};

const MIB: usize = 1 << 20;
const SIZE: u64 = 32 << 20;

/// A client behind a line of so many bytes a second, and what counts the calls that the server makes.
struct Slow {
    faults: Arc<Faults>,
    proxy: DelayProxy,
    client: Arc<Client>,
    _server: Server,
}

/// The line is fast at first.
async fn slow(server: ServerSettings, client: ClientSettings) -> Slow {
    let memory = Memory::new(SIZE).unwrap();
    memory.write_at(0, &fill::bytes(0, MIB, 1)).await.unwrap();
    let faults = Faults::new(Arc::new(memory));
    let (server, target) = serve(faults.clone(), server).await;
    let Target::Tcp { port, .. } = target else { panic!("it is TCP") };
    let proxy = DelayProxy::tcp(SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_millis(2)).unwrap();
    let target = proxy.socket_addr().to_string().parse().unwrap();
    let client = deadline(LIMIT, "connecting", Client::connect(target, client)).await.unwrap();
    Slow { faults, proxy, client: Arc::new(client), _server: server }
}

impl Slow {
    fn set_rate(&self, bytes_per_second: usize) {
        self.proxy.set_rate(NonZeroU64::new(bytes_per_second as u64));
    }

    /// What a mount would use, with less patience.
    fn retry(&self, attempt_timeout: Duration, limit: Duration) -> Retry {
        let settings = RetrySettings { limit: Some(limit), attempt_timeout, backoff: Backoff::default() };
        Retry::new(self.client.clone(), settings).unwrap()
    }
}

async fn read(backend: &dyn Backend) -> Result<()> {
    let mut buf = vec![0; MIB];
    backend.read_at(0, &mut buf).await?;
    fill::check(&buf, 0, 1).unwrap();
    Ok(())
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_may_take_many_times_as_long_as_a_server_waits_in_silence() {
    let slow = slow(ServerSettings { patience: millis(300), ..lasting() }, settings()).await;
    slow.set_rate(MIB / 3);
    let start = Instant::now();
    slow.client.write_at(0, &fill::bytes(0, MIB, 1)).await.unwrap();
    assert!(start.elapsed() > millis(2500), "the line is slow: {:?}", start.elapsed());
    slow.proxy.set_rate(None);
    read(&*slow.client).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_trickles_for_ever_is_refused() {
    // Sixty times this are three seconds; the line takes four for each of two requests.
    let chunk_size = Some(ChunkSize::new(8 * MIB as u64).unwrap());
    let slow = slow(ServerSettings { patience: millis(50), chunk_size, ..lasting() }, settings()).await;
    slow.set_rate(2 * MIB);
    let start = Instant::now();
    let error = slow.client.write_at(0, &vec![1; 16 * MIB]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("did not arrive in time"), "{error}");
    assert!((millis(2900)..millis(7500)).contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_not_sent_on_is_refused() {
    let slow = slow(ServerSettings { patience: millis(300), ..lasting() }, settings()).await;
    slow.set_rate(MIB);
    let client = slow.client.clone();
    let write = tokio::spawn(async move { client.write_at(0, &vec![1; 4 * MIB]).await });
    tokio::time::sleep(millis(500)).await;
    slow.proxy.stall();
    tokio::time::sleep(millis(1500)).await;
    slow.proxy.heal();
    slow.proxy.set_rate(None);
    let error = deadline(LIMIT, "the write", write).await.unwrap().unwrap_err();
    assert!(error.message().contains("did not arrive in time"), "{error}");
    assert_eq!(slow.faults.count(Operation::Write), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_busy_for_long_is_not_a_dead_one() {
    let client = ClientSettings { keep_alive: millis(500), ..settings() };
    let slow = slow(lasting(), client).await;
    slow.set_rate(MIB / 2);
    // What asks for a sign of life waits behind all of it.
    slow.client.write_at(0, &fill::bytes(0, 2 * MIB, 1)).await.unwrap();
    read(&*slow.client).await.unwrap();
    assert_eq!(slow.faults.count(Operation::Write), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_take_as_long_as_the_line_needs() {
    let slow = slow(lasting(), settings()).await;
    // The system takes what it has room for at once, and then makes room in large pieces.
    let retry = slow.retry(millis(1500), millis(2000));
    slow.set_rate(MIB / 3);
    let start = Instant::now();
    let bytes = fill::bytes(0, MIB, 1);
    // What is asked for behind a long write waits for that too.
    let (written, found) = tokio::join!(retry.write_at(0, &bytes), read(&retry));
    written.unwrap();
    found.unwrap();
    assert!(start.elapsed() > millis(4000), "longer than an attempt and the limit: {:?}", start.elapsed());
    assert_eq!((slow.faults.count(Operation::Write), slow.faults.count(Operation::Read)), (1, 1), "made once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_stops_in_the_middle_is_given_up_at_the_limit() {
    let slow = slow(lasting(), settings()).await;
    let retry = slow.retry(millis(500), millis(1500));
    slow.set_rate(MIB / 3);
    let bytes = fill::bytes(0, MIB, 1);
    let write = retry.write_at(0, &bytes);
    let stall = async {
        tokio::time::sleep(millis(1000)).await;
        slow.proxy.stall();
        Instant::now()
    };
    let (written, stalled) = tokio::join!(deadline(LIMIT, "the write", write), stall);
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(stalled.elapsed() < millis(5000), "{:?} after the line stopped", stalled.elapsed());
}
