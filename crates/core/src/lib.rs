//! The words and contracts of r3map.
//!
//! Everything else in the workspace speaks in these terms: a [`Geometry`] says how a region is cut into chunks and
//! blocks, a [`Backend`] is where bytes rest, an [`Error`] says what went wrong and what the caller can do about it.
//! There is no I/O here, no async runtime, no clock and no unsafe code: what happens is decided here as plain data, and
//! done elsewhere.

mod backend;
mod bits;
mod error;
mod geometry;
pub mod pull;
pub mod push;
mod range_lock;
pub mod state;
mod sync;
pub mod window;

pub use backend::{
    Access, Activity, Backend, Capabilities, Extent, ExtentKind, Extents, Piece, ReadMany, ReadOp, ReadPieces, Trim,
    WriteZeroes, check_range,
};
pub use error::{Error, ErrorKind, Operation, Result};
pub use geometry::{BLOCK_SIZE, ChunkSize, Geometry, MAX_REGION_SIZE, is_zero};
pub use range_lock::{RangeGuard, RangeLock};
