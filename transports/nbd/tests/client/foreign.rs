//! Foreign servers with the bytes, the limits and the moods that they have.

use std::time::{Duration, Instant};

use r3map_core::{Backend, ErrorKind, ExtentKind};
use r3map_nbd::wire::TransmissionFlags;
use r3map_nbd::{Client, ClientSettings};
use r3map_testkit::fill;

use crate::support::{Foreign, read, refused, unix_uri};

/// What nbdkit's pattern plugin has: each eight bytes hold their own offset.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    let start = offset / 8 * 8;
    let bytes = (start..).step_by(8).flat_map(u64::to_be_bytes);
    bytes.skip(usize::try_from(offset - start).unwrap()).take(len).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_is_where_it_belongs() {
    let server = Foreign::nbdkit("pattern size=40000003");
    let client = server.client().await;
    assert_eq!(client.size(), 40_000_003);
    for (offset, len) in
        [(0, 1), (1, 7), (4095, 4098), (100, 300_001), (1, 39_999_999), (39_999_999, 4), (0, 40_000_003)]
    {
        assert!(read(&client, offset, len).await == pattern(offset, len), "{len} bytes at {offset}");
    }
    // Many at once, long and short, so that calls receive for one another.
    let client = std::sync::Arc::new(client);
    let reads = (0..200u64).map(|n| {
        let client = client.clone();
        tokio::spawn(async move {
            let (offset, len) = (n * 190_001, if n % 3 == 0 { 700 } else { 180_000 });
            assert!(read(&*client, offset, len).await == pattern(offset, len), "{len} bytes at {offset}");
        })
    });
    for read in reads.collect::<Vec<_>>() {
        read.await.unwrap();
    }
}

