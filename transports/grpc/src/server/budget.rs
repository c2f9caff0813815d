//! Bounded memory: every byte of data in a request or reply is accounted for before it is allocated or received, until
//! it is sent or dropped.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is counted in: coarse enough that any sum fits a semaphore.
const UNIT: u64 = 4096;

/// Room for so many bytes.
#[derive(Debug)]
pub(crate) struct Budget {
    units: Arc<Semaphore>,
    total: u32,
}

/// Part of a [`Budget`], given back when the last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Budget {
    pub(crate) fn new(bytes: u64) -> Self {
        let total = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX >> 3).min(u32::MAX >> 3);
        Self { units: Arc::new(Semaphore::new(total as usize)), total }
    }

    /// Waits, first come first served, until there is room for so many bytes (or for all that there can be).
    pub(crate) async fn share(&self, bytes: u64) -> Share {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.total);
        let permit = self.units.clone().acquire_many_owned(units).await;
        Share { _permit: Arc::new(permit.expect("the semaphore is never closed")) }
    }
}

impl Share {
    /// Bytes that hold on to their share.
    pub(crate) fn hold(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Held { bytes, _share: self.clone() })
    }
}

struct Held {
    bytes: Vec<u8>,
    _share: Share,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn room_comes_back_with_the_last_of_its_bytes() {
        let budget = Budget::new(3 * UNIT);
        let share = budget.share(2 * UNIT).await;
        let bytes = share.hold(vec![1, 2, 3]);
        let part = bytes.slice(1..);
        drop((share, bytes));
        assert!(budget.share(2 * UNIT).now_or_never().is_none());
        assert!(budget.share(1).now_or_never().is_some());
        drop(part);
        assert!(budget.share(3 * UNIT).now_or_never().is_some());
        assert!(budget.share(u64::MAX).now_or_never().is_some(), "all that there can be");
    }
}
