//! The command where the kernel has what the build machine's lacks: the virtual machine of `cargo xtask vm`.

mod migrate;
mod mount;
mod nbd;
