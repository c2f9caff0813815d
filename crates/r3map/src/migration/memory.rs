//! Memory as a region that can leave.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{BLOCK_SIZE, Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_migrate::{Fencing, Source};
use r3map_pipeline::BlockSet;
use r3map_slice::SliceHandle;
use tokio::sync::{Mutex, oneshot};
use tokio::task::{JoinError, JoinHandle};

/// A slice that can leave: what is written is found in the mapping, and writing is ended by its protection.
///
/// Looking for what was written takes a fraction of a millisecond for a GiB, changing the protection of all pages a
/// hundred times as long. An application that has said that it writes no more waits for the first and not for the second:
/// the pages are protected so that a write would be noticed. One that has not said so waits for both.
pub(crate) struct SliceSource {
    handle: SliceHandle,
    fence: Arc<Mutex<Fence>>,
    /// Held while a fence is set or lifted: one that is lifted for longer than anybody waits must not take the next one
    /// with it.
    turn: Arc<Mutex<()>>,
}

/// How writing is ended.
#[derive(Default)]
struct Fence {
    /// It is, or is about to be.
    set: bool,
    /// Changes the protection.
    protecting: Option<JoinHandle<Result<()>>>,
    /// When that is done, nothing is recorded any more.
    untrack: bool,
    /// What was written last, and not taken yet.
    last: BlockSet,
}

impl SliceSource {
    pub(crate) fn new(handle: SliceHandle) -> Self {
        Self { handle, fence: Arc::default(), turn: Arc::default() }
    }
}

/// Changes the protection, and looks whether somebody has written who had said that he would not.
async fn protect(handle: SliceHandle, fence: Arc<Mutex<Fence>>, begins: oneshot::Sender<()>) -> Result<()> {
    let memory = handle.clone();
    let freezing = crate::engine::handle().spawn_blocking(move || {
        let _ = begins.send(());
        memory.freeze_gently()
    });
    if let Err(error) = ended(freezing.await) {
        tracing::error!(%error, "memory that has left can be written here");
    }
    let mut fence = fence.lock().await;
    match handle.take_written().await {
        Ok(late) if !late.is_empty() => {
            let bytes = late.len() * BLOCK_SIZE;
            tracing::error!(bytes, "the application wrote after it was suspended; it is not where the region is now");
            fence.last.union(&late);
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "it is not known whether the application wrote after it was suspended"),
    }
    if std::mem::take(&mut fence.untrack) {
        handle.untrack();
    }
    fence.protecting = None;
    Ok(())
}

/// How a blocking call ended.
fn ended(call: Result<Result<()>, JoinError>) -> Result<()> {
    call.unwrap_or_else(|error| {
        let message = "the memory's protection was not changed: it panicked, or the engine has ended";
        Err(Error::new(ErrorKind::Internal, Operation::Close, message).with_source(error))
    })
}

impl SliceSource {
    /// Protects all pages, then looks what was written before each of them was.
    async fn fence_strictly(&self) -> Result<()> {
        let mut fence = self.fence.lock().await;
        let memory = self.handle.clone();
        // If nobody waits for it any more, who lifts the fence does.
        let freezing = fence.protecting.insert(crate::engine::handle().spawn_blocking(move || memory.freeze()));
        let frozen = ended(freezing.await);
        fence.protecting = None;
        frozen?;
        let written = self.handle.take_written().await?;
        fence.last.union(&written);
        fence.set = true;
        Ok(())
    }

    /// Looks what was written, and protects all pages behind that.
    async fn fence_trusting(&self) -> Result<()> {
        let mut fence = self.fence.lock().await;
        let written = self.handle.take_written().await?;
        fence.last.union(&written);
        let (begins, begun) = oneshot::channel();
        let protecting = protect(self.handle.clone(), self.fence.clone(), begins);
        (fence.set, fence.protecting) = (true, Some(crate::engine::handle().spawn(protecting)));
        drop(fence);
        let _ = begun.await; // without an answer the engine has ended, and with it everything
        Ok(())
    }
}

