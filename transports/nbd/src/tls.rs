//! TLS with certificates, for either side, from a directory of PEM files with the names that NBD programs on GnuTLS use:
//! `ca-cert.pem`, `server-cert.pem` and `server-key.pem`, `client-cert.pem` and `client-key.pem`.
//!
//! It makes rustls configurations and explains rustls' errors. When TLS begins on a connection is the handshake's matter
//! (`NBD_OPT_STARTTLS`). There are no shared keys and no anonymous TLS: rustls has neither.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, ServerConfig, SignatureScheme,
};

/// Whom the certificates in a directory are trusted to speak for.
const CA: &str = "ca-cert.pem";

/// What a server asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientCertificates {
    /// No certificate.
    #[default]
    None,
    /// A client may show one; one that `ca-cert.pem` does not vouch for is refused.
    Optional,
    /// Each client must show one that `ca-cert.pem` vouches for.
    Required,
}

/// A server's configuration, from `server-cert.pem` and `server-key.pem` in `directory`, and `ca-cert.pem` where clients
/// are asked for certificates.
///
/// # Errors
/// One line that names the file: `NotFound`, `Denied`, or `InvalidInput` for one that holds no usable certificate or key.
pub fn server_config(directory: &Path, clients: ClientCertificates) -> Result<Arc<ServerConfig>> {
    let (chain, key) = identity(directory, "server")?;
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| unusable(directory, &error))?;
    let builder = match clients {
        ClientCertificates::None => builder.with_no_client_auth(),
        ClientCertificates::Optional | ClientCertificates::Required => {
            let roots = Arc::new(roots(&directory.join(CA))?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let verifier = match clients {
                ClientCertificates::Required => verifier,
                _ => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|error| unusable(&directory.join(CA), &error))?)
        }
    };
    let config = builder.with_single_cert(chain, key);
    Ok(Arc::new(config.map_err(|error| unusable(&directory.join("server-cert.pem"), &error))?))
}

/// A client's configuration.
///
/// `directory` has `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` if the server asks for a certificate. Without
/// it the first of libnbd's directories that exists is taken (`~/.pki/libnbd`, `~/.config/pki/libnbd`,
/// `/etc/pki/libnbd`), and what the system trusts if none does. With `verify` false any server is believed.
///
/// # Errors
/// As [`server_config`]; `NotFound` if nobody is trusted at all.
pub fn client_config(directory: Option<&Path>, verify: bool) -> Result<Arc<ClientConfig>> {
    let usual = usual_directories().into_iter().find(|directory| directory.join(CA).exists());
    let directory = directory.map(Path::to_owned).or(usual);
    let builder = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| unusable(Path::new("TLS"), &error))?;
    let builder = match (verify, &directory) {
        (false, _) => builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer)),
        (true, Some(directory)) => {
            let verifier = verifier(roots(&directory.join(CA))?).map_err(|error| error.context(directory.display()))?;
            builder.dangerous().with_custom_certificate_verifier(verifier)
        }
        (true, None) => builder.dangerous().with_custom_certificate_verifier(verifier(system_roots()?)?),
    };
    let own = directory.filter(|directory| directory.join("client-cert.pem").exists());
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(directory) => {
            let (chain, key) = identity(&directory, "client")?;
            let config = builder.with_client_auth_cert(chain, key);
            config.map_err(|error| unusable(&directory.join("client-cert.pem"), &error))?
        }
    };
    Ok(Arc::new(config))
}

/// The name that a server's certificate must have, for rustls.
///
/// # Errors
/// `InvalidInput` for what is neither a host's name nor an address.
pub fn server_name(name: &str) -> Result<ServerName<'static>> {
    let bare = name.split_once('%').map_or(name, |(address, _)| address);
    ServerName::try_from(bare.to_owned()).map_err(|_| {
        let message = format!("{name:?} is no name that a certificate can have: give one with tls-hostname=");
        Error::new(ErrorKind::InvalidInput, Operation::Open, message)
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn usual_directories() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let own = home.into_iter().flat_map(|home| [home.join(".pki/libnbd"), home.join(".config/pki/libnbd")]);
    own.chain([PathBuf::from("/etc/pki/libnbd")]).collect()
}

fn verifier(roots: RootCertStore) -> Result<Arc<WebPkiServerVerifier>> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    verifier.build().map_err(|error| unusable(Path::new(CA), &error))
}

