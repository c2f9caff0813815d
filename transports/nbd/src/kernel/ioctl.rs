//! The kernel's NBD client by ioctl, for kernels without the netlink family and where no device shall outlive the
//! process: a thread of this process serves the device, and when the process dies every request fails at once.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use r3map_sys::nbd::NbdDevice;
use rustix::io::Errno;

use super::{Disk, sysfs};

/// How long a disconnect may take to end the serving thread: the server's last replies come before.
const LIMIT: Duration = Duration::from_secs(30);

const POLL: Duration = Duration::from_millis(5);

/// A device that a thread of this process serves.
#[derive(Debug)]
pub(super) struct Serving {
    /// Open as long as the thread serves it: a device that somebody has open is not free.
    device: Weak<NbdDevice>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Serving {
    /// Attaches `wanted`, or the first device that is free; a request may take `timeout` seconds. Gives back its index too.
    ///
    /// # Errors
    /// `EBUSY` if it is in use, or all are; otherwise as [`NbdDevice`]'s calls.
    pub(super) fn start(
        wanted: Option<u32>,
        sockets: Arc<Vec<OwnedFd>>,
        disk: Disk,
        timeout: u64,
    ) -> io::Result<(u32, Self)> {
        let (report, outcome) = channel();
        // The kernel lets one thread set a device up, and knows it by its id.
        let thread = std::thread::Builder::new().name("r3map-nbd".to_owned());
        let thread = thread.spawn(move || run(wanted, &sockets, disk, timeout, &report))?;
        let (index, device) = begun(&outcome)?;
        Ok((index, Self { device, thread: Some(thread) }))
    }

    /// Ends it, and waits for the end.
    ///
    /// # Errors
    /// `TimedOut` if the kernel does not let go.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let outcome = self.device.upgrade().map_or(Ok(()), |device| device.disconnect());
        let end = Instant::now() + LIMIT;
        while !thread.is_finished() {
            if Instant::now() > end {
                self.thread = Some(thread);
                return Err(Errno::TIMEDOUT.into());
            }
            std::thread::sleep(POLL);
        }
        let served = thread.join().unwrap_or_else(|_| Err(io::Error::other("the serving thread panicked")));
        // A server that was gone already is no obstacle.
        outcome.or_else(|error| if served.is_ok() { Ok(()) } else { Err(error) })
    }

    /// Whether the kernel still serves the device.
    pub(super) fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

type Begun = io::Result<(u32, Weak<NbdDevice>)>;

fn begun(outcome: &Receiver<Begun>) -> Begun {
    outcome.recv().unwrap_or_else(|_| Err(io::Error::other("the serving thread ended")))
}

fn run(wanted: Option<u32>, sockets: &[OwnedFd], disk: Disk, timeout: u64, report: &Sender<Begun>) -> io::Result<()> {
    let device = match claim(wanted, sockets).and_then(|(index, device)| {
        set_up(&device, disk, timeout)?;
        Ok((index, device))
    }) {
        Ok((index, device)) => {
            let _ = report.send(Ok((index, Arc::downgrade(&device))));
            device
        }
        Err(error) => {
            let _ = report.send(Err(error));
            return Ok(());
        }
    };
    let outcome = device.serve();
    // What is left of the connection would keep the device from being used again.
    device.clear()?;
    outcome
}

/// Takes a device by giving it the connections: the kernel lets only one have it.
fn claim(wanted: Option<u32>, sockets: &[OwnedFd]) -> io::Result<(u32, Arc<NbdDevice>)> {
    let candidates = wanted.map_or_else(sysfs::devices, |index| vec![index]);
    let mut last = if candidates.is_empty() { Errno::NOENT } else { Errno::BUSY }.into();
    for index in candidates {
        if sysfs::is_attached(index) {
            last = Errno::BUSY.into();
            continue;
        }
        match give(index, sockets) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BUSY) => last = error,
            // So the kernel says that netlink was faster.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) && sysfs::is_attached(index) => {
                last = Errno::BUSY.into();
            }
            other => return Ok((index, Arc::new(other?))),
        }
    }
    Err(last)
}

fn give(index: u32, sockets: &[OwnedFd]) -> io::Result<NbdDevice> {
    let device = NbdDevice::open(&sysfs::node(index))?;
    for socket in sockets {
        device.set_socket(socket.as_fd())?;
    }
    Ok(device)
}

fn set_up(device: &NbdDevice, disk: Disk, timeout: u64) -> io::Result<()> {
    let number = |value: u64| usize::try_from(value).map_err(|_| io::Error::from(Errno::INVAL));
    let set = || {
        device.set_block_size(number(disk.block_size.into())?)?;
        device.set_size_in_blocks(number(disk.size / u64::from(disk.block_size))?)?;
        device.set_timeout(number(timeout)?)?;
        device.set_flags(disk.flags.bits())
    };
    set().inspect_err(|_| {
        let _ = device.clear();
    })
}
