//! Puts the guest's first file system together: programs with their libraries, modules, tests, and the plan.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::contents::{FILES, MODULES, PATH, PROGRAMS, TEXTS};
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::libraries;
use crate::modules::{Modules, module_name};
use crate::plan::{Orders, PLACE, Plan, Work};

/// Where the guest's first process is in the guest.
pub(crate) const FIRST_PROCESS: &str = "/r3map/guest";

/// Folders that exist in the guest from the start.
const FOLDERS: &[&str] = &["dev", "proc", "sys", "tmp", "run", "root", "mnt", "var/run", "busybox", "r3map/bin"];

/// Writes the image for a plan to `path`.
pub(crate) fn write(path: &Path, kernel: &Kernel, plan: &Plan, guest: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let scratch = tempfile::tempdir_in(path.parent().context("an image is in a folder")?)?;
    let mut image =
        Image { archive: Archive::new(BufWriter::new(file)), seen: BTreeSet::new(), scratch: scratch.path() };
    image.skeleton()?;
    image.programs()?;
    image.stripped(guest, Path::new(FIRST_PROCESS))?;
    image.work(plan)?;
    let modules = image.modules(kernel)?;
    let orders = serde_json::to_vec(&Orders { plan: plan.clone(), modules })?;
    image.archive.file(Path::new(PLACE), &orders)?;
    image.archive.finish()?;
    Ok(())
}

struct Image<'a> {
    archive: Archive<BufWriter<File>>,
    /// Libraries that are in.
    seen: BTreeSet<PathBuf>,
    scratch: &'a Path,
}

impl Image<'_> {
    fn skeleton(&mut self) -> Result<()> {
        for folder in FOLDERS {
            self.archive.folder(Path::new(folder))?;
        }
        // As on the host: /bin is /usr/bin on most, and the dynamic linker's path is fixed.
        for name in ["bin", "sbin", "lib", "lib64"] {
            if let Ok(target) = fs::read_link(Path::new("/").join(name)) {
                self.archive.folder(&Path::new("/").join(&target))?;
                self.archive.symlink(Path::new(name), &target.to_string_lossy())?;
            }
        }
        for (path, text) in TEXTS {
            self.archive.file(Path::new(path), text.as_bytes())?;
        }
        Ok(())
    }

    fn programs(&mut self) -> Result<()> {
        for name in PROGRAMS {
            self.host_file(&find(name)?)?;
        }
        for path in FILES {
            self.host_file(Path::new(path))?;
        }
        let busybox = find("busybox")?;
        let list = Command::new(&busybox).arg("--list").output().context("busybox does not start")?;
        let target = resolved(&busybox)?;
        for applet in String::from_utf8_lossy(&list.stdout).lines() {
            self.archive.symlink(&Path::new("busybox").join(applet), &target.to_string_lossy())?;
        }
        self.archive.symlink(&resolved(Path::new("/bin/sh"))?, &target.to_string_lossy())?;
        Ok(())
    }

    fn work(&mut self, plan: &Plan) -> Result<()> {
        match &plan.work {
            Work::Tests { binaries, .. } => {
                for binary in binaries {
                    self.stripped(&binary.path, &binary.path)?;
                    self.archive.folder(&binary.directory)?;
                }
            }
            Work::Command { path, .. } => self.stripped(path, path)?,
        }
        for program in &plan.programs {
            self.stripped(program, program)?;
            let name = program.file_name().context("a program has a name")?;
            self.archive.symlink(&Path::new("r3map/bin").join(name), &program.to_string_lossy())?;
        }
        Ok(())
    }

    /// Adds the modules and what they need; gives back where they are, in the order to load them.
    fn modules(&mut self, kernel: &Kernel) -> Result<Vec<(PathBuf, String)>> {
        let list = kernel.modules.join("modules.dep");
        let text = fs::read_to_string(&list).with_context(|| list.display().to_string())?;
        let modules = Modules::parse(&text)?;
        let mut order = Vec::new();
        for (name, _) in MODULES {
            modules.load(name, &mut order)?;
        }
        let mut placed = Vec::new();
        for file in order {
            let name = module_name(&file);
            let parameters = MODULES.iter().find(|(other, _)| *other == name).map_or("", |(_, parameters)| parameters);
            let extension = file.rsplit_once(".ko").map_or("", |(_, extension)| extension);
            let place = PathBuf::from(format!("/r3map/modules/{name}.ko{extension}"));
            self.archive.file(&place, &fs::read(kernel.modules.join(&file))?)?;
            placed.push((place, parameters.to_owned()));
        }
        Ok(placed)
    }

    /// Adds a file of the host at its own place, with the libraries that it needs.
    fn host_file(&mut self, path: &Path) -> Result<()> {
        self.archive.file(&resolved(path)?, &read(path)?)?;
        self.libraries(path)
    }

    /// Adds a program without its debugging information at `place`, with the libraries that it needs.
    fn stripped(&mut self, path: &Path, place: &Path) -> Result<()> {
        if self.archive.contains(place) {
            return Ok(());
        }
        let small = self.scratch.join("stripped");
        let strip = Command::new("strip").args(["--strip-debug", "-o"]).arg(&small).arg(path).output();
        // What is no ELF file (a script) goes as it is.
        let from = if strip.is_ok_and(|output| output.status.success()) { small.as_path() } else { path };
        self.archive.file(place, &read(from)?)?;
        self.libraries(path)
    }

    fn libraries(&mut self, of: &Path) -> Result<()> {
        for library in libraries::of(of)? {
            if self.seen.insert(library.clone()) {
                self.archive.file(&resolved(&library)?, &read(&library)?)?;
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

/// The path with its folder's symbolic links followed, but with its own name.
fn resolved(path: &Path) -> Result<PathBuf> {
    let folder = path.parent().context("a file is in a folder")?;
    let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
    Ok(folder.join(path.file_name().context("a file has a name")?))
}

fn find(program: &str) -> Result<PathBuf> {
    match PATH.iter().map(|folder| Path::new(folder).join(program)).find(|path| path.exists()) {
        Some(path) => Ok(path),
        None => bail!("the virtual machine needs {program}, which is not installed; run cargo xtask setup"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_installed_is_named() {
        let error = find("no-such-program").unwrap_err().to_string();
        assert!(error.contains("no-such-program") && error.contains("setup"), "{error}");
        assert!(find("sh").is_ok());
    }

    #[test]
    fn a_file_keeps_its_name_in_its_real_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        fs::create_dir(root.join("usr")).unwrap();
        std::os::unix::fs::symlink("usr", root.join("lib")).unwrap();
        fs::write(root.join("usr/real"), "").unwrap();
        std::os::unix::fs::symlink("real", root.join("usr/name")).unwrap();
        assert_eq!(resolved(&root.join("lib/name")).unwrap(), root.join("usr/name"));
    }
}
