//! TLS with libnbd and qemu (GnuTLS): offered, demanded, and with certificates of clients.

use std::path::Path;

use r3map_nbd::tls::{ClientCertificates, server_config};
use r3map_nbd::wire::{ClientOption, Framing, InfoRequest, OptionCode, OptionReply, ReplyError, Text};
use r3map_nbd::{ServerExport, ServerSettings, Tls};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

use crate::support::{Raw, Running, contents, filled, memory, run, try_run};

const SIZE: u64 = 3_000_001;

/// Writes `ca-cert.pem` and, vouched for by it, a certificate and its key for each role.
pub(crate) fn certificates(roles: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: String, text: String| std::fs::write(directory.path().join(name), text).unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    file("ca-cert.pem".into(), authority.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(authority, key);
    for role in roles {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        // qemu insists on the second, although no key of this kind enciphers.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        file(format!("{role}-cert.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        file(format!("{role}-key.pem"), key.serialize_pem());
    }
    directory
}

async fn start(tls: Tls) -> Running {
    let settings = ServerSettings { tls, ..ServerSettings::default() };
    Running::start(vec![ServerExport::new("disk", memory(SIZE, 1))], settings).await
}

fn required(directory: &Path, clients: ClientCertificates) -> Tls {
    Tls::Required(server_config(directory, clients).unwrap())
}

/// libnbd checks a certificate's name, and has none for a Unix socket.
fn script(running: &Running, directory: &Path, then: &str) -> String {
    let socket = running.socket();
    format!(
        "h.set_tls(nbd.TLS_REQUIRE)\nh.set_tls_certificates({:?})\nh.set_tls_verify_peer(False)\n\
         h.set_export_name('disk')\nh.connect_unix({:?})\n{then}",
        directory.to_str().unwrap(),
        socket.to_str().unwrap()
    )
}

fn nbdsh(script: &str) -> (bool, String) {
    try_run("/usr/bin/python3", &["-m", "nbd", "-c", script, "-c", "print('to the end')"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn libnbd_reads_and_writes_over_tls() {
    let pki = certificates(&["server"]);
    for tls in [Tls::Optional as fn(_) -> _, Tls::Required] {
        let running = start(tls(server_config(pki.path(), ClientCertificates::None).unwrap())).await;
        let then = format!(
            "assert h.get_tls_negotiated()\ndata = h.pread({}, 1)\nh.pwrite(data, 0)\nassert h.pread({0}, 0) == data\n\
             h.shutdown()",
            SIZE - 1
        );
        let (success, output) = nbdsh(&script(&running, pki.path(), &then));
        assert!(success && output == "to the end", "{output}");
        running.is_left().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_offered_to_those_who_want_it() {
    let pki = certificates(&["server"]);
    let running = start(Tls::Optional(server_config(pki.path(), ClientCertificates::None).unwrap())).await;
    assert_eq!(run("nbdinfo", &["--size", &running.uri("disk")]), SIZE.to_string());
    let out = running.file("out");
    run("nbdcopy", &[&running.uri("disk"), out.to_str().unwrap()]);
    assert!(std::fs::read(out).unwrap() == filled(SIZE, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_needs_a_certificate_where_one_is_required() {
    let (pki, stranger) = (certificates(&["server", "client"]), certificates(&["client"]));
    let nobody = certificates(&[]);
    let running = start(required(pki.path(), ClientCertificates::Required)).await;
    let then = "assert h.get_size() > 0";
    let (success, output) = nbdsh(&script(&running, pki.path(), then));
    assert!(success && output == "to the end", "{output}");
    for other in [stranger.path(), nobody.path()] {
        let (success, output) = nbdsh(&script(&running, other, then));
        assert!(!success, "{output}");
    }
    running.is_left().await;
}

/// Who has one must have a good one; who has none is let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_optional_is_still_checked() {
    let (pki, stranger) = (certificates(&["server", "client"]), certificates(&["client"]));
    let nobody = certificates(&[]);
    let running = start(required(pki.path(), ClientCertificates::Optional)).await;
    // It knows who signed the server's, and has none of its own.
    std::fs::copy(pki.path().join("ca-cert.pem"), nobody.path().join("ca-cert.pem")).unwrap();
    let then = "assert h.get_size() > 0";
    for welcome in [pki.path(), nobody.path()] {
        let (success, output) = nbdsh(&script(&running, welcome, then));
        assert!(success && output == "to the end", "{output}");
    }
    let (success, output) = nbdsh(&script(&running, stranger.path(), then));
    assert!(!success, "{output}");
    running.is_left().await;
}

/// Runs one of qemu's programs on the export with TLS; `directory` has its certificates.
fn qemu(program: &str, running: &Running, directory: &Path, arguments: &[&str]) -> (bool, String) {
    let credentials = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", directory.display());
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls0,tls-hostname=localhost",
        running.socket().display()
    );
    let (command, rest) = arguments.split_at(usize::from(program == "qemu-img"));
    let common = ["--object", &credentials, "--image-opts"];
    try_run(program, &[command, &common[..], rest, &[&image]].concat())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_reads_and_writes_over_tls_with_certificates_on_both_sides() {
    let (pki, stranger) = (certificates(&["server", "client"]), certificates(&["client"]));
    let settings =
        ServerSettings { tls: required(pki.path(), ClientCertificates::Required), ..ServerSettings::default() };
    let region = memory(SIZE, 1);
    let running = Running::start(vec![ServerExport::new("disk", region.clone())], settings).await;
    let commands = ["-c", "write -P 7 12345 100001", "-c", "read -P 7 12345 100001", "-c", "write -z 2000001 5000"];
    let (success, output) = qemu("qemu-io", &running, pki.path(), &commands);
    assert!(success && !output.contains("failed"), "{output}");
    let mut expected = filled(SIZE, 1);
    expected[12_345..112_346].fill(7);
    expected[2_000_001..2_005_001].fill(0);
    assert!(contents(&region) == expected);
    let (success, output) = qemu("qemu-img", &running, pki.path(), &["map", "--output=json"]);
    assert!(success && output.contains("\"data\": true"), "{output}");
    // Whom nobody vouches for, who shows nothing, and who does not trust this server.
    let nobody = certificates(&[]);
    std::fs::copy(pki.path().join("ca-cert.pem"), nobody.path().join("ca-cert.pem")).unwrap();
    let impostor = tempfile::tempdir().unwrap();
    for (from, name) in [(&stranger, "client-cert.pem"), (&stranger, "client-key.pem"), (&pki, "ca-cert.pem")] {
        std::fs::copy(from.path().join(name), impostor.path().join(name)).unwrap();
    }
    for other in [impostor.path(), nobody.path(), stranger.path()] {
        let (success, output) = qemu("qemu-img", &running, other, &["info"]);
        assert!(!success && !output.is_empty(), "{output}");
    }
    let (success, output) = try_run("qemu-img", &["info", &running.uri("disk")]);
    assert!(!success && output.contains("TLS"), "{output}");
    running.is_left().await;
    let (success, output) = qemu("qemu-img", &running, pki.path(), &["info"]);
    assert!(success, "who is known is still let in: {output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_tls_everything_is_refused_where_tls_is_demanded() {
    let pki = certificates(&["server"]);
    let running = start(required(pki.path(), ClientCertificates::None)).await;
    let (success, output) = try_run("nbdinfo", &[&running.uri("disk")]);
    assert!(!success && output.contains("TLS"), "{output}");
    let mut raw = Raw { stream: running.connect().await, framing: Framing::Simple };
    raw.greet().await;
    let info = InfoRequest { name: Text::new("disk").unwrap(), wanted: vec![] };
    for option in [
        ClientOption::List,
        ClientOption::Info(info.clone()),
        ClientOption::Go(info),
        ClientOption::StructuredReply,
        ClientOption::ExtendedHeaders,
        ClientOption::Unknown(99),
    ] {
        let replies = raw.option(&option).await;
        let [OptionReply::Error { error, .. }] = &replies[..] else { panic!("{replies:?}") };
        assert_eq!(*error, ReplyError::TlsRequired, "{option:?}");
    }
    // Also what makes no sense is not looked into.
    for (code, data) in [(OptionCode::List, &b"data"[..]), (OptionCode::Go, &[0; 70_000]), (OptionCode::Info, b"?")] {
        let replies = raw.option_with(code, data).await;
        assert!(matches!(&replies[..], [OptionReply::Error { error: ReplyError::TlsRequired, .. }]), "{replies:?}");
    }
    assert_eq!(raw.option(&ClientOption::Abort).await, [OptionReply::Ack]);
    assert!(raw.is_closed().await);
    let mut raw = Raw { stream: running.connect().await, framing: Framing::Simple };
    raw.greet().await;
    assert!(raw.export_name("disk").await.is_none(), "it begins without TLS");
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_says_tls_and_then_speaks_something_else_is_sent_away() {
    let pki = certificates(&["server"]);
    let running = start(required(pki.path(), ClientCertificates::None)).await;
    let mut raw = Raw { stream: running.connect().await, framing: Framing::Simple };
    raw.greet().await;
    assert_eq!(raw.option(&ClientOption::StartTls).await, [OptionReply::Ack]);
    raw.stream.write_all(b"IHAVEOPT in plain words, for ever and ever").await.unwrap();
    let mut heard = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut raw.stream, &mut heard).await;
    assert!(heard.len() < 100, "an alert at most");
    running.is_left().await;
}
