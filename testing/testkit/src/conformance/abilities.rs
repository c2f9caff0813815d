//! Cases about the optional abilities.

use std::ops::Range;

use r3map_core::{BLOCK_SIZE, Error, ErrorKind, Extent, ExtentKind, Operation, Piece, ReadOp, Result};

use super::subject::{Subject, assert_refused, index, past_the_end};

const PRESENT: &str = "the case asks for the ability";

/// Collects lent pieces, and asserts that they come in order and without gaps.
async fn read_pieces(subject: &Subject, range: Range<u64>) -> Vec<u8> {
    let pieces = subject.capabilities().pieces.expect(PRESENT);
    let mut bytes = Vec::new();
    let mut visit = |offset: u64, piece: Piece<'_>| -> Result<()> {
        assert_eq!(offset, range.start + bytes.len() as u64, "pieces are consecutive");
        assert!(!piece.is_empty(), "a piece has at least one byte");
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(data),
            Piece::Zeroes(len) => bytes.resize(bytes.len() + index(len), 0),
        }
        Ok(())
    };
    pieces.read_pieces(range.start, range.end - range.start, &mut visit).await.expect("reading pieces");
    assert_eq!(bytes.len() as u64, range.end - range.start, "pieces cover what was asked for");
    bytes
}

pub(super) async fn pieces_are_consecutive_and_right(subject: &Subject) {
    for range in subject.interesting() {
        subject.compare_initial(&read_pieces(subject, range.clone()).await, range.start);
    }
    if subject.read_only() {
        return;
    }
    let first = subject.first_request();
    subject.write([first.clone()], 1).await;
    for range in subject.everything().into_iter().flat_map(|range| subject.requests(range)) {
        assert!(read_pieces(subject, range.clone()).await == subject.read(range).await, "pieces and reads agree");
    }
    assert!(read_pieces(subject, first.clone()).await == crate::fill::bytes(0, index(first.end), 1));
}

pub(super) async fn pieces_stop_at_the_first_error(subject: &Subject) {
    let pieces = subject.capabilities().pieces.expect(PRESENT);
    let mut visits = 0;
    let mut refuse = |_: u64, _: Piece<'_>| -> Result<()> {
        visits += 1;
        Err(Error::new(ErrorKind::Conflict, Operation::Read, "enough"))
    };
    let result = pieces.read_pieces(0, subject.first_request().end, &mut refuse).await;
    assert_eq!(result.expect_err("the visitor's error").kind(), ErrorKind::Conflict);
    assert_eq!(visits, 1, "nothing is lent after an error");
    subject.check_initial([subject.first_request()]).await;
}

pub(super) async fn pieces_past_the_end_are_refused(subject: &Subject) {
    let pieces = subject.capabilities().pieces.expect(PRESENT);
    for (offset, len) in past_the_end(subject) {
        let mut visit = |_: u64, _: Piece<'_>| -> Result<()> { panic!("nothing may be lent past the end") };
        assert_refused(pieces.read_pieces(offset, len, &mut visit).await, Operation::Read, offset, len);
    }
}

async fn read_many(subject: &Subject, requests: &[(u64, u64)]) -> Result<Vec<Vec<u8>>> {
    let mut bufs: Vec<_> = requests.iter().map(|(_, len)| vec![0xa5; index(*len)]).collect();
    let mut reads: Vec<_> =
        requests.iter().zip(&mut bufs).map(|((offset, _), buf)| ReadOp { offset: *offset, buf }).collect();
    subject.capabilities().read_many.expect(PRESENT).read_many(&mut reads).await.map(|()| bufs)
}

pub(super) async fn many_reads_are_each_right(subject: &Subject) {
    if !subject.read_only() {
        subject.write([subject.first_request()], 1).await;
    }
    let mut requests: Vec<_> =
        subject.interesting().into_iter().map(|range| (range.start, range.end - range.start)).collect();
    requests.reverse();
    for requests in [&requests[..], &requests[..1], &[]] {
        let bufs = read_many(subject, requests).await.expect("many reads");
        for ((offset, len), buf) in requests.iter().zip(bufs) {
            assert!(
                buf == subject.read(*offset..offset + len).await,
                "{len} bytes at {offset} as a single read has them"
            );
        }
    }
}

pub(super) async fn many_reads_with_a_bad_one_fail(subject: &Subject) {
    let good = (0, subject.first_request().end);
    for bad in past_the_end(subject) {
        let error = read_many(subject, &[good, bad, good]).await.expect_err("one of them is past the end");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    subject.check_initial([subject.first_request()]).await;
}

/// Asks until the whole range is answered, and asserts what every answer must be.
async fn extents(subject: &Subject, range: Range<u64>) -> Vec<Extent> {
    let ability = subject.capabilities().extents.expect(PRESENT);
    let mut all: Vec<Extent> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let found = ability.extents(at, range.end - at).await.expect("extents");
        assert!(!found.is_empty(), "an answer for at least one byte, at {at}");
        for extent in found {
            assert_eq!(extent.range.start, at, "consecutive and without gaps");
            assert!(extent.range.end > at && extent.range.end <= range.end, "{extent:?} is cut to {range:?}");
            at = extent.range.end;
            all.push(extent);
        }
    }
    all
}

