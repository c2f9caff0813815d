//! Ctrl-C, SIGTERM and a terminal that goes away, as something to wait for more than once.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, timeout_at};

/// Signals that come so soon after one another are one: timeout(1) and service managers send theirs to a process and then
/// to its group, which is no second thought of anybody.
const ONE: Duration = Duration::from_millis(50);

/// Waits for the user to say stop; the second time means at once.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// Nothing under `nohup`, which has it ignored.
    hangup: Option<Signal>,
    /// One has arrived. A terminal that goes away sends more than one hangup, which is no second thought of anybody.
    once: bool,
    /// One has arrived, and until when others are the same.
    until: Option<Instant>,
}

impl Signals {
    /// From now on these signals no longer end the process by themselves.
    pub(crate) fn new() -> io::Result<Self> {
        let hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
            once: false,
            until: None,
        })
    }

    /// Returns when one has arrived since the last call; a hangup only if it is the first.
    pub(crate) async fn next(&mut self) {
        // Kept here, so that one is not forgotten where this is dropped meanwhile.
        let until = match self.until {
            Some(until) => until,
            None => {
                self.any().await;
                *self.until.insert(Instant::now() + ONE)
            }
        };
        // What is there later, if this is asked only then, is another one.
        while Instant::now() < until && timeout_at(until, self.any()).await.is_ok() {}
        self.until = None;
        self.once = true;
    }

    async fn any(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) if !self.once => hangup.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Whether whoever started this process wants it to outlive its terminal (proc_pid_status(5), `SigIgn`).
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    ignored & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0
}
