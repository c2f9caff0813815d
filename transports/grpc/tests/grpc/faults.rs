//! What happens to calls when the server, the connection or the region behind it goes away: an error in time, never
//! wrong bytes, and no acknowledged write that a good flush did not keep.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use r3map_core::{Backend, ChunkSize, ErrorKind, Operation, Result};
use r3map_grpc::{Client, ClientSettings, Server, ServerSettings, Target};
use r3map_local::Memory;
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::{crash, deadline, fill};

use crate::common::{LIMIT, any_port, connect, go_settings, lasting, serve, settings};

const SIZE: u64 = 300_000;

fn memory() -> Arc<Memory> {
    Arc::new(Memory::new(SIZE).unwrap())
}

/// A server where the last one was, which was dropped and may still be letting go of its port.
async fn serve_again(backend: Arc<dyn Backend>, settings: ServerSettings, target: &Target) -> Server {
    let server = Server::new(backend, settings).unwrap();
    in_time("the port", async {
        while let Err(error) = server.listen(target).await {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            tokio::task::yield_now().await;
        }
    })
    .await;
    server
}

async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    deadline(LIMIT, what, future).await
}

/// Makes a call until it says something else than that the connection is not there: it may not have noticed yet that the
/// last one is lost, and then the call is one that was under way.
async fn settled<T>(mut call: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    in_time("an answer", async {
        loop {
            match call().await {
                Err(error) if error.kind() == ErrorKind::Unavailable => tokio::task::yield_now().await,
                other => return other,
            }
        }
    })
    .await
}

#[tokio::test]
async fn every_kind_of_error_arrives() {
    let faults = Faults::new(memory());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = connect(&target).await;
    for kind in [
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        ErrorKind::Denied,
        ErrorKind::Exhausted,
        ErrorKind::Unavailable,
        ErrorKind::Corrupt,
        ErrorKind::Conflict,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ] {
        faults.add(Rule::any().fail(kind));
        let error = client.read_at(10, &mut [0; 20]).await.unwrap_err();
        assert_eq!((error.kind(), error.operation(), error.range()), (kind, Operation::Read, Some((10, 20))));
        let error = client.write_at(10, &[0; 20]).await.unwrap_err();
        assert_eq!((error.kind(), error.operation(), error.range()), (kind, Operation::Write, Some((10, 20))));
        match (client.flush().await, kind) {
            (flushed, ErrorKind::Conflict) => flushed.expect("nothing was acknowledged that could be lost"),
            (flushed, _) => assert_eq!(flushed.unwrap_err().kind(), kind),
        }
        faults.clear();
    }
    client.flush().await.unwrap();
}

#[tokio::test]
async fn calls_in_progress_fail_when_the_server_goes_and_the_next_ones_find_it_again() {
    let memory = memory();
    let faults = Faults::new(memory.clone());
    let (server, target) = serve(faults.clone(), lasting()).await;
    let client = Arc::new(connect(&target).await);
    faults.add(Rule::any().hang());
    let reading = tokio::spawn({
        let client = client.clone();
        async move { client.read_at(0, &mut [0; 100]).await }
    });
    let writing = tokio::spawn({
        let client = client.clone();
        async move { client.write_at(0, &[1; 100]).await }
    });
    faults.wait_in_flight(2).await;
    drop(server);
    for call in [reading, writing] {
        let error = in_time("the end of a call", call).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.message().contains(&target.to_string()), "{error}");
    }
    in_time("idle", faults.wait_idle()).await;
    let error = client.read_at(0, &mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("cannot connect"), "{error}");

    let _server = serve_again(memory, lasting(), &target).await;
    client.write_at(0, b"again").await.unwrap();
    client.flush().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_gone_between_write_and_flush_fails_the_flush_once() {
    let memory = memory();
    let (server, target) = serve(memory.clone(), lasting()).await;
    let client = connect(&target).await;
    client.write_at(0, b"kept").await.unwrap();
    client.flush().await.unwrap();
    client.write_at(100, b"lost?").await.unwrap();
    drop(server);
    let error = client.flush().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "nobody is there");

    let _server = serve_again(memory, lasting(), &target).await;
    client.write_at(200, b"to the new one").await.unwrap();
    let error = client.flush().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.message().contains("the server restarted since these writes, or what it serves did"), "{error}");
    client.write_at(100, b"lost?").await.unwrap();
    client.flush().await.unwrap();
}

