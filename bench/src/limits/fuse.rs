//! A FUSE file system with one file that answers reads from a buffer that is always the same, and takes writes without
//! looking at them: what the kernel's FUSE and the `fuser` crate cost by themselves. And one that does keep its bytes,
//! in the simplest way: what it costs besides that they are in memory and not in the processor's cache.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};
use r3map_file::FileSettings;
use tempfile::TempDir;

const FILE: INodeNo = INodeNo(INodeNo::ROOT.0 + 1);
const NAME: &str = "static";
const FOR_EVER: Duration = Duration::from_secs(3600);

/// What the file has in it.
pub(crate) enum Content {
    /// The same bytes wherever it is read. What is written goes nowhere.
    Static,
    /// These, which writes change.
    Stored(Vec<u8>),
}

/// A mounted null file system.
pub(crate) struct NullFile {
    session: Option<BackgroundSession>,
    directory: TempDir,
}

impl NullFile {
    /// Mounts a file of `size` bytes; what concerns the kernel is taken from `settings`.
    pub(crate) fn mount(size: u64, content: Content, settings: &FileSettings) -> Result<Self> {
        let directory = TempDir::with_prefix("r3map-bench-null-")?;
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("null".into()),
            MountOption::DefaultPermissions,
            MountOption::CUSTOM(format!("max_read={}", settings.max_read)),
        ];
        config.n_threads = settings.threads.map(usize::from);
        config.clone_fd = true;
        let bytes = match content {
            Content::Static => Bytes::Static(vec![0xa5; settings.max_request.max(settings.read_ahead) as usize]),
            Content::Stored(bytes) => Bytes::Stored(RwLock::new(bytes)),
        };
        let file_system = Null { size, bytes, settings: settings.clone() };
        let session = Session::new(file_system, directory.path(), &config).context("mounting the null file system")?;
        let mounted = Self { session: Some(session.spawn()?), directory };
        raise_read_ahead(mounted.directory.path(), settings.read_ahead)?;
        Ok(mounted)
    }

    /// The path of the file.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join(NAME)
    }
}

impl Drop for NullFile {
    fn drop(&mut self) {
        // A process that is just being started has this one's files for a moment: by then the path must be free. Where
        // only the helper may unmount, the session has it do the same.
        let _ = rustix::mount::unmount(self.directory.path(), rustix::mount::UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

/// Only root may; for others it stays at the kernel's 128 KiB, for ours too.
fn raise_read_ahead(mounted: &Path, bytes: u32) -> Result<()> {
    let device = rustix::fs::stat(mounted).context("looking at the null file system")?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let _ = std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), (bytes / 1024).to_string());
    Ok(())
}

struct Null {
    size: u64,
    bytes: Bytes,
    settings: FileSettings,
}

enum Bytes {
    Static(Vec<u8>),
    Stored(RwLock<Vec<u8>>),
}

impl Null {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, perm, size) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o755, 0),
            _ => (FileType::RegularFile, 0o644, self.size),
        };
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let time = UNIX_EPOCH;
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            blksize: 64 << 10,
            flags: 0,
        }
    }
}

impl Filesystem for Null {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for capability in [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP] {
            let _ = config.add_capabilities(capability);
        }
        let _ = config.set_max_write(self.settings.max_request);
        let _ = config.set_max_background(self.settings.max_background.get());
        let _ = config.set_max_readahead(self.settings.read_ahead);
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&FOR_EVER, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_EVER, &self.attributes(ino));
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
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
        let len = u64::from(size).min(self.size.saturating_sub(offset));
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        match &self.bytes {
            Bytes::Static(bytes) => reply.data(&bytes[..at(len).min(bytes.len())]),
            Bytes::Stored(bytes) => {
                let bytes = bytes.read().unwrap_or_else(PoisonError::into_inner);
                reply.data(&bytes[at(offset)..at(offset + len)]);
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
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if let Bytes::Stored(bytes) = &self.bytes {
            let mut bytes = bytes.write().unwrap_or_else(PoisonError::into_inner);
            let place = usize::try_from(offset).ok().and_then(|start| bytes.get_mut(start..start + data.len()));
            match place {
                Some(place) => place.copy_from_slice(data),
                None => return reply.error(Errno::ENOSPC),
            }
        }
        // One request is at most 16 MiB.
        reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: fuser::ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn read_and_write(content: Content, wrote: impl Fn(&[u8]) -> Vec<u8>) {
        let null = NullFile::mount(3 << 20, content, &FileSettings::default()).unwrap();
        let bytes = std::fs::read(null.path()).unwrap();
        assert!(bytes.len() == 3 << 20 && bytes.iter().all(|byte| *byte == 0xa5));
        let file = std::fs::OpenOptions::new().read(true).write(true).open(null.path()).unwrap();
        let change = vec![7; 1 << 20];
        file.write_all_at(&change, 1 << 20).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        drop(file);
        assert!(std::fs::read(null.path()).unwrap() == wrote(&change));
        let path = null.path();
        drop(null);
        assert!(!path.exists());
    }

    #[test]
    fn the_file_has_its_size_and_reads_and_takes_bytes() {
        if !Path::new("/dev/fuse").exists() {
            return r3map_testkit::skip("no /dev/fuse");
        }
        read_and_write(Content::Static, |_| vec![0xa5; 3 << 20]);
        read_and_write(Content::Stored(vec![0xa5; 3 << 20]), |change| {
            let mut bytes = vec![0xa5; 3 << 20];
            bytes[1 << 20..2 << 20].copy_from_slice(change);
            bytes
        });
    }
}
