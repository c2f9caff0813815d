//! The small file that makes a directory a chunk directory, and says of what region:
//!
//! ```text
//! r3map directory 1
//! size 1073741824
//! chunk 65536
//! ```
//! It is written last when a directory is made, whole or not at all, and never changed.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use r3map_core::{ChunkSize, Error, ErrorKind, Geometry, Operation, Result};

use crate::opened::{fault, refusal, sync_directory};

const NAME: &str = ".r3map-directory";
const UNFINISHED: &str = ".r3map-directory.new";
const FORMAT: &str = "r3map directory ";
const VERSION: &str = "1";
/// No manifest is longer, in bytes.
const LONGEST: u64 = 4096;

/// The region that `directory` holds, or `None` if it has no manifest.
pub(super) fn read(directory: &Path) -> Result<Option<Geometry>> {
    let path = directory.join(NAME);
    let text = match fs::File::open(&path).and_then(|file| io::read_to_string(io::Read::take(file, LONGEST))) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(Operation::Open, &path, "cannot read the manifest", error)),
    };
    parse(&text).map(Some).map_err(|error| error.context(path.display()))
}

fn parse(text: &str) -> Result<Geometry> {
    let mut lines = text.lines();
    match lines.next().and_then(|line| line.strip_prefix(FORMAT)) {
        Some(VERSION) => {}
        Some(version) => {
            let message = format!("format {version:?}; this version knows format {VERSION} only");
            return Err(Error::new(ErrorKind::InvalidInput, Operation::Open, message));
        }
        None => return Err(malformed()),
    }
    let mut number = |name: &str| lines.next()?.strip_prefix(name)?.parse().ok();
    let (size, chunk) = (number("size ").ok_or_else(malformed)?, number("chunk ").ok_or_else(malformed)?);
    if lines.next().is_some() {
        return Err(malformed());
    }
    ChunkSize::new(chunk).and_then(|chunk| Geometry::new(size, chunk)).map_err(|_| malformed())
}

fn malformed() -> Error {
    Error::new(ErrorKind::Corrupt, Operation::Open, "malformed manifest of a chunk directory")
}

/// Writes the manifest, durably.
pub(super) fn write(directory: &Path, geometry: Geometry) -> Result<()> {
    let text = format!("{FORMAT}{VERSION}\nsize {}\nchunk {}\n", geometry.size(), geometry.chunk_size().bytes());
    let (new, path) = (directory.join(UNFINISHED), directory.join(NAME));
    let write = || {
        let mut file = fs::File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        sync_directory(directory)
    };
    write().map_err(|error| fault(Operation::Open, &path, "cannot write the manifest", error))
}

/// Checks what the caller expects of a directory that exists.
pub(super) fn check(directory: &Path, found: Geometry, size: Option<u64>, chunk: Option<ChunkSize>) -> Result<()> {
    let refuse = |what: String| Err(refusal(ErrorKind::InvalidInput, directory, what));
    match (size, chunk) {
        (Some(size), _) if size != found.size() => {
            refuse(format!("holds a region of {} bytes, not {size}", found.size()))
        }
        (_, Some(chunk)) if chunk != found.chunk_size() => {
            refuse(format!("has chunks of {}, not {chunk}", found.chunk_size()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_back() {
        let dir = tempfile::TempDir::new().unwrap();
        assert_eq!(read(dir.path()).unwrap(), None);
        let geometry = Geometry::new(12345, ChunkSize::MIN).unwrap();
        write(dir.path(), geometry).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(geometry));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn anything_else_is_refused() {
        let good = "r3map directory 1\nsize 5\nchunk 4096\n";
        assert!(parse(good).is_ok());
        assert_eq!(parse(&good.replace("1\n", "2\n")).unwrap_err().kind(), ErrorKind::InvalidInput);
        for bad in [
            "",
            "r3map",
            "r3map directory 1",
            "r3map directory 1\nsize 5",
            "r3map directory 1\nsize 0\nchunk 4096",
            "r3map directory 1\nsize 5\nchunk 4095",
            "r3map directory 1\nsize -5\nchunk 4096",
            "r3map directory 1\nchunk 4096\nsize 5",
            "r3map directory 1\nsize 5\nchunk 4096\nmore",
        ] {
            assert_eq!(parse(bad).unwrap_err().kind(), ErrorKind::Corrupt, "{bad:?}");
        }
    }
}
