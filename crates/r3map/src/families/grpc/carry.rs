//! Migrations over gRPC: the seeder and the leecher of `r3map-migrate` on the services of `r3map-grpc`.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use r3map_grpc::{
    ClientSettings, GoRegion, GoRequests, Handed, Seeded, SeededRegion, SeederClient, Seeding, Server, ServerSettings,
};
use r3map_migrate::protocol::{Description, Handover, MigrationId, RegionFacts};
use r3map_migrate::{Peer, Seeder};
use r3map_pipeline::BlockSet;

use super::{Listening, target};
use crate::migration::{Carry, LeechOptions, SeedOptions};
use crate::{Listener, Uri};

/// Migrations over gRPC.
pub(super) struct GrpcCarrier;

#[async_trait]
impl Carry for GrpcCarrier {
    async fn leech(&self, uri: &Uri, options: &LeechOptions) -> Result<Arc<dyn Peer>> {
        uri.expect(&[], true)?;
        // A seeder in Go takes reads of any length.
        let (chunk_size, requests) = (options.chunk_size.unwrap_or_default(), GoRequests::Any);
        let go = options.size.map(|size| GoRegion { size, chunk_size, requests });
        let settings = ClientSettings { go, ..ClientSettings::default() };
        let secret = options.secret.as_ref().map_or(&[][..], |secret| secret.bytes());
        Ok(Arc::new(GrpcPeer(SeederClient::connect(target(uri)?, secret, settings).await?)))
    }

    async fn seed(&self, uri: &Uri, seeder: Seeder, options: &SeedOptions) -> Result<Box<dyn Listener>> {
        uri.expect(&[], true)?;
        let settings = ServerSettings { identity: options.identity.clone(), ..ServerSettings::default() };
        let server = Server::seeding(Arc::new(GrpcSeeder(seeder)), settings).await?;
        let bound = server.listen(&target(uri)?).await?;
        Ok(Box::new(Listening { uri: format!("{}://{bound}", uri.scheme()), server }))
    }
}

/// A seeder as a server has it.
struct GrpcSeeder(Seeder);

#[async_trait]
impl Seeding for GrpcSeeder {
    async fn describe(&self) -> Result<Seeded> {
        let Description { epoch, regions, precopy, busy, lease } = self.0.describe().await?;
        let region = |RegionFacts { name, size, chunk_size }| SeededRegion { name, size, chunk_size };
        Ok(Seeded { epoch, regions: regions.into_iter().map(region).collect(), precopy, busy, lease })
    }

    fn region(&self, index: usize) -> Arc<dyn Backend> {
        self.0.region(index)
    }

    async fn track(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.0.admit(secret)?.track(MigrationId(id)).await
    }

    async fn track_for_ever(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.0.admit(secret)?.track_for_ever(MigrationId(id)).await
    }

    async fn dirty(&self, secret: &[u8], id: [u8; 16], round: u64) -> Result<Vec<BlockSet>> {
        self.0.admit(secret)?.dirty(MigrationId(id), round).await
    }

    async fn finalize(&self, secret: &[u8], id: [u8; 16], rounds: u64) -> Result<Handed> {
        let handover = self.0.admit(secret)?.finalize(MigrationId(id), rounds).await?;
        let Handover { epoch, dirty, suspend, flush } = handover;
        Ok(Handed { epoch, dirty, suspend, flush })
    }

    async fn finalize_once(&self, secret: &[u8], id: [u8; 16]) -> Result<Handed> {
        let handover = self.0.admit(secret)?.finalize_once(MigrationId(id), 0).await?;
        let Handover { epoch, dirty, suspend, flush } = handover;
        Ok(Handed { epoch, dirty, suspend, flush })
    }

    async fn confirm(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.0.admit(secret)?.confirm(MigrationId(id)).await
    }

    async fn abort(&self, secret: &[u8], id: [u8; 16]) -> Result<()> {
        self.0.admit(secret)?.abort(MigrationId(id)).await
    }
}

/// A seeder over there.
struct GrpcPeer(SeederClient);

#[async_trait]
impl Peer for GrpcPeer {
    async fn describe(&self) -> Result<Description> {
        let Seeded { epoch, regions, precopy, busy, lease } = self.0.describe().await?;
        let facts = |SeededRegion { name, size, chunk_size }| RegionFacts { name, size, chunk_size };
        Ok(Description { epoch, regions: regions.into_iter().map(facts).collect(), precopy, busy, lease })
    }

    async fn track(&self, id: MigrationId) -> Result<()> {
        self.0.track(id.0).await
    }

    async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>> {
        self.0.dirty(id.0, round).await
    }

    async fn finalize(&self, id: MigrationId, rounds: u64) -> Result<Handover> {
        let Handed { epoch, dirty, suspend, flush } = self.0.finalize(id.0, rounds).await?;
        Ok(Handover { epoch, dirty, suspend, flush })
    }

    async fn confirm(&self, id: MigrationId) -> Result<()> {
        self.0.confirm(id.0).await
    }

    async fn abort(&self, id: MigrationId) -> Result<()> {
        self.0.abort(id.0).await
    }

    fn region(&self, index: usize) -> Arc<dyn Backend> {
        self.0.region(index)
    }
}
