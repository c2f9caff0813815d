//! Builds what goes into the virtual machine, and runs it there. How that works is `testing/vm`'s business.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map_vm::contents::KERNEL;
use r3map_vm::{Plan, Report, Settings, Vm, Work};

use crate::test::{self, Binary};
use crate::{cargo, step};

/// Test targets of this name run in the virtual machine, and only there.
pub(crate) const TARGET: &str = "vm";

/// The folder of the package whose tests use the command `r3map`.
const COMMAND: &str = "apps/cli";

/// How long one test may take. Under emulation everything takes several times as long as on the host.
const DEADLINE: Duration = Duration::from_secs(120);

/// How long all of them may take together, the boot too.
const LIMIT: Duration = Duration::from_secs(900);

/// Asks tests that move a region for so many moves, instead of what fits into [`DEADLINE`].
const MOVES: &str = "R3MAP_MIGRATE_HOPS";

/// How long one move may take on a machine that is busy with other things too; on an idle one it is a second.
const MOVE: Duration = Duration::from_secs(10);

/// How many tests at most move a region as often as is asked for.
const MOVERS: u32 = 6;

/// How long a benchmark may take.
const BENCH_LIMIT: Duration = Duration::from_secs(1800);

/// What to run in the virtual machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only tests whose full name, `folder::test`, contains this.
    filter: Option<String>,
    /// Only tests of this package: nothing else is compiled.
    #[arg(short, long)]
    package: Option<String>,
    /// Another kernel than the usual one: a Debian package that apt knows, or a folder (with a slash in its name) that has
    /// boot/vmlinuz-* and lib/modules/*. What has been downloaded is in target/vm.
    #[arg(long, value_name = "PACKAGE|FOLDER", default_value = KERNEL)]
    kernel: String,
    /// Run `r3map-bench` with these arguments instead of tests.
    #[arg(long, num_args = 1.., allow_hyphen_values = true, conflicts_with_all = ["filter", "package"])]
    bench: Option<Vec<String>>,
}

/// The task `cargo xtask vm`.
pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.bench {
        Some(arguments) => bench(arguments, &options.kernel),
        None => tests(options),
    }
}

fn tests(options: &Options) -> Result<()> {
    step("build", cargo(&["build", "--package", "r3map-vm", "--bins"]))?;
    let which = match &options.package {
        Some(package) => ["--package", package],
        None => ["--workspace", "--quiet"],
    };
    let binaries = test::build(&[&which[..], &["--test", TARGET]].concat())?;
    let report = run_tests(&binaries, options.filter.as_deref(), &options.kernel)?;
    println!("{} passed, {} failed, {} skipped", report.passed, report.failed.len(), report.skipped);
    if !report.failed.is_empty() {
        bail!("failed: {}", report.failed.join(", "));
    }
    if report.passed == 0 {
        bail!("no test ran; is the filter right?");
    }
    Ok(())
}

/// Runs the tests in these binaries, those that contain `filter`, in one virtual machine. The guest's first process has
/// been built; so has `r3map` if tests of its own package are among them, and only such tests may use it.
pub(crate) fn run_tests(binaries: &[Binary], filter: Option<&str>, kernel: &str) -> Result<Report> {
    let binaries: Vec<_> = binaries.iter().map(in_guest).collect::<Result<_>>()?;
    let command = binaries.iter().any(|binary| binary.name == COMMAND).then(|| built("debug/r3map"));
    let work = Work::Tests { binaries, filter: filter.map(str::to_owned) };
    let moves = std::env::var(MOVES).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let moving = MOVE.saturating_mul(moves);
    let limit = LIMIT.max(moving.saturating_mul(MOVERS));
    carry_out(work, command.as_slice(), kernel, DEADLINE.max(moving), limit)
}

fn bench(arguments: &[String], kernel: &str) -> Result<()> {
    step("build", cargo(&["build", "--package", "r3map-vm", "--bins"]))?;
    step("build", cargo(&["build", "--release", "--package", "r3map-bench", "--package", "r3map-cli", "--bins"]))?;
    let work = Work::Command { path: absolute(&built("release/r3map-bench"))?, arguments: arguments.to_vec() };
    let report = carry_out(work, &[built("release/r3map")], kernel, BENCH_LIMIT, BENCH_LIMIT)?;
    if !report.failed.is_empty() {
        bail!("the benchmark failed");
    }
    Ok(())
}

fn carry_out(work: Work, programs: &[PathBuf], kernel: &str, deadline: Duration, limit: Duration) -> Result<Report> {
    println!("== virtual machine");
    let settings = Settings {
        cache: built("vm"),
        kernel: kernel.to_owned(),
        guest: absolute(&built("debug/r3map-vm-guest"))?,
        memory_mib: 2048,
        cpus: 2,
        limit,
    };
    let programs = programs.iter().map(|path| absolute(path)).collect::<Result<_>>()?;
    const PASSED_ON: [&str; 4] = ["CI", "RUST_LOG", MOVES, "R3MAP_MIGRATE_SEED"];
    let environment = PASSED_ON.map(|name| Some((name.to_owned(), std::env::var(name).ok()?)));
    let mut environment: Vec<_> = environment.into_iter().flatten().collect();
    environment.push(("RUST_BACKTRACE".to_owned(), "1".to_owned()));
    let plan = Plan { work, programs, environment, deadline };
    Vm::new(settings).run(&plan, &mut |line| println!("{line}"))
}

fn in_guest(binary: &Binary) -> Result<r3map_vm::Binary> {
    let root = std::env::current_dir()?.canonicalize()?;
    let folder = binary.directory.strip_prefix(root).unwrap_or(&binary.directory);
    Ok(r3map_vm::Binary {
        name: folder.display().to_string(),
        path: absolute(&binary.path)?,
        directory: binary.directory.clone(),
    })
}

/// A path in cargo's folder.
fn built(path: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Path::new(&target).join(path)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| path.display().to_string())
}