/// The backend tells of what it has lost once, to whoever flushes first, as a remote does that was restarted.
#[tokio::test]
async fn what_the_backend_has_lost_each_client_hears_of_that_may_have_lost_something() {
    let faults = Faults::new(memory());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let go = async || Client::connect(target.clone(), go_settings(SIZE)).await.unwrap();
    let (writers, gos) = ([connect(&target).await, connect(&target).await], [go().await, go().await]);
    let innocent = connect(&target).await;
    // Whoever flushes first.
    for first in [&innocent, &writers[0], &gos[0]] {
        for client in writers.iter().chain(&gos) {
            client.write_at(0, b"lost").await.unwrap();
        }
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
        let told = first.flush().await;
        assert_eq!(told.is_ok(), std::ptr::eq(first, &innocent), "it has lost nothing");
        for client in writers.iter().chain(&gos).filter(|client| !std::ptr::eq(*client, first)) {
            assert_eq!(client.flush().await.unwrap_err().kind(), ErrorKind::Conflict);
        }
        for client in writers.iter().chain(&gos).chain([&innocent]) {
            client.flush().await.expect("it was told, once");
        }
    }
}

#[tokio::test]
async fn a_write_under_way_while_the_backend_tells_of_a_loss_counts_as_lost() {
    let faults = Faults::new(memory());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let (client, other) = (Arc::new(connect(&target).await), connect(&target).await);
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Write).times(1).hold_after(&pause));
    let writing = {
        let client = client.clone();
        tokio::spawn(async move { client.write_at(0, b"late").await })
    };
    pause.wait_held(1).await;
    faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
    other.flush().await.unwrap();
    pause.release();
    in_time("the write", writing).await.unwrap().unwrap();
    assert_eq!(client.flush().await.unwrap_err().kind(), ErrorKind::Conflict);
    client.flush().await.unwrap();
}

#[tokio::test]
async fn a_restart_without_unflushed_writes_does_not_fail_a_flush() {
    let memory = memory();
    let (server, target) = serve(memory.clone(), lasting()).await;
    let client = connect(&target).await;
    client.write_at(0, b"kept").await.unwrap();
    client.flush().await.unwrap();
    drop(server);
    let _server = serve_again(memory, lasting(), &target).await;
    settled(async || client.flush().await).await.unwrap();
}

#[tokio::test]
async fn a_trim_counts_as_a_write() {
    let memory = memory();
    let (server, target) = serve(memory.clone(), lasting()).await;
    let client = connect(&target).await;
    client.capabilities().trim.unwrap().trim(0, 4096).await.unwrap();
    drop(server);
    let _server = serve_again(memory, lasting(), &target).await;
    assert_eq!(settled(async || client.flush().await).await.unwrap_err().kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn a_lost_connection_to_a_go_server_between_write_and_flush_fails_the_flush_once() {
    let (_server, target) = serve(memory(), lasting()).await;
    let Target::Tcp { port, .. } = target else { panic!("it is TCP") };
    let proxy = DelayProxy::tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)), Duration::ZERO).unwrap();
    let go = crate::common::tonic_go::serve(memory()).await.to_string();
    proxy.retarget(go.parse::<std::net::SocketAddr>().unwrap());
    let target = proxy.socket_addr().to_string().parse().unwrap();
    let client = Client::connect(target, go_settings(SIZE)).await.unwrap();

    client.write_at(0, b"bytes").await.unwrap();
    client.flush().await.unwrap();
    client.write_at(0, b"other").await.unwrap();
    proxy.reset();
    let error = settled(async || client.flush().await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.message().contains("the connection broke"), "{error}");
    client.write_at(0, b"other").await.unwrap();
    client.flush().await.unwrap();
}