/// A future that is not polled must not hold up the others on its connection for ever.
#[tokio::test]
async fn a_call_that_sleeps_holds_up_nobody() {
    let server = Foreign::nbdkit("pattern size=64M");
    let settings = ClientSettings { connections: 1.try_into().unwrap(), ..ClientSettings::default() };
    let client = Client::connect(server.uri(""), settings).await.unwrap();
    let mut buf = vec![0; 4 << 20];
    let mut asleep = client.read_at(8, &mut buf);
    assert!(futures_util::poll!(&mut asleep).is_pending());
    for n in 0..20 {
        assert!(read(&client, n * 1000, 300_000).await == pattern(n * 1000, 300_000));
    }
    asleep.await.unwrap();
    assert!(buf == pattern(8, 4 << 20), "what was received on its behalf is all there");
    // The same for one that is dropped in the middle.
    let mut dropped = client.read_at(16, &mut buf);
    assert!(futures_util::poll!(&mut dropped).is_pending());
    tokio::time::sleep(Duration::from_millis(2)).await;
    let _ = futures_util::poll!(&mut dropped);
    drop(dropped);
    assert!(read(&client, 24, 300_000).await == pattern(24, 300_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holes_and_data() {
    for text in ["--filter=nofilter data", "--no-sr data"] {
        let server = Foreign::nbdkit(&format!("{text} data=@1048576(0x55)*4096@2097152"));
        let client = server.client().await;
        let mut expected = vec![0; 2 << 20];
        expected[1 << 20..][..4096].fill(0x55);
        assert!(read(&client, 0, 2 << 20).await == expected);
        let Some(extents) = client.capabilities().extents else {
            assert!(text.contains("--no-sr"), "with structured replies there are extents");
            continue;
        };
        let found = extents.extents(0, 2 << 20).await.unwrap();
        let data: Vec<_> = found.iter().filter(|extent| extent.kind == ExtentKind::Data).collect();
        assert!(data.len() == 1 && data[0].range.contains(&(1 << 20)) && data[0].range.end <= 2 << 20, "{found:?}");
        assert!(found[0].kind == ExtentKind::Hole && found[0].range.start == 0, "{found:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sparse_disk_of_a_terabyte() {
    let server = Foreign::nbdkit("sparse-random 1T percent=0.01 seed=1");
    let client = server.client().await;
    let extents = client.capabilities().extents.expect("nbdkit has them");
    let (mut at, mut data) = (0, Vec::new());
    while at < client.size() {
        for extent in extents.extents(at, client.size() - at).await.unwrap() {
            assert_eq!(extent.range.start, at);
            at = extent.range.end;
            if extent.kind == ExtentKind::Data {
                data.push(extent.range);
            }
        }
    }
    assert!(!data.is_empty());
    let first = data[0].clone();
    let before = first.start.saturating_sub(70_000);
    let bytes = read(&client, before, 200_000).await;
    let hole = usize::try_from(first.start - before).unwrap();
    assert!(r3map_core::is_zero(&bytes[..hole]) && !r3map_core::is_zero(&bytes[hole..hole + 4096]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_fails_some_requests_fails_these_only() {
    let server = Foreign::nbdkit(
        "--filter=error memory 16M error-pread=EIO error-pread-rate=50% error-pwrite=ENOSPC \
                                  error-pwrite-rate=50%",
    );
    let client = server.client().await;
    let (mut good, mut bad) = (0, 0);
    // nbdkit draws its lots from the clock's seconds, and has been seen to fail 26 of 29 with a rate of half.
    for n in (0..160).cycle().take(1600) {
        if n >= 60 && good > 3 && bad > 3 {
            break;
        }
        let bytes = fill::bytes(n * 100_000, 100_000, 1);
        match client.write_at(n * 100_000, &bytes).await {
            Err(error) => assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}"),
            Ok(()) => {
                let mut buf = vec![0; 100_000];
                match client.read_at(n * 100_000, &mut buf).await {
                    Ok(()) => good += 1,
                    Err(error) => {
                        bad += 1;
                        assert!(error.message().contains("input/output error"), "{error}");
                        assert_eq!(error.range(), Some((n * 100_000, 100_000)));
                        continue;
                    }
                }
                assert!(buf == bytes);
            }
        }
    }
    assert!(good > 3 && bad > 3, "{good} good, {bad} bad");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_server_is_waited_for_and_requests_overtake_one_another() {
    let server = Foreign::nbdkit("--filter=delay pattern size=16M rdelay=1");
    let client = server.client().await;
    let start = Instant::now();
    let reads = (0..16u64).map(|n| {
        let client = &client;
        async move { assert!(read(client, n * 1000, 100_000).await == pattern(n * 1000, 100_000)) }
    });
    futures_util::future::join_all(reads).await;
    assert!(start.elapsed() < Duration::from_secs(12), "all at once: {:?}", start.elapsed());
    let rated = Foreign::nbdkit("--filter=rate pattern size=16M rate=80M");
    let client = rated.client().await;
    assert!(read(&client, 8, 4 << 20).await == pattern(8, 4 << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_tries_again_itself() {
    let server = Foreign::nbdkit(
        "--filter=retry-request --filter=error pattern size=1M error-pread=EIO \
                                  error-pread-rate=30% retry-request-delay=1 retry-request-retries=20",
    );
    let client = server.client().await;
    let reads = (0..20u64).map(|n| {
        let client = &client;
        async move { assert!(read(client, n * 1000, 50_000).await == pattern(n * 1000, 50_000)) }
    });
    futures_util::future::join_all(reads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_by_name() {
    let server = Foreign::nbdkit(
        "--filter=exportname pattern size=1M exportname=disk exportname=a/b \
                                  exportname-strict=true exportname-list=explicit",
    );
    assert_eq!(Client::connect(server.uri("a/b"), ClientSettings::default()).await.unwrap().size(), 1 << 20);
    let (kind, text) = refused(&server.uri("other")).await;
    assert!(matches!(kind, ErrorKind::NotFound | ErrorKind::InvalidInput), "{text}");
    assert!(text.contains("\"other\""), "{text}");
    let listed = Client::list(server.uri(""), &ClientSettings::default()).await.unwrap();
    let names: Vec<_> = listed.iter().map(|listed| listed.name.as_str()).collect();
    assert_eq!(names, ["disk", "a/b"]);
    let export = listed[0].export.as_ref().expect("nbdkit tells");
    assert_eq!(export.size, 1 << 20);
    assert!(!export.abilities().contains(&"write"), "the pattern is read-only");
    assert_eq!(export.contexts, ["base:allocation"]);
}

/// With one connection at a time, flushes and writes still work, and a second connection is not insisted on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_where_the_cache_is_not_shared() {
    for text in
        ["--filter=multi-conn memory 4M multi-conn-mode=disable", "--filter=noparallel memory 4M serialize=connections"]
    {
        let server = Foreign::nbdkit(text);
        let client = std::sync::Arc::new(server.client().await);
        let writes = (0..32u64).map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.write_at(n * 100_000, &fill::bytes(n * 100_000, 100_000, 1)).await })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.unwrap().unwrap();
        }
        client.flush().await.unwrap();
        fill::check(&read(&*client, 0, 3_200_000).await, 0, 1).unwrap();
    }
}

/// qemu-nbd lets one client in at a time unless told otherwise: more connections are tried, and done without.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_one_connection_only() {
    let server = Foreign::qemu_nbd(&["--shared=1"], 4 << 20);
    let client = std::sync::Arc::new(server.client().await);
    let writes = (0..32u64).map(|n| {
        let client = client.clone();
        tokio::spawn(async move { client.write_at(n * 100_000, &fill::bytes(n * 100_000, 100_000, 1)).await })
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap().unwrap();
    }
    client.flush().await.unwrap();
    fill::check(&read(&*client, 0, 3_200_000).await, 0, 1).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_connections_where_it_is() {
    let server = Foreign::nbdkit("--filter=stats --filter=delay memory 64M delay-read=20ms statsfile=/dev/stderr");
    let client = std::sync::Arc::new(server.client().await);
    assert!(client.flags().contains(TransmissionFlags::CAN_MULTI_CONN));
    for _ in 0..3 {
        let reads = (0..64u64).map(|n| {
            let client = client.clone();
            tokio::spawn(async move { r3map_core::is_zero(&read(&*client, n * 100_000, 100_000).await) })
        });
        for read in reads.collect::<Vec<_>>() {
            assert!(read.await.unwrap());
        }
    }
    assert!(connections(&server.socket()) >= 3, "{} connections", connections(&server.socket()));
    drop(client);
}

/// How many connections there are to a Unix socket, from this process or another.
fn connections(socket: &std::path::Path) -> usize {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    // State 3 is connected; a listener has 1.
    let to = |line: &&str| line.ends_with(socket.to_str().unwrap()) && line.split_whitespace().nth(5) == Some("03");
    table.lines().filter(to).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_storage_daemon() {
    let server = Foreign::qemu_storage_daemon(8 << 20, None);
    let client = Client::connect(server.uri("disk"), ClientSettings::default()).await.unwrap();
    assert_eq!(client.size(), 8 << 20);
    let bytes = fill::bytes(12_345, 3_000_000, 1);
    let unit = 4096;
    client.write_at(3 * unit, &bytes[..2_097_152]).await.unwrap();
    client.flush().await.unwrap();
    assert!(read(&client, 3 * unit, 2_097_152).await == bytes[..2_097_152]);
    client.capabilities().trim.unwrap().trim(5 * unit + 1, unit).await.unwrap();
    assert!(r3map_core::is_zero(&read(&client, 5 * unit, 2 * 4096).await[1..4097]));
    let (kind, text) = refused(&server.uri("nothing")).await;
    assert_eq!(kind, ErrorKind::NotFound, "{text}");
    assert!(text.contains("r3map nbd list"), "{text}");
    let listed = Client::list(server.uri(""), &ClientSettings::default()).await.unwrap();
    assert_eq!(listed[0].name, "disk");
    let export = listed[0].export.as_ref().unwrap();
    assert!(export.abilities().contains(&"write") && export.blocks.is_some(), "{export:?}");
}

#[tokio::test]
async fn nobody_there() {
    let directory = tempfile::tempdir().unwrap();
    let (kind, text) = refused(&unix_uri(&directory.path().join("none"), "")).await;
    assert_eq!(kind, ErrorKind::Unavailable);
    assert!(text.contains("cannot connect to") && text.contains("none"), "{text}");
    let (kind, text) = refused(&"nbd://127.0.0.1:1/x".parse().unwrap()).await;
    assert_eq!(kind, ErrorKind::Unavailable);
    assert!(text.contains("127.0.0.1:1"), "{text}");
    // One that listens and never says a word.
    let _silent = std::os::unix::net::UnixListener::bind(directory.path().join("silent")).unwrap();
    let settings = ClientSettings { connect_timeout: Duration::from_millis(200), ..ClientSettings::default() };
    let uri = unix_uri(&directory.path().join("silent"), "");
    let error = Client::connect(uri.clone(), settings.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("does not answer within 0.2 s"), "{error}");
    assert_eq!(Client::list(uri, &settings).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_that_no_request_reaches_are_refused() {
    let text = "--filter=blocksize-policy memory 1000001 blocksize-minimum=512 blocksize-preferred=4096 \
                blocksize-maximum=1M blocksize-error-policy=error";
    let (kind, text) = refused(&Foreign::nbdkit(text).uri("")).await;
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(text.contains("out of reach"), "{text}");
    let empty = Foreign::nbdkit("null 0");
    let (kind, text) = refused(&empty.uri("")).await;
    assert_eq!(kind, ErrorKind::InvalidInput);
    assert!(text.contains("empty"), "{text}");
}

/// A server that is told to let nobody in until it is resumed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_server_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let server = Foreign::nbdkit(&format!("--filter=pause pattern size=1M pause-control={}", control.display()));
    let client = server.client().await;
    assert!(read(&client, 0, 100).await == pattern(0, 100));
    let tell = |what: u8| {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(&control).unwrap();
        stream.write_all(&[what]).unwrap();
        let mut answer = [0];
        stream.read_exact(&mut answer).unwrap();
    };
    tell(b'p');
    let mut buf = vec![0; 100];
    assert!(tokio::time::timeout(Duration::from_millis(100), client.read_at(8, &mut buf)).await.is_err());
    tell(b'r');
    assert!(read(&client, 8, 100).await == pattern(8, 100));
}
