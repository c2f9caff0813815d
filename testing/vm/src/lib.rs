//! Runs test binaries inside a small virtual machine with a stock Debian kernel, for what the build machine's own kernel
//! lacks: network block devices, ublk, a delay on a link.
//!
//! Every cargo test target named `vm` runs there instead of on the host: a crate that wants such tests adds
//! `tests/vm/main.rs`. What the machine contains besides them is one table, [`contents`]. `cargo xtask` builds the
//! binaries and calls [`Vm::run`]; this crate knows nothing of the crates whose tests it runs.
//!
//! ```text
//!   host                                             guest
//!   kernel   apt-get download, cached                init = r3map-vm-guest
//!   image    programs + their libraries,   ───────►   loads modules, mounts
//!            modules, tests, the plan (cpio)          for each test: starts it, watches its deadline,
//!   machine  QEMU: KVM if it works, else TCG          kills what it leaves, looks for stuck processes
//!   watch    results, deadlines            ◄───────   one JSON object a line over a virtio port
//!            console's tail if it dies                powers off
//! ```

mod console;
pub mod contents;
mod cpio;
pub mod guest;
mod image;
mod kernel;
mod libraries;
mod machine;
mod modules;
pub mod plan;
mod protocol;
mod report;
mod vm;
mod watch;

pub use plan::{Binary, Plan, Work};
pub use report::{Report, Verdict};
pub use vm::{Settings, Vm};
