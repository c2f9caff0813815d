//! What tests need beyond Rust: Debian packages, and nothing else.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::step;

/// A package, and a file that is there once it is installed.
const PACKAGES: &[(&str, &str)] = &[
    ("e2fsprogs", "/usr/sbin/e2fsck"),
    ("fio", "/usr/bin/fio"),
    ("fuse3", "/usr/bin/fusermount3"),
    ("mount", "/usr/sbin/losetup"),
    ("sqlite3", "/usr/bin/sqlite3"),
    ("util-linux", "/usr/bin/setpriv"),
];

/// Installs the missing ones as root on Debian; elsewhere fails with what to install.
pub(crate) fn run() -> Result<()> {
    println!("== set-up");
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(package, _)| *package).collect();
    if missing.is_empty() {
        println!("nothing to install");
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

fn apt(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-qq").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}
