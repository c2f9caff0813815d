//! The conformance suite: every sentence of the [`Backend`] contract as a named case, for every backend and every stage
//! by one line:
//!
//! ```
//! # use std::sync::Arc;
//! # use r3map_testkit::{conformance, store::Store};
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! conformance::backend(async || Arc::new(Store::new(10_001)) as _).await;
//! # }
//! ```
//!
//! Cases are chosen by what the backend declares. Each gets a fresh region from the given function and a deadline; all
//! run, and what failed is reported together at the end. Sizes that are no multiple of anything, of some hundred
//! kilobytes, test best. What it cannot see is whether flushed bytes survive the process: see [`durable`].
//!
//! Do not pause tokio's clock around it, unless nothing in the backend waits for the world outside.

mod abilities;
mod cancelling;
mod subject;
mod transfers;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use r3map_core::{Access, Backend};

use crate::deadline;
use subject::Subject;

/// No case needs a tenth of this, even on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

struct Case {
    name: &'static str,
    applies: fn(&Subject) -> bool,
    run: for<'a> fn(&'a Subject) -> BoxFuture<'a, ()>,
}

macro_rules! cases {
    ($($applies:expr => $($module:ident::$name:ident),+;)+) => {
        &[$($(Case {
            name: stringify!($name),
            applies: $applies,
            run: |subject| Box::pin($module::$name(subject)),
        },)+)+]
    };
}

const CASES: &[Case] = cases! {
    |_| true =>
        transfers::size_and_capabilities_make_sense,
        transfers::what_is_there_can_be_read_in_any_request,
        transfers::past_the_end_is_refused,
        transfers::nothing_is_no_request,
        transfers::flush_succeeds_at_any_time,
        transfers::reads_run_at_once,
        cancelling::a_cancelled_read_leaves_no_lock,
        cancelling::a_cancelled_flush_leaves_no_lock;
    |subject| subject.unit() > 1 => transfers::parts_of_chunks_are_refused;
    |subject| subject.has_max() => transfers::long_requests_are_refused;
    |subject| subject.read_only() => transfers::a_read_only_region_denies_changes;
    |subject| !subject.read_only() =>
        transfers::writes_are_read_back,
        transfers::a_write_changes_nothing_else,
        transfers::the_last_byte_counts,
        transfers::a_refused_write_changes_nothing,
        transfers::writes_that_do_not_overlap_do_not_disturb,
        transfers::writes_that_overlap_leave_whole_blocks,
        transfers::later_writes_win,
        cancelling::a_cancelled_write_leaves_no_lock,
        cancelling::a_cancelled_write_changes_nothing_else,
        cancelling::a_cancelled_write_never_lands_late,
        cancelling::an_abandoned_crowd_leaves_no_lock;
    |subject| subject.capabilities().pieces.is_some() =>
        abilities::pieces_are_consecutive_and_right,
        abilities::pieces_stop_at_the_first_error,
        abilities::pieces_past_the_end_are_refused;
    |subject| subject.capabilities().read_many.is_some() =>
        abilities::many_reads_are_each_right,
        abilities::many_reads_with_a_bad_one_fail;
    |subject| subject.capabilities().extents.is_some() =>
        abilities::extents_tile_what_was_asked,
        abilities::holes_read_as_zeros,
        abilities::extents_past_the_end_are_refused;
    |subject| subject.capabilities().extents.is_some() && !subject.read_only() => abilities::written_bytes_are_no_hole;
    |subject| subject.capabilities().trim.is_some() && !subject.read_only() =>
        abilities::trimmed_bytes_read_as_zeros,
        abilities::trim_past_the_end_is_refused;
    |subject| subject.capabilities().write_zeroes.is_some() && !subject.read_only() =>
        abilities::zeroed_bytes_read_as_zeros,
        abilities::zeroing_past_the_end_is_refused;
};

/// Holds a backend to the contract. `make` gives a fresh region, in which nothing was ever written, each time.
///
/// # Panics
/// When the backend breaks a promise; the message names each case that failed and why.
pub async fn backend(make: impl AsyncFn() -> Arc<dyn Backend>) {
    assert!(!make().await.capabilities().read_only, "a region that cannot be written is tested with `filled`");
    run(make, None).await;
}

/// Holds a backend to the contract that is already full: `make` gives a region that holds what [`fill`](crate::fill)
/// has for `seed`. This is the one for read-only backends.
///
/// # Panics
/// As [`backend`].
pub async fn filled(make: impl AsyncFn() -> Arc<dyn Backend>, seed: u64) {
    run(make, Some(seed)).await;
}

/// Holds a backend to what its `flush` promises: `open` opens the same region each time, for the first time fresh; what
/// was flushed is there after everything else was dropped.
///
/// # Panics
/// When it is not.
pub async fn durable(open: impl AsyncFn() -> Arc<dyn Backend>) {
    for seed in 1..4 {
        let subject = Subject::new(open().await, (seed > 1).then_some(seed - 1));
        subject.check_initial(subject.everything()).await;
        subject.write(subject.everything(), seed).await;
        subject.backend.flush().await.expect("flush");
    }
    let subject = Subject::new(open().await, Some(3));
    subject.check_initial(subject.everything()).await;
}

async fn run(make: impl AsyncFn() -> Arc<dyn Backend>, initial: Option<u64>) {
    let mut failed = Vec::new();
    for case in CASES {
        let subject = Subject::new(make().await, initial);
        if !(case.applies)(&subject) {
            continue;
        }
        let run = AssertUnwindSafe(deadline(LIMIT, case.name, (case.run)(&subject))).catch_unwind();
        if let Err(panic) = run.await {
            failed.push(format!("{}: {}", case.name, panic_message(&*panic)));
        }
    }
    assert!(failed.is_empty(), "{} broken promises:\n{}", failed.len(), failed.join("\n"));
}

pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message,
        (None, None) => "a panic without a message",
    }
}

/// The chunk size that a backend insists on, in bytes, or one.
pub(crate) fn unit_of(backend: &dyn Backend) -> u64 {
    match backend.capabilities().access {
        Access::Any => 1,
        Access::WholeChunks(chunk) => chunk.bytes(),
    }
}

#[cfg(test)]
mod tests;
