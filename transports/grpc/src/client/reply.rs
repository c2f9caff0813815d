//! What a server answers to a read: checked as it arrives, chunk by chunk, and lent at once, while it is in the
//! processor's cache and before the rest is there.

use std::sync::Arc;

use bytes::Bytes;
use http_body::Body;
use r3map_core::{Error, ErrorKind, Operation, Piece, Result};

use crate::client::facts::SMALL;
use crate::client::link::CallError;
use crate::client::links::OpenLink;
use crate::exchange::{Arriving, Failure, Fields};
use crate::proto::{go, region};
use crate::rope::Rope;
use crate::sum;

/// What bytes are lent to.
pub(crate) type Visit<'v> = dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send + 'v;

/// The bytes of one or more ranges, which are arriving.
#[derive(Debug)]
pub(crate) struct Reply {
    open: Arc<OpenLink>,
    arriving: Arriving,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// With so many bytes of data, and at most so many beside it.
    Region {
        asked: u64,
        rest: usize,
    },
    Go {
        len: u64,
    },
}

impl Reply {
    /// A reply of our own service to a read of `asked` bytes, with at most `rest` bytes beside them.
    pub(crate) fn region(open: Arc<OpenLink>, arriving: Arriving, asked: u64, rest: usize) -> Self {
        Self { open, arriving, kind: Kind::Region { asked, rest } }
    }

    /// A reply of the Go programs' service to a read of `len` bytes.
    pub(crate) fn go(open: Arc<OpenLink>, arriving: Arriving, len: u64) -> Self {
        Self { open, arriving, kind: Kind::Go { len } }
    }

    /// Lends the bytes of `ranges` (offset and length): those that were asked for.
    ///
    /// # Errors
    /// `Corrupt` if a checksum is wrong or the ranges are not exactly filled, with the range that is bad; `Unavailable`
    /// if the connection breaks; what the server says; and whatever `visit` returns.
    pub(crate) async fn lend(self, ranges: &[(u64, u64)], visit: &mut Visit<'_>) -> Result<()> {
        let Self { open, arriving, kind } = self;
        let lent = match kind {
            Kind::Region { asked, rest } => lend_region(&open, arriving, asked, rest, ranges, visit).await,
            Kind::Go { len } => lend_go(&open, arriving, len, ranges, visit).await,
        };
        let (offset, len) = (ranges.first().map_or(0, |range| range.0), ranges.iter().map(|range| range.1).sum());
        lent.map_err(|wrong| match wrong {
            Wrong::Error(error) => error,
            Wrong::Call(error) => error.into_error(Operation::Read, open.link.target()).at(offset, len),
            Wrong::Failure(failure) => {
                open.link.failed(failure).into_error(Operation::Read, open.link.target()).at(offset, len)
            }
        })
    }
}

async fn lend_region(
    open: &OpenLink,
    arriving: Arriving,
    asked: u64,
    rest: usize,
    ranges: &[(u64, u64)],
    visit: &mut Visit<'_>,
) -> Result<(), Wrong> {
    let limit = rest + usize::try_from(asked).unwrap_or(usize::MAX);
    let (arriving, length) = open.link.length(arriving, limit).await?;
    let mut fields = Fields::new(arriving, length, rest);
    lend_runs(&mut fields, ranges, visit).await?;
    Ok(open.link.check(fields.end().await)?)
}

async fn lend_runs<B>(
    fields: &mut Fields<region::ReadReply, B>,
    ranges: &[(u64, u64)],
    visit: &mut Visit<'_>,
) -> Result<(), Wrong>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let mut data = fields.bulk().await?.unwrap_or(0);
    let head = fields.message()?;
    if head.crc32c != sum::runs(ranges.iter().copied(), &head.runs) {
        let (offset, len) = (ranges.first().map_or(0, |range| range.0), ranges.iter().map(|range| range.1).sum());
        return Err(corrupt("the checksum does not agree with the reply to this request", offset, len));
    }
    let mut runs = head.runs.into_iter();
    for &(start, len) in ranges {
        let (mut at, end) = (start, start + len);
        while at < end {
            let run = runs.next().ok_or_else(|| corrupt("the reply is too short", at, end - at))?;
            if !(1..=end - at).contains(&run.length) {
                return Err(corrupt("the reply does not fit the request", at, end - at));
            }
            lend_run(fields, &mut data, at, &run, visit).await?;
            at += run.length;
        }
    }
    match runs.next().is_none() && data == 0 && fields.bulk().await?.is_none() {
        true => Ok(()),
        false => Err(Wrong::Error(Error::new(ErrorKind::Corrupt, Operation::Read, "the reply is too long"))),
    }
}

