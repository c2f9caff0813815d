//! ublk devices, from making to removing: who may have one, taking one over from a daemon that died, and clearing away
//! what killed daemons left behind.

mod mark;
mod queue;
mod requests;

use std::io;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_sys::ublk::{Channel, Control, DeviceInfo, DeviceSpec, DeviceState, Features, Limits};
use tokio::runtime::Handle;

use self::mark::Mark;
use self::queue::Queues;
use crate::node::{Node, until};
use crate::service::Service;
use crate::settings::{BlockSettings, Keep, Meanwhile, SECTOR};

/// How long a command may take that only looks.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// How long the daemon of a device that is to be taken over may still be alive: it was killed just now.
const DYING_LIMIT: Duration = Duration::from_secs(2);
/// How long the last step of removing a device may take. It waits for those who still have the device open, but happens
/// all the same when they close it.
const DELETE_LIMIT: Duration = Duration::from_secs(2);
/// The longest discard or write of zeros.
const MAX_CLEAR: u64 = 1 << 30;
/// What discards come in multiples of: what is tracked.
const GRANULE: u32 = 4096;
/// What every device is made with.
const NEEDED: Features = Features::USER_COPY;

/// A device that is served.
pub(crate) struct Ublk {
    id: u32,
    /// None once it has ended.
    queues: Mutex<Option<Queues>>,
}

/// Says why ublk cannot be used here, if so.
pub(crate) fn check() -> Result<()> {
    open_control(LOOK_LIMIT).map(drop)
}

/// Removes the device of a daemon that is gone.
pub(crate) fn remove(id: u32) -> Result<()> {
    let control = open_control(DELETE_LIMIT)?.0;
    let cannot = |error| Error::from_io(Operation::Close, format!("/dev/ublkb{id} cannot be removed"), error);
    let info = control.info(id).map_err(cannot)?;
    if Mark::of(&info).is_none() {
        let message = format!("/dev/ublkb{id} is not a device of r3map");
        return Err(Error::new(ErrorKind::Denied, Operation::Close, message));
    }
    if info.state() == DeviceState::Live && is_alive(info.server) {
        return Err(served(id, &info));
    }
    control.delete(id).map_err(cannot)
}

impl Ublk {
    /// Makes a device, or takes over a kept one, and serves it. Blocks, for some times `settings.start_limit` at most.
    pub(crate) fn start(
        backend: Arc<dyn Backend>,
        settings: &BlockSettings,
        runtime: Handle,
    ) -> Result<(Self, Node, Arc<Service>)> {
        let (control, able) = open_control(settings.start_limit)?;
        let limits = limits(&*backend, settings);
        sweep(&control);
        let service = Arc::new(Service::new(backend, runtime, settings.max_request, keep_buffers(settings)));
        let plan = Plan { control: &control, settings, limits };
        let (device, node) = match &settings.keep {
            None => plan.make(None, NEEDED, Mark::of_this_process(), &service)?,
            Some(keep) => plan.keep(keep, able, &service)?,
        };
        tune(&node, settings);
        Ok((device, node, service))
    }

    fn new(id: u32, queues: Queues) -> Self {
        Self { id, queues: Mutex::new(Some(queues)) }
    }

    /// Waits until it is not served any more.
    pub(crate) async fn ended(&self) {
        let ended = self.lock().as_ref().map(Queues::ended);
        if let Some(ended) = ended {
            ended.await;
        }
    }

    /// Stops it: the kernel writes what it has cached, and its users get errors from then on. Blocks.
    pub(crate) fn stop(&self, limit: Duration) -> Result<()> {
        let Some(queues) = self.lock().take() else { return Ok(()) };
        let stopping = Control::open(limit).and_then(|control| control.stop(self.id));
        let stopped = stopping.map_err(|error| self.cannot("stopped", error));
        let ended = stopped.is_ok() && queues.wait(limit);
        // Where the kernel does not let go in time, the threads do.
        drop(queues);
        if ended { Ok(()) } else { stopped.and(Err(self.cannot("stopped", io::ErrorKind::TimedOut.into()))) }
    }

