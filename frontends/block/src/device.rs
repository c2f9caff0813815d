//! A block device from making to detaching, whatever kind it is.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_sys::FileMapping;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::drain::Drain;
use crate::kind::Kind;
use crate::loop_device::LoopDevice;
use crate::nbd::Nbd;
use crate::node::Node;
use crate::service::Service;
use crate::settings::{BlockSettings, invalid};
use crate::ublk::Ublk;
use r3map_pipeline::blocking::{off_runtime, spawn, within};

/// A region that is a block device.
///
/// Dropping it detaches it as [`Self::detach`] does and waits until that is done, except inside a single-threaded
/// runtime, which the backend may need; there it happens in the background.
pub struct BlockDevice {
    attached: Arc<Attached>,
}

/// What a thread needs to detach.
struct Attached {
    node: Node,
    limit: Duration,
    by: By,
    /// Its number may be somebody else's from then on.
    removed: AtomicBool,
}

/// Who answers the kernel.
enum By {
    Ublk { device: Ublk, service: Arc<Service>, drain: Drain },
    Nbd { device: Nbd, drain: Drain },
    Loop(LoopDevice),
}

impl BlockDevice {
    /// Shows `backend` as a device of a kind that serves backends: ublk or NBD. Requests for which the backend must wait run on
    /// the tokio runtime that this is called in.
    ///
    /// Devices that killed processes left behind are removed. Dropping the future may leave the device for a moment; it is
    /// then detached in the background.
    ///
    /// # Errors
    /// `InvalidInput` for bad settings, for a loop device (see [`Self::over_file`]), and for a region that cannot be a device (see [`BlockSettings::fit`]); `NotFound`
    /// where the kernel has no such devices, `Denied` for ordinary users, `Conflict` for a kept device that is another
    /// region's or is being served; `Unavailable` if the kernel does not come to an end in time.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn open(kind: Kind, backend: Arc<dyn Backend>, settings: BlockSettings) -> Result<Self> {
        let settings = settings.fit(&*backend)?;
        let runtime = Handle::current();
        off_runtime(move || {
            let (by, node) = By::start(kind, backend, &settings, runtime)?;
            Ok(Self::new(node, by, &settings))
        })
        .await
    }

    /// Shows a file as a loop device. The file may be one that this process serves.
    ///
    /// # Errors
    /// As [`Self::open`]; and if the file does not answer.
    pub async fn over_file(file: impl AsRef<Path>, settings: BlockSettings) -> Result<Self> {
        let file = file.as_ref().to_owned();
        off_runtime(move || {
            let (device, node) = LoopDevice::attach(&file, &settings)?;
            Ok(Self::new(node, By::Loop(device), &settings))
        })
        .await
    }

    fn new(node: Node, by: By, settings: &BlockSettings) -> Self {
        let attached = Attached { node, limit: settings.detach_limit, by, removed: AtomicBool::new(false) };
        Self { attached: Arc::new(attached) }
    }

    /// The device's node, for instance `/dev/ublkb0`.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.attached.node.path()
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match &self.attached.by {
            By::Ublk { .. } => Kind::Ublk,
            By::Nbd { .. } => Kind::Nbd,
            By::Loop(_) => Kind::Loop,
        }
    }

    /// The size in bytes: the region's.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.attached.node.size()
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.attached.node.is_read_only()
    }

    /// Opens the device. While it is open the device cannot go away entirely, also after detaching.
    ///
    /// # Errors
    /// If the kernel does not let us.
    pub async fn open_file(&self) -> Result<File> {
        self.on_node(Node::open).await
    }

    /// Maps the whole device into memory, shared with everybody who uses it. [`FileMapping::sync`] hands what was
    /// written to the backend and flushes it. Read and write it off the runtime.
    ///
    /// # Errors
    /// As `mmap(2)`.
    pub async fn map(&self) -> Result<FileMapping> {
        self.on_node(Node::map).await
    }

    /// Whether the device is still served: it was not removed, by us or by somebody else.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.attached.is_there()
    }

    /// Writes what the kernel has cached of it, and makes it durable: `fsync`.
    ///
    /// # Errors
    /// What could not be stored.
    pub async fn sync(&self) -> Result<()> {
        self.on_node(Node::sync).await
    }

    /// Writes what the kernel has cached of it to the backend, without flushing that. What a file system on it holds is
    /// not among it, nor is what is written meanwhile.
    ///
    /// # Errors
    /// What could not be written.
    pub async fn write_back(&self) -> Result<()> {
        self.on_node(Node::write_back).await
    }

    async fn on_node<T: Send + 'static>(&self, work: fn(&Node) -> Result<T>) -> Result<T> {
        let attached = self.attached.clone();
        off_runtime(move || work(&attached.node)).await
    }

    /// Returns when nobody serves the device any more, because somebody else has removed it. Of a loop device it is not
    /// known: it never returns.
    pub async fn gone(&self) {
        match &self.attached.by {
            By::Ublk { device, .. } => device.ended().await,
            By::Nbd { device, .. } => device.ended().await,
            By::Loop(_) => std::future::pending().await,
        }
    }

    /// Writes what the kernel has cached, flushes the backend, and removes the device if it is not in use (mounted, or
    /// claimed in another way). Who merely has it open gets errors from then on; a loop device stays until they have
    /// closed it. Does nothing after it has removed it.
    ///
    /// Dropping the future does not stop it.
    ///
    /// # Errors
    /// `Conflict` if it is in use; `Unavailable` if the backend does not take what is left within
    /// [`BlockSettings::detach_limit`], or does not answer what others ask for, and what the backend answers to the writes
    /// and the flush: it is still there then, and works as before.
    pub async fn unmount(&self) -> Result<()> {
        let attached = self.attached.clone();
        off_runtime(move || attached.leave(false)).await
    }

    /// The same, but removes it in any case: whoever still uses it gets errors from then on.
    ///
    /// # Errors
    /// As [`Self::unmount`], but it is removed all the same, and the error says that something may not have been stored.
    pub async fn detach(&self) -> Result<()> {
        let attached = self.attached.clone();
        off_runtime(move || attached.leave(true)).await
    }

    /// Removes it without storing anything more: what the kernel still writes is refused.
    pub async fn abandon(&self) {
        match &self.attached.by {
            By::Ublk { service, .. } => service.close(),
            By::Nbd { device, .. } => device.close(),
            By::Loop(_) => {}
        }
        // Its error is that nothing was stored, which is what was asked for.
        let _ = self.detach().await;
    }
}

