//! Writes a cpio archive in the format `newc`, which the kernel unpacks as its first file system.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`. Owners are root, times are zero.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// An archive that is being written. Folders are made as they are needed.
pub(crate) struct Archive<W> {
    output: W,
    made: BTreeSet<String>,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(output: W) -> Self {
        Self { output, made: BTreeSet::new(), next_inode: 1 }
    }

    /// Adds a folder and those above it, unless they are there.
    pub(crate) fn folder(&mut self, path: &Path) -> io::Result<()> {
        let mut so_far = String::new();
        for part in parts(path) {
            if !so_far.is_empty() {
                so_far.push('/');
            }
            so_far.push_str(&part);
            if self.made.insert(so_far.clone()) {
                self.entry(&so_far, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file that may be executed, unless something of that name is there.
    pub(crate) fn file(&mut self, path: &Path, contents: &[u8]) -> io::Result<()> {
        self.leaf(path, EXECUTABLE, contents)
    }

    /// Adds a symbolic link, unless something of that name is there.
    pub(crate) fn symlink(&mut self, path: &Path, target: &str) -> io::Result<()> {
        self.leaf(path, SYMLINK, target.as_bytes())
    }

    /// Whether something of that name is there.
    pub(crate) fn contains(&self, path: &Path) -> bool {
        self.made.contains(&name(path))
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.output.flush()?;
        Ok(self.output)
    }

    fn leaf(&mut self, path: &Path, mode: u32, contents: &[u8]) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        let name = name(path);
        if self.made.insert(name.clone()) { self.entry(&name, mode, contents) } else { Ok(()) }
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too long for an archive"));
        let length = u32::try_from(contents.len()).map_err(too_long)?;
        let name_length = u32::try_from(name.len() + 1).map_err(too_long)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // inode, mode, user, group, links, time, length, device (major, minor), its own device, name's length, sum
        let fields = [self.next_inode, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0];
        self.next_inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.padded(&[header.as_bytes(), name.as_bytes(), b"\0"])?;
        self.padded(&[contents])
    }

    /// Writes the parts, and zeros up to a multiple of four bytes.
    fn padded(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        let mut length = 0;
        for part in parts {
            self.output.write_all(part)?;
            length += part.len();
        }
        self.output.write_all(&[0; 3][..length.next_multiple_of(4) - length])
    }
}

/// The path without its root: names in an archive are relative.
fn name(path: &Path) -> String {
    parts(path).collect::<Vec<_>>().join("/")
}

fn parts(path: &Path) -> impl Iterator<Item = String> {
    path.components().filter_map(|part| match part {
        Component::Normal(part) => Some(part.to_string_lossy().into_owned()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.file(Path::new("/a/b/file"), b"12345").unwrap();
        archive.file(Path::new("/a/b/file"), b"only the first of a name is kept").unwrap();
        archive.symlink(Path::new("a/link"), "b/file").unwrap();
        archive.folder(Path::new("/empty")).unwrap();
        archive.file(Path::new("nothing"), b"").unwrap();
        assert!(archive.contains(Path::new("/a/b")) && !archive.contains(Path::new("/a/c")));
        archive.finish().unwrap()
    }

    #[test]
    fn headers_are_as_the_kernel_expects() {
        let bytes = sample();
        assert!(bytes.len().is_multiple_of(4));
        assert_eq!(&bytes[..6], b"070701");
        let field = |n: usize| u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * n..][..8]).unwrap(), 16).unwrap();
        assert_eq!((field(1), field(6), field(11)), (DIRECTORY, 0, 2), "mode, length, and the name with its zero");
        assert_eq!(&bytes[110..112], b"a\0");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }

    #[test]
    fn another_program_unpacks_it() {
        if !Path::new("/usr/bin/busybox").exists() {
            // `cargo xtask setup` installs it; this package is below the one that knows how to skip.
            assert!(std::env::var_os("CI").is_none(), "CI must have busybox");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("/usr/bin/busybox");
        command.args(["cpio", "-id"]).current_dir(&folder).stdin(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(folder.path().join("a/link")).unwrap(), b"12345");
        assert_eq!(std::fs::read(folder.path().join("nothing")).unwrap(), b"");
        assert!(folder.path().join("empty").is_dir());
    }
}
