//! One queue of a ublk device: requests come out, results go in. It decides nothing about either.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::ioctl::Opcode;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::abi::{self, Descriptor};

/// What the bell's entry is called; tags are below.
const BELL: u64 = u64::MAX;
const SECTOR: u64 = 512;

/// A device's channel to its server, `/dev/ublkcN`. Cloning gives another handle to the same one; the kernel lets go of
/// the server when the last one is gone.
#[derive(Debug, Clone)]
pub struct Channel(Arc<File>);

impl Channel {
    /// Opens the channel of device `id`.
    ///
    /// # Errors
    /// `NotFound` if there is none (yet), EBUSY if somebody has it open.
    pub fn open(id: u32) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(format!("/dev/ublkc{id}"))?;
        Ok(Self(Arc::new(file)))
    }
}

/// Wakes the thread that waits in [`Queue::wait`]. Rung before, it is heard by the next wait; again is the same as once.
#[derive(Debug, Clone)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    /// A bell that was not rung.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Rings it.
    pub fn ring(&self) {
        // Fails only where it has been rung 2^64 - 2 times without being heard, which is then heard too.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    fn hush(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0u8; 8]);
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Give bytes.
    Read,
    /// Take bytes.
    Write,
    /// Make durable what has been written.
    Flush,
    /// The bytes are not needed any more.
    Discard,
    /// Let the bytes be zeros.
    WriteZeroes,
    /// What this program does not know.
    Unknown(u8),
}

impl From<u8> for Operation {
    fn from(number: u8) -> Self {
        match number {
            abi::OP_READ => Self::Read,
            abi::OP_WRITE => Self::Write,
            abi::OP_FLUSH => Self::Flush,
            abi::OP_DISCARD => Self::Discard,
            abi::OP_WRITE_ZEROES => Self::WriteZeroes,
            other => Self::Unknown(other),
        }
    }
}

/// A request of the kernel, which waits until [`Queue::commit`] has its result.
#[derive(Debug)]
pub struct Request {
    /// Its number among those of its queue that are under way.
    pub tag: u16,
    /// What it asks for.
    pub operation: Operation,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// A write must be durable when it is answered.
    pub fua: bool,
    /// Zeros must keep their room.
    pub no_unmap: bool,
    /// Its bytes.
    pub transfer: Transfer,
}

/// The bytes of one request, in the kernel. Calls fail once the request is answered or its device is gone.
#[derive(Debug, Clone)]
pub struct Transfer {
    channel: Channel,
    position: u64,
    len: u64,
}

impl Transfer {
    /// Gives bytes of a read to the kernel, `at` bytes from its beginning.
    ///
    /// # Errors
    /// `InvalidInput` past its end; as the kernel says.
    pub fn give(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.channel.0.write_all_at(bytes, self.place(at, bytes.len())?)
    }

    /// Takes bytes of a write from the kernel.
    ///
    /// # Errors
    /// As [`Self::give`].
    pub fn take(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.channel.0.read_exact_at(bytes, self.place(at, bytes.len())?)
    }

    fn place(&self, at: u64, len: usize) -> io::Result<u64> {
        match at.checked_add(len as u64) {
            Some(end) if end <= self.len => Ok(self.position + at),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "past the end of the request")),
        }
    }
}

/// What a slot of the queue is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// The kernel will put a request there.
    Fetching,
    /// A request is under way.
    Ours,
    /// Nothing comes there any more.
    Ended,
}

/// One queue of a device. It is to be used by the thread that has made it only: the kernel refuses others.
///
/// Dropping it fails what is under way, and gives the device up.
pub struct Queue {
    // Dropped in this order: nothing is fetched any more when the descriptors go.
    ring: IoUring,
    descriptors: Descriptors,
    channel: Channel,
    id: u16,
    slots: Vec<Slot>,
    bell: Bell,
    bell_is_set: bool,
}

impl Queue {
    /// Fetches from queue `id` of a device whose queues have `depth` requests.
    ///
    /// # Errors
    /// `InvalidInput` for a depth of none or above 4096; where the kernel forbids io_uring or is out of memory.
    pub fn new(channel: &Channel, id: u16, depth: u16, bell: &Bell) -> io::Result<Self> {
        if depth == 0 || depth > abi::MAX_QUEUE_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let entries = (u32::from(depth) + 1).next_power_of_two();
        let ring = IoUring::builder().setup_coop_taskrun().setup_single_issuer().build(entries)?;
        let descriptors = Descriptors::map(channel, id, depth)?;
        let slots = vec![Slot::Fetching; depth.into()];
        let (channel, bell) = (channel.clone(), bell.clone());
        let mut queue = Self { ring, descriptors, channel, id, slots, bell, bell_is_set: false };
        (0..depth).try_for_each(|tag| queue.command(abi::FETCH_REQ, tag, 0))?;
        queue.ring.submit()?;
        Ok(queue)
    }

