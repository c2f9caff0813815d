//! What a leecher must know to read a region, or take it away.

use std::fmt;

use subtle::ConstantTimeEq;

/// A shared secret. Comparing takes the same time wherever two of the same length differ; it is never printed.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// A secret of these bytes.
    #[must_use]
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes, to be sent.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether `shown` is this secret. Nobody knows an empty one: it is what is shown by who shows nothing.
    #[must_use]
    pub fn is(&self, shown: &[u8]) -> bool {
        !self.0.is_empty() && bool::from(self.0.ct_eq(shown))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_bytes_are_the_secret() {
        let secret = Secret::new("abc");
        assert!(secret.is(b"abc"));
        for other in [&b"abd"[..], b"ab", b"abcd", b""] {
            assert!(!secret.is(other));
        }
        assert!(!Secret::new("").is(b""));
        assert_eq!(format!("{secret:?}"), "Secret");
    }
}
