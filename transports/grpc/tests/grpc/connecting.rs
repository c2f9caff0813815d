//! Finding a server, and what is said when there is none, or something else.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Backend, ErrorKind};
use r3map_grpc::{ClientSettings, Server, ServerSettings, Target};
use r3map_local::Memory;
use r3map_testkit::skip_allowed;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

use crate::common::{any_port, connect, connect_error, go_settings, lasting, serve, settings, tonic_go};

fn memory() -> Arc<dyn Backend> {
    Arc::new(Memory::new(10_000).unwrap())
}

/// The message is one line and has all of these words.
fn says(error: &r3map_core::Error, words: &[&str]) {
    let text = error.to_string();
    assert!(!text.contains('\n') && words.iter().all(|word| text.contains(word)), "{text}");
}

#[tokio::test]
async fn nobody_there_is_one_line_with_the_address() {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target: Target = socket.local_addr().unwrap().to_string().parse().unwrap();
    drop(socket);
    let error = connect_error(&target, settings()).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    says(&error, &["cannot connect to", &target.to_string(), "refused"]);

    let error = connect_error(&"/nowhere/r3map.sock".parse().unwrap(), settings()).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    says(&error, &["cannot connect to /nowhere/r3map.sock"]);
    let error = connect_error(&"no.such.host.invalid:1".parse().unwrap(), settings()).await;
    says(&error, &["cannot connect to no.such.host.invalid:1"]);
}

/// A server that answers everybody with the same bytes, and then closes or waits.
async fn says_only(bytes: &'static [u8], close: bool) -> Target {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = socket.local_addr().unwrap().to_string().parse().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = socket.accept().await.unwrap();
            tokio::spawn(async move {
                stream.write_all(bytes).await.unwrap();
                while !close && stream.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {}
            });
        }
    });
    target
}

#[tokio::test]
async fn something_else_on_the_port_is_an_error() {
    let greetings: [&[u8]; 3] = [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
        &[0xff; 5000],
    ];
    for greeting in greetings {
        for close in [true, false] {
            let target = says_only(greeting, close).await;
            let error = connect_error(&target, settings()).await;
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unavailable), "{error}");
            says(&error, &[&target.to_string()]);
        }
    }
}

#[tokio::test]
async fn a_port_that_says_nothing_is_given_up() {
    let target = says_only(b"", false).await;
    let settings = ClientSettings { connect_timeout: Duration::from_millis(300), ..settings() };
    let error = connect_error(&target, settings).await;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    says(&error, &[&target.to_string(), "does not answer within 0.3 s"]);
}

#[tokio::test]
async fn a_go_server_needs_to_be_told_the_size() {
    let target = tonic_go::serve(memory()).await;
    let error = connect_error(&target, settings()).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    says(&error, &[&target.to_string(), "--size"]);
}

#[tokio::test]
async fn a_grpc_server_without_a_region_is_refused() {
    let target = tonic_go::serve_nothing().await;
    let error = connect_error(&target, go_settings(10_000)).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    says(&error, &[&target.to_string(), "serves no r3map region"]);
}

#[tokio::test]
async fn ipv6_works_where_the_machine_has_it() {
    let server = Server::new(memory(), ServerSettings::default()).unwrap();
    match server.listen(&"[::1]:0".parse().unwrap()).await {
        Ok(target) => connect(&target).await.write_at(0, b"x").await.unwrap(),
        Err(error) => skip_allowed(&format!("no IPv6: {error}")),
    }
}

#[tokio::test]
async fn one_server_listens_on_several_targets() {
    let folder = tempfile::tempdir().unwrap();
    let (server, first) = serve(memory(), ServerSettings::default()).await;
    let second = server.listen(&any_port()).await.unwrap();
    let third = server.listen(&Target::Unix(folder.path().join("socket"))).await.unwrap();
    connect(&first).await.write_at(0, b"seen everywhere").await.unwrap();
    for target in [first, second, third] {
        let mut bytes = [0; 15];
        connect(&target).await.read_at(0, &mut bytes).await.unwrap();
        assert_eq!(&bytes, b"seen everywhere");
    }
}

#[tokio::test]
async fn a_port_in_use_is_a_conflict() {
    let (_server, target) = serve(memory(), ServerSettings::default()).await;
    let other = Server::new(memory(), ServerSettings::default()).unwrap();
    let error = other.listen(&target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    says(&error, &["cannot listen on", &target.to_string(), "in use"]);
    let error = other.listen(&"192.0.2.1:1".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_unix_socket_is_private_and_gone_with_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let server = Server::new(memory(), ServerSettings::default()).unwrap();
    server.listen(&Target::Unix(path.clone())).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    server.close(Duration::from_secs(60)).await.unwrap();
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let target = Target::Unix(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "what a killed server leaves behind");
    let server = Server::new(memory(), lasting()).unwrap();
    server.listen(&target).await.unwrap();

    let other = Server::new(memory(), lasting()).unwrap();
    let error = other.listen(&target).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    says(&error, &[&target.to_string(), "another server listens there"]);
    drop(other);
    connect(&target).await.flush().await.unwrap();
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, b"data").unwrap();
    let server = Server::new(memory(), lasting()).unwrap();
    let error = server.listen(&Target::Unix(path.clone())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert_eq!(std::fs::read(path).unwrap(), b"data");
}

#[test]
fn settings_that_contradict_are_refused() {
    use r3map_core::ChunkSize;
    use r3map_testkit::store::Store;
    let chunk = ChunkSize::new(64 << 10).unwrap();
    let chunked = || Arc::new(Store::new(1 << 20).whole_chunks(chunk));
    let settings = ServerSettings::default;
    for (backend, settings) in [
        (memory(), ServerSettings { max_request: 0, ..settings() }),
        (memory(), ServerSettings { max_request: u64::MAX, in_flight: u64::MAX, ..settings() }),
        (memory(), ServerSettings { in_flight: 1 << 20, ..settings() }),
        (memory(), ServerSettings { patience: Duration::ZERO, ..settings() }),
        (chunked(), ServerSettings { max_request: 4096, ..settings() }),
        (chunked(), ServerSettings { chunk_size: Some(ChunkSize::MIN), ..settings() }),
    ] {
        let error = Server::new(backend, settings.clone()).expect_err(&format!("{settings:?}"));
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}
