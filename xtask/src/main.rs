//! `cargo xtask …`: the one front door for developers and CI.
//!
//! It installs what tests need, runs every check there is, and says what failed. It builds nothing that users get.

mod hygiene;
mod newer;
mod setup;
mod test;
mod vm;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

/// Builds, checks and tests r3map.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that must hold before a change lands: set-up, lints, documentation, models, all tests.
    Test {
        /// Only test binaries whose package or name contains this; lints and documentation are left out then.
        filter: Option<String>,
    },
    /// Tests that need a kernel with NBD, ublk and netem: all cargo test targets named `vm`, in a virtual machine.
    Vm(vm::Options),
    /// Installs what tests need from Debian (as root); elsewhere says what to install.
    Setup,
    /// Formatting, clippy, fuzz targets, documentation, layering, licences and sources of dependencies.
    Lint,
    /// Model-checks the chunk state under loom.
    Model,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))?;
    match task {
        Task::Setup => setup::run(),
        Task::Lint => lint(),
        Task::Model => model(),
        Task::Vm(options) => vm::run(&options),
        Task::Test { filter: Some(filter) } => test::run(Some(&filter)),
        Task::Test { filter: None } => {
            setup::run()?;
            lint()?;
            model()?;
            test::run(None)
        }
    }
}

fn lint() -> Result<()> {
    step("formatting", cargo(&["fmt", "--all", "--", "--check"]))?;
    step("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    fuzz()?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    step("documentation", doc)?;
    println!("== hygiene");
    hygiene::check()
}

/// What is fuzzed by hand has to compile: it is no member of the workspace. libFuzzer itself, which would take a C++
/// compiler, is left out.
fn fuzz() -> Result<()> {
    let mut check = cargo(&[
        "check",
        "--locked",
        "--manifest-path",
        "transports/nbd/fuzz/Cargo.toml",
        "--target-dir",
        "target/fuzz",
    ]);
    check.env("CUSTOM_LIBFUZZER_PATH", "none/libfuzzer.a").env("RUSTFLAGS", "-D warnings");
    step("fuzz targets", check)
}

fn model() -> Result<()> {
    let mut loom = cargo(&["test", "-p", "r3map-core", "--lib", "--release", "--target-dir", "target/loom", "loom"]);
    loom.env("RUSTFLAGS", "--cfg loom").env("LOOM_MAX_PREEMPTIONS", "3");
    step("models (loom)", loom)
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

fn step(name: &str, mut command: Command) -> Result<()> {
    println!("== {name}");
    let status = command.status().with_context(|| format!("{name}: cannot start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{name} failed; run it alone with: {command:?}");
    }
    Ok(())
}
