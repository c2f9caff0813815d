//! The kernel's NBD client, in the virtual machine of `cargo xtask vm`.

mod failures;
mod foreign;
mod own;
mod support;
