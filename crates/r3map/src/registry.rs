//! One table of what the schemes of a [`Uri`] mean: how to open each, and how to serve on it.
//!
//! Families of backends and transports only add a line here; nobody else looks at a scheme.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_pipeline::{Aligned, Chunked, Losses};

use crate::Uri;

/// What a scheme needs to know to open a region, beyond its [`Uri`].
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The region's size in bytes, where the resource does not know it or is to be created.
    pub size: Option<u64>,
    /// The chunk size, where the resource does not know it or is to be created.
    pub chunk_size: Option<ChunkSize>,
    /// Refuse writing; needs no right to write.
    pub read_only: bool,
    /// Create the resource if it does not exist; needs `size`.
    pub create: bool,
}

impl OpenOptions {
    /// The size from the options or from the name's `size=`, which must agree if both are given.
    ///
    /// # Errors
    /// `InvalidInput` if they differ.
    pub fn size_for(&self, uri: &Uri) -> Result<Option<u64>> {
        agree(uri, "size", self.size, uri.size("size")?)
    }

    /// The chunk size from the options or from the name's `chunk=`, which must agree if both are given.
    ///
    /// # Errors
    /// `InvalidInput` if they differ.
    pub fn chunk_for(&self, uri: &Uri) -> Result<Option<ChunkSize>> {
        agree(uri, "chunk", self.chunk_size, uri.chunk_size("chunk")?)
    }

    /// As [`Self::size_for`], where it must be known.
    ///
    /// # Errors
    /// `InvalidInput` if it is not given.
    pub fn need_size(&self, uri: &Uri) -> Result<u64> {
        self.size_for(uri)?.ok_or_else(|| uri.invalid("its size is not known; give it with --size or as ?size=1GiB"))
    }
}

/// `backend`, taking the requests that clients of a server with these options make.
fn chunked(backend: Arc<dyn Backend>, options: &ListenOptions) -> Result<Arc<dyn Backend>> {
    let access = backend.capabilities().access;
    Ok(match (options.chunking, access) {
        (Chunking::Server, Access::Any) => backend,
        (Chunking::Server, Access::WholeChunks(_)) => Arc::new(Aligned::new(backend)?),
        (Chunking::Client, Access::WholeChunks(chunk)) if options.chunk_size.is_none_or(|asked| asked == chunk) => {
            backend
        }
        (Chunking::Client, _) => {
            let chunk = options.chunk_size.unwrap_or_default();
            Arc::new(Chunked::new(backend, chunk, MAX_REQUEST)?)
        }
    })
}

/// The longest request of whole chunks that a server takes, in bytes.
const MAX_REQUEST: u64 = 64 << 20;

fn agree<T: PartialEq>(uri: &Uri, what: &str, option: Option<T>, named: Option<T>) -> Result<Option<T>> {
    match (option, named) {
        (Some(a), Some(b)) if a != b => Err(uri.invalid(&format!("{what} is given twice, and differs"))),
        (option, named) => Ok(option.or(named)),
    }
}

/// Who cuts requests into whole chunks, for a resource that is kept in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Chunking {
    /// The server: clients read and write what they like. A write of part of a chunk costs the server a read of it.
    #[default]
    Server,
    /// Clients: the server refuses whatever is not whole chunks. Clients of r3map know; others must be told.
    Client,
}

/// How a server behaves.
#[derive(Debug, Clone, Default)]
pub struct ListenOptions {
    /// Refuse whatever would change the region.
    pub read_only: bool,
    /// The chunk size that clients are told to use.
    pub chunk_size: Option<ChunkSize>,
    /// What the region is called for as long as its bytes live, so that clients notice another one in its place; see
    /// [`Registry::identity`].
    pub identity: Option<String>,
    /// Who cuts requests into whole chunks. Default the server.
    pub chunking: Chunking,
}

/// A region that is looked at and not used.
#[derive(Clone)]
pub struct Look {
    /// Opened read-only where that can be asked for.
    pub backend: Arc<dyn Backend>,
    /// Whether this process could write it, if it opened it for that and nobody else used it.
    pub writable: bool,
}

/// Opens the regions of one scheme.
#[async_trait]
pub trait Open: Send + Sync {
    /// Opens the region that `uri` names. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// One line that names the resource and says what to do.
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>>;

    /// Opens the region that `uri` names to see what it is, without using it: nothing is made or changed, and nobody is
    /// kept out. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// As [`Self::open`].
    async fn look(&self, uri: &Uri, options: &OpenOptions) -> Result<Look> {
        let options = OpenOptions { read_only: true, create: false, ..options.clone() };
        let backend = self.open(uri, &options).await?;
        let writable = !backend.capabilities().read_only;
        Ok(Look { backend, writable })
    }

    /// What stays the same for as long as the bytes that `uri` names live; `None` if they end with this process.
    fn identity(&self, uri: &Uri) -> Option<String> {
        Some(uri.to_string())
    }
}

/// Serves regions on one scheme.
#[async_trait]
pub trait Listen: Send + Sync {
    /// Serves `backend` at `uri` until the listener is shut down. Runs on the [engine](crate::engine).
    ///
    /// # Errors
    /// One line that names the address and says what to do.
    async fn listen(&self, uri: &Uri, backend: Arc<dyn Backend>, options: &ListenOptions) -> Result<Box<dyn Listener>>;
}

