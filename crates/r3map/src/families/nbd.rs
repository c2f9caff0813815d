//! `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and the same with TLS as `nbds`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use r3map_core::{Access, Backend, Error, ErrorKind, Operation, Result};
use r3map_nbd::kernel::{self, Interface, Settings};
use r3map_nbd::tls::{ClientCertificates, server_config};
use r3map_nbd::{
    Address, Client, ClientSettings, Listed, NbdUri, Server, ServerExport, ServerSettings, Tls, TlsOptions, VerifyPeer,
};

use crate::{Family, Listen, ListenOptions, Listener, Open, OpenOptions, Registry, Uri};

/// How long a server that is told to stop goes on with what is in flight.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

pub(super) fn register(registry: &mut Registry) {
    let mut add = |scheme, example, about| {
        registry.register(Family { scheme, example, about, open: Arc::new(Nbd), listen: Some(Arc::new(Nbd)) });
    };
    add("nbd", "nbd://HOST/EXPORT", "an export of an NBD server");
    add("nbds", "nbds://HOST/EXPORT", "the same, with TLS");
    add("nbd+unix", "nbd+unix:///EXPORT?socket=PATH", "an export behind a Unix socket");
    add("nbds+unix", "nbds+unix:///EXPORT?socket=PATH", "the same, with TLS");
}

/// Names the exports of the NBD server that `uri` names, with what it says about each. The export in the name does not
/// matter.
///
/// # Errors
/// As opening it; `Denied` or `InvalidInput` if the server does not tell.
pub async fn nbd_list(uri: &Uri) -> Result<Vec<Listed>> {
    let uri = uri.to_string().parse()?;
    crate::engine::run(async move { Client::list(uri, &ClientSettings::default()).await }).await
}

/// How [`nbd_attach`] makes a block device of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdAttach {
    /// The device node, `/dev/nbdN`; by default one that is free, or with `take_over` the one that the export has.
    pub device: Option<PathBuf>,
    /// The most connections, where the server allows several.
    pub connections: NonZeroUsize,
    /// Give a device that is attached, and whose server is gone, new connections, instead of attaching one.
    pub take_over: bool,
    /// How long a request may take before its connection counts as dead.
    pub request_timeout: Duration,
    /// How long requests wait for a take-over when all connections are dead.
    pub dead_connection_timeout: Duration,
}

/// Makes a block device of the export that `uri` names, by the kernel's own client, and gives back its node. No process
/// is needed for it from then on: it stays until [`nbd_detach`], or until its server is gone.
///
/// # Errors
/// As opening the export; `NotFound` if the kernel has no NBD client loaded, or there is nothing to take over; `Denied`
/// without privilege; `Conflict` for a device in use; `InvalidInput` with TLS, for a name that is no NBD device, or a size
/// that is no block device's.
pub async fn nbd_attach(uri: &Uri, attach: NbdAttach) -> Result<PathBuf> {
    let uri: NbdUri = uri.to_string().parse()?;
    crate::engine::run(async move {
        let limit = ClientSettings::default().connect_timeout;
        let device = attach.device.as_deref().map(kernel::index_of).transpose()?;
        kernel::probe()?;
        let identifier = identity(uri.clone()).filter(|name| name.len() <= kernel::LONGEST_IDENTIFIER);
        let settings = Settings {
            interface: Interface::Netlink,
            device,
            request_timeout: Some(attach.request_timeout),
            dead_connection_timeout: attach.dead_connection_timeout,
            identifier,
            ..Settings::default()
        };
        let to_take_over = attach.take_over.then(|| to_take_over(&settings)).transpose()?;
        let (sockets, disk) = kernel::connect(uri, attach.connections, limit).await?;
        blocking(move || {
            let device = match to_take_over {
                Some(index) => kernel::take_over(index, sockets, disk, &settings)?,
                None => kernel::attach(sockets, disk, &settings)?,
            };
            let path = device.path();
            device.keep()?;
            Ok(path)
        })
        .await
    })
    .await
}

/// Detaches a block device that the kernel's NBD client serves, whoever attached it, after everything written to it has
/// been flushed. With `force` also if it is in use.
///
/// # Errors
/// `InvalidInput` for a name that is no NBD device; `NotFound` if it is not attached; `Conflict` if it is in use; `Denied`
/// without privilege; the error of the flush, when it has been detached nevertheless.
pub async fn nbd_detach(device: PathBuf, force: bool) -> Result<()> {
    crate::engine::run(blocking(move || kernel::detach(kernel::index_of(&device)?, force))).await
}

fn to_take_over(settings: &Settings) -> Result<u32> {
    let by_name = || settings.identifier.as_deref().and_then(kernel::find);
    settings.device.or_else(by_name).ok_or_else(|| {
        let what = "no device of this export is attached (any more); attach it without taking over";
        Error::new(ErrorKind::NotFound, Operation::Mount, what)
    })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let died = |error| Error::new(ErrorKind::Internal, Operation::Mount, "a background task died").with_source(error);
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(died(error)))
}

