//! Who may depend on whom. `ARCHITECTURE.md` says why; this test makes it so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// A crate's place in the house: the folder that holds it.
fn place(metadata: &Metadata, package: &Package) -> String {
    let root = metadata.workspace_root.as_std_path();
    let folder = package.manifest_path.parent().expect("a manifest has a folder").as_std_path();
    folder.strip_prefix(root).expect("members are inside").to_string_lossy().into_owned()
}

/// The places that a crate at `place` may use. A trailing slash means every member of that family.
fn allowed(place: &str) -> &'static [&'static str] {
    match place {
        "crates/core" | "crates/sys" | "testing/vm" => &[],
        "xtask" => &["testing/vm"],
        "crates/pipeline" | "testing/testkit" => &["crates/core"],
        "crates/migrate" => &["crates/core", "crates/pipeline"],
        "crates/r3map" => {
            &["crates/core", "crates/pipeline", "crates/migrate", "backends/", "transports/", "frontends/"]
        }
        "backends/local" | "backends/tape" => &["crates/core", "crates/pipeline", "crates/sys"],
        "frontends/block" => &["crates/core", "crates/pipeline", "crates/sys", "transports/nbd"],
        "bench" => &["crates/", "backends/", "transports/", "frontends/", "testing/"],
        _ => match place.split('/').next() {
            Some("backends") => &["crates/core", "crates/pipeline"],
            Some("transports") => &["crates/core", "crates/pipeline", "crates/sys"],
            Some("frontends") => &["crates/core", "crates/pipeline", "crates/sys"],
            Some("apps") => &["crates/r3map", "testing/testkit"],
            Some("examples") => &["crates/r3map"],
            Some("testing") => &["crates/core"],
            _ => panic!("{place} has no place in the house; say in this test what it may use"),
        },
    }
}

fn may_use(place: &str, other: &str) -> bool {
    allowed(place).iter().any(|rule| if rule.ends_with('/') { other.starts_with(rule) } else { other == *rule })
}

fn metadata() -> Metadata {
    MetadataCommand::new().exec().expect("cargo metadata runs")
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let metadata = metadata();
    let places: BTreeMap<&str, String> =
        metadata.workspace_packages().iter().map(|p| (p.name.as_str(), place(&metadata, p))).collect();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for package in metadata.workspace_packages() {
        let own = &places[package.name.as_str()];
        for dependency in package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal) {
            let Some(other) = places.get(dependency.name.as_str()) else { continue };
            seen += 1;
            if !may_use(own, other) {
                wrong.push(format!("{own} may not use {other}"));
            }
        }
    }
    assert!(seen > 10, "the workspace's own dependencies were not found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tests_use_a_sibling_only_as_a_peer() {
    // A test may bring in testkit and, as something to stand on, the local backends; nothing else from its own family.
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        let own = place(&metadata, package);
        let family = own.split('/').next().unwrap_or_default();
        let kinds = package.dependencies.iter().filter(|d| d.kind == DependencyKind::Development);
        for dependency in kinds {
            let Some(other) = metadata.workspace_packages().into_iter().find(|p| *p.name == dependency.name) else {
                continue;
            };
            let other = place(&metadata, other);
            let fine = other == "testing/testkit" || other == "backends/local" || !other.starts_with(family);
            assert!(fine || own == "crates/r3map", "the tests of {own} may not use {other}");
        }
    }
}

#[test]
fn unsafe_code_is_behind_one_fence() {
    let metadata = metadata();
    let mut open = BTreeSet::new();
    for package in metadata.workspace_packages() {
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("a manifest can be read");
        if !manifest.contains("[lints]\nworkspace = true") && !manifest.contains("unsafe_code = \"forbid\"") {
            open.insert(place(&metadata, package));
        }
    }
    let fence = ["crates/sys", "examples/wasm"].map(str::to_owned);
    assert_eq!(open, BTreeSet::from(fence), "these do not forbid unsafe code");
    let root = std::fs::read_to_string(metadata.workspace_root.join("Cargo.toml")).expect("the root manifest");
    assert!(root.contains("unsafe_code = \"forbid\""));
    assert!(Path::new(metadata.workspace_root.as_str()).join("crates/sys/src").is_dir());
}

#[test]
fn the_example_that_cannot_do_without_unsafe_code_has_it_in_one_file() {
    let root = metadata().workspace_root.join("examples/wasm");
    let read = |path: &Path| std::fs::read_to_string(path).expect("a file can be read");
    let manifest = read(root.join("Cargo.toml").as_std_path());
    // Denied, so that each place has to say that it is one.
    assert!(manifest.contains("unsafe_code = \"deny\"") && manifest.contains("undocumented_unsafe_blocks = \"warn\""));
    let mut seen = 0;
    for folder in ["src", "tests"] {
        for file in std::fs::read_dir(root.join(folder)).expect("a folder can be read") {
            let path = file.expect("a folder can be read").path();
            let says_so = read(&path).lines().any(|line| line.contains("unsafe_code"));
            assert_eq!(says_so, path.ends_with("src/memory.rs"), "{} and unsafe code", path.display());
            seen += 1;
        }
    }
    assert!(seen > 3, "the example was not found");
}
