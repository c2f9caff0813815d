//! What is mounted where, from `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`). It changes nothing.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use r3map_core::{Error, Operation, Result};

/// The type under which our mounts are listed: FUSE, with the subtype that we give.
pub(crate) const FILE_SYSTEM: &str = "fuse.r3map";
/// That subtype.
pub(crate) const SUBTYPE: &str = "r3map";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// `MAJOR:MINOR` of its `st_dev`.
    pub(crate) device: String,
    /// The file system type, with the subtype where it has one.
    pub(crate) kind: String,
    /// What it is of.
    pub(crate) source: OsString,
}

impl Mounted {
    /// Whether it is (or was) a mount of this crate.
    pub(crate) fn is_ours(&self) -> bool {
        self.kind == FILE_SYSTEM
    }
}

/// What is mounted on exactly this absolute path, the topmost if there are several.
///
/// # Errors
/// If `/proc` is not there.
pub(crate) fn mounted_on(path: &Path) -> Result<Option<Mounted>> {
    let table = fs::read("/proc/self/mountinfo")
        .map_err(|error| Error::from_io(Operation::Mount, "/proc/self/mountinfo cannot be read", error))?;
    Ok(find(&table, path.as_os_str()))
}

fn find(table: &[u8], path: &OsStr) -> Option<Mounted> {
    // Later lines lie over earlier ones.
    table.split(|byte| *byte == b'\n').rev().find_map(|line| parse(line, path))
}

/// `id parent major:minor root mount-point options optional… - type source super-options`
fn parse(line: &[u8], path: &OsStr) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let point = fields.nth(1)?;
    if unescape(point) != path {
        return None;
    }
    fields.by_ref().find(|field| *field == b"-")?;
    Some(Mounted {
        device: String::from_utf8_lossy(device).into_owned(),
        kind: String::from_utf8_lossy(fields.next()?).into_owned(),
        source: unescape(fields.next()?),
    })
}

/// Undoes the kernel's `\ooo` for spaces, tabs, line ends and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal =
            after.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(|digit| (b'0'..b'8').contains(digit)));
        match octal {
            Some(digits) => {
                plain.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain)
}

/// A path as bytes for messages that need it on one line.
pub(crate) fn one_line(text: &OsStr) -> String {
    String::from_utf8_lossy(text.as_bytes()).replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
        40 22 0:40 / /tmp/a\\040b rw,nosuid - fuse.r3map grpc://h:1 rw,user_id=0\n\
        41 22 0:41 / /tmp/two rw master:3 propagate_from:4 - tmpfs none rw\n\
        42 41 0:42 / /tmp/two ro - fuse.r3map file:/x\\134y rw\n";

    #[test]
    fn finds_exactly_what_lies_on_top() {
        let on = |path: &str| find(TABLE, OsStr::new(path));
        let spaced = on("/tmp/a b").unwrap();
        assert_eq!((spaced.device.as_str(), spaced.kind.as_str()), ("0:40", "fuse.r3map"));
        assert!(spaced.is_ours());
        let stacked = on("/tmp/two").unwrap();
        assert_eq!((stacked.device.as_str(), stacked.source.to_str()), ("0:42", Some("file:/x\\y")));
        assert!(!on("/").unwrap().is_ours());
        assert_eq!(on("/tmp"), None);
        assert_eq!(on("/tmp/a"), None);
    }

    #[test]
    fn reads_the_real_table() {
        assert!(mounted_on(Path::new("/proc")).unwrap().is_some_and(|mounted| mounted.kind == "proc"));
        assert_eq!(mounted_on(Path::new("/proc/no/such")).unwrap(), None);
    }
}
