//! The file frontend: a [`Backend`](r3map_core::Backend) as one regular file, through FUSE, for any program. Nothing has
//! to be installed for root; ordinary users need `fusermount3` (Debian's `fuse3`).
//!
//! [`FileMount`] shows a region on a path, [`OpenedFile`] gives it as an open [`std::fs::File`] without a path. Pulling,
//! pushing and retries are not done here: the backend does them, or a stage around it.
//!
//! # What the file promises
//!
//! | call | answer |
//! |---|---|
//! | `read`, `mmap` | the region's bytes; where the backend fails `EIO` (`SIGBUS` in a mapping), never zeros, and the next try asks again |
//! | `write` | when it returns the backend has the bytes; it is never cached on the way (no write-back cache) |
//! | `write` past the end | what fits is written; where nothing fits `ENOSPC`, as on a full device (also for an `O_DIRECT` write of which a part would fit) |
//! | stores to a shared mapping | handed over by `msync`, `fsync`, `munmap`, `close`, unmounting, or the kernel after some seconds |
//! | `fsync`, `fdatasync`, `O_SYNC`, `O_DSYNC` | the backend's `flush`, whose error is theirs |
//! | `close` | makes nothing durable, as with any file: what was written is with the backend, but a crash of the backend may lose it before a `flush` |
//! | `truncate`, `ftruncate`, `O_TRUNC` | `EPERM` unless the size stays the same: emptying a region by a wrong `>` would be too easy. Use `dd conv=notrunc` |
//! | `fallocate` | inside the region: punching holes trims, zeroing a range zeroes, room is always there. Beyond the end `ENOSPC`; other modes, or a backend that can neither trim nor zero, `EOPNOTSUPP` |
//! | `lseek` with `SEEK_DATA`, `SEEK_HOLE` | from the backend's extents; all is data where it does not know, and while anybody has the file open or mapped for writing: the kernel may hold what a mapping wrote |
//! | `stat` | the exact size; as many blocks as it would take without holes; mode 0644 (0444 if read-only) and the owner who mounted, which `chmod` and `chown` change while it is mounted |
//! | `flock`, `fcntl` locks | between the processes of this host |
//! | changes to a read-only file | `EROFS` |
//! | everything once it is detached, or the process that serves it is gone | `ENOTCONN` |
//!
//! Errors of the backend become what [`Error::errno`](r3map_core::Error::errno) says, and are logged.
//!
//! # How it runs
//!
//! Threads of this crate take requests from the kernel and ask the backend at once; a request for which the backend has
//! to wait goes on as a task of the runtime, so that any number wait at the same time. Bytes that the backend lends in
//! one piece go to the kernel without a copy. The kernel bounds what is under way: each thread of a program has one
//! request, and read-ahead and write-back have [`FileSettings::max_background`], so that memory is bounded too.
//!
//! # Loop devices and swap on the file
//!
//! Both work. When memory is short, a program that waits for its writes to reach the file must not make the process wait
//! that is to take them. For that the threads that take requests are marked (`PR_SET_IO_FLUSHER`, which needs
//! `CAP_SYS_RESOURCE`); the runtime's threads belong to the caller, who may mark them in the same way. Where that is not
//! allowed, do not run this process in the same memory cgroup as those programs: under a tight limit of version 1 it
//! was seen to stop for ever. Nothing can be promised for swap: a process whose own pages are swapped out to the file it
//! serves waits for itself, unless it has locked them (`mlockall`).
//!
//! # A process that uses the file it serves
//!
//! - Blocking calls on the file must not stop the runtime that the backend needs; see [`FileMount::open`].
//! - Do not store to a *shared* mapping of it. While the kernel waits for such pages to be taken (in `munmap`, or at a
//!   store to a page that is just being written), it keeps the process's address space locked, and as soon as a thread
//!   that serves needs more memory both wait for ever. `msync` before `munmap` avoids the first. Mappings for reading,
//!   private mappings, and mappings of other processes do no harm. For memory of one's own there is the slice frontend.
//! - If it is killed while one of its threads waits for the file, or before all stores to such a mapping were handed
//!   over, the kernel waits for an answer before it lets the process go. Only `umount -f PATH` (or
//!   `/sys/fs/fuse/connections/N/abort`) ends that.

mod attributes;
mod filesystem;
mod flusher;
mod kernel;
mod mount;
mod mountinfo;
mod opened;
mod place;
mod prepared;
mod requests;
mod service;
mod session;
mod settings;

pub use flusher::Flusher;
pub use mount::FileMount;
pub use opened::OpenedFile;
pub use prepared::PreparedMount;
pub use settings::{Caching, FileSettings, Show};
