//! The `r3map` command.
//!
//! It reads the command line, calls the library, and says what happens; what a mount or a copy is, the library knows.

mod args;
mod copy;
mod demo;
mod info;
mod migrate;
mod mount;
mod nbd;
mod order;
mod output;
mod remove;
mod serve;
mod shown;
mod signals;
mod trouble;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use r3map::Registry;

use crate::args::{Cli, Command};
use crate::output::Output;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let output = Output::new(cli.json);
    start_log();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.note("error", &format!("the system has no room for a thread: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(run(cli.command, output));
    // A blocking task that hangs (a dead disk) must not keep the process from ending.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.note("error", &format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// Help and versions as they are; whatever is wrong with the command line as one line.
fn misused(error: &clap::Error) -> ExitCode {
    const MISUSED: u8 = 2;
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if matches!(error.kind(), DisplayHelp | DisplayHelpOnMissingArgumentOrSubcommand | DisplayVersion) {
        error.exit();
    }
    let json = std::env::args_os().any(|argument| argument == "--json");
    Output::new(json).note("error", &one_line(error));
    ExitCode::from(MISUSED)
}

fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let telling = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<_> = telling.flat_map(str::split_whitespace).collect();
    let line = words.join(" ");
    let line = line.trim_start_matches("error: ");
    let pause = if line.ends_with('?') { "" } else { ";" };
    format!("{line}{pause} try --help")
}

async fn run(command: Command, output: Output) -> Result<()> {
    let registry = Registry::standard();
    match command {
        Command::Serve(args) => serve::run(&registry, args, output).await,
        Command::Mount(args) => mount::run(&registry, args, output).await,
        Command::Remove(args) => remove::run(args, output).await,
        Command::Info(args) => info::run(&registry, args, output).await,
        Command::Copy(args) => copy::run(&registry, args, output).await,
        Command::Seed(args) => migrate::seed::run(&registry, args, output).await,
        Command::Leech(args) => migrate::leech::run(&registry, args, output).await,
        Command::Nbd(args) => nbd::run(args, output).await,
        Command::Demo(args) => demo::run(args, output).await,
        Command::Completions(args) => {
            // Into memory first: it would panic where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "r3map", &mut script);
            output::write_out(&script)
        }
        Command::Man(args) => clap_mangen::generate_to(Cli::command(), &args.folder)
            .with_context(|| format!("cannot write man pages into {}", args.folder.display())),
    }
}

/// `R3MAP_LOG=debug` shows what happens inside, on standard error.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("R3MAP_LOG").unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
