//! Netlink messages as bytes: a header, and attributes which may hold attributes. No I/O.
//!
//! Sources: `include/uapi/linux/netlink.h`, `genetlink.h`; `Documentation/userspace-api/netlink/intro.rst`. All numbers
//! are in the machine's own byte order.

use std::io;

/// The length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// The length of `struct genlmsghdr`.
const GENERIC_HEADER: usize = 4;
/// The length of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 1 << 15;
/// What of an attribute's type is its number.
const TYPE: u16 = (1 << 14) - 1;

/// Attributes that are being written.
#[derive(Debug, Default, Clone)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn u32(self, kind: u16, value: u32) -> Self {
        self.raw(kind, &value.to_ne_bytes())
    }

    pub(crate) fn u64(self, kind: u16, value: u64) -> Self {
        self.raw(kind, &value.to_ne_bytes())
    }

    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        self.raw(kind, &[value.as_bytes(), b"\0"].concat())
    }

    pub(crate) fn nested(self, kind: u16, inner: &Self) -> Self {
        self.raw(kind | NESTED, &inner.0)
    }

    fn raw(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).expect("what we send is short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// A whole message to a family: a request that is to be acknowledged.
    pub(crate) fn into_message(self, family: u16, command: u8, version: u8, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + GENERIC_HEADER + self.0.len()).expect("what we send is short");
        let mut message = Vec::with_capacity(HEADER + GENERIC_HEADER + self.0.len());
        message.extend(length.to_ne_bytes());
        message.extend(family.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend([command, version, 0, 0]);
        message.extend(self.0);
        message
    }
}

/// A message that came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Incoming<'a> {
    /// The end of a request: an errno, 0 if it was done.
    Verdict {
        sequence: u32,
        errno: i32,
    },
    /// Something from a family.
    Family {
        command: u8,
        attributes: &'a [u8],
    },
    Other,
}

/// The messages in a datagram.
///
/// # Errors
/// `InvalidData` for one that is cut off or claims to be longer than it is.
pub(crate) fn messages(mut datagram: &[u8]) -> io::Result<Vec<Incoming<'_>>> {
    let mut found = Vec::new();
    while !datagram.is_empty() {
        let length = take_u32(datagram, 0)? as usize;
        if length < HEADER || length > datagram.len() {
            return Err(malformed());
        }
        found.push(message(&datagram[..length])?);
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

fn message(bytes: &[u8]) -> io::Result<Incoming<'_>> {
    let body = &bytes[HEADER..];
    match take_u16(bytes, 4)? {
        NLMSG_ERROR => {
            let code = take_u32(body, 0)?.cast_signed();
            Ok(Incoming::Verdict { sequence: take_u32(bytes, 8)?, errno: code.checked_neg().ok_or_else(malformed)? })
        }
        // Families' numbers start behind those of the protocol itself.
        16.. => {
            let attributes = body.get(GENERIC_HEADER..).ok_or_else(malformed)?;
            Ok(Incoming::Family { command: body[0], attributes })
        }
        _ => Ok(Incoming::Other),
    }
}

/// The attributes in a run of bytes: each number and value.
///
/// # Errors
/// `InvalidData` as for [`messages`].
pub(crate) fn attributes(mut bytes: &[u8]) -> io::Result<Vec<(u16, &[u8])>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(take_u16(bytes, 0)?);
        if length < ATTRIBUTE_HEADER || length > bytes.len() {
            return Err(malformed());
        }
        found.push((take_u16(bytes, 2)? & TYPE, &bytes[ATTRIBUTE_HEADER..length]));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(found)
}

/// The value of the first attribute of this number.
///
/// # Errors
/// `InvalidData` if there is none.
pub(crate) fn find(bytes: &[u8], kind: u16) -> io::Result<&[u8]> {
    let all = attributes(bytes)?;
    all.into_iter().find_map(|(number, value)| (number == kind).then_some(value)).ok_or_else(malformed)
}

pub(crate) fn take_u16(bytes: &[u8], at: usize) -> io::Result<u16> {
    let bytes = bytes.get(at..at + 2).ok_or_else(malformed)?;
    Ok(u16::from_ne_bytes(bytes.try_into().expect("two")))
}

pub(crate) fn take_u32(bytes: &[u8], at: usize) -> io::Result<u32> {
    let bytes = bytes.get(at..at + 4).ok_or_else(malformed)?;
    Ok(u32::from_ne_bytes(bytes.try_into().expect("four")))
}

/// A text without the zero that ends it.
pub(crate) fn text(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\0").unwrap_or(bytes)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's netlink answer is malformed")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_are_laid_out_as_in_the_headers() {
        let inner = Attributes::default().u32(1, 7);
        let message = Attributes::default().text(2, "abc").nested(7, &inner).u64(9, 1).into_message(0x21, 3, 1, 5);
        let mut expected = Vec::new();
        expected.extend(52u32.to_ne_bytes());
        expected.extend(0x21u16.to_ne_bytes());
        expected.extend(5u16.to_ne_bytes());
        expected.extend(5u32.to_ne_bytes());
        expected.extend(0u32.to_ne_bytes());
        expected.extend([3, 1, 0, 0]);
        expected.extend(8u16.to_ne_bytes());
        expected.extend(2u16.to_ne_bytes());
        expected.extend(b"abc\0");
        expected.extend(12u16.to_ne_bytes());
        expected.extend((7u16 | 0x8000).to_ne_bytes());
        expected.extend([8u16, 1].map(u16::to_ne_bytes).concat());
        expected.extend(7u32.to_ne_bytes());
        expected.extend([12u16, 9].map(u16::to_ne_bytes).concat());
        expected.extend(1u64.to_ne_bytes());
        assert_eq!(message, expected);
        let [Incoming::Family { command: 3, attributes: bytes }] = messages(&message).unwrap()[..] else {
            panic!("{message:?}");
        };
        assert_eq!(text(find(bytes, 2).unwrap()), b"abc");
        assert_eq!(take_u32(find(find(bytes, 7).unwrap(), 1).unwrap(), 0).unwrap(), 7);
        assert!(find(bytes, 8).is_err());
    }

    #[test]
    fn a_verdict_is_read() {
        let mut bytes = Vec::new();
        bytes.extend(36u32.to_ne_bytes());
        bytes.extend([2u16, 0].map(u16::to_ne_bytes).concat());
        bytes.extend([9u32, 1].map(u32::to_ne_bytes).concat());
        bytes.extend((-16i32).to_ne_bytes());
        bytes.extend([0; 16]);
        assert_eq!(messages(&bytes).unwrap(), [Incoming::Verdict { sequence: 9, errno: 16 }]);
        for cut in 1..bytes.len() {
            assert!(messages(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_an_error_or_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = messages(&bytes);
            let _ = attributes(&bytes);
        }
    }
}
