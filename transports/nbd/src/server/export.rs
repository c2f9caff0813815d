//! What is served: backends under names, and what each of them takes.

use std::sync::Arc;

use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Operation, Result};
use r3map_pipeline::{Losses, User};

use crate::wire::{BlockSizes, Framing, Text, TransmissionFlags};

/// The preferred block size where the backend has none (proto.md, "Size constraints").
const PREFERRED: u32 = 4096;

/// A backend under a name.
#[derive(Clone)]
pub struct ServerExport {
    /// What clients ask for; at most 4096 bytes.
    pub name: String,
    /// A line for humans, or nothing.
    pub description: String,
    /// The bytes. It must take any offset and length ([`Access::Any`]).
    pub backend: Arc<dyn Backend>,
    /// Refuse writes, also where the backend would take them.
    pub read_only: bool,
    /// Multiples of it suit best, as clients are told. `None` takes the backend's preferred chunk, or 4 KiB.
    pub preferred_block: Option<ChunkSize>,
}

impl ServerExport {
    /// A backend under a name, writable if the backend is.
    #[must_use]
    pub fn new(name: impl Into<String>, backend: Arc<dyn Backend>) -> Self {
        Self { name: name.into(), description: String::new(), backend, read_only: false, preferred_block: None }
    }
}

impl std::fmt::Debug for ServerExport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerExport")
            .field("name", &self.name)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

/// An export that was checked.
pub(crate) struct Served {
    pub(crate) name: Text,
    pub(crate) description: Text,
    pub(crate) backend: Arc<dyn Backend>,
    /// Of the backend.
    pub(crate) losses: Arc<Losses>,
    /// The one whose all connections are that made no handshake: the kernel, if anybody.
    pub(crate) owner: Arc<User>,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) trims: bool,
    pub(crate) sizes: BlockSizes,
    /// The longest request that the backend takes; longer ones are split.
    pub(crate) step: u64,
}

impl Served {
    /// Checks an export.
    ///
    /// # Errors
    /// `InvalidInput` for a name that the protocol cannot carry or a backend that takes whole chunks only.
    pub(crate) fn new(export: ServerExport, max_payload: u32) -> Result<Self> {
        let ServerExport { name, description, backend, read_only, preferred_block } = export;
        let invalid = |message: String| Error::new(ErrorKind::InvalidInput, Operation::Open, message);
        let text = |text: &str| Text::new(text).map_err(|error| invalid(format!("the export {name:?}: {error}")));
        let (checked, description) = (text(&name)?, text(&description)?);
        let capabilities = backend.capabilities();
        if capabilities.access != Access::Any {
            return Err(invalid(format!("the export {name:?} takes whole chunks only: wrap it so that it takes any")));
        }
        let preferred =
            preferred_block.or(capabilities.preferred_chunk).and_then(|chunk| u32::try_from(chunk.bytes()).ok());
        let preferred = preferred.filter(|chunk| *chunk <= max_payload).unwrap_or(PREFERRED);
        let losses = Losses::new(backend.clone());
        Ok(Self {
            name: checked,
            description,
            size: backend.size(),
            read_only: read_only || capabilities.read_only,
            trims: capabilities.trim.is_some(),
            sizes: BlockSizes { minimum: 1, preferred, maximum: max_payload },
            step: capabilities.max_request.unwrap_or(u64::MAX).max(1),
            owner: Arc::new(losses.user()),
            losses,
            backend,
        })
    }

    /// What can be done with it.
    ///
    /// A flush covers what was written over every connection, because all of them write to one backend, whose flush
    /// covers everything: so several connections are always fine.
    pub(crate) fn flags(&self, framing: Framing, contexts: bool) -> TransmissionFlags {
        use TransmissionFlags as Flags;
        let mut flags =
            Flags::HAS_FLAGS | Flags::SEND_FLUSH | Flags::SEND_FUA | Flags::CAN_MULTI_CONN | Flags::SEND_CACHE;
        flags.set(Flags::READ_ONLY, self.read_only);
        flags.set(Flags::SEND_TRIM, self.trims && !self.read_only);
        flags.set(Flags::SEND_WRITE_ZEROES | Flags::SEND_FAST_ZERO, !self.read_only);
        flags.set(Flags::SEND_DF, framing >= Framing::Structured);
        flags.set(Flags::BLOCK_STATUS_PAYLOAD, framing == Framing::Extended && contexts);
        flags
    }
}

