//! The program gives the same result whether it was moved in the middle of its work or not.

use std::process::Command;
use std::time::Duration;

use r3map_testkit::process::Process;

const LIMIT: Duration = Duration::from_secs(120);
/// Which everybody can look up.
const RESULT: &str = "664579 primes up to ten million, after ";

fn wasm(arguments: &[&str]) -> Process {
    Process::start(Command::new(env!("CARGO_BIN_EXE_wasm")).args(arguments))
}

/// The number before "pieces of work" in a line.
fn work(line: &str) -> u64 {
    let before = line.split(" pieces of work").next().unwrap();
    before.rsplit(' ').next().unwrap().parse().unwrap_or_else(|error| panic!("{error}: {line}"))
}

#[test]
fn the_result_is_the_same_whether_it_was_moved_or_not() {
    let mut alone = wasm(&["run"]);
    let result = alone.wait_for_line(LIMIT, " primes");
    assert!(result.starts_with(RESULT), "{result}");
    assert!(alone.wait(LIMIT).success());

    // At this pace it would take minutes.
    let mut first = wasm(&["run", "--listen", "grpc://127.0.0.1:0", "--rest", "1s"]);
    let line = first.wait_for_line(LIMIT, "to be taken from ");
    let mut second = wasm(&["take", line.trim_start_matches("to be taken from ")]);
    let left = work(&first.wait_for_line(LIMIT, "moved away after "));
    let came = work(&second.wait_for_line(LIMIT, "moved here after "));
    let moved = second.wait_for_line(LIMIT, " primes");
    assert_eq!(moved, result, "and as much work was done, none of it twice");
    assert_eq!(left, came);
    assert!(0 < came && came < work(&result), "in the middle: {came}");
    assert!(first.wait(LIMIT).success() && second.wait(LIMIT).success());
}
