//! Devices of the kernel's NBD client, over a socket pair to a server in this process: the way for kernels without ublk.
//!
//! They are attached by ioctl, and not by netlink: a thread of this process then keeps the device, so that it ends with
//! the process, and what is under way fails at once, however the process ends. For the same reason there is one connection:
//! the kernel would let what is under way on one of several wait for ever when that alone ends.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_nbd::kernel::{self, Device, Disk, Interface};
use r3map_nbd::{Eager, Server, ServerExport, ServerSettings};
use tokio::runtime::Handle;

use crate::node::Node;
use crate::settings::BlockSettings;

/// How often it is looked whether the device is still there.
const TICK: Duration = Duration::from_millis(200);

/// A device that is served.
pub(crate) struct Nbd {
    device: Mutex<Device>,
    server: Mutex<Option<Server>>,
}

/// Says why the kernel's NBD client cannot be used here, if so.
pub(crate) fn check() -> Result<()> {
    if !Path::new("/sys/module/nbd").exists() && !Path::new("/sys/block/nbd0").exists() {
        let message = "this kernel has no NBD client; load it: modprobe nbd";
        return Err(Error::new(ErrorKind::NotFound, Operation::Mount, message));
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(ErrorKind::Denied, Operation::Mount, "NBD devices are made by root"));
    }
    Ok(())
}

impl Nbd {
    /// Makes a device and serves it. Blocks, for some times `settings.start_limit` at most.
    pub(crate) fn start(
        backend: &Arc<dyn Backend>,
        settings: &BlockSettings,
        runtime: &Handle,
    ) -> Result<(Self, Node)> {
        let _sockets_and_tasks = runtime.enter();
        let export = ServerExport { read_only: settings.read_only, ..ServerExport::new("", backend.clone()) };
        let server = Server::new(vec![export], ServerSettings::default())?;
        let (socket, disk) = connect(&server, backend.size(), settings)?;
        let how = kernel::Settings {
            interface: Interface::Ioctl,
            // How long the remote may take is not the kernel's business.
            request_timeout: None,
            ready_limit: settings.start_limit,
            ..kernel::Settings::default()
        };
        let device = kernel::attach(vec![socket], disk, &how)?;
        let name = format!("nbd{}", device.index());
        let node = Node::wait(name, backend.size(), settings.read_only, settings.start_limit)?;
        node.set("queue/read_ahead_kb", settings.read_ahead >> 10);
        node.set("queue/max_sectors_kb", settings.max_request >> 10);
        let (device, server) = (Mutex::new(device), Mutex::new(Some(server)));
        Ok((Self { device, server }, node))
    }

    /// Waits until the kernel has let go of it.
    pub(crate) async fn ended(&self) {
        while self.is_alive() {
            tokio::time::sleep(TICK).await;
        }
    }

    /// Whether the kernel has it.
    pub(crate) fn is_alive(&self) -> bool {
        match self.device.try_lock() {
            Ok(device) => device.is_alive(),
            // It is being detached, which may take as long as the backend does.
            Err(_) => true,
        }
    }

    /// Whether it is served: nothing has ended that.
    pub(crate) fn is_served(&self) -> bool {
        lock(&self.server).is_some()
    }

    /// Detaches it, once the service has ended. Blocks, not for ever.
    pub(crate) fn stop(&self) -> Result<()> {
        lock(&self.device).disconnect()
    }

    /// Ends the service: what is under way or comes gets errors.
    pub(crate) fn close(&self) {
        drop(lock(&self.server).take());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel's end of a connection to the server.
fn connect(server: &Server, size: u64, settings: &BlockSettings) -> Result<(OwnedFd, Disk)> {
    let failed = |error| Error::from_io(Operation::Mount, "no connection for the kernel can be made", error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let ours = Eager::new(tokio::net::UnixStream::from_std(ours).map_err(failed)?);
    let (facts, _task) = server.serve_export(ours, "")?;
    Ok((theirs.into(), Disk { size, block_size: settings.logical_block_size, flags: facts.flags }))
}
