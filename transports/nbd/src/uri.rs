//! The standard NBD URI: `nbd://host[:port]/export`, `nbd+unix:///export?socket=PATH`, and the same with TLS as `nbds`.
//!
//! Source: `doc/uri.md` of the NBD project; `tls-certificates` is libnbd's. This file takes URIs apart and writes them;
//! it opens nothing.

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode, utf8_percent_encode};
use r3map_core::{Error, ErrorKind, Operation, Result};

use crate::wire::{MAX_STRING, PORT};

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// The path of a Unix socket, or an abstract name, which begins with a NUL.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display().to_string().replace('\0', "@")),
        }
    }
}

/// What a URI says about TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// Whether to go on in plain if the server has no TLS: so for `nbd` and `nbd+unix` with any `tls-` option. `nbds`
    /// and `nbds+unix` never do.
    pub optional: bool,
    /// The directory of PEM files; see [`crate::tls`].
    pub certificates: Option<PathBuf>,
    /// The name to look for in the server's certificate, where it is not the host's.
    pub hostname: Option<String>,
    /// Whether the other side must prove who it is.
    pub verify_peer: VerifyPeer,
}

/// What `tls-verify-peer` says. A client takes [`Yes`](Self::Yes) where it says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyPeer {
    /// `0`: no.
    No,
    /// `optional`: only where it shows a certificate. Servers always do, so this is for listeners alone.
    IfShown,
    /// `1`: yes.
    #[default]
    Yes,
}

impl VerifyPeer {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "0" => Ok(Self::No),
            "1" => Ok(Self::Yes),
            "optional" => Ok(Self::IfShown),
            _ => Err("tls-verify-peer is 0 or 1, or for a listener optional".to_owned()),
        }
    }
}

/// A standard NBD URI, taken apart.
///
/// ```
/// let uri: r3map_nbd::NbdUri = "nbd://example.org/disk".parse()?;
/// assert_eq!((uri.address.to_string().as_str(), uri.export.as_str()), ("example.org:10809", "disk"));
/// # Ok::<(), r3map_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server is.
    pub address: Address,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// TLS, if it is to be used.
    pub tls: Option<TlsOptions>,
}

impl NbdUri {
    /// The scheme of this URI.
    #[must_use]
    pub fn scheme(&self) -> &'static str {
        let secure = self.tls.as_ref().is_some_and(|tls| !tls.optional);
        match (&self.address, secure) {
            (Address::Tcp { .. }, false) => "nbd",
            (Address::Tcp { .. }, true) => "nbds",
            (Address::Unix(_), false) => "nbd+unix",
            (Address::Unix(_), true) => "nbds+unix",
        }
    }

    /// The same server, another export.
    #[must_use]
    pub fn with_export(&self, export: &str) -> Self {
        Self { export: export.to_owned(), ..self.clone() }
    }

    /// The name that the server's certificate must have: `tls-hostname`, or the host; a Unix socket is on this host.
    #[must_use]
    pub fn tls_name(&self) -> &str {
        match (&self.tls, &self.address) {
            (Some(TlsOptions { hostname: Some(name), .. }), _) => name,
            (_, Address::Tcp { host, .. }) => host,
            (_, Address::Unix(_)) => "localhost",
        }
    }
}

impl FromStr for NbdUri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        parse(text).map_err(|what| Error::new(ErrorKind::InvalidInput, Operation::Open, format!("{text:?}: {what}")))
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text.split_once(':').ok_or("a URI starts with a scheme, e.g. nbd://host/export")?;
    let (secure, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err(format!("unknown scheme {scheme:?}; NBD has nbd, nbds, nbd+unix and nbds+unix")),
    };
    if text.contains('#') {
        return Err("there is no fragment in an NBD URI; write # as %23".to_owned());
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let rest = rest.strip_prefix("//").ok_or_else(|| format!("expected {scheme}://"))?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let options = Options::parse(query)?;
    let address = match (unix, &options.socket) {
        (true, Some(socket)) if authority.is_empty() => Address::Unix(socket.clone()),
        (true, Some(_)) => return Err(format!("a Unix socket has no host: write {scheme}:///export?socket=PATH")),
        (true, None) => return Err(format!("the socket's path is missing: write {scheme}:///export?socket=PATH")),
        (false, Some(_)) => return Err(format!("a socket's path needs the scheme {scheme}+unix")),
        (false, None) => tcp(authority)?,
    };
    Ok(NbdUri { address, export: export(path.strip_prefix('/').unwrap_or(""))?, tls: options.tls(secure) })
}

