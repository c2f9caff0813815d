//! Mappings whose pages are filled on demand: what the kernel does, and what this crate makes of it.

mod common;
mod facts;
mod mapping;
