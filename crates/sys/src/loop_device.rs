//! Loop devices: a file as a block device of the kernel's own.
//!
//! The file may be served by this very process (FUSE). So the device is held by a thread with a descriptor table of its
//! own (see [`crate::apart`]): when the process is killed, the server's descriptors go without waiting for the device's.
//! The kernel detaches the device when its last user has closed it, however this process ends.
//!
//! Source: `include/uapi/linux/loop.h`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use linux_raw_sys::loop_device as raw;
use rustix::ioctl::Opcode;

use crate::{abi, apart};

const LOOP_CONFIGURE: Opcode = raw::LOOP_CONFIGURE;
const LOOP_CTL_GET_FREE: Opcode = raw::LOOP_CTL_GET_FREE;
const BLKROGET: Opcode = linux_raw_sys::ioctl::BLKROGET;
const BLKROSET: Opcode = linux_raw_sys::ioctl::BLKROSET;

const _: () = {
    assert!(size_of::<raw::loop_config>() == 304);
    assert!(size_of::<raw::loop_info64>() == 232);
    assert!(std::mem::offset_of!(raw::loop_config, info) == 8);
    assert!(std::mem::offset_of!(raw::loop_info64, lo_flags) == 52);
};

/// How often a free device may be taken by somebody else before it is configured.
const TRIES: usize = 64;

/// What a loop device is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopSpec {
    /// The logical block size in bytes: a power of two from 512 to a page. The file's last bytes that fill no sector
    /// are not reachable; check its size first.
    pub block_size: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// Read and write the file past the kernel's cache, which the device has anyway.
    pub direct_io: bool,
}

/// A loop device that this process holds. Dropping it lets go without waiting: what the kernel has cached is then
/// written when the last user closes it.
#[derive(Debug)]
pub struct Loop {
    number: u32,
    /// Dropped, it ends the thread that holds the device. Nothing once that has let go.
    orders: Option<Sender<Order>>,
}

/// To be flushed and closed, with where to tell how that went.
type Order = Sender<io::Result<()>>;

impl Loop {
    /// Makes a loop device over the file `backing`.
    ///
    /// # Errors
    /// `NotFound` where the kernel has no loop devices, `PermissionDenied` for ordinary users, `TimedOut` if the file
    /// does not answer within `limit`; as the kernel says.
    pub fn attach(backing: &Path, spec: LoopSpec, limit: Duration) -> io::Result<Self> {
        let (orders, received) = channel();
        let (tell, told) = channel();
        let backing = backing.to_owned();
        apart::start(move || hold(&backing, spec, &tell, &received))?;
        let number = answer(&told, limit)?;
        Ok(Self { number, orders: Some(orders) })
    }

    /// The number in `/dev/loopN`.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Flushes what the kernel has cached, and lets go. Unless others have it open it is detached then.
    ///
    /// # Errors
    /// `ResourceBusy` if it is mounted or otherwise claimed: nothing has changed then. `TimedOut` if the file does not
    /// take everything within `limit`, and what the flush answers: it is let go all the same.
    pub fn detach(&mut self, limit: Duration) -> io::Result<()> {
        let Some(orders) = self.orders.take() else { return Ok(()) };
        let (tell, told) = channel();
        // Where nobody takes the order any more, nobody answers it either.
        let _ = orders.send(tell);
        let detached = answer(&told, limit);
        if detached.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
            self.orders = Some(orders);
        }
        detached
    }
}

fn answer<T>(told: &Receiver<io::Result<T>>, limit: Duration) -> io::Result<T> {
    told.recv_timeout(limit).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(io::ErrorKind::TimedOut.into()),
        RecvTimeoutError::Disconnected => Err(io::Error::other("the thread that holds the loop device has gone")),
    })
}

/// The thread that holds the device.
fn hold(backing: &Path, spec: LoopSpec, tell: &Sender<io::Result<u32>>, orders: &Receiver<Order>) {
    let (number, device) = match configure_free(backing, spec) {
        Ok(made) => made,
        Err(error) => return drop(tell.send(Err(error))),
    };
    if tell.send(Ok(number)).is_err() {
        return; // nobody waits for it any more
    }
    while let Ok(tell) = orders.recv() {
        match claim(number, spec.read_only) {
            Err(busy) => drop(tell.send(Err(busy))),
            Ok(claimed) => {
                let flushed = device.sync_all();
                drop((device, claimed));
                return drop(tell.send(flushed));
            }
        }
    }
}

/// Opens a device so that nobody can mount it meanwhile.
fn claim(number: u32, read_only: bool) -> io::Result<File> {
    open(number, read_only, libc::O_EXCL)
}

fn open(number: u32, read_only: bool, flags: i32) -> io::Result<File> {
    let path = PathBuf::from(format!("/dev/loop{number}"));
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
}

