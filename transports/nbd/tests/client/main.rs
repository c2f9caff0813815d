//! The client against servers: nbdkit, qemu-nbd, qemu-storage-daemon, our own, and liars.

mod contract;
mod support;
