//! What the documents tell people to type is what the command understands.

use std::path::{Path, PathBuf};

use crate::support::{MIB, SOON, Scene, Served, make_file};

/// The root of the sources.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A command line in a document.
#[derive(Debug)]
struct Line {
    document: PathBuf,
    words: Vec<String>,
}

/// Every line of a `sh` block of every document.
fn lines() -> Vec<Line> {
    let mut documents: Vec<PathBuf> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| Path::new(ROOT).join(name)).into();
    let mut folders = vec![Path::new(ROOT).join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if entry.path().extension().is_some_and(|extension| extension == "md") {
                documents.push(entry.path());
            }
        }
    }
    documents.iter().flat_map(|document| blocks(document)).collect()
}

fn blocks(document: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(document).unwrap_or_else(|error| panic!("{}: {error}", document.display()));
    let (mut inside, mut found, mut continued) = (false, Vec::new(), String::new());
    for line in text.lines() {
        if let Some(language) = line.trim_start().strip_prefix("```") {
            inside = !inside && language == "sh";
        } else if inside {
            continued.push_str(line.split(" #").next().unwrap_or_default().trim().trim_start_matches("$ "));
            if let Some(more) = continued.strip_suffix('\\') {
                continued = format!("{more} ");
                continue;
            }
            let words = words(&std::mem::take(&mut continued));
            if !words.is_empty() && !words[0].starts_with('#') {
                found.push(Line { document: document.to_owned(), words });
            }
        }
    }
    found
}

/// The words of a line as a shell has them: what is in single quotes is one.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (number, part) in line.split('\'').enumerate() {
        match number % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

/// The arguments of `r3map`, whichever way it is started.
fn arguments(line: &Line) -> Option<Vec<String>> {
    let words: Vec<_> = line.words.iter().map(String::as_str).filter(|word| !["sudo", "&"].contains(word)).collect();
    match words.as_slice() {
        ["r3map", rest @ ..] | ["cargo", "run", "--release", "--", rest @ ..] => {
            Some(rest.iter().map(|word| (*word).to_owned()).collect())
        }
        _ => None,
    }
}

/// Runs every `r3map` line of the documents on a stage of its own: real where that can be, and otherwise so that it
/// must fail for a reason other than its command line.
#[test]
fn every_line_of_the_documents_is_understood() {
    Scene::with_fuse(SOON, |scene| {
        make_file(&scene.path("disk.img"), MIB, 1);
        let server = scene.serve(&format!("file:{}", scene.name("disk.img")), &[]);
        let lines: Vec<_> = lines().into_iter().filter_map(|line| Some((arguments(&line)?, line))).collect();
        assert!(lines.iter().filter(|(_, line)| line.document.ends_with("README.md")).count() >= 5, "{lines:?}");
        for (number, (arguments, line)) in lines.iter().enumerate() {
            let seeder = arguments.contains(&"leech".to_owned()).then(|| seeder(scene, arguments));
            let uri = seeder.as_ref().map_or(&server.uri, |seeder| &seeder.uri);
            let arguments: Vec<_> = arguments.iter().map(|word| stage(scene, number, word, uri)).collect();
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            if let ["seed", "--cache", cache, ..] = arguments[..] {
                fill(scene, cache);
            }
            scene.step(format!("{line:?}"));
            let mut program = scene.r3map(&arguments);
            match arguments.iter().find(|word| !word.starts_with('-')).copied() {
                Some("mount" | "remove") if needs_a_module(&arguments) => {
                    let outcome = program.end(SOON);
                    assert!(
                        outcome.code == Some(1) && outcome.err.join("").contains("modprobe"),
                        "{line:?}: {outcome:?}"
                    );
                }
                Some("leech") => {
                    if arguments.contains(&"manual") {
                        program.wait_for_line(SOON, "Enter");
                        program.send("\n");
                    }
                    program.wait_for_line(SOON, "pulled");
                }
                Some("serve" | "mount" | "seed") => {
                    program.wait_for_line(SOON, "ready");
                    program.terminate();
                    let outcome = program.end(SOON);
                    assert_eq!(outcome.code, Some(0), "{line:?}: {outcome:?}");
                }
                // The demo has a test of its own, and takes its time; so has what needs an NBD server.
                Some("demo" | "nbd") => drop(program),
                _ => {
                    let outcome = program.end(SOON);
                    assert_eq!(outcome.code, Some(0), "{line:?}: {outcome:?}");
                }
            }
        }
    });
}

