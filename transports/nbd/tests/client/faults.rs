//! Servers that die, freeze, and come back, also as somebody else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use r3map_core::{Backend, ErrorKind, Operation};
use r3map_nbd::{Client, ClientSettings, NbdUri, Server, ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::process::Process;
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::support::{LONG, nbdkit, read, socket_in, unix_uri};

const SIZE: usize = 4 << 20;

/// A place where servers come and go, and a client of it.
struct Place {
    directory: TempDir,
    server: Process,
    client: Arc<Client>,
}

impl Place {
    async fn new(text: &str, settings: ClientSettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::File::create(directory.path().join("disk")).unwrap().set_len(SIZE as u64).unwrap();
        let server = start(directory.path(), text);
        let uri = unix_uri(&socket_in(directory.path()), "");
        let client = Arc::new(Client::connect(uri, settings).await.unwrap());
        Self { directory, server, client }
    }

    fn restart(&mut self, text: &str) {
        self.server.kill();
        std::fs::remove_file(socket_in(self.directory.path())).unwrap();
        self.server = start(self.directory.path(), text);
    }
}

/// Starts nbdkit; `DISK` in its arguments is a file.
fn start(directory: &Path, text: &str) -> Process {
    let disk = directory.join("disk");
    nbdkit(&socket_in(directory), &text.replace("DISK", disk.to_str().unwrap()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_started_again() {
    let mut place = Place::new("file DISK", ClientSettings::default()).await;
    let client = place.client.clone();
    client.write_at(0, &fill::bytes(0, SIZE, 1)).await.unwrap();
    client.flush().await.unwrap();
    place.server.kill();
    let mut buf = vec![0; 100_000];
    let error = client.read_at(0, &mut buf).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(!error.to_string().contains('\n'));
    place.restart("file DISK");
    fill::check(&read(&*client, 0, SIZE).await, 0, 1).unwrap();
    client.flush().await.expect("everything was flushed before the restart");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_under_way_when_the_server_dies_fail_or_are_made_again() {
    let mut place = Place::new("--filter=delay file DISK rdelay=300ms wdelay=300ms", ClientSettings::default()).await;
    let calls = (0..32u64).map(|n| {
        let client = place.client.clone();
        tokio::spawn(async move {
            let offset = n * 100_000;
            match n % 2 {
                0 => client.write_at(offset, &fill::bytes(offset, 100_000, 1)).await,
                _ => client.read_at(offset, &mut vec![0; 100_000]).await,
            }
        })
    });
    let calls: Vec<_> = calls.collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    place.restart("file DISK");
    for call in calls {
        if let Err(error) = call.await.unwrap() {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
    }
    place.client.write_at(0, &fill::bytes(0, SIZE, 2)).await.unwrap();
    fill::check(&read(&*place.client, 0, SIZE).await, 0, 2).unwrap();
}

/// The way to a server, on which a request gets lost when somebody says so, and its connection with it.
#[derive(Clone, Default)]
struct Way {
    breaks: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
}

impl Way {
    async fn lead(self, from: UnixListener, to: PathBuf) {
        while let Ok((client, _)) = from.accept().await {
            self.connections.fetch_add(1, SeqCst);
            tokio::spawn(self.clone().connect(client, UnixStream::connect(&to).await.unwrap()));
        }
    }

    async fn connect(self, mut client: UnixStream, mut server: UnixStream) {
        let (mut asked, mut answered) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        loop {
            let sent = tokio::select! {
                read = client.read(&mut asked) => match read {
                    Ok(len @ 1..) if !self.breaks.swap(false, SeqCst) => server.write_all(&asked[..len]).await,
                    _ => return,
                },
                read = server.read(&mut answered) => match read {
                    Ok(len @ 1..) => client.write_all(&answered[..len]).await,
                    _ => return,
                },
            };
            if sent.is_err() {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_request_whose_connection_breaks_before_it_is_answered_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let _server = nbdkit(&socket_in(directory.path()), "memory 4M");
    let (way, place) = (Way::default(), directory.path().join("way"));
    tokio::spawn(way.clone().lead(UnixListener::bind(&place).unwrap(), socket_in(directory.path())));
    let settings = ClientSettings { connections: 1.try_into().unwrap(), ..ClientSettings::default() };
    let client = Client::connect(unix_uri(&place, ""), settings).await.unwrap();
    client.write_at(0, &fill::bytes(0, 100_000, 1)).await.unwrap();
    client.flush().await.unwrap();
    let breaks = |number| {
        assert!(!way.breaks.swap(true, SeqCst), "a request was lost");
        assert_eq!(way.connections.load(SeqCst), number, "with its connection, and nothing else");
    };
    breaks(1);
    client.write_at(100_000, &fill::bytes(100_000, 100_000, 1)).await.unwrap();
    breaks(2);
    let mut buf = vec![0; 200_000];
    client.read_at(0, &mut buf).await.unwrap();
    fill::check(&buf, 0, 1).unwrap();
    breaks(3);
    client.capabilities().write_zeroes.unwrap().write_zeroes(0, 100_000).await.unwrap();
    breaks(4);
    client.capabilities().extents.unwrap().extents(0, 4 << 20).await.unwrap();
    breaks(5);
    client.read_at(0, &mut buf).await.unwrap();
    assert!(buf[..100_000].iter().all(|byte| *byte == 0));
    fill::check(&buf[100_000..], 100_000, 1).unwrap();
    assert_eq!(way.connections.load(SeqCst), 6);
}

/// The writes that a dead server had acknowledged and not flushed are gone: no flush says otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_does_not_promise_what_a_dead_server_has_lost() {
    for connections in [1, 4] {
        let settings = ClientSettings { connections: connections.try_into().unwrap(), ..ClientSettings::default() };
        let mut place = Place::new("memory 4M", settings).await;
        let client = place.client.clone();
        let writes = (0..16u64).map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.write_at(n * 100_000, &fill::bytes(n * 100_000, 100_000, 1)).await })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.unwrap().unwrap();
        }
        place.restart("memory 4M");
        // Whatever is done in between, and on however many connections.
        let reads = (0..16u64).map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.read_at(n * 100_000, &mut [0; 100_000]).await })
        });
        for read in reads.collect::<Vec<_>>() {
            read.await.unwrap().unwrap();
        }
        let error = client.flush().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(error.message().contains("write it again"), "{error}");
        client.write_at(0, &fill::bytes(0, 1_600_000, 1)).await.unwrap();
        client.flush().await.expect("once reported, and written again");
    }
}

/// A server of ours, and a client of it.
async fn served() -> (Arc<Faults>, Server, Client) {
    let faults = Faults::new(Arc::new(Store::new(SIZE as u64)));
    let server = Server::new(vec![ServerExport::new("", faults.clone())], ServerSettings::default()).unwrap();
    let address = server.listen(&"nbd://127.0.0.1:0".parse::<NbdUri>().unwrap().address).await.unwrap();
    let uri = NbdUri { address, export: String::new(), tls: None };
    (faults, server, Client::connect(uri, ClientSettings::default()).await.unwrap())
}

/// A server that could not make something durable may have forgotten it: that its next flush succeeds says nothing.
#[tokio::test]
async fn what_a_server_could_not_flush_counts_as_lost() {
    let (faults, _server, client) = served().await;
    let fails = |kind| faults.add(Rule::on(Operation::Flush).times(1).fail(kind));
    for kind in [ErrorKind::Internal, ErrorKind::Conflict, ErrorKind::Exhausted] {
        client.write_at(0, b"lost").await.unwrap();
        fails(kind);
        let error = client.flush().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        assert!(error.message().contains("write it again"), "{error}");
        client.flush().await.expect("that was told");
    }
    fails(ErrorKind::Internal);
    let error = client.flush().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal, "nothing was written: {error}");
}

