//! The protocol's strings.

use std::fmt;
use std::ops::Deref;

use super::{MAX_STRING, Malformed};

/// A string that the protocol can carry: no NUL, at most [`MAX_STRING`] bytes. Names of exports and contexts,
/// descriptions and messages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Text(String);

impl Text {
    /// Checks a string.
    ///
    /// # Errors
    /// If it has a NUL or is too long.
    pub fn new(text: impl Into<String>) -> Result<Self, Malformed> {
        let text = text.into();
        if text.len() > MAX_STRING {
            return Err(Malformed::found("a string is longer than 4096 bytes", text.len() as u64));
        }
        if text.contains('\0') {
            return Err(Malformed::new("a string contains NUL"));
        }
        Ok(Self(text))
    }

    /// As much of `text` as fits, without NULs: for messages, where a part is better than none.
    #[must_use]
    pub fn cut(text: &str) -> Self {
        let mut text = text.replace('\0', "");
        let end = (0..=MAX_STRING.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        Self(text)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > MAX_STRING {
            return Err(Malformed::found("a string is longer than 4096 bytes", bytes.len() as u64));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::new("a string is not UTF-8"))?;
        Self::new(text)
    }

    /// With its length of 32 bits in front.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&super::bytes::length(self.0.len()).to_be_bytes());
        out.extend_from_slice(self.0.as_bytes());
    }

    /// The string.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_is_utf8_without_nul_and_of_bounded_length() {
        assert_eq!(&*Text::new("é").unwrap(), "é");
        assert!(Text::new("a\0b").is_err());
        assert!(Text::new("x".repeat(4096)).is_ok());
        assert!(Text::new("x".repeat(4097)).is_err());
        assert!(Text::decode(&[0xff]).is_err());
        assert!(Text::decode(&[b'x'; 4097]).is_err());
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let long = "é".repeat(3000);
        assert_eq!(Text::cut(&long).len(), 4096);
        assert_eq!(Text::cut(&format!("x{long}")).len(), 4095);
        assert_eq!(&*Text::cut("a\0b"), "ab");
    }
}
