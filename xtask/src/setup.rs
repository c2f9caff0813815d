//! What tests need beyond Rust: Debian packages, programs of a newer Debian, and one from crates.io.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{cargo, newer, step};

/// A package, and a file that is there once it is installed.
const PACKAGES: &[(&str, &str)] = &[
    ("binutils", "/usr/bin/strip"),
    ("bsdutils", "/usr/bin/script"),
    ("busybox-static", "/usr/bin/busybox"),
    ("e2fsprogs", "/usr/sbin/e2fsck"),
    ("fio", "/usr/bin/fio"),
    ("fuse3", "/usr/bin/fusermount3"),
    ("iproute2", "/usr/bin/ip"),
    ("kmod", "/usr/sbin/depmod"),
    ("libnbd-bin", "/usr/bin/nbdcopy"),
    ("mount", "/usr/sbin/losetup"),
    ("nbd-client", "/usr/sbin/nbd-client"),
    ("nbdkit", "/usr/bin/nbdkit"),
    ("python3-grpcio", "/usr/lib/python3/dist-packages/grpc/__init__.py"),
    ("python3-libnbd", "/usr/lib/python3/dist-packages/nbd.py"),
    ("qemu-system-common", "/usr/bin/qemu-storage-daemon"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("qemu-utils", "/usr/bin/qemu-nbd"),
    ("sqlite3", "/usr/bin/sqlite3"),
    ("util-linux", "/usr/bin/setpriv"),
];

/// The file system exerciser, which is no library: name, version, and where it is installed.
const FSX: (&str, &str, &str) = ("fsx", "0.3.2", "target/tools");

/// Installs what is missing: packages as root on Debian, and elsewhere it fails with what to install; fsx into the
/// build's own folder, and so the programs of a newer Debian.
pub(crate) fn run() -> Result<()> {
    println!("== set-up");
    packages()?;
    newer::run()?;
    fsx()
}

fn packages() -> Result<()> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        println!("no packages to install");
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() || !is_root() {
        bail!("tests need {0}; install them, on Debian with: sudo apt-get install {0}", missing.join(" "));
    }
    println!("installing {}", missing.join(" "));
    step("apt-get update", apt(&["update"]))?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    step("apt-get install", apt(&install))
}

fn fsx() -> Result<()> {
    let (name, version, root) = FSX;
    // Cargo keeps a list of what it has installed there.
    let installed = std::fs::read_to_string(Path::new(root).join(".crates.toml")).unwrap_or_default();
    if installed.contains(&format!("\"{name} {version} ")) {
        return Ok(());
    }
    step("fsx", cargo(&["install", name, "--version", version, "--locked", "--quiet", "--root", root]))
}

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-qq").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}
