//! Any backend as read-only memory, with no daemon, no background work and no settings that must be known: the whole
//! of a page-fault mapper.

use std::num::NonZeroUsize;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Access, Backend, ChunkSize, Error, Geometry, Operation, Piece, RangeLock, Result};
use r3map_pipeline::InstallNow;
use r3map_sys::{FaultScope, Mapping, Protection, ScopeWanted};

use crate::pages::Pages;
use crate::runtime::Background;
use crate::server::{Demand, Demanded, Handler, Server};

/// A backend's bytes as `&[u8]`, read chunk by chunk when they are first touched.
///
/// Touching bytes that the backend cannot give raises SIGBUS, as for a mapped file whose disk fails; after a second
/// they are asked for anew. The memory is not inherited by a forked child, which gets a segmentation fault.
#[derive(Debug)]
pub struct Map {
    // Dropped in this order: serving ends before the memory does.
    _server: Server,
    mapping: Mapping,
    _background: Background,
}

impl Map {
    /// Maps all of `backend`. Nothing is read yet.
    ///
    /// # Errors
    /// `Denied` where the kernel forbids this process to handle page faults, naming what to change; `Exhausted` when
    /// there is no room in the address space.
    pub fn open(backend: Arc<dyn Backend>) -> Result<Self> {
        let size = backend.size();
        let background = Background::new(None, NonZeroUsize::MIN)?;
        let mapping = Mapping::new(size, Protection::ReadOnly, ScopeWanted::Widest)
            .map_err(|error| Error::from_io(Operation::Mount, "cannot map the region into memory", error))?;
        let geometry = Geometry::new(size, chunk_size(&*backend))?;
        let pages = Pages::new(mapping.pager().clone());
        let handler = Handler {
            pager: mapping.pager().clone(),
            demand: Arc::new(OnDemand(Arc::new(Source { backend, pages, geometry, reading: RangeLock::new() }))),
            runtime: background.handle().clone(),
            heal_after: Duration::from_secs(1),
        };
        let server = Server::start(handler, NonZeroUsize::MIN)?;
        Ok(Self { _server: server, mapping, _background: background })
    }

    /// Whose accesses wait for missing bytes: where it is [`FaultScope::UserOnly`], a system call that is given bytes
    /// which were never touched fails with EFAULT.
    #[must_use]
    pub fn scope(&self) -> FaultScope {
        self.mapping.pager().scope()
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.mapping.as_slice()
    }
}

fn chunk_size(backend: &dyn Backend) -> ChunkSize {
    let capabilities = backend.capabilities();
    match capabilities.access {
        Access::WholeChunks(chunk) => chunk,
        Access::Any => capabilities.preferred_chunk.unwrap_or_default(),
    }
}

struct OnDemand(Arc<Source>);

struct Source {
    backend: Arc<dyn Backend>,
    pages: Pages,
    geometry: Geometry,
    reading: RangeLock,
}

impl Demand for OnDemand {
    fn demand(&self, range: Range<u64>) -> Demanded {
        let source = self.0.clone();
        Box::pin(async move { source.bring(range).await })
    }
}

impl Source {
    /// Installs the chunks that a range touches. Who comes second to a chunk waits, and finds it there.
    async fn bring(&self, range: Range<u64>) -> Result<()> {
        let range = self.geometry.chunks_range(&self.geometry.chunks_touched(&range));
        let _reading = self.reading.lock(range.clone()).await;
        if self.pages.is_present(&range)? {
            return Ok(());
        }
        let chunks = range.end - range.start;
        let mut bytes = vec![0; usize::try_from(chunks).unwrap_or(usize::MAX)];
        self.backend.read_at(range.start, &mut bytes).await?;
        self.pages.install_now(range.start, Piece::Data(&bytes))
    }
}