/// Lends a run at `offset`; `data` is how much is left of the reply's data.
async fn lend_run<B>(
    fields: &mut Fields<region::ReadReply, B>,
    data: &mut usize,
    offset: u64,
    run: &region::Run,
    visit: &mut Visit<'_>,
) -> Result<(), Wrong>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    let Some(checksum) = run.crc32c else { return Ok(visit(offset, Piece::Zeroes(run.length))?) };
    let length = usize::try_from(run.length).unwrap_or(usize::MAX);
    *data = data.checked_sub(length).ok_or_else(|| corrupt("the reply is too short", offset, run.length))?;
    let bytes = fields.take(length).await?;
    if bytes.checksum() != checksum {
        return Err(corrupt("the checksum does not agree with the bytes", offset, run.length));
    }
    Ok(lend_bytes(offset, &bytes, visit)?)
}

/// Nothing vouches for these bytes but that there are as many as were asked for, which only the whole reply tells.
async fn lend_go(
    open: &OpenLink,
    arriving: Arriving,
    len: u64,
    ranges: &[(u64, u64)],
    visit: &mut Visit<'_>,
) -> Result<(), Wrong> {
    let asked = usize::try_from(len).unwrap_or(usize::MAX);
    let (arriving, length) = open.link.length(arriving, asked.saturating_add(SMALL)).await?;
    let mut fields = Fields::<go::ReadAtReply>::new(arriving, length, SMALL);
    let mut data = Rope::default();
    while let Some(length) = fields.bulk().await? {
        data = fields.take(length).await?;
    }
    let reply = fields.message()?;
    open.link.check(fields.end().await)?;
    let offset = ranges.first().map_or(0, |range| range.0);
    if u64::try_from(reply.n) != Ok(len) || data.len() != asked {
        let message = format!("{} sent {} bytes, {} of them read", open.link.target(), data.len(), reply.n);
        return Err(corrupt(&message, offset, len));
    }
    Ok(lend_bytes(offset, &data, visit)?)
}

fn lend_bytes(offset: u64, bytes: &Rope, visit: &mut Visit<'_>) -> Result<()> {
    let mut at = offset;
    for segment in bytes.segments() {
        visit(at, Piece::Data(segment))?;
        at += segment.len() as u64;
    }
    Ok(())
}