fn system_roots() -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match roots.is_empty() {
        false => Ok(roots),
        true => {
            let message = "nobody is trusted to vouch for the server: give a directory with ca-cert.pem, \
                           tls-certificates=DIR";
            Err(Error::new(ErrorKind::NotFound, Operation::Open, message))
        }
    }
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(path, &error))?;
    }
    Ok(roots)
}

fn identity(directory: &Path, role: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = certificates(&directory.join(format!("{role}-cert.pem")))?;
    let path = directory.join(format!("{role}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| unreadable(&path, "private key", error))?;
    Ok((chain, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| unreadable(path, "certificate", error))?;
    match certificates.is_empty() {
        false => Ok(certificates),
        true => Err(unreadable(path, "certificate", pem::Error::NoItemsFound)),
    }
}

fn unreadable(path: &Path, what: &str, error: pem::Error) -> Error {
    match error {
        pem::Error::Io(error) => Error::from_io(Operation::Open, format!("cannot read {}", path.display()), error),
        error => {
            let message = format!("{} holds no {what} in PEM: {error}", path.display());
            Error::new(ErrorKind::InvalidInput, Operation::Open, message)
        }
    }
}

fn unusable(path: &Path, error: &dyn std::error::Error) -> Error {
    Error::new(ErrorKind::InvalidInput, Operation::Open, format!("{} cannot be used: {error}", path.display()))
}

/// Believes any server, for `tls-verify-peer=0`. Signatures are checked all the same, so that only who holds the
/// certificate's key gets through.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// An error of a TLS connection to `peer`, whose certificate was to have the name `name`, in words that say what to do.
pub(crate) fn explain(peer: &dyn std::fmt::Display, name: &str, error: io::Error) -> Error {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (kind, why) = match inner {
        Some(rustls::Error::InvalidCertificate(why)) => (ErrorKind::Denied, certificate(name, why)),
        Some(rustls::Error::AlertReceived(alert)) => (ErrorKind::Denied, alerted(*alert)),
        Some(other) => (ErrorKind::Corrupt, format!("TLS failed: {other}")),
        None => {
            let message = format!("the TLS handshake with {peer} failed");
            return match ErrorKind::of_io(&error) {
                ErrorKind::Corrupt => Error::new(ErrorKind::Unavailable, Operation::Open, message).with_source(error),
                _ => Error::from_io(Operation::Open, message, error),
            };
        }
    };
    Error::new(kind, Operation::Open, format!("{peer}: {why}"))
}

fn certificate(name: &str, why: &CertificateError) -> String {
    use CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext, Other,
        UnknownIssuer,
    };
    match why {
        Expired | ExpiredContext { .. } => "the server's certificate has expired".to_owned(),
        NotValidYet | NotValidYetContext { .. } => {
            "the server's certificate is not valid yet: check the clocks".to_owned()
        }
        NotValidForName | NotValidForNameContext { .. } => {
            format!("the server's certificate is not for {name:?}: check the host, or give tls-hostname=")
        }
        UnknownIssuer => {
            "nobody trusted vouches for the server's certificate: check ca-cert.pem in tls-certificates=".to_owned()
        }
        Other(OtherError(inner)) => format!("the server's certificate cannot be used: {inner}"),
        other => format!("the server's certificate cannot be used: {other:?}"),
    }
}

fn alerted(alert: rustls::AlertDescription) -> String {
    use rustls::AlertDescription as Alert;
    match alert {
        Alert::CertificateRequired => {
            "the server asks for a client certificate: put client-cert.pem and client-key.pem into tls-certificates="
                .to_owned()
        }
        // The last where it was vouched for by one who is called as somebody trusted, and has another key.
        Alert::UnknownCA
        | Alert::BadCertificate
        | Alert::CertificateUnknown
        | Alert::CertificateExpired
        | Alert::DecryptError => {
            format!("the server refuses the client certificate ({alert:?})")
        }
        Alert::HandshakeFailure | Alert::InsufficientSecurity | Alert::ProtocolVersion => {
            format!("the server and this program have no way of TLS in common ({alert:?})")
        }
        other => format!("the server broke TLS off ({other:?})"),
    }
}
