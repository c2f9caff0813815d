//! The protocol between a leecher and a seeder: its messages as plain data. Transports put them on a wire.
//!
//! ```text
//!  leecher                                          seeder
//!    | -- describe -----------------------------------> |  which regions there are, and who owns them
//!    | -- track(id) ----------------------------------> |  from here on every write is recorded
//!    | == reads ====================================== |  any number, in any order, at any time until confirm
//!    | -- dirty(id, 1) -------------------------------> |  what was written so far; the application runs on
//!    | == reads ====================================== |  of that, again
//!    | -- dirty(id, 2) ...                              |  until the rest is small, or does not become smaller
//!    | -- finalize(id, rounds) -----------------------> |  suspend, flush, fence; then write down who owns it now
//!    | <----------------- what was written since, epoch |  here the region changes hands
//!    |  show, resume                                    |
//!    | == reads ====================================== |  what is still missing: what is touched first
//!    | -- confirm(id) --------------------------------> |  nothing is missing: the seeder may go
//! ```
//!
//! The seeder's side as states; a call that is not shown here is answered with a conflict and changes nothing:
//!
//! ```text
//!              track(id)                 finalize(id)
//!    owner ───────────────▶ tracked(id) ─────────────▶ handed over(id) ──confirm(id)──▶ gone(id)
//!      ▲                     │   ▲  │ dirty(id, n)         │ finalize(id): the same      │ confirm(id): again
//!      │                     │   └──┘                      │ answer again
//!      ├ abort(id), silence ─┤ track(other): tracked(other)│
//!      └──── abort(id): with a higher epoch ◀──────────────┘
//! ```
//!
//! # Who owns a region
//! Exactly one side may write. Up to *handed over* it is the seeder; from there on it is the leecher, and nobody but the
//! leecher can give it back: by `abort`, which it sends only if it has not run and never will. A seeder that has handed
//! over waits, whatever becomes of the leecher; it cannot know whether the answer arrived. Whoever does know (a person)
//! can take it back by hand. Whoever was wrong in that is told as soon as the leecher makes a call or reads: both are refused,
//! [`Description::revoked`] says why, and the leecher stops its application.
//!
//! # Lost replies
//! Each call may be made again with the same arguments and gives the same answer. `dirty` is numbered: the same number
//! gives the same record again, the next number says that the last one arrived. `finalize` says how many arrived. A call
//! that comes late, after its caller has gone on, finds another state and changes nothing. So does a `track`: it says for whom
//! the seeder recorded [last](Description::last) when its caller looked. Whoever comes replaces a leecher that he knows of, and
//! never one that has come since.
//!
//! # Silence
//! Recording costs the application a little, so that a seeder does not do it for ever: when nothing was heard of a leecher
//! for [as long as it says](Description::lease), neither a call nor a read that is its own, it stops. The leecher, if it is still there,
//! learns it from its next call, which is a conflict; it counts everything as missing, and starts again under another
//! name, unless the seeder records for somebody else by then. A name for which recording has ended is refused from then
//! on, so that no call that comes late begins a record with a gap before it. A leecher that has nothing to read goes on
//! asking for records, often enough.
//!
//! # A leecher that is started again
//! Before it has asked to finalize it goes on by the same name: it asks for the record after the last one that it has
//! written down. Asking for a record discards the one before. So what a record names is durably missing here before the
//! next one is asked for; and what was pulled while it was written over there is in the record that it asks for now.
//!
//! A name that is given up is aborted before another one is taken: a `finalize` that is still on its way then changes
//! nothing, and one that has come through is undone.
//!
//! # Versions
//! Transports announce a version of their own service; the states above are what every version of it speaks of. A peer
//! that lacks iterative pre-copy says so in [`Description::precopy`].

use std::fmt;
use std::time::Duration;

use r3map_core::{ChunkSize, Error, ErrorKind, Geometry, Operation, Result};
use r3map_pipeline::BlockSet;

/// Names one attempt to migrate: sixteen random bytes that the leecher chooses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// Nobody's name.
    pub const NONE: Self = Self([0; 16]);

    /// The name of the attempt that follows this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(u128::from_be_bytes(self.0).wrapping_add(1).to_be_bytes())
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The highest epoch. Nothing changes hands so often: a higher one is a mistake, and is refused so that there is always a
/// next one.
pub const MAX_EPOCH: u64 = u64::MAX >> 1;

