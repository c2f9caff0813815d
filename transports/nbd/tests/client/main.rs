//! The client against servers: nbdkit, qemu-nbd, qemu-storage-daemon, and liars.

mod contract;
mod faults;
mod foreign;
mod liar;
mod lies;
mod support;
mod tls;
mod vanished;