/// A program in Go that could not sync may have forgotten what it had; that the next sync succeeds says nothing.
#[tokio::test]
async fn what_a_go_server_could_not_sync_counts_as_lost() {
    let faults = Faults::new(memory());
    let target = crate::common::tonic_go::serve(faults.clone()).await;
    let client = Client::connect(target, go_settings(SIZE)).await.unwrap();
    let fail = || faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Internal));
    fail();
    assert_eq!(client.flush().await.unwrap_err().kind(), ErrorKind::Internal, "nothing was written");
    client.write_at(0, b"lost").await.unwrap();
    fail();
    let error = client.flush().await.unwrap_err();
    assert!(error.kind() == ErrorKind::Conflict && error.message().contains("write them again"), "{error}");
    client.flush().await.expect("that was told");
}

/// It tells that once. Whoever it tells may wait no more, or not be the only one who flushes.
#[tokio::test]
async fn a_failure_of_a_sync_that_was_given_up_is_told_by_the_next_and_to_all_who_wait() {
    let faults = Faults::new(memory());
    let target = crate::common::tonic_go::serve(faults.clone()).await;
    let client = Client::connect(target, go_settings(SIZE)).await.unwrap();
    for given_up in [true, false] {
        client.write_at(0, b"lost").await.unwrap();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Flush).times(1).hold(&pause));
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Internal));
        let mut first = Some(Box::pin(client.flush()));
        assert!(first.as_mut().unwrap().now_or_never().is_none());
        in_time("the first flush", pause.wait_held(1)).await;
        if given_up {
            first = None;
        }
        let mut second = Box::pin(client.flush());
        assert!(second.as_mut().now_or_never().is_none());
        pause.release();
        for flush in first.into_iter().chain([second]) {
            assert_eq!(in_time("a flush", flush).await.unwrap_err().kind(), ErrorKind::Conflict);
        }
        in_time("another flush", client.flush()).await.expect("that was told");
    }
}

#[tokio::test]
async fn another_region_in_the_same_place_is_refused_until_the_first_is_back() {
    let memory = memory();
    let (server, target) = serve(memory.clone(), lasting()).await;
    let client = connect(&target).await;
    client.write_at(0, b"ours").await.unwrap();
    client.flush().await.unwrap();
    drop(server);
    let other_size: Arc<dyn Backend> = Arc::new(Memory::new(SIZE - 1).unwrap());
    let other_chunk = ServerSettings { chunk_size: Some(ChunkSize::MIN), ..lasting() };
    let other_name = ServerSettings { identity: Some("another".to_owned()), ..lasting() };
    for (backend, settings, words) in [
        (other_size, lasting(), "has 299999 bytes where it had 300000"),
        (memory.clone(), other_chunk, "has chunks of 4KiB where it had 64KiB"),
        (memory.clone(), other_name, "is not the one that was there before"),
        (memory.clone(), ServerSettings::default(), "is not the one that was there before"),
    ] {
        let server = serve_again(backend, settings, &target).await;
        let error = settled(async || client.read_at(0, &mut [0; 4]).await).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.message().contains(words), "{error}");
        drop(server);
    }
    let _server = serve_again(memory, lasting(), &target).await;
    let mut bytes = [0; 4];
    settled(async || client.read_at(0, &mut bytes).await).await.unwrap();
    assert_eq!(&bytes, b"ours");
}

#[tokio::test]
async fn memory_that_died_with_its_server_is_never_read_as_zeros() {
    let (server, target) = serve(memory(), ServerSettings::default()).await;
    let client = connect(&target).await;
    client.write_at(0, b"only in memory").await.unwrap();
    drop(server);
    let _server = serve_again(memory(), ServerSettings::default(), &target).await;
    let error = settled(async || client.read_at(0, &mut [0; 14]).await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

#[tokio::test]
async fn a_region_that_is_served_on_keeps_its_identity() {
    let (_first, first) = serve(memory(), lasting()).await;
    let (middle, target) = serve(Arc::new(connect(&first).await), ServerSettings::default()).await;
    let client = connect(&target).await;
    assert_eq!(client.capabilities().identity, Some(b"the test's region".as_ref()));
    client.write_at(0, b"through both").await.unwrap();
    client.flush().await.unwrap();
    drop(middle);
    let _middle = serve_again(Arc::new(connect(&first).await), ServerSettings::default(), &target).await;
    let mut bytes = [0; 12];
    settled(async || client.read_at(0, &mut bytes).await).await.unwrap();
    assert_eq!(&bytes, b"through both");
}

#[tokio::test]
async fn a_go_server_in_place_of_ours_is_refused() {
    let (server, target) = serve(memory(), lasting()).await;
    let Target::Tcp { port, .. } = target else { panic!("it is TCP") };
    let proxy = DelayProxy::tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)), Duration::ZERO).unwrap();
    let target = proxy.socket_addr().to_string().parse().unwrap();
    let client = Client::connect(target, go_settings(SIZE)).await.unwrap();
    let go = crate::common::tonic_go::serve(memory()).await.to_string();
    proxy.retarget(go.parse::<std::net::SocketAddr>().unwrap());
    drop(server);
    let error = settled(async || client.read_at(0, &mut [0; 4]).await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
}

