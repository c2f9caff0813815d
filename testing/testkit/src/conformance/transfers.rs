//! Cases about reading, writing and flushing.

use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};
use r3map_core::{Access, BLOCK_SIZE, ErrorKind, Operation};

use super::subject::{Subject, assert_refused, index, past_the_end};
use crate::faults::cancel_after;
use crate::fill;

pub(super) async fn size_and_capabilities_make_sense(subject: &Subject) {
    assert!(subject.size() >= 1, "a region has at least one byte");
    assert_eq!(subject.size(), subject.backend.size(), "the size stays the same");
    let capabilities = subject.capabilities();
    assert_eq!(capabilities.access, subject.capabilities().access, "the access stays the same");
    if let (Access::WholeChunks(chunk), Some(max)) = (capabilities.access, capabilities.max_request) {
        assert!(max >= chunk.bytes(), "one chunk must fit into one request");
    }
    assert_ne!(capabilities.max_request, Some(0), "a request of a byte must be possible");
}

pub(super) async fn what_is_there_can_be_read_in_any_request(subject: &Subject) {
    subject.check_initial(subject.everything()).await;
    subject.check_initial(subject.interesting()).await;
}

pub(super) async fn past_the_end_is_refused(subject: &Subject) {
    for (offset, len) in past_the_end(subject) {
        let read = subject.backend.read_at(offset, &mut vec![0; index(len)]).await;
        assert_refused(read, Operation::Read, offset, len);
        if !subject.read_only() {
            let write = subject.backend.write_at(offset, &vec![1; index(len)]).await;
            assert_refused(write, Operation::Write, offset, len);
        }
    }
    subject.check_initial(subject.everything()).await;
}

