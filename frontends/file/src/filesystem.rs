//! The file system that the kernel talks to: one regular file of a fixed size, as the root or as the one entry of a
//! root directory. It decides what may be asked; `requests` does it.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use r3map_core::{BLOCK_SIZE, Backend, ChunkSize};
use rustix::fs::OFlags;

use crate::attributes::{Attributes, Change};
use crate::requests::{self, Allocate, KEEP_SIZE};
use crate::service::Service;
use crate::settings::{Caching, FileSettings, Show};

/// How long the kernel may answer `stat` by itself. Only times can differ; the size never changes.
const ATTRIBUTES_KEPT: Duration = Duration::from_secs(1);
/// The bounds of `st_blksize`, the unit that programs like to read and write in.
const IO_SIZE: Range<u64> = 4096..(1 << 20) + 1;
const MAX_NAME: u32 = 255;
/// The handle of a file that is open for reading, and of one that is open for writing.
const READER: FileHandle = FileHandle(0);
const WRITER: FileHandle = FileHandle(1);

/// What the kernel is told of a region once and for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) size: u64,
    /// The chunk that suits it.
    pub(crate) chunk: ChunkSize,
}

impl Shape {
    pub(crate) fn of(backend: &dyn Backend) -> Self {
        Self { size: backend.size(), chunk: backend.capabilities().preferred_chunk.unwrap_or(ChunkSize::DEFAULT) }
    }

    /// What `st_blksize` suggests: the chunk, within reason.
    fn io_size(self) -> u32 {
        u32::try_from(self.chunk.bytes().clamp(IO_SIZE.start, IO_SIZE.end - 1)).unwrap_or(u32::MAX)
    }
}

/// One file of a fixed size over a backend.
pub(crate) struct RegionFile {
    service: Arc<Service>,
    settings: FileSettings,
    size: u64,
    file: Attributes,
    directory: Option<Directory>,
    /// How many are open for writing. The kernel releases one when its last descriptor and its last mapping are gone, and
    /// has handed over by then what was written through them.
    writers: AtomicUsize,
}

/// The root directory and the name of its one entry.
struct Directory {
    attributes: Attributes,
    name: OsString,
}

/// The inode of the file: the root itself, or the next number if the root is a directory.
pub(crate) fn file_ino(show: &Show) -> INodeNo {
    match show {
        Show::File => INodeNo::ROOT,
        Show::Entry(_) => INodeNo(INodeNo::ROOT.0 + 1),
    }
}

impl RegionFile {
    /// `settings` and `shape` must fit the service's backend.
    pub(crate) fn new(service: Arc<Service>, shape: Shape, settings: FileSettings) -> Self {
        let (size, io_size) = (shape.size, shape.io_size());
        let mode = if settings.read_only { 0o444 } else { 0o644 };
        let file = Attributes::new(file_ino(&settings.show), FileType::RegularFile, size, io_size, mode);
        let directory = match &settings.show {
            Show::File => None,
            Show::Entry(name) => Some(Directory {
                attributes: Attributes::new(INodeNo::ROOT, FileType::Directory, 0, io_size, 0o555),
                name: name.clone(),
            }),
        };
        Self { service, settings, size, file, directory, writers: AtomicUsize::new(0) }
    }

    fn attributes(&self, ino: INodeNo) -> Option<&Attributes> {
        match &self.directory {
            Some(directory) if ino == INodeNo::ROOT => Some(&directory.attributes),
            _ if ino == file_ino(&self.settings.show) => Some(&self.file),
            _ => None,
        }
    }

    /// The part of `len` bytes at `offset` that lies inside the region.
    fn inside(&self, offset: u64, len: u64) -> Range<u64> {
        let start = offset.min(self.size);
        start..offset.saturating_add(len).clamp(start, self.size)
    }

    fn open_flags(&self) -> FopenFlags {
        let caching = match self.settings.caching {
            Caching::Keep => FopenFlags::FOPEN_KEEP_CACHE,
            Caching::UntilOpened => FopenFlags::empty(),
            Caching::Never => FopenFlags::FOPEN_DIRECT_IO,
        };
        // Writes never move the end of the file, so there is nothing that they would have to queue for.
        caching | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
    }

    /// Why an entry cannot be made, removed or renamed.
    fn fixed(&self) -> Errno {
        if self.settings.read_only { Errno::EROFS } else { Errno::EPERM }
    }
}

fn configure(config: &mut KernelConfig, settings: &FileSettings) {
    // Each is used where the kernel has it: several requests per large direct read or write, and shared mappings of
    // files that are not cached.
    for capability in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
        let _ = config.add_capabilities(capability);
    }
    let _ = config.set_max_write(settings.max_request);
    let _ = config.set_max_background(settings.max_background.get());
    // The kernel makes requests as long as the longer of this and the longest write.
    let ahead = settings.read_ahead.clamp(1, settings.max_request);
    if let Err(most) = config.set_max_readahead(ahead) {
        let _ = config.set_max_readahead(most);
    }
}

