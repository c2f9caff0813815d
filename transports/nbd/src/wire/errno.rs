//! The protocol's error values, and the kinds that they stand for.

use r3map_core::ErrorKind;

/// An error value (proto.md, "Error values"). The protocol has only these; others are `Inval` to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Errno {
    /// `NBD_EPERM`: not permitted, such as a write to a read-only export.
    Perm,
    /// `NBD_EIO`.
    Io,
    /// `NBD_ENOMEM`.
    NoMem,
    /// `NBD_EINVAL`: the request can never work.
    Inval,
    /// `NBD_ENOSPC`: no room, or a write past the end.
    NoSpc,
    /// `NBD_EOVERFLOW`: the length is above what this command takes at once.
    Overflow,
    /// `NBD_ENOTSUP`: a fast zero would not be fast.
    NotSup,
    /// `NBD_ESHUTDOWN`: the server is being shut down.
    Shutdown,
}

impl Errno {
    /// Every value.
    pub const ALL: [Self; 8] =
        [Self::Perm, Self::Io, Self::NoMem, Self::Inval, Self::NoSpc, Self::Overflow, Self::NotSup, Self::Shutdown];

    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::NoMem => 12,
            Self::Inval => 22,
            Self::NoSpc => 28,
            Self::Overflow => 75,
            Self::NotSup => 95,
            Self::Shutdown => 108,
        }
    }

    /// What a number that a server sent means; unknown ones are `Inval`. Zero is no error: ask before.
    #[must_use]
    pub fn from_code(code: u32) -> Self {
        Self::ALL.into_iter().find(|errno| errno.code() == code).unwrap_or(Self::Inval)
    }

    /// What a server answers for an error of this kind: the errno of core where the protocol has it, else `Io`, because
    /// `Inval` would blame the request.
    #[must_use]
    pub fn from_kind(kind: ErrorKind) -> Self {
        let errno = kind.errno().unsigned_abs();
        Self::ALL.into_iter().find(|known| known.code() == errno).unwrap_or(Self::Io)
    }

    /// What a client's caller can do about it.
    #[must_use]
    pub fn kind(self) -> ErrorKind {
        match self {
            Self::Perm => ErrorKind::Denied,
            Self::Io => ErrorKind::Internal,
            Self::NoMem | Self::NoSpc => ErrorKind::Exhausted,
            Self::Inval | Self::Overflow | Self::NotSup => ErrorKind::InvalidInput,
            Self::Shutdown => ErrorKind::Unavailable,
        }
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Perm => "operation not permitted",
            Self::Io => "input/output error",
            Self::NoMem => "out of memory",
            Self::Inval => "invalid request",
            Self::NoSpc => "no space left",
            Self::Overflow => "request too long",
            Self::NotSup => "not supported",
            Self::Shutdown => "the server is being shut down",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_protocol() {
        assert_eq!(Errno::ALL.map(Errno::code), [1, 5, 12, 22, 28, 75, 95, 108]);
        for errno in Errno::ALL {
            assert_eq!(Errno::from_code(errno.code()), errno);
        }
        assert_eq!(Errno::from_code(9999), Errno::Inval);
    }

    #[test]
    fn kinds_become_what_the_protocol_has() {
        for (kind, errno) in [
            (ErrorKind::InvalidInput, Errno::Inval),
            (ErrorKind::NotFound, Errno::Io),
            (ErrorKind::Denied, Errno::Perm),
            (ErrorKind::Exhausted, Errno::NoSpc),
            (ErrorKind::Unavailable, Errno::Io),
            (ErrorKind::Corrupt, Errno::Io),
            (ErrorKind::Conflict, Errno::Io),
            (ErrorKind::Cancelled, Errno::Io),
            (ErrorKind::Internal, Errno::Io),
        ] {
            assert_eq!(Errno::from_kind(kind), errno, "{kind}");
        }
    }
}