/// Why bytes could not be lent.
#[derive(Debug)]
enum Wrong {
    Error(Error),
    Call(CallError),
    Failure(Failure),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<CallError> for Wrong {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl From<Failure> for Wrong {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

fn corrupt(message: &str, offset: u64, len: u64) -> Wrong {
    Wrong::Error(Error::new(ErrorKind::Corrupt, Operation::Read, message).at(offset, len))
}

#[cfg(test)]
mod tests {
    use region::Run;

    use super::*;
    use crate::exchange::pieces;
    use crate::message::{PREFIX, encode_bulk};

    fn run(length: u64, bytes: &[u8]) -> Run {
        Run { length, crc32c: Some(crc_fast::crc32_iscsi(bytes)) }
    }

    fn zeros(length: u64) -> Run {
        Run { length, crc32c: None }
    }

    /// What is lent of a reply that arrives in pieces of `step` bytes, and how it ends.
    async fn lend(
        runs: Vec<Run>,
        data: &'static [u8],
        ranges: &[(u64, u64)],
        step: usize,
    ) -> (Vec<(u64, Vec<u8>)>, Result<(), Wrong>) {
        lend_answer(runs, data, [ranges, ranges], step).await
    }

    /// The same where the server has heard of other ranges than were asked for.
    async fn lend_answer(
        runs: Vec<Run>,
        data: &'static [u8],
        [heard, ranges]: [&[(u64, u64)]; 2],
        step: usize,
    ) -> (Vec<(u64, Vec<u8>)>, Result<(), Wrong>) {
        let crc32c = sum::runs(heard.iter().copied(), &runs);
        let head = region::ReadReply { runs, crc32c, data: Bytes::new() };
        let mut message = encode_bulk(&head, Bytes::from_static(data).into());
        message.split_to(PREFIX);
        let length = message.len();
        let mut fields = Fields::new(Arriving::new(pieces(&message.into_bytes(), step)), length, 1000);
        let mut lent = Vec::new();
        let mut visit = |offset: u64, piece: Piece<'_>| {
            lent.push(match piece {
                Piece::Data(bytes) => (offset, bytes.to_vec()),
                Piece::Zeroes(len) => (offset, vec![0; usize::try_from(len).unwrap()]),
            });
            Ok(())
        };
        let result = lend_runs(&mut fields, ranges, &mut visit).await;
        (lent, result)
    }

    fn kind(wrong: &Wrong) -> Option<(ErrorKind, Option<(u64, u64)>)> {
        match wrong {
            Wrong::Error(error) => Some((error.kind(), error.range())),
            _ => None,
        }
    }

    #[tokio::test]
    async fn runs_are_lent_in_place_across_ranges_however_they_arrive() {
        for step in [1, 3, 100] {
            let runs = vec![run(3, b"abc"), zeros(2), run(2, b"de")];
            let (lent, result) = lend(runs, b"abcde", &[(10, 5), (70, 2)], step).await;
            result.unwrap();
            let mut bytes = [b'?'; 80];
            for (offset, piece) in lent {
                let at = usize::try_from(offset).unwrap();
                bytes[at..at + piece.len()].copy_from_slice(&piece);
            }
            assert_eq!((&bytes[9..16], &bytes[69..73]), (b"?abc\0\0?".as_ref(), b"?de?".as_ref()), "{step}");
        }
    }

    #[tokio::test]
    async fn no_byte_of_a_run_with_a_wrong_checksum_is_lent() {
        let (lent, result) = lend(vec![run(2, b"ab"), run(2, b"xx")], b"abcd", &[(0, 4)], 100).await;
        assert_eq!(kind(&result.unwrap_err()), Some((ErrorKind::Corrupt, Some((2, 2)))));
        assert_eq!(lent, [(0, b"ab".to_vec())]);
    }

    #[tokio::test]
    async fn what_is_at_another_place_is_not_lent() {
        for (heard, asked) in [([(8, 4)], [(0, 4)]), ([(0, 4)], [(1 << 40, 4)])] {
            for runs in [vec![run(4, b"abcd")], vec![zeros(4)]] {
                let data: &[u8] = if runs[0].crc32c.is_some() { b"abcd" } else { b"" };
                let (lent, result) = lend_answer(runs, data, [&heard, &asked], 100).await;
                assert_eq!(kind(&result.unwrap_err()), Some((ErrorKind::Corrupt, Some(asked[0]))));
                assert_eq!(lent, []);
            }
        }
    }

    #[tokio::test]
    async fn a_reply_that_is_not_exactly_what_was_asked_for_is_corrupt() {
        for (runs, data, ranges) in [
            (vec![], b"".as_ref(), vec![(0, 1)]),
            (vec![zeros(1)], b"", vec![(0, 2)]),
            (vec![zeros(3)], b"", vec![(0, 2)]),
            (vec![zeros(4)], b"", vec![(0, 2), (9, 2)]),
            (vec![zeros(0), zeros(2)], b"", vec![(0, 2)]),
            (vec![zeros(2), zeros(1)], b"", vec![(0, 2)]),
            (vec![zeros(u64::MAX), zeros(3)], b"", vec![(0, 2)]),
            (vec![run(2, b"ab")], b"a", vec![(0, 2)]),
            (vec![run(2, b"ab")], b"abc", vec![(0, 2)]),
            (vec![run(2, b"ab")], b"", vec![(0, 2)]),
        ] {
            let told = format!("{runs:?} for {ranges:?}");
            let wrong = lend(runs, data, &ranges, 100).await.1.expect_err(&told);
            assert_eq!(kind(&wrong).map(|wrong| wrong.0), Some(ErrorKind::Corrupt), "{told}");
        }
    }

    #[tokio::test]
    async fn data_that_does_not_arrive_is_a_failure() {
        let runs = vec![run(4, b"abcd")];
        let head = region::ReadReply { crc32c: sum::runs([(0, 4)], &runs), runs, data: Bytes::new() };
        let mut message = encode_bulk(&head, Bytes::from_static(b"abcd").into());
        message.split_to(PREFIX);
        let length = message.len();
        let cut = message.into_bytes().slice(..length - 1);
        let mut fields = Fields::new(Arriving::new(pieces(&cut, 2)), length, 1000);
        let result = lend_runs(&mut fields, &[(0, 4)], &mut |_, _| panic!("a byte is lent")).await;
        assert!(matches!(result, Err(Wrong::Failure(Failure::Malformed(_)))), "{result:?}");
    }
}
