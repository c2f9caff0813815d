//! The commands that end by themselves: copy, info, demo, completions, man.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::time::Duration;

use r3map::{ErrorKind, Operation};
use r3map_testkit::faults::Rule;
use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;

use crate::support::{Lent, MIB, SOON, Scene, make_file};

const LONG: Duration = Duration::from_secs(180);
const SIZE: u64 = 48 * MIB + 1;

#[test]
fn copy_to_and_fro() {
    Scene::play(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 1);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&format!("file:{}", scene.name("there")), &["--create", "--size", &SIZE.to_string()]);
        let back = format!("file:{}", scene.name("back"));
        for (from, to) in [(&source, &server.uri), (&server.uri, &back)] {
            let outcome = scene.r3map(&["--json", "copy", from, to]).end_well(LONG);
            let copied = outcome.event("copied");
            assert_eq!((&copied["size"], &copied["written"]), (&SIZE.into(), &SIZE.into()), "{copied}");
        }
        expected.check_file(&scene.path("there"));
        expected.check_file(&scene.path("back"));
        // Over what is there already, nothing is written.
        let outcome = scene.r3map(&["--json", "copy", "--skip-same", &source, &server.uri]).end_well(LONG);
        let copied = outcome.event("copied");
        assert_eq!((&copied["same"], &copied["written"]), (&SIZE.into(), &0.into()), "{copied}");
    });
}

#[test]
fn copy_goes_on_where_it_was_killed() {
    Scene::play(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 2);
        let source = format!("file:{}", scene.name("source"));
        let server = scene.serve(&format!("file:{}", scene.name("there")), &["--create", "--size", &SIZE.to_string()]);
        let proxy = DelayProxy::tcp(server.address(), Duration::from_millis(50)).expect("it can listen");
        let to = format!("grpc://{}", proxy.socket_addr());
        let mut killed = scene.r3map(&["--json", "copy", "--in-flight", "1", &source, &to]);
        // A good part of it is there, and a good part is not.
        let there = std::fs::File::open(scene.path("there")).expect("it is there");
        let mut piece = vec![0; 4096];
        crate::support::wait_until(SOON, "it is under way", || {
            there.read_exact_at(&mut piece, 8 * MIB).expect("it can be read");
            expected.check(8 * MIB, &piece).is_ok()
        });
        killed.kill();
        let outcome = scene.r3map(&["--json", "copy", "--skip-same", &source, &to]).end_well(LONG);
        let copied = outcome.event("copied");
        let (same, written) = (copied["same"].as_u64(), copied["written"].as_u64());
        assert!(same >= Some(4 * MIB) && written >= Some(4 * MIB), "{copied}");
        expected.check_file(&scene.path("there"));

        // Ctrl-C says how to go on.
        let there = OpenOptions::new().read(true).write(true).open(scene.path("there")).expect("it is there");
        there.write_all_at(&[0; 4096], 0).expect("it can be written");
        let stopped = scene.r3map(&["copy", "--in-flight", "1", &source, &to]);
        crate::support::wait_until(SOON, "it is under way", || {
            there.read_exact_at(&mut piece, 0).expect("it can be read");
            expected.check(0, &piece).is_ok()
        });
        stopped.interrupt();
        let outcome = stopped.end(SOON);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.err.last().is_some_and(|line| line.contains("--skip-same")), "{outcome:?}");
    });
}

/// What went wrong, and in the same line how to go on.
#[test]
fn copy_goes_on_when_there_is_room_again() {
    Scene::with_root(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 2);
        let disk = scene.tmpfs("disk", 8 * MIB);
        let (source, there) = (format!("file:{}", scene.name("source")), format!("file:{}", scene.name("disk/there")));
        let outcome = scene.ended(&["copy", &source, &there]);
        // Before it there may be lines of progress.
        let error = outcome.err.last().expect("it says why");
        assert!(outcome.code == Some(1) && error.starts_with("error: "), "{outcome:?}");
        for words in ["No space left", "--skip-same"] {
            assert!(error.contains(words), "{outcome:?}");
        }
        scene.run(SOON, "mount", &["-o", "remount,size=64M", &scene.name("disk")]);
        let copied = scene.r3map(&["--json", "copy", "--skip-same", &source, &there]).end_well(LONG).event("copied");
        assert!(copied["same"].as_u64() >= Some(MIB) && copied["written"].as_u64() >= Some(MIB), "{copied}");
        expected.check_file(&disk.join("there"));
    });
}

