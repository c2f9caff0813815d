//! What every test needs to end well: a deadline that says what was stuck, and a way to skip that CI does not overlook.

use std::future::Future;
use std::io::Write;
use std::time::Duration;

/// Waits for `future`, but not for longer than `limit` on tokio's clock (virtual where the test paused it).
///
/// # Panics
/// When the limit has passed, with `what` in the message.
pub async fn deadline<F: Future>(limit: Duration, what: impl std::fmt::Display, future: F) -> F::Output {
    match tokio::time::timeout(limit, future).await {
        Ok(output) => output,
        Err(_) => panic!("stuck: {what} took longer than {limit:?}"),
    }
}

/// Says that the calling test is skipped because this machine lacks something; the test then returns.
///
/// # Panics
/// In CI (`CI=true` in the environment): what CI lacks there is a fault of CI. Use [`skip_allowed`] for what CI cannot
/// have.
pub fn skip(reason: &str) {
    skip_unless(is_ci(), reason);
}

/// As [`skip`], for what even CI lacks.
pub fn skip_allowed(reason: &str) {
    skip_unless(false, reason);
}

/// Whether this is the virtual machine of `cargo xtask vm`, which has what test targets named `vm` need. Says that the
/// calling test is skipped if not: CI runs it there, and not here.
#[must_use]
pub fn in_vm() -> bool {
    let inside = std::env::var_os("R3MAP_VM").is_some();
    if !inside {
        skip_allowed("it runs in the virtual machine, by cargo xtask vm");
    }
    inside
}

fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

fn skip_unless(required: bool, reason: &str) {
    assert!(!required, "CI must have what this test needs: {reason}");
    // Past the test harness's capture, so that a skip is seen in every run. Nothing is lost if nobody listens.
    let _ = writeln!(std::io::stderr(), "skipped: {reason}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_lets_through_what_is_in_time() {
        let value = deadline(Duration::from_secs(2), "a nap", async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            7
        });
        assert_eq!(value.await, 7);
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "stuck: the thing took longer than 2s")]
    async fn a_deadline_names_what_is_stuck() {
        deadline(Duration::from_secs(2), "the thing", std::future::pending::<()>()).await;
    }

    #[test]
    #[should_panic(expected = "CI must have what this test needs: no such device")]
    fn ci_does_not_skip() {
        skip_unless(true, "no such device");
    }

    #[test]
    fn others_do() {
        skip_unless(false, "only a test of skipping");
    }
}