impl By {
    fn start(kind: Kind, backend: Arc<dyn Backend>, settings: &BlockSettings, runtime: Handle) -> Result<(Self, Node)> {
        let drain = Drain::new(backend, runtime.clone());
        match kind {
            Kind::Ublk => {
                let (device, node, service) = Ublk::start(drain.backend(), settings, runtime)?;
                Ok((Self::Ublk { device, service, drain }, node))
            }
            Kind::Nbd => {
                let (device, node) = Nbd::start(&drain.backend(), settings, &runtime)?;
                Ok((Self::Nbd { device, drain }, node))
            }
            Kind::Loop => Err(invalid("a loop device is made over a file, not over a backend")),
        }
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        let attached = self.attached.clone();
        let leaving = spawn(move || {
            if let Err(error) = attached.leave(true) {
                tracing::error!(%error, "detaching failed");
            }
        });
        match (leaving, Handle::try_current().map(|handle| handle.runtime_flavor())) {
            (Ok(leaving), Err(_)) => drop(leaving.join()),
            (Ok(leaving), Ok(RuntimeFlavor::MultiThread)) => {
                tokio::task::block_in_place(|| drop(leaving.join()));
            }
            _ => {}
        }
    }
}

impl Attached {
    /// Flushes and removes; `anyway` also if that fails or it is in use. Blocks, not for ever.
    fn leave(self: &Arc<Self>, anyway: bool) -> Result<()> {
        if self.removed.load(Relaxed) {
            return Ok(());
        }
        match &self.by {
            By::Ublk { device, service, drain } => self.leave_ublk(device, service, drain, anyway),
            By::Nbd { device, drain } => self.leave_nbd(device, drain, anyway),
            By::Loop(device) => self.leave_loop(device, anyway),
        }
    }

    /// Whether it is still ours; another device may have its name by now.
    fn is_there(&self) -> bool {
        let exists = match &self.by {
            // The node stays when nothing is attached to it.
            By::Nbd { device, .. } => device.is_alive(),
            By::Ublk { .. } | By::Loop(_) => self.node.exists(),
        };
        exists && !self.removed.load(Relaxed)
    }

