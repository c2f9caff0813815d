//! The other process: this program, started again in a role that the parent gives it. It says one line when it is
//! ready, some roles then one for one, and ends when its standard input does, so that it never outlives its parent.

mod leaving;
mod roles;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::machine::Times;

pub(crate) use leaving::{Leaving, Left, Offered, PIECE, Writing, now};
pub(crate) use roles::{Address, Addresses, Opened};
use roles::{Serving, ServingNbd};

/// What the other process does.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub(crate) enum Role {
    /// Serves a region in memory over gRPC and over raw TCP, each also behind a round trip for each of `rtts`.
    Serve { size: u64, seed: u64, rtts: Vec<Duration> },
    /// Serves a region in memory over NBD, on a Unix socket.
    ServeNbd { size: u64, seed: u64, socket: PathBuf },
    /// Opens a region of `size` zeros and says what that took.
    Open { size: u64, shown: Shown },
    /// Has a region that an application uses, and lets it leave. Told for how long to write, the application begins; it
    /// says what it has written when it is stopped.
    Leave(Leaving),
}

/// How a region is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Shown {
    Slice,
    File,
}

impl Shown {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Slice => "slice",
            Self::File => "file",
        }
    }
}

/// The other process, while it runs.
pub(crate) struct Peer<T> {
    child: Child,
    output: BufReader<ChildStdout>,
    ready: T,
}

impl<T: DeserializeOwned> Peer<T> {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(role: &Role) -> Result<Self> {
        let program = std::env::current_exe().context("this program's own path")?;
        let mut command = Command::new(program);
        command.arg("--peer").arg(serde_json::to_string(role)?).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting the other process")?;
        let mut output = BufReader::new(child.stdout.take().context("the other process has no output")?);
        let ready = hear(&mut output, &mut child)?;
        Ok(Self { child, output, ready })
    }

    /// What it said when it was ready.
    pub(crate) fn ready(&self) -> &T {
        &self.ready
    }

    /// Says a line to it.
    pub(crate) fn tell(&mut self, what: &impl Serialize) -> Result<()> {
        let input = self.child.stdin.as_mut().context("the other process has no input")?;
        writeln!(input, "{}", serde_json::to_string(what)?).context("telling the other process")
    }

    /// Waits for the next line that it says.
    pub(crate) fn hear<U: DeserializeOwned>(&mut self) -> Result<U> {
        hear(&mut self.output, &mut self.child)
    }

    /// The processor time that it has used so far.
    pub(crate) fn times(&self) -> Result<Times> {
        Times::of(self.child.id()).context("the other process's times")
    }
}

fn hear<T: DeserializeOwned>(output: &mut impl BufRead, child: &mut Child) -> Result<T> {
    let mut line = String::new();
    output.read_line(&mut line)?;
    if line.is_empty() {
        bail!("the other process failed: {}", child.wait()?);
    }
    serde_json::from_str(&line).context("what the other process says")
}

impl<T> Drop for Peer<T> {
    fn drop(&mut self) {
        // The end of its input ends it; killing is for one that is stuck.
        drop(self.child.stdin.take());
        for _ in 0..100 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Plays a role until standard input ends.
pub(crate) fn play(role: &str) -> Result<()> {
    match serde_json::from_str(role).context("--peer")? {
        Role::Serve { size, seed, rtts } => {
            let (_serving, ready) = Serving::start(size, seed, &rtts)?;
            announce(&ready)?;
            std::io::stdin().read_to_end(&mut Vec::new())?;
        }
        Role::ServeNbd { size, seed, socket } => {
            let _serving = ServingNbd::start(size, seed, socket)?;
            announce(&())?;
            std::io::stdin().read_to_end(&mut Vec::new())?;
        }
        Role::Open { size, shown } => announce(&Opened::measure(size, shown)?)?,
        Role::Leave(leaving) => leaving.play()?,
    }
    Ok(())
}

fn announce(ready: &impl Serialize) -> Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{}", serde_json::to_string(ready)?)?;
    Ok(output.flush()?)
}