/// It can be read all the same, so that what is to be written again would count as the same.
#[test]
fn a_copy_that_cannot_be_made_durable_is_made_again() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("source"), MIB, 2);
        let source = format!("file:{}", scene.name("source"));
        let lent = Lent::new("memory:?size=1MiB");
        lent.faults.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Internal));
        let outcome = scene.ended(&["copy", &source, &lent.uri]);
        let error = outcome.err.last().expect("it says why");
        assert!(outcome.code == Some(1) && error.contains("without --skip-same"), "{outcome:?}");
        scene.r3map(&["copy", &source, &lent.uri]).end_well(SOON);
    });
}

#[test]
fn copy_keeps_holes() {
    Scene::play(LONG, |scene| {
        let source = std::fs::File::create(scene.path("source")).expect("there is room");
        source.set_len(SIZE).expect("it can be long");
        let islands = [(0, 5000), (17 * MIB + 1, 70_000), (SIZE - 3, 3)];
        for (offset, len) in islands {
            source.write_all_at(&fill::bytes(offset, len, 3), offset).expect("there is room");
        }
        let local = format!("file:{}", scene.name("source"));
        scene.run(SOON, "cp", &["--sparse=always", &scene.name("source"), &scene.name("served")]);
        let server = scene.serve(&format!("file:{}", scene.name("served")), &[]);
        let chunks = format!("directory:{}", scene.name("chunks"));
        let there = scene.serve(&format!("file:{}", scene.name("there")), &["--create", "--size", &SIZE.to_string()]);
        let (one, two, three) = (
            format!("file:{}", scene.name("one")),
            format!("file:{}", scene.name("two")),
            format!("file:{}", scene.name("three")),
        );
        for (from, to) in
            [(&local, &one), (&server.uri, &two), (&local, &chunks), (&chunks, &three), (&local, &there.uri)]
        {
            let outcome = scene.r3map(&["--json", "copy", from, to]).end_well(LONG);
            let copied = outcome.event("copied");
            assert!(copied["written"].as_u64() < Some(MIB), "{from} to {to}: {copied}");
            assert!(copied["zeroes"].as_u64() > Some(SIZE - MIB), "{from} to {to}: {copied}");
        }
        for name in ["one", "two", "three", "there"] {
            scene.run(SOON, "cmp", &[&scene.name("source"), &scene.name(name)]);
            let stored = std::fs::metadata(scene.path(name)).expect("it is there").blocks() * 512;
            assert!(stored < 2 * MIB, "{name} takes {stored} bytes on disk");
        }
        let info = scene.ended(&["--json", "info", &local]).event("info");
        assert!(info["data"].as_u64() < Some(MIB), "{info}");
    });
}

/// Zeros at the source replace what the destination had.
#[test]
fn copy_over_something_else() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("there"), MIB, 4);
        let source = std::fs::File::create(scene.path("source")).expect("there is room");
        source.set_len(MIB).expect("it can be long");
        source.write_all_at(b"hello", 5000).expect("there is room");
        let (from, to) = (format!("file:{}", scene.name("source")), format!("file:{}", scene.name("there")));
        for arguments in [["copy", &from, &to].as_slice(), &["copy", "--skip-same", &from, &to]] {
            scene.r3map(arguments).end_well(SOON);
            scene.run(SOON, "cmp", &[&scene.name("source"), &scene.name("there")]);
        }
    });
}

#[test]
fn info_says_what_a_region_is() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 5);
        let local = format!("file:{}", scene.name("source"));
        let server = scene.serve(&local, &["--chunk-size", "1MiB"]);
        let info = scene.ended(&["--json", "info", &server.uri]).event("info");
        assert_eq!(info["size"], SIZE);
        assert_eq!(info["chunk_size"], MIB);
        assert_eq!(info["read_only"], false);
        assert_eq!(info["region"], server.uri.as_str());
        let abilities = info["abilities"].as_array().expect("a list");
        assert!(abilities.iter().any(|ability| ability == "write"), "{info}");
        let outcome = scene.ended(&["info", &server.uri]);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.text().contains(&format!("({SIZE} bytes)")), "{outcome:?}");
        server.stop();
        let closed = scene.serve(&local, &["--read-only"]);
        let info = scene.ended(&["--json", "info", &closed.uri]).event("info");
        assert_eq!(info["read_only"], true, "{info}");
    });
}

