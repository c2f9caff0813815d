//! What the end of a connection says about the requests that were under way on it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::client::calls::Failure;

/// Which side ended a connection. Both halves know it: the system tells the reason to one of them only, and to the other
/// that it is over.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending(Arc<AtomicBool>);

impl Ending {
    /// Remembers what `error` of one of the halves says.
    pub(crate) fn note(&self, error: &io::Error) {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};
        // The other side closed, or TLS found its bytes changed. Any other (a time-out, a network that is gone) is this
        // side's own doing, of which the other may not know.
        let theirs = [BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof];
        if !theirs.contains(&error.kind()) {
            self.0.store(true, Ordering::Release);
        }
    }

    /// Whether this side's system gave the connection up.
    pub(crate) fn is_ours(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// What the end is to requests that are not answered.
    pub(crate) fn failure(&self, why: String) -> Failure {
        if self.is_ours() { Failure::GivenUp(why) } else { Failure::Closed(why) }
    }

    /// As [`Self::failure`], because of `error`.
    pub(crate) fn broken(&self, error: &io::Error) -> Failure {
        self.note(error);
        match error.kind() {
            io::ErrorKind::InvalidData => Failure::Corrupt(format!("what cannot be decrypted: {error}")),
            _ => self.failure(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_end_that_the_server_made_says_that_nothing_comes_later() {
        let reset = Ending::default();
        assert!(matches!(reset.broken(&io::ErrorKind::ConnectionReset.into()), Failure::Closed(_)));
        assert!(matches!(reset.failure("the end".to_owned()), Failure::Closed(_)));
        for lost in [io::ErrorKind::TimedOut, io::ErrorKind::HostUnreachable, io::ErrorKind::NetworkUnreachable] {
            let ending = Ending::default();
            let other = ending.clone();
            assert!(matches!(ending.broken(&lost.into()), Failure::GivenUp(_)), "{lost}");
            // The other half is told no more than that it is over.
            assert!(matches!(other.failure("the end".to_owned()), Failure::GivenUp(_)), "{lost}");
            assert!(matches!(other.broken(&io::ErrorKind::BrokenPipe.into()), Failure::GivenUp(_)), "{lost}");
        }
    }
}
