//! Crashes: a test runs a part of itself in a child process and kills that with signal 9.
//!
//! ```no_run
//! use std::time::Duration;
//! use r3map_testkit::crash;
//!
//! // #[test]
//! fn what_was_flushed_survives() {
//!     if let Some(path) = crash::role("writer") {
//!         // In the child: write to `path`, flush, and then:
//!         crash::stop("flushed");
//!     }
//!     let mut child = crash::child("what_was_flushed_survives", "writer", "/tmp/file");
//!     child.wait_for_line(Duration::from_secs(60), "flushed");
//!     child.kill();
//!     // Look at what is left.
//! }
//! ```
//!
//! The child is the same test binary, told to run only that test; it ends when its parent does, whatever happens.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::Command;

use crate::process::Process;

const ROLE: &str = "R3MAP_CRASH_ROLE";
const ARGUMENT: &str = "R3MAP_CRASH_ARGUMENT";

/// Starts the calling test binary as a child that runs only `test`, in which [`role`] gives `argument` for `role`.
///
/// `test` is the test's whole path in its binary, as `cargo test -- --list` shows it.
///
/// # Panics
/// If the child does not start.
#[must_use]
pub fn child(test: &str, role: &str, argument: &str) -> Process {
    child_through(&[], test, role, argument)
}

/// As [`child`], started by a program that takes the rest of its arguments as a command, such as `setpriv` or `env`.
///
/// # Panics
/// If the child does not start.
#[must_use]
pub fn child_through(wrapper: &[&str], test: &str, role: &str, argument: &str) -> Process {
    let binary = std::env::current_exe().expect("a test knows its binary");
    let mut words = wrapper.iter().map(OsString::from).chain([binary.into_os_string()]);
    let mut command = Command::new(words.next().expect("at least the binary"));
    command.args(words).args([test, "--exact", "--nocapture", "--include-ignored"]);
    Process::start(command.env(ROLE, role).env(ARGUMENT, argument))
}

/// The argument that [`child`] was given, if this process is such a child in that role.
#[must_use]
pub fn role(role: &str) -> Option<String> {
    if std::env::var(ROLE).ok()? != role {
        return None;
    }
    std::thread::spawn(end_with_parent);
    Some(std::env::var(ARGUMENT).unwrap_or_default())
}

/// Tells the parent how far the child is, as a line on standard output.
pub fn reached(point: &str) {
    let mut out = std::io::stdout().lock();
    // If the parent does not listen any more, this process is about to be killed.
    let _ = writeln!(out, "{point}").and_then(|()| out.flush());
}

/// As [`reached`], and waits there to be killed.
pub fn stop(point: &str) -> ! {
    reached(point);
    loop {
        std::thread::park();
    }
}

/// The parent holds the other end of standard input and never writes.
fn end_with_parent() {
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(101);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_killed_child_leaves_what_it_had_done() {
        if let Some(path) = role("writer") {
            std::fs::write(&path, "first").unwrap();
            reached("half");
            std::fs::write(&path, "second").unwrap();
            stop("done");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let test = "crash::tests::a_killed_child_leaves_what_it_had_done";
        let mut child = child(test, "writer", path.to_str().unwrap());
        child.wait_for_line(LONG, "half");
        child.wait_for_line(LONG, "done");
        assert!(child.is_running());
        child.kill();
        assert!(!child.is_running());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "second");
    }

    #[test]
    fn a_child_ends_with_its_parent() {
        if role("sleeper").is_some() {
            stop("asleep");
        }
        let mut child = child("crash::tests::a_child_ends_with_its_parent", "sleeper", "");
        child.wait_for_line(LONG, "asleep");
        child.close_stdin();
        assert_eq!(child.wait(LONG).code(), Some(101));
    }

    #[test]
    fn a_child_can_be_started_by_another_program() {
        if role("wrapped").is_some() {
            reached(&std::env::var("R3MAP_TEST_WRAPPED").unwrap());
            return;
        }
        let test = "crash::tests::a_child_can_be_started_by_another_program";
        let mut child = child_through(&["env", "R3MAP_TEST_WRAPPED=by env"], test, "wrapped", "");
        child.wait_for_line(LONG, "by env");
        assert!(child.wait(LONG).success());
    }

    #[test]
    fn nobody_has_a_role_unasked() {
        assert_eq!(role("anybody"), None);
    }
}
