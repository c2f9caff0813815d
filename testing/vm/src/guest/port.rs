//! The way to the host: a virtio port, one message a line.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::protocol::Message;

/// The first port of the first virtio console device.
const DEVICE: &str = "/dev/vport0p1";

/// How long the device may take to appear: an emulated machine on a busy host is slow.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Port(Mutex<File>);

impl Port {
    pub(super) fn open() -> Result<Self> {
        let end = Instant::now() + LIMIT;
        loop {
            match OpenOptions::new().write(true).open(DEVICE) {
                Ok(file) => return Ok(Self(Mutex::new(file))),
                Err(error) if Instant::now() > end => return Err(error).context(DEVICE),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Sends a message. A host that does not listen any more has ended the machine, or is about to.
    pub(super) fn send(&self, message: &Message) {
        let mut file = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = file.write_all(message.to_line().as_bytes());
    }

    /// Gives the host time to take the last message before the power goes.
    #[expect(clippy::unused_self, reason = "there is nothing to drain without a port")]
    pub(super) fn drain(&self) {
        std::thread::sleep(Duration::from_millis(100));
    }
}
