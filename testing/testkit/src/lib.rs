//! What the tests of r3map share. It knows only the contracts of `r3map-core`, so that every crate above can test with
//! it; it is never part of a shipped program, except for [`proxy`] and [`fill`], which the demo and the benchmark use.
//!
//! - [`conformance`]: every sentence of the [`Backend`](r3map_core::Backend) contract as a named case; one line per
//!   backend or stage.
//! - [`model`]: random operations against a plain `Vec<u8>`.
//! - [`fill`]: bytes that betray misplacement.
//! - [`store`]: the simplest backend that keeps every promise, with the capabilities one asks for.
//! - [`faults`]: errors, delays, short reads, cancellations and pauses through the public trait.
//! - [`proxy`]: a TCP and Unix proxy that adds a round trip, cuts, stalls and heals.
//! - [`hosts`]: two hosts with a wire between them that can be cut.
//! - [`process`], [`crash`]: running programs, and killing them.

pub mod conformance;
pub mod crash;
pub mod faults;
pub mod fill;
pub mod hosts;
mod limits;
pub mod model;
pub mod process;
pub mod proxy;
pub mod random;
pub mod store;

pub use limits::{deadline, in_vm, skip, skip_allowed};
