//! What the machine itself can do: the least code that moves the same bytes. Nothing of r3map's is in here but the safe
//! wrappers around system calls in `r3map-sys`.

pub(crate) mod fuse;
pub(crate) mod memory;
pub(crate) mod pages;
pub(crate) mod processors;
pub(crate) mod tcp;
