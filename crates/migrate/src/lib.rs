//! Live migration: moving a region from one host to another while an application uses it.
//!
//! A [`Seeder`] is the side that a region leaves, a [`Leecher`] the side that it comes to. The two phases of the design
//! are two types: a `Leecher<Pulling>` copies while the application runs over there, [`Leecher::finalize`] makes it a
//! `Leecher<Running>`, whose application runs here, and [`Leecher::release`] makes that the next seeder. A wrong order of
//! calls does not compile.
//!
//! What passes between the two, and who owns the region when, is in [`protocol`]. This crate knows no frontend and no
//! transport: a region that can leave is a [`Source`], a place where one can arrive is a [`Target`], and whatever carries
//! the calls is a [`Peer`]. It reads no wall clock and no chance, so that all of it runs in virtual time in tests.

mod convergence;
mod copying;
mod downtime;
mod guarded;
mod hooks;
mod lease;
mod ledger;
mod leecher;
mod order;
mod peer;
pub mod protocol;
mod running;
mod seat;
mod secret;
mod seeder;
mod settings;
mod source;
mod target;

pub use convergence::{Precopy, Unconverged, Verdict};
pub use downtime::{Downtime, Report};
pub use guarded::Guarded;
pub use hooks::Hooks;
pub use ledger::{Ledger, Standing};
pub use leecher::{FinalizeError, Leecher, LeecherParts, Owed, Pulling, Unsettled};
pub use peer::Peer;
pub use running::{Former, Running};
pub use secret::Secret;
pub use seeder::{Admitted, Seeder, SeederParts, SeederPhase, SeederProgress};
pub use settings::{LeecherSettings, PullPhase, PullProgress};
pub use source::{Fencing, Source};
pub use target::{Arrival, Shown, Target};
