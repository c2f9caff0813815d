//! Flushes that wait for one another become one: whoever finds that one which began after his call has ended is answered
//! by it.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

/// Flushes, one at a time.
pub(crate) struct Folded<T> {
    /// How many were asked for.
    asked: AtomicU64,
    /// Held while one runs: what the last one answered, and how many of those that were asked for it answers.
    last: Mutex<Option<(u64, T)>>,
}

impl<T> Default for Folded<T> {
    fn default() -> Self {
        Self { asked: AtomicU64::new(0), last: Mutex::default() }
    }
}

impl<T: Clone> Folded<T> {
    /// Has `flush` answer this call, unless another has.
    pub(crate) async fn flush(&self, flush: impl AsyncFnOnce() -> T) -> T {
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut last = self.last.lock().await;
        if let Some((answers, result)) = &*last
            && *answers >= ticket
        {
            return result.clone();
        }
        let answers = self.asked.load(Ordering::SeqCst);
        let result = flush().await;
        *last = Some((answers, result.clone()));
        result
    }

    /// How many were asked for so far.
    #[cfg(test)]
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}
