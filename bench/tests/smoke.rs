//! The benchmark runs: every section, with tiny samples, and every figure is in the report. What the figures are does
//! not matter here; performance is never a matter of tests.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use r3map_testkit::process::Process;
use r3map_testkit::skip;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(300);

fn bench(arguments: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_r3map-bench"));
    let mut process = Process::start(command.args(arguments));
    process.close_stdin();
    process
}

fn lines(process: &mut Process) -> Vec<Value> {
    let parse = |line: &String| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    process.stdout().iter().map(parse).collect()
}

fn figures() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut add =
        |section: &str, name: &str| assert!(names.insert(format!("{section}: {name}")), "{name} is twice here");
    for name in [
        "background install",
        "demand fault, 4 KiB, one processor",
        "demand fault, 4 KiB, two processors",
        "sequential read after pull",
        "tracking a write, per page",
        "a flush with nothing written",
        "a scan that finds 1000 pages a GiB",
    ] {
        add("slice", name);
    }
    for name in [
        "buffered sequential read",
        "direct random read of 4 KiB",
        "direct sequential read, 1 MiB",
        "sequential write, 1 MiB",
    ] {
        add("file", name);
        add("file", &format!("{name}: large buffer"));
    }
    for length in ["64 KiB", "1 MiB", "4 MiB"] {
        for in_flight in [1, 8, 64] {
            add("grpc", &format!("read {length} × {in_flight}"));
        }
    }
    for side in ["client", "server"] {
        for place in ["program", "kernel"] {
            add("grpc", &format!("1 MiB × 8: {side}, in the {place}"));
        }
    }
    add("grpc", "a checksum (CRC-32C)");
    add("grpc", "a copy, 1 MiB at a time");
    for connections in ["4 connections", "1 connection"] {
        add("nbd", &format!("client: read, {connections}"));
    }
    for peer in ["nbdkit", "qemu-nbd"] {
        for what in [
            "nbdcopy to null:",
            "fio random read of 4 KiB, depth 1, one processor",
            "fio random read of 4 KiB, depth 1, two processors",
            "fio random read of 4 KiB, depth 32",
            "fio sequential read of 1 MiB, depth 8",
        ] {
            add("nbd", &format!("server: {what}, to {peer}"));
        }
    }
    for shown in ["slice", "file"] {
        for mode in ["managed", "direct"] {
            for rtt in [0, 1, 5, 10, 20, 40] {
                for metric in ["first byte", "first chunk", "read", "write", "write and flush"] {
                    add("rtt", &format!("{mode} {shown}, {rtt} ms: {metric}"));
                }
            }
        }
        for what in ["time", "memory"] {
            add("open", &format!("1 TiB as {shown}: {what}"));
        }
        for rtt in [0, 5, 20, 40] {
            for what in ["downtime", "total"] {
                add("migrate", &format!("{shown}, {rtt} ms: {what}"));
            }
            for what in ["downtime", "records", "total"] {
                add("migrate", &format!("busy {shown}, {rtt} ms: {what}"));
            }
        }
        add("migrate", &format!("{shown}, 0 ms: downtime, by size"));
    }
    add("migrate", "slice: writing while tracked");
    names
}

/// What is aimed at with the main job, each with its figure.
fn targets() -> BTreeSet<String> {
    let mut targets = BTreeSet::new();
    let mut add = |figure: &str, least_or_most: &str, value: f64| {
        assert!(targets.insert(format!("{figure} {least_or_most} {value}")), "{figure} is twice here");
    };
    let (least, most) = ("ratio_at_least", "ratio_at_most");
    add("slice: background install", least, 0.8);
    add("slice: sequential read after pull", least, 0.95);
    for place in ["one processor", "two processors"] {
        add(&format!("slice: demand fault, 4 KiB, {place}"), most, 1.3);
    }
    for limit in ["", ": large buffer"] {
        for name in ["buffered sequential read", "direct sequential read, 1 MiB", "sequential write, 1 MiB"] {
            add(&format!("file: {name}{limit}"), least, 0.8);
        }
        // A time, of which 0.8 of the speed is 1.25.
        add(&format!("file: direct random read of 4 KiB{limit}"), most, 1.25);
    }
    add("grpc: read 1 MiB × 8", least, 0.5);
    for shown in ["slice", "file"] {
        add(&format!("rtt: managed {shown}, 40 ms: read"), least, 0.7);
        add(&format!("rtt: managed {shown}, 40 ms: write"), least, 0.9);
        for mode in ["managed", "direct"] {
            add(&format!("rtt: {mode} {shown}, 40 ms: first chunk"), most, 1.2);
        }
        add(&format!("open: 1 TiB as {shown}: time"), "at_most", 100.0);
        add(&format!("open: 1 TiB as {shown}: memory"), "at_most", 100.0);
    }
    targets
}

