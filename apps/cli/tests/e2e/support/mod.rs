//! What the end-to-end tests share: a scene with a folder and a time limit, the command as a running program, a model of
//! what a region must hold, loop devices, and a server inside the test that counts and fails.

mod bitflip;
mod expected;
mod lent;
mod loops;
mod program;
mod scene;
mod stamps;

pub(crate) use bitflip::Bitflip;
pub(crate) use expected::{Expected, PIECE, make_file};
pub(crate) use lent::{Lent, block_on, open};
pub(crate) use loops::{FileSystem, LoopDevice};
pub(crate) use program::{Mounted, Outcome, Program, Served, event, is_mounted};
pub(crate) use scene::Scene;
pub(crate) use stamps::Stamps;

use std::time::Duration;

/// One mebibyte.
pub(crate) const MIB: u64 = 1 << 20;
/// How long anything may take that takes no time on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// Waits until a process catches SIGTERM, which the command does before anything else (proc_pid_status(5), `SigCgt`).
///
/// # Panics
/// If it does not.
pub(crate) fn wait_until_it_listens(process: u32) {
    wait_until(SOON, "it listens to signals", || {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        caught & 1 << (rustix::process::Signal::TERM.as_raw() - 1) != 0
    });
}

/// Waits until `holds`, which must come true by itself.
///
/// # Panics
/// If it does not within `limit`.
pub(crate) fn wait_until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + limit;
    while !holds() {
        assert!(std::time::Instant::now() < end, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