    /// Removes it, after it was stopped and all requests are answered. Blocks.
    pub(crate) fn delete(&self) -> Result<()> {
        let control = Control::open(DELETE_LIMIT).map_err(|error| self.cannot("removed", error))?;
        match control.delete(self.id) {
            Err(error) if !is_gone(&error) && error.kind() != io::ErrorKind::TimedOut => {
                Err(self.cannot("removed", error))
            }
            _ => Ok(()),
        }
    }

    fn cannot(&self, what: &str, error: io::Error) -> Error {
        Error::from_io(Operation::Close, format!("/dev/{} cannot be {what}", name(self.id)), error)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Queues>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(id: u32) -> String {
    format!("ublkb{id}")
}

fn keep_buffers(settings: &BlockSettings) -> usize {
    usize::from(settings.queue_count()) * 2
}

fn open_control(limit: Duration) -> Result<(Control, Features)> {
    let control = Control::open(limit).map_err(|error| {
        let message = match error.kind() {
            io::ErrorKind::NotFound => "this kernel has no ublk; load it: modprobe ublk_drv",
            io::ErrorKind::PermissionDenied => "ublk devices are made by root",
            _ => "ublk's control device cannot be opened",
        };
        Error::from_io(Operation::Mount, message, error)
    })?;
    let able = control.features().map_err(|error| {
        let message = "this kernel's ublk is too old (Linux 6.5 is needed), or io_uring is forbidden here";
        Error::from_io(Operation::Mount, message, error)
    })?;
    if able.contains(NEEDED | Features::IOCTL_ENCODE) {
        return Ok((control, able));
    }
    let message = "this kernel's ublk cannot copy requests by calls (UBLK_F_USER_COPY, Linux 6.5)";
    Err(Error::new(ErrorKind::NotFound, Operation::Mount, message))
}

/// What the kernel tells programs about the device of a backend.
fn limits(backend: &dyn Backend, settings: &BlockSettings) -> Limits {
    let can = backend.capabilities();
    let clear = |able: bool| match able && !settings.read_only {
        true => u32::try_from(MAX_CLEAR / SECTOR).unwrap_or(u32::MAX),
        false => 0,
    };
    let shift = |bytes: u32| u8::try_from(bytes.trailing_zeros()).unwrap_or(u8::MAX);
    Limits {
        sectors: backend.size() / SECTOR,
        logical_shift: shift(settings.logical_block_size),
        physical_shift: shift(GRANULE),
        max_sectors: settings.max_request >> SECTOR.trailing_zeros(),
        read_only: settings.read_only,
        max_discard_sectors: clear(can.trim.is_some()),
        max_write_zeroes_sectors: clear(can.write_zeroes.is_some()),
        discard_granularity: GRANULE,
    }
}

fn tune(node: &Node, settings: &BlockSettings) {
    node.set("queue/io_timeout", settings.lost_limit.as_millis());
    node.set("queue/read_ahead_kb", settings.read_ahead >> 10);
    // The backend orders by itself; sorting costs time on each request.
    node.set("queue/scheduler", "none");
}

/// How a device comes to be served.
struct Plan<'a> {
    control: &'a Control,
    settings: &'a BlockSettings,
    limits: Limits,
}

impl Plan<'_> {
    /// Makes a new device and starts it. Nothing of a failed attempt stays behind.
    fn make(&self, id: Option<u32>, features: Features, mark: Mark, service: &Arc<Service>) -> Result<(Ublk, Node)> {
        let BlockSettings { depth, max_request, .. } = *self.settings;
        let queues = self.settings.queue_count();
        let spec = DeviceSpec { id, queues, depth: depth.get(), max_request, features, mark: mark.number() };
        let info = self.control.add(&spec).map_err(|error| cannot_make("a ublk device cannot be made", error))?;
        let queues = self.serve(&info, service);
        let node = queues.as_ref().map_err(Error::clone).and_then(|_| {
            let set = self.control.set_limits(info.id, &self.limits);
            self.begun(info.id, set.and_then(|()| self.control.start(info.id)))
        });
        if node.is_err() {
            // What the kernel still waits for gets errors, from the queues, which are there until the device is gone: without
            // them starting a kept device would wait for ever. And a request that hangs has the channel open.
            service.close();
            let _ = self.control.delete(info.id);
        }
        Ok((Ublk::new(info.id, queues?), node?))
    }

