//! The backend under test, and the ways in which cases ask it things: only requests that it takes, each checked.

use std::ops::Range;
use std::sync::Arc;

use r3map_core::{BLOCK_SIZE, Backend, Capabilities, Error, ErrorKind, Operation, is_zero};

use super::unit_of;
use crate::fill;

/// How much of a large region the cases look at, at each of its ends.
const WINDOW: u64 = 1 << 20;

pub(super) struct Subject {
    pub(super) backend: Arc<dyn Backend>,
    /// The seed of what it was filled with; nothing if it was never written.
    initial: Option<u64>,
}

impl Subject {
    pub(super) fn new(backend: Arc<dyn Backend>, initial: Option<u64>) -> Self {
        Self { backend, initial }
    }

    pub(super) fn size(&self) -> u64 {
        self.backend.size()
    }

    pub(super) fn capabilities(&self) -> Capabilities<'_> {
        self.backend.capabilities()
    }

    pub(super) fn unit(&self) -> u64 {
        unit_of(&*self.backend)
    }

    pub(super) fn read_only(&self) -> bool {
        self.capabilities().read_only
    }

    /// The longest request that it takes, as far as a test would go.
    pub(super) fn max(&self) -> u64 {
        self.capabilities().max_request.unwrap_or(WINDOW).min(WINDOW).max(self.unit())
    }

    /// Whether it refuses requests that would otherwise fit.
    pub(super) fn has_max(&self) -> bool {
        self.capabilities().max_request.is_some_and(|max| max < self.size() && max < 128 << 20)
    }

    /// The region, or as much of both its ends as is sensible to test, in ascending order.
    #[expect(clippy::single_range_in_vec_init, reason = "a list of ranges is meant")]
    pub(super) fn everything(&self) -> Vec<Range<u64>> {
        if self.size() <= 2 * WINDOW {
            return vec![0..self.size()];
        }
        vec![0..self.widen(0..WINDOW).end, self.widen(self.size() - WINDOW..self.size()).start..self.size()]
    }

    /// A range that it takes and that holds `range`.
    pub(super) fn widen(&self, range: Range<u64>) -> Range<u64> {
        let unit = self.unit();
        range.start / unit * unit..range.end.next_multiple_of(unit).min(self.size())
    }

    /// Short ranges in all the places where an off-by-one hides: at and across the borders of blocks, chunks and
    /// requests, and at both ends. Each is one request that it takes.
    pub(super) fn interesting(&self) -> Vec<Range<u64>> {
        let mut borders = vec![0, 1, 512, BLOCK_SIZE, 2 * BLOCK_SIZE, 64 << 10, self.unit(), self.max()];
        borders.extend([self.size() / 2, self.size(), self.size() / BLOCK_SIZE * BLOCK_SIZE]);
        let mut ranges: Vec<_> = borders
            .into_iter()
            .flat_map(|border| [1u64, 2, 511, 4096, 4097].map(|len| (border, len)))
            .flat_map(|(border, len)| {
                [border.saturating_sub(len), border.saturating_sub(len / 2), border].map(|at| at..at + len)
            })
            .filter(|range| range.end <= self.size())
            .map(|range| self.widen(range))
            .filter(|range| range.end - range.start <= self.max())
            .collect();
        ranges.push(self.first_request());
        ranges.sort_by_key(|range| (range.start, range.end));
        ranges.dedup();
        ranges
    }

    /// The shortest request at the start that it takes and that is at least a few blocks, where there is room.
    pub(super) fn first_request(&self) -> Range<u64> {
        self.widen(0..(3 * BLOCK_SIZE + 5).min(self.size()).min(self.max()))
    }

    /// Cuts a range into requests that it takes.
    pub(super) fn requests(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let step = self.max() / self.unit() * self.unit();
        (range.start..range.end).step_by(index(step)).map(move |at| at..(at + step).min(range.end))
    }

    pub(super) async fn read(&self, range: Range<u64>) -> Vec<u8> {
        // Not zeros: a backend that leaves the buffer alone must not pass.
        let mut buf = vec![0xa5; index(range.end - range.start)];
        let read = self.backend.read_at(range.start, &mut buf).await;
        read.unwrap_or_else(|error| panic!("reading {range:?}: {error}"));
        buf
    }

    pub(super) async fn write(&self, ranges: impl IntoIterator<Item = Range<u64>>, seed: u64) {
        for range in ranges.into_iter().flat_map(|range| self.requests(range)) {
            let bytes = fill::bytes(range.start, index(range.end - range.start), seed);
            let written = self.backend.write_at(range.start, &bytes).await;
            written.unwrap_or_else(|error| panic!("writing {range:?}: {error}"));
        }
    }

    pub(super) async fn check(&self, ranges: impl IntoIterator<Item = Range<u64>>, seed: u64) {
        for range in ranges.into_iter().flat_map(|range| self.requests(range)) {
            let bytes = self.read(range.clone()).await;
            fill::check(&bytes, range.start, seed).unwrap_or_else(|wrong| panic!("reading {range:?}: {wrong}"));
        }
    }

    pub(super) async fn check_zero(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        for range in ranges.into_iter().flat_map(|range| self.requests(range)) {
            assert!(is_zero(&self.read(range.clone()).await), "{range:?} must read as zeros");
        }
    }

    /// Checks that ranges hold what they held at first.
    pub(super) async fn check_initial(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        match self.initial {
            Some(seed) => self.check(ranges, seed).await,
            None => self.check_zero(ranges).await,
        }
    }

    /// Checks bytes against what `range` held at first.
    pub(super) fn compare_initial(&self, bytes: &[u8], offset: u64) {
        match self.initial {
            Some(seed) => fill::check(bytes, offset, seed).unwrap_or_else(|wrong| panic!("{wrong}")),
            None => assert!(is_zero(bytes), "{} bytes at {offset} must be zeros", bytes.len()),
        }
    }
}

/// Requests past the end: (offset, length).
pub(super) fn past_the_end(subject: &Subject) -> Vec<(u64, u64)> {
    let (size, unit) = (subject.size(), subject.unit());
    let aligned = size.next_multiple_of(unit);
    let mut requests = vec![(aligned, unit), (aligned + unit, unit), (u64::MAX - unit + 1, unit)];
    requests.extend([(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4096), (i64::MAX as u64, 1)]);
    requests.push((0, aligned + unit));
    requests.retain(|(_, len)| *len <= subject.max());
    requests
}

/// Asserts that a request was refused as one that can never work, and that the error says where.
pub(super) fn assert_refused<T>(result: Result<T, Error>, operation: Operation, offset: u64, len: u64) {
    let Err(error) = result else { panic!("{operation} of {len} bytes at {offset} must be refused") };
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{operation} of {len} bytes at {offset}: {error}");
    assert_eq!(error.operation(), operation, "{error}");
    assert_eq!(error.range(), Some((offset, len)), "the error must name the range: {error}");
}

pub(super) fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("requests fit into memory")
}
