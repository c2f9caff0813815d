//! Loop devices over a file that somebody else shows: the errors for people, and the limits.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use r3map_core::{Error, Operation, Result};
use r3map_pipeline::blocking::within;
use r3map_sys::{Loop, LoopSpec};

use crate::node::{Node, until};
use crate::settings::BlockSettings;

/// How long the kernel may take to detach a device that nobody has open.
const LET_GO_LIMIT: Duration = Duration::from_secs(2);

/// A loop device.
pub(crate) struct LoopDevice(Mutex<Loop>);

/// Says why loop devices cannot be made here, if so.
pub(crate) fn check() -> Result<()> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control");
    opened.map(drop).map_err(cannot_make)
}

fn cannot_make(error: io::Error) -> Error {
    let message = match error.kind() {
        io::ErrorKind::NotFound => "this kernel has no loop devices; load them: modprobe loop",
        io::ErrorKind::PermissionDenied => "loop devices are made by root",
        _ => "a loop device cannot be made",
    };
    Error::from_io(Operation::Mount, message, error)
}

impl LoopDevice {
    /// Makes one over `file`. Blocks.
    pub(crate) fn attach(file: &Path, settings: &BlockSettings) -> Result<(Self, Node)> {
        let size = size(file, settings)?;
        let settings = settings.clone().fit_size(size)?;
        let BlockSettings { read_only, start_limit, .. } = settings;
        let spec = LoopSpec { block_size: settings.logical_block_size, read_only, direct_io: true };
        let device = Loop::attach(file, spec, start_limit).map_err(cannot_make)?;
        let node = Node::wait(format!("loop{}", device.number()), size, read_only, start_limit)?;
        node.set("queue/read_ahead_kb", settings.read_ahead >> 10);
        Ok((Self(Mutex::new(device)), node))
    }

    /// Flushes and detaches; `Conflict` if it is mounted. Blocks.
    pub(crate) fn detach(&self, node: &Node, limit: Duration) -> Result<()> {
        let detached = self.0.lock().unwrap_or_else(PoisonError::into_inner).detach(limit);
        detached.map_err(|error| {
            if error.kind() == io::ErrorKind::ResourceBusy {
                return node.in_use();
            }
            let message = format!("{} cannot be flushed before detaching", node.path().display());
            Error::from_io(Operation::Close, message, error)
        })
    }

    /// Whether it is detached, which it is as soon as nobody has it open.
    pub(crate) fn is_detached(node: &Node) -> bool {
        until(LET_GO_LIMIT, || !node.has("loop/backing_file"))
    }
}

fn size(file: &Path, settings: &BlockSettings) -> Result<u64> {
    let cannot = |error| Error::from_io(Operation::Mount, "the file cannot be looked at", error);
    let file = file.to_owned();
    // A file that another process serves may not answer.
    within(settings.start_limit, "looking at the file", move || {
        file.metadata().map(|found| found.len()).map_err(cannot)
    })
}
