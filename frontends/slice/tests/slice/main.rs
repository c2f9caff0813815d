//! Regions as memory: every promise of the slice frontend, on the kernel that this runs on.

#![expect(
    clippy::cast_possible_truncation,
    reason = "regions in tests fit in memory, and random bytes are cut from words"
)]

mod bytes;
mod common;
mod ending;
mod failures;
mod leaving;
mod map;
mod writes;
