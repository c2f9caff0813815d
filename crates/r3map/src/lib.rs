//! Use any resource as if it were your own memory or file.
//!
//! A region is opened by its name through a [`Registry`], and shown by a [`Mount`]: as a slice of memory
//! ([`Mount::slice`]), as a file on a path ([`Mount::path`]), as an opened file ([`Mount::file`]) or as a
//! block device ([`Mount::block`]). What is touched is
//! read on demand; a managed mount has the rest pulled in the background and what was written pushed back.
//!
//! Everything that can be chosen is in [`Settings`]; what can be plugged in (hooks, the order of pulling) is given to
//! the [`Mount`]. Nothing here does any I/O itself: it puts the parts together.

mod copy;
pub mod engine;
mod families;
#[cfg(all(feature = "file", feature = "slice"))]
pub mod migration;
mod mount;
mod registry;
mod settings;
pub mod size;
mod uri;

pub use copy::{CopyProgress, CopySettings, copy};
#[cfg(feature = "nbd")]
pub use families::nbd::{NbdAttach, nbd_attach, nbd_detach, nbd_list};
#[cfg(feature = "slice")]
pub use mount::SliceMount;
#[cfg(feature = "block")]
pub use mount::{BlockMount, Refused, remove_device};
#[cfg(feature = "file")]
pub use mount::{FileMount, PathMount};
pub use mount::{Mount, Region};
#[cfg(feature = "block")]
pub use r3map_block::{FileMapping, Kind, Meanwhile};
pub use r3map_core::{
    Access, Backend, Capabilities, ChunkSize, Error, ErrorKind, Extent, ExtentKind, Geometry, Operation, Result,
};
#[cfg(feature = "nbd")]
pub use r3map_nbd::{Export as NbdExport, Listed as NbdListed};
pub use r3map_pipeline::{
    Backoff, Durability, Outage, Phase, Priority, Progress, PullSettings, PushSettings, RetrySettings, Workers,
};
pub use registry::{Chunking, Family, Listen, ListenOptions, Listener, Look, Open, OpenOptions, Registry};
#[cfg(feature = "block")]
pub use settings::{BlockOptions, Kept};
pub use settings::{Cache, FileOptions, Settings};
pub use uri::Uri;

/// The examples in the README, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
