//! What can be chosen about a mount: plain data, apart from the components that it is made of.

use std::ffi::OsString;
#[cfg(feature = "block")]
use std::num::NonZeroU16;
use std::num::NonZeroU64;
use std::path::PathBuf;

#[cfg(feature = "block")]
use r3map_block::{Kind, Meanwhile};
use r3map_core::ChunkSize;
use r3map_pipeline::{Durability, PullSettings, PushSettings, RetrySettings};

/// Where the local copy of a managed mount is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Cache {
    /// In memory; for a slice, in the mapping itself. Gone with the process.
    #[default]
    Memory,
    /// In this file, which is created if it does not exist. It survives the process: what was valid is not pulled again,
    /// and what a flush acknowledged is not lost. A file of another region is refused.
    File(PathBuf),
}

/// How a mount works. Those that concern the local copy have no effect on a direct mount.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The unit of transfer. The remote's own by default, or 64 KiB. Larger ones make fewer and longer demand pulls.
    pub chunk_size: Option<ChunkSize>,
    /// Refuse writes. A remote that is read-only makes the mount so, whatever is set here. Default no.
    pub read_only: bool,
    /// How long to keep trying a remote that does not answer.
    pub retry: RetrySettings,
    /// Where the local copy is kept. Default memory.
    pub cache: Cache,
    /// Pulling in the background.
    pub pull: PullSettings,
    /// Pull everything before the mount is shown. Default no.
    pub pull_first: bool,
    /// Pushing in the background.
    pub push: PushSettings,
    /// What a flush waits for. Default the remote.
    pub durability: Durability,
    /// What is special about mounts on a path and as an opened file.
    pub file: FileOptions,
    /// What is special about mounts as a block device.
    #[cfg(feature = "block")]
    pub block: BlockOptions,
}

/// What is special about a mount that is shown as a file.
#[derive(Debug, Clone, Default)]
pub struct FileOptions {
    /// Open files without the kernel's cache: every access reaches r3map as the application makes it. Default no.
    pub direct_io: bool,
    /// Let other users reach the file, as its mode says. Default no.
    pub allow_other: bool,
    /// What `mount` names as the source, for people. `r3map` by default.
    pub source: Option<String>,
    /// On a path, show a directory with one file of this name in it instead of a file: for programs that are to be
    /// given a directory. Default none.
    pub entry: Option<OsString>,
}

/// What is special about a mount that is shown as a block device.
#[cfg(feature = "block")]
#[derive(Debug, Clone, Default)]
pub struct BlockOptions {
    /// Which kind of device. The best that works here by default.
    pub kind: Option<Kind>,
    /// The logical block size in bytes, 512 to 4096; the region's size must be a multiple of it. 512 by default.
    pub logical_block_size: Option<u32>,
    /// How many queues, where the kind has several. One per processor and at most four by default.
    pub queues: Option<NonZeroU16>,
    /// How many requests each queue may have under way. 128 by default.
    pub depth: Option<NonZeroU16>,
    /// Keep the device when this process dies, so that the next one takes it over (ublk). Needs the region's name
    /// ([`Mount::identity`](crate::Mount::identity)), and a direct mount or a cache file: what is only in memory would be
    /// lost behind the back of the device's users. By default the device goes with the process.
    pub keep: Option<Kept>,
    /// Where to make a symbolic link to the device, whose name nobody knows beforehand: where nothing is, or what a process
    /// that was killed left behind. It goes with the mount.
    pub link: Option<PathBuf>,
}

/// A device that outlives the process that serves it.
#[cfg(feature = "block")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The number in `/dev/ublkbN`.
    pub id: u32,
    /// What happens to requests while nobody serves it.
    pub meanwhile: Meanwhile,
}

impl Settings {
    /// With at most so many bytes changed and not yet pushed.
    #[must_use]
    pub fn dirty_budget(mut self, bytes: NonZeroU64) -> Self {
        self.push.dirty_budget = bytes;
        self
    }
}
