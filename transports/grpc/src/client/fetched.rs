//! What a server answered to a read: checked, then lent.

use r3map_core::{Error, ErrorKind, Operation, Piece, Result};

use crate::proto::region;
use crate::rope::Rope;

/// Bytes of one or more ranges, as they arrived.
#[derive(Debug)]
pub(crate) struct Fetched {
    runs: Vec<region::Run>,
    data: Rope,
    checked: bool,
}

impl Fetched {
    /// Bytes with checksums.
    pub(crate) fn with_checksums(runs: Vec<region::Run>, data: Rope) -> Self {
        Self { runs, data, checked: true }
    }

    /// Bytes of one range that nothing vouches for.
    pub(crate) fn plain(data: Rope) -> Self {
        let runs = vec![region::Run { length: data.len() as u64, crc32c: Some(0) }];
        Self { runs, data, checked: false }
    }

    /// Lends the bytes of `ranges` (offset and length, none of them empty) run by run, each after it was checked.
    ///
    /// # Errors
    /// `Corrupt` if a checksum is wrong or the ranges are not exactly filled, with the range that is bad; and whatever
    /// `visit` returns.
    pub(crate) fn lend(
        mut self,
        ranges: impl IntoIterator<Item = (u64, u64)>,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let mut runs = std::mem::take(&mut self.runs).into_iter();
        for (mut at, len) in ranges {
            let end = at + len;
            while at < end {
                let run = runs.next().ok_or_else(|| corrupt("the reply is too short", at, end - at))?;
                if !(1..=end - at).contains(&run.length) {
                    return Err(corrupt("the reply does not fit the request", at, end - at));
                }
                self.lend_run(at, &run, visit)?;
                at += run.length;
            }
        }
        match runs.next().is_none() && self.data.len() == 0 {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Corrupt, Operation::Read, "the reply is too long")),
        }
    }

    fn lend_run(
        &mut self,
        offset: u64,
        run: &region::Run,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let Some(checksum) = run.crc32c else { return visit(offset, Piece::Zeroes(run.length)) };
        let len = usize::try_from(run.length).unwrap_or(usize::MAX);
        if len > self.data.len() {
            return Err(corrupt("the reply is too short", offset, run.length));
        }
        let bytes = self.data.split_to(len);
        if self.checked && bytes.checksum() != checksum {
            return Err(corrupt("the checksum does not agree with the bytes", offset, run.length));
        }
        let mut at = offset;
        for segment in bytes.segments() {
            visit(at, Piece::Data(segment))?;
            at += segment.len() as u64;
        }
        Ok(())
    }
}

fn corrupt(message: &str, offset: u64, len: u64) -> Error {
    Error::new(ErrorKind::Corrupt, Operation::Read, message).at(offset, len)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use region::Run;

    use super::*;

    fn data(parts: &[&'static [u8]]) -> Rope {
        let mut rope = Rope::default();
        parts.iter().for_each(|part| rope.push(Bytes::from_static(part)));
        rope
    }

    fn run(length: u64, bytes: &[u8]) -> Run {
        Run { length, crc32c: Some(crc32c::crc32c(bytes)) }
    }

    fn zeros(length: u64) -> Run {
        Run { length, crc32c: None }
    }

    /// Everything that is lent before the first error, and the error.
    fn lend(fetched: Fetched, ranges: &[(u64, u64)]) -> (Vec<(u64, Vec<u8>)>, Result<()>) {
        let mut lent = Vec::new();
        let result = fetched.lend(ranges.iter().copied(), &mut |offset, piece| {
            lent.push(match piece {
                Piece::Data(bytes) => (offset, bytes.to_vec()),
                Piece::Zeroes(len) => (offset, vec![0; usize::try_from(len).unwrap()]),
            });
            Ok(())
        });
        (lent, result)
    }

    #[test]
    fn lends_runs_in_place_across_ranges_and_segments() {
        let runs = vec![run(3, b"abc"), zeros(2), run(2, b"de")];
        let (lent, result) = lend(Fetched::with_checksums(runs, data(&[b"a", b"bcd", b"e"])), &[(10, 5), (70, 2)]);
        result.unwrap();
        let expected: [(u64, &[u8]); 5] = [(10, b"a"), (11, b"bc"), (13, b"\0\0"), (70, b"d"), (71, b"e")];
        assert_eq!(lent, expected.map(|(offset, bytes)| (offset, bytes.to_vec())));
    }

    #[test]
    fn no_byte_of_a_run_with_a_wrong_checksum_is_lent() {
        let runs = vec![run(2, b"ab"), run(2, b"xx")];
        let (lent, result) = lend(Fetched::with_checksums(runs, data(&[b"abc", b"d"])), &[(0, 4)]);
        let error = result.unwrap_err();
        assert_eq!((error.kind(), error.range()), (ErrorKind::Corrupt, Some((2, 2))));
        assert_eq!(lent, [(0, b"ab".to_vec())]);
    }

    #[test]
    fn a_reply_that_is_not_exactly_what_was_asked_for_is_corrupt() {
        for (runs, bytes, ranges) in [
            (vec![], data(&[]), vec![(0, 1)]),
            (vec![zeros(1)], data(&[]), vec![(0, 2)]),
            (vec![zeros(3)], data(&[]), vec![(0, 2)]),
            (vec![zeros(4)], data(&[]), vec![(0, 2), (9, 2)]),
            (vec![zeros(0), zeros(2)], data(&[]), vec![(0, 2)]),
            (vec![zeros(2), zeros(1)], data(&[]), vec![(0, 2)]),
            (vec![zeros(u64::MAX), zeros(3)], data(&[]), vec![(0, 2)]),
            (vec![run(2, b"ab")], data(&[b"a"]), vec![(0, 2)]),
            (vec![run(2, b"ab")], data(&[b"abc"]), vec![(0, 2)]),
        ] {
            let told = format!("{runs:?} for {ranges:?}");
            let error = lend(Fetched::with_checksums(runs, bytes), &ranges).1.expect_err(&told);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{told}");
        }
    }

    #[test]
    fn what_the_visitor_says_ends_it() {
        let fetched = Fetched::plain(data(&[b"ab", b"cd"]));
        let mut calls = 0;
        let result = fetched.lend([(0, 4)], &mut |_, _| {
            calls += 1;
            Err(Error::new(ErrorKind::Exhausted, Operation::Mount, "full"))
        });
        assert_eq!((result.unwrap_err().kind(), calls), (ErrorKind::Exhausted, 1));
    }
}
