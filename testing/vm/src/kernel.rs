//! A stock kernel from Debian: downloaded and unpacked once, never installed.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long each program may take: the package is about 30 MB.
const LIMIT: Duration = Duration::from_secs(600);

/// How often a program is looked at.
const POLL: Duration = Duration::from_millis(20);

/// An unpacked kernel.
pub(crate) struct Kernel {
    /// Its image.
    pub(crate) image: PathBuf,
    /// The folder that `modules.dep` and its paths are relative to.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The kernel in a Debian package, from `cache` if it is there, otherwise from Debian. A name with a slash is the folder
    /// of one that is unpacked already: `boot/vmlinuz-*`, and `lib/modules/*` with its `modules.dep`.
    pub(crate) fn obtain(package: &str, cache: &Path) -> Result<Self> {
        if package.contains('/') {
            return Self::unpacked(Path::new(package)).with_context(|| format!("{package} is no folder of a kernel"));
        }
        let folder = cache.join(package);
        if !folder.exists() {
            download(package, cache, &folder).with_context(|| format!("cannot get {package} from Debian"))?;
        }
        Self::unpacked(&folder).with_context(|| format!("{} is damaged; remove it", folder.display()))
    }

    fn unpacked(folder: &Path) -> Result<Self> {
        let modules = only_entry(&folder.join("lib/modules"), "")?;
        Ok(Self { image: only_entry(&folder.join("boot"), "vmlinuz-")?, modules })
    }
}

/// Unpacks beside `folder` and renames, so that half a download is never taken for a kernel.
fn download(package: &str, cache: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(cache)?;
    let work = tempfile::tempdir_in(cache)?;
    let real = match real_package(package) {
        Ok(real) => real,
        // Perhaps this machine has never asked what Debian has.
        Err(_) => {
            output(Command::new("apt-get").args(["-qq", "update"]))?;
            real_package(package)?
        }
    };
    output(Command::new("apt-get").args(["-qq", "download", &real]).current_dir(&work))?;
    let archive = only_entry(work.path(), &real)?;
    let root = work.path().join("root");
    output(Command::new("dpkg").arg("-x").args([&archive, &root]))?;
    let release = only_entry(&root.join("lib/modules"), "")?;
    let release = release.file_name().context("it has a name")?;
    let depmod = if Path::new("/usr/sbin/depmod").exists() { "/usr/sbin/depmod" } else { "/sbin/depmod" };
    output(Command::new(depmod).arg("-b").arg(&root).arg(release))?;
    match std::fs::rename(&root, folder) {
        Err(_) if folder.exists() => Ok(()),
        other => Ok(other?),
    }
}

/// The package that holds the kernel: `package` itself, or what it depends on.
fn real_package(package: &str) -> Result<String> {
    Ok(parse_depends(package, &output(Command::new("apt-cache").args(["depends", "--important", package]))?))
}

fn parse_depends(package: &str, text: &str) -> String {
    let depends = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.map(str::trim).find(|name| name.starts_with("linux-image-")).unwrap_or(package).to_owned()
}

/// Runs a program, and gives back what it printed.
fn output(command: &mut Command) -> Result<String> {
    output_within(LIMIT, command)
}

fn output_within(limit: Duration, command: &mut Command) -> Result<String> {
    // Files, because a pipe that nobody empties holds a program up.
    let (mut printed, mut complaints) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(printed.try_clone()?).stderr(complaints.try_clone()?);
    match run(limit, command)? {
        Some(status) if status.success() => contents(&mut printed),
        Some(_) => bail!("{command:?} failed: {}", contents(&mut complaints)?.trim()),
        None => bail!(
            "{command:?} did not end within {} s and was killed; is what apt downloads from reachable? {}",
            limit.as_secs_f32(),
            contents(&mut complaints)?.trim()
        ),
    }
}

/// Runs a program to its end; nothing if it had to be killed because that did not come in time.
fn run(limit: Duration, command: &mut Command) -> Result<Option<ExitStatus>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    let end = Instant::now() + limit;
    loop {
        match child.try_wait()? {
            None if Instant::now() < end => std::thread::sleep(POLL),
            None => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            ended => return Ok(ended),
        }
    }
}

fn contents(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    match found.len() {
        1 => Ok(found.remove(0)),
        count => bail!("{count} files {}/{prefix}*, where one was expected", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_of_packages_is_followed() {
        let text = "linux-image-6.12-cloud-amd64\n  Depends: linux-image-6.12.1+x-cloud-amd64\n";
        assert_eq!(parse_depends("linux-image-6.12-cloud-amd64", text), "linux-image-6.12.1+x-cloud-amd64");
        let text = "linux-image-6.12.1\n  Depends: kmod\n  Depends: linux-base\n";
        assert_eq!(parse_depends("linux-image-6.12.1", text), "linux-image-6.12.1");
    }

    #[test]
    fn a_kernel_is_a_folder_or_a_package_that_is_there_already() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("linux-image-7");
        for made in ["boot", "lib/modules/7.0"] {
            std::fs::create_dir_all(folder.join(made)).unwrap();
        }
        let error = |named: &str| format!("{:#}", Kernel::obtain(named, cache.path()).err().unwrap());
        let path = folder.to_str().unwrap();
        assert!(error(path).starts_with(&format!("{path} is no folder of a kernel: ")), "{}", error(path));
        assert!(error("linux-image-7").contains("is damaged; remove it"), "{}", error("linux-image-7"));
        std::fs::write(folder.join("boot/vmlinuz-7.0"), "").unwrap();
        for named in [path, "linux-image-7"] {
            let kernel = Kernel::obtain(named, cache.path()).unwrap();
            assert_eq!(kernel.image, folder.join("boot/vmlinuz-7.0"));
            assert_eq!(kernel.modules, folder.join("lib/modules/7.0"));
        }
    }

    #[test]
    fn one_entry_is_one() {
        let folder = tempfile::tempdir().unwrap();
        assert!(only_entry(folder.path(), "a").is_err());
        std::fs::write(folder.path().join("a1"), "").unwrap();
        std::fs::write(folder.path().join("b1"), "").unwrap();
        assert_eq!(only_entry(folder.path(), "a").unwrap(), folder.path().join("a1"));
        assert!(only_entry(folder.path(), "").unwrap_err().to_string().starts_with("2 files"));
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_and_the_error_says_so() {
        let mut stuck = Command::new("sh");
        stuck.args(["-c", "echo trying >&2; exec sleep 1000"]);
        let error = output_within(Duration::from_secs(1), &mut stuck).unwrap_err().to_string();
        assert!(error.contains("did not end within 1 s") && error.ends_with("trying"), "{error}");
    }

    #[test]
    fn a_failed_program_says_why() {
        let error = output(Command::new("sh").args(["-c", "echo no such thing >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("no such thing"), "{error}");
        assert_eq!(output(Command::new("echo").arg("well")).unwrap(), "well\n");
    }
}
