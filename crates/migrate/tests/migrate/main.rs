//! Whole migrations between two hosts in one process and in virtual time: what goes well, what fails at each step, and
//! what must hold whatever happens.

mod chains;
mod doubts;
mod failures;
mod going_on;
mod going_well;
mod hooks;
mod leases;
mod refusals;
mod sources;
mod support;
mod taken_back;
