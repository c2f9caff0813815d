//! The file frontend as programs see it: a real mount, real system calls.

mod data;
mod support;
