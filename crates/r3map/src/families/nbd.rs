//! `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, and the same with TLS as `nbds`.

use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use r3map_nbd::{Address, Client, ClientSettings, Listed, NbdUri};

use crate::{Family, Open, OpenOptions, Registry, Uri};

pub(super) fn register(registry: &mut Registry) {
    let mut add = |scheme, example, about| {
        registry.register(Family { scheme, example, about, open: Arc::new(Nbd), listen: None });
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

    /// The server and the export, however they are written and whatever is said about TLS.
    fn identity(&self, uri: &Uri) -> Option<String> {
        let uri: NbdUri = uri.to_string().parse().ok()?;
        let address = match uri.address {
            Address::Unix(path) => Address::Unix(path.canonicalize().unwrap_or(path)),
            tcp => tcp,
        };
        Some(NbdUri { address, tls: None, ..uri }.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_the_server_and_the_export() {
        let identity = |text: &str| Nbd.identity(&text.parse().unwrap()).unwrap();
        assert_eq!(identity("nbd://h/x"), identity("NBDS://h:10809/x?tls-certificates=/pki"));
        assert_ne!(identity("nbd://h/x"), identity("nbd://h/y"));
        let folder = std::env::current_dir().unwrap().canonicalize().unwrap();
        let absolute = format!("nbd+unix:///x?socket={}/Cargo.toml", folder.display());
        assert_eq!(identity("nbd+unix:///x?socket=Cargo.toml"), identity(&absolute));
    }
}
