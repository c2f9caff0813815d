//! A region as memory.

mod map;
mod pages;
mod runtime;
mod server;

pub use map::Map;
pub use r3map_sys::{FaultScope, ScopeWanted};
