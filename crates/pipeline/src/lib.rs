//! Stages over a [`Backend`](r3map_core::Backend): each is a backend that wraps another and adds one behaviour, and can
//! be tested alone. The puller and the pusher drive the cached stage in the background.

mod cached;
mod local;
mod record;

pub use cached::{
    Cached, CachedParts, CachedSettings, Durability, Hook, Hooks, Phase, Progress, PullSettings, PushSettings,
};
pub use local::{InstallNow, Local, Written};
pub use r3map_core::pull::{Priority, Workers};
pub use record::{Recorded, StateRecord};
