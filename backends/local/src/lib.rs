//! Backends on this host: memory, file, directory and null, and the local sides of a cached region that rest on them.
//!
//! Nothing here talks to a network or knows what a remote is. Each backend says in its file what survives a crash of
//! the process and what survives a loss of power.

mod bitmap;
mod boot;
mod cache_file;
mod directory;
mod durability;
mod file;
mod memory;
mod null;
mod opened;
mod stored;
mod window;

pub use cache_file::CacheFile;
pub use directory::{Directory, DirectorySettings};
pub use file::{File, FileSettings};
pub use memory::Memory;
pub use null::Null;
pub use stored::Stored;
