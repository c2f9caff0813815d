//! The schemes: each opens what it names, and each wrong name gets one clear line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use r3map::{
    Access, Backend, ChunkSize, Chunking, ErrorKind, ListenOptions, Mount, OpenOptions, Operation, Registry, Result,
};
use r3map_testkit::faults::{Faults, Rule};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

async fn open(uri: &str, options: OpenOptions) -> Result<Arc<dyn Backend>> {
    Registry::standard().open(&uri.parse()?, &options).await
}

async fn refused(uri: &str, options: OpenOptions) -> String {
    let error = open(uri, options).await.err().unwrap_or_else(|| panic!("{uri} was opened"));
    let text = error.to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    text
}

fn sized(size: u64) -> OpenOptions {
    OpenOptions { size: Some(size), ..OpenOptions::default() }
}

#[tokio::test]
async fn opens_what_each_scheme_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let create = OpenOptions { create: true, ..sized(100_000) };
    for uri in ["memory:".into(), "null:".into(), format!("file:{}", path("f")), format!("directory:{}", path("d"))] {
        let backend = open(&uri, create.clone()).await.unwrap();
        assert_eq!(backend.size(), 100_000, "{uri}");
    }
    let again = open(&format!("file:{}", path("f")), OpenOptions { read_only: true, ..OpenOptions::default() }).await;
    let again = again.unwrap();
    assert!(again.capabilities().read_only);
    assert_eq!(again.write_at(0, b"x").await.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn refuses_what_cannot_be_meant() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("f");
    std::fs::write(&file, b"12345").unwrap();
    let file = format!("file:{}", file.display());
    let none = OpenOptions::default;
    assert!(refused("redis://host", none()).await.contains("unknown scheme \"redis\"; known are: "));
    assert!(refused("memory:", none()).await.contains("--size"));
    assert!(refused("memory:?size=1GiB", sized(5)).await.contains("given twice"));
    assert!(refused("memory:?size=0", none()).await.contains("at least one byte"));
    assert!(refused("memory:?siez=1", none()).await.contains("unknown option \"siez\""));
    assert!(refused("file:/nonexistent/x", none()).await.contains("/nonexistent/x"));
    assert!(refused(&file, sized(4)).await.contains('5'));
    assert!(refused("grpc://127.0.0.1:1", none()).await.contains("127.0.0.1:1"));
    let chunk = OpenOptions { chunk_size: Some(ChunkSize::MIN), ..none() };
    assert!(refused("directory:/nonexistent/x?chunk=64KiB", chunk).await.contains("given twice"));
}