pub(super) async fn extents_tile_what_was_asked(subject: &Subject) {
    for range in subject.interesting().into_iter().chain(std::iter::once(0..subject.size())) {
        extents(subject, range).await;
    }
    // Extents are no transfer: any range will do.
    extents(subject, subject.size() / 3..subject.size()).await;
}

pub(super) async fn holes_read_as_zeros(subject: &Subject) {
    if !subject.read_only() {
        subject.write([subject.first_request()], 1).await;
    }
    for range in subject.everything() {
        for extent in extents(subject, range).await {
            if extent.kind == ExtentKind::Hole {
                let wide = subject.widen(extent.range.clone());
                let bytes: Vec<u8> = read_all(subject, wide.clone()).await;
                let (start, end) = (extent.range.start - wide.start, extent.range.end - wide.start);
                assert!(
                    r3map_core::is_zero(&bytes[index(start)..index(end)]),
                    "the hole {extent:?} must read as zeros"
                );
            }
        }
    }
}

async fn read_all(subject: &Subject, range: Range<u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in subject.requests(range) {
        bytes.extend(subject.read(part).await);
    }
    bytes
}

pub(super) async fn written_bytes_are_no_hole(subject: &Subject) {
    for range in subject.interesting() {
        subject.write([range.clone()], 1).await;
        for extent in extents(subject, range).await {
            assert_eq!(extent.kind, ExtentKind::Data, "{extent:?} was written");
        }
    }
}

pub(super) async fn trim_past_the_end_is_refused(subject: &Subject) {
    let trim = subject.capabilities().trim.expect(PRESENT);
    for (offset, len) in past_the_end(subject) {
        assert_refused(trim.trim(offset, len).await, Operation::Trim, offset, len);
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn zeroing_past_the_end_is_refused(subject: &Subject) {
    let zeroing = subject.capabilities().write_zeroes.expect(PRESENT);
    for (offset, len) in past_the_end(subject) {
        assert_refused(zeroing.write_zeroes(offset, len).await, Operation::WriteZeroes, offset, len);
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn extents_past_the_end_are_refused(subject: &Subject) {
    let ability = subject.capabilities().extents.expect(PRESENT);
    for (offset, len) in past_the_end(subject) {
        assert_refused(ability.extents(offset, len).await, Operation::Extents, offset, len);
    }
}

/// Ranges that no chunk size suits: abilities that send no bytes take any.
fn ragged(subject: &Subject) -> Vec<Range<u64>> {
    let size = subject.size();
    let mut ranges =
        vec![0..size.min(1), 0..size, size - 1..size, size..size, size / 2..size / 2, size / 3..size - size / 5];
    let blocks = [1..BLOCK_SIZE, 0..BLOCK_SIZE, BLOCK_SIZE - 1..3 * BLOCK_SIZE + 1, 5..9];
    ranges.extend(blocks.into_iter().filter(|range| range.end <= size));
    ranges
}

/// Checks what is left after a range was made zeros in a region that was written with `seed`.
async fn check_zeroed(subject: &Subject, zeroed: &Range<u64>, seed: u64) {
    for part in subject.everything().into_iter().flat_map(|range| subject.requests(range)) {
        let bytes = subject.read(part.clone()).await;
        let start = zeroed.start.clamp(part.start, part.end) - part.start;
        let end = zeroed.end.clamp(part.start, part.end) - part.start;
        let (before, rest) = bytes.split_at(index(start));
        let (zeros, after) = rest.split_at(index(end - start));
        let good = |bytes: &[u8], at: u64| {
            crate::fill::check(bytes, at, seed).unwrap_or_else(|wrong| panic!("after zeroing {zeroed:?}: {wrong}"));
        };
        good(before, part.start);
        assert!(r3map_core::is_zero(zeros), "{zeroed:?} must read as zeros in {part:?}");
        good(after, part.start + end);
    }
}

pub(super) async fn trimmed_bytes_read_as_zeros(subject: &Subject) {
    let trim = subject.capabilities().trim.expect(PRESENT);
    for (seed, range) in (1..).zip(ragged(subject)) {
        subject.write(subject.everything(), seed).await;
        trim.trim(range.start, range.end - range.start).await.expect("trim");
        check_zeroed(subject, &range, seed).await;
    }
    subject.write(subject.everything(), 99).await;
    subject.check(subject.everything(), 99).await;
}

pub(super) async fn zeroed_bytes_read_as_zeros(subject: &Subject) {
    let zeroing = subject.capabilities().write_zeroes.expect(PRESENT);
    for (seed, range) in (1..).zip(ragged(subject)) {
        subject.write(subject.everything(), seed).await;
        zeroing.write_zeroes(range.start, range.end - range.start).await.expect("write zeroes");
        check_zeroed(subject, &range, seed).await;
    }
    subject.write(subject.everything(), 99).await;
    subject.check(subject.everything(), 99).await;
}
