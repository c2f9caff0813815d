//! The connections of a client: opens them when they are needed, again after they broke, and makes sure that what is
//! behind them is still the same region.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::future::{BoxFuture, FutureExt, Shared};
use r3map_core::{Error, ErrorKind, Operation, Result};
use tokio::runtime::Handle;

use crate::client::ClientSettings;
use crate::client::facts::{Facts, describe};
use crate::client::link::Link;
use crate::pass::Pass;
use crate::target::Target;

/// A client's links. The first of them carries everything but reads, so that what one caller does after another reaches
/// the server in that order.
#[derive(Debug)]
pub(crate) struct Links {
    opener: Arc<Opener>,
    slots: Vec<Slot>,
    next: AtomicUsize,
}

#[derive(Debug)]
struct Slot {
    /// Names the link to the server, over one connection after another.
    id: [u8; 16],
    /// The link, or the attempt to open it that everyone waits for.
    link: Mutex<Option<Opening>>,
}

type Opening = Shared<BoxFuture<'static, Result<Arc<OpenLink>>>>;

/// A link and what answered at its other end.
#[derive(Debug)]
pub(crate) struct OpenLink {
    pub(crate) link: Arc<Link>,
    /// Different for each connection.
    pub(crate) serial: u128,
}

#[derive(Debug)]
struct Opener {
    target: Target,
    settings: ClientSettings,
    pass: Arc<Pass>,
    runtime: Handle,
    facts: OnceLock<Facts>,
    /// Counts attempts to connect.
    serial: AtomicU64,
    /// What moved over connections that are no more.
    moved: AtomicU64,
}

impl Links {
    /// Opens the first link.
    ///
    /// # Errors
    /// As [`crate::Client::connect`].
    pub(crate) async fn open(target: Target, settings: ClientSettings, pass: Arc<Pass>) -> Result<(Self, Facts)> {
        let slots = (0..settings.connections.get()).map(|_| Slot { id: random(), link: Mutex::default() }).collect();
        let opener = Opener {
            target,
            settings,
            pass,
            runtime: Handle::current(),
            facts: OnceLock::new(),
            serial: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        };
        let links = Self { opener: Arc::new(opener), slots, next: AtomicUsize::new(0) };
        links.first(Operation::Open).await?;
        let facts = links.opener.facts.get().cloned();
        Ok((links, facts.expect("an open link has told them")))
    }

    pub(crate) fn target(&self) -> &Target {
        &self.opener.target
    }

    /// How a Go server is read.
    pub(crate) fn go_read(&self) -> &'static str {
        self.opener.settings.go_read()
    }

    /// The runtime that the connections live on.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.opener.runtime
    }

    /// Bytes that have moved over all of the connections so far.
    pub(crate) fn moved(&self) -> u64 {
        let open = self.slots.iter().filter_map(|slot| lock(&slot.link).as_ref()?.clone().now_or_never()?.ok());
        let now: u64 = open.map(|open| open.link.moved()).sum();
        now + self.opener.moved.load(Ordering::Relaxed)
    }

    /// The link for everything but reads.
    ///
    /// # Errors
    /// `Unavailable` if there is no connection and none can be made now; `Conflict` if another region is there now.
    pub(crate) async fn first(&self, operation: Operation) -> Result<Arc<OpenLink>> {
        self.slots[0].link(&self.opener, operation).await
    }

    /// The next link in turn, for a read.
    ///
    /// # Errors
    /// As [`Self::first`].
    pub(crate) async fn next(&self, operation: Operation) -> Result<Arc<OpenLink>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        self.slots[turn].link(&self.opener, operation).await
    }
}

impl Slot {
    async fn link(&self, opener: &Arc<Opener>, operation: Operation) -> Result<Arc<OpenLink>> {
        let result = self.opening(opener).await;
        result.map_err(|error| Error::new(error.kind(), operation, error.reason()))
    }

    /// What is being waited for, or a new attempt if the last one failed or its link has broken since.
    fn opening(&self, opener: &Arc<Opener>) -> Opening {
        let mut slot = lock(&self.link);
        if let Some(opening) = &*slot {
            match opening.clone().now_or_never() {
                Some(Ok(open)) if !open.link.is_open() => {
                    opener.moved.fetch_add(open.link.moved(), Ordering::Relaxed);
                }
                Some(Err(_)) => {}
                Some(Ok(_)) | None => return opening.clone(),
            }
        }
        let attempt = opener.runtime.spawn(opener.clone().open(self.id));
        let opening = attempt.map(|result| result.unwrap_or_else(|_| Err(shut_down()))).boxed().shared();
        slot.insert(opening).clone()
    }
}

impl Opener {
    async fn open(self: Arc<Self>, id: [u8; 16]) -> Result<Arc<OpenLink>> {
        let limit = self.settings.connect_timeout;
        tokio::time::timeout(limit, self.open_unlimited(id)).await.unwrap_or_else(|_| {
            let message = format!("{} does not answer within {} s", self.target, limit.as_secs_f32());
            Err(Error::new(ErrorKind::Unavailable, Operation::Open, message))
        })
    }

    async fn open_unlimited(&self, id: [u8; 16]) -> Result<Arc<OpenLink>> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let link = Arc::new(Link::open(&self.target, self.settings.region, self.pass.clone()).await?);
        let facts = describe(&link, id, serial, &self.settings).await?;
        self.facts.get_or_init(|| facts.clone()).same_region(&facts, &self.target)?;
        if facts.is_ours() {
            link.watch(self.settings.keep_alive);
        }
        Ok(Arc::new(OpenLink { link, serial: serial.into() }))
    }
}

fn shut_down() -> Error {
    Error::new(ErrorKind::Cancelled, Operation::Open, "the runtime that the client was connected on has shut down")
}

/// Sixteen random bytes.
pub(crate) fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    bytes
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