#[tokio::test]
async fn listens_where_it_can_and_says_where_it_cannot() {
    let registry = Registry::standard();
    let memory = open("memory:?size=1MiB", OpenOptions::default()).await.unwrap();
    let options = ListenOptions::default();
    let error = registry.listen(&["file:/x".parse().unwrap()], memory.clone(), &options).await.err().unwrap();
    assert!(error.to_string().contains("cannot listen there; it takes: grpc"), "{error}");

    let any = ["grpc://127.0.0.1:0".parse().unwrap()];
    let listener = registry.listen(&any, memory.clone(), &options).await.unwrap().pop().unwrap();
    let remote = open(&listener.uri(), OpenOptions::default()).await.unwrap();
    remote.write_at(5, b"hello").await.unwrap();
    let mut bytes = [0; 5];
    memory.read_at(5, &mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello");
    assert!(refused(&listener.uri(), sized(5)).await.contains("not 5"));
    listener.shutdown().await.unwrap();
    assert_eq!(remote.read_at(5, &mut bytes).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn requests_are_cut_into_chunks_by_the_server_or_by_clients() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("directory:{}?chunk=64KiB", folder.path().join("d").display());
    let directory = open(&name, OpenOptions { create: true, ..sized(200_000) }).await.unwrap();
    for chunking in [Chunking::Server, Chunking::Client] {
        let options = ListenOptions { chunking, ..ListenOptions::default() };
        let registry = Registry::standard();
        let any = ["grpc://127.0.0.1:0".parse().unwrap()];
        let listener = registry.listen(&any, directory.clone(), &options).await.unwrap().pop().unwrap();
        let remote = open(&listener.uri(), OpenOptions::default()).await.unwrap();
        let part = remote.write_at(70_000, b"part of a chunk").await;
        match chunking {
            Chunking::Server => part.unwrap(),
            Chunking::Client => {
                assert_eq!(part.unwrap_err().kind(), ErrorKind::InvalidInput);
                assert_eq!(remote.capabilities().access, Access::WholeChunks(ChunkSize::DEFAULT));
            }
        }
        // Either way a mount takes any request.
        let mut slice = Mount::direct(remote).slice().await.unwrap();
        let mut bytes = [0; 15];
        slice.read_at(70_000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"part of a chunk");
        slice.write_at(199_999, b"!").unwrap();
        slice.close().await.unwrap();
        listener.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn clients_of_several_listeners_do_not_undo_one_another() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("directory:{}?chunk=64KiB", folder.path().join("d").display());
    let directory = open(&name, OpenOptions { create: true, ..sized(65_536) }).await.unwrap();
    let registry = Registry::standard();
    let two = ["grpc://127.0.0.1:0".parse().unwrap(), "grpc://127.0.0.1:0".parse().unwrap()];
    let listeners = registry.listen(&two, directory.clone(), &ListenOptions::default()).await.unwrap();
    let mut clients = Vec::new();
    for listener in &listeners {
        clients.push(open(&listener.uri(), OpenOptions::default()).await.unwrap());
    }
    let write = |client: Arc<dyn Backend>, first: u64| async move {
        for offset in (first..65_536).step_by(1024) {
            client.write_at(offset, &[7; 512]).await.unwrap();
        }
    };
    let (one, other) = (tokio::spawn(write(clients[0].clone(), 0)), tokio::spawn(write(clients[1].clone(), 512)));
    one.await.unwrap();
    other.await.unwrap();
    let mut bytes = vec![0; 65_536];
    directory.read_at(0, &mut bytes).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7), "an acknowledged write is gone");
}

#[tokio::test]
async fn serves_nbd_and_grpc_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::standard();
    let memory = open("memory:?size=1000003", OpenOptions::default()).await.unwrap();
    let socket = format!("nbd+unix:///disk?socket={}", folder.path().join("s").display());
    let uris = ["nbd://127.0.0.1:0/a%20name", &socket, "grpc://127.0.0.1:0"].map(|uri| uri.parse().unwrap());
    let listeners = registry.listen(&uris, memory, &ListenOptions::default()).await.unwrap();
    for (number, listener) in (1..).zip(&listeners) {
        let remote = open(&listener.uri(), OpenOptions::default()).await.unwrap();
        assert_eq!(remote.size(), 1_000_003, "{}", listener.uri());
        remote.write_at(1_000_003 - number, &[7]).await.unwrap();
        let mut bytes = [0; 4];
        remote.read_at(1_000_003 - 4, &mut bytes).await.unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == 7).count() as u64, number);
    }
    assert!(listeners[0].uri().ends_with("/a%20name") && !listeners[0].uri().contains(":0/"), "{}", listeners[0].uri());
    assert_eq!(listeners[1].uri(), socket);
    for listener in listeners {
        listener.shutdown().await.unwrap();
    }
}

/// The region tells of what it has lost once, as a remote does that was restarted; also where all that arrives of that over
/// NBD is an error.
#[tokio::test]
async fn what_a_served_region_has_lost_is_told_to_the_clients_of_every_listener() {
    let faults = Faults::new(open("memory:?size=8KiB", OpenOptions::default()).await.unwrap());
    let listen = async |uris: &[&str], region: Arc<dyn Backend>| {
        let uris: Vec<_> = uris.iter().map(|uri| uri.parse().unwrap()).collect();
        Registry::standard().listen(&uris, region, &ListenOptions::default()).await.unwrap()
    };
    let elsewhere = listen(&["nbd://127.0.0.1:0/disk"], faults.clone()).await;
    let remote = open(&elsewhere[0].uri(), OpenOptions::default()).await.unwrap();
    for region in [faults.clone() as Arc<dyn Backend>, remote] {
        let listeners = listen(&["grpc://127.0.0.1:0", "nbd://127.0.0.1:0/disk", "grpc://127.0.0.1:0"], region).await;
        let mut clients = Vec::new();
        for listener in &listeners {
            let client = open(&listener.uri(), OpenOptions::default()).await.unwrap();
            client.write_at(0, b"lost").await.unwrap();
            clients.push(client);
        }
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
        for (client, listener) in clients.iter().zip(&listeners) {
            let told = [client.flush().await, client.flush().await];
            assert!(told[0].is_err() && told[1].is_ok(), "{}: {told:?}", listener.uri());
        }
    }
}