    /// Serves the queues of a device that has not begun.
    fn serve(&self, info: &DeviceInfo, service: &Arc<Service>) -> Result<Queues> {
        let channel = self.channel(info.id)?;
        Queues::start(&channel, info.queues, info.depth, service, self.settings.start_limit)
    }

    /// The node of a device, if it has begun.
    fn begun(&self, id: u32, begun: io::Result<()>) -> Result<Node> {
        begun.map_err(|error| {
            let message = match error.kind() {
                io::ErrorKind::TimedOut => {
                    "the ublk device does not start in time; the kernel first reads its partition table: does the region \
                     answer?"
                }
                _ => "the ublk device does not start",
            };
            cannot_make(message, error)
        })?;
        Node::wait(name(id), self.limits.sectors * SECTOR, self.limits.read_only, self.settings.start_limit)
    }

    /// The channel of a device, whose node may take a moment to appear.
    fn channel(&self, id: u32) -> Result<Channel> {
        let mut opened = Err(io::ErrorKind::NotFound.into());
        until(self.settings.start_limit, || {
            opened = Channel::open(id);
            !opened.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        });
        opened.map_err(|error| cannot_make(&format!("/dev/ublkc{id} cannot be opened"), error))
    }

    /// Makes a device that is to be kept, or takes over the one that was.
    fn keep(&self, keep: &Keep, able: Features, service: &Arc<Service>) -> Result<(Ublk, Node)> {
        let features = NEEDED | features_of(keep.meanwhile);
        if !able.contains(features) {
            let message = "this kernel can keep a device only while its requests wait (to let them fail needs Linux \
                           6.13): choose to wait, or do not keep it";
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Mount, message));
        }
        let mark = Mark::new(&keep.region);
        match self.control.info(keep.id) {
            Err(error) if is_gone(&error) => self.make(Some(keep.id), features, mark, service),
            Err(error) => Err(cannot_make("the kept ublk device cannot be looked at", error)),
            Ok(info) if Mark::of(&info) != Some(mark) => {
                let message = format!("/dev/ublkb{} is another region's device; choose another number", keep.id);
                Err(Error::new(ErrorKind::Conflict, Operation::Mount, message))
            }
            Ok(info) => self.take_over(&info, service),
        }
    }

    fn take_over(&self, info: &DeviceInfo, service: &Arc<Service>) -> Result<(Ublk, Node)> {
        let had = self.control.limits(info.id).map_err(|error| cannot_make("the kept device has no limits", error))?;
        // Its users were told these, and the kernel goes by them.
        if let Some(what) = difference(&had, &self.limits) {
            let message = format!("/dev/ublkb{} was made with {what}; remove it first", info.id);
            return Err(Error::new(ErrorKind::Conflict, Operation::Mount, message));
        }
        self.begin_recovery(info)?;
        let queues = self.serve(info, service)?;
        match self.begun(info.id, self.control.end_recovery(info.id)) {
            Ok(node) => Ok((Ublk::new(info.id, queues), node)),
            Err(error) => {
                // First the queues, so that what is under way waits for the next daemon; a request that hangs would keep it
                // out.
                drop(queues);
                service.close();
                Err(error)
            }
        }
    }

    /// Begins to take over, as soon as the kernel is done with the daemon that died.
    fn begin_recovery(&self, info: &DeviceInfo) -> Result<()> {
        let start = Instant::now();
        let mut begun = Err(io::ErrorKind::TimedOut.into());
        until(self.settings.start_limit, || {
            begun = self.control.start_recovery(info.id);
            let busy = begun.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy);
            !busy || is_alive(info.server) && start.elapsed() > DYING_LIMIT
        });
        match begun {
            Err(_) if is_alive(info.server) => Err(served(info.id, info)),
            begun => begun.map_err(|error| cannot_make("the kept ublk device cannot be taken over", error)),
        }
    }
}

