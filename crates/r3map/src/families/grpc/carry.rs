//! Migrations over gRPC: the seeder and the leecher of `r3map-migrate` on the services of `r3map-grpc`.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_grpc::{
    ClientSettings, GoRegion, GoRequests, Handed, Leeching, Seeded, SeededRegion, SeederClient, Seeding, Server,
    ServerSettings, Service,
};
use r3map_migrate::protocol::{Description, Handover, MigrationId, RegionFacts};
use r3map_migrate::{Admitted, Peer, Seeder};
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
        let server = Server::seeding(Arc::new(GrpcSeeder { seeder, open_to_go: options.open_to_go }), settings).await?;
        let bound = server.listen(&target(uri)?).await?;
        Ok(Box::new(Listening { uri: format!("{}://{bound}", uri.scheme()), server }))
    }

    async fn can_seed(&self, uri: &Uri) -> Result<()> {
        uri.expect(&[], true)?;
        Server::can_listen(&target(uri)?).await
    }
}

/// A seeder as a server has it.
struct GrpcSeeder {
    seeder: Seeder,
    open_to_go: bool,
}

#[async_trait]
impl Seeding for GrpcSeeder {
    async fn describe(&self) -> Result<Seeded> {
        let Description { epoch, regions, precopy, busy, lease, revoked, last } = self.seeder.describe().await?;
        let region = |RegionFacts { name, size, chunk_size }| SeededRegion { name, size, chunk_size };
        let ([revoked, last], regions) = ([revoked, last].map(|id| id.map(|id| id.0)), regions.into_iter().map(region));
        Ok(Seeded { epoch, regions: regions.collect(), precopy, busy, lease, revoked, last })
    }

    fn region(&self, index: usize) -> Arc<dyn Backend> {
        self.seeder.region(index)
    }

    fn admit(&self, secret: &[u8], service: Service) -> Result<Arc<dyn Leeching>> {
        let admitted = match service {
            // Its protocol knows of one: it would take the others away and never fetch them.
            Service::Go if self.seeder.regions() > 1 => {
                let message = "several regions move as one here, which programs in Go cannot do";
                return Err(Error::new(ErrorKind::Denied, Operation::Open, message));
            }
            Service::Go if self.open_to_go => self.seeder.admit_unasked(),
            Service::Go | Service::Own => self.seeder.admit(secret)?,
        };
        Ok(Arc::new(GrpcLeecher(admitted)))
    }
}

/// A leecher that was let in.
struct GrpcLeecher(Admitted);

#[async_trait]
impl Leeching for GrpcLeecher {
    fn heard(&self, id: [u8; 16]) -> Result<()> {
        self.0.heard(MigrationId(id))
    }

    async fn track(&self, id: [u8; 16], after: Option<[u8; 16]>) -> Result<()> {
        self.0.track(MigrationId(id), after.map(MigrationId)).await
    }

    async fn track_for_ever(&self, id: [u8; 16]) -> Result<()> {
        self.0.track_for_ever(MigrationId(id)).await
    }

    async fn dirty(&self, id: [u8; 16], round: u64) -> Result<Vec<BlockSet>> {
        self.0.dirty(MigrationId(id), round).await
    }

    async fn finalize(&self, id: [u8; 16], rounds: u64) -> Result<Handed> {
        self.0.finalize(MigrationId(id), rounds).await.map(handed)
    }

    async fn finalize_once(&self, id: [u8; 16]) -> Result<Handed> {
        self.0.finalize_once(MigrationId(id), 0).await.map(handed)
    }

    async fn confirm(&self, id: [u8; 16]) -> Result<()> {
        self.0.confirm(MigrationId(id)).await
    }

    async fn abort(&self, id: [u8; 16]) -> Result<()> {
        self.0.abort(MigrationId(id)).await
    }
}

fn handed(handover: Handover) -> Handed {
    let Handover { epoch, dirty, suspend, flush } = handover;
    Handed { epoch, dirty, suspend, flush }
}

/// A seeder over there.
struct GrpcPeer(SeederClient);

#[async_trait]
impl Peer for GrpcPeer {
    async fn describe(&self) -> Result<Description> {
        let Seeded { epoch, regions, precopy, busy, lease, revoked, last } = self.0.describe().await?;
        let facts = |SeededRegion { name, size, chunk_size }| RegionFacts { name, size, chunk_size };
        let ([revoked, last], regions) =
            ([revoked, last].map(|id| id.map(MigrationId)), regions.into_iter().map(facts));
        Ok(Description { epoch, regions: regions.collect(), precopy, busy, lease, revoked, last })
    }

    async fn track(&self, id: MigrationId, after: Option<MigrationId>) -> Result<()> {
        self.0.track(id.0, after.map(|id| id.0)).await
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

    fn region(&self, index: usize, id: MigrationId) -> Arc<dyn Backend> {
        self.0.region(index, id.0)
    }
}

#[cfg(test)]
mod tests {
    use r3map_core::ChunkSize;
    use r3map_local::Memory;
    use r3map_migrate::{Guarded, Secret, SeederParts};

    use super::*;

    #[tokio::test]
    async fn programs_in_go_need_the_secret_unless_the_user_says_that_they_do_not() {
        let region = Arc::new(Guarded::new(Arc::new(Memory::new(8192).unwrap()), ChunkSize::MIN).unwrap());
        for secret in [None, Some(Secret::new("sesame"))] {
            let parts = SeederParts { secret: secret.clone(), ..SeederParts::default() };
            let seeder = Seeder::new(vec![("a".into(), region.clone() as _)], parts).await.unwrap();
            for open_to_go in [false, true] {
                let seeding = GrpcSeeder { seeder: seeder.clone(), open_to_go };
                let lets_in = |service| match seeding.admit(b"", service) {
                    Ok(_) => true,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Denied);
                        false
                    }
                };
                assert_eq!(lets_in(Service::Go), secret.is_none() || open_to_go);
                assert_eq!(lets_in(Service::Own), secret.is_none());
                assert!(seeding.admit(b"sesame", Service::Own).is_ok());
            }
        }
    }

    #[tokio::test]
    async fn programs_in_go_are_kept_from_what_moves_as_one() {
        let region = || Arc::new(Guarded::new(Arc::new(Memory::new(8192).unwrap()), ChunkSize::MIN).unwrap()) as _;
        let regions = vec![("a".into(), region()), ("b".into(), region())];
        let seeder = Seeder::new(regions, SeederParts::default()).await.unwrap();
        let seeding = GrpcSeeder { seeder, open_to_go: true };
        assert_eq!(seeding.admit(b"", Service::Go).err().map(|error| error.kind()), Some(ErrorKind::Denied));
        assert!(seeding.admit(b"", Service::Own).is_ok());
    }
}
