//! Which shared libraries a program needs, as the host's `ldd` says.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The libraries that a program or library needs, the dynamic linker too; none for a static program or a data file.
pub(crate) fn of(file: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(file).output().context("cannot start ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse(&text).with_context(|| file.display().to_string())
}

fn parse(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        let Some((name, rest)) = line.split_once("=>").or_else(|| line.split_once('(').map(|(path, _)| ("", path)))
        else {
            continue;
        };
        if rest.contains("not found") {
            bail!("the library {} is not installed", name.trim());
        }
        let path = rest.split(" (").next().unwrap_or("").trim();
        // What has no path is the page of code that the kernel itself maps.
        if path.starts_with('/') {
            libraries.push(path.into());
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f9f)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(parse(text).unwrap(), expected);
        for none in ["\tnot a dynamic executable\n", "\tstatically linked\n", ""] {
            assert_eq!(parse(none).unwrap(), Vec::<PathBuf>::new(), "{none:?}");
        }
        assert!(parse("\tlibx.so => not found\n").unwrap_err().to_string().contains("libx.so"));
    }

    #[test]
    fn a_program_of_this_machine() {
        let libraries = of(&std::env::current_exe().unwrap()).unwrap();
        assert!(libraries.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{libraries:?}");
    }
}
