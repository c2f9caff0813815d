//! Programs of a newer Debian than the machine's: those of today for protocols whose newest parts the machine's own do
//! not know. They are unpacked into the build's folder with all that they need, and run with their own libraries; nothing
//! is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step;

/// The release, and what is taken from it: about 13 MB.
const RELEASE: &str = "trixie";
const PACKAGES: [&str; 2] = ["libnbd-bin", "qemu-utils"];

/// Starts the program of its own name, with the loader and the libraries beside it.
const STARTER: &str = r#"#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/..
libraries=$(echo "$root"/usr/lib/*-linux-gnu)
exec "$libraries"/ld-linux-*.so.* --library-path "$libraries" "$root/usr/bin/$(basename "$0")" "$@"
"#;

/// Gets the programs, unless they are there: `target/tools/RELEASE/bin` has a starter for each. Not where there is no apt.
pub(crate) fn run() -> Result<()> {
    let tools = Path::new("target/tools");
    let folder = tools.join(RELEASE);
    if folder.exists() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        println!("there is no apt: tests with the programs of Debian {RELEASE} are skipped");
        return Ok(());
    }
    std::fs::create_dir_all(tools)?;
    // Renamed when it is whole, so that half of it is never taken for all.
    let work = tools.canonicalize()?.join(format!("{RELEASE}.{}", std::process::id()));
    let made = unpack(&work).and_then(|root| Ok(std::fs::rename(root, &folder)?));
    let _ = std::fs::remove_dir_all(&work);
    made.with_context(|| format!("cannot get programs of Debian {RELEASE}; is what apt downloads from reachable?"))
}

/// Downloads as for a machine of that release on which nothing is installed, and unpacks.
fn unpack(work: &Path) -> Result<PathBuf> {
    for folder in ["state/lists/partial", "cache/archives/partial", "root/bin"] {
        std::fs::create_dir_all(work.join(folder))?;
    }
    std::fs::write(work.join("status"), "")?;
    let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let source = format!("deb [signed-by={keys}] http://deb.debian.org/debian {RELEASE} main\n");
    std::fs::write(work.join("sources.list"), source)?;
    step("packages of a newer Debian", apt(work, &["update"]))?;
    let install = [&["install", "--yes", "--download-only", "--no-install-recommends"], &PACKAGES[..]].concat();
    step("packages of a newer Debian", apt(work, &install))?;
    let root = work.join("root");
    for package in entries(&work.join("cache/archives"))?.iter().filter(|path| path.is_file()) {
        if package.extension().is_some_and(|name| name == "deb") {
            let unpacked = Command::new("dpkg").arg("-x").args([package, &root]).status()?;
            if !unpacked.success() {
                bail!("{} cannot be unpacked", package.display());
            }
        }
    }
    for program in entries(&root.join("usr/bin"))? {
        let starter = root.join("bin").join(program.file_name().context("it has a name")?);
        std::fs::write(&starter, STARTER)?;
        std::fs::set_permissions(&starter, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    Ok(root)
}

/// apt with a state of its own.
fn apt(work: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["-qq", "-o", "Dir::Etc::sourceparts=-", "-o", "Acquire::Languages=none"]);
    // Neither hangs nor gives up at once.
    command.args(["-o", "Acquire::Retries=3", "-o", "Acquire::http::Timeout=60", "-o", "APT::Sandbox::User=root"]);
    let places = [
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::State", "state"),
        ("Dir::State::status", "status"),
        ("Dir::Cache", "cache"),
    ];
    for (setting, place) in places {
        command.arg("-o").arg(format!("{setting}={}", work.join(place).display()));
    }
    command.args(arguments);
    command
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    entries.map(|entry| Ok(entry?.path())).collect()
}
