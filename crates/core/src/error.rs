//! One error for the whole system: a kind that tells the caller what to do, what was tried, where, and why it failed.
//!
//! The map from kinds to errno is here and nowhere else.

use std::fmt;
use std::sync::Arc;

/// No file descriptor is left: for the whole system, and for this process.
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// What every fallible call in r3map returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request can never work: a range past the end, a misaligned request, a bad setting. Fix the call.
    InvalidInput,
    /// What was named does not exist.
    NotFound,
    /// It exists, but this caller may not do that (permissions, a read-only region).
    Denied,
    /// A limit was reached: disk, memory, quota, file descriptors. Free something, then try again.
    Exhausted,
    /// It did not answer or is not there now. The same request may work later.
    Unavailable,
    /// The bytes that came back are not the ones that were written: a bad checksum, a short or missing chunk, a file
    /// that was truncated, a malformed message.
    Corrupt,
    /// Somebody else owns it now: a lock that is held, a fenced writer, another region's cache.
    Conflict,
    /// The call was given up, by its caller or because the thing it was made on is closing.
    Cancelled,
    /// A bug, or something that no other kind describes.
    Internal,
}

impl ErrorKind {
    /// Whether the same request may succeed if it is simply made again later.
    #[must_use]
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Unavailable)
    }

    /// The errno that a kernel interface (FUSE, NBD, ublk) answers with.
    ///
    /// Numbers are Linux's generic ones (`asm-generic/errno.h`), the same on every architecture that r3map runs on.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::InvalidInput => 22,                                // EINVAL
            Self::NotFound => 2,                                     // ENOENT
            Self::Denied => 1,                                       // EPERM
            Self::Exhausted => 28,                                   // ENOSPC
            Self::Unavailable | Self::Corrupt | Self::Internal => 5, // EIO
            Self::Conflict => 16,                                    // EBUSY
            Self::Cancelled => 125,                                  // ECANCELED
        }
    }

    /// The kind for an error of the operating system, by its errno where there is one.
    #[must_use]
    pub fn of_io(error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            // std has no stable kinds for these: ENXIO and ENODEV, ENFILE and EMFILE, ELOOP.
            Some(6 | 19) => Self::NotFound,
            Some(ENFILE | EMFILE) => Self::Exhausted,
            Some(40) => Self::InvalidInput,
            _ => Self::from_io(error.kind()),
        }
    }

    /// The kind for what std calls an error of the operating system.
    fn from_io(kind: std::io::ErrorKind) -> Self {
        use std::io::ErrorKind as Io;
        match kind {
            Io::InvalidInput | Io::Unsupported | Io::IsADirectory | Io::NotADirectory | Io::InvalidFilename => {
                Self::InvalidInput
            }
            Io::NotFound => Self::NotFound,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => Self::Denied,
            Io::StorageFull | Io::OutOfMemory | Io::QuotaExceeded | Io::FileTooLarge => Self::Exhausted,
            Io::ConnectionRefused
            | Io::ConnectionReset
            | Io::ConnectionAborted
            | Io::NotConnected
            | Io::BrokenPipe
            | Io::TimedOut
            | Io::WouldBlock
            | Io::Interrupted
            | Io::HostUnreachable
            | Io::NetworkUnreachable
            | Io::NetworkDown
            | Io::StaleNetworkFileHandle => Self::Unavailable,
            Io::UnexpectedEof | Io::InvalidData | Io::WriteZero => Self::Corrupt,
            Io::AlreadyExists | Io::AddrInUse | Io::ResourceBusy | Io::ExecutableFileBusy => Self::Conflict,
            _ => Self::Internal,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid input",
            Self::NotFound => "not found",
            Self::Denied => "denied",
            Self::Exhausted => "exhausted",
            Self::Unavailable => "unavailable",
            Self::Corrupt => "corrupt",
            Self::Conflict => "conflict",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal error",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// What was being done when an [`Error`] happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Opening, connecting or creating.
    Open,
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making written bytes durable.
    Flush,
    /// Releasing a range's storage.
    Trim,
    /// Writing zeros without sending them.
    WriteZeroes,
    /// Asking which ranges hold data.
    Extents,
    /// Showing a region to an application.
    Mount,
    /// Draining and letting go.
    Close,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write zeroes",
            Self::Extents => "extents",
            Self::Mount => "mount",
            Self::Close => "close",
        })
    }
}

