//! A slow link to a backend: a delay for every call, and a bandwidth that all calls share.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use tokio::time::Instant;

use super::guard;

/// A backend behind a link. On tokio's clock, so that it costs no real time where the test paused it. It has none of the
/// optional abilities of what is behind it, but its limits.
pub struct Link {
    inner: Arc<dyn Backend>,
    delay: Duration,
    bytes_per_second: Option<u64>,
    /// Until when the link is taken by bytes that were sent before.
    busy: Mutex<Option<Instant>>,
}

impl Link {
    /// A link that answers after `delay`, and that moves at most `bytes_per_second` where that is given.
    ///
    /// # Panics
    /// If `bytes_per_second` is zero.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, delay: Duration, bytes_per_second: Option<u64>) -> Arc<Self> {
        assert_ne!(bytes_per_second, Some(0), "nothing would ever arrive");
        Arc::new(Self { inner, delay, bytes_per_second, busy: Mutex::new(None) })
    }

    async fn carry(&self, bytes: usize) {
        let sent = self.send(bytes);
        tokio::time::sleep_until(sent + self.delay).await;
    }

    /// Takes the link for `bytes`, and says when the last of them is through.
    fn send(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.bytes_per_second else { return now };
        let mut busy = guard(&self.busy);
        let start = busy.map_or(now, |until| until.max(now));
        let end = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        *busy = Some(end);
        end
    }
}

#[async_trait]
impl Backend for Link {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> r3map_core::Capabilities<'_> {
        let inner = self.inner.capabilities();
        r3map_core::Capabilities {
            pieces: None,
            read_many: None,
            trim: None,
            write_zeroes: None,
            extents: None,
            ..inner
        }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.carry(buf.len()).await;
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.carry(buf.len()).await;
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.carry(0).await;
        self.inner.flush().await
    }
}