/// A request of no bytes inside the region does nothing, and outside it is refused like any other.
pub(super) async fn nothing_is_no_request(subject: &Subject) {
    for offset in [0, subject.size()].map(|offset| offset / subject.unit() * subject.unit()) {
        subject.backend.read_at(offset, &mut []).await.expect("reading nothing");
        if !subject.read_only() {
            subject.backend.write_at(offset, &[]).await.expect("writing nothing");
        }
    }
    for offset in [subject.size() + 1, u64::MAX] {
        assert_refused(subject.backend.read_at(offset, &mut []).await, Operation::Read, offset, 0);
        if !subject.read_only() {
            assert_refused(subject.backend.write_at(offset, &[]).await, Operation::Write, offset, 0);
        }
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn parts_of_chunks_are_refused(subject: &Subject) {
    let unit = subject.unit();
    let requests = [(0, 1), (0, unit - 1), (1, unit), (0, unit + 1), (unit - 1, 1), (unit / 2, unit)];
    let inside = requests.into_iter().filter(|(at, len)| at + len < subject.size() && *len <= subject.max());
    for (offset, len) in inside {
        let read = subject.backend.read_at(offset, &mut vec![0; index(len)]).await;
        assert_refused(read, Operation::Read, offset, len);
        if !subject.read_only() {
            let write = subject.backend.write_at(offset, &vec![1; index(len)]).await;
            assert_refused(write, Operation::Write, offset, len);
        }
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn long_requests_are_refused(subject: &Subject) {
    let max = subject.capabilities().max_request.expect("the case asks for a limit");
    let range = subject.widen(0..max + 1);
    let mut buf = vec![0; index(range.end)];
    assert_refused(subject.backend.read_at(0, &mut buf).await, Operation::Read, 0, range.end);
    if !subject.read_only() {
        assert_refused(subject.backend.write_at(0, &buf).await, Operation::Write, 0, range.end);
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn a_read_only_region_denies_changes(subject: &Subject) {
    let range = subject.first_request();
    let bytes = vec![1; index(range.end)];
    let mut results = vec![subject.backend.write_at(0, &bytes).await];
    let capabilities = subject.capabilities();
    if let Some(trim) = capabilities.trim {
        results.push(trim.trim(0, range.end).await);
    }
    if let Some(zeroing) = capabilities.write_zeroes {
        results.push(zeroing.write_zeroes(0, range.end).await);
    }
    for result in results {
        assert_eq!(result.expect_err("it is read-only").kind(), ErrorKind::Denied);
    }
    subject.check_initial(subject.everything()).await;
}

pub(super) async fn flush_succeeds_at_any_time(subject: &Subject) {
    subject.backend.flush().await.expect("a flush of nothing");
    if !subject.read_only() {
        subject.write([subject.first_request()], 1).await;
        let write = async { subject.write(subject.everything(), 2).await };
        let (flushed, ()) = join(subject.backend.flush(), write).await;
        flushed.expect("a flush while writing");
    }
    let flushes = join_all((0..4).map(|_| subject.backend.flush())).await;
    flushes.into_iter().for_each(|flush| flush.expect("flushes at once"));
}

pub(super) async fn reads_run_at_once(subject: &Subject) {
    let ranges = subject.interesting();
    let reads = ranges.iter().cycle().take(64).cloned().map(|range| {
        let backend = subject.backend.clone();
        tokio::spawn(async move {
            let mut buf = vec![0xa5; index(range.end - range.start)];
            backend.read_at(range.start, &mut buf).await.map(|()| (range, buf))
        })
    });
    for read in join_all(reads).await {
        let (range, bytes) = read.expect("no panic").expect("a read among others");
        subject.compare_initial(&bytes, range.start);
    }
}

pub(super) async fn writes_are_read_back(subject: &Subject) {
    subject.write(subject.everything(), 1).await;
    subject.check(subject.everything(), 1).await;
    subject.check(subject.interesting(), 1).await;
    for (seed, range) in (2..).zip(subject.interesting()) {
        subject.write([range.clone()], seed).await;
        subject.check([range], seed).await;
    }
}

pub(super) async fn a_write_changes_nothing_else(subject: &Subject) {
    for range in subject.interesting() {
        let around = around(subject, &range);
        subject.write(around.clone(), 1).await;
        subject.write([range.clone()], 2).await;
        subject.check(around, 1).await;
        subject.check([range], 2).await;
    }
}

/// What lies before and after a range, as far as it could be touched by mistake.
pub(super) fn around(subject: &Subject, range: &Range<u64>) -> [Range<u64>; 2] {
    let margin = subject.unit().max(2 * BLOCK_SIZE);
    let before = subject.widen(range.start.saturating_sub(margin)..range.start);
    let after = subject.widen(range.end..(range.end + margin).min(subject.size()));
    [before.start..range.start, range.end..after.end.max(range.end)]
}

pub(super) async fn the_last_byte_counts(subject: &Subject) {
    let last = subject.widen(subject.size() - 1..subject.size());
    assert_eq!(last.end, subject.size());
    subject.write([last.clone()], 7).await;
    subject.check([last.clone()], 7).await;
    if subject.size() <= 1 << 20 {
        subject.check_initial(std::iter::once(0..last.start)).await;
    }
}

pub(super) async fn a_refused_write_changes_nothing(subject: &Subject) {
    subject.write(subject.everything(), 1).await;
    let parts = [(1, subject.unit()), (0, subject.unit() - 1)];
    let parts = parts.into_iter().filter(|(at, len)| subject.unit() > 1 && at + len < subject.size());
    for (offset, len) in past_the_end(subject).into_iter().chain(parts) {
        let result = subject.backend.write_at(offset, &vec![9; index(len)]).await;
        assert!(result.is_err(), "{len} bytes at {offset} must be refused");
        subject.check(subject.everything(), 1).await;
    }
}

pub(super) async fn writes_that_do_not_overlap_do_not_disturb(subject: &Subject) {
    let step = (2 * BLOCK_SIZE + 123).next_multiple_of(subject.unit());
    let pieces: Vec<_> = (0..24)
        .map(|n| n * step..((n + 1) * step).min(subject.size()))
        .filter(|range| range.start < range.end && step <= subject.max())
        .collect();
    let tasks = pieces.iter().cloned().map(|range| {
        let subject = Subject::new(subject.backend.clone(), None);
        tokio::spawn(async move {
            for seed in range.start..range.start + 6 {
                subject.write([range.clone()], seed).await;
                subject.check([range.clone()], seed).await;
            }
        })
    });
    join_all(tasks).await.into_iter().for_each(|task| task.expect("a writer among others"));
    for range in pieces {
        subject.check([range.clone()], range.start + 5).await;
    }
}

/// One of the writers hesitates on its way, so that the others overtake it there; whichever way they take turns.
pub(super) async fn writes_that_overlap_leave_whole_blocks(subject: &Subject) {
    let range = subject.first_request();
    for (polls, slow) in (0..10).flat_map(|polls| [(polls, 1), (polls, 3)]) {
        let writers = [1, 2, 3].map(|seed| {
            let (backend, range) = (subject.backend.clone(), range.clone());
            tokio::spawn(async move {
                let bytes = fill::bytes(range.start, index(range.end - range.start), seed);
                let write = backend.write_at(range.start, &bytes);
                if seed == slow { hesitating(polls, write).await } else { write.await }
            })
        });
        for writer in join_all(writers).await {
            writer.expect("no panic").expect("an overlapping write");
        }
        check_whole_blocks(&subject.read(range.clone()).await, &[1, 2, 3]);
    }
}

/// Polls a future some times, then not at all for a while, and then as usual.
async fn hesitating<F: Future>(polls: usize, future: F) -> F::Output {
    let mut future = pin!(future);
    if let Some(output) = cancel_after(polls, future.as_mut()).await {
        return output;
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
    future.await
}

fn check_whole_blocks(bytes: &[u8], seeds: &[u64]) {
    for (n, block) in bytes.chunks(index(BLOCK_SIZE)).enumerate() {
        let at = n as u64 * BLOCK_SIZE;
        let whole = seeds.iter().any(|seed| fill::check(block, at, *seed).is_ok());
        assert!(whole, "the block at {at} is of no one writer");
    }
}

pub(super) async fn later_writes_win(subject: &Subject) {
    let range = subject.first_request();
    for seed in 1..20 {
        subject.write([range.clone()], seed).await;
        let (backend, range) = (Arc::clone(&subject.backend), range.clone());
        let seen = tokio::spawn(async move {
            let mut buf = vec![0; index(range.end - range.start)];
            backend.read_at(range.start, &mut buf).await.map(|()| buf)
        });
        let bytes = seen.await.expect("no panic").expect("a read from elsewhere");
        fill::check(&bytes, 0, seed).unwrap_or_else(|wrong| panic!("after the write has returned: {wrong}"));
    }
}
