//! The names of regions: `scheme:path?key=value` and `scheme://authority?key=value`.
//!
//! This file takes them apart and says what is wrong with them; what a scheme means is the registry's matter.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use r3map_core::{ChunkSize, Error, ErrorKind, Operation, Result};

use crate::size;

/// The name of a region or of a place to listen on, taken apart.
///
/// ```
/// let uri: r3map::Uri = "directory:/srv/disk?size=1GiB&chunk=1MiB".parse()?;
/// assert_eq!(uri.scheme(), "directory");
/// assert_eq!(uri.size("size")?, Some(1 << 30));
/// # Ok::<(), r3map::Error>(())
/// ```
///
/// Paths may hold any byte; `?`, `%` and bytes that are not UTF-8 are percent-encoded (RFC 3986).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    text: String,
    scheme: String,
    rest: String,
    query: BTreeMap<String, String>,
}

impl Uri {
    /// What comes before the first colon, in lower case.
    #[must_use]
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// What follows `scheme:`, decoded and without a leading `//`, as a path.
    ///
    /// # Errors
    /// `InvalidInput` if it is empty or holds a NUL.
    pub fn path(&self) -> Result<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        let rest = self.rest.strip_prefix("//").unwrap_or(&self.rest);
        let bytes: Vec<u8> = percent_decode_str(rest).collect();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(self.invalid(&format!("a path must follow, e.g. {}:/srv/disk.img", self.scheme)));
        }
        Ok(PathBuf::from(std::ffi::OsString::from_vec(bytes)))
    }

    /// The host and port that follow `scheme://`. The host is a name, an IPv4 address, or an IPv6 address in brackets.
    ///
    /// # Errors
    /// `InvalidInput` if there is no host, no port from 0 to 65535, or anything behind them.
    pub fn host_port(&self) -> Result<(&str, u16)> {
        let wrong = || self.invalid(&format!("expected {}://HOST:PORT", self.scheme));
        let authority = self.rest.strip_prefix("//").ok_or_else(wrong)?;
        let (host, port) = authority.strip_suffix('/').unwrap_or(authority).rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host_is_fine = match bracketed {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && !host.contains(['/', ':', '@', ' ', '[', ']']),
        };
        if !host_is_fine {
            return Err(wrong());
        }
        Ok((bracketed.unwrap_or(host), port.parse().map_err(|_| wrong())?))
    }

    /// The value of a query key, decoded; each key is given at most once.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.query.get(key).map(String::as_str)
    }

    /// A size in bytes from the query, written as in `64KiB`.
    ///
    /// # Errors
    /// `InvalidInput` if it is not a size.
    pub fn size(&self, key: &str) -> Result<Option<u64>> {
        self.get(key).map(|text| size::parse(text).map_err(|error| self.invalid(error.message()))).transpose()
    }

    /// A chunk size from the query.
    ///
    /// # Errors
    /// `InvalidInput` if it is not one.
    pub fn chunk_size(&self, key: &str) -> Result<Option<ChunkSize>> {
        let chunk = |bytes| ChunkSize::new(bytes).map_err(|error| self.invalid(error.message()));
        self.size(key)?.map(chunk).transpose()
    }

    /// Refuses whatever the scheme does not know, so that a misspelt option is not silently ignored.
    ///
    /// # Errors
    /// `InvalidInput` naming the unknown key and the known ones; also for anything but a query after the scheme where
    /// `takes_rest` is false.
    pub fn expect(&self, keys: &[&str], takes_rest: bool) -> Result<()> {
        if let Some(unknown) = self.query.keys().find(|key| !keys.contains(&key.as_str())) {
            let known = if keys.is_empty() { "none".to_owned() } else { keys.join(", ") };
            return Err(self.invalid(&format!("unknown option {unknown:?}; it takes: {known}")));
        }
        if !takes_rest && !self.rest.is_empty() {
            return Err(
                self.invalid(&format!("nothing may follow the scheme but options, e.g. {}:?size=1GiB", self.scheme))
            );
        }
        Ok(())
    }

    /// An `InvalidInput` error about this name.
    #[must_use]
    pub fn invalid(&self, message: &str) -> Error {
        invalid(&self.text, message)
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (scheme, rest) = match text.split_once(':') {
            Some((scheme, rest)) if is_scheme(scheme) => (scheme, rest),
            _ if Path::new(text).exists() => {
                return Err(invalid(text, &format!("a region's name starts with a scheme; did you mean file:{text}?")));
            }
            _ => return Err(invalid(text, "a region's name starts with a scheme, e.g. file:/srv/disk.img")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        Ok(Self {
            text: text.to_owned(),
            scheme: scheme.to_ascii_lowercase(),
            rest: rest.to_owned(),
            query: parse_query(text, query)?,
        })
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

fn parse_query(text: &str, query: &str) -> Result<BTreeMap<String, String>> {
    let mut options = BTreeMap::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| invalid(text, &format!("option {pair:?} has no value")))?;
        let value = percent_decode_str(value)
            .decode_utf8()
            .map_err(|_| invalid(text, &format!("the value of option {key:?} is not UTF-8")))?;
        if options.insert(key.to_owned(), value.into_owned()).is_some() {
            return Err(invalid(text, &format!("option {key:?} is given twice")));
        }
    }
    Ok(options)
}

fn invalid(text: &str, message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, Operation::Open, format!("{text:?}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn refused(text: &str) -> String {
        text.parse::<Uri>().unwrap_err().to_string()
    }

    #[test]
    fn takes_names_apart() {
        assert_eq!(uri("file:/a/b%3Fc%20d").path().unwrap(), Path::new("/a/b?c d"));
        assert_eq!(uri("FILE:disk.img").path().unwrap(), Path::new("disk.img"));
        assert_eq!(uri("grpc+unix:///run/x.sock").path().unwrap(), Path::new("/run/x.sock"));
        assert_eq!(uri("grpc://host:1337").host_port().unwrap(), ("host", 1337));
        assert_eq!(uri("grpc://[::1]:1337/").host_port().unwrap(), ("::1", 1337));
        let memory = uri("memory:?size=1GiB&chunk=64KiB");
        assert_eq!(memory.size("size").unwrap(), Some(1 << 30));
        assert_eq!(memory.chunk_size("chunk").unwrap(), Some(ChunkSize::DEFAULT));
        assert_eq!(memory.get("other"), None);
    }

    #[test]
    fn says_what_is_wrong_in_one_line() {
        assert!(refused("/etc/passwd").contains("did you mean file:/etc/passwd?"));
        assert!(refused("disk").contains("starts with a scheme"));
        assert!(refused("memory:?size").contains("has no value"));
        assert!(refused("memory:?size=1&size=2").contains("given twice"));
        for wrong in
            ["grpc://", "grpc:host:1", "grpc://host", "grpc://:1", "grpc://h:65536", "grpc://::1:5", "grpc://h:1/x"]
        {
            let message = uri(wrong).host_port().unwrap_err().to_string();
            assert!(message.contains("expected grpc://HOST:PORT") && !message.contains('\n'), "{message}");
        }
        assert!(uri("file:").path().is_err());
        assert!(uri("memory:?size=big").size("size").is_err());
        assert!(uri("memory:?chunk=5000").chunk_size("chunk").is_err());
        assert!(uri("memory:?sice=1").expect(&["size"], false).unwrap_err().to_string().contains("it takes: size"));
        assert!(uri("memory:x?size=1").expect(&["size"], false).is_err());
    }
}