fn tcp(authority: &str) -> Result<Address, String> {
    if authority.contains('@') {
        return Err("user names are not supported: they are for TLS with shared keys".to_owned());
    }
    let wrong = || format!("{authority:?} is no address: write HOST, HOST:PORT or [IPV6]:PORT");
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
            // A scope may follow the address (RFC 6874).
            let address = host.split_once('%').map_or(host, |(address, _)| address);
            address.parse::<Ipv6Addr>().map_err(|_| wrong())?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or_else(wrong)?) })
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let host = decode(host).ok().filter(|host| !host.is_empty() && !host.contains(char::is_whitespace));
    let port = match port {
        // RFC 3986: an empty port is as none.
        None | Some("") => PORT,
        Some(port) => port.parse().map_err(|_| wrong())?,
    };
    Ok(Address::Tcp { host: host.ok_or_else(wrong)?, port })
}

fn export(path: &str) -> Result<String, String> {
    let name = decode(path).map_err(|()| "the export's name is not UTF-8".to_owned())?;
    if name.contains('\0') {
        return Err("the export's name holds a NUL".to_owned());
    }
    if name.len() > MAX_STRING {
        return Err(format!("the export's name has {} bytes; {MAX_STRING} is the most", name.len()));
    }
    Ok(name)
}

fn decode(text: &str) -> Result<String, ()> {
    percent_decode_str(text).decode_utf8().map(std::borrow::Cow::into_owned).map_err(|_| ())
}

/// What a query may hold.
#[derive(Default)]
struct Options {
    socket: Option<PathBuf>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
    verify_peer: Option<VerifyPeer>,
    x509: Option<()>,
}

impl Options {
    fn parse(query: &str) -> Result<Self, String> {
        let mut options = Self::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("option {pair:?} has no value"))?;
            options.set(key, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let text = || decode(value).map_err(|()| format!("the value of option {key:?} is not UTF-8"));
        match key {
            "socket" => once(&mut self.socket, key, path(value)?),
            "tls-certificates" => once(&mut self.certificates, key, path(value)?),
            "tls-hostname" => once(&mut self.hostname, key, text()?),
            "tls-verify-peer" => once(&mut self.verify_peer, key, VerifyPeer::parse(&text()?)?),
            "tls-type" => match text()?.as_str() {
                "x509" => once(&mut self.x509, key, ()),
                other => Err(format!("tls-type={other} is not supported; x509 is")),
            },
            "tls-username" | "tls-psk-file" => Err(format!("{key} is not supported: TLS here means certificates")),
            _ => Err(format!(
                "unknown option {key:?}; NBD has socket, tls-type, tls-certificates, tls-hostname, tls-verify-peer"
            )),
        }
    }

    fn tls(self, secure: bool) -> Option<TlsOptions> {
        let asked = secure
            || self.certificates.is_some()
            || self.hostname.is_some()
            || self.verify_peer.is_some()
            || self.x509.is_some();
        asked.then(|| TlsOptions {
            optional: !secure,
            certificates: self.certificates,
            hostname: self.hostname,
            verify_peer: self.verify_peer.unwrap_or_default(),
        })
    }
}

fn once<T>(slot: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("option {key:?} is given twice")),
    }
}

fn path(value: &str) -> Result<PathBuf, String> {
    let bytes: Vec<u8> = percent_decode_str(value).collect();
    // Only the first byte may be a NUL, which makes it an abstract name.
    if bytes.is_empty() || bytes[1..].contains(&0) || bytes == [0] {
        return Err("a path must follow socket= and tls-certificates=".to_owned());
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// What stays as it is in a path or a query.
const PLAIN: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/').remove(b':');

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = utf8_percent_encode(&self.export, &PLAIN);
        let mut query = Vec::new();
        match &self.address {
            Address::Tcp { .. } => write!(f, "{}://{}/{export}", self.scheme(), self.address)?,
            Address::Unix(path) => {
                write!(f, "{}:///{export}", self.scheme())?;
                query.push(format!("socket={}", encoded(path)));
            }
        }
        if let Some(tls) = &self.tls {
            query.extend(tls.certificates.iter().map(|path| format!("tls-certificates={}", encoded(path))));
            query.extend(tls.hostname.iter().map(|name| format!("tls-hostname={}", utf8_percent_encode(name, &PLAIN))));
            match tls.verify_peer {
                VerifyPeer::No => query.push("tls-verify-peer=0".to_owned()),
                VerifyPeer::IfShown => query.push("tls-verify-peer=optional".to_owned()),
                VerifyPeer::Yes => {}
            }
        }
        match query.is_empty() {
            true => Ok(()),
            false => write!(f, "?{}", query.join("&")),
        }
    }
}

