//! The other side, as a leecher sees it through a transport.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use r3map_pipeline::BlockSet;

use crate::protocol::{Description, Handover, MigrationId};

/// The calls of the [protocol](crate::protocol). Each may be made again; a call whose future is dropped may still have
/// its effect.
#[async_trait]
pub trait Peer: Send + Sync + 'static {
    /// What the seeder has.
    ///
    /// # Errors
    /// `Unavailable` when it does not answer; so for all calls.
    async fn describe(&self) -> Result<Description>;

    /// Starts the migration `id`, in place of the one that was the [last](Description::last), if that is said.
    ///
    /// # Errors
    /// `Denied` if this leecher may not; `Conflict` if the seeder no longer owns the region, or another was the last one.
    async fn track(&self, id: MigrationId, after: Option<MigrationId>) -> Result<()>;

    /// The record number `round`, counted from one, for each region.
    ///
    /// # Errors
    /// `Conflict` if the seeder does not record for `id`.
    async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>>;

    /// Hands the region over, after `rounds` records have arrived.
    ///
    /// # Errors
    /// `Conflict` if the seeder does not record for `id`. This, `Cancelled`, `Denied`, `InvalidInput` and `NotFound` say that
    /// it was not handed over; others leave that open.
    async fn finalize(&self, id: MigrationId, rounds: u64) -> Result<Handover>;

    /// Nothing is missing here.
    ///
    /// # Errors
    /// `Conflict` if the region was not handed over for `id`.
    async fn confirm(&self, id: MigrationId) -> Result<()>;

    /// This leecher has not run and never will.
    ///
    /// # Errors
    /// `Conflict` if that cannot be: the region went to somebody else, or was confirmed.
    async fn abort(&self, id: MigrationId) -> Result<()>;

    /// A region's bytes, for the migration `id`: from a region that was taken back from it nothing is read.
    fn region(&self, index: usize, id: MigrationId) -> Arc<dyn Backend>;
}
