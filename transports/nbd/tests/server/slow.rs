//! Clients that dribble, clients that never read, and clients on a slow line. Time is virtual, and the streams hold as
//! much as a test says.

use std::num::NonZeroUsize;
use std::time::Duration;

use r3map_nbd::tls::{ClientCertificates, server_config};
use r3map_nbd::wire::{ClientFlags, ClientOption, Command, Framing, Greeting, InfoRequest, Request, Text};
use r3map_nbd::{Server, ServerExport, ServerSettings, Tls};
use r3map_testkit::deadline;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::support::{LONG, contents, filled, memory, request, write};
use crate::tls::certificates;

const SIZE: u64 = 8 << 20;
/// What a stream holds that nobody reads.
const WINDOW: usize = 4 << 10;
const SECOND: Duration = Duration::from_secs(1);

fn server(settings: ServerSettings) -> Server {
    Server::new(vec![ServerExport::new("disk", memory(SIZE, 1))], settings).unwrap()
}

/// A client in transmission, with simple replies.
fn connect(server: &Server) -> (DuplexStream, JoinHandle<()>) {
    let (near, far) = duplex(WINDOW);
    let (_, serving) = server.serve_export(far, "disk").unwrap();
    (near, serving)
}

fn encoded(request: Request) -> Vec<u8> {
    let mut out = Vec::new();
    request.encode(Framing::Simple, &mut out).unwrap();
    out
}

/// Sends one byte after another, slowly, until the other side wants no more; how long that took.
async fn dribble(stream: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8], pause: Duration) -> Option<Duration> {
    let begun = Instant::now();
    for byte in bytes {
        if stream.write_all(&[*byte]).await.is_err() {
            return Some(begun.elapsed());
        }
        sleep(pause).await;
    }
    None
}

