//! Every byte where it belongs: reads, writes and mappings of any size and place, by several threads, in every mode.

use std::fs;
use std::os::unix::fs::FileExt;

use r3map_file::FileSettings;
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::fill;

use crate::support::{World, content, filled, need_fuse, open};

const MIB: u64 = 1 << 20;

#[test]
fn every_size_is_read_back_whole() {
    need_fuse!();
    let world = World::new();
    for size in [1, 4095, 4096, 4097, 65_537, MIB + 1, 3 * MIB + 4095] {
        let memory = filled(size, 1);
        let mount = world.mount(memory.clone(), FileSettings::default());
        let bytes = fs::read(mount.path()).unwrap();
        assert_eq!(bytes.len() as u64, size);
        fill::check(&bytes, 0, 1).unwrap();
        let file = open(mount.path());
        file.write_all_at(&fill::bytes(size - 1, 1, 2), size - 1).unwrap();
        let mapping = FileMapping::new(&file, bytes.len(), Sharing::Shared, true).unwrap();
        let mut last = [0];
        mapping.read(bytes.len() - 1, &mut last).unwrap();
        fill::check(&last, size - 1, 2).unwrap();
        drop((mapping, file));
        world.unmount(&mount);
        fill::check(&content(&memory)[bytes.len() - 1..], size - 1, 2).unwrap();
    }
}