    /// Gives the results of [`Self::commit`] to the kernel, waits for requests or the bell, and puts the requests into
    /// `requests`. There may be none.
    ///
    /// # Errors
    /// As `io_uring_enter(2)`; the queue is of no use then.
    pub fn wait(&mut self, requests: &mut Vec<Request>) -> io::Result<()> {
        if !self.bell_is_set {
            let entry = opcode::PollAdd::new(Fd(self.bell.0.as_raw_fd()), libc::POLLIN as u32).multi(true);
            self.push(&entry.build().user_data(BELL))?;
            self.bell_is_set = true;
        }
        match self.ring.submit_and_wait(1) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            waited => drop(waited?),
        }
        loop {
            let next = self.ring.completion().next();
            match next {
                Some(entry) => self.completed(&entry, requests),
                None => return Ok(()),
            }
        }
    }

    /// Answers a request, at the next [`Self::wait`]: with how many bytes were moved, or with a negative errno.
    ///
    /// # Errors
    /// `InvalidInput` if no such request is under way.
    pub fn commit(&mut self, tag: u16, result: i32) -> io::Result<()> {
        match self.slots.get_mut(usize::from(tag)) {
            Some(slot) if *slot == Slot::Ours => *slot = Slot::Fetching,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        self.command(abi::COMMIT_AND_FETCH_REQ, tag, result)
    }

    /// Whether nothing comes any more: the device was stopped, and all requests are answered.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.slots.iter().all(|slot| *slot == Slot::Ended)
    }

    fn completed(&mut self, entry: &cqueue::Entry, requests: &mut Vec<Request>) {
        if entry.user_data() == BELL {
            self.bell.hush();
            self.bell_is_set = cqueue::more(entry.flags());
            return;
        }
        let Ok(tag) = u16::try_from(entry.user_data()) else { return };
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else { return };
        // Whatever the kernel does not give a request for, it will not give one for any more.
        *slot = if entry.result() == 0 { Slot::Ours } else { Slot::Ended };
        if *slot == Slot::Ours {
            requests.push(self.request(tag));
        }
    }

    fn request(&self, tag: u16) -> Request {
        let Descriptor { op_flags, nr_sectors, start_sector, .. } = self.descriptors.get(tag);
        let [.., operation] = op_flags.to_be_bytes();
        let len = u64::from(nr_sectors) * SECTOR;
        let position = abi::data_position(self.id, tag);
        Request {
            tag,
            operation: operation.into(),
            offset: start_sector.saturating_mul(SECTOR),
            len,
            fua: op_flags & abi::IO_F_FUA != 0,
            no_unmap: op_flags & abi::IO_F_NOUNMAP != 0,
            transfer: Transfer { channel: self.channel.clone(), position, len },
        }
    }

    fn command(&mut self, command: Opcode, tag: u16, result: i32) -> io::Result<()> {
        let fd = Fd(self.channel.0.as_raw_fd());
        let entry = opcode::UringCmd16::new(fd, command).cmd(abi::io_command(self.id, tag, result));
        self.push(&entry.build().user_data(tag.into()))
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: no entry of this file has an address in it. The descriptors of files are open for as long as the ring.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }
}

/// The descriptors of a queue's requests: memory of the kernel, mapped to be read.
struct Descriptors {
    base: NonNull<Descriptor>,
    depth: u16,
}

// SAFETY: it is an address of memory that stays mapped for as long as this lives, whatever thread has it.
unsafe impl Send for Descriptors {}

impl Descriptors {
    fn map(channel: &Channel, queue: u16, depth: u16) -> io::Result<Self> {
        let (len, position) = (abi::descriptors_size(depth), abi::descriptors_position(queue));
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &*channel.0, position) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered with a null address"))?;
        Ok(Self { base, depth })
    }

    /// # Panics
    /// If there is no such request.
    fn get(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth);
        // SAFETY: the mapping has `depth` descriptors, and `tag` is below that.
        let place = unsafe { self.base.add(tag.into()) };
        // SAFETY: the place is mapped and aligned; the kernel has written it before it gave out the request, and writes it
        // again only after that is answered. Volatile, because the compiler does not see it write.
        unsafe { place.read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        let base: *mut c_void = self.base.as_ptr().cast();
        // SAFETY: nothing refers to the pages any more. It fails only for ranges that are no mapping.
        let _ = unsafe { munmap(base, abi::descriptors_size(self.depth)) };
    }
}
