//! Taking numbers and strings off bytes, with every length checked. Nothing of the protocol is known here.

use super::{Malformed, Text};

/// Bytes that have not been decoded yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bytes<'a> {
    rest: &'a [u8],
    /// What is being decoded, for the error.
    what: &'static str,
}

impl<'a> Bytes<'a> {
    /// `too_short` is what the error says when there are not enough, or too many.
    pub(super) fn new(rest: &'a [u8], too_short: &'static str) -> Self {
        Self { rest, what: too_short }
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(Malformed::new(self.what))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Malformed::new(self.what))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string after its length of 32 bits.
    pub(super) fn text(&mut self) -> Result<Text, Malformed> {
        let length = self.u32()?;
        let length = usize::try_from(length).map_err(|_| Malformed::new(self.what))?;
        Text::decode(self.take(length)?)
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::new(self.what)) }
    }
}

/// A length that limits keep below 4 GiB.
pub(super) fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("what is encoded has passed the limits")
}
