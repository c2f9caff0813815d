//! Commands to ublk's control device, each bounded in time. What a device is for is decided elsewhere.
//!
//! A command is one entry of an io_uring of its own. It may wait in the kernel for requests to be answered (starting
//! reads the partition table, stopping writes what is cached), so that a limit is needed even by those who answer them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::ioctl::Opcode;

use super::abi::{self, ControlCommand, DeviceInfo, Features, Limits, Parameters};

/// How long a command that is called off may take to say so.
const CALL_OFF_LIMIT: Duration = Duration::from_secs(1);
const COMMAND: u64 = 1;
const CALL_OFF: u64 = 2;

/// The control device of ublk. Needs `CAP_SYS_ADMIN`.
///
/// Every command fails with `TimedOut` when `limit` has passed; it may still take effect after that.
#[derive(Debug)]
pub struct Control {
    device: File,
    limit: Duration,
}

/// A device to be made.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSpec {
    /// The number in `/dev/ublkbN`; the kernel chooses if none is given.
    pub id: Option<u32>,
    /// How many queues, each to be served by a thread; the kernel gives no more than there are processors.
    pub queues: u16,
    /// How many requests each queue may have under way, at most 4096.
    pub depth: u16,
    /// The longest request in bytes, at most 32 MiB.
    pub max_request: u32,
    /// What it is made with.
    pub features: Features,
    /// A number of the caller's own that stays with the device.
    pub mark: u64,
}

impl Control {
    /// Opens `/dev/ublk-control`. Each command may take `limit`.
    ///
    /// # Errors
    /// `NotFound` where the kernel has no ublk or its module is not loaded, `PermissionDenied` for ordinary users.
    pub fn open(limit: Duration) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/ublk-control")?;
        Ok(Self { device, limit })
    }

    /// What the kernel can do.
    ///
    /// # Errors
    /// Where the kernel cannot say (before 6.5), or forbids io_uring.
    pub fn features(&self) -> io::Result<Features> {
        self.run(abi::GET_FEATURES, u32::MAX, 0, 0u64).map(Features)
    }

    /// Makes a device, which is not started yet.
    ///
    /// # Errors
    /// EEXIST if the number is taken; as the kernel says.
    pub fn add(&self, spec: &DeviceSpec) -> io::Result<DeviceInfo> {
        let DeviceSpec { id, queues, depth, max_request, features, mark } = *spec;
        let id = id.unwrap_or(u32::MAX);
        self.run(abi::ADD_DEV, id, 0, DeviceInfo::wanted(id, queues, depth, max_request, features, mark))
    }

    /// A device as it is now.
    ///
    /// # Errors
    /// ENODEV if there is none of that number.
    pub fn info(&self, id: u32) -> io::Result<DeviceInfo> {
        self.run(abi::GET_DEV_INFO, id, 0, DeviceInfo::default())
    }

    /// Says what a device that is not started is to be.
    ///
    /// # Errors
    /// EINVAL for what the kernel does not take.
    pub fn set_limits(&self, id: u32, limits: &Limits) -> io::Result<()> {
        self.run(abi::SET_PARAMS, id, 0, Parameters::from(limits)).map(drop)
    }

    /// What a device is.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn limits(&self, id: u32) -> io::Result<Limits> {
        self.run(abi::GET_PARAMS, id, 0, Parameters::empty()).map(|parameters| Limits::from(&parameters))
    }

    /// Starts a device: `/dev/ublkbN` appears. Waits until all its queues fetch, and until its partition table is read
    /// through them.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn start(&self, id: u32) -> io::Result<()> {
        self.run(abi::START_DEV, id, own_pid(), ())
    }

    /// Stops a device: what the kernel has cached is written through its queues, then they end.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn stop(&self, id: u32) -> io::Result<()> {
        self.run(abi::STOP_DEV, id, 0, ())
    }

    /// Deletes a device, stopping it first. Waits until its channel and node are closed by all.
    ///
    /// # Errors
    /// ENODEV if there is none; as the kernel says.
    pub fn delete(&self, id: u32) -> io::Result<()> {
        self.run(abi::DEL_DEV, id, 0, ())
    }

    /// Begins to take over a device whose server is gone; then its queues are to be fetched from.
    ///
    /// # Errors
    /// EBUSY while it is still served, or its server is still ending.
    pub fn start_recovery(&self, id: u32) -> io::Result<()> {
        self.run(abi::START_USER_RECOVERY, id, 0, ())
    }

    /// Ends taking over, once all queues fetch: requests are served again.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn end_recovery(&self, id: u32) -> io::Result<()> {
        self.run(abi::END_USER_RECOVERY, id, own_pid(), ())
    }

    /// Gives `payload` to the kernel with a command, and back when the command is done.
    ///
    /// `T` is what the command takes: plain numbers, for which every value is a value. Wherever it is not certain that the
    /// kernel is done with it, its few bytes are left to the kernel for ever.
    fn run<T: Copy>(&self, command: Opcode, id: u32, data: u64, payload: T) -> io::Result<T> {
        let mut ring: IoUring<squeue::Entry128> = IoUring::builder().build(2)?;
        let place = Box::into_raw(Box::new(payload));
        let header = header(id, data, place);
        let entry = opcode::UringCmd80::new(Fd(self.device.as_raw_fd()), command).cmd(header.to_bytes());
        push(&mut ring, entry.build().user_data(COMMAND))?;
        let mut result = wait(&mut ring, self.limit)?;
        if result.is_none() {
            let call_off: squeue::Entry128 = opcode::AsyncCancel::new(COMMAND).build().user_data(CALL_OFF).into();
            push(&mut ring, call_off)?;
            result = wait(&mut ring, CALL_OFF_LIMIT)?;
        }
        let Some(result) = result else {
            return Err(io::ErrorKind::TimedOut.into());
        };
        // SAFETY: it came from a box, and the kernel is done with it.
        let payload = unsafe { Box::from_raw(place) };
        match result {
            0.. => Ok(*payload),
            error if error == -libc::ECANCELED || error == -libc::EINTR => Err(io::ErrorKind::TimedOut.into()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

fn header<T>(id: u32, data: u64, payload: *mut T) -> ControlCommand {
    const { assert!(size_of::<T>() <= u16::MAX as usize) };
    let len = size_of::<T>() as u16;
    let addr = if len == 0 { 0 } else { payload.expose_provenance() as u64 };
    // The queue number -1 says that it is for the whole device.
    ControlCommand { dev_id: id, queue_id: u16::MAX, len, addr, data, dev_path_len: 0, pad: 0, reserved: 0 }
}

fn own_pid() -> u64 {
    u64::from(std::process::id())
}

fn push(ring: &mut IoUring<squeue::Entry128>, entry: squeue::Entry128) -> io::Result<()> {
    // SAFETY: the only addresses in the entry are that of `run`'s payload, which is kept until the command is done.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)
}

/// Submits what was pushed and waits for the command's result, at most for `limit`.
fn wait(ring: &mut IoUring<squeue::Entry128>, limit: Duration) -> io::Result<Option<i32>> {
    let end = Instant::now() + limit;
    loop {
        let left = Timespec::from(end.saturating_duration_since(Instant::now()));
        let waited = ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left));
        if let Some(done) = ring.completion().find(|entry| entry.user_data() == COMMAND) {
            return Ok(Some(done.result()));
        }
        match waited {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => return Err(error),
            _ if Instant::now() >= end => return Ok(None),
            _ => {}
        }
    }
}
