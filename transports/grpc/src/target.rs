//! Where a server is: a TCP address or the path of a Unix socket.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use r3map_core::{Error, ErrorKind, Operation};

/// The port of the r3map programs where none is given.
const DEFAULT_PORT: u16 = 1337;

/// Where a server listens and a client connects.
///
/// As text: `HOST`, `HOST:PORT`, `[IPV6]:PORT` or a path, which has a slash in it. The port is 1337 where none is
/// given. A host is a name or an address; listening on port 0 lets the system choose one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// TCP.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl Target {
    /// What goes into HTTP's `:authority`.
    pub(crate) fn authority(&self) -> http::uri::Authority {
        let text = match self {
            Self::Tcp { .. } => self.to_string(),
            Self::Unix(_) => "localhost".to_owned(),
        };
        text.parse().unwrap_or_else(|_| http::uri::Authority::from_static("localhost"))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.contains('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        let wrong = || {
            let message = format!("`{text}` is no address: write HOST:PORT, [IPV6]:PORT or the path of a socket");
            Error::new(ErrorKind::InvalidInput, Operation::Open, message)
        };
        let (host, port) = split(text).ok_or_else(wrong)?;
        let port = port.map_or(Ok(DEFAULT_PORT), |port| port.parse().map_err(|_| wrong()))?;
        match host {
            "" => Err(wrong()),
            _ if host.contains(char::is_whitespace) => Err(wrong()),
            _ => Ok(Self::Tcp { host: host.to_owned(), port }),
        }
    }
}

fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        let port = match port {
            "" => None,
            port => Some(port.strip_prefix(':')?),
        };
        return host.contains(':').then_some((host, port));
    }
    match text.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((text, None)),
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_and_paths_and_writes_them_again() {
        for (text, written) in [
            ("example.org", "example.org:1337"),
            ("10.0.0.1:9", "10.0.0.1:9"),
            ("::1", "[::1]:1337"),
            ("[::1]", "[::1]:1337"),
            ("[fe80::1]:9", "[fe80::1]:9"),
            ("/run/r3map.sock", "/run/r3map.sock"),
            ("./r3map.sock", "./r3map.sock"),
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), written, "{text}");
        }
    }

    #[test]
    fn refuses_the_rest_in_one_line() {
        for text in ["", ":1", "host:", "host:x", "host:65536", "[::1", "[host]:1", "[::1]1", "a b:1"] {
            let error = text.parse::<Target>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
            assert!(error.message().contains(&format!("`{text}`")) && !error.message().contains('\n'));
        }
    }
}