/// The write is in progress at the server when its connection breaks. What the client writes next must win.
#[tokio::test]
async fn a_write_of_a_lost_connection_never_lands_after_a_later_one() {
    let memory = memory();
    let faults = Faults::new(memory.clone());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let Target::Tcp { port, .. } = target else { panic!("it is TCP") };
    let proxy = DelayProxy::tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)), Duration::ZERO).unwrap();
    let client = Arc::new(connect(&proxy.socket_addr().to_string().parse().unwrap()).await);

    let pause = Pause::new();
    faults.add(Rule::on(Operation::Write).times(1).hold(&pause));
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.write_at(0, &[1; 5000]).await }
    });
    in_time("a held write", pause.wait_held(1)).await;
    proxy.reset();
    assert_eq!(first.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    pause.release();
    in_time("a later write", client.write_at(0, &[2; 5000])).await.unwrap();
    in_time("idle", faults.wait_idle()).await;
    let mut bytes = [0; 5000];
    memory.read_at(0, &mut bytes).await.unwrap();
    assert_eq!(bytes, [2; 5000]);
}

#[tokio::test]
async fn a_write_that_was_given_up_is_waited_for_by_the_next_one_to_its_bytes_only() {
    let memory = memory();
    let faults = Faults::new(memory.clone());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = connect(&target).await;
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Write).times(1).hold(&pause));
    tokio::select! {
        _ = client.write_at(0, &[1; 100]) => panic!("it is held"),
        () = pause.wait_held(1) => {}
    }
    in_time("a write elsewhere", client.write_at(100, &[3; 100])).await.unwrap();
    let mut next = Box::pin(client.write_at(50, &[2; 50]));
    let early = tokio::time::timeout(Duration::from_millis(100), &mut next).await;
    assert!(early.is_err(), "it overtook the one before");
    pause.release();
    in_time("the next write", next).await.unwrap();
    let mut bytes = [0; 200];
    memory.read_at(0, &mut bytes).await.unwrap();
    assert_eq!(bytes.to_vec(), [vec![1; 50], vec![2; 50], vec![3; 100]].concat());
}

fn impatient() -> ClientSettings {
    ClientSettings { keep_alive: Duration::from_millis(200), connect_timeout: Duration::from_millis(500), ..settings() }
}

#[tokio::test]
async fn a_line_that_swallows_everything_is_noticed() {
    let faults = Faults::new(memory());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let Target::Tcp { port, .. } = target else { panic!("it is TCP") };
    let proxy = DelayProxy::tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)), Duration::ZERO).unwrap();
    let target: Target = proxy.socket_addr().to_string().parse().unwrap();
    let client = Client::connect(target.clone(), impatient()).await.unwrap();
    client.read_at(0, &mut [0; 10]).await.unwrap();
    proxy.stall();
    let error = in_time("a call on a dead line", client.read_at(0, &mut [0; 10])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("no sign of life"), "{error}");
    let error = in_time("connecting over a dead line", client.read_at(0, &mut [0; 10])).await.unwrap_err();
    assert!(error.message().contains("does not answer"), "{error}");
    proxy.heal();
    settled(async || client.read_at(0, &mut [0; 10]).await).await.unwrap();
}