/// Why something could not be done: a prescriptive [`ErrorKind`], the [`Operation`], the byte range, a message and the
/// source. Cloning is cheap (a reference count), because everyone who waited for one pull gets its one error.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    operation: Operation,
    range: Option<(u64, u64)>,
    message: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A new error. `message` is one line, in lower case, that says what is wrong and, where it can, what to do.
    #[must_use]
    pub fn new(kind: ErrorKind, operation: Operation, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, operation, range: None, message: message.into(), source: None }))
    }

    /// An error that the operating system reported; the kind follows from it, and so does what to do about a lack of
    /// file descriptors.
    #[must_use]
    pub fn from_io(operation: Operation, message: impl Into<String>, error: std::io::Error) -> Self {
        let mut message = message.into();
        match error.raw_os_error() {
            Some(EMFILE) => message.push_str("; raise the limit of this process (ulimit -n)"),
            Some(ENFILE) => message.push_str("; raise the limit of this system (sysctl fs.file-max)"),
            _ => {}
        }
        Self::new(ErrorKind::of_io(&error), operation, message).with_source(error)
    }

    /// A connection that could not be made: what is not there yet may be there later, and a lack of descriptors may pass, so
    /// unlike a missing file both are worth trying again.
    #[must_use]
    pub fn unreachable(to: impl fmt::Display, error: std::io::Error) -> Self {
        let mut error = Self::from_io(Operation::Open, format!("cannot connect to {to}"), error);
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Internal | ErrorKind::Exhausted) {
            Arc::make_mut(&mut error.0).kind = ErrorKind::Unavailable;
        }
        error
    }

    /// The same error, about `len` bytes at `offset`.
    #[must_use]
    pub fn at(mut self, offset: u64, len: u64) -> Self {
        Arc::make_mut(&mut self.0).range = Some((offset, len));
        self
    }

    /// The same error with another message in front: `message: what it was`.
    #[must_use]
    pub fn context(mut self, message: impl fmt::Display) -> Self {
        let inner = Arc::make_mut(&mut self.0);
        inner.message = format!("{message}: {}", inner.message);
        self
    }

    /// The same error, and behind its own words those of another that the same call has come to.
    #[must_use]
    pub fn along_with(mut self, other: &Self) -> Self {
        let message = format!("{}; besides: {}", self.reason(), other.reason());
        let inner = Arc::make_mut(&mut self.0);
        // Its words are in the message now.
        (inner.message, inner.source) = (message, None);
        self
    }

    /// The same error, caused by `source`.
    #[must_use]
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.0).source = Some(Arc::new(source));
        self
    }

    /// What the caller can do.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.0.operation
    }

    /// Offset and length in bytes, where the error is about a range.
    #[must_use]
    pub fn range(&self) -> Option<(u64, u64)> {
        self.0.range
    }

    /// The message alone, without operation, range and source.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The message and the source, without operation, range and kind: what to tell somebody who knows these already,
    /// such as the other side of a connection.
    #[must_use]
    pub fn reason(&self) -> String {
        match &self.0.source {
            Some(source) => format!("{}: {source}", self.0.message),
            None => self.0.message.clone(),
        }
    }

    /// The errno for kernel interfaces; see [`ErrorKind::errno`].
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { kind, operation, range, message, source } = &*self.0;
        write!(f, "{operation}")?;
        if let Some((offset, len)) = range {
            write!(f, " of {len} bytes at {offset}")?;
        }
        write!(f, ": {message} ({kind})")?;
        match source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // Display already includes the direct source, so the chain continues behind it.
        self.0.source.as_deref().and_then(|source| source.source())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_where_and_why() {
        let error = Error::from_io(
            Operation::Read,
            "the file is shorter than the region",
            std::io::Error::from(std::io::ErrorKind::UnexpectedEof),
        )
        .at(4096, 512);
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.errno(), 5);
        assert_eq!(error.reason(), "the file is shorter than the region: unexpected end of file");
        assert_eq!(
            error.to_string(),
            "read of 512 bytes at 4096: the file is shorter than the region (corrupt): unexpected end of file"
        );
    }

    #[test]
    fn errors_of_the_system_say_what_to_do() {
        let kind = |errno| Error::from_io(Operation::Open, "x", std::io::Error::from_raw_os_error(errno)).kind();
        // ENOENT, ENXIO, EACCES, EMFILE, EFBIG, ENOSPC, EROFS, ELOOP, EDQUOT
        let kinds = [2, 6, 13, 24, 27, 28, 30, 40, 122].map(kind);
        use ErrorKind::{Denied, Exhausted, InvalidInput, NotFound};
        assert_eq!(
            kinds,
            [NotFound, NotFound, Denied, Exhausted, Exhausted, Exhausted, Denied, InvalidInput, Exhausted]
        );
    }

    #[test]
    fn who_has_too_many_files_open_is_told_which_limit_to_raise() {
        let says = |errno| Error::from_io(Operation::Open, "x", std::io::Error::from_raw_os_error(errno)).reason();
        assert!(says(23).starts_with("x; raise the limit of this system (sysctl fs.file-max): "), "{}", says(23));
        assert!(says(24).starts_with("x; raise the limit of this process (ulimit -n): "), "{}", says(24));
    }

    #[test]
    fn who_cannot_be_reached_may_be_later_also_for_want_of_descriptors() {
        let error = |errno| Error::unreachable("/run/socket", std::io::Error::from_raw_os_error(errno));
        // ENOENT, ECONNREFUSED, EMFILE, ENFILE, ENOBUFS
        for errno in [2, 111, 24, 23, 105] {
            assert!(error(errno).kind().is_retryable(), "{errno}");
        }
        assert!(
            error(24).reason().starts_with("cannot connect to /run/socket; raise the limit"),
            "{}",
            error(24).reason()
        );
        assert_eq!(error(13).kind(), ErrorKind::Denied);
    }

    #[test]
    fn context_goes_in_front_and_a_clone_is_left_alone() {
        let error = Error::new(ErrorKind::NotFound, Operation::Open, "no such file");
        let outer = error.clone().context("file:/x");
        assert_eq!(outer.to_string(), "open: file:/x: no such file (not found)");
        assert_eq!(error.message(), "no such file");
    }

    #[test]
    fn of_two_errors_the_first_says_what_it_is() {
        let io = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let first = Error::from_io(Operation::Close, "not now", io);
        let both = first.along_with(&Error::new(ErrorKind::Exhausted, Operation::Write, "the disk is full"));
        assert_eq!(both.to_string(), "close: not now: permission denied; besides: the disk is full (denied)");
    }
}
