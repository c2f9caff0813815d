//! The table against a model of a local side, a remote and its cache, and (under loom) its races.

#[cfg(not(loom))]
mod model;
#[cfg(loom)]
mod races;
#[cfg(not(loom))]
mod rules;

use std::sync::Arc;

use super::Table;
use crate::{ChunkSize, Geometry};

/// A table over a region of `size` bytes in chunks of `chunk`.
fn table(size: u64, chunk: u64) -> Arc<Table> {
    let geometry = Geometry::new(size, ChunkSize::new(chunk).unwrap()).unwrap();
    Arc::new(Table::new(geometry, None).reporting_chunks())
}
