//! ublk: block devices whose requests this process answers, through io_uring.
//!
//! [`Control`] makes, starts, stops and deletes devices; a [`Queue`] takes the requests of one of a device's queues and
//! gives their results back; a [`Transfer`] moves the bytes of one request. What a request does is decided elsewhere.
//!
//! Sources: `include/uapi/linux/ublk_cmd.h` and `Documentation/block/ublk.rst` of the kernel. Devices are made with
//! `UBLK_F_USER_COPY` (Linux 6.5): bytes are moved by calls of this process, so that the kernel never writes into its
//! memory by itself.

mod abi;
mod control;
mod queue;

pub use abi::{DeviceInfo, DeviceState, Features, Limits};
pub use control::{Control, DeviceSpec};
pub use queue::{Bell, Channel, Operation, Queue, Request, Transfer};
