//! Devices of the kernel, as programs use them. They need ublk, which is there in the virtual machine of
//! `cargo xtask vm`; elsewhere these tests say that they are skipped.

#![cfg(target_os = "linux")]

mod basics;
mod support;
