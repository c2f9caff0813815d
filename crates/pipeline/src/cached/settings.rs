//! What can be set on a cached region, what can be plugged into it, and what it tells of itself. Plain data, apart from
//! the hooks.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use r3map_core::pull::{Priority, Workers};
use r3map_core::{BLOCK_SIZE, ChunkSize, Error, ErrorKind, Operation, Result};
use tokio_util::sync::CancellationToken;

use crate::{BlockSet, StateRecord, Tracker};

/// How a cached region works.
#[derive(Debug, Clone)]
pub struct CachedSettings {
    /// The unit of pulling. Default 64 KiB. Larger chunks make fewer and longer demand pulls. Where the remote takes
    /// whole chunks only, a multiple of its chunk size.
    pub chunk_size: ChunkSize,
    /// Pulling in the background.
    pub pull: PullSettings,
    /// Pushing in the background.
    pub push: PushSettings,
    /// What a flush waits for.
    pub durability: Durability,
    /// Where writes go. Default to the remote.
    pub writes: Writes,
    /// Writes are answered with `Denied`, and nothing is pushed. Default no. A remote that is read-only makes the
    /// region read-only whatever is set here, unless writes are kept here.
    pub read_only: bool,
}

impl Default for CachedSettings {
    fn default() -> Self {
        Self {
            chunk_size: ChunkSize::DEFAULT,
            pull: PullSettings::default(),
            push: PushSettings::default(),
            durability: Durability::Remote,
            writes: Writes::Pushed,
            read_only: false,
        }
    }
}

/// How a region is pulled in the background. Demand is not affected.
#[derive(Debug, Clone)]
pub struct PullSettings {
    /// Requests under way at once. Default adaptive; `Off` pulls on demand only.
    pub workers: Workers,
    /// The longest request in bytes. Default 1 MiB; at least one chunk is asked for whatever is set. Longer requests
    /// cost less per byte and keep a demand on the same connection waiting for longer.
    pub max_request: NonZeroU64,
    /// How long a chunk that could not be had is left alone before it is tried again. Default 5 s.
    pub retry_pause: Duration,
    /// Nobody reads before everything is local: requests may queue, which keeps nobody waiting and a short link busy. Default no.
    pub alone: bool,
}

impl Default for PullSettings {
    fn default() -> Self {
        Self { workers: Workers::Adaptive, max_request: MIB, retry_pause: Duration::from_secs(5), alone: false }
    }
}

/// How writes go to the remote.
#[derive(Debug, Clone)]
pub struct PushSettings {
    /// How often what is dirty is pushed and flushed. Default 20 s. Shorter intervals lose less when the host dies and
    /// push blocks that are rewritten often more often.
    pub interval: Duration,
    /// The most bytes that may wait to be pushed. Default 256 MiB. Pushing begins at half of it; writers are slowed to
    /// the remote's pace when it is used up. Writes through a mapping cannot be slowed: they are only noticed every
    /// [`Self::collect_interval`] and pushed sooner.
    pub dirty_budget: NonZeroU64,
    /// Requests under way at once. Default adaptive; `Off` is refused.
    pub workers: Workers,
    /// The longest request in bytes. Default 1 MiB, at least a block.
    pub max_request: NonZeroU64,
    /// How often a mapping is searched for writes, where the local side is one. Default 1 s. Each search costs the
    /// application a cheap fault per page that it writes afterwards.
    pub collect_interval: Duration,
}

impl Default for PushSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(20),
            dirty_budget: MIB.saturating_mul(NonZeroU64::MIN.saturating_add(255)),
            workers: Workers::Adaptive,
            max_request: MIB,
            collect_interval: Duration::from_secs(1),
        }
    }
}

const MIB: NonZeroU64 = NonZeroU64::new(1 << 20).expect("not zero");

/// What a flush waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The remote has everything and has flushed it.
    #[default]
    Remote,
    /// The local side has everything durably, and remembers what is to be pushed: quicker, and as durable as the local
    /// disk. Needs a [`StateRecord`].
    Local,
}

/// Where what is written to a region goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Writes {
    /// To the remote, in the background.
    #[default]
    Pushed,
    /// Nowhere: the remote only has what is still missing here, as after a migration. A flush makes the local side
    /// durable, the dirty budget and whether the remote is read-only do not matter, and a close leaves what was not
    /// pulled missing.
    Kept,
}

