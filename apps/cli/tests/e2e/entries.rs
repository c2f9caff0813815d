//! `--entry`: the region as a file in a directory of its own.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{Expected, MIB, Mounted, SOON, Scene, Served, make_file};

const LONG: Duration = Duration::from_secs(120);
const NAME: &str = "disk one.img";

/// A served file, and what it holds.
fn served(scene: &Scene) -> (Expected, Served) {
    let expected = make_file(&scene.path("source"), 3 * MIB + 1, 1);
    (expected, scene.serve(&format!("file:{}", scene.name("source")), &[]))
}

/// A mount on the directory `folder`, and the file that it says it shows.
fn mount(scene: &Scene, server: &Served, options: &[&str]) -> (Mounted, PathBuf) {
    let mut mounted = scene.mounting(&server.uri, "folder", &[&["--entry", NAME], options].concat());
    let ready = mounted.program.wait_for_event(SOON, "ready");
    let file = PathBuf::from(ready["path"].as_str().expect("it says where"));
    assert_eq!(file.file_name(), Some(NAME.as_ref()));
    assert_eq!(names(&mounted.path), [NAME]);
    (mounted, file)
}

fn names(directory: &Path) -> Vec<OsString> {
    let entries = std::fs::read_dir(directory).expect("it can be listed");
    entries.map(|entry| entry.expect("it can be listed").file_name()).collect()
}

#[test]
fn the_region_is_a_file_in_a_directory() {
    Scene::with_fuse(LONG, |scene| {
        let (mut expected, server) = served(scene);
        for mode in ["managed", "direct"] {
            // Made and removed again the first time, and somebody's own that stays the second time.
            if mode == "direct" {
                std::fs::create_dir(scene.path("folder")).expect("it is gone");
            }
            let (mounted, path) = mount(scene, &server, &["--mode", mode]);
            expected.check_file(&path);
            let file = File::options().write(true).open(&path).expect("it can be written");
            let bytes = expected.write(MIB - 7..2 * MIB, 2);
            file.write_all_at(&bytes, MIB - 7).expect("it can be written");
            file.sync_all().expect("it can be synced");
            expected.keep();
            expected.check_file(&scene.path("source"));
            drop(file);
            mounted.unmount();
        }
        assert!(names(&scene.path("folder")).is_empty(), "the directory is as it was");
    });
}

#[test]
fn the_directory_takes_nothing_else() {
    Scene::with_fuse(LONG, |scene| {
        let (expected, server) = served(scene);
        let (mounted, path) = mount(scene, &server, &[]);
        let other = mounted.path.join("other");
        for refused in [
            File::create(&other).map(drop),
            std::fs::create_dir(&other),
            std::fs::rename(&path, &other),
            std::fs::remove_file(&path),
            std::os::unix::fs::symlink("elsewhere", &other),
        ] {
            assert_eq!(refused.expect_err("it has one entry").kind(), ErrorKind::PermissionDenied);
        }
        assert_eq!(File::open(&other).expect_err("there is no other").kind(), ErrorKind::NotFound);
        expected.check_file(&path);
        mounted.unmount();
    });
}

#[test]
fn read_only_it_cannot_be_written() {
    Scene::with_fuse(LONG, |scene| {
        let (expected, server) = served(scene);
        let (mounted, path) = mount(scene, &server, &["--read-only"]);
        let error = File::options().write(true).open(&path).expect_err("nobody may write");
        assert!([1, 13, 30].contains(&error.raw_os_error().expect("an errno")), "EPERM, EACCES or EROFS: {error}");
        let error = File::create(mounted.path.join("other")).expect_err("nor make anything");
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
        expected.check_file(&path);
        mounted.unmount();
    });
}

#[test]
fn a_directory_that_a_dead_mount_left_behind_is_taken_over_and_a_live_one_is_not() {
    Scene::with_fuse(LONG, |scene| {
        let (expected, server) = served(scene);
        let (mounted, path) = mount(scene, &server, &[]);
        let outcome = scene.ended(&["mount", &server.uri, &scene.name("folder"), "--entry", "second"]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");
        expected.check_file(&path);
        mounted.kill();
        let error = std::fs::metadata(&path).expect_err("nobody answers there");
        assert_eq!(error.kind(), ErrorKind::NotConnected);

        let (mounted, path) = mount(scene, &server, &[]);
        expected.check_file(&path);
        mounted.unmount();
        // That the dead one made the directory is not known any more, and so it stays.
        assert!(names(&scene.path("folder")).is_empty());
    });
}