fn encoded(path: &Path) -> String {
    percent_encode(path.as_os_str().as_bytes(), &PLAIN).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> NbdUri {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn export_names_are_as_the_standard_says() {
        for (text, export) in [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
            ("nbd://example.com/%C3%A4%23%3F", "ä#?"),
        ] {
            assert_eq!(uri(text).export, export, "{text}");
        }
    }

    #[test]
    fn addresses_of_every_kind() {
        let tcp = |host: &str, port| Address::Tcp { host: host.to_owned(), port };
        for (text, address) in [
            ("nbd://example.com", tcp("example.com", 10809)),
            ("NBDS://10.0.0.1:1/x", tcp("10.0.0.1", 1)),
            ("nbd://[::1]:9/x", tcp("::1", 9)),
            ("nbd://[fe80::1%25eth0]", tcp("fe80::1%eth0", 10809)),
            ("nbd://host:/x", tcp("host", 10809)),
            ("nbd+unix:///x?socket=/run/a%20b%3F", Address::Unix("/run/a b?".into())),
            ("nbd+unix://?socket=rel.sock", Address::Unix("rel.sock".into())),
            ("nbds+unix:///?socket=%00/abstract", Address::Unix("\0/abstract".into())),
        ] {
            assert_eq!(uri(text).address, address, "{text}");
        }
    }

    #[test]
    fn tls_is_demanded_offered_or_absent() {
        assert_eq!(uri("nbd://h").tls, None);
        let tls = uri("nbds://h").tls.unwrap();
        assert!(!tls.optional && tls.verify_peer == VerifyPeer::Yes && tls.certificates.is_none());
        assert_eq!(uri("nbds://h").tls_name(), "h");
        assert_eq!(uri("nbds+unix:///?socket=s").tls_name(), "localhost");
        let text = "nbd://h?tls-certificates=/pki&tls-hostname=other&tls-verify-peer=0&tls-type=x509";
        let tls = uri(text).tls.unwrap();
        assert!(tls.optional && tls.verify_peer == VerifyPeer::No);
        assert_eq!(tls.certificates.unwrap(), Path::new("/pki"));
        assert_eq!(uri(text).tls_name(), "other");
    }

    #[test]
    fn is_written_as_it_is_read() {
        for text in [
            "nbd://example.com:10809/",
            "nbds://[::1]:9/a%20b",
            "nbd+unix:///x?socket=/run/a%20b",
            "nbds+unix:///?socket=%00abstract&tls-certificates=/pki&tls-hostname=h&tls-verify-peer=0",
            "nbds://h:1/x?tls-certificates=/pki&tls-verify-peer=optional",
        ] {
            assert_eq!(uri(text).to_string(), text);
            assert_eq!(uri(&uri(text).to_string()), uri(text));
        }
        assert_eq!(uri("nbd://h/a").with_export("b/ä").to_string(), "nbd://h:10809/b/%C3%A4");
    }

    #[test]
    fn the_rest_is_refused_in_one_line() {
        let long = format!("nbd://h/{}", "x".repeat(4097));
        for (text, reason) in [
            ("example.com", "scheme"),
            ("http://h", "unknown scheme"),
            ("nbd:h", "expected nbd://"),
            ("nbd://", "no address"),
            ("nbd://:1", "no address"),
            ("nbd://h:x", "no address"),
            ("nbd://h:65536", "no address"),
            ("nbd://[::1", "no address"),
            ("nbd://[h]:1", "no address"),
            ("nbd://user@h", "user names"),
            ("nbd://h/x#y", "%23"),
            ("nbd://h/%00", "NUL"),
            ("nbd://h/%ff", "UTF-8"),
            (&long, "4097 bytes"),
            ("nbd+unix:///x", "?socket=PATH"),
            ("nbd+unix:///x?socket=", "path must follow"),
            ("nbd+unix:///x?socket=a%00b", "path must follow"),
            ("nbd+unix://h/x?socket=s", "has no host"),
            ("nbd://h?socket=s", "nbd+unix"),
            ("nbd://h?size=1", "unknown option"),
            ("nbd://h?tls-verify-peer", "has no value"),
            ("nbds://h?tls-verify-peer=2", "0 or 1, or for a listener optional"),
            ("nbds://h?tls-type=psk", "x509 is"),
            ("nbds://h?tls-psk-file=x", "certificates"),
            ("nbds://h?tls-hostname=a&tls-hostname=b", "given twice"),
        ] {
            let error = text.parse::<NbdUri>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.message().contains(reason) && !error.message().contains('\n'), "{error}");
        }
    }
}
