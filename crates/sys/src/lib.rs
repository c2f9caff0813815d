//! The kernel interfaces of r3map behind safe functions, and the only unsafe code of the project.
//!
//! Here is memory whose missing pages this process fills itself: [`Mapping`] is the application's side of it (views as
//! ordinary slices), [`Pager`] is the side that fills pages, tracks writes and gives bytes out. What to fill pages
//! with, and when, is decided elsewhere. [`Zeroed`] is plain memory that is given back in parts, and [`stream_copy`] fills
//! much of it at once. A [`FileMapping`] is a
//! mapped file, for seeing what other programs see. Block devices are made through [`ublk`] and [`Loop`].
//!
//! Facts about the kernel that this crate relies on are each a test in `tests/`.

#![cfg(target_os = "linux")]

mod abi;
pub mod apart;
mod event;
mod file_mapping;
mod loop_device;
mod mapping;
pub mod nbd;
mod pagemap;
mod pager;
pub mod socket;
mod span;
mod stream;
pub mod ublk;
mod userfault;
mod write_back;
mod zeroed;

pub use event::Event;
pub use file_mapping::{FileMapping, Sharing};
pub use loop_device::{Loop, LoopSpec};
pub use mapping::{Mapping, Protection};
pub use pager::{Fault, Install, Pager, Woken};
pub use stream::stream_copy;
pub use userfault::{FaultScope, ScopeWanted};
pub use write_back::write_back;
pub use zeroed::{Pages, Zeroed};

/// The size of a page in bytes: what mappings work in. They are refused on kernels with other page sizes.
pub const PAGE_SIZE: u64 = 4096;
