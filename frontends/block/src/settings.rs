//! What a caller can choose about a device: plain data, checked in one place. It opens nothing.

use std::num::NonZeroU16;
use std::thread::available_parallelism;
use std::time::Duration;

use r3map_core::{Access, Backend, Error, ErrorKind, Operation, Result};

/// The longest request that ublk takes.
const MAX_REQUEST: u32 = 32 << 20;
/// The shortest useful longest request: one page.
const MIN_REQUEST: u32 = 4096;
/// The most requests that a ublk queue may have under way.
const MAX_DEPTH: u16 = 4096;
/// More queues than this help nobody who waits for a remote.
const MANY_QUEUES: usize = 4;
/// The kernel counts a device in sectors of this size, whatever its logical block size.
pub(crate) const SECTOR: u64 = 512;

/// What happens to requests while a kept device has nobody who serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Meanwhile {
    /// They fail at once, and so does what was under way: nobody waits for a daemon that may never come back. Needs
    /// Linux 6.13 (`UBLK_F_USER_RECOVERY_FAIL_IO`).
    #[default]
    Fail,
    /// They wait until the device is taken over, and what was under way is done again then: programs notice nothing but
    /// a pause. Until the device is taken over or removed ([`remove`](crate::remove)) they cannot even be killed.
    Wait,
}

/// A device that outlives the process that serves it: another process with the same number and region takes it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// The number in `/dev/ublkbN`.
    pub id: u32,
    /// What the region is called, for instance its URI: a device of another region is refused.
    pub region: String,
    /// What happens to requests in between.
    pub meanwhile: Meanwhile,
}

/// Settings of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSettings {
    /// Refuse writes. A backend that is read-only always makes the device so. Default: no.
    pub read_only: bool,
    /// The logical block size in bytes, a power of two from 512 to 4096: what programs must read and write in multiples
    /// of. The region's size must be a multiple of it. Default: 512, which every disk image fits; file systems use
    /// larger blocks anyway.
    pub logical_block_size: u32,
    /// How many queues (ublk): each is served by a thread of its own, and requests that must wait do not hold one.
    /// Default: one per processor, at most four.
    pub queues: Option<NonZeroU16>,
    /// How many requests each queue may have under way, up to 4096. With `max_request` the bound on memory for requests
    /// that wait. Default: 128.
    pub depth: NonZeroU16,
    /// The longest read or write in bytes that the kernel hands over at once, from 4 KiB to 32 MiB. Default: 1 MiB.
    pub max_request: u32,
    /// How far ahead of a sequential reader the kernel reads, in bytes. Default: 1 MiB.
    pub read_ahead: u32,
    /// How long each command to the kernel may take that makes or starts a device. Default: half a minute.
    pub start_limit: Duration,
    /// How long detaching waits for the backend to take and flush what the kernel still holds. Default: one minute.
    pub detach_limit: Duration,
    /// How soon the kernel looks whether the process that serves the device is dead, where all requests of a queue are
    /// under way (ublk; where they are not it notices at once). Default: three seconds.
    pub lost_limit: Duration,
    /// Keep the device when this process dies (ublk). By default the device goes with it, and its users get errors.
    pub keep: Option<Keep>,
}

impl Default for BlockSettings {
    fn default() -> Self {
        Self {
            read_only: false,
            logical_block_size: 512,
            queues: None,
            depth: NonZeroU16::new(128).unwrap_or(NonZeroU16::MIN),
            max_request: 1 << 20,
            read_ahead: 1 << 20,
            start_limit: Duration::from_secs(30),
            detach_limit: Duration::from_secs(60),
            lost_limit: Duration::from_secs(3),
            keep: None,
        }
    }
}