impl Filesystem for RegionFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        configure(config, &self.settings);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match &self.directory {
            Some(directory) if parent == INodeNo::ROOT && directory.name == name => {
                reply.entry(&ATTRIBUTES_KEPT, &self.file.stat(), Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&ATTRIBUTES_KEPT, &attributes.stat()),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.attributes(ino) else { return reply.error(Errno::ENOENT) };
        if self.settings.read_only {
            return reply.error(Errno::EROFS);
        }
        if size.is_some_and(|size| size != self.size) {
            return reply.error(Errno::EPERM);
        }
        attributes.apply(&Change { mode, uid, gid, accessed: atime, modified: mtime });
        reply.attr(&ATTRIBUTES_KEPT, &attributes.stat());
    }

    fn open(&self, _request: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() == OpenAccMode::O_RDONLY {
            return reply.opened(READER, self.open_flags());
        }
        if self.settings.read_only {
            return reply.error(Errno::EROFS);
        }
        self.writers.fetch_add(1, Ordering::SeqCst);
        reply.opened(WRITER, self.open_flags());
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if handle == WRITER {
            self.writers.fetch_sub(1, Ordering::SeqCst);
        }
        reply.ok();
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let range = self.inside(offset, size.into());
        match self.service.backend() {
            None => reply.error(Errno::ENOTCONN),
            Some(_) if range.is_empty() => reply.data(&[]),
            Some(backend) => {
                self.service.run(requests::read(self.service.clone(), backend, range, reply));
            }
        }
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(backend) = self.service.backend() else { return reply.error(Errno::ENOTCONN) };
        if self.settings.read_only {
            return reply.error(Errno::EROFS);
        }
        let flags = OFlags::from_bits_retain(flags.0.cast_unsigned());
        // Like a full device: what fits is written, and where nothing fits there is no room. For `O_DIRECT` the kernel
        // would turn a part into `EIO`.
        let range = self.inside(offset, data.len() as u64);
        let fits = range.end - range.start == data.len() as u64;
        if !fits && (range.is_empty() || flags.contains(OFlags::DIRECT)) {
            return reply.error(Errno::ENOSPC);
        }
        let data = &data[..usize::try_from(range.end - range.start).unwrap_or(usize::MAX)];
        // `O_SYNC` contains `O_DSYNC`. Not every kernel follows such a write with an `fsync` of its own.
        let sync = flags.contains(OFlags::DSYNC);
        self.file.touch();
        match self.service.write_now(&*backend, offset, data) {
            Some(done) => {
                self.service.run(requests::finish_write(backend, done, data.len(), sync, reply));
            }
            None => {
                let data = self.service.buffers.copy(data);
                self.service.run_write(requests::write(backend, offset, data, sync, reply));
            }
        }
    }

    /// Each `close(2)`. The kernel has handed over what mappings wrote before it asks, and written bytes are with the
    /// backend already, so there is nothing to do; the answer makes the kernel ask no more. Durability is `fsync`'s.
    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        match self.service.backend() {
            None => reply.error(Errno::ENOTCONN),
            Some(_) if self.settings.read_only => reply.ok(),
            Some(backend) => {
                let service = self.service.clone();
                self.service.run(requests::flush(backend, move |error| service.flush_failed(error), reply));
            }
        }
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(backend) = self.service.backend() else { return reply.error(Errno::ENOTCONN) };
        let Some(what) = Allocate::from_mode(mode).filter(|what| what.is_possible(&*backend)) else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        let outside = offset.saturating_add(length) > self.size;
        if self.settings.read_only {
            return reply.error(Errno::EROFS);
        }
        if outside && (what == Allocate::Room || mode & KEEP_SIZE == 0) {
            return reply.error(Errno::ENOSPC);
        }
        self.file.touch();
        self.service.run(requests::allocate(backend, what, self.inside(offset, length), reply));
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match (self.service.backend(), u64::try_from(offset)) {
            (None, _) => reply.error(Errno::ENOTCONN),
            (Some(backend), Ok(offset)) if offset < self.size => {
                // What a mapping has written the kernel does not hand over before it asks, and the backend calls it a hole.
                let holes_are_known = self.writers.load(Ordering::SeqCst) == 0;
                self.service.run(requests::seek(backend, offset, whence, holes_are_known, reply));
            }
            _ => reply.error(Errno::ENXIO),
        }
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(directory) = &self.directory else { return reply.error(Errno::ENOTDIR) };
        let root = (INodeNo::ROOT, FileType::Directory);
        let file = (file_ino(&self.settings.show), FileType::RegularFile);
        let entries = [(root, OsStr::new(".")), (root, OsStr::new("..")), (file, &directory.name)];
        for (next, ((ino, kind), name)) in (1..).zip(entries).filter(|(next, _)| *next > offset) {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let unit = u32::try_from(BLOCK_SIZE).unwrap_or(u32::MAX);
        reply.statfs(self.size.div_ceil(BLOCK_SIZE), 0, 0, 1, 0, unit, MAX_NAME, unit);
    }

    // What follows does not exist here. `ENOSYS` lets the kernel answer by itself from then on (no extended attributes,
    // always ready to poll, copy by reading and writing); the directory and its entry stay as they are.

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _from: INodeNo,
        _from_handle: FileHandle,
        _from_offset: u64,
        _to: INodeNo,
        _to_handle: FileHandle,
        _to_offset: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _data_only: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(self.fixed());
    }

    fn create(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(self.fixed());
    }

    fn mkdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn symlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn unlink(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn rmdir(&self, _request: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn rename(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.fixed());
    }
}