/// In what a kept device is another one than was to be made.
fn difference(had: &Limits, wanted: &Limits) -> Option<String> {
    let other = if had.sectors != wanted.sectors {
        format!("another size, {} bytes", had.sectors * SECTOR)
    } else if had.logical_shift != wanted.logical_shift {
        format!("logical blocks of {} bytes", 1u64 << had.logical_shift)
    } else if had.read_only != wanted.read_only {
        if had.read_only { "writes refused" } else { "writes allowed" }.to_owned()
    } else if had.max_sectors != wanted.max_sectors {
        format!("requests of up to {} bytes", u64::from(had.max_sectors) * SECTOR)
    } else if had.discard_granularity != wanted.discard_granularity || had.physical_shift != wanted.physical_shift {
        "other units".to_owned()
    } else if had.max_discard_sectors > wanted.max_discard_sectors
        || had.max_write_zeroes_sectors > wanted.max_write_zeroes_sectors
    {
        // What the region can do beyond that is not asked for; what it cannot would fail.
        "more abilities to discard and to write zeros than the region has now".to_owned()
    } else {
        return None;
    };
    Some(other)
}

fn features_of(meanwhile: Meanwhile) -> Features {
    Features::RECOVERY
        | match meanwhile {
            Meanwhile::Fail => Features::RECOVERY_FAIL_IO,
            Meanwhile::Wait => Features::RECOVERY_REISSUE,
        }
}

fn cannot_make(message: &str, error: io::Error) -> Error {
    Error::from_io(Operation::Mount, message, error)
}

fn served(id: u32, info: &DeviceInfo) -> Error {
    let message = format!("/dev/ublkb{id} is served by process {}", info.server);
    Error::new(ErrorKind::Conflict, Operation::Mount, message)
}

/// `ENODEV`: there is no such device.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// Whether a process runs. One that is dead and that nobody has asked for its end does not.
fn is_alive(process: i32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{process}/stat"));
    // After the name, which may hold anything (`proc_pid_stat(5)`).
    state.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

/// Removes what killed daemons left behind: devices of ours that were stopped by the kernel, and that nobody serves.
fn sweep(control: &Control) {
    let Ok(channels) = std::fs::read_dir("/sys/class/ublk-char") else { return };
    let numbers =
        channels.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok());
    for id in numbers {
        if control.info(id).is_ok_and(|info| is_left_over(&info)) && Channel::open(id).is_ok() {
            let _ = control.delete(id);
        }
    }
}

/// Whether it is the device of a daemon that is gone. What a living one is about to start or to remove looks the same but for
/// its maker: the kernel names no server of it.
fn is_left_over(info: &DeviceInfo) -> bool {
    let maker = Mark::of(info).and_then(Mark::process);
    info.state() == DeviceState::Dead && maker.is_some_and(|maker| !is_alive(maker))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_is_dead_even_if_nobody_has_asked() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(is_alive(own) && is_alive(1));
        assert!(!is_alive(0) && !is_alive(-1) && !is_alive(i32::MAX));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = i32::try_from(child.id()).unwrap();
        assert!(crate::node::until(Duration::from_secs(60), || !is_alive(dead)));
        child.wait().unwrap();
    }

    #[test]
    fn a_kept_device_must_be_the_same_in_everything() {
        let limits = Limits {
            sectors: 4096,
            logical_shift: 9,
            physical_shift: 12,
            max_sectors: 2048,
            read_only: false,
            max_discard_sectors: 1,
            max_write_zeroes_sectors: 1,
            discard_granularity: GRANULE,
        };
        assert_eq!(difference(&limits, &limits), None);
        for (wanted, says) in [
            (Limits { sectors: 8192, ..limits }, "another size, 2097152 bytes"),
            (Limits { logical_shift: 12, ..limits }, "logical blocks of 512 bytes"),
            (Limits { read_only: true, max_discard_sectors: 0, ..limits }, "writes allowed"),
            (Limits { max_sectors: 8, ..limits }, "requests of up to 1048576 bytes"),
            (
                Limits { max_discard_sectors: 0, ..limits },
                "more abilities to discard and to write zeros than the region has now",
            ),
            (
                Limits { max_write_zeroes_sectors: 0, ..limits },
                "more abilities to discard and to write zeros than the region has now",
            ),
            (Limits { discard_granularity: 512, ..limits }, "other units"),
        ] {
            assert_eq!(difference(&limits, &wanted).as_deref(), Some(says));
        }
    }
}