#[tokio::test]
async fn a_slow_answer_is_no_dead_line() {
    let faults = Faults::new(memory());
    let (_server, target) = serve(faults.clone(), lasting()).await;
    let client = Client::connect(target, impatient()).await.unwrap();
    faults.add(Rule::on(Operation::Read).delay(Duration::from_millis(1500)));
    client.read_at(0, &mut [0; 10]).await.unwrap();
}

#[tokio::test]
async fn closing_lets_requests_end() {
    let faults = Faults::new(memory());
    let (server, target) = serve(faults.clone(), lasting()).await;
    let client = Arc::new(connect(&target).await);
    let pause = Pause::new();
    faults.add(Rule::any().hold(&pause));
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.write_at(0, b"in progress").await }
    });
    pause.wait_held(1).await;
    let closing = tokio::spawn(server.close(LIMIT));
    in_time("refused connections", async {
        while Client::connect(target.clone(), settings()).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!call.is_finished() && !closing.is_finished());
    pause.release();
    call.await.unwrap().unwrap();
    in_time("closing", closing).await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_ends_what_does_not_end_by_itself() {
    let faults = Faults::new(memory());
    let (server, target) = serve(faults.clone(), lasting()).await;
    let client = Arc::new(connect(&target).await);
    faults.add(Rule::any().hang());
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.read_at(0, &mut [0; 10]).await }
    });
    faults.wait_in_flight(1).await;
    let error = in_time("closing", server.close(Duration::from_millis(50))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(faults.in_flight(), 0, "nothing runs when it has returned");
    assert_eq!(in_time("the call", call).await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn an_idle_client_does_not_keep_a_server_from_closing() {
    let (server, target) = serve(memory(), lasting()).await;
    let client = connect(&target).await;
    client.flush().await.unwrap();
    in_time("closing", server.close(LIMIT)).await.unwrap();
}

#[tokio::test]
async fn a_client_works_from_another_runtime_and_fails_when_its_own_is_gone() {
    let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (_server, target) = serve(memory(), lasting()).await;
    let client = own.spawn(async move { connect(&target).await }).await.unwrap();
    client.write_at(0, b"from elsewhere").await.unwrap();
    own.shutdown_background();
    let error = settled(async || client.read_at(0, &mut [0; 10]).await).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_or_frozen_server_process_is_survived() {
    const NAME: &str = "faults::a_killed_or_frozen_server_process_is_survived";
    if let Some(target) = crash::role("server") {
        let memory = memory();
        memory.write_at(0, &fill::bytes(0, 300_000, 7)).await.unwrap();
        let server = Server::new(memory, lasting()).unwrap();
        crash::reached(&format!("listens on {}", server.listen(&target.parse().unwrap()).await.unwrap()));
        std::future::pending::<()>().await;
    }
    let mut child = crash::child(NAME, "server", &any_port().to_string());
    let line = child.wait_for_line(LIMIT, "listens on ");
    let target: Target = line.split("listens on ").nth(1).unwrap().trim().parse().unwrap();
    let client = Arc::new(Client::connect(target.clone(), impatient()).await.unwrap());
    let readers: Vec<_> = (0..8).map(|_| tokio::spawn(read_until_unavailable(client.clone()))).collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    child.kill();
    for reader in readers {
        in_time("the end of the reads", reader).await.unwrap();
    }

    let mut child = crash::child(NAME, "server", &target.to_string());
    child.wait_for_line(LIMIT, "listens on ");
    let mut buf = vec![0; 300_000];
    settled(async || client.read_at(0, &mut buf).await).await.unwrap();
    fill::check(&buf, 0, 7).unwrap();
    child.freeze();
    let error = in_time("a call to a frozen server", client.read_at(0, &mut buf)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    child.thaw();
    settled(async || client.read_at(0, &mut buf).await).await.unwrap();
    fill::check(&buf, 0, 7).unwrap();
}

async fn read_until_unavailable(client: Arc<Client>) {
    let mut buf = vec![0; 100_000];
    loop {
        match client.read_at(1000, &mut buf).await {
            Ok(()) => fill::check(&buf, 1000, 7).unwrap(),
            Err(error) => return assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
        }
    }
}
