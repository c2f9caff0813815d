//! The schemes that this build has: for each family a few lines that call it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use r3map_core::{Backend, Result};
use r3map_local::{Directory, DirectorySettings, File, FileSettings, Memory, Null};

use crate::{Family, Look, Open, OpenOptions, Registry, Uri};

#[cfg(feature = "grpc")]
mod grpc;
#[cfg(feature = "nbd")]
pub(crate) mod nbd;

/// Adds every scheme of this build.
pub(crate) fn register(registry: &mut Registry) {
    let mut local = |scheme, example, about, open: Arc<dyn Open>| {
        registry.register(Family { scheme, example, about, open, listen: None });
    };
    local("memory", "memory:?size=1GiB", "this process's memory", Arc::new(OpenMemory));
    local("file", "file:PATH", "a file or a block device", Arc::new(OpenFile));
    local("directory", "directory:PATH?size=1GiB&chunk=64KiB", "one file per chunk", Arc::new(OpenDirectory));
    local("null", "null:?size=1TiB", "zeros; writes vanish", Arc::new(OpenNull));
    #[cfg(feature = "grpc")]
    grpc::register(registry);
    #[cfg(feature = "nbd")]
    nbd::register(registry);
}

struct OpenMemory;

#[async_trait]
impl Open for OpenMemory {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        uri.expect(&["size"], false)?;
        Ok(Arc::new(Memory::new(options.need_size(uri)?)?))
    }

    fn identity(&self, _: &Uri) -> Option<String> {
        None
    }
}

struct OpenNull;

#[async_trait]
impl Open for OpenNull {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        uri.expect(&["size"], false)?;
        Ok(Arc::new(Null::new(options.need_size(uri)?)?))
    }
}

struct OpenFile;

#[async_trait]
impl Open for OpenFile {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        uri.expect(&["size"], true)?;
        let (path, size) = (uri.path()?, options.size_for(uri)?);
        if options.create && !path.exists() {
            return Ok(Arc::new(File::create(path, options.need_size(uri)?)?));
        }
        Ok(Arc::new(File::open(path, &FileSettings { read_only: options.read_only, size })?))
    }

    async fn look(&self, uri: &Uri, options: &OpenOptions) -> Result<Look> {
        uri.expect(&["size"], true)?;
        let file = File::look(uri.path()?, options.size_for(uri)?)?;
        Ok(Look { writable: file.may_be_written(), backend: Arc::new(file) })
    }

    fn identity(&self, uri: &Uri) -> Option<String> {
        absolute(uri)
    }
}

struct OpenDirectory;

#[async_trait]
impl Open for OpenDirectory {
    async fn open(&self, uri: &Uri, options: &OpenOptions) -> Result<Arc<dyn Backend>> {
        uri.expect(&["size", "chunk"], true)?;
        let path = uri.path()?;
        let settings = DirectorySettings {
            size: if options.create && !path.exists() {
                Some(options.need_size(uri)?)
            } else {
                options.size_for(uri)?
            },
            chunk_size: options.chunk_for(uri)?,
            create: options.create,
            read_only: options.read_only,
            ..DirectorySettings::default()
        };
        Ok(Arc::new(Directory::open(path, &settings)?))
    }

    async fn look(&self, uri: &Uri, options: &OpenOptions) -> Result<Look> {
        uri.expect(&["size", "chunk"], true)?;
        let directory = Directory::look(uri.path()?, options.size_for(uri)?, options.chunk_for(uri)?)?;
        Ok(Look { writable: directory.may_be_written(), backend: Arc::new(directory) })
    }

    fn identity(&self, uri: &Uri) -> Option<String> {
        absolute(uri)
    }
}

/// The path of a resource, however it was named; also of one that is not there now.
fn absolute(uri: &Uri) -> Option<String> {
    Some(format!("{}:{}", uri.scheme(), resolved(&uri.path().ok()?).ok()?.display()))
}

/// A path from the root on and without links, as far as it is there: what is made in its place later has the same.
fn resolved(path: &Path) -> std::io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Ok(there), ..) => Ok(there),
        (Err(_), Some(parent), Some(name)) => Ok(resolved(parent)?.join(name)),
        _ => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_does_not_depend_on_whether_it_is_there_and_by_which_way() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        let identity = |path: &str| absolute(&format!("file:{}/{path}?size=1MiB", root.display()).parse().unwrap());
        let expected = |path: &str| Some(format!("file:{}", root.join(path).display()));
        for before_and_after in 0..2 {
            for path in ["real/disk", "link/disk", "link/../real/disk"] {
                assert_eq!(identity(path), expected("real/disk"), "{path}, {before_and_after}");
            }
            std::fs::write(root.join("real/disk"), b"").unwrap();
        }
        for path in ["real/no/folder", "link/no/folder"] {
            assert_eq!(identity(path), expected("real/no/folder"));
        }
    }
}
