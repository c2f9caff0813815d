//! r3map's own figures, a file for each part of it.

pub(crate) mod block;
pub(crate) mod file;
pub(crate) mod grpc;
pub(crate) mod migrate;
pub(crate) mod mounted;
pub(crate) mod nbd;
pub(crate) mod nbd_server;
pub(crate) mod open;
pub(crate) mod rtt;
pub(crate) mod slice;

use std::sync::Arc;

use anyhow::Result;
use r3map_local::Memory;
use r3map_testkit::fill;

const STEP: u64 = 1 << 20;

/// A region in memory, full of bytes that are a function of their offset.
pub(crate) fn filled(size: u64, seed: u64) -> Result<Arc<Memory>> {
    let memory = Memory::new(size)?;
    for offset in (0..size.div_ceil(STEP)).map(|step| step * STEP) {
        let len = usize::try_from((size - offset).min(STEP))?;
        memory.write_now(offset, &fill::bytes(offset, len, seed))?;
    }
    Ok(Arc::new(memory))
}
