//! The gRPC transport from outside: what it promises as a backend, what it does when things go wrong, and what it says
//! on the wire.

mod chunking;
mod common;
mod connecting;
mod contract;
mod faults;
mod foreign;
mod lies;
mod limits;
mod migration;
mod slow_lines;
