//! Regions as memory: every promise of the slice frontend, on the kernel that this runs on.

mod bytes;
mod common;
mod ending;
mod failures;
mod map;
mod writes;
