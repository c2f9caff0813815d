//! End-to-end tests of the whole product: the `r3map` command, the programs that use what it mounts, and the library.
//!
//! Each promise of `docs/semantics.md` names the test that proves it; many of those are here. Nothing is left behind by
//! any of them, however it ends: see [`support::Scene`].

mod support;

mod bad_input;
mod commands;
mod crash;
mod descriptors;
mod devices;
mod documents;
mod entries;
mod exercisers;
mod file_systems;
mod go;
mod lifecycle;
mod migrate;
mod nbd;
mod never_zeros;
mod options;
mod seeding_on;
mod server_gone;
mod slices;
mod slow_link;
mod whole_region;
