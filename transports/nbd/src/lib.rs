//! The NBD transport of r3map. It is useful alone: nothing here knows what is served or mapped.
//!
//! - [`wire`]: the protocol's messages, without I/O.
//! - [`Client`]: an export of a server, as a backend; [`NbdUri`] names it.
//! - [`Server`]: serves any backends, each as a [`ServerExport`].
//! - [`kernel`]: a connection as a block device, through the kernel's own client.
//! - [`tls`]: certificates for either side.

mod client;
mod eager;
pub mod kernel;
mod server;
mod stream;
pub mod tls;
mod uri;
pub mod wire;

pub use client::{Client, ClientSettings, Export, Listed};
pub use eager::{Eager, Socket};
pub use server::{Server, ServerExport, ServerSettings, Tls};
pub use stream::Duplex;
pub use uri::{Address, NbdUri, TlsOptions, VerifyPeer};