/// Who vouches for others, and the certificate that says who that is.
fn authority() -> (Issuer<'static, KeyPair>, String) {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = authority.self_signed(&key).unwrap().pem();
    (Issuer::new(authority, key), pem)
}

/// Folders that trust the same authority. It vouches for the server and for one client; another client shows nothing, and
/// the last one what somebody else has vouched for.
fn certificates(root: &Path) -> [PathBuf; 4] {
    let ((issuer, pem), (other, _)) = (authority(), authority());
    let folder = |name: &str, role: &str, by: Option<&Issuer<'_, KeyPair>>| {
        let folder = root.join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("ca-cert.pem"), &pem).unwrap();
        if let Some(issuer) = by {
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            let certificate = certificate.signed_by(&key, issuer).unwrap().pem();
            std::fs::write(folder.join(format!("{role}-cert.pem")), certificate).unwrap();
            std::fs::write(folder.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
        }
        folder
    };
    [
        folder("server", "server", Some(&issuer)),
        folder("good", "client", Some(&issuer)),
        folder("none", "client", None),
        folder("wrong", "client", Some(&other)),
    ]
}

#[tokio::test]
async fn an_nbds_listener_lets_in_whom_it_is_told_to() {
    let root = tempfile::tempdir().unwrap();
    let [server, good, none, wrong] = certificates(root.path()).map(|folder| folder.display().to_string());
    let memory = open("memory:?size=1MiB", OpenOptions::default()).await.unwrap();
    for (verify, welcome) in [
        ("", [true, true, true]),
        ("&tls-verify-peer=0", [true, true, true]),
        ("&tls-verify-peer=optional", [true, true, false]),
        ("&tls-verify-peer=1", [true, false, false]),
    ] {
        let uri = format!("nbds://127.0.0.1:0/?tls-certificates={server}{verify}").parse().unwrap();
        let listeners = Registry::standard().listen(&[uri], memory.clone(), &ListenOptions::default()).await.unwrap();
        let place = listeners[0].uri();
        assert!(place.ends_with(&format!("/?tls-certificates={server}")), "what clients verify is theirs: {place}");
        let place = place.trim_start_matches("nbds://").split(['/', '?']).next().unwrap();
        for (folder, welcome) in [&good, &none, &wrong].into_iter().zip(welcome) {
            let opened = open(&format!("nbds://{place}/?tls-certificates={folder}"), OpenOptions::default()).await;
            let read = match opened {
                Ok(region) => region.read_at(0, &mut [0; 5]).await,
                Err(error) => Err(error),
            };
            assert_eq!(read.is_ok(), welcome, "{folder}{verify}: {read:?}");
            if let Err(error) = read {
                let asks = error.message().contains("asks for a client certificate");
                let refuses = error.message().contains("refuses the client certificate");
                assert!(if folder == &none { asks } else { refuses }, "{folder}{verify}: {error}");
            }
        }
        let plain = open(&format!("nbd://{place}/"), OpenOptions::default()).await.err().expect("it speaks no TLS");
        assert!(plain.message().contains("TLS"), "{plain}");
    }
}

#[tokio::test]
async fn says_what_an_nbd_listener_needs() {
    let registry = Registry::standard();
    let memory = open("memory:?size=1MiB", OpenOptions::default()).await.unwrap();
    let client = ListenOptions { chunking: Chunking::Client, ..ListenOptions::default() };
    for (uri, options, says) in [
        ("nbds://127.0.0.1:0", ListenOptions::default(), "tls-certificates=DIR"),
        ("nbd://127.0.0.1:0?tls-certificates=/nonexistent", ListenOptions::default(), "/nonexistent/server-cert.pem"),
        ("nbd+unix:///", ListenOptions::default(), "socket"),
        ("nbd://127.0.0.1:0", client, "let the server do it"),
    ] {
        let error = registry.listen(&[uri.parse().unwrap()], memory.clone(), &options).await.err().unwrap().to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{error}");
    }
}
