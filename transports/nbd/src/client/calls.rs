//! The requests that are under way on one connection: what was asked, what has arrived, and who waits.
//!
//! No I/O. Whatever a server says about a request is checked here against what was asked; what breaks the protocol's
//! rules is a `Violation`, and ends the connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::Waker;

use r3map_core::{Error, ErrorKind, Operation, RangeGuard};

use crate::client::coverage::Coverage;
use crate::client::unflushed::{Moment, Unflushed};
use crate::wire::{Command, Descriptor, Errno, Text};

/// What a server did that it must not do.
pub(crate) type Violation = String;

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The server says so.
    Refused(Errno, Text),
    /// The server's end of the connection is closed: what it has not answered, it will not do any more.
    Closed(String),
    /// This end gave the connection up: nobody knows what the server still does.
    GivenUp(String),
    /// The server broke the protocol's rules.
    Corrupt(Violation),
}

impl Failure {
    /// Whether what was to be flushed may be lost where a flush ended so. No rule has a server keep for the next flush what it
    /// could not make durable, and most do not.
    pub(crate) fn loses(&self) -> bool {
        !matches!(self, Self::Refused(Errno::Shutdown, _))
    }

    /// As an error of ours, about `peer`.
    pub(crate) fn into_error(self, operation: Operation, peer: &dyn std::fmt::Display) -> Error {
        let (kind, what) = self.says();
        Error::new(kind, operation, format!("{peer}: {what}"))
    }

    /// What the caller can do, and what happened.
    pub(crate) fn says(self) -> (ErrorKind, String) {
        match self {
            Self::Refused(errno, message) if message.is_empty() => (errno.kind(), errno.to_string()),
            Self::Refused(errno, message) => (errno.kind(), format!("{errno}: {}", message.replace(['\r', '\n'], " "))),
            Self::Closed(why) | Self::GivenUp(why) => {
                (ErrorKind::Unavailable, format!("the connection is lost: {why}"))
            }
            Self::Corrupt(what) => (ErrorKind::Corrupt, format!("the server answered with {what}")),
        }
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) command: Command,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Bytes of a read that somebody other than its caller has received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Spilled {
    Bytes(Vec<u8>),
    Zeroes(usize),
}

/// A request that was answered well.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    /// For `BLOCK_STATUS`.
    pub(crate) extents: Vec<Descriptor>,
}

/// The requests of a connection.
#[derive(Debug)]
pub(crate) struct Calls {
    next: u64,
    pending: HashMap<u64, Pending>,
    /// Those of `pending` that are not answered.
    unanswered: usize,
    broken: Option<Failure>,
    /// The server has said that it is being shut down: nothing more is to be asked of it here.
    refusing: bool,
    /// The connection's name, and where its acknowledgements are noted.
    link: Moment,
    unflushed: Arc<Unflushed>,
    /// The id of `base:allocation`.
    allocation: Option<u32>,
}

#[derive(Debug)]
struct Pending {
    asked: Asked,
    sent: Moment,
    /// Keeps others from changing the range, or from flushing, until the fate of this is known.
    guard: Option<Arc<RangeGuard>>,
    covered: Coverage,
    /// Each with its place in the caller's buffer.
    spilled: Vec<(usize, Spilled)>,
    error: Option<(Errno, Text)>,
    reply: Reply,
    done: Option<Result<Reply, Failure>>,
    /// Nobody waits for it any more.
    abandoned: bool,
    waker: Option<Waker>,
}

/// How a caller finds its request.
pub(crate) enum Progress {
    Done(Result<Reply, Failure>),
    Waiting,
}

impl Calls {
    pub(crate) fn new(link: Moment, unflushed: Arc<Unflushed>, allocation: Option<u32>) -> Self {
        Self {
            next: 1,
            pending: HashMap::new(),
            unanswered: 0,
            broken: None,
            refusing: false,
            link,
            unflushed,
            allocation,
        }
    }

    /// A request is about to be sent; its cookie.
    ///
    /// # Errors
    /// Why the connection is broken, if it is, or over.
    pub(crate) fn begin(&mut self, asked: Asked, guard: Option<Arc<RangeGuard>>) -> Result<u64, Failure> {
        if self.refusing {
            return Err(Failure::Closed("the server is being shut down".to_owned()));
        }
        if let Some(failure) = &self.broken {
            return Err(failure.clone());
        }
        let (cookie, sent) = (self.next, self.unflushed.now());
        self.next += 1;
        self.unanswered += 1;
        let pending = Pending {
            asked,
            sent,
            guard,
            covered: Coverage::default(),
            spilled: Vec::new(),
            error: None,
            reply: Reply::default(),
            done: None,
            abandoned: false,
            waker: None,
        };
        self.pending.insert(cookie, pending);
        Ok(cookie)
    }

