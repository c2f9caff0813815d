//! What the runner makes of tests that go wrong in every way, the last of them taking the whole machine down. The test
//! binary is a shell script that speaks as libtest does. The last one's words need a moment to leave the machine.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use r3map_testkit::skip;
use r3map_vm::contents::KERNEL;
use r3map_vm::{Binary, Plan, Report, Settings, Vm, Work};

const SCRIPT: &str = r#"#!/bin/sh
ok='test result: ok. 1 passed; 0 failed; 0 ignored'
if [ "$1" = --list ]; then
  for name in passes fails hangs skips leaves stuck other panics; do echo "$name: test"; done
  exit
fi
[ "$1" = --exact ] || exit 3
echo "this is $2 with R3MAP_VM=$R3MAP_VM in $(pwd)"
case "$2" in
  passes | other) echo "$ok";;
  fails) echo 'the reason'; exit 101;;
  hangs) sleep 1000;;
  skips) echo 'skipped: no moon'; echo "$ok";;
  leaves) sleep 1000 & echo "$ok";;
  stuck)
    truncate -s 16M /tmp/image && mkfs.ext4 -q /tmp/image && mkdir /tmp/place && mount -o loop /tmp/image /tmp/place || exit 1
    fsfreeze --freeze /tmp/place
    touch /tmp/place/file &
    echo "$ok";;
  panics) echo 'last words'; sleep 2; echo c > /proc/sysrq-trigger; sleep 1000;;
esac
"#;

/// How long a test may take here.
const DEADLINE: Duration = Duration::from_secs(8);

fn settings() -> Settings {
    Settings {
        // Beside cargo's folder for temporary files: where `cargo xtask vm` keeps its downloads too.
        cache: Path::new(env!("CARGO_TARGET_TMPDIR")).join("../vm"),
        kernel: KERNEL.into(),
        guest: env!("CARGO_BIN_EXE_r3map-vm-guest").into(),
        memory_mib: 1024,
        cpus: 2,
        limit: Duration::from_secs(600),
    }
}

fn can_run() -> bool {
    let there = Path::new("/usr/bin/qemu-system-x86_64").exists();
    if !there {
        skip("QEMU is not installed");
    }
    there
}

/// Runs the script's tests; gives back the report and what was shown.
fn run(script: &str) -> (Report, Vec<String>) {
    // Two emulated machines at once would make each other's time run out.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().canonicalize().unwrap().join("script");
    std::fs::write(&path, script).unwrap();
    let binary = Binary { name: "it".into(), path, directory: "/some/where".into() };
    let work = Work::Tests { binaries: vec![binary], filter: None };
    let plan = Plan { work, programs: Vec::new(), environment: Vec::new(), deadline: DEADLINE };
    let mut shown = Vec::new();
    let report = Vm::new(settings()).run(&plan, &mut |line| shown.push(line.to_owned())).unwrap();
    (report, shown)
}

#[test]
fn tests_that_go_wrong_are_told_and_others_go_on() {
    if !can_run() {
        return;
    }
    let start = Instant::now();
    let (report, shown) = run(SCRIPT);
    let text = shown.join("\n");
    assert_eq!((report.passed, report.skipped), (3, 1), "{text}");
    assert_eq!(report.failed, ["it::fails", "it::hangs", "it::stuck", "it::panics"], "{text}");
    let line = |test: &str| {
        let start = format!("test it::{test} ... ");
        shown.iter().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("no {test} in:\n{text}"))
    };
    assert!(line("passes").starts_with("ok ("));
    assert!(line("fails").starts_with("FAILED: exit code 101"));
    assert!(line("hangs").starts_with("FAILED: stuck: not done after 8s"));
    assert!(line("skips").starts_with("skipped: no moon"));
    assert!(line("leaves").starts_with("ok ("), "what a test leaves running is killed");
    assert!(line("stuck").starts_with("FAILED: ok; it left stuck: D ") && line("stuck").contains("(touch)"));
    assert!(line("other").starts_with("ok ("), "a stuck task is told once");
    assert!(line("panics").starts_with("FAILED: the virtual machine ended"));
    for words in ["    this is fails with R3MAP_VM=1 in /some/where", "    the reason", "    last words"] {
        assert!(shown.iter().any(|line| line == words), "no {words:?} in:\n{text}");
    }
    assert!(!text.contains("this is passes"), "the output of what passed is not shown");
    assert!(text.contains("sysrq triggered crash"), "the console's end is shown:\n{text}");
    assert!(start.elapsed() < Duration::from_secs(300));
}

#[test]
fn a_binary_that_does_not_start_is_a_failure() {
    if !can_run() {
        return;
    }
    let (report, shown) = run("#!/no/such/interpreter\n");
    assert_eq!((report.passed, report.failed), (0, vec!["it".to_owned()]), "{shown:?}");
}
