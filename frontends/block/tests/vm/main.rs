//! Devices of the kernel, as programs use them: through ublk and through the kernel's NBD client. They run in the virtual
//! machine of `cargo xtask vm`; elsewhere these tests say that they are skipped.

#![cfg(target_os = "linux")]

mod data;
mod file_systems;
mod keeping;
mod killed;
mod lifecycle;
mod slow;
mod support;
mod waiting;
