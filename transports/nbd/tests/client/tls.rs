//! TLS with nbdkit and qemu's servers (GnuTLS): who trusts whom, and what is said otherwise.

use std::path::{Path, PathBuf};

use r3map_core::{Backend, ErrorKind};
use r3map_nbd::tls::{self, ClientCertificates};
use r3map_nbd::{Client, ClientSettings, NbdUri};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use tempfile::TempDir;

use crate::support::{Foreign, read, refused, server_credentials};

/// Somebody who vouches for others.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Writes `role-cert.pem` and `role-key.pem` for `name`.
    fn vouch(&self, directory: &Path, role: &str, name: &str, expired: bool) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![match role {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        if expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(directory.join(format!("{role}-cert.pem")), certificate.pem()).unwrap();
        std::fs::write(directory.join(format!("{role}-key.pem")), key.serialize_pem()).unwrap();
    }
}

/// Directories of certificates.
struct Pki {
    root: TempDir,
    good: Authority,
    other: Authority,
}

impl Pki {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap(), good: Authority::new("good"), other: Authority::new("other") }
    }

    fn directory(&self, name: &str, trusts: &Authority) -> PathBuf {
        let path = self.root.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("ca-cert.pem"), &trusts.pem).unwrap();
        path
    }

    fn server(&self, name: &str, host: &str, expired: bool) -> PathBuf {
        let path = self.directory(name, &self.good);
        self.good.vouch(&path, "server", host, expired);
        path
    }

    /// A client's directory; with a certificate that `own` vouches for.
    fn client(&self, name: &str, trusts: &Authority, own: Option<&Authority>) -> PathBuf {
        let path = self.directory(name, trusts);
        if let Some(own) = own {
            own.vouch(&path, "client", "somebody", false);
        }
        path
    }
}

fn nbdkit(certificates: &Path, more: &str) -> Foreign {
    Foreign::nbdkit(&format!("--tls-certificates={} {more} pattern size=16M", certificates.display()))
}

/// The server's URI with TLS, for a host called localhost.
fn secure(server: &Foreign, certificates: &Path, more: &str) -> NbdUri {
    let (socket, certificates) = (server.socket(), certificates.display().to_string());
    let text = format!("nbds+unix:///?socket={}&tls-certificates={certificates}{more}", socket.display());
    text.parse().unwrap()
}

