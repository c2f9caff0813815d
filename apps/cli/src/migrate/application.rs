//! What `seed` and `leech` tell the application: commands that are run. And the secret that both sides know.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration};
use r3map::{BlockOptions, Error, ErrorKind, FileOptions, Operation, Settings};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::args::{Application, As, Show};
use crate::output::Output;

/// A migration with the user's secret, and with the commands of a leecher.
pub(super) fn migration(application: &Application, paths: &[PathBuf]) -> Result<Migration> {
    let migration = Migration::new().hooks(hooks(application, paths, None)).limit(application.hook_timeout);
    let Some(file) = &application.secret_file else { return Ok(migration) };
    let secret = std::fs::read(file).with_context(|| format!("cannot read the secret in {}", file.display()))?;
    let secret = secret.trim_ascii();
    if secret.is_empty() {
        bail!("{} is empty; put a secret into it, the same on both sides", file.display());
    }
    Ok(migration.secret(secret))
}

/// The same with the commands of a seeder. That one of a leecher has failed, its caller hears; here only the user can.
pub(super) fn seeding(migration: Migration, application: &Application, paths: &[PathBuf], output: Output) -> Migration {
    migration.hooks(hooks(application, paths, Some(output)))
}

/// How a region is shown to the application at `path`.
pub(super) fn settings(show: &Show, path: &Path) -> Settings {
    let link = (show.r#as != As::File).then(|| path.to_owned());
    Settings {
        file: FileOptions { allow_other: show.allow_other, entry: show.entry.clone(), ..FileOptions::default() },
        block: BlockOptions { kind: show.r#as.kind(), link, ..BlockOptions::default() },
        ..Settings::default()
    }
}

/// Where the application finds what is shown at `path`.
pub(super) fn shown_at(show: &Show, path: &Path) -> PathBuf {
    show.entry.as_ref().map_or_else(|| path.to_owned(), |name| path.join(name))
}

/// Refuses what would silently have no effect.
pub(super) fn check(show: &Show) -> Result<()> {
    if show.r#as != As::File && (show.allow_other || show.entry.is_some()) {
        bail!("--allow-other and --entry are for files: leave them out, or add --as file");
    }
    Ok(())
}

fn hooks(application: &Application, paths: &[PathBuf], tell: Option<Output>) -> Hooks {
    let paths: Arc<[PathBuf]> = paths.into();
    let mut hooks = Hooks::default();
    if let Some(command) = application.on_suspend.clone() {
        let paths = paths.clone();
        hooks = hooks.on_suspend(move || run("--on-suspend", command.clone(), paths.clone()));
    }
    if let Some(command) = application.on_resume.clone() {
        hooks = hooks.on_resume(move || {
            let running = run("--on-resume", command.clone(), paths.clone());
            async move {
                let mut failing = Failing { tell, why: "--on-resume took too long, and was killed".into() };
                let done = running.await;
                match &done {
                    Ok(()) => failing.tell = None,
                    Err(error) => failing.why = error.message().to_owned(),
                }
                done
            }
        });
    }
    hooks
}

/// Says that the application does not run, when it is dropped: a command that takes too long is.
struct Failing {
    tell: Option<Output>,
    why: String,
}

impl Drop for Failing {
    fn drop(&mut self) {
        if let Some(output) = self.tell {
            output.note("warning", &format!("the application could not be resumed: {}", self.why));
        }
    }
}

/// Runs a command, which finds the (first) region in `R3MAP_PATH`, and all of them, one a line, in `R3MAP_PATHS`.
async fn run(option: &'static str, command: String, paths: Arc<[PathBuf]>) -> r3map::Result<()> {
    let names: Vec<_> = paths.iter().map(|path| path.as_os_str()).collect();
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", &command]).env("R3MAP_PATHS", names.join("\n".as_ref()));
    shell.env("R3MAP_PATH", paths.first().map_or(Path::new(""), PathBuf::as_path));
    // Standard output is for events. A Ctrl-C is meant for us, not for a command that is half-way.
    shell.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let failed = |message: String| Error::new(ErrorKind::Cancelled, Operation::Close, message);
    match ended(shell).await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(format!("{option} {command:?} ended with {status}"))),
        Err(error) => Err(failed(format!("{option} {command:?} cannot be run")).with_source(error)),
    }
}

/// Waits until a command has ended. If that takes too long for the caller, it is killed, with all that it has started.
async fn ended(mut command: tokio::process::Command) -> io::Result<ExitStatus> {
    let mut child = command.spawn()?;
    let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let status = child.wait().await;
    // What a command that has ended leaves running is meant to run.
    group.0 = None;
    status
}

/// The processes of a command, which are killed when this is dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0
            && let Err(error) = kill_process_group(group, Signal::KILL)
        {
            tracing::warn!(%error, "a command that takes too long could not be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::time::Duration;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Runs a command, which has a pipe as its region; what comes through that, line by line, until nobody has it open.
    async fn start(command: &str) -> (tokio::task::JoinHandle<r3map::Result<()>>, tokio::sync::mpsc::Receiver<String>) {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        let command = tokio::spawn(run("--on-suspend", command.into(), [pipe.clone()].into()));
        let (lines, read) = tokio::sync::mpsc::channel(8);
        std::thread::spawn(move || {
            let pipe = BufReader::new(File::open(pipe).unwrap());
            pipe.lines().for_each(|line| lines.blocking_send(line.unwrap()).unwrap());
            drop(folder);
        });
        (command, read)
    }

    async fn next(lines: &mut tokio::sync::mpsc::Receiver<String>) -> Option<String> {
        tokio::time::timeout(LIMIT, lines.recv()).await.expect("the pipe says something, or is closed")
    }

    #[tokio::test]
    async fn what_a_command_that_takes_too_long_has_started_ends_with_it() {
        let (command, mut lines) = start("(echo here; exec sleep 300) > \"$R3MAP_PATH\" & wait").await;
        assert_eq!(next(&mut lines).await.as_deref(), Some("here"));
        command.abort();
        assert_eq!(next(&mut lines).await, None);
    }

    #[tokio::test]
    async fn what_a_command_that_has_ended_leaves_running_runs_on() {
        let (command, mut lines) = start("(sleep 0.5; echo later) > \"$R3MAP_PATH\" &").await;
        command.await.unwrap().unwrap();
        assert_eq!(next(&mut lines).await.as_deref(), Some("later"));
    }
}
