//! A backend that several use who do not know of one another, as the clients of a server do.
//!
//! A remote that died with writes which were not flushed says so once, to the next flush, whoever asks for it. Here
//! everybody hears of it: by [counting](Losses::count) for those who know when their writes were acknowledged, by a
//! [user](Losses::user) of his own for the others.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use r3map_core::{Backend, Capabilities, Error, ErrorKind, Operation, Result};

use crate::folded::Folded;

/// A backend, and how often it has lost something: how many of its flushes have failed as a conflict.
pub struct Losses {
    inner: Arc<dyn Backend>,
    count: AtomicU64,
    /// The last of these failures.
    told: Mutex<Option<Error>>,
    /// One at a time: one that began after another had been told of a loss, and before that was counted, would be told
    /// that all is well.
    flushes: Folded<Result<u64>>,
}

impl Losses {
    /// Of `inner`, of which nothing is lost yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>) -> Arc<Self> {
        Arc::new(Self { inner, count: AtomicU64::new(0), told: Mutex::default(), flushes: Folded::default() })
    }

    /// How often something was lost so far. A write that begins after one count, and is acknowledged, may be lost if there
    /// is another when it is flushed.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Flushes, and answers the count. What was acknowledged before is durable, but for writes that began at another count.
    ///
    /// # Errors
    /// Those of the backend, but for the conflicts that are counted.
    pub async fn flush(&self) -> Result<u64> {
        let flush = async || match self.inner.flush().await {
            Err(error) if error.kind() == ErrorKind::Conflict => {
                *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                Ok(self.count.fetch_add(1, Ordering::SeqCst) + 1)
            }
            flushed => flushed.map(|()| self.count()),
        };
        self.flushes.flush(flush).await
    }

    /// Somebody who hears of what is lost from now on, whether he has written anything or not.
    #[must_use]
    pub fn user(self: &Arc<Self>) -> User {
        User { losses: self.clone(), heard: AtomicU64::new(self.count()) }
    }

    fn told(&self) -> Error {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        told.unwrap_or_else(|| Error::new(ErrorKind::Conflict, Operation::Flush, "something may be lost"))
    }
}

/// One of those who use a backend. Its flush fails, once, when somebody's has been told of a loss since it was told itself.
pub struct User {
    losses: Arc<Losses>,
    /// The count that it was told of.
    heard: AtomicU64,
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("heard", &self.heard).finish_non_exhaustive()
    }
}

impl User {
    /// A change, and a flush that answers for it alone: of what was lost before the next flush tells all the same.
    ///
    /// # Errors
    /// Those of the change; as [`Backend::flush`], if it may be lost.
    pub async fn durably(&self, change: impl Future<Output = Result<()>>) -> Result<()> {
        let before = self.losses.count();
        change.await?;
        if self.losses.flush().await? == before { Ok(()) } else { Err(self.losses.told()) }
    }
}

#[async_trait]
impl Backend for User {
    fn size(&self) -> u64 {
        self.losses.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        self.losses.inner.capabilities()
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.losses.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.losses.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        let heard = self.heard.load(Ordering::SeqCst);
        let count = self.losses.flush().await?;
        if count == heard {
            return Ok(());
        }
        self.heard.fetch_max(count, Ordering::SeqCst);
        Err(self.losses.told())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use r3map_testkit::faults::{Faults, Pause, Rule};
    use r3map_testkit::store::Store;
    use r3map_testkit::{conformance, deadline};

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    fn losses() -> (Arc<Faults>, Arc<Losses>) {
        let faults = Faults::new(Arc::new(Store::new(8192)));
        (faults.clone(), Losses::new(faults))
    }

    /// The next flush is told of a loss, as by a remote that was restarted.
    fn lose(faults: &Faults) {
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
    }

    fn conflict(flushed: Result<()>) {
        assert_eq!(flushed.unwrap_err().kind(), ErrorKind::Conflict);
    }

    #[tokio::test]
    async fn a_user_conforms() {
        conformance::backend(async || Arc::new(Losses::new(Arc::new(Store::new(100_001))).user()) as _).await;
    }

    #[tokio::test]
    async fn every_user_hears_of_every_loss_once() {
        let (faults, losses) = losses();
        let users = [losses.user(), losses.user()];
        lose(&faults);
        let write = async |user: &User| user.durably(std::future::ready(Ok(()))).await;
        conflict(write(&users[0]).await);
        for user in &users {
            // What is written afterwards is there.
            write(user).await.unwrap();
            write(user).await.unwrap();
            conflict(user.flush().await);
            user.flush().await.unwrap();
            write(user).await.unwrap();
        }
        losses.user().flush().await.expect("it came afterwards");
        for _ in 0..2 {
            lose(&faults);
            conflict(users[0].flush().await);
        }
        conflict(users[1].flush().await);
        users[1].flush().await.unwrap();
    }

    #[tokio::test]
    async fn other_failures_are_told_to_whoever_asks_and_are_no_loss() {
        let (faults, losses) = losses();
        let (one, other) = (losses.user(), losses.user());
        faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Unavailable));
        assert_eq!(one.flush().await.unwrap_err().kind(), ErrorKind::Unavailable);
        other.flush().await.unwrap();
        assert_eq!(losses.count(), 0);
    }

    #[tokio::test]
    async fn nobody_is_told_that_all_is_well_between_a_loss_and_its_being_counted() {
        let inner = Faults::new(Arc::new(Store::new(8192)));
        let faults = Faults::new(inner.clone());
        let losses = Losses::new(faults.clone());
        let pause = Pause::new();
        faults.add(Rule::on(Operation::Flush).times(1).hold(&pause));
        lose(&inner);
        let flush = |user: User| tokio::spawn(async move { user.flush().await });
        let first = flush(losses.user());
        pause.wait_held(1).await;
        let others: Vec<_> = (0..5).map(|_| flush(losses.user())).collect();
        while losses.flushes.asked() < 6 {
            tokio::task::yield_now().await;
        }
        pause.release();
        for flushed in others.into_iter().chain([first]) {
            conflict(deadline(SOON, "a flush", flushed).await.unwrap());
        }
        assert_eq!((losses.count(), faults.count(Operation::Flush)), (1, 2));
    }
}