/// Something to leech: as many regions as that takes.
fn seeder(scene: &Scene, leech: &[String]) -> Served {
    let also = ["--also".to_owned(), "memory:?size=1MiB".to_owned(), scene.name("seeded-too")];
    let more = if leech.contains(&also[0]) { &also.each_ref().map(String::as_str)[..] } else { &[] };
    let seeded = scene.name("seeded");
    let all = [&["--json", "seed", "memory:?size=1MiB", &seeded, "--listen", "grpc://127.0.0.1:0"], more].concat();
    let mut program = scene.r3map(&all);
    let ready = program.wait_for_event(SOON, "ready");
    Served { uri: ready["uri"].as_str().expect("it tells its address").to_owned(), program }
}

/// Has a leech leave a cache file.
fn fill(scene: &Scene, cache: &str) {
    let seeder = seeder(scene, &[]);
    let mut leech = scene.r3map(&["leech", &seeder.uri, &scene.name("filled"), "--cache", cache]);
    leech.wait_for_line(SOON, "pulled");
    leech.terminate();
    leech.end_well(SOON);
}

/// Whether it is about a device of a kind that this kernel does not have.
fn needs_a_module(arguments: &[&str]) -> bool {
    let missing = |sign| !Path::new(sign).exists();
    let asks = |kind| arguments.contains(&"--as") && arguments.contains(&kind);
    let ublk = asks("ublk") || arguments.contains(&"remove");
    (asks("nbd") && missing("/sys/module/nbd")) || (ublk && missing("/dev/ublk-control"))
}

/// What a word of a document is on the stage. Files with a whole path are there; others are to be made.
fn stage(scene: &Scene, number: usize, word: &str, server: &str) -> String {
    if let Some(path) = word.strip_prefix("file:") {
        let name = format!("file{number}");
        if path.starts_with('/') {
            make_file(&scene.path(&name), MIB, 1);
        }
        return format!("file:{}", scene.name(&name));
    }
    match word {
        "grpc://0.0.0.0:1337" | "grpc://127.0.0.1:1337" => "grpc://127.0.0.1:0".to_owned(),
        "nbd://0.0.0.0:10809/disk" => "nbd://127.0.0.1:0/disk".to_owned(),
        "grpc://host:1337" => server.to_owned(),
        "grpc+unix:///run/r3map.sock" => format!("grpc+unix://{}", scene.name(&format!("socket{number}"))),
        "./region" => scene.name(&format!("region{number}")),
        "./disks" => scene.name(&format!("disks{number}")),
        _ if word.starts_with("/var/cache/") || word.starts_with("/var/lib/") => scene.name(&format!("cache{number}")),
        _ if word.starts_with("directory:/") => format!("directory:{}", scene.name(&format!("chunks{number}"))),
        _ if word.starts_with("systemctl ") => "true".to_owned(),
        _ if word.starts_with("/usr/") || word.starts_with("./man") => scene.name("."),
        _ => word.to_owned(),
    }
}

/// Whoever clones this needs two commands, and both are there to be copied.
#[test]
fn the_readme_shows_the_two_commands() {
    let readme = std::fs::read_to_string(Path::new(ROOT).join("README.md")).expect("there is a README");
    for command in ["cargo run --release -- demo", "cargo xtask test"] {
        assert!(readme.lines().any(|line| line == command), "the README shows {command:?}");
    }
}

/// Every test that `docs/semantics.md` names exists where it says.
#[test]
fn every_promise_names_a_test_that_exists() {
    let text = std::fs::read_to_string(Path::new(ROOT).join("docs/semantics.md")).expect("there is docs/semantics.md");
    let mut seen = 0;
    for reference in text.split('`').filter(|word| word.contains(".rs::")) {
        let (file, test) = reference.split_once("::").expect("it has both parts");
        let source =
            std::fs::read_to_string(Path::new(ROOT).join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let name = test.rsplit("::").next().expect("there is one");
        assert!(source.contains(&format!("fn {name}(")), "{file} has no test {name}");
        seen += 1;
    }
    assert!(seen > 50, "docs/semantics.md names only {seen} tests");
}
