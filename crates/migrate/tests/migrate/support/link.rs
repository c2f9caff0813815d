//! The link between two hosts, on which one thing goes wrong.

use std::future::{Future, pending};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_migrate::protocol::{Description, Handover, MigrationId};
use r3map_migrate::{Peer, Seeder};
use r3map_pipeline::BlockSet;
use tokio::sync::Notify;

use super::SIZE;
use super::disk::Life;

/// The calls of a migration, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    Describe,
    Track,
    ReadBefore,
    Dirty,
    Finalize,
    ReadAfter,
    Confirm,
    Abort,
}

impl Step {
    pub(crate) const ALL: [Self; 8] = [
        Self::Describe,
        Self::Track,
        Self::ReadBefore,
        Self::Dirty,
        Self::Finalize,
        Self::ReadAfter,
        Self::Confirm,
        Self::Abort,
    ];
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// It does not arrive.
    LinkCut,
    /// It is answered by a process that is just ending.
    Ending,
    /// It arrives, and its answer does not.
    ReplyLost,
    /// It does not arrive, and nobody says so.
    Silence,
    /// It arrives, and nobody answers.
    SilentReply,
    /// The seeder's process dies before it, or after it.
    SeederKilled { before: bool },
    /// The leecher's process dies likewise.
    LeecherKilled { before: bool },
    /// It arrives twice, the second time much later.
    Late,
    /// It arrives much later, when the leecher's process that made it is dead.
    LateOfTheDead,
    /// The leecher's disk is full from then on, for a while.
    DiskFull,
}

impl Fault {
    pub(crate) const ALL: [Self; 11] = [
        Self::LinkCut,
        Self::ReplyLost,
        Self::Silence,
        Self::SilentReply,
        Self::SeederKilled { before: true },
        Self::SeederKilled { before: false },
        Self::LeecherKilled { before: true },
        Self::LeecherKilled { before: false },
        Self::Late,
        Self::LateOfTheDead,
        Self::DiskFull,
    ];
}

/// What is wrong in answers that arrive.
#[derive(Default)]
pub(crate) struct Lies {
    pub(crate) lease: Option<Duration>,
    pub(crate) epoch: Option<u64>,
    /// The answer to finalize cannot be read.
    pub(crate) garbled: Option<ErrorKind>,
    /// It is as one in Go, which cannot say what was written before it suspends.
    pub(crate) go: bool,
}

/// The link, and the seeder at its other end.
pub(crate) struct Link {
    seeder: Mutex<Option<Seeder>>,
    step: Step,
    fault: Fault,
    /// Calls of that step that are let through first, and then how many are hit.
    skip: AtomicU32,
    hits: AtomicU32,
    pub(crate) kill_seeder: Notify,
    pub(crate) kill_leecher: Notify,
    pub(crate) fill_disk: Notify,
    /// Bytes that were read.
    pub(crate) read: AtomicU64,
    finalized: AtomicBool,
    pub(crate) struck: AtomicU32,
    half: Duration,
    pub(crate) lies: Mutex<Lies>,
}

impl Link {
    pub(crate) fn new(seeder: Seeder, step: Step, fault: Fault, skip: u32, hits: u32) -> Arc<Self> {
        Arc::new(Self {
            seeder: Mutex::new(Some(seeder)),
            step,
            fault,
            skip: AtomicU32::new(skip),
            hits: AtomicU32::new(hits),
            kill_seeder: Notify::new(),
            kill_leecher: Notify::new(),
            fill_disk: Notify::new(),
            read: AtomicU64::new(0),
            finalized: AtomicBool::new(false),
            struck: AtomicU32::new(0),
            half: Duration::from_millis(5),
            lies: Mutex::default(),
        })
    }

    pub(crate) fn healthy(seeder: Seeder) -> Arc<Self> {
        Self::new(seeder, Step::Describe, Fault::None, 0, 0)
    }

    /// Nothing goes wrong any more.
    pub(crate) fn heal(&self) {
        self.hits.store(0, Ordering::SeqCst);
    }

    /// Another process is there now, or none.
    pub(crate) fn connect(&self, seeder: Option<Seeder>) {
        *self.seeder.lock().unwrap() = seeder;
    }

    pub(crate) fn seeder(&self) -> Result<Seeder> {
        self.seeder.lock().unwrap().clone().ok_or_else(down)
    }

    fn strikes(&self, step: Step) -> Fault {
        if step != self.step || take(&self.skip) || !take(&self.hits) {
            return Fault::None;
        }
        self.struck.fetch_add(1, Ordering::SeqCst);
        self.fault
    }

    async fn call<T, F>(&self, step: Step, effect: impl Fn(Seeder) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        tokio::time::sleep(self.half).await;
        let call = async || effect(self.seeder()?).await;
        match self.strikes(step) {
            Fault::None => {}
            Fault::LinkCut => return Err(down()),
            Fault::Ending => return Err(Error::new(ErrorKind::Cancelled, Operation::Close, "the process is ending")),
            Fault::ReplyLost => return call().await.and(Err(down())),
            Fault::Silence => pending().await,
            Fault::SilentReply => {
                let _ = call().await;
                pending().await
            }
            Fault::SeederKilled { before } => {
                if !before {
                    let _ = call().await;
                }
                self.connect(None);
                self.kill_seeder.notify_one();
                return Err(down());
            }
            Fault::LeecherKilled { before } => {
                if !before {
                    let _ = call().await;
                }
                self.kill_leecher.notify_one();
                pending().await
            }
            Fault::Late => much_later(effect(self.seeder()?)),
            Fault::LateOfTheDead => {
                much_later(effect(self.seeder()?));
                self.kill_leecher.notify_one();
                pending().await
            }
            Fault::DiskFull => {
                self.fill_disk.notify_one();
                tokio::task::yield_now().await;
            }
        }
        let answer = call().await;
        tokio::time::sleep(self.half).await;
        answer
    }
}

