//! The managed region through its public face: against the contract, a model, faults, races that a test stops at chosen
//! points, and restarts.

#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]

mod fakes;
mod faults;
mod kept;
mod promises;
mod pulling;
mod pushing;
mod restarts;
mod waits;

use fakes::{Side, open};