/// The server tells of a loss once. Whoever it tells may wait no more, or not be the only one who flushes.
#[tokio::test]
async fn a_failure_of_a_flush_that_was_given_up_is_told_by_the_next_and_to_all_who_wait() {
    let (faults, _server, client) = served().await;
    for given_up in [true, false] {
        client.write_at(0, b"lost").await.unwrap();
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Flush).times(1).hold(&pause));
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Internal));
        let mut first = Some(Box::pin(client.flush()));
        assert!(first.as_mut().unwrap().now_or_never().is_none());
        deadline(LONG, "the first flush", pause.wait_held(1)).await;
        if given_up {
            first = None;
        }
        let mut second = Box::pin(client.flush());
        assert!(second.as_mut().now_or_never().is_none());
        pause.release();
        for flush in first.into_iter().chain([second]) {
            let error = deadline(LONG, "a flush", flush).await.expect_err("it is lost");
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        }
        deadline(LONG, "another flush", client.flush()).await.expect("that was told");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_region_in_the_same_place_is_refused() {
    let mut place = Place::new("memory 4M", ClientSettings::default()).await;
    for (text, reason) in [
        ("memory 8M", "has 8388608 bytes where it had 4194304"),
        ("--readonly memory 4M", "is read-only where it was writable"),
        ("--no-sr memory 4M", "can do other things"),
    ] {
        place.restart(text);
        let error = place.client.read_at(0, &mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{text}: {error}");
        assert!(error.message().contains(reason), "{error}");
    }
    place.restart("memory 4M");
    read(&*place.client, 0, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_is_given_up_in_time() {
    let silence = Duration::from_secs(2);
    let settings = ClientSettings { silence, connect_timeout: Duration::from_secs(3), ..ClientSettings::default() };
    let place = Place::new("pattern size=4M", settings).await;
    place.server.freeze();
    let start = Instant::now();
    let error = place.client.read_at(0, &mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    place.server.thaw();
    assert_eq!(read(&*place.client, 8, 8).await, 8u64.to_be_bytes());
    // An idle connection is no silent one.
    tokio::time::sleep(silence + Duration::from_millis(500)).await;
    assert_eq!(read(&*place.client, 16, 8).await, 16u64.to_be_bytes());
}

/// A write that was given up reached the frozen server; it must not land after a later one has returned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_was_given_up_never_lands_late() {
    // By its caller, and by the client itself.
    for (patience, silence) in [(Duration::from_millis(500), LONG), (LONG, Duration::from_secs(2))] {
        let settings = ClientSettings { silence, connect_timeout: LONG, ..ClientSettings::default() };
        let place = Place::new("memory 4M", settings).await;
        let client = place.client.clone();
        place.server.freeze();
        let (first, second) = (fill::bytes(0, 50_000, 1), fill::bytes(0, 50_000, 2));
        let given_up = tokio::time::timeout(patience, client.write_at(0, &first)).await;
        assert!(given_up.is_err() || given_up.unwrap().is_err());
        let later = {
            let client = client.clone();
            tokio::spawn(async move { client.write_at(0, &second).await })
        };
        // Elsewhere nothing waits for it, once there is a connection.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!later.is_finished(), "nobody knows yet what becomes of the first");
        place.server.thaw();
        tokio::time::timeout(LONG, later).await.expect("it is let go").unwrap().unwrap();
        for _ in 0..20 {
            fill::check(&read(&*client, 0, 50_000).await, 0, 2).unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A slow line is no dead one: what moves is counted, over connections that come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_moves_is_counted() {
    let mut place = Place::new("memory 4M", ClientSettings::default()).await;
    let client = place.client.clone();
    let activity = client.capabilities().activity.expect("its bytes rest elsewhere");
    let mut before = activity.moved();
    for _ in 0..3 {
        client.write_at(0, &fill::bytes(0, 1 << 20, 1)).await.unwrap();
        let (written, now) = (before, activity.moved());
        assert!(now - written >= 1 << 20, "{} bytes", now - written);
        client.read_at(0, &mut vec![0; 1 << 20]).await.unwrap();
        before = activity.moved();
        assert!(before - now >= 1 << 20, "{} bytes", before - now);
        place.restart("memory 4M");
        client.read_at(0, &mut [0; 1]).await.unwrap();
        assert!(activity.moved() >= before, "it never goes back");
        before = activity.moved();
    }
}

/// A connection on which the server lied is closed, although the client keeps it in mind.
#[tokio::test]
async fn a_lost_connection_is_closed_at_once() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let directory = tempfile::tempdir().unwrap();
    let listener = tokio::net::UnixListener::bind(socket_in(directory.path())).unwrap();
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        let mut option = [0; 16];
        // Everything is unsupported up to EXPORT_NAME.
        loop {
            stream.read_exact(&mut option).await.unwrap();
            let length = u32::from_be_bytes(option[12..].try_into().unwrap());
            stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
            if option[11] == 1 {
                break;
            }
            let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
            reply.extend(&option[8..12]);
            reply.extend([0x80, 0, 0, 1, 0, 0, 0, 0]);
            stream.write_all(&reply).await.unwrap();
        }
        stream.write_all(&[0, 0, 0, 0, 0, 16, 0, 0, 0, 1]).await.unwrap();
        stream.read_exact(&mut [0; 28]).await.unwrap();
        stream.write_all(&[b'?'; 16]).await.unwrap();
        tokio::time::timeout(LONG, stream.read(&mut [0; 1])).await.expect("it is closed").unwrap()
    };
    let client = async {
        let client =
            Client::connect(unix_uri(&socket_in(directory.path()), ""), ClientSettings::default()).await.unwrap();
        assert_eq!(client.size(), 1 << 20);
        let error = client.read_at(0, &mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        client
    };
    let (read, _client) = tokio::join!(serve, client);
    assert_eq!(read, 0, "the end of the stream");
}