#[async_trait]
impl Source for SliceSource {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(self.handle.clone())
    }

    fn chunk_size(&self) -> ChunkSize {
        self.handle.geometry().chunk_size()
    }

    async fn track(&self) -> Result<()> {
        self.handle.track().await
    }

    async fn take(&self) -> Result<BlockSet> {
        let mut fence = self.fence.lock().await;
        if !fence.set {
            let written = self.handle.take_written().await?;
            fence.last.union(&written);
        }
        Ok(std::mem::take(&mut fence.last))
    }

    async fn untrack(&self) {
        let mut fence = self.fence.lock().await;
        match fence.protecting {
            Some(_) => fence.untrack = true,
            None => self.handle.untrack(),
        }
    }

    /// No kernel holds anything: the memory itself is read.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn fence(&self, fencing: Fencing) -> Result<()> {
        let _turn = self.turn.lock().await;
        match fencing {
            Fencing::Strict => self.fence_strictly().await,
            Fencing::Trusting => self.fence_trusting().await,
        }
    }

    async fn unfence(&self) {
        let (handle, fence, turn) = (self.handle.clone(), self.fence.clone(), self.turn.clone());
        // Whoever does not wait for it any more must not leave memory behind that stays read-only.
        let lifting = crate::engine::handle().spawn(async move {
            let _turn = turn.lock().await;
            let protecting = fence.lock().await.protecting.take();
            if let Some(protecting) = protecting {
                let _ = protecting.await; // it says by itself what went wrong
            }
            let mut fence = fence.lock().await;
            if let Err(error) = handle.thaw() {
                tracing::error!(%error, "the memory stays read-only");
            }
            fence.set = false;
        });
        if let Err(error) = lifting.await {
            tracing::error!(%error, "the memory stays read-only");
        }
    }
}

#[cfg(test)]
mod tests {
    use r3map_local::Memory;
    use r3map_slice::{Slice, SliceParts, SliceSettings};

    use super::*;

    fn slice() -> (Slice, SliceSource) {
        let zeros = Arc::new(Memory::new(1 << 20).unwrap());
        let mut slice = Slice::open(zeros, SliceSettings::direct(), SliceParts::default()).unwrap();
        slice.as_mut_slice().unwrap().fill(1);
        let source = SliceSource::new(slice.handle());
        (slice, source)
    }

    fn write(slice: &mut Slice, block: usize) {
        slice.as_mut_slice().unwrap()[block << 12] = 2;
    }

    fn blocks(taken: &BlockSet) -> Vec<u64> {
        taken.runs().flatten().collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_written_is_taken_once_whether_there_is_a_fence_or_not() {
        for fencing in [Fencing::Strict, Fencing::Trusting] {
            let (mut slice, source) = slice();
            source.track().await.unwrap();
            write(&mut slice, 5);
            assert_eq!(blocks(&source.take().await.unwrap()), [5]);
            write(&mut slice, 7);
            source.fence(fencing).await.unwrap();
            assert_eq!(blocks(&source.take().await.unwrap()), [7]);
            assert!(source.take().await.unwrap().is_empty());
            source.unfence().await;
            write(&mut slice, 9);
            assert_eq!(blocks(&source.take().await.unwrap()), [9], "it is recorded on");
            source.fence(fencing).await.unwrap();
            source.untrack().await;
            source.unfence().await;
            write(&mut slice, 11);
            assert!(source.take().await.unwrap().is_empty(), "nothing is recorded any more");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_written_before_the_fence_takes_effect_is_found_out() {
        let (mut slice, source) = slice();
        source.track().await.unwrap();
        // The steps of a fence, with a write in between.
        assert!(source.take().await.unwrap().is_empty());
        write(&mut slice, 3);
        source.fence.lock().await.set = true;
        protect(source.handle.clone(), source.fence.clone(), oneshot::channel().0).await.unwrap();
        source.unfence().await;
        assert_eq!(blocks(&source.take().await.unwrap()), [3], "it is not lost if the region stays");
    }

    /// Sets a fence, and has it lifted as soon as what is answered is told to go on; nobody waits for that.
    async fn lift_and_do_not_wait(source: &SliceSource) -> oneshot::Sender<()> {
        source.fence(Fencing::Strict).await.unwrap();
        let (ends, end) = oneshot::channel();
        let slow = async {
            let _ = end.await;
            Ok(())
        };
        source.fence.lock().await.protecting = Some(crate::engine::handle().spawn(slow));
        tokio::select! {
            biased;
            () = source.unfence() => panic!("it waits until changing the protection has ended"),
            () = std::future::ready(()) => {}
        }
        ends
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fence_is_lifted_also_where_nobody_waits_for_that_any_more() {
        let (mut slice, source) = slice();
        let ends = lift_and_do_not_wait(&source).await;
        ends.send(()).unwrap();
        r3map_testkit::deadline(std::time::Duration::from_secs(60), "the fence", async {
            while source.fence.lock().await.set {
                tokio::task::yield_now().await;
            }
        })
        .await;
        write(&mut slice, 3);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fence_that_is_lifted_late_leaves_the_next_one_alone() {
        let (_slice, source) = slice();
        let ends = lift_and_do_not_wait(&source).await;
        r3map_testkit::deadline(std::time::Duration::from_secs(60), "the lifting", async {
            while source.fence.lock().await.protecting.is_some() {
                tokio::task::yield_now().await;
            }
            let begun = async { ends.send(()).unwrap() };
            let (fenced, ()) = tokio::join!(source.fence(Fencing::Strict), begun);
            fenced.unwrap();
            while Arc::strong_count(&source.fence) > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert!(source.fence.lock().await.set);
    }
}
