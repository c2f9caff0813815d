//! What `seed` and `leech` tell the application: commands that are run. And the secret that both sides know.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration};
use r3map::{Error, ErrorKind, FileOptions, Operation, Settings};

use crate::args::Application;

/// A migration with the user's commands and secret.
pub(super) fn migration(application: &Application, paths: &[PathBuf]) -> Result<Migration> {
    let migration = Migration::new().hooks(hooks(application, paths));
    let Some(file) = &application.secret_file else { return Ok(migration) };
    let secret = std::fs::read(file).with_context(|| format!("cannot read the secret in {}", file.display()))?;
    let secret = secret.trim_ascii();
    if secret.is_empty() {
        bail!("{} is empty; put a secret into it, the same on both sides", file.display());
    }
    Ok(migration.secret(secret))
}

/// How regions are shown to the application.
pub(super) fn settings(application: &Application) -> Settings {
    Settings {
        file: FileOptions { allow_other: application.allow_other, ..FileOptions::default() },
        ..Settings::default()
    }
}

fn hooks(application: &Application, paths: &[PathBuf]) -> Hooks {
    let paths: Arc<[PathBuf]> = paths.into();
    let mut hooks = Hooks::default();
    if let Some(command) = application.on_suspend.clone() {
        let paths = paths.clone();
        hooks = hooks.on_suspend(move || run("--on-suspend", command.clone(), paths.clone()));
    }
    if let Some(command) = application.on_resume.clone() {
        hooks = hooks.on_resume(move || run("--on-resume", command.clone(), paths.clone()));
    }
    hooks
}

/// Runs a command, which finds the (first) region in `R3MAP_PATH`, and all of them, one a line, in `R3MAP_PATHS`.
async fn run(option: &'static str, command: String, paths: Arc<[PathBuf]>) -> r3map::Result<()> {
    let names: Vec<_> = paths.iter().map(|path| path.as_os_str()).collect();
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", &command]).env("R3MAP_PATHS", names.join("\n".as_ref()));
    shell.env("R3MAP_PATH", paths.first().map_or(Path::new(""), PathBuf::as_path));
    // Standard output is for events. A Ctrl-C is meant for us, not for a command that is half-way.
    shell.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0).kill_on_drop(true);
    let failed = |message: String| Error::new(ErrorKind::Cancelled, Operation::Close, message);
    match shell.status().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("{option} {command:?} ended with {status}"))),
        Err(error) => Err(failed(format!("{option} {command:?} cannot be run")).with_source(error)),
    }
}
