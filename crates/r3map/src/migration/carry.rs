//! What a transport must do to carry migrations.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{ChunkSize, Result};
use r3map_migrate::{Peer, Secret, Seeder};

use crate::{Listener, Uri};

/// What a leecher tells a transport.
#[derive(Debug, Clone, Default)]
pub struct LeechOptions {
    /// What the seeder may ask for.
    pub secret: Option<Secret>,
    /// The region's size in bytes, where the seeder does not know it (Go).
    pub size: Option<u64>,
    /// The chunk size, likewise.
    pub chunk_size: Option<ChunkSize>,
}

/// What a seeder tells a transport.
#[derive(Debug, Clone, Default)]
pub struct SeedOptions {
    /// What the regions are called for as long as their bytes live; nothing if they end with the process.
    pub identity: Option<String>,
    /// Programs in Go, which cannot show a secret, may read the regions and take them away where there is one. No.
    pub open_to_go: bool,
}

/// Carries the calls and the bytes of migrations, for one scheme.
#[async_trait]
pub trait Carry: Send + Sync {
    /// Connects to the seeder at `uri`. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// One line that names the address and says what to do.
    async fn leech(&self, uri: &Uri, options: &LeechOptions) -> Result<Arc<dyn Peer>>;

    /// Offers a seeder's regions at `uri`. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// One line that names the address and says what to do.
    async fn seed(&self, uri: &Uri, seeder: Seeder, options: &SeedOptions) -> Result<Box<dyn Listener>>;

    /// Finds out whether regions could be offered at `uri` as things are. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// As [`Self::seed`].
    async fn can_seed(&self, uri: &Uri) -> Result<()>;
}