/// Checks an epoch that somebody else has named.
///
/// # Errors
/// `Corrupt` for one that cannot be.
pub fn check_epoch(epoch: u64) -> Result<()> {
    if epoch <= MAX_EPOCH {
        return Ok(());
    }
    let message = format!("epoch {epoch} cannot be: no region has changed hands so often");
    Err(Error::new(ErrorKind::Corrupt, Operation::Open, message))
}

/// The most regions in one migration.
pub const MAX_REGIONS: usize = 64;

/// What a seeder has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Counts changes of ownership: whoever names a lower one no longer owns the region.
    pub epoch: u64,
    /// The regions, in an order that stays the same.
    pub regions: Vec<RegionFacts>,
    /// Whether it can say what was written so far without suspending anybody.
    pub precopy: bool,
    /// Whether it records for some leecher now.
    pub busy: bool,
    /// How long a leecher may be silent before it stops to record for it; nothing where it may be for ever.
    pub lease: Option<Duration>,
    /// The migration for which the regions were handed over, and taken back since. Whoever it is must not run.
    pub revoked: Option<MigrationId>,
    /// The migration for which it records, or has last: [`MigrationId::NONE`] where there was none yet, nothing where it does
    /// not say. A leecher that comes names it, and is refused if it is another one by then.
    pub last: Option<MigrationId>,
}

impl Description {
    /// Checks what a peer said.
    ///
    /// # Errors
    /// `Corrupt` for no regions, too many, or regions or an epoch that cannot be.
    pub fn check(&self) -> Result<Vec<Geometry>> {
        check_epoch(self.epoch)?;
        let wrong = |message: String| Error::new(ErrorKind::Corrupt, Operation::Open, message);
        if self.regions.is_empty() || self.regions.len() > MAX_REGIONS {
            return Err(wrong(format!("the seeder describes {} regions", self.regions.len())));
        }
        self.regions.iter().map(RegionFacts::geometry).collect()
    }
}

/// One region of a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionFacts {
    /// What the application calls it, to tell several regions apart.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The unit of transfer.
    pub chunk_size: ChunkSize,
}

impl RegionFacts {
    /// How it is cut.
    ///
    /// # Errors
    /// `InvalidInput` for a size that cannot be.
    pub fn geometry(&self) -> Result<Geometry> {
        Geometry::new(self.size, self.chunk_size)
    }
}

/// The answer to `finalize`: the region changes hands with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handover {
    /// The epoch that begins with the new owner.
    pub epoch: u64,
    /// For each region the blocks that were written since the last record that arrived.
    pub dirty: Vec<BlockSet>,
    /// How long the application took to stop.
    pub suspend: Duration,
    /// How long it took until everything written was recorded and nothing could be written any more.
    pub flush: Duration,
}

/// Checks that a peer's record speaks of the regions that there are.
///
/// # Errors
/// `Corrupt` if not.
pub fn check_dirty(dirty: &[BlockSet], regions: &[Geometry]) -> Result<()> {
    let inside = |(set, region): (&BlockSet, &Geometry)| set.runs().all(|run| run.end <= region.block_count());
    if dirty.len() == regions.len() && dirty.iter().zip(regions).all(inside) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Corrupt, Operation::Read, "the seeder names blocks that the regions do not have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(size: u64) -> RegionFacts {
        RegionFacts { name: "a".into(), size, chunk_size: ChunkSize::MIN }
    }

    #[test]
    fn what_a_peer_describes_is_checked() {
        let description = |sizes: &[u64]| Description {
            epoch: 1,
            regions: sizes.iter().map(|size| facts(*size)).collect(),
            precopy: true,
            busy: false,
            lease: None,
            revoked: None,
            last: None,
        };
        assert_eq!(description(&[1, 4097]).check().unwrap().len(), 2);
        let epoch = |epoch| Description { epoch, ..description(&[1]) };
        assert!(epoch(MAX_EPOCH).check().is_ok() && epoch(MAX_EPOCH + 1).check().is_err());
        for wrong in [vec![], vec![0], vec![u64::MAX], vec![1; MAX_REGIONS + 1]] {
            assert!(description(&wrong).check().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn records_of_other_regions_are_refused() {
        let regions = [facts(4097).geometry().unwrap(), facts(1).geometry().unwrap()];
        let set = |blocks| {
            let mut set = BlockSet::default();
            set.insert(blocks);
            set
        };
        assert!(check_dirty(&[set(0..2), set(0..1)], &regions).is_ok());
        assert!(check_dirty(&[set(0..3), set(0..1)], &regions).is_err());
        assert!(check_dirty(&[set(0..2)], &regions).is_err());
    }
}
