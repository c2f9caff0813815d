//! What goes wrong in the background, which is said once.

use std::collections::HashSet;

use r3map::{Error, ErrorKind, Operation, Region};

/// What was said of it: each kind of trouble once, for all the places where it happens, whatever else goes wrong in turn
/// with it.
#[derive(Debug, Default)]
pub(crate) struct Troubles(HashSet<(ErrorKind, Operation)>);

impl Troubles {
    /// What went wrong last in a region, if nothing was said of its like.
    pub(crate) fn news(&mut self, region: &Region) -> Option<Error> {
        let error = region.progress()?.borrow().last_error.clone()?;
        self.is_new(&error).then_some(error)
    }

    /// Of a remote that does not answer enough is said.
    fn is_new(&mut self, error: &Error) -> bool {
        !error.kind().is_retryable() && self.0.insert((error.kind(), error.operation()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_wrong_in_turns_is_said_once_each() {
        let mut troubles = Troubles::default();
        let mut say = |kind, operation| troubles.is_new(&Error::new(kind, operation, "it fails"));
        let first = (say(ErrorKind::Exhausted, Operation::Write), say(ErrorKind::Corrupt, Operation::Read));
        assert_eq!(first, (true, true));
        for _ in 0..3 {
            assert!(!say(ErrorKind::Exhausted, Operation::Write) && !say(ErrorKind::Corrupt, Operation::Read));
        }
        assert!(say(ErrorKind::Exhausted, Operation::Flush), "that is another");
        assert!(!say(ErrorKind::Unavailable, Operation::Read), "of an outage enough is said");
    }
}