impl CachedSettings {
    /// Checks what does not depend on the local and the remote side.
    ///
    /// # Errors
    /// `InvalidInput` naming the setting.
    pub fn validate(&self) -> Result<()> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        if self.push.workers == Workers::Off {
            return refuse("push.workers cannot be off; open the region read-only instead");
        }
        if self.push.interval.is_zero() || self.push.collect_interval.is_zero() || self.pull.retry_pause.is_zero() {
            return refuse("intervals and pauses must be longer than zero");
        }
        if self.push.max_request.get() < BLOCK_SIZE {
            return refuse("push.max_request must be at least 4096 bytes");
        }
        Ok(())
    }
}

/// Something to do at a certain point; the region waits for it.
pub type Hook = Arc<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// What the caller wants to be told.
#[derive(Clone, Default)]
pub struct Hooks {
    /// A chunk has become wholly local, for the first time since the region was opened. Called from the task that
    /// brought it: it must be short, and must not wait for the region.
    pub on_chunk_local: Option<Arc<dyn Fn(u64) + Send + Sync>>,
    /// Before each flush that the application asks for, and before the last one of a close. It may write to the region,
    /// but not flush it. An error makes the flush fail.
    pub on_before_flush: Option<Hook>,
    /// When closing begins, once; the region still takes writes. An error makes the close fail, which stores what was written
    /// all the same; the next close calls it again.
    pub on_before_close: Option<Hook>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("on_chunk_local", &self.on_chunk_local.is_some())
            .field("on_before_flush", &self.on_before_flush.is_some())
            .field("on_before_close", &self.on_before_close.is_some())
            .finish()
    }
}

/// What can be plugged into a cached region.
#[derive(Clone, Default)]
pub struct CachedParts {
    /// What the caller wants to be told.
    pub hooks: Hooks,
    /// Where the local side remembers what it has, if it survives the process.
    pub record: Option<Arc<dyn StateRecord>>,
    /// What to pull first.
    pub priority: Priority,
    /// Chunks to pull before everything but demand: what the other side of a migration changed last.
    pub urgent: Vec<u64>,
    /// Blocks that are in place already, and clean.
    pub present: BlockSet,
    /// Nothing is pulled in the background before this is cancelled; without one that begins at once. Demand does not wait.
    pub pull_after: Option<CancellationToken>,
    /// Told of every block that is found to be written through a mapping. Writes that are calls it is not told of: see
    /// [`Tracked`](crate::Tracked).
    pub tracker: Tracker,
}

impl fmt::Debug for CachedParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedParts")
            .field("hooks", &self.hooks)
            .field("record", &self.record.is_some())
            .field("priority", &self.priority)
            .field("urgent", &self.urgent.len())
            .field("present", &self.present.len())
            .field("pull_after", &self.pull_after.is_some())
            .field("tracker", &self.tracker)
            .finish()
    }
}

/// What a cached region is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Serving, pulling, pushing.
    #[default]
    Running,
    /// A close has begun: nothing is pulled in the background, writes are refused, what is dirty is being stored.
    Closing,
    /// Everything is stored; the region serves no more.
    Closed,
    /// Given up without storing what was dirty; the region serves no more.
    Abandoned,
}

/// Where a cached region stands. Sizes are in bytes; those that count blocks count the last one whole, up to the
/// region's size.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The region's size.
    pub size: u64,
    /// Bytes that are local.
    pub valid_bytes: u64,
    /// Whether all of them are.
    pub pulled: bool,
    /// Bytes that are not pushed yet.
    pub dirty_bytes: u64,
    /// Bytes that came from the remote so far.
    pub pulled_bytes: u64,
    /// Bytes that went to the remote so far.
    pub pushed_bytes: u64,
    /// Bytes of background pulls that are under way.
    pub pulling_bytes: u64,
    /// Bytes of pushes that are under way.
    pub pushing_bytes: u64,
    /// What the region is doing.
    pub phase: Phase,
    /// What last went wrong in the background. It stays after things have gone right again.
    pub last_error: Option<Error>,
}