/// The target of a figure, if it has one.
fn target(figure: &Value) -> Option<String> {
    let (kind, value) = figure["target"].as_object()?.iter().next()?;
    let (section, name) = (figure["section"].as_str()?, figure["name"].as_str()?);
    Some(format!("{section}: {name} {kind} {}", value.as_f64()?))
}

#[test]
fn every_figure_is_measured() {
    if !Path::new("/dev/fuse").exists() {
        return skip("no /dev/fuse, on which the file frontend stands");
    }
    let mut process = bench(&["all", "--quick", "--json"]);
    let status = process.wait(LIMIT);
    let lines = lines(&mut process);
    let errors: Vec<_> = lines.iter().filter(|line| line["kind"] == "failure").collect();
    assert!(errors.is_empty() && status.success(), "{status}: {errors:#?}");
    assert_eq!(lines[0]["kind"], "run");
    assert!(lines[0]["machine"]["cores"].as_u64() > Some(0) && lines[0]["settings"]["runs"] == 1, "{}", lines[0]);
    assert_eq!(lines[lines.len() - 1]["kind"], "summary");
    let measured: BTreeSet<String> = lines[1..lines.len() - 1].iter().map(check).collect();
    assert_eq!(measured, figures());
    let main_job = |line: &&Value| ["slice", "file", "grpc", "rtt", "open"].map(Value::from).contains(&line["section"]);
    let aimed_at: BTreeSet<String> = lines.iter().filter(main_job).filter_map(target).collect();
    assert_eq!(aimed_at, targets());
}

/// The name of a figure, if it is complete.
fn check(figure: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("incomplete: {figure}")).to_owned();
    assert_eq!(figure["kind"], "figure", "{figure}");
    let side = |side: &Value| {
        let [median, min, max] = ["median", "min", "max"].map(|what| side[what].as_f64());
        assert!(min.is_some() && min <= median && median <= max, "{figure}");
        assert_eq!(side["runs"].as_array().map(Vec::len), Some(1), "{figure}");
    };
    side(&figure["ours"]);
    if !figure["limit"].is_null() {
        side(&figure["limit"]);
        assert!(!text(&figure["limit_is"]).is_empty());
    }
    if !figure["target"].is_null() {
        assert!(figure["met"].is_boolean(), "{figure}");
    }
    assert!(!text(&figure["unit"]).is_empty());
    format!("{}: {}", text(&figure["section"]), text(&figure["name"]))
}

#[test]
fn one_section_alone_is_a_table() {
    let mut process = bench(&["slice", "--quick", "--size", "1MiB"]);
    assert!(process.wait(LIMIT).success());
    let text = process.stdout().join("\n");
    for words in ["cores", "seed 1", "background install", "limit: a bare UFFDIO_COPY loop", "≥ 0.8", "targets: "] {
        assert!(text.contains(words), "{words:?} is missing in\n{text}");
    }
    assert!(!text.contains("grpc"), "{text}");
}

#[test]
fn nonsense_is_refused_in_one_line_of_its_own() {
    for arguments in [&["tape"][..], &["--size", "1"], &["--runs", "0"], &["--peer", "{}"]] {
        let mut process = bench(arguments);
        assert!(!process.wait(LIMIT).success(), "{arguments:?}");
        let errors = process.stderr();
        assert!(errors.first().is_some_and(|line| line.starts_with("error: ")), "{arguments:?}: {errors:?}");
        assert!(process.stdout().is_empty(), "{arguments:?}");
    }
}
