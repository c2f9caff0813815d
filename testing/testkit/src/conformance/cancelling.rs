//! Cases about futures that are dropped: at every await point, nothing stays locked, nothing else changes, and nothing
//! lands late.

use std::time::Duration;

use futures_util::future::join_all;

use super::subject::{Subject, index};
use super::transfers::around;
use crate::faults::cancel_after;
use crate::{deadline, fill};

/// Await points that a call may reasonably have; cases stop earlier when the call completes.
const POLLS: usize = 24;
/// How long a free range may take to become free.
const SOON: Duration = Duration::from_secs(20);
/// For how long a cancelled write is given the chance to land late.
const LATE: Duration = Duration::from_millis(4);

pub(super) async fn a_cancelled_read_leaves_no_lock(subject: &Subject) {
    for polls in 0..POLLS {
        let range = subject.first_request();
        let mut buf = vec![0; index(range.end)];
        let done = cancel_after(polls, subject.backend.read_at(0, &mut buf)).await;
        deadline(SOON, "a read after a cancelled one", subject.check_initial([range.clone()])).await;
        if !subject.read_only() {
            deadline(SOON, "a flush after a cancelled read", subject.backend.flush()).await.expect("flush");
        }
        if done.is_some() {
            break;
        }
    }
    if !subject.read_only() {
        deadline(SOON, "a write after cancelled reads", subject.write([subject.first_request()], 3)).await;
        subject.check([subject.first_request()], 3).await;
    }
}

pub(super) async fn a_cancelled_flush_leaves_no_lock(subject: &Subject) {
    for polls in 0..POLLS {
        if !subject.read_only() {
            subject.write([subject.first_request()], polls as u64).await;
        }
        let done = cancel_after(polls, subject.backend.flush()).await;
        deadline(SOON, "a flush after a cancelled one", subject.backend.flush()).await.expect("flush");
        if !subject.read_only() {
            let read = subject.check([subject.first_request()], polls as u64);
            deadline(SOON, "a read after a cancelled flush", read).await;
        }
        if done.is_some() {
            return;
        }
    }
}

/// Starts a write and drops it after some polls; says whether it was done by then.
async fn cancelled_write(subject: &Subject, polls: usize, seed: u64) -> bool {
    let range = subject.first_request();
    let bytes = fill::bytes(range.start, index(range.end), seed);
    cancel_after(polls, subject.backend.write_at(range.start, &bytes)).await.is_some()
}

pub(super) async fn a_cancelled_write_leaves_no_lock(subject: &Subject) {
    for polls in 0..POLLS {
        let done = cancelled_write(subject, polls, 1).await;
        deadline(SOON, "a read after a cancelled write", subject.read(subject.first_request())).await;
        deadline(SOON, "a write after a cancelled one", subject.write([subject.first_request()], 2)).await;
        deadline(SOON, "a flush after a cancelled write", subject.backend.flush()).await.expect("flush");
        subject.check([subject.first_request()], 2).await;
        if done {
            return;
        }
    }
}

pub(super) async fn a_cancelled_write_changes_nothing_else(subject: &Subject) {
    let around = around(subject, &subject.first_request());
    subject.write(subject.everything(), 1).await;
    for polls in 0..POLLS {
        let done = cancelled_write(subject, polls, 2).await;
        subject.check(around.clone(), 1).await;
        if done {
            break;
        }
    }
    tokio::time::sleep(LATE).await;
    subject.check(around, 1).await;
}

pub(super) async fn a_cancelled_write_never_lands_late(subject: &Subject) {
    for polls in 0..POLLS {
        let done = cancelled_write(subject, polls, 1).await;
        subject.write([subject.first_request()], 2).await;
        subject.check([subject.first_request()], 2).await;
        tokio::time::sleep(LATE).await;
        subject.check([subject.first_request()], 2).await;
        if done {
            return;
        }
    }
}

/// Many calls on one range, of which only some are let finish.
pub(super) async fn an_abandoned_crowd_leaves_no_lock(subject: &Subject) {
    let range = subject.first_request();
    let calls = (0..32).map(|n| {
        let (backend, range) = (subject.backend.clone(), range.clone());
        tokio::spawn(async move {
            let mut bytes = fill::bytes(0, index(range.end), n as u64);
            match n % 3 {
                0 => cancel_after(n / 3, backend.write_at(0, &bytes)).await.unwrap_or(Ok(())),
                1 => cancel_after(n / 3, backend.read_at(0, &mut bytes)).await.unwrap_or(Ok(())),
                _ => backend.write_at(0, &bytes).await,
            }
        })
    });
    let crowd = deadline(SOON, "calls among cancelled ones", join_all(calls)).await;
    crowd.into_iter().for_each(|call| call.expect("no panic").expect("a call among cancelled ones"));
    deadline(SOON, "a write after cancelled ones", subject.write([range.clone()], 77)).await;
    tokio::time::sleep(LATE).await;
    subject.check([range], 77).await;
}
