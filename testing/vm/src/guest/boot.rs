//! What a first process does before anything else can run: file systems, modules, the loopback link.

use std::ffi::CString;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};

use super::child;

/// Type, place and options of each file system, in the order in which they can be mounted.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("devtmpfs", "/dev", ""),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("debugfs", "/sys/kernel/debug", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", ""),
    ("tmpfs", "/run", ""),
    ("tmpfs", "/tmp", "size=1g"),
];

/// `finit_module(2)`: the file is compressed (`MODULE_INIT_COMPRESSED_FILE`, Linux 5.17).
const COMPRESSED: i32 = 4;

pub(super) fn mount_all() -> Result<()> {
    for (kind, place, options) in MOUNTS {
        std::fs::create_dir_all(place).with_context(|| format!("cannot make {place}"))?;
        // The host's binaries are at their own places, which may be below /tmp: they must not be hidden.
        if *kind == "tmpfs" && std::fs::read_dir(place)?.next().is_some() {
            continue;
        }
        let options = CString::new(*options)?;
        mount(*kind, *place, *kind, MountFlags::empty(), options.as_c_str())
            .with_context(|| format!("cannot mount {place}"))?;
    }
    Ok(())
}

/// Loads the modules in this order.
pub(super) fn load(modules: &[(PathBuf, String)]) -> Result<()> {
    for (path, parameters) in modules {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let compressed = path.extension().is_some_and(|extension| extension != "ko");
        let parameters = CString::new(parameters.as_str())?;
        rustix::system::finit_module(&file, &parameters, if compressed { COMPRESSED } else { 0 })
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

/// Brings the loopback link up.
pub(super) fn loopback() -> Result<()> {
    let mut command = Command::new("/usr/bin/busybox");
    command.args(["ip", "link", "set", "lo", "up"]);
    let ended = child::run(&mut command, std::time::Duration::from_secs(10), &|_| {})?;
    if !ended.is_success() {
        bail!("cannot bring the loopback link up: {}", ended.lines.join("; "));
    }
    Ok(())
}
