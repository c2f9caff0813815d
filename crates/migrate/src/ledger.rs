//! What a side writes down, so that it knows after a restart whether it owns the region.

use r3map_core::Result;
use r3map_pipeline::BlockSet;

use crate::protocol::MigrationId;

/// How a side stands to its regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It owns them.
    Owner {
        /// Since this epoch.
        epoch: u64,
        /// From whom they were taken back.
        revoked: Option<MigrationId>,
    },
    /// It has handed them over, and serves what is still missing there.
    HandedOver {
        /// To whom.
        id: MigrationId,
        /// The epoch that began with it.
        epoch: u64,
        /// What it answered.
        dirty: Vec<BlockSet>,
    },
    /// The other side has everything.
    Gone {
        /// Which one.
        id: MigrationId,
        /// The epoch that began with it.
        epoch: u64,
    },
    /// It copies them, and the other side owns them.
    Pulling {
        /// By this name.
        id: MigrationId,
        /// Records that have arrived, and whose blocks count as missing here.
        rounds: u64,
    },
    /// It owns them, and some of it may still be missing here.
    Arrived {
        /// By which migration.
        id: MigrationId,
        /// The epoch that began with it.
        epoch: u64,
    },
    /// It is about to ask for them: whether it owns them only the seeder knows.
    Asking {
        /// By this name, to be asked again.
        id: MigrationId,
        /// As for [`Self::Pulling`].
        rounds: u64,
    },
}

/// A place that survives the process. One side has one; the regions it speaks of survive with it.
pub trait Ledger: Send + Sync + 'static {
    /// What was written down last; nothing if nothing ever was. It is durable when this returns, also where writing it down
    /// had failed.
    ///
    /// # Errors
    /// When it cannot be read: then nobody may assume anything.
    fn load(&self) -> Result<Option<Standing>>;

    /// Writes it down durably, in place of what was there, all or nothing.
    ///
    /// # Errors
    /// When it may not be durable; what was there before, or this, is found later.
    fn save(&self, standing: &Standing) -> Result<()>;
}