fn much_later<T: Send + 'static>(effect: impl Future<Output = Result<T>> + Send + 'static) {
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let _ = effect.await;
    });
}

fn take(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn down() -> Error {
    Error::new(ErrorKind::Unavailable, Operation::Open, "nobody answers")
}

/// The link as a leecher has it.
#[derive(Clone)]
pub(crate) struct End(pub(crate) Arc<Link>);

/// The same in a process that makes no call when it is dead. What it asked before may still arrive.
#[derive(Clone)]
pub(crate) struct MortalEnd(pub(crate) Arc<Link>, pub(crate) Arc<Life>);

impl MortalEnd {
    async fn end(&self) -> End {
        match self.1.is_dead() {
            true => pending().await,
            false => End(self.0.clone()),
        }
    }
}

#[async_trait]
impl Peer for MortalEnd {
    async fn describe(&self) -> Result<Description> {
        self.end().await.describe().await
    }

    async fn track(&self, id: MigrationId, after: Option<MigrationId>) -> Result<()> {
        self.end().await.track(id, after).await
    }

    async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>> {
        self.end().await.dirty(id, round).await
    }

    async fn finalize(&self, id: MigrationId, rounds: u64) -> Result<Handover> {
        self.end().await.finalize(id, rounds).await
    }

    async fn confirm(&self, id: MigrationId) -> Result<()> {
        self.end().await.confirm(id).await
    }

    async fn abort(&self, id: MigrationId) -> Result<()> {
        self.end().await.abort(id).await
    }

    fn region(&self, index: usize, id: MigrationId) -> Arc<dyn Backend> {
        End(self.0.clone()).region(index, id)
    }
}

#[async_trait]
impl Peer for End {
    async fn describe(&self) -> Result<Description> {
        let mut description = self.0.call(Step::Describe, |seeder| async move { seeder.describe().await }).await?;
        let lies = self.0.lies.lock().unwrap();
        description.lease = lies.lease.or(description.lease);
        description.epoch = lies.epoch.unwrap_or(description.epoch);
        description.precopy &= !lies.go;
        Ok(description)
    }

    async fn track(&self, id: MigrationId, after: Option<MigrationId>) -> Result<()> {
        self.0.call(Step::Track, move |seeder| async move { seeder.admit(b"")?.track(id, after).await }).await
    }

    async fn dirty(&self, id: MigrationId, round: u64) -> Result<Vec<BlockSet>> {
        self.0.call(Step::Dirty, move |seeder| async move { seeder.admit(b"")?.dirty(id, round).await }).await
    }

    async fn finalize(&self, id: MigrationId, rounds: u64) -> Result<Handover> {
        let finalize = move |seeder: Seeder| async move { seeder.admit(b"")?.finalize(id, rounds).await };
        let answer = self.0.call(Step::Finalize, finalize).await;
        self.0.finalized.fetch_or(answer.is_ok(), Ordering::SeqCst);
        let lies = self.0.lies.lock().unwrap();
        match lies.garbled {
            Some(kind) => Err(Error::new(kind, Operation::Close, "an answer that cannot be read")),
            None => answer.map(|answer| Handover { epoch: lies.epoch.unwrap_or(answer.epoch), ..answer }),
        }
    }

    async fn confirm(&self, id: MigrationId) -> Result<()> {
        self.0.call(Step::Confirm, move |seeder| async move { seeder.admit(b"")?.confirm(id).await }).await
    }

    async fn abort(&self, id: MigrationId) -> Result<()> {
        self.0.call(Step::Abort, move |seeder| async move { seeder.admit(b"")?.abort(id).await }).await
    }

    fn region(&self, index: usize, id: MigrationId) -> Arc<dyn Backend> {
        Arc::new(Remote { link: self.0.clone(), index, id })
    }
}

/// A region over the link.
struct Remote {
    link: Arc<Link>,
    index: usize,
    /// The migration for which whoever reads does so.
    id: MigrationId,
}

#[async_trait]
impl Backend for Remote {
    fn size(&self) -> u64 {
        SIZE
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let step = if self.link.finalized.load(Ordering::SeqCst) { Step::ReadAfter } else { Step::ReadBefore };
        let (index, len, id) = (self.index, buf.len(), self.id);
        let read = move |seeder: Seeder| async move {
            let (reader, mut bytes) = (seeder.admit(b"")?, vec![0; len]);
            reader.heard(id)?;
            seeder.region(index).read_at(offset, &mut bytes).await?;
            reader.heard(id)?;
            Ok(bytes)
        };
        buf.copy_from_slice(&self.link.call(step, read).await?);
        self.link.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        Ok(())
    }

    async fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        panic!("a leecher writes nothing to a seeder")
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}
