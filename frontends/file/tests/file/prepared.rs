//! Mounts that are made in advance: nothing of them is on a path before they are shown, and nothing is left if they never are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use r3map_core::{ChunkSize, ErrorKind};
use r3map_file::{FileMount, FileSettings, PreparedMount, Show};
use r3map_testkit::{crash, fill};

use crate::lifecycle::mounts;
use crate::support::{LIMIT, World, content, filled, need_fuse, open};

const SIZE: u64 = 300_001;

fn prepare(world: &World, settings: FileSettings) -> PreparedMount {
    let size = ChunkSize::DEFAULT;
    world.wait("preparing", FileMount::prepare(SIZE, size, settings)).unwrap()
}

/// The devices of all mounts of this machine, also of those that are on no path.
fn devices() -> BTreeSet<String> {
    fs::read_dir("/sys/class/bdi").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn device(path: &Path) -> String {
    let device = fs::metadata(path).unwrap().dev();
    format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
}

#[test]
fn what_is_prepared_is_on_no_path_and_then_shown_as_it_is() {
    need_fuse!();
    for show in [Show::File, Show::Entry("inside".into())] {
        let world = World::new();
        let prepared = prepare(&world, FileSettings { show: show.clone(), ..FileSettings::default() });
        let before = devices();
        assert!(!world.path().exists() && mounts(&world.path()).is_empty());
        // Whoever puts something there meanwhile is not hidden.
        fs::write(world.path(), "precious").unwrap();
        fs::remove_file(world.path()).unwrap();

        let memory = filled(SIZE, 1);
        let mount = world.wait("showing", prepared.show(memory.clone(), world.path())).unwrap();
        assert!(before.contains(&device(mount.path())), "it is the one that was there before");
        assert_eq!(mounts(&world.path()), [("fuse.r3map".to_owned(), "r3map".to_owned())]);
        fill::check(&fs::read(mount.path()).unwrap(), 0, 1).unwrap();
        open(mount.path()).write_all_at(b"written", 5).unwrap();
        assert_eq!(&content(&memory)[5..12], b"written");
        world.wait("flushing", mount.flush()).unwrap();
        world.wait("forgetting", mount.invalidate(0..SIZE)).unwrap();
        world.unmount(&mount);
        assert!(!world.path().exists() && mounts(&world.path()).is_empty());
    }
}

#[test]
fn what_is_read_only_stays_so() {
    need_fuse!();
    let world = World::new();
    let prepared = prepare(&world, FileSettings { read_only: true, ..FileSettings::default() });
    let mount = world.wait("showing", prepared.show(filled(SIZE, 1), world.path())).unwrap();
    fill::check(&fs::read(world.path()).unwrap(), 0, 1).unwrap();
    let refused = File::options().write(true).open(world.path());
    assert_eq!(crate::support::errno(refused), rustix::io::Errno::ROFS);
    world.unmount(&mount);
}

#[test]
fn a_region_that_is_not_the_expected_one_is_shown_too() {
    need_fuse!();
    let world = World::new();
    let prepared = prepare(&world, FileSettings::default());
    let mount = world.wait("showing", prepared.show(filled(SIZE + 1, 1), world.path())).unwrap();
    let found = fs::read(world.path()).unwrap();
    assert_eq!(found.len() as u64, SIZE + 1);
    fill::check(&found, 0, 1).unwrap();
    world.unmount(&mount);
}

#[test]
fn a_path_that_is_taken_meanwhile_is_left_alone() {
    need_fuse!();
    let world = World::new();
    let prepared = prepare(&world, FileSettings::default());
    fs::write(world.path(), "precious").unwrap();
    let error = world.wait("showing", prepared.show(filled(SIZE, 1), world.path())).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert_eq!(fs::read(world.path()).unwrap(), b"precious");
    assert!(mounts(&world.path()).is_empty());
}

#[test]
fn a_killed_process_leaves_nothing_of_what_was_only_prepared() {
    if let Some(path) = crash::role("preparer") {
        let (world, before) = (World::beside(&path), devices());
        let _prepared = prepare(&world, FileSettings::default());
        let new: Vec<_> = devices().difference(&before).cloned().collect();
        crash::stop(&format!("prepared {}", new.join(" ")));
    }
    need_fuse!();
    let world = World::new();
    let test = "prepared::a_killed_process_leaves_nothing_of_what_was_only_prepared";
    let mut preparer = crash::child(test, "preparer", world.path().to_str().unwrap());
    let line = preparer.wait_for_line(LIMIT, "prepared");
    // Of other tests too, at worst; they end as well.
    let new: BTreeSet<_> = line.split(' ').filter(|word| word.contains(':')).map(str::to_owned).collect();
    assert!(!new.is_empty() && !world.path().exists());
    preparer.kill();
    world.wait_until("its end", || devices().is_disjoint(&new));
    assert!(!world.path().exists() && mounts(&world.path()).is_empty());
    let mount = world.mount(filled(SIZE, 1), FileSettings::default());
    world.unmount(&mount);
}
