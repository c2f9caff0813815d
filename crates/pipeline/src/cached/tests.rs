//! The managed region through its public face: against the contract, a model, faults, races that a test stops at chosen
//! points, and restarts.

mod fakes;
mod promises;
mod restarts;

use fakes::{Side, open};