/// Of files and directories too it says what they are able to, though it opens them to be read; whoever uses them.
#[test]
fn info_changes_nothing_and_keeps_nobody_out() {
    Scene::play(LONG, |scene| {
        make_file(&scene.path("source"), MIB, 6);
        let file = format!("file:{}", scene.name("source"));
        let directory = format!("directory:{}", scene.name("chunks"));
        scene.r3map(&["copy", "--chunk-size", "64KiB", &file, &directory]).end_well(SOON);
        let look = |uri: &str| scene.ended(&["--json", "info", "--map", uri]).event("info");
        let all = serde_json::json!(["write", "trim", "write-zeroes", "extents"]);
        for (uri, chunk) in [(&file, None), (&directory, Some(64 << 10))] {
            let before = entries(&scene.path("."));
            for _ in 0..2 {
                let info = look(uri);
                assert_eq!((&info["size"], &info["read_only"], &info["abilities"]), (&MIB.into(), &false.into(), &all));
                assert_eq!((&info["data"], info["chunk_size"].as_u64()), (&MIB.into(), chunk), "{info}");
            }
            assert_eq!(entries(&scene.path(".")), before, "{uri}");
            let server = scene.serve(uri, &[]);
            assert_eq!(look(uri)["abilities"], all, "while it is served");
            server.stop();
        }
        for nothing in [format!("file:{}", scene.name("new")), format!("directory:{}", scene.name("new"))] {
            let outcome = scene.ended(&["info", "--size", "1MiB", &nothing]);
            assert!(outcome.code == Some(1) && !scene.path("new").exists(), "{outcome:?}");
        }
        for elsewhere in ["memory:?size=1MiB", "null:?size=1MiB"] {
            assert_eq!(look(elsewhere)["read_only"], false);
        }
        let text = scene.ended(&["info", &file]).text();
        assert!(text.contains("can          read, write, trim, write-zeroes, extents"), "{text}");
    });
}

/// What lies in a directory, however deep, with its size and when it was written last.
fn entries(path: &std::path::Path) -> Vec<(std::path::PathBuf, u64, std::time::SystemTime)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).expect("it is a directory") {
        let path = entry.expect("it can be listed").path();
        let metadata = std::fs::metadata(&path).expect("it is there");
        found.push((path.clone(), metadata.len(), metadata.modified().expect("it has one")));
        if metadata.is_dir() {
            found.extend(entries(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn the_demo_leaves_nothing_behind() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("file"), 8 * MIB + 1, 6);
        std::fs::create_dir(scene.path("tmp")).expect("it is not there");
        let demo = |arguments: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_r3map"));
            command.args(arguments).env("TMPDIR", scene.path("tmp"));
            let mut process = scene.start(&mut command);
            let status = process.wait(LONG);
            assert!(status.success(), "{}\n{}", process.stdout().join("\n"), process.stderr().join("\n"));
            process
        };
        let mut process = demo(&["demo", "--json", "--rtt", "2ms", "--file", &scene.name("file")]);
        let out = process.stdout();
        assert!(out.len() > 3, "{out:?}");
        out.iter().for_each(|line| drop(crate::support::event(line)));
        expected.check_file(&scene.path("file"));
        assert_eq!(std::fs::read_dir(scene.path("tmp")).expect("it is there").count(), 0, "nothing in TMPDIR");
        assert_eq!(processes_in_group(process.id()), 0, "no process lives on");

        let mut process = demo(&["demo", "--rtt", "1ms", "--file", &scene.name("file")]);
        let out = process.stdout().join("\n");
        assert!(out.contains("managed") && out.contains("direct"), "{out}");
    });
}

/// As in the README: the file is made for it, and every way to map it has its figures.
#[test]
fn the_demo_needs_no_file() {
    Scene::with_fuse(LONG, |scene| {
        std::fs::create_dir(scene.path("tmp")).expect("it is not there");
        let mut command = Command::new(env!("CARGO_BIN_EXE_r3map"));
        command.args(["--json", "demo"]).env("TMPDIR", scene.path("tmp"));
        let mut process = scene.start(&mut command);
        let status = process.wait(LONG);
        assert!(status.success(), "{}", process.stderr().join("\n"));
        let events: Vec<_> = process.stdout().iter().map(|line| crate::support::event(line)).collect();
        let figures: Vec<_> = events.iter().filter(|event| event["first_byte_seconds"].is_number()).collect();
        assert_eq!(figures.len(), 4, "{events:?}");
        for figure in figures {
            let seconds = |what: &str| figure[what].as_f64().unwrap_or_else(|| panic!("{what} in {figure}"));
            // The default round trip; memory that has been pulled is faster than that, but not faster than light.
            assert!(seconds("first_byte_seconds") >= 0.02, "{figure}");
            let rate = figure["read_bytes"].as_f64().expect("bytes") / seconds("read_seconds");
            assert!(rate < 1e12, "{rate} bytes a second were not read: {figure}");
        }
        let checked = events.iter().any(|event| event["event"] == "checked");
        assert!(checked, "{events:?}");
        assert_eq!(std::fs::read_dir(scene.path("tmp")).expect("it is there").count(), 0, "nothing in TMPDIR");
    });
}