    /// How many requests are not answered.
    pub(crate) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Whether requests are to be made.
    pub(crate) fn is_open(&self) -> bool {
        self.broken.is_none() && !self.refusing
    }

    /// Whether the connection is to be ended: the server wants that, and has nothing more to say.
    pub(crate) fn is_over(&self) -> bool {
        self.refusing && self.unanswered == 0
    }

    pub(crate) fn broken(&self) -> Option<&Failure> {
        self.broken.as_ref()
    }

    /// Where the request is.
    pub(crate) fn asked_offset(&mut self, cookie: u64) -> Result<u64, Violation> {
        Ok(self.get(cookie)?.asked.offset)
    }

    /// A simple reply has arrived; gives the length of the data that follows it, where there is some.
    pub(crate) fn simple(
        &mut self,
        cookie: u64,
        error: Option<Errno>,
        structured: bool,
    ) -> Result<Option<u64>, Violation> {
        let pending = self.get(cookie)?;
        let Asked { command, length, .. } = pending.asked;
        if command == Command::Read && structured {
            return Err("a simple reply to a read, where structured ones were agreed on".to_owned());
        }
        if command == Command::BlockStatus && error.is_none() {
            return Err("a reply without extents".to_owned());
        }
        match error {
            None if command == Command::Read => Ok(Some(length)),
            error => {
                pending.error = error.map(|error| (error, Text::default()));
                self.finish(cookie)?;
                Ok(None)
            }
        }
    }

    /// Bytes of a read are arriving; gives their place in the caller's buffer.
    ///
    /// # Errors
    /// If they are not part of what was asked for, or have arrived before.
    pub(crate) fn data(&mut self, cookie: u64, offset: u64, length: u64) -> Result<usize, Violation> {
        let pending = self.get(cookie)?;
        let Asked { command, offset: start, length: asked } = pending.asked;
        if command != Command::Read {
            return Err("data where none was asked for".to_owned());
        }
        let range = offset..offset.checked_add(length).ok_or("bytes past the end of everything")?;
        if range.start < start || range.end > start + asked {
            return Err(format!("bytes {range:?}, where {start}..{} was asked for", start + asked));
        }
        pending.covered.add(range)?;
        usize::try_from(offset - start).map_err(|_| "more than fits into memory".to_owned())
    }

    /// As [`Self::data`], for zeros.
    pub(crate) fn hole(&mut self, cookie: u64, offset: u64, length: u64) -> Result<(), Violation> {
        let at = self.data(cookie, offset, length)?;
        let length = usize::try_from(length).map_err(|_| "more than fits into memory")?;
        self.spill(cookie, at, Spilled::Zeroes(length));
        Ok(())
    }

    /// Extents have arrived.
    pub(crate) fn status(&mut self, cookie: u64, context: u32, extents: Vec<Descriptor>) -> Result<(), Violation> {
        let allocation = self.allocation;
        let pending = self.get(cookie)?;
        if pending.asked.command != Command::BlockStatus || allocation != Some(context) {
            return Err("extents that were not asked for".to_owned());
        }
        if !pending.reply.extents.is_empty() {
            return Err("extents twice".to_owned());
        }
        // Only the last may go beyond what was asked for.
        let before = extents.iter().rev().skip(1).try_fold(0u64, |sum, extent| sum.checked_add(extent.length));
        if extents.is_empty() || before.is_none_or(|before| before >= pending.asked.length) {
            return Err("extents that do not fit what was asked for".to_owned());
        }
        pending.reply.extents = extents;
        Ok(())
    }

    /// The request has failed; it is not over before its last chunk.
    pub(crate) fn error(&mut self, cookie: u64, error: Errno, message: Text) -> Result<(), Violation> {
        self.get(cookie)?.error.get_or_insert((error, message));
        Ok(())
    }