async fn works(uri: NbdUri) {
    let client = Client::connect(uri, ClientSettings::default()).await.unwrap_or_else(|error| panic!("{error}"));
    let bytes = read(&client, 0, 5_000_000).await;
    assert!(bytes.chunks(8).zip(0u64..).all(|(eight, n)| eight == (n * 8).to_be_bytes()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_side_knows_the_other() {
    let pki = Pki::new();
    let server = nbdkit(&pki.server("server", "localhost", false), "--tls=require --tls-verify-peer");
    let client = pki.client("client", &pki.good, Some(&pki.good));
    works(secure(&server, &client, "")).await;
    let listed = Client::list(secure(&server, &client, ""), &ClientSettings::default()).await.unwrap();
    assert_eq!(listed.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_may_be_given_and_a_server_be_believed() {
    let pki = Pki::new();
    let server = nbdkit(&pki.server("server", "disks.example", false), "--tls=require");
    let client = pki.client("client", &pki.good, None);
    works(secure(&server, &client, "&tls-hostname=disks.example")).await;
    let stranger = pki.client("stranger", &pki.other, None);
    works(secure(&server, &stranger, "&tls-verify-peer=0")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_trusted_is_told_why() {
    let pki = Pki::new();
    let good = pki.client("good", &pki.good, None);
    let server = nbdkit(&pki.server("server", "localhost", false), "--tls=require");
    let expired = nbdkit(&pki.server("expired", "localhost", true), "--tls=require");
    for (uri, reason) in [
        (secure(&server, &pki.client("other", &pki.other, None), ""), "nobody trusted vouches"),
        (secure(&server, &good, "&tls-hostname=other.example"), "is not for \"other.example\""),
        (secure(&expired, &good, ""), "has expired"),
    ] {
        let (kind, text) = refused(&uri).await;
        assert_eq!(kind, ErrorKind::Denied, "{text}");
        assert!(text.contains(reason), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_good_certificate_is_told_so() {
    let pki = Pki::new();
    let server = nbdkit(&pki.server("server", "localhost", false), "--tls=require --tls-verify-peer");
    let (_, text) = refused(&secure(&server, &pki.client("none", &pki.good, None), "")).await;
    assert!(text.contains("client certificate"), "{text}");
    let (_, text) = refused(&secure(&server, &pki.client("wrong", &pki.good, Some(&pki.other)), "")).await;
    assert!(text.contains("certificate"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_plain_do_not_mix() {
    let pki = Pki::new();
    let client = pki.client("client", &pki.good, None);
    let demanding = nbdkit(&pki.server("server", "localhost", false), "--tls=require");
    let (kind, text) = refused(&demanding.uri("")).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    assert!(text.contains("use nbds://"), "{text}");
    let plain = Foreign::nbdkit("pattern size=16M");
    let (kind, text) = refused(&secure(&plain, &client, "")).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    assert!(text.contains("TLS is demanded, and the server has none"), "{text}");
    // Where it is only wished for, it is used where it can be.
    for server in [&plain, &demanding] {
        let text = format!("nbd+unix:///?socket={}&tls-certificates={}", server.socket().display(), client.display());
        works(text.parse().unwrap()).await;
    }
}

/// One of qemu's servers that demands TLS, and certificates of its clients.
async fn certificates_on_both_sides(pki: &Pki, server: Foreign, export: &str) {
    let secure = |client: &Path| NbdUri { export: export.to_owned(), ..secure(&server, client, "") };
    let uri = secure(&pki.client("client", &pki.good, Some(&pki.good)));
    let client = Client::connect(uri.clone(), ClientSettings::default()).await.unwrap();
    client.write_at(4096, &[7; 8192]).await.unwrap();
    client.flush().await.unwrap();
    assert_eq!(read(&client, 4096, 8192).await, [7; 8192]);
    assert_eq!(Client::list(uri, &ClientSettings::default()).await.unwrap()[0].name, export);
    for (name, own) in [("none", None), ("stranger", Some(&pki.other))] {
        let (_, text) = refused(&secure(&pki.client(name, &pki.good, own))).await;
        assert!(text.contains("certificate") || text.contains("connection"), "{name}: {text}");
    }
    let (kind, text) = refused(&secure(&pki.client("wary", &pki.other, Some(&pki.good)))).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    assert!(text.contains("nobody trusted vouches"), "{text}");
    let (kind, text) = refused(&server.uri(export)).await;
    assert_eq!(kind, ErrorKind::Denied, "{text}");
    assert!(text.contains("use nbds://"), "{text}");
    assert_eq!(read(&client, 4096, 8192).await, [7; 8192], "who is let in is not disturbed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_nbd_with_certificates_on_both_sides() {
    let pki = Pki::new();
    let credentials = server_credentials(&pki.server("server", "localhost", false));
    let server = Foreign::qemu_nbd(&[&credentials, "--tls-creds=tls0", "--shared=0"], 1 << 20);
    certificates_on_both_sides(&pki, server, "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_storage_daemon_with_certificates_on_both_sides() {
    let pki = Pki::new();
    let server = Foreign::qemu_storage_daemon(1 << 20, Some(&pki.server("server", "localhost", false)));
    certificates_on_both_sides(&pki, server, "disk").await;
}

#[test]
fn bad_directories_are_told_in_one_line() {
    let pki = Pki::new();
    let none = pki.root.path().join("none");
    let empty = pki.root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let nonsense = pki.server("nonsense", "localhost", false);
    std::fs::write(nonsense.join("ca-cert.pem"), "nonsense").unwrap();
    std::fs::write(nonsense.join("server-key.pem"), "nonsense").unwrap();
    let mixed = pki.server("mixed", "localhost", false);
    std::fs::copy(pki.server("another", "localhost", false).join("server-key.pem"), mixed.join("server-key.pem"))
        .unwrap();
    let server = |path: &Path| tls::server_config(path, ClientCertificates::Required).map(|_| ());
    let client = |path: &Path| tls::client_config(Some(path), true).map(|_| ());
    for (result, kind, reason) in [
        (client(&none), ErrorKind::NotFound, "none/ca-cert.pem"),
        (client(&nonsense), ErrorKind::InvalidInput, "holds no certificate"),
        (server(&empty), ErrorKind::NotFound, "server-cert.pem"),
        (server(&nonsense), ErrorKind::InvalidInput, "holds no private key"),
        (server(&mixed), ErrorKind::InvalidInput, "cannot be used"),
    ] {
        let error = result.expect_err(reason);
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(reason) && !error.to_string().contains('\n'), "{error}");
    }
    for clients in [ClientCertificates::None, ClientCertificates::Optional, ClientCertificates::Required] {
        let fine = pki.server(&format!("{clients:?}"), "localhost", false);
        tls::server_config(&fine, clients).unwrap();
    }
}
