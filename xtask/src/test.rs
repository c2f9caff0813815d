//! Runs every test binary with a deadline, says where a stuck one is, and counts. Test targets named `vm` go into the
//! virtual machine instead.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use r3map_vm::contents::KERNEL;

use crate::{cargo, step, vm};

/// How long one test binary may run. The longest takes a small part of it on a two-core machine.
const DEADLINE: Duration = Duration::from_secs(900);

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

pub(crate) struct Binary {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) directory: PathBuf,
    /// The name of the target alone.
    pub(crate) target: String,
}

/// Builds and runs all tests, or those whose name contains `filter`.
pub(crate) fn run(filter: Option<&str>) -> Result<()> {
    // Tests start the command itself, so it must be there, and up to date.
    step("build", cargo(&["build", "--workspace", "--bins", "--examples"]))?;
    println!("== tests");
    let mut binaries = build(&["--workspace"])?;
    binaries.retain(|binary| filter.is_none_or(|part| binary.name.contains(part)));
    let (guests, hosts): (Vec<_>, Vec<_>) = binaries.into_iter().partition(|binary| binary.target == vm::TARGET);
    let mut total = Counts::default();
    let mut bad = Vec::new();
    for binary in &hosts {
        let (counts, fine) = run_one(binary)?;
        total.passed += counts.passed;
        total.failed += counts.failed;
        total.ignored += counts.ignored;
        if !fine {
            bad.push(binary.name.clone());
        }
    }
    if !guests.is_empty() {
        let report = vm::run_tests(&guests, None, KERNEL)?;
        total.passed += report.passed;
        total.ignored += report.skipped;
        total.failed += report.failed.len() as u64;
        bad.extend(report.failed);
    }
    if filter.is_none() {
        step("documentation tests", cargo(&["test", "--workspace", "--doc", "--quiet"]))?;
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.ignored);
    if !bad.is_empty() {
        bail!("failed: {}", bad.join(", "));
    }
    if total.passed == 0 {
        bail!("no test ran; is the filter right?");
    }
    Ok(())
}

/// Compiles tests, those that cargo chooses by `which`, and says where they are.
pub(crate) fn build(which: &[&str]) -> Result<Vec<Binary>> {
    let mut command = cargo(&["test", "--no-run", "--message-format=json-render-diagnostics"]);
    command.args(which);
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let output = BufReader::new(child.stdout.take().context("cargo has no output")?);
    let mut binaries = Vec::new();
    for message in Message::parse_stream(output) {
        if let Message::CompilerArtifact(artifact) = message?
            && let (Some(path), true) = (artifact.executable, artifact.profile.test)
        {
            let package = artifact.manifest_path.parent().context("a manifest has a folder")?;
            binaries.push(Binary {
                name: format!(
                    "{}::{}",
                    artifact.package_id.repr.rsplit('/').next().unwrap_or(""),
                    artifact.target.name
                ),
                target: artifact.target.name,
                path: path.into(),
                directory: package.into(),
            });
        }
    }
    if !child.wait()?.success() {
        bail!("the tests do not compile");
    }
    binaries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(binaries)
}

fn run_one(binary: &Binary) -> Result<(Counts, bool)> {
    println!("-- {}", binary.name);
    let mut child = Command::new(&binary.path)
        .current_dir(&binary.directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", binary.path.display()))?;
    let output = BufReader::new(child.stdout.take().context("a test has no output")?);
    let start = Instant::now();
    let done = AtomicBool::new(false);
    let id = child.id();
    let counts = std::thread::scope(|scope| {
        scope.spawn(|| watch(id, start, &done));
        let counts = read(output);
        done.store(true, Ordering::Relaxed);
        counts
    });
    let status = wait(&mut child)?;
    println!("   {:.1} s", start.elapsed().as_secs_f64());
    Ok((counts, status))
}

fn wait(child: &mut Child) -> Result<bool> {
    Ok(child.wait()?.success())
}

/// Passes a binary's output on and counts the results in it.
fn read(output: impl BufRead) -> Counts {
    let mut counts = Counts::default();
    for line in output.lines().map_while(Result::ok) {
        if line.trim_start().starts_with("skipped: ") {
            counts.ignored += 1;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            let number = |what: &str| {
                let before = result.split(what).next().unwrap_or("");
                before.rsplit([' ', '.']).find_map(|word| word.parse::<u64>().ok()).unwrap_or(0)
            };
            counts.passed += number(" passed");
            counts.failed += number(" failed");
            counts.ignored += number(" ignored");
        }
        println!("{line}");
    }
    counts
}

/// Kills a binary that is still running at its deadline, and says where each of its threads is.
fn watch(id: u32, start: Instant, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        if start.elapsed() > DEADLINE {
            eprintln!("stuck after {DEADLINE:?}; its threads:");
            for task in std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten() {
                let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
                eprintln!("  {} in {} ({})", read("comm").trim(), read("wchan").trim(), read("syscall").trim());
            }
            let _ = Command::new("kill").args(["-9", &id.to_string()]).status();
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
