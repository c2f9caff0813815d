//! Stages over a [`Backend`](r3map_core::Backend): each is a backend that wraps another and adds one behaviour, and can
//! be tested alone. The puller and the pusher drive the cached stage in the background.
//!
//! Beside them is what frontends need that stand between a kernel and a backend: [`Buffers`], and [threads](blocking) for
//! calls that may hang; and what servers need that have one memory for many clients: [`Fair`].

mod aligned;
mod block_set;
pub mod blocking;
mod buffers;
mod cached;
mod chunked;
mod fair;
mod folded;
mod gate;
mod hooked;
mod local;
mod losses;
mod mindful;
mod record;
mod retry;
mod tracked;
mod tracker;

pub use aligned::Aligned;
pub use block_set::BlockSet;
pub use buffers::{Buffer, Buffers};
pub use cached::{
    Cached, CachedParts, CachedSettings, Durability, Hook, Hooks, Phase, Progress, PullSettings, PushSettings, Writes,
};
pub use chunked::Chunked;
pub use fair::{Fair, FairShare, Taker};
pub use gate::{Closed, Gate, WhenClosed};
pub use hooked::Hooked;
pub use local::{InstallNow, Local, Written};
pub use losses::{Losses, User};
pub use mindful::Mindful;
pub use r3map_core::pull::{Priority, Workers};
pub use record::{Recorded, StateRecord};
pub use retry::{Backoff, Outage, Retry, RetrySettings, retrying};
pub use tracked::Tracked;
pub use tracker::{Taken, Tracker};

/// Why a stage may expect an ability of the backend inside: it was asked for through its own capabilities.
const DECLARED: &str = "a stage declares only abilities that the backend inside has";
