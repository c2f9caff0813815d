//! Runs one program: its output line by line, its deadline, and, as is a first process's duty, the end of every orphan.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions, wait};

use super::stuck;

/// How often ended processes are looked for.
const POLL: Duration = Duration::from_millis(10);

/// How long output may lag behind the end of a program, when something that it left behind still has its streams.
const LAG: Duration = Duration::from_millis(300);

/// A longer line is cut into pieces of this many bytes.
const LINE: u64 = 64 << 10;

/// How a program ended.
pub(super) struct Ended {
    /// Its status; none if it was still running at its deadline.
    pub(super) status: Option<ExitStatus>,
    /// What it printed.
    pub(super) lines: Vec<String>,
}

impl Ended {
    pub(super) fn is_success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Runs a program until it ends or `limit` has passed; then says where it is, and leaves it to the caller to kill it.
/// `each` sees every line as it comes.
pub(super) fn run(command: &mut Command, limit: Duration, each: &dyn Fn(&str)) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (output, write_end) = std::io::pipe()?;
    command.stdin(std::process::Stdio::null()).stdout(write_end.try_clone()?).stderr(write_end).process_group(0);
    let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    // The command keeps the write end open as long as it lives.
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("it has a process id")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || collect(output, &sender));
    let mut ended = Ended { status: None, lines: Vec::new() };
    let end = Instant::now() + limit;
    while ended.status.is_none() && Instant::now() < end {
        take(&lines, POLL, &mut ended, each);
        ended.status = reap(pid);
    }
    if ended.status.is_none() {
        stuck::describe_all().iter().for_each(|line| each(line));
    }
    while take(&lines, LAG, &mut ended, each) {}
    Ok(ended)
}

/// Takes a line, if one comes in time.
fn take(lines: &Receiver<String>, limit: Duration, ended: &mut Ended, each: &dyn Fn(&str)) -> bool {
    match lines.recv_timeout(limit) {
        Ok(line) => {
            each(&line);
            ended.lines.push(line);
            true
        }
        Err(RecvTimeoutError::Timeout) => false,
        Err(RecvTimeoutError::Disconnected) => {
            // Nobody has its streams any more: it has ended, or it closed them.
            std::thread::sleep(POLL.min(limit));
            false
        }
    }
}

/// Collects all ended processes; the status of `pid` if it is among them.
pub(super) fn reap(pid: Pid) -> Option<ExitStatus> {
    let mut status = None;
    while let Ok(Some((ended, its))) = wait(WaitOptions::NOHANG) {
        if ended == pid {
            status = Some(ExitStatus::from_raw(its.as_raw()));
        }
    }
    status
}

fn collect(pipe: impl Read, lines: &Sender<String>) {
    let mut pipe = BufReader::new(pipe);
    let mut bytes = Vec::new();
    while (&mut pipe).take(LINE).read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned();
        if lines.send(text).is_err() {
            return;
        }
        bytes.clear();
    }
}
