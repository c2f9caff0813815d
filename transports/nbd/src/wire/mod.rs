//! The NBD protocol's messages, without I/O.