/// A server that is running.
#[async_trait]
pub trait Listener: Send + Sync {
    /// Where it can be reached, as a name that a client can use; port 0 has become a real one.
    fn uri(&self) -> String;

    /// Takes no new requests, finishes those in flight (with a time limit), and ends. It does not flush the backend.
    ///
    /// # Errors
    /// When requests had to be given up.
    async fn shutdown(self: Box<Self>) -> Result<()>;
}

/// What one scheme means.
#[derive(Clone)]
pub struct Family {
    /// The scheme, in lower case.
    pub scheme: &'static str,
    /// What a name of it looks like, for messages and help.
    pub example: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// How to open it.
    pub open: Arc<dyn Open>,
    /// How to serve on it, where that can be done.
    pub listen: Option<Arc<dyn Listen>>,
}

/// All schemes that a program knows.
#[derive(Clone, Default)]
pub struct Registry {
    families: BTreeMap<&'static str, Family>,
    #[cfg(all(feature = "file", feature = "slice"))]
    carriers: BTreeMap<&'static str, Arc<dyn crate::migration::Carry>>,
}

impl Registry {
    /// No schemes at all.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// Every scheme that this build has.
    #[must_use]
    pub fn standard() -> Self {
        let mut registry = Self::empty();
        crate::families::register(&mut registry);
        registry
    }

    /// Adds a scheme, or replaces it.
    pub fn register(&mut self, family: Family) {
        self.families.insert(family.scheme, family);
    }

    /// Has the transport of a scheme carry migrations too.
    #[cfg(all(feature = "file", feature = "slice"))]
    pub fn register_carrier(&mut self, scheme: &'static str, carrier: Arc<dyn crate::migration::Carry>) {
        self.carriers.insert(scheme, carrier);
    }

    #[cfg(all(feature = "file", feature = "slice"))]
    pub(crate) fn carry(&self, uri: &Uri) -> Result<Arc<dyn crate::migration::Carry>> {
        self.carriers.get(uri.scheme()).cloned().ok_or_else(|| {
            let known: Vec<_> = self.carriers.keys().map(|scheme| format!("{scheme}://")).collect();
            uri.invalid(&format!("no region can be migrated over it; it takes: {}", known.join(", ")))
        })
    }

    /// The schemes, in alphabetical order.
    pub fn families(&self) -> impl Iterator<Item = &Family> {
        self.families.values()
    }

    /// Opens the region that `uri` names, on the [engine](crate::engine).
    ///
    /// # Errors
    /// `InvalidInput` for a scheme that this build does not have; otherwise what the scheme says.
    pub async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        let (open, uri, options) = (self.family(uri)?.open.clone(), uri.clone(), options.clone());
        crate::engine::run(async move { open.open(&uri, &options).await }).await
    }

    /// Opens the region that `uri` names to see what it is, on the [engine](crate::engine): nothing is made or changed, and
    /// nobody is kept out.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn look(&self, uri: &Uri, options: &OpenOptions) -> Result<Look> {
        let (open, uri, options) = (self.family(uri)?.open.clone(), uri.clone(), options.clone());
        crate::engine::run(async move { open.look(&uri, &options).await }).await
    }

    /// Serves `backend` at each of `uris`, on the [engine](crate::engine), in that order. One backend has one call of
    /// this: requests are cut into chunks in one place for all of them, and each listener's clients hear of what it loses.
    ///
    /// # Errors
    /// `InvalidInput` for a scheme that cannot be served on; otherwise what the scheme says. Nothing is served then.
    pub async fn listen(
        &self,
        uris: &[Uri],
        backend: Arc<dyn Backend>,
        options: &ListenOptions,
    ) -> Result<Vec<Box<dyn Listener>>> {
        let shared = Losses::new(chunked(backend, options)?);
        let mut listeners = Vec::new();
        for uri in uris {
            listeners.push(self.listen_at(uri, Arc::new(shared.user()), options).await?);
        }
        Ok(listeners)
    }

    async fn listen_at(
        &self,
        uri: &Uri,
        backend: Arc<dyn Backend>,
        options: &ListenOptions,
    ) -> Result<Box<dyn Listener>> {
        let listen = self.family(uri)?.listen.clone().ok_or_else(|| {
            let known: Vec<_> = self.families().filter(|f| f.listen.is_some()).map(|f| f.example).collect();
            uri.invalid(&format!("cannot listen there; it takes: {}", known.join(", ")))
        })?;
        let (uri, options) = (uri.clone(), options.clone());
        crate::engine::run(async move { listen.listen(&uri, backend, &options).await }).await
    }

    /// What stays the same for as long as the bytes that `uri` names live; `None` if they end with this process.
    ///
    /// # Errors
    /// `InvalidInput` for a scheme that this build does not have.
    pub fn identity(&self, uri: &Uri) -> Result<Option<String>> {
        Ok(self.family(uri)?.open.identity(uri))
    }

    fn family(&self, uri: &Uri) -> Result<&Family> {
        self.families.get(uri.scheme()).ok_or_else(|| {
            let known: Vec<_> = self.families().map(|family| family.example).collect();
            let message = format!("unknown scheme {:?}; known are: {}", uri.scheme(), known.join(", "));
            Error::new(ErrorKind::InvalidInput, Operation::Open, message)
        })
    }
}