    fn leave_ublk(self: &Arc<Self>, device: &Ublk, service: &Arc<Service>, drain: &Drain, anyway: bool) -> Result<()> {
        let is_served = || service.backend().is_some();
        let (claimed, synced) = self.claim_and_sync(anyway, is_served(), || service.close())?;
        // As the kernel ends the device, a file system on it writes what it holds: forced, it is served until then.
        let forced = (anyway && is_served()).then(|| device.stop(self.limit));
        let drained = self.drain(drain, anyway, is_served(), || service.close());
        if drained.is_err() && !anyway {
            return drained;
        }
        let stopped = forced.unwrap_or_else(|| device.stop(self.limit));
        drop(claimed);
        let given_up = service.clone();
        let ended = within(self.limit, "the end of what was given up", move || {
            given_up.runtime().clone().block_on(given_up.drained());
            Ok(())
        });
        let deleted = device.delete();
        self.removed.store(deleted.is_ok(), Relaxed);
        synced.and(drained).and(stopped).and(ended).and(deleted)
    }

    fn leave_nbd(self: &Arc<Self>, device: &Nbd, drain: &Drain, anyway: bool) -> Result<()> {
        let (claimed, synced) = self.claim_and_sync(anyway, device.is_served(), || device.close())?;
        let drained = self.drain(drain, anyway, device.is_served(), || device.close());
        if drained.is_err() && !anyway {
            return drained;
        }
        let stopped = device.stop();
        drop(claimed);
        self.removed.store(stopped.is_ok() || !device.is_alive(), Relaxed);
        synced.and(drained).and(stopped)
    }

    /// Ends the service, with nothing lost, unless it has ended already.
    fn drain(&self, drain: &Drain, anyway: bool, served: bool, close: impl Fn()) -> Result<()> {
        if served { drain.end(anyway, !self.node.is_read_only(), self.limit, close) } else { Ok(()) }
    }

    /// Has the device for itself, and writes what the kernel holds if it is `served`. Gives back the claim, to be held until
    /// the device is stopped so that nobody can mount it in between, and what could not be written: then the service is
    /// closed.
    ///
    /// # Errors
    /// Unless it is to be removed `anyway`, what objects; the device is as before.
    fn claim_and_sync(
        self: &Arc<Self>,
        anyway: bool,
        served: bool,
        close: impl FnOnce(),
    ) -> Result<(Option<File>, Result<()>)> {
        let (claimed, synced) = match self.claim(anyway) {
            Ok(claimed) if claimed.is_some() && served => (claimed, self.sync()),
            Ok(claimed) => (claimed, Ok(())),
            Err(error) if anyway => (None, Err(error)),
            Err(error) => return Err(error),
        };
        match synced {
            Err(error) if !anyway => Err(error),
            Err(error) => {
                // Whoever still waits for the backend would keep the kernel from letting go.
                close();
                Ok((claimed, Err(error)))
            }
            Ok(()) => Ok((claimed, Ok(()))),
        }
    }

    /// Claims the device, or has it open where it is in use and to be detached anyway; nothing if it is gone.
    ///
    /// # Errors
    /// `Conflict` if it is in use; `Exhausted` where this process cannot open it now, so that nothing can be written.
    fn claim(self: &Arc<Self>, anyway: bool) -> Result<Option<File>> {
        if !self.is_there() {
            return Ok(None);
        }
        match self.node.claim() {
            Err(_) if anyway => match self.node.open() {
                Err(error) if error.kind() != ErrorKind::Exhausted => Ok(None),
                opened => opened.map(Some),
            },
            claimed => claimed.map(Some),
        }
    }

    fn sync(self: &Arc<Self>) -> Result<()> {
        let attached = self.clone();
        within(self.limit, "writing what the kernel holds", move || attached.node.sync())
    }

    fn leave_loop(&self, device: &LoopDevice, anyway: bool) -> Result<()> {
        let detached = device.detach(&self.node, self.limit);
        let is_detached = detached.is_ok() && LoopDevice::is_detached(&self.node);
        self.removed.store(is_detached, Relaxed);
        if detached.is_err() || is_detached || anyway {
            return detached;
        }
        let message = format!("{} is still open elsewhere", self.node.path().display());
        Err(Error::new(ErrorKind::Conflict, Operation::Close, message))
    }
}
