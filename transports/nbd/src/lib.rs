//! The NBD transport of r3map. It is useful alone: nothing here knows what is served or mapped.
//!
//! - [`wire`]: the protocol's messages, without I/O.

pub mod wire;
