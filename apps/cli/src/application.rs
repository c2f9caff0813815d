//! What `seed` and `leech` tell the application: commands that are run, and the secret that both sides know.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration};
use r3map::{Error, ErrorKind, Operation};

use crate::args::Application;

/// A migration with the user's commands and secret. Commands find the region's path in `R3MAP_PATH`.
pub(crate) fn migration(application: &Application, path: &Path) -> Result<Migration> {
    let mut migration = Migration::new().hooks(hooks(application, path));
    if let Some(file) = &application.secret_file {
        let secret = std::fs::read(file).with_context(|| format!("cannot read the secret in {}", file.display()))?;
        let secret = secret.trim_ascii();
        if secret.is_empty() {
            bail!("{} is empty; put a secret into it, the same on both sides", file.display());
        }
        migration = migration.secret(secret);
    }
    Ok(migration)
}

fn hooks(application: &Application, path: &Path) -> Hooks {
    let mut hooks = Hooks::default();
    let path = path.to_owned();
    if let Some(command) = application.on_suspend.clone() {
        let path = path.clone();
        hooks = hooks.on_suspend(move || run(command.clone(), path.clone()));
    }
    if let Some(command) = application.on_resume.clone() {
        hooks = hooks.on_resume(move || run(command.clone(), path.clone()));
    }
    hooks
}

async fn run(command: String, path: std::path::PathBuf) -> r3map::Result<()> {
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", &command]).env("R3MAP_PATH", path).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    let failed = |message: String| Error::new(ErrorKind::Cancelled, Operation::Close, message);
    match shell.status().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("{command:?} ended with {status}"))),
        Err(error) => Err(failed(format!("{command:?} cannot be run")).with_source(error)),
    }
}