/// How many processes that live are in a process group: the fifth field of their `stat`, behind a name in brackets.
pub(crate) fn processes_in_group(group: u32) -> usize {
    let stats = std::fs::read_dir("/proc").expect("there is a /proc").flatten().map(|entry| entry.path().join("stat"));
    let groups = stats.filter_map(|stat| {
        let stat = std::fs::read_to_string(stat).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let state = fields.next()?;
        fields.nth(1)?.parse::<u32>().ok().filter(|_| state != "Z")
    });
    groups.filter(|other| *other == group).count()
}

#[test]
fn the_demo_cleans_up_when_it_is_interrupted() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("file"), 32 * MIB, 7);
        std::fs::create_dir(scene.path("tmp")).expect("it is not there");
        for kill in [false, true] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_r3map"));
            command.args(["demo", "--rtt", "100ms", "--file", &scene.name("file")]).env("TMPDIR", scene.path("tmp"));
            let mut process = scene.start(&mut command);
            process.wait_for_line(SOON, "slice direct");
            if kill {
                process.kill();
            } else {
                process.interrupt();
                let status = process.wait(SOON);
                assert!(!status.success(), "it was interrupted: {}", process.stdout().join("\n"));
                assert_eq!(std::fs::read_dir(scene.path("tmp")).expect("it is there").count(), 0, "nothing in TMPDIR");
            }
            let own = process.id();
            crate::support::wait_until(SOON, "its server ends with it", || processes_in_group(own) == 0);
            // Killed in the very moment in which it mounts, it leaves a folder; but never a file.
            let left = std::fs::read_dir(scene.path("tmp")).expect("it is there").flatten();
            assert_eq!(left.filter(|entry| entry.path().is_file()).count(), 0, "no file in TMPDIR");
        }
    });
}

#[test]
fn completions_for_every_shell() {
    Scene::play(LONG, |scene| {
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let outcome = scene.ended(&["completions", shell]);
            assert_eq!(outcome.code, Some(0), "{outcome:?}");
            assert!(outcome.text().contains("pull-order"), "{shell} knows the options");
            if shell == "bash" {
                std::fs::write(scene.path("r3map.bash"), outcome.out.join("\n")).expect("there is room");
                scene.run(SOON, "bash", &["-n", &scene.name("r3map.bash")]);
            }
        }
    });
}

/// What a command is there to say and cannot write is an error, and no panic; whoever reads no further has had enough.
#[test]
fn a_full_standard_output_is_an_error_and_a_closed_one_is_not() {
    Scene::play(LONG, |scene| {
        for (line, code) in [
            ("completions bash > /dev/full", 1),
            ("info null:?size=1MiB > /dev/full", 1),
            ("--json info null:?size=1MiB > /dev/full", 1),
            ("completions bash | head -n 1 > /dev/null", 0),
        ] {
            let line = format!("{} {line}", env!("CARGO_BIN_EXE_r3map"));
            let mut shell = scene.start(Command::new("bash").args(["-o", "pipefail", "-c", &line]));
            let (status, said) = (shell.wait(SOON), shell.stderr());
            assert_eq!(status.code(), Some(code), "{line}: {said:?}");
            // With --json its errors would be there too.
            assert_eq!(said.len(), usize::from(code == 1 && !line.contains("--json")), "{line}: {said:?}");
            assert!(said.iter().all(|line| line.starts_with("error: cannot write to standard output")), "{said:?}");
        }
    });
}

#[test]
fn man_pages_for_every_command() {
    Scene::play(LONG, |scene| {
        std::fs::create_dir(scene.path("man")).expect("it is not there");
        scene.r3map(&["man", &scene.name("man")]).end_well(SOON);
        for command in ["", "-serve", "-mount", "-info", "-copy", "-demo", "-completions", "-man"] {
            let page = std::fs::read_to_string(scene.path(&format!("man/r3map{command}.1"))).expect("there is a page");
            assert!(page.contains(".TH ") && page.contains("SYNOPSIS"), "{command}");
        }
    });
}
