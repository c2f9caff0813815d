//! Stages over a [`Backend`](r3map_core::Backend): each is a backend that wraps another and adds one behaviour, and can
//! be tested alone. The puller and the pusher drive the cached stage in the background.

mod local;
mod record;

pub use local::{InstallNow, Local, Written};
pub use record::{Recorded, StateRecord};
