//! The kinds of devices, and which of them work here.

use std::fmt;
use std::path::Path;

use r3map_core::{Error, ErrorKind, Operation, Result};

use crate::{loop_device, nbd, ublk};

/// Through what the kernel asks for a device's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// ublk: io_uring commands. The fastest; Linux 6.5 with `ublk_drv`.
    Ublk,
    /// The kernel's NBD client over a socket pair. Every Linux with `nbd`.
    Nbd,
    /// A loop device over a file. On every Linux; slower, and the file has to be shown first.
    Loop,
}

impl Kind {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::Ublk, Self::Nbd, Self::Loop];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        })
    }
}

/// Says why devices of a kind cannot be made here, if so. That they can be made is certain only once one is.
///
/// # Errors
/// `NotFound` where the kernel has no such devices, `Denied` for ordinary users; each says what to do.
pub fn check(kind: Kind) -> Result<()> {
    match kind {
        Kind::Ublk => ublk::check(),
        Kind::Nbd => nbd::check(),
        Kind::Loop => loop_device::check(),
    }
}

/// Removes a device of ours that outlived its daemon, for instance `/dev/ublkb3`. Whatever waits for it gets errors.
/// Blocks.
///
/// # Errors
/// `InvalidInput` for a path that is no such device, `NotFound` if there is none, `Denied` if it is not ours, `Conflict`
/// if it is being served.
pub fn remove(device: &Path) -> Result<()> {
    let number = device.to_str().and_then(|path| path.strip_prefix("/dev/ublkb")?.parse().ok());
    match number {
        Some(id) => ublk::remove(id),
        None => {
            let message = format!("{} is no device that can be kept; those are called /dev/ublkbN", device.display());
            Err(Error::new(ErrorKind::InvalidInput, Operation::Close, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_that_is_absent_says_what_to_do() {
        let missing = !Path::new("/dev/ublk-control").exists();
        match check(Kind::Ublk) {
            Err(error) if missing => {
                assert_eq!(error.kind(), ErrorKind::NotFound);
                assert!(error.message().contains("modprobe ublk_drv"), "{error}");
            }
            checked => assert!(!missing, "{checked:?}"),
        }
    }

    #[test]
    fn only_devices_that_can_be_kept_are_removed() {
        for path in ["/dev/loop0", "/dev/sda", "/dev/ublkb", "/dev/ublkbx", "ublkb1"] {
            assert_eq!(remove(Path::new(path)).unwrap_err().kind(), ErrorKind::InvalidInput, "{path}");
        }
    }
}
