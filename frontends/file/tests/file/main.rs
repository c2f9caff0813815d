//! The file frontend as programs see it: a real mount, real system calls.

mod data;
mod failures;
mod foreign;
mod lifecycle;
mod prepared;
mod region;
mod semantics;
mod server;
mod support;
