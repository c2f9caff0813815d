//! Runs tests one by one, each in a process of its own, and says how each went.

use std::cell::RefCell;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::child::{self, Ended};
use super::port::Port;
use super::stuck;
use crate::plan::{Binary, Plan, VARIABLE};
use crate::protocol::Message;
use crate::report::Verdict;

/// Where programs are looked for; busybox's are the last choice.
const PATH: &str = "/r3map/bin:/usr/sbin:/usr/bin:/busybox";

/// How long a binary may take to list its tests.
const LIST: Duration = Duration::from_secs(60);

pub(super) struct Runner<'a> {
    port: &'a Port,
    plan: &'a Plan,
    /// Tasks that earlier tests left stuck.
    known_stuck: RefCell<Vec<i32>>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(port: &'a Port, plan: &'a Plan) -> Self {
        Self { port, plan, known_stuck: RefCell::default() }
    }

    /// Runs the tests of a binary that pass the filter. A binary that cannot list its tests is a failed test.
    pub(super) fn binary(&self, binary: &Binary, filter: Option<&str>) {
        match self.list(binary) {
            Ok(tests) => {
                for test in tests {
                    let full = format!("{}::{test}", binary.name);
                    if filter.is_none_or(|part| full.contains(part)) {
                        self.test(binary, &test, full);
                    }
                }
            }
            Err(error) => {
                self.port.send(&Message::Begin { test: binary.name.clone() });
                self.end(Verdict::Failed { reason: format!("{error:#}") }, Instant::now());
            }
        }
    }

    /// Runs a single program, and passes on what it prints.
    pub(super) fn command(&self, path: &Path, arguments: &[String]) {
        let mut command = self.prepare(path, Path::new("/tmp"));
        command.args(arguments);
        self.run(path.display().to_string(), &mut command, judge_command);
    }

    fn list(&self, binary: &Binary) -> Result<Vec<String>> {
        let mut command = self.prepare(&binary.path, &binary.directory);
        let ended = child::run(command.args(["--list", "--format", "terse"]), LIST, &|_| {})?;
        if !ended.is_success() {
            bail!("it does not list its tests: {}", ended.lines.join("; "));
        }
        Ok(ended.lines.iter().filter_map(|line| Some(line.strip_suffix(": test")?.to_owned())).collect())
    }

    fn test(&self, binary: &Binary, test: &str, full: String) {
        let mut command = self.prepare(&binary.path, &binary.directory);
        command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
        self.run(full, &mut command, judge_test);
    }

    fn run(&self, name: String, command: &mut Command, judge: fn(&Ended) -> Verdict) {
        let start = Instant::now();
        self.port.send(&Message::Begin { test: name });
        let print = |line: &str| self.port.send(&Message::Output { text: line.to_owned() });
        let verdict = match child::run(command, self.plan.deadline, &print) {
            Ok(Ended { status: None, .. }) => failed(format!("stuck: not done after {:?}", self.plan.deadline)),
            Ok(ended) => judge(&ended),
            Err(error) => failed(format!("{error:#}")),
        };
        let stuck = stuck::clean_up(&mut self.known_stuck.borrow_mut());
        self.end(with_stuck(verdict, &stuck), start);
    }

    fn end(&self, verdict: Verdict, start: Instant) {
        self.port.send(&Message::End { verdict, seconds: start.elapsed().as_secs_f64() });
    }

    fn prepare(&self, program: &Path, directory: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(directory).env_clear().env("PATH", PATH).env("HOME", "/root").env(VARIABLE, "1");
        command.envs(self.plan.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

fn failed(reason: impl Into<String>) -> Verdict {
    Verdict::Failed { reason: reason.into() }
}

fn with_stuck(verdict: Verdict, stuck: &[String]) -> Verdict {
    if stuck.is_empty() {
        return verdict;
    }
    failed(format!("{verdict}; it left stuck: {}", stuck.join("; ")))
}

fn judge_command(ended: &Ended) -> Verdict {
    if ended.is_success() { Verdict::Passed } else { failed(describe(ended)) }
}

/// Reads libtest's own words: a test that is marked as ignored, or that says that it is skipped, succeeds too.
fn judge_test(ended: &Ended) -> Verdict {
    if !ended.is_success() {
        return failed(describe(ended));
    }
    let find = |part: &str| ended.lines.iter().find_map(|line| Some(line.split_once(part)?.1.to_owned()));
    match (find("skipped: "), find("test result: ok. ")) {
        (Some(reason), _) => Verdict::Skipped { reason },
        (None, Some(result)) if result.starts_with("1 passed") => Verdict::Passed,
        (None, Some(result)) if result.contains(" 1 ignored") => Verdict::Skipped { reason: "ignored".into() },
        _ => failed("it ran no test"),
    }
}

fn describe(ended: &Ended) -> String {
    match ended.status.map(|status| (status.code(), status.signal())) {
        Some((Some(code), _)) => format!("exit code {code}"),
        Some((_, Some(signal))) => format!("killed by signal {signal}"),
        _ => "it did not end".to_owned(),
    }
}

#[cfg(test)]
mod unit {
    use std::process::ExitStatus;

    use super::*;

    fn ended(status: i32, lines: &[&str]) -> Ended {
        Ended {
            status: Some(ExitStatus::from_raw(status)),
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
        }
    }

    #[test]
    fn reads_how_a_test_went() {
        let result = |counts: &str| format!("test result: ok. {counts}; 0 measured; 3 filtered out");
        let (passed, ignored) = (result("1 passed; 0 failed; 0 ignored"), result("0 passed; 0 failed; 1 ignored"));
        assert_eq!(judge_test(&ended(0, &["x", &passed])), Verdict::Passed);
        assert_eq!(judge_test(&ended(0, &[&ignored])), Verdict::Skipped { reason: "ignored".into() });
        let skipped = judge_test(&ended(0, &["test a ... skipped: no device", &passed]));
        assert_eq!(skipped, Verdict::Skipped { reason: "no device".into() });
        assert_eq!(judge_test(&ended(0, &[&result("0 passed; 0 failed; 0 ignored")])), failed("it ran no test"));
        assert_eq!(judge_test(&ended(0, &[])), failed("it ran no test"));
    }

    #[test]
    fn says_how_a_program_ended() {
        assert_eq!(judge_test(&ended(101 << 8, &[])), failed("exit code 101"));
        assert_eq!(judge_command(&ended(9, &[])), failed("killed by signal 9"));
        assert_eq!(judge_command(&ended(0, &[])), Verdict::Passed);
        let stuck = with_stuck(Verdict::Passed, &["D 7 (dd) in x".into()]);
        assert_eq!(stuck, failed("ok; it left stuck: D 7 (dd) in x"));
    }
}
