//! What is bounded: time, memory, connections; and how a server ends.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::{ErrorKind, Operation};
use r3map_local::Memory;
use r3map_nbd::wire::{Command, Errno, Framing};
use r3map_nbd::{Address, Server, ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{FRAMINGS, LONG, Raw, Running, filled, memory, request, write};

const SIZE: u64 = 1 << 20;
const SHORT: Duration = Duration::from_millis(200);

fn export() -> Vec<ServerExport> {
    vec![ServerExport::new("disk", memory(SIZE, 1))]
}

#[tokio::test]
async fn a_client_that_says_nothing_is_sent_away() {
    let settings = ServerSettings { handshake_limit: SHORT * 10, ..ServerSettings::default() };
    let running = Running::start(export(), settings).await;
    let mut silent = Raw { stream: running.connect().await, framing: Framing::Simple };
    let mut haggling = Raw { stream: running.connect().await, framing: Framing::Simple };
    haggling.greet().await;
    haggling.stream.write_all(b"IHAVE").await.unwrap();
    let mut served = running.transmit(Framing::Simple).await;
    silent.stream.read_exact(&mut [0; 18]).await.unwrap();
    assert!(silent.is_closed().await && haggling.is_closed().await);
    assert_eq!(running.server.connections(), 1);
    assert!(served.ask(request(Command::Read, 1, 0, 9), &[]).await.is_ok(), "others are not disturbed");
}

#[tokio::test]
async fn a_client_that_stops_in_the_middle_is_sent_away_and_one_that_rests_is_not() {
    let settings = ServerSettings { stall_limit: SHORT, ..ServerSettings::default() };
    let running = Running::start(export(), settings).await;
    let mut resting = running.transmit(Framing::Simple).await;
    for framing in FRAMINGS {
        let mut in_header = running.transmit(framing).await;
        in_header.stream.write_all(&[0x25, 0x60][..if framing == Framing::Extended { 0 } else { 2 }]).await.unwrap();
        let mut in_payload = running.transmit(framing).await;
        in_payload.send(write(framing, 1, 0, 70_000), &[1; 50_000]).await;
        assert!(in_payload.is_closed().await, "{framing:?}");
        assert!(framing == Framing::Extended || in_header.is_closed().await, "{framing:?}");
    }
    let read = resting.ask(request(Command::Read, 1, 5, 70_000), &[]).await.unwrap();
    assert!(read == filled(SIZE, 1)[5..70_005], "what was not sent to its end was not written");
}

#[tokio::test]
async fn an_idle_client_is_sent_away_if_that_is_wanted() {
    let limit = SHORT * 15;
    let settings = ServerSettings { idle_limit: Some(limit), ..ServerSettings::default() };
    let running = Running::start(export(), settings).await;
    let mut raw = running.transmit(Framing::Simple).await;
    for cookie in 0..8 {
        tokio::time::sleep(limit / 6).await;
        assert!(raw.ask(request(Command::Read, cookie, 0, 9), &[]).await.is_ok(), "it is not idle");
    }
    assert!(raw.is_closed().await);
    running.is_left().await;
}

#[tokio::test]
async fn a_client_that_never_reads_takes_bounded_memory_and_nobody_s_time() {
    let faults = Faults::new(memory(SIZE, 1));
    let export = ServerExport::new("disk", faults.clone());
    let settings = ServerSettings {
        stall_limit: Duration::from_secs(1),
        max_payload: 1 << 20,
        connection_in_flight: 4 << 20,
        in_flight: 16 << 20,
        ..ServerSettings::default()
    };
    let running = Running::start(vec![export], settings).await;
    for framing in FRAMINGS {
        drop(faults.take_calls());
        let mut deaf = running.transmit(framing).await;
        let mut other = running.transmit(framing).await;
        for cookie in 0..100 {
            deaf.send(request(Command::Read, cookie, 0, SIZE), &[]).await;
        }
        let begun = Instant::now();
        assert!(other.ask(request(Command::Read, 1, 0, SIZE), &[]).await.unwrap() == filled(SIZE, 1));
        assert!(begun.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let read = faults.count(Operation::Read);
        assert!(read < 12, "{read} replies of 1 MiB were made for a client that reads none");
        drop(other);
        running.is_left().await;
    }
}

#[tokio::test]
async fn small_answers_to_a_client_that_never_reads_are_bounded_too() {
    let settings = ServerSettings { stall_limit: Duration::from_secs(1), ..ServerSettings::default() };
    let faults = Faults::new(memory(SIZE, 1));
    let running = Running::start(vec![ServerExport::new("disk", faults.clone())], settings).await;
    let mut raw = running.transmit(Framing::Structured).await;
    let mut out = Vec::new();
    (0..100_000).for_each(|cookie| request(Command::Flush, cookie, 0, 0).encode(Framing::Simple, &mut out).unwrap());
    let sending = tokio::time::timeout(LONG, raw.stream.write_all(&out)).await.expect("stuck");
    assert!(sending.is_err(), "the server took more than it can answer");
    running.is_left().await;
    assert!(faults.count(Operation::Flush) < 100_000);
}

#[tokio::test]
async fn more_connections_than_there_may_be_wait() {
    let settings = ServerSettings { connections: NonZeroUsize::new(2).unwrap(), ..ServerSettings::default() };
    let running = Running::start(export(), settings).await;
    let first = running.transmit(Framing::Simple).await;
    let _second = running.transmit(Framing::Simple).await;
    let mut third = running.connect().await;
    let mut greeting = [0; 18];
    let waiting = tokio::time::timeout(Duration::from_millis(50), third.read_exact(&mut greeting)).await;
    assert!(waiting.is_err(), "a third was served");
    drop(first);
    tokio::time::timeout(LONG, third.read_exact(&mut greeting)).await.expect("stuck").unwrap();
}

#[tokio::test]
async fn closing_answers_what_is_in_flight_and_refuses_the_rest() {
    let pause = Pause::new();
    let faults = Faults::new(memory(SIZE, 1));
    faults.add(Rule::on(Operation::Write).hold(&pause));
    let Running { server, directory } = Running::one(faults).await;
    let socket = directory.path().join("nbd.sock");
    let connect = async |framing| Raw { stream: tokio::net::UnixStream::connect(&socket).await.unwrap(), framing };
    let mut busy = connect(Framing::Structured).await;
    busy.greet().await;
    busy.go().await;
    let mut haggling = connect(Framing::Simple).await;
    haggling.greet().await;
    let asked = write(Framing::Structured, 1, 0, 4096);
    busy.send(asked, &[1; 4096]).await;
    pause.wait_held(1).await;
    let closing = tokio::spawn(server.close(LONG));
    assert!(haggling.is_closed().await, "it has nothing to lose");
    pause.release();
    assert_eq!(busy.reply(&asked).await, Ok(vec![]));
    assert!(busy.is_closed().await);
    closing.await.unwrap().unwrap();
    assert!(!socket.exists(), "the socket's file is removed");
}

/// With requests still unread, TCP resets what is closed, and with it the answers that were sent but not received.
#[tokio::test]
async fn closing_over_tcp_loses_no_answer() {
    const LENGTH: usize = 1 << 20;
    let server =
        Server::new(vec![ServerExport::new("disk", memory(SIZE.max(LENGTH as u64), 1))], ServerSettings::default());
    let server = server.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
    let (mut near, (far, _)) = (near.unwrap(), far.unwrap());
    let (_, _serving) = server.serve_export(far, "disk").unwrap();
    let mut asked = Vec::new();
    for cookie in 0..200 {
        request(Command::Read, cookie, 0, LENGTH as u64).encode(Framing::Simple, &mut asked).unwrap();
    }
    near.write_all(&asked).await.unwrap();
    // The first answers fill the sockets while the client does not look.
    let mut answers = vec![0; 16];
    near.read_exact(&mut answers).await.unwrap();
    let closing = tokio::spawn(server.close(LONG));
    // What it still asks for stays unread.
    near.write_all(&asked).await.unwrap();
    let received = near.read_to_end(&mut answers).await.expect("it ends, and is not reset");
    assert!(received > LENGTH, "{received}");
    assert_eq!(whole_replies(&answers, LENGTH), Ok(()), "every answer is whole");
    drop(near);
    closing.await.unwrap().unwrap();
}

/// Whether simple replies to reads of `length` bytes follow one another, refusals without data among them.
fn whole_replies(mut bytes: &[u8], length: usize) -> Result<(), String> {
    while !bytes.is_empty() {
        let header = bytes.get(..16).ok_or("a header is cut")?;
        let data = if header[4..8] == [0; 4] { length } else { 0 };
        bytes = bytes.get(16 + data..).ok_or("data are cut")?;
    }
    Ok(())
}

#[tokio::test]
async fn closing_gives_up_what_takes_too_long() {
    let faults = Faults::new(Arc::new(Store::new(SIZE)));
    faults.add(Rule::on(Operation::Read).hang());
    let Running { server, directory: _directory } = Running::one(faults.clone()).await;
    let (near, far) = tokio::net::UnixStream::pair().unwrap();
    let (_, serving) = server.serve_export(far, "disk").unwrap();
    let mut raw = Raw { stream: near, framing: Framing::Simple };
    raw.send(request(Command::Read, 1, 0, 512), &[]).await;
    faults.wait_in_flight(1).await;
    let error = server.close(Duration::from_millis(10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    serving.await.unwrap();
    assert_eq!(faults.in_flight(), 0);
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn a_socket_that_was_left_behind_is_taken_over_and_one_in_use_is_not() {
    let running = Running::start(export(), ServerSettings::default()).await;
    let address = Address::Unix(running.socket());
    let second = Server::new(export(), ServerSettings::default()).unwrap();
    assert_eq!(second.listen(&address).await.unwrap_err().kind(), ErrorKind::Conflict);
    let stale = running.file("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    second.listen(&Address::Unix(stale.clone())).await.unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&stale).unwrap().permissions()) & 0o777,
        0o600
    );
    std::fs::write(running.file("file"), b"precious").unwrap();
    assert_eq!(second.listen(&Address::Unix(running.file("file"))).await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(std::fs::read(running.file("file")).unwrap(), b"precious");
    let name = format!("\0{}", stale.display());
    second.listen(&Address::Unix(name.into())).await.unwrap();
}

#[tokio::test]
async fn tcp_is_served_on_a_port_that_the_system_chooses() {
    let server = Server::new(export(), ServerSettings::default()).unwrap();
    let address = server.listen(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).await.unwrap();
    let Address::Tcp { host, port } = &address else { panic!("{address}") };
    let mut stream = tokio::net::TcpStream::connect((host.as_str(), *port)).await.unwrap();
    stream.read_exact(&mut [0; 18]).await.unwrap();
    assert_eq!(server.listen(&address).await.unwrap_err().kind(), ErrorKind::Conflict);
    let nowhere = Address::Tcp { host: "192.0.2.1".into(), port: 0 };
    assert_eq!(server.listen(&nowhere).await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn settings_that_contradict_each_other_are_refused() {
    let ok = ServerSettings::default;
    for (settings, says) in [
        (ServerSettings { max_payload: 1000, ..ok() }, "64 KiB"),
        (ServerSettings { connection_in_flight: 1 << 20, ..ok() }, "cannot hold"),
        (ServerSettings { in_flight: 33 << 20, ..ok() }, "over all"),
        (ServerSettings { stall_limit: Duration::ZERO, ..ok() }, "time limit"),
        (ServerSettings { default_export: Some("x".into()), ..ok() }, "no export is \"x\""),
    ] {
        let error = Server::new(export(), settings).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidInput && error.message().contains(says), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_is_closing_says_so() {
    let pause = Pause::new();
    let faults = Faults::new(Arc::new(Memory::new(SIZE).unwrap()));
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let Running { server, directory: _directory } = Running::one(faults).await;
    let (near, far) = tokio::net::UnixStream::pair().unwrap();
    server.serve(far);
    let mut raw = Raw { stream: near, framing: Framing::Structured };
    raw.greet().await;
    raw.go().await;
    // One that is held, and more than are begun: those that wait in the input are refused when the server closes.
    let mut out = Vec::new();
    (0..300).for_each(|cookie| request(Command::Read, cookie, 0, 4096).encode(raw.framing, &mut out).unwrap());
    raw.stream.write_all(&out).await.unwrap();
    pause.wait_held(256).await;
    let closing = tokio::spawn(server.close(LONG));
    tokio::task::yield_now().await;
    pause.release();
    let mut refused = 0;
    for _ in 0..300 {
        match raw.any_reply(&request(Command::Read, 0, 0, 4096)).await.1 {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, Errno::Shutdown);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 300 - 256);
    closing.await.unwrap().unwrap();
}
