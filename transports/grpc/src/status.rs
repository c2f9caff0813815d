//! How errors travel: each kind has its own gRPC status code, and the message goes as it is.

use http::HeaderMap;
use http::header::HeaderName;
use r3map_core::{Error, ErrorKind, Operation};
use tonic::{Code, Status};

/// What the Go programs say when a read is longer than the server allows.
pub(crate) const GO_TOO_LONG: &str = "max chunk size exceeded";
/// What the Go programs say when a read goes past the end of the region.
pub(crate) const GO_END: &str = "EOF";

/// A status for an error, to be sent.
pub(crate) fn from_error(error: &Error) -> Status {
    Status::new(code(error.kind()), error.reason())
}

/// An error for a status that `peer` answered with.
pub(crate) fn into_error(status: &Status, operation: Operation, peer: &impl std::fmt::Display) -> Error {
    let message = match status.message() {
        "" => format!("{peer}: {}", status.code().description().trim_end_matches('.').to_lowercase()),
        GO_END => format!("{peer}: the region ends before that, is the size right? (EOF)"),
        text => format!("{peer}: {}", text.replace(['\r', '\n'], " ")),
    };
    Error::new(kind(status), operation, message)
}

/// The status in headers or trailers, if there is one.
pub(crate) fn in_headers(headers: &HeaderMap) -> Option<Status> {
    // Nobody here uses the details, and tonic panics if they are malformed.
    const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
    if headers.contains_key(&DETAILS) {
        let mut headers = headers.clone();
        headers.remove(DETAILS);
        return Status::from_header_map(&headers);
    }
    Status::from_header_map(headers)
}

fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidInput => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::Conflict => Code::Aborted,
        ErrorKind::Cancelled => Code::Cancelled,
        _ => Code::Internal,
    }
}

fn kind(status: &Status) -> ErrorKind {
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => ErrorKind::InvalidInput,
        Code::NotFound => ErrorKind::NotFound,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Denied,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::Unavailable | Code::DeadlineExceeded => ErrorKind::Unavailable,
        Code::DataLoss => ErrorKind::Corrupt,
        Code::Aborted | Code::FailedPrecondition | Code::AlreadyExists => ErrorKind::Conflict,
        Code::Cancelled => ErrorKind::Cancelled,
        Code::Unknown => match status.message() {
            GO_TOO_LONG | "invalid offset" => ErrorKind::InvalidInput,
            GO_END | "short write" => ErrorKind::Corrupt,
            _ => ErrorKind::Internal,
        },
        Code::Ok | Code::Internal => ErrorKind::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_arrives_as_it_was_sent() {
        use ErrorKind::{
            Cancelled, Conflict, Corrupt, Denied, Exhausted, Internal, InvalidInput, NotFound, Unavailable,
        };
        for sent in [InvalidInput, NotFound, Denied, Exhausted, Unavailable, Corrupt, Conflict, Cancelled, Internal] {
            let error = Error::new(sent, Operation::Write, "no room for ä % bytes").at(1, 2);
            let status = from_error(&error);
            let mut headers = HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            let received = into_error(&in_headers(&headers).unwrap(), Operation::Write, &"host:1");
            assert_eq!((received.kind(), received.message()), (sent, "host:1: no room for ä % bytes"));
        }
    }

    #[test]
    fn a_hostile_status_is_one_line_and_no_panic() {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", "8".parse().unwrap());
        headers.insert("grpc-message", "two%0Alines".parse().unwrap());
        headers.insert("grpc-status-details-bin", "not base64 !".parse().unwrap());
        let error = into_error(&in_headers(&headers).unwrap(), Operation::Read, &"host:1");
        assert_eq!(error.message(), "host:1: two lines");
        assert!(in_headers(&HeaderMap::new()).is_none());
        let silent = into_error(&Status::new(Code::Unavailable, ""), Operation::Read, &"host:1");
        assert_eq!(silent.message(), "host:1: the service is currently unavailable");
    }
}