    /// A chunk says that it is about the request at `offset`.
    pub(crate) fn check_offset(&mut self, cookie: u64, offset: Option<u64>) -> Result<(), Violation> {
        let asked = self.get(cookie)?.asked.offset;
        match offset {
            Some(offset) if offset != asked => Err("a chunk with another offset than its request".to_owned()),
            _ => Ok(()),
        }
    }

    /// The last of the reply has arrived.
    ///
    /// # Errors
    /// If something is missing.
    pub(crate) fn finish(&mut self, cookie: u64) -> Result<(), Violation> {
        let (link, unflushed) = (self.link, self.unflushed.clone());
        let pending = self.get(cookie)?;
        let Asked { command, offset, length } = pending.asked;
        let refusing = matches!(pending.error, Some((Errno::Shutdown, _)));
        let result = match pending.error.take() {
            Some((error, message)) => Err(Failure::Refused(error, message)),
            None if command == Command::Read && !pending.covered.is(&(offset..offset + length)) => {
                return Err("less than was asked for".to_owned());
            }
            None if command == Command::BlockStatus && pending.reply.extents.is_empty() => {
                return Err("no extents".to_owned());
            }
            None => Ok(std::mem::take(&mut pending.reply)),
        };
        if result.is_ok() && matches!(command, Command::Write | Command::WriteZeroes | Command::Trim) {
            unflushed.written(link, pending.sent);
        }
        self.refusing |= refusing;
        self.done(cookie, result);
        Ok(())
    }

