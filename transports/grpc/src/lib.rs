//! The gRPC transport of r3map: [`Server`] serves any [`Backend`](r3map_core::Backend), and [`Client`] is one whose
//! bytes are at a server.
//!
//! Two services are spoken. Our own, `r3map.region.v1.Region`, knows size and chunk size, answers several reads in one
//! round trip, leaves zeros out, checks every chunk and every write with a checksum, and notices a restarted server.
//! The other, `com.pojtinger.felicitas.r3map.mount.v1.Backend`, is that of the r3map programs written in Go: a server
//! answers it too, and a client falls back to it.
//!
//! A server can also be a seeder ([`Server::seeding`]), and [`SeederClient`] is a leecher's way to it: again with a service
//! of our own, `r3map.migration.v1.Migration`, and that of the Go programs. What the calls mean is neither's business.
//!
//! HTTP/2 is hyper's, messages are prost's, statuses are tonic's. The few lines of gRPC between them (one message per
//! request and per reply) are in `message` and `exchange` here rather than tonic's, because tonic's codecs gather each
//! message in one more buffer on either side, and receive the whole of a request before anybody is asked whether there
//! is room for it.
//!
//! There is no retrying here and no time-out per call, which the retry stage has, and no TLS: bind to loopback or a
//! Unix socket, or tunnel. A seeder may ask whoever calls for a secret, which `pass` carries.

mod client;
mod exchange;
mod heap;
mod message;
mod pass;
mod rope;
mod seeding;
mod server;
mod status;
mod stream;
mod sum;
mod target;

pub use client::{Client, ClientSettings, GoRegion, GoRequests, SeederClient};
pub use seeding::{Handed, Leeching, Seeded, SeededRegion, Seeding, Service};
pub use server::{Server, ServerSettings};
pub use target::Target;

/// Generated from `proto/`.
mod proto {
    #[allow(missing_docs, unreachable_pub, clippy::all)]
    pub(crate) mod region {
        include!(concat!(env!("OUT_DIR"), "/messages/r3map.region.v1.rs"));
    }
    #[allow(missing_docs, unreachable_pub, clippy::all)]
    pub(crate) mod go {
        include!(concat!(env!("OUT_DIR"), "/messages/com.pojtinger.felicitas.r3map.mount.v1.rs"));
    }
    #[allow(missing_docs, unreachable_pub, clippy::all)]
    pub(crate) mod migration {
        include!(concat!(env!("OUT_DIR"), "/messages/r3map.migration.v1.rs"));
    }
    // Those of ReadAt are the same as the mount service's, which are used.
    #[allow(missing_docs, unreachable_pub, dead_code, clippy::all)]
    pub(crate) mod go_seeder {
        include!(concat!(env!("OUT_DIR"), "/messages/com.pojtinger.felicitas.r3map.migration.v1.rs"));
    }
}

/// The version of the region service that this crate speaks; `region.proto` has the rule.
pub(crate) const VERSION: (u32, u32) = (1, 0);

/// The version of the migration service that this crate speaks; `migration.proto` has the rule.
pub(crate) const MIGRATION_VERSION: (u32, u32) = (1, 1);

/// The most bytes in a record of what was written: enough for tens of millions of runs.
pub(crate) const MAX_RECORD: usize = 64 << 20;

/// The header that says which of a server's regions a call is about; none is the first.
pub(crate) const REGION_HEADER: http::header::HeaderName = http::header::HeaderName::from_static("r3map-region");

/// Paths of the methods.
mod path {
    /// With what those of the Go programs begin.
    pub(crate) const GO: &str = "/com.pojtinger.felicitas.r3map.";

    pub(crate) const DESCRIBE: &str = "/r3map.region.v1.Region/Describe";
    pub(crate) const READ: &str = "/r3map.region.v1.Region/Read";
    pub(crate) const WRITE: &str = "/r3map.region.v1.Region/Write";
    pub(crate) const FLUSH: &str = "/r3map.region.v1.Region/Flush";
    pub(crate) const TRIM: &str = "/r3map.region.v1.Region/Trim";
    pub(crate) const WRITE_ZEROES: &str = "/r3map.region.v1.Region/WriteZeroes";
    pub(crate) const EXTENTS: &str = "/r3map.region.v1.Region/Extents";

    pub(crate) const MIGRATION_DESCRIBE: &str = "/r3map.migration.v1.Migration/Describe";
    pub(crate) const MIGRATION_TRACK: &str = "/r3map.migration.v1.Migration/Track";
    pub(crate) const MIGRATION_DIRTY: &str = "/r3map.migration.v1.Migration/Dirty";
    pub(crate) const MIGRATION_FINALIZE: &str = "/r3map.migration.v1.Migration/Finalize";
    pub(crate) const MIGRATION_CONFIRM: &str = "/r3map.migration.v1.Migration/Confirm";
    pub(crate) const MIGRATION_ABORT: &str = "/r3map.migration.v1.Migration/Abort";

    pub(crate) const GO_SEEDER_READ_AT: &str = "/com.pojtinger.felicitas.r3map.migration.v1.Seeder/ReadAt";
    pub(crate) const GO_SEEDER_TRACK: &str = "/com.pojtinger.felicitas.r3map.migration.v1.Seeder/Track";
    pub(crate) const GO_SEEDER_SYNC: &str = "/com.pojtinger.felicitas.r3map.migration.v1.Seeder/Sync";
    pub(crate) const GO_SEEDER_CLOSE: &str = "/com.pojtinger.felicitas.r3map.migration.v1.Seeder/Close";

    pub(crate) const GO_READ_AT: &str = "/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt";
    pub(crate) const GO_WRITE_AT: &str = "/com.pojtinger.felicitas.r3map.mount.v1.Backend/WriteAt";
    pub(crate) const GO_SYNC: &str = "/com.pojtinger.felicitas.r3map.mount.v1.Backend/Sync";
}