/// The server and the export, however they are written and whatever is said about TLS.
fn identity(uri: NbdUri) -> Option<String> {
    let address = match uri.address {
        Address::Unix(path) => Address::Unix(super::resolved(&path).ok()?),
        tcp => tcp,
    };
    Some(NbdUri { address, tls: None, ..uri }.to_string())
}

struct Nbd;

#[async_trait]
impl Open for Nbd {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        let client = Client::connect(uri.to_string().parse()?, ClientSettings::default()).await?;
        match options.size {
            Some(size) if size != client.size() => {
                Err(uri.invalid(&format!("it has {} bytes, not {size}", client.size())))
            }
            _ => Ok(Arc::new(client)),
        }
    }

    fn identity(&self, uri: &Uri) -> Option<String> {
        identity(uri.to_string().parse().ok()?)
    }
}

/// Served under the name's export, which clients also get who name none.
///
/// With `nbds` every client must speak TLS, with `nbd` and `tls-certificates` it may. The directory holds
/// `server-cert.pem` and `server-key.pem`; with `tls-verify-peer=1` clients must show a certificate that `ca-cert.pem`
/// there vouches for, which `nbd` refuses: it would let others in without. With `tls-verify-peer=optional` they need not
/// show one, and are refused with any other.
#[async_trait]
impl Listen for Nbd {
    async fn listen(&self, uri: &Uri, backend: Arc<dyn Backend>, options: &ListenOptions) -> Result<Box<dyn Listener>> {
        let named: NbdUri = uri.to_string().parse()?;
        if backend.capabilities().access != Access::Any {
            return Err(uri.invalid("NBD clients do not cut requests into whole chunks; let the server do it"));
        }
        let mut export = ServerExport::new(&*named.export, backend);
        export.read_only = options.read_only;
        export.preferred_block = options.chunk_size;
        let settings = ServerSettings { tls: tls(uri, &named)?, ..ServerSettings::default() };
        let server = Server::new(vec![export], settings)?;
        let address = server.listen(&named.address).await?;
        // What clients call it: they verify the server, whatever it asks of them.
        let tls = named.tls.map(|tls| TlsOptions { verify_peer: VerifyPeer::Yes, ..tls });
        Ok(Box::new(Listening { uri: NbdUri { address, tls, ..named }.to_string(), server }))
    }
}

fn tls(uri: &Uri, named: &NbdUri) -> Result<Tls> {
    let Some(options) = &named.tls else { return Ok(Tls::Off) };
    let Some(directory) = &options.certificates else {
        return Err(uri.invalid("a server with TLS needs its certificate: give a directory, tls-certificates=DIR"));
    };
    // Unlike a client, a listener that is told nothing verifies nobody.
    let clients = match (uri.get("tls-verify-peer"), options.verify_peer) {
        (None, _) | (_, VerifyPeer::No) => ClientCertificates::None,
        (_, VerifyPeer::IfShown) => ClientCertificates::Optional,
        (_, VerifyPeer::Yes) => ClientCertificates::Required,
    };
    if options.optional && clients == ClientCertificates::Required {
        return Err(uri.invalid(
            "with nbd who speaks no TLS is let in without a certificate: tls-verify-peer=1 needs nbds or nbds+unix",
        ));
    }
    let config = server_config(directory, clients)?;
    Ok(if options.optional { Tls::Optional(config) } else { Tls::Required(config) })
}

struct Listening {
    uri: String,
    server: Server,
}

#[async_trait]
impl Listener for Listening {
    fn uri(&self) -> String {
        self.uri.clone()
    }

    async fn shutdown(self: Box<Self>) -> Result<()> {
        self.server.close(SHUTDOWN_LIMIT).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_of_clients_are_not_demanded_where_none_are_needed() {
        let says = |text: &str| {
            let error = tls(&text.parse().unwrap(), &text.parse().unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            error.to_string()
        };
        let options = "tls-certificates=/nowhere&tls-verify-peer=1";
        for plain in [format!("nbd://h/x?{options}"), format!("nbd+unix:///x?socket=/s&{options}")] {
            assert!(says(&plain).contains("needs nbds"), "{}", says(&plain));
        }
        assert!(says("nbds://h/x?tls-verify-peer=1").contains("tls-certificates=DIR"));
    }

    #[test]
    fn an_identity_is_the_server_and_the_export() {
        let identity = |text: &str| Nbd.identity(&text.parse().unwrap()).unwrap();
        assert_eq!(identity("nbd://h/x"), identity("NBDS://h:10809/x?tls-certificates=/pki"));
        assert_ne!(identity("nbd://h/x"), identity("nbd://h/y"));
        let folder = std::env::current_dir().unwrap().canonicalize().unwrap();
        let absolute = format!("nbd+unix:///x?socket={}/Cargo.toml", folder.display());
        assert_eq!(identity("nbd+unix:///x?socket=Cargo.toml"), identity(&absolute));
        let absolute = format!("nbd+unix:///x?socket={}/no-server-yet", folder.display());
        assert_eq!(identity("nbd+unix:///x?socket=no-server-yet"), identity(&absolute));
    }
}
