//! The file frontend: a [`Backend`](r3map_core::Backend) as one regular file, through FUSE, for any program.

mod attributes;
mod blocking;
mod buffers;
mod filesystem;
mod kernel;
mod mount;
mod mountinfo;
mod opened;
mod place;
mod requests;
mod service;
mod session;
mod settings;

pub use mount::FileMount;
pub use opened::OpenedFile;
pub use settings::{Caching, FileSettings, Show};
