//! The block frontend: a [`Backend`](r3map_core::Backend) as a block device, a node in `/dev` that file systems, virtual
//! machines and databases use as they use a disk.
//!
//! [`BlockDevice::open`] makes one through ublk (Linux 6.5) or the kernel's NBD client, [`BlockDevice::over_file`] makes a loop device of a file, for
//! instance of one that the file frontend shows. [`check`] says whether and why not a kind works here. Pulling, pushing
//! and retries are not done here: the backend does them, or a stage around it. All kinds need root.
//!
//! # What the device promises
//!
//! | what | answer |
//! |---|---|
//! | size | the region's, which must be whole sectors: anything else is refused, because a tail would be out of reach |
//! | read | the region's bytes; where the backend fails an error, never zeros |
//! | write | when the kernel hands it over and is answered the backend has the bytes; until then they are in the kernel's cache |
//! | `fsync`, `sync`, unmounting a file system, `O_SYNC` | the backend's `flush` (the device has a volatile cache and takes FUA), whose error is theirs |
//! | discard (`fstrim`, `blkdiscard`) | the backend's trim; not offered where it has none |
//! | writing zeros (`fallocate`, `blkdiscard -z`) | the backend's, or plain writes where it has none |
//! | the process dies | users get errors, and the device goes away when they have closed it; or it is kept, see [`Keep`] |
//! | detaching | flushes first; a device that is mounted is not detached unless that is forced |
//!
//! A loop device knows fewer: it discards and zeroes by punching holes into its file.
//!
//! # How it runs
//!
//! For ublk one thread for each queue takes requests from the kernel and asks the backend at once; a request for which the
//! backend has to wait goes on as a task of the runtime, so that any number wait at the same time. Bytes that the backend
//! lends go to the kernel without a copy in between. Blocking calls on the device must not stop the runtime that the
//! backend needs.

mod device;
mod drain;
mod kind;
mod loop_device;
mod nbd;
mod node;
mod service;
mod settings;
mod ublk;

pub use device::BlockDevice;
pub use kind::{Kind, check, remove};
pub use r3map_sys::FileMapping;
pub use settings::{BlockSettings, Keep, Meanwhile};