impl BlockSettings {
    /// Checks everything that can be checked without looking at the system.
    ///
    /// # Errors
    /// `InvalidInput`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        let block = self.logical_block_size;
        if !(block.is_power_of_two() && (512..=4096).contains(&block)) {
            return Err(invalid(format!("logical_block_size is {block}, it must be 512, 1024, 2048 or 4096")));
        }
        if !(MIN_REQUEST..=MAX_REQUEST).contains(&self.max_request) || !self.max_request.is_multiple_of(4096) {
            let message = format!("max_request is {}, it must be whole pages from 4 KiB to 32 MiB", self.max_request);
            return Err(invalid(message));
        }
        if self.depth.get() > MAX_DEPTH {
            return Err(invalid(format!("depth is {}, it must be at most {MAX_DEPTH}", self.depth)));
        }
        Ok(())
    }

    /// Checked, for a region of `size` bytes.
    ///
    /// # Errors
    /// As [`Self::validate`], and for a size that is no multiple of the logical block size.
    pub fn fit_size(self, size: u64) -> Result<Self> {
        self.validate()?;
        check_size(size, self.logical_block_size)?;
        Ok(self)
    }

    /// The same for a backend: checked, read-only if it is, and with requests that are no longer than it takes.
    ///
    /// # Errors
    /// As [`Self::validate`], and if the backend cannot be a device: its size is no multiple of the logical block size,
    /// or it does not take requests as programs make them.
    pub fn fit(self, backend: &dyn Backend) -> Result<Self> {
        let mut fitted = self.fit_size(backend.size())?;
        let able = backend.capabilities();
        if let Access::WholeChunks(chunk) = able.access {
            let message =
                format!("the backend takes only whole chunks of {} bytes: put `Aligned` around it", chunk.bytes());
            return Err(invalid(message));
        }
        if let Some(most) = able.max_request.filter(|most| *most < u64::from(fitted.max_request)) {
            fitted.max_request = u32::try_from(most & !4095).unwrap_or(fitted.max_request);
            if fitted.max_request == 0 {
                return Err(invalid(format!("the backend takes at most {most} bytes at once, which is below a page")));
            }
        }
        fitted.read_only |= able.read_only;
        Ok(fitted)
    }

    /// How many queues to ask for.
    pub(crate) fn queue_count(&self) -> u16 {
        let usual = || available_parallelism().map_or(1, std::num::NonZero::get).min(MANY_QUEUES);
        self.queues.map_or_else(|| u16::try_from(usual()).unwrap_or(1), NonZeroU16::get)
    }
}

/// A device has whole sectors. A region's last bytes that fill none would be out of reach, or bytes would be shown that
/// are nobody's; neither is done silently.
fn check_size(size: u64, block: u32) -> Result<()> {
    let tail = size % u64::from(block);
    if tail == 0 {
        return Ok(());
    }
    let fits = [4096, 2048, 1024, 512].into_iter().find(|smaller| size.is_multiple_of(*smaller));
    let hint = match fits {
        Some(smaller) => format!("choose a logical block size of {smaller}"),
        None => "show it as a file instead, or make the region a multiple of 512 bytes".to_owned(),
    };
    Err(invalid(format!(
        "a block device has whole sectors of {block} bytes, and the region's {size} bytes leave {tail} over; {hint}"
    )))
}

pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, Operation::Mount, message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use r3map_core::ChunkSize;
    use r3map_testkit::store::Store;

    use super::*;

    fn fit(size: u64, block: u32) -> Result<BlockSettings> {
        let settings = BlockSettings { logical_block_size: block, ..BlockSettings::default() };
        settings.fit(&*Arc::new(Store::new(size)))
    }

    #[test]
    fn a_tail_is_refused_and_the_error_says_what_to_do() {
        assert!(fit(512 * 3, 512).is_ok());
        assert!(fit(4096 * 3, 4096).is_ok());
        let error = fit(4096 + 512, 4096).unwrap_err();
        assert!(error.message().ends_with("leave 512 over; choose a logical block size of 512"), "{error}");
        for size in [1, 511, 4097, (1 << 30) + 1] {
            let error = fit(size, 512).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.message().contains("show it as a file"), "{error}");
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let default = BlockSettings::default();
        assert!(default.validate().is_ok());
        for (wrong, name) in [
            (BlockSettings { logical_block_size: 1000, ..default.clone() }, "logical_block_size"),
            (BlockSettings { logical_block_size: 8192, ..default.clone() }, "logical_block_size"),
            (BlockSettings { max_request: 5000, ..default.clone() }, "max_request"),
            (BlockSettings { max_request: 64 << 20, ..default.clone() }, "max_request"),
            (BlockSettings { depth: NonZeroU16::MAX, ..default.clone() }, "depth"),
        ] {
            assert!(wrong.validate().unwrap_err().message().starts_with(name));
        }
    }

    #[test]
    fn the_backend_bounds_requests() {
        let fitted = |store: Store| BlockSettings::default().fit(&store);
        assert_eq!(fitted(Store::new(1 << 20).max_request(10_000)).unwrap().max_request, 8192);
        assert!(fitted(Store::new(1 << 20).max_request(4095)).is_err());
        assert!(fitted(Store::new(1 << 20).whole_chunks(ChunkSize::MIN)).is_err());
        assert!(fitted(Store::new(1 << 20).read_only()).unwrap().read_only);
    }
}
