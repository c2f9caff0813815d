//! Two hosts, a link between them, and an application that runs on one of them.

pub(crate) mod application;
pub(crate) mod disk;
pub(crate) mod host;
pub(crate) mod link;

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use r3map_core::{ChunkSize, Geometry};
use r3map_migrate::protocol::MigrationId;
use r3map_migrate::{LeecherSettings, Precopy};
use r3map_pipeline::{PullSettings, RetrySettings, Workers};

/// Not a multiple of anything.
pub(crate) const SIZE: u64 = 61 * 4096 + 77;

/// How long a leecher may be silent: longer than it tries a seeder that does not answer.
pub(crate) const LEASE: Duration = Duration::from_secs(30);

pub(crate) fn geometry() -> Geometry {
    Geometry::new(SIZE, ChunkSize::new(16 << 10).unwrap()).unwrap()
}

pub(crate) fn settings() -> LeecherSettings {
    let patience = |seconds| RetrySettings {
        limit: Some(Duration::from_secs(seconds)),
        attempt_timeout: Duration::from_secs(1),
        ..RetrySettings::default()
    };
    LeecherSettings {
        precopy: Precopy { recheck: Duration::from_millis(100), ..Precopy::default() },
        pull: PullSettings { retry_pause: Duration::from_millis(500), ..PullSettings::default() },
        before: patience(20),
        after: patience(5),
        handover_limit: None,
        handover_timeout: Duration::from_secs(4),
    }
}

/// One chunk after the other, so that it is known what is under way.
pub(crate) fn chunk_by_chunk() -> LeecherSettings {
    let mut settings = settings();
    settings.pull.workers = Workers::Fixed(NonZeroUsize::MIN);
    settings.pull.max_request = NonZeroU64::MIN;
    settings
}

/// A name that no other migration of this process has.
pub(crate) fn fresh_id() -> MigrationId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    MigrationId(id)
}