fn configure_free(backing: &Path, spec: LoopSpec) -> io::Result<(u32, File)> {
    let backing = OpenOptions::new().read(true).write(!spec.read_only).open(backing)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let mut last = None;
    for _ in 0..TRIES {
        // SAFETY: this ioctl takes no argument.
        let free = unsafe { abi::call_with_integer::<LOOP_CTL_GET_FREE>(&control, 0) }?;
        let number = free.unsigned_abs();
        let device = open(number, spec.read_only, 0)?;
        match configure(&device, &backing, spec) {
            Ok(()) => return Ok((number, device)),
            // Somebody else was faster.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::ResourceBusy.into()))
}

fn configure(device: &File, backing: &File, spec: LoopSpec) -> io::Result<()> {
    let flag = |flag: raw::_bindgen_ty_1, wanted| if wanted { flag as u32 } else { 0 };
    let flags = flag(raw::LO_FLAGS_AUTOCLEAR, true)
        | flag(raw::LO_FLAGS_READ_ONLY, spec.read_only)
        | flag(raw::LO_FLAGS_DIRECT_IO, spec.direct_io);
    let info = raw::loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: flags,
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    };
    let mut config = raw::loop_config {
        fd: backing.as_raw_fd().unsigned_abs(),
        block_size: spec.block_size,
        info,
        __reserved: [0; 8],
    };
    // SAFETY: that is the struct that the ioctl takes, and there are no addresses in it.
    unsafe { abi::call::<LOOP_CONFIGURE, _>(device, &mut config) }?;
    // Whoever had this number before may have left it read-only (`blockdev --setro`), which outlives his device. To change
    // that takes more rights than to make a device.
    if !spec.read_only && is_read_only(device)? {
        set_read_only(device, false)?;
    }
    Ok(())
}

fn is_read_only(device: &File) -> io::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the ioctl takes the address of an int.
    unsafe { abi::call::<BLKROGET, _>(device, &mut read_only) }?;
    Ok(read_only != 0)
}

fn set_read_only(device: &File, read_only: bool) -> io::Result<()> {
    let mut read_only = libc::c_int::from(read_only);
    // SAFETY: the ioctl takes the address of an int.
    unsafe { abi::call::<BLKROSET, _>(device, &mut read_only) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn spec() -> LoopSpec {
        LoopSpec { block_size: 512, read_only: false, direct_io: false }
    }

    /// Whether it is a device of that file. Once it is not, the number may be anybody's.
    fn is_attached(number: u32, file: &Path) -> bool {
        let backing = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file"));
        backing.is_ok_and(|backing| Path::new(backing.trim_end()) == file)
    }

    fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
        let end = std::time::Instant::now() + LIMIT;
        while !is() {
            assert!(std::time::Instant::now() < end, "waited in vain until {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// This crate knows no testkit: as there, a skip is said past the harness's capture, and is a failure in CI.
    fn attach(path: &Path, spec: LoopSpec) -> Option<Loop> {
        match Loop::attach(path, spec, LIMIT) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                assert!(std::env::var_os("CI").is_none_or(|value| value != "true"), "CI must have loop devices");
                let _ =
                    io::Write::write_all(&mut io::stderr(), format!("skipped: no loop devices: {error}\n").as_bytes());
                None
            }
            made => Some(made.expect("a loop device can be made")),
        }
    }

    #[test]
    fn a_file_is_a_device_until_it_is_detached() {
        let dir = tempfile::tempdir().expect("there is room");
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 8192]).expect("there is room");
        let Some(mut device) = attach(&path, spec()) else { return };
        let number = device.number();
        let mut seen = Vec::new();
        open(number, true, 0).expect("it is there").read_to_end(&mut seen).expect("it reads");
        assert_eq!(seen, [7; 8192]);
        let user = claim(number, true).expect("nobody has claimed it");
        let busy = device.detach(LIMIT).expect_err("it is claimed");
        assert_eq!(busy.kind(), io::ErrorKind::ResourceBusy);
        assert!(is_attached(number, &path));
        drop(user);
        // Whoever starts a process meanwhile has everything open once more, for a moment.
        wait_until("it can be detached", || match device.detach(LIMIT) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => false,
            detached => detached.map(|()| true).expect("nobody has it"),
        });
        wait_until("it is detached", || !is_attached(number, &path));
        device.detach(LIMIT).expect("again is the same as once");
    }

    /// Leaves a number to be written by whoever has it next.
    struct Tidy(u32);

    impl Drop for Tidy {
        fn drop(&mut self) {
            let _ = open(self.0, true, 0).and_then(|device| set_read_only(&device, false));
        }
    }

    #[test]
    fn a_number_that_was_left_read_only_can_be_written_again() {
        let file = tempfile::NamedTempFile::new().expect("there is room");
        file.as_file().set_len(4096).expect("there is room");
        let again = || {
            let number = {
                let mut device = attach(file.path(), spec())?;
                set_read_only(&open(device.number(), true, 0).expect("it is there"), true).expect("root may");
                device.detach(LIMIT).expect("nobody has it");
                device.number()
            };
            let _tidy = Tidy(number);
            wait_until("it is detached", || !is_attached(number, file.path()));
            // The kernel gives the first that is free. Somebody else may be faster.
            let mut others = Vec::new();
            while let Some(device) = attach(file.path(), spec()).filter(|_| others.len() < 8) {
                if device.number() == number {
                    return Some(Some(device));
                }
                others.push(device);
            }
            Some(None)
        };
        for _ in 0..20 {
            match again() {
                None => return, // there are none
                Some(None) => {}
                Some(Some(device)) => {
                    let mut opened = open(device.number(), false, 0).expect("it is there");
                    return io::Write::write_all(&mut opened, &[1; 512]).expect("it can be written");
                }
            }
        }
        panic!("the same number is never to be had again");
    }

    #[test]
    fn a_device_that_is_let_go_detaches_by_itself() {
        let file = tempfile::NamedTempFile::new().expect("there is room");
        file.as_file().set_len(4096).expect("there is room");
        let Some(device) = attach(file.path(), LoopSpec { read_only: true, ..spec() }) else { return };
        let number = device.number();
        drop(device);
        wait_until("it is detached", || !is_attached(number, file.path()));
    }

    #[test]
    fn a_file_that_is_absent_is_an_error() {
        let error = Loop::attach(Path::new("/absent/file"), spec(), LIMIT).expect_err("there is no such file");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
