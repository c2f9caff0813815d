//! The file frontend as programs see it: a real mount, real system calls.

mod data;
mod failures;
mod foreign;
mod lifecycle;
mod region;
mod semantics;
mod server;
mod support;
