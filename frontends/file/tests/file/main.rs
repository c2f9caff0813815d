//! The file frontend as programs see it: a real mount, real system calls.

mod data;
mod failures;
mod region;
mod semantics;
mod support;