    fn done(&mut self, cookie: u64, result: Result<Reply, Failure>) {
        self.unanswered -= 1;
        let Some(pending) = self.pending.get_mut(&cookie) else { return };
        if pending.asked.command == Command::Flush && result.as_ref().is_err_and(Failure::loses) {
            self.unflushed.lost();
        }
        pending.guard = None;
        pending.done = Some(result);
        let waker = pending.waker.take();
        if pending.abandoned {
            self.pending.remove(&cookie);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Keeps bytes of a read until its caller takes them.
    pub(crate) fn spill(&mut self, cookie: u64, at: usize, bytes: Spilled) {
        if let Some(pending) = self.pending.get_mut(&cookie).filter(|pending| !pending.abandoned) {
            pending.spilled.push((at, bytes));
        }
    }

    /// Whether anybody waits for it.
    pub(crate) fn is_wanted(&self, cookie: u64) -> bool {
        self.pending.get(&cookie).is_some_and(|pending| !pending.abandoned)
    }

    /// Tells the caller that it is its turn to receive.
    pub(crate) fn wake(&mut self, cookie: u64) {
        if let Some(waker) = self.pending.get_mut(&cookie).and_then(|pending| pending.waker.take()) {
            waker.wake();
        }
    }

    /// Asks how a request stands, and takes what has arrived for it. `waker` is called when there is more.
    pub(crate) fn poll(&mut self, cookie: u64, waker: &Waker) -> (Vec<(usize, Spilled)>, Progress) {
        let Some(pending) = self.pending.get_mut(&cookie) else {
            return (Vec::new(), Progress::Done(Err(Failure::GivenUp("the call was given up".to_owned()))));
        };
        let spilled = std::mem::take(&mut pending.spilled);
        match pending.done.take() {
            Some(result) => {
                self.pending.remove(&cookie);
                (spilled, Progress::Done(result))
            }
            None => {
                if !pending.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
                    pending.waker = Some(waker.clone());
                }
                (spilled, Progress::Waiting)
            }
        }
    }

    /// Nobody waits for it any more. It stays until it is answered; says whether it has to.
    pub(crate) fn abandon(&mut self, cookie: u64) -> bool {
        let Some(pending) = self.pending.get_mut(&cookie) else { return false };
        pending.abandoned = true;
        pending.waker = None;
        pending.spilled = Vec::new();
        let answered = pending.done.is_some();
        if answered {
            self.pending.remove(&cookie);
        }
        !answered
    }

    /// The connection is broken: no further request is made, and the driver, which is to be woken, fails the others.
    pub(crate) fn doom(&mut self, failure: Failure) {
        self.broken.get_or_insert(failure);
    }

    /// The connection is broken: every request that is not answered fails. Gives the ranges that may still change.
    pub(crate) fn fail(&mut self, failure: Failure) -> Vec<Arc<RangeGuard>> {
        let failure = self.broken.get_or_insert(failure).clone();
        let open: Vec<u64> = self.pending.iter().filter(|(_, p)| p.done.is_none()).map(|(cookie, _)| *cookie).collect();
        let changes = |pending: &&mut Pending| pending.asked.command != Command::Flush;
        let guards =
            open.iter().filter_map(|cookie| self.pending.get_mut(cookie).filter(changes)?.guard.take()).collect();
        open.into_iter().for_each(|cookie| self.done(cookie, Err(failure.clone())));
        guards
    }

    fn get(&mut self, cookie: u64) -> Result<&mut Pending, Violation> {
        let pending = self.pending.get_mut(&cookie).filter(|pending| pending.done.is_none());
        pending.ok_or_else(|| format!("a reply to a request that was not made (cookie {cookie:#x})"))
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::RangeLock;

    use super::*;

    fn calls() -> Calls {
        Calls::new(1, Arc::new(Unflushed::default()), Some(9))
    }

    fn begin(calls: &mut Calls, command: Command, offset: u64, length: u64) -> u64 {
        calls.begin(Asked { command, offset, length }, None).unwrap()
    }

    fn take(calls: &mut Calls, cookie: u64) -> Option<Result<Reply, Failure>> {
        match calls.poll(cookie, Waker::noop()).1 {
            Progress::Done(result) => Some(result),
            Progress::Waiting => None,
        }
    }

    #[test]
    fn a_read_is_done_when_every_byte_has_arrived_once() {
        let mut calls = calls();
        let read = begin(&mut calls, Command::Read, 100, 10);
        assert_eq!(calls.data(read, 105, 5).unwrap(), 5);
        calls.spill(read, 5, Spilled::Bytes(vec![1; 5]));
        calls.hole(read, 100, 5).unwrap();
        let spilled = calls.poll(read, Waker::noop()).0;
        assert_eq!(spilled, [(5, Spilled::Bytes(vec![1; 5])), (0, Spilled::Zeroes(5))]);
        assert!(take(&mut calls, read).is_none());
        calls.finish(read).unwrap();
        assert_eq!(take(&mut calls, read), Some(Ok(Reply::default())));
        assert_eq!(calls.unanswered(), 0);
        assert!(calls.finish(read).unwrap_err().contains("not made"), "it is over");
    }

    #[test]
    fn what_does_not_fit_the_request_is_a_violation() {
        let mut calls = calls();
        let read = begin(&mut calls, Command::Read, 100, 10);
        let write = begin(&mut calls, Command::Write, 100, 10);
        let status = begin(&mut calls, Command::BlockStatus, 100, 10);
        for (offset, length) in [(99, 2), (105, 6), (110, 1), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(calls.data(read, offset, length).is_err(), "{length} bytes at {offset}");
        }
        calls.data(read, 100, 5).unwrap();
        assert!(calls.hole(read, 104, 2).unwrap_err().contains("before"));
        assert!(calls.finish(read).unwrap_err().contains("less"));
        assert!(calls.data(write, 100, 10).is_err());
        assert!(calls.data(77, 100, 10).unwrap_err().contains("0x4d"));
        assert!(calls.simple(read, None, true).is_err());
        assert!(calls.simple(status, None, true).is_err());
        assert!(calls.finish(status).unwrap_err().contains("no extents"));
        assert!(calls.check_offset(read, Some(101)).is_err());
        calls.check_offset(read, Some(100)).unwrap();
        calls.check_offset(read, None).unwrap();
    }

    #[test]
    fn extents_are_those_that_were_asked_for() {
        let mut calls = calls();
        let extent = |length| Descriptor { length, flags: 0 };
        let status = begin(&mut calls, Command::BlockStatus, 100, 10);
        let read = begin(&mut calls, Command::Read, 100, 10);
        assert!(calls.status(status, 8, vec![extent(1)]).is_err(), "another context");
        assert!(calls.status(read, 9, vec![extent(1)]).is_err());
        assert!(calls.status(status, 9, vec![extent(10), extent(1)]).is_err(), "the last is not needed");
        assert!(calls.status(status, 9, vec![extent(u64::MAX), extent(u64::MAX), extent(1)]).is_err());
        calls.status(status, 9, vec![extent(9), extent(1000)]).unwrap();
        assert!(calls.status(status, 9, vec![extent(1)]).unwrap_err().contains("twice"));
        calls.finish(status).unwrap();
        assert_eq!(take(&mut calls, status).unwrap().unwrap().extents, [extent(9), extent(1000)]);
    }

    #[test]
    fn an_error_ends_a_request_whatever_else_arrived() {
        let mut calls = calls();
        let read = begin(&mut calls, Command::Read, 0, 10);
        calls.data(read, 0, 5).unwrap();
        calls.error(read, Errno::Io, Text::cut("bad\ndisk")).unwrap();
        calls.error(read, Errno::Perm, Text::default()).unwrap();
        calls.finish(read).unwrap();
        let failure = take(&mut calls, read).unwrap().unwrap_err();
        assert_eq!(failure, Failure::Refused(Errno::Io, Text::cut("bad\ndisk")));
        let error = failure.into_error(Operation::Read, &"host:1");
        assert_eq!(error.message(), "host:1: input/output error: bad disk");
    }

    #[test]
    fn only_changes_that_were_acknowledged_are_unflushed() {
        let unflushed = Arc::new(Unflushed::default());
        let mut calls = Calls::new(1, unflushed.clone(), None);
        let read = begin(&mut calls, Command::Read, 0, 1);
        let failed = begin(&mut calls, Command::Write, 0, 1);
        assert_eq!(calls.simple(read, None, false).unwrap(), Some(1));
        calls.simple(failed, Some(Errno::NoSpc), false).unwrap();
        assert_eq!(unflushed.mark(), []);
        for command in [Command::Write, Command::Trim, Command::WriteZeroes] {
            let change = begin(&mut calls, command, 0, 1);
            assert_eq!(calls.simple(change, None, false).unwrap(), None);
            let mark = unflushed.mark();
            assert_eq!(mark.len(), 1, "{command:?}");
            unflushed.settled(&mark);
        }
    }

    #[test]
    fn a_change_holds_its_range_until_its_fate_is_known() {
        let ranges = RangeLock::new();
        let mut calls = calls();
        let mut write = || {
            let guard = Arc::new(ranges.try_lock(0..10).unwrap());
            calls.begin(Asked { command: Command::Write, offset: 0, length: 10 }, Some(guard)).unwrap()
        };
        let answered = write();
        calls.abandon(answered);
        assert!(ranges.try_lock(0..10).is_none(), "nobody waits for it, but it may still land");
        calls.simple(answered, None, true).unwrap();
        assert!(ranges.try_lock(0..10).is_some());

        let guard = Arc::new(ranges.try_lock(0..10).unwrap());
        let asked = Asked { command: Command::Write, offset: 0, length: 10 };
        let lost = calls.begin(asked, Some(guard)).unwrap();
        let guards = calls.fail(Failure::GivenUp("silence".to_owned()));
        assert_eq!(take(&mut calls, lost), Some(Err(Failure::GivenUp("silence".to_owned()))));
        assert!(ranges.try_lock(0..10).is_none());
        drop(guards);
        assert!(ranges.try_lock(0..10).is_some());
        assert!(calls.begin(asked, None).is_err());
    }

    #[test]
    fn a_server_that_is_being_shut_down_is_left_in_peace() {
        let mut calls = calls();
        let (read, other) = (begin(&mut calls, Command::Read, 0, 10), begin(&mut calls, Command::Read, 20, 10));
        calls.error(read, Errno::Shutdown, Text::default()).unwrap();
        assert!(calls.is_open());
        calls.finish(read).unwrap();
        assert!(!calls.is_open() && !calls.is_over(), "no new requests");
        let asked = Asked { command: Command::Read, offset: 0, length: 10 };
        assert!(matches!(calls.begin(asked, None), Err(Failure::Closed(_))), "it can be made elsewhere");
        let failure = take(&mut calls, read).unwrap().unwrap_err();
        assert_eq!(failure.into_error(Operation::Read, &"x").kind(), ErrorKind::Unavailable);
        calls.hole(other, 20, 10).unwrap();
        calls.finish(other).unwrap();
        assert_eq!(take(&mut calls, other), Some(Ok(Reply::default())), "others end as they would");
        assert!(calls.is_over());
    }

    #[test]
    fn nothing_is_kept_for_nobody() {
        let mut calls = calls();
        let read = begin(&mut calls, Command::Read, 0, 10);
        calls.abandon(read);
        calls.hole(read, 0, 10).unwrap();
        assert!(!calls.is_wanted(read));
        calls.finish(read).unwrap();
        assert!(calls.pending.is_empty());
    }
}
