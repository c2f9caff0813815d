//! The slice frontend: a region as memory, through userfaultfd.
//!
//! [`map`] is all it takes to read any backend as memory. [`Slice::open`] is the whole: memory that is pulled on demand
//! and in the background, written to like any other, and pushed back. What is pulled and pushed when is decided by
//! [`r3map_pipeline::Cached`]; what the kernel is asked is in [`r3map_sys`].

mod pages;
mod prepared;
mod runtime;
mod server;
mod settings;
mod slice;
mod task;
mod watch;

pub use prepared::Prepared;
pub use r3map_sys::{FaultScope, ScopeWanted};
pub use settings::{SliceParts, SliceSettings};
pub use slice::{Slice, SliceHandle, map};
pub use task::Task;