/// The exports of a server.
pub(crate) struct Exports {
    all: Vec<Arc<Served>>,
    default: usize,
}

impl Exports {
    /// Checks exports; `default` is what the empty name means, the first if `None`.
    ///
    /// # Errors
    /// `InvalidInput` if there is none, two have one name, or the default is not among them.
    pub(crate) fn new(exports: Vec<ServerExport>, default: Option<&str>, max_payload: u32) -> Result<Self> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        let all: Vec<_> =
            exports.into_iter().map(|export| Served::new(export, max_payload).map(Arc::new)).collect::<Result<_>>()?;
        let names: std::collections::HashSet<&str> = all.iter().map(|export| &*export.name).collect();
        if names.len() < all.len() {
            return invalid("two exports have the same name".to_owned());
        }
        let place = default.map_or(Some(0), |name| all.iter().position(|export| *export.name == *name));
        match place.filter(|place| *place < all.len()) {
            Some(default) => Ok(Self { all, default }),
            None => invalid(default.map_or("there is no export".to_owned(), |name| format!("no export is {name:?}"))),
        }
    }

    /// The export of this name; the default one for the empty name, unless one is named so.
    pub(crate) fn find(&self, name: &str) -> Option<&Arc<Served>> {
        let found = self.all.iter().find(|export| *export.name == *name);
        found.or_else(|| name.is_empty().then(|| &self.all[self.default]))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.all.iter()
    }
}

#[cfg(test)]
mod tests {
    use r3map_testkit::store::Store;

    use super::*;

    fn export(name: &str) -> ServerExport {
        ServerExport::new(name, Arc::new(Store::new(5000)))
    }

    fn found<'a>(exports: &'a Exports, name: &str) -> Option<&'a str> {
        exports.find(name).map(|export| &*export.name)
    }

    #[test]
    fn an_export_is_found_by_name_and_the_default_by_none() {
        let exports = Exports::new(vec![export("a"), export("b")], None, 1 << 20).unwrap();
        assert_eq!(["a", "b", "", "c"].map(|name| found(&exports, name)), [Some("a"), Some("b"), Some("a"), None]);
        let exports = Exports::new(vec![export("a"), export("b")], Some("b"), 1 << 20).unwrap();
        assert_eq!(found(&exports, ""), Some("b"));
        let exports = Exports::new(vec![export("a"), export("")], None, 1 << 20).unwrap();
        assert_eq!(found(&exports, ""), Some(""));
    }

    #[test]
    fn what_cannot_be_served_is_refused_in_one_line() {
        let chunks = ServerExport::new("c", Arc::new(Store::new(1 << 20).whole_chunks(ChunkSize::DEFAULT)));
        for (exports, default, says) in [
            (vec![], None, "no export"),
            (vec![export("a"), export("a")], None, "same name"),
            (vec![export("a")], Some("b"), "no export is \"b\""),
            (vec![export(&"x".repeat(4097))], None, "longer than 4096"),
            (vec![chunks], None, "whole chunks"),
        ] {
            let error = Exports::new(exports, default, 1 << 20).err().unwrap();
            assert!(error.kind() == ErrorKind::InvalidInput && error.message().contains(says), "{error}");
        }
    }

    #[test]
    fn flags_follow_from_what_the_backend_can() {
        use TransmissionFlags as Flags;
        let served = |store: Store| Served::new(ServerExport::new("", Arc::new(store)), 1 << 20).unwrap();
        let able = served(Store::new(1));
        assert!(able.flags(Framing::Simple, false).contains(Flags::SEND_TRIM | Flags::SEND_FAST_ZERO));
        assert!(!able.flags(Framing::Simple, false).intersects(Flags::SEND_DF | Flags::BLOCK_STATUS_PAYLOAD));
        assert!(able.flags(Framing::Extended, true).contains(Flags::SEND_DF | Flags::BLOCK_STATUS_PAYLOAD));
        assert!(!served(Store::new(1).plain()).flags(Framing::Simple, false).contains(Flags::SEND_TRIM));
        let read_only = served(Store::new(1).read_only()).flags(Framing::Structured, true);
        assert!(read_only.contains(Flags::READ_ONLY));
        assert!(!read_only.intersects(Flags::SEND_TRIM | Flags::SEND_WRITE_ZEROES | Flags::SEND_FAST_ZERO));
    }
}