/// How long a client keeps its place that dribbles with the default settings.
fn limit() -> Duration {
    ServerSettings::default().stall_limit * 2
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_dribbled_ends_the_connection() {
    let server = server(ServerSettings::default());
    let (mut near, serving) = connect(&server);
    let header = encoded(request(Command::Read, 1, 0, 512));
    let after = dribble(&mut near, &header, SECOND * 10).await.expect("it is not waited for");
    assert!(after < limit(), "{after:?}");
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_payload_that_is_dribbled_ends_the_connection_and_is_not_written() {
    let memory = memory(SIZE, 1);
    let export = ServerExport::new("disk", memory.clone());
    let server = Server::new(vec![export], ServerSettings::default()).unwrap();
    // The second is refused, and its payload is to be skipped.
    for offset in [0, SIZE] {
        let (mut near, serving) = connect(&server);
        near.write_all(&encoded(write(Framing::Simple, 1, offset, 100_000))).await.unwrap();
        let after = dribble(&mut near, &[9; 100_000], SECOND).await.expect("it is not waited for");
        assert!(after < limit(), "{after:?}");
        serving.await.unwrap();
    }
    assert!(contents(&memory) == filled(SIZE, 1));
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_is_read_byte_by_byte_ends_the_connection() {
    let server = server(ServerSettings::default());
    let (mut near, serving) = connect(&server);
    near.write_all(&encoded(request(Command::Read, 1, 0, 100_000))).await.unwrap();
    let begun = Instant::now();
    // Requests that come in the meantime are no excuse.
    for cookie in 2.. {
        if serving.is_finished() {
            break;
        }
        near.read_u8().await.unwrap();
        if cookie % 30 == 0 {
            near.write_all(&encoded(request(Command::Flush, cookie, 0, 0))).await.unwrap();
        }
        sleep(SECOND).await;
    }
    assert!(begun.elapsed() < limit(), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_is_dribbled_is_over_at_its_limit() {
    let pki = certificates(&["server"]);
    let tls = Tls::Required(server_config(pki.path(), ClientCertificates::None).unwrap());
    let server = server(ServerSettings { tls, ..ServerSettings::default() });
    let limit = ServerSettings::default().handshake_limit + SECOND;
    let mut options = Vec::new();
    options.extend_from_slice(&(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES).encode());
    ClientOption::Go(InfoRequest { name: Text::default(), wanted: vec![] }).encode(&mut options);
    let mut secure = options[..4].to_vec();
    ClientOption::StartTls.encode(&mut secure);
    // What is said at once, and what is dribbled: options, and the beginning of a long TLS record.
    for (at_once, dribbled) in [(&options[..0], &options[..]), (&secure[..], &[0x16, 3, 1, 0x3f, 0xff, 1, 0][..])] {
        let (mut near, far) = duplex(WINDOW);
        let serving = server.serve(far);
        near.read_exact(&mut [0; Greeting::LEN]).await.unwrap();
        near.write_all(at_once).await.unwrap();
        let after = dribble(&mut near, &[dribbled, &[0; 100]].concat(), SECOND).await.expect("it is not waited for");
        assert!(after <= limit, "{after:?}");
        serving.await.unwrap();
    }
    assert_eq!(server.connections(), 0);
}

/// Half a megabit a second, in either direction and with nothing set.
#[tokio::test(start_paused = true)]
async fn a_slow_line_is_good_enough() {
    const PART: usize = 62_500 / 10;
    let pause = SECOND / 10;
    let memory = memory(SIZE, 1);
    let export = ServerExport::new("disk", memory.clone());
    let server = Server::new(vec![export], ServerSettings::default()).unwrap();
    let (mut near, _serving) = connect(&server);
    let begun = Instant::now();
    let bytes = filled(SIZE, 2);
    near.write_all(&encoded(write(Framing::Simple, 1, 0, SIZE))).await.unwrap();
    for part in bytes.chunks(PART) {
        near.write_all(part).await.unwrap();
        sleep(pause).await;
    }
    near.read_exact(&mut [0; 16]).await.unwrap();
    assert!(contents(&memory) == bytes);
    near.write_all(&encoded(request(Command::Read, 1, 0, SIZE))).await.unwrap();
    near.read_exact(&mut [0; 16]).await.unwrap();
    for part in bytes.chunks(PART) {
        let mut read = vec![0; part.len()];
        near.read_exact(&mut read).await.unwrap();
        assert!(read == part);
        sleep(pause).await;
    }
    assert!(begun.elapsed() > ServerSettings::default().stall_limit * 2, "that was no slow line");
}

/// With the proportions of the default settings: eight of them would have all of the room if each took what it may.
#[tokio::test(start_paused = true)]
async fn those_who_never_read_or_dribble_hold_up_nobody() {
    const CLIENTS: u64 = 24;
    const LENGTH: u64 = 16 << 10;
    let settings = ServerSettings {
        max_payload: 512 << 10,
        connection_in_flight: 1 << 20,
        in_flight: 8 << 20,
        connections: NonZeroUsize::new(1000).unwrap(),
        ..ServerSettings::default()
    };
    let stall = settings.stall_limit;
    let server = server(settings);
    let mut there = Vec::new();
    for _ in 0..CLIENTS {
        let (mut half_way, _) = connect(&server);
        half_way.write_all(&encoded(write(Framing::Simple, 1, 0, LENGTH))).await.unwrap();
        half_way.write_all(&[1; 1000]).await.unwrap();
        there.push(half_way);
    }
    for _ in 0..CLIENTS {
        let (mut deaf, _) = connect(&server);
        for cookie in 0..100 {
            deaf.write_all(&encoded(request(Command::Read, cookie, 0, LENGTH))).await.unwrap();
        }
        there.push(deaf);
    }
    let begun = Instant::now();
    let (mut other, _) = connect(&server);
    let others = async {
        for cookie in 0..64 {
            other.write_all(&encoded(request(Command::Read, cookie, 0, LENGTH))).await.unwrap();
            let mut reply = vec![0; 16 + usize::try_from(LENGTH).unwrap()];
            other.read_exact(&mut reply).await.unwrap();
            assert!(reply[16..] == filled(LENGTH, 1));
        }
    };
    deadline(LONG, "a client that reads", others).await;
    assert!(begun.elapsed() < SECOND, "it waited for {:?}", begun.elapsed());
    assert_eq!(server.connections() as u64, 2 * CLIENTS + 1, "they are still there");
    sleep(stall * 2).await;
    assert_eq!(server.connections(), 1, "they had their time");
}
