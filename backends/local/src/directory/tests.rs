//! What a kill and a loss of power leave of a chunk directory, step by step.

use std::cell::RefCell;
use std::rc::Rc;

use r3map_core::is_zero;
use r3map_testkit::fill;
use tempfile::TempDir;

use super::*;
use crate::durability::on_sync;

const CHUNK: u64 = 4096;
const CHUNKS: u64 = 9;
const SIZE: u64 = CHUNKS * CHUNK - 100;

fn settings() -> DirectorySettings {
    DirectorySettings { size: Some(SIZE), chunk_size: Some(ChunkSize::MIN), create: true, ..Default::default() }
}

fn open(path: &Path) -> Directory {
    Directory::open(path, &settings()).unwrap()
}

fn bytes(directory: &Directory, chunk: u64, version: u64) -> Vec<u8> {
    let range = directory.geometry().chunk_range(chunk);
    fill::bytes(range.start, usize::try_from(range.end - range.start).unwrap(), version)
}

fn write(directory: &Directory, chunk: u64, version: u64) {
    let range = directory.geometry().chunk_range(chunk);
    directory.chunks.write(range, &bytes(directory, chunk, version)).unwrap();
}

fn read(directory: &Directory, chunk: u64) -> Result<Vec<u8>> {
    let range = directory.geometry().chunk_range(chunk);
    let mut buf = vec![1; usize::try_from(range.end - range.start).unwrap()];
    directory.chunks.read(range, &mut buf).map(|()| buf)
}

fn remove(path: &Path, chunk: u64) {
    fs::remove_file(path.join((chunk * CHUNK).to_string())).unwrap();
}

/// Opens it again as after a loss of power, with whatever was done to its files meanwhile.
fn after_power_loss(directory: Directory, path: &Path, meanwhile: impl FnOnce()) -> Directory {
    directory.chunks.table.forget_boot();
    drop(directory);
    meanwhile();
    open(path)
}

#[test]
fn after_a_loss_of_power_what_was_flushed_must_be_there_and_the_rest_may_be() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    (0..3).for_each(|chunk| write(&directory, chunk, 1));
    directory.chunks.flush().unwrap();
    assert_eq!(directory.chunks.table.durable_chunks(), 3);
    (2..6).for_each(|chunk| write(&directory, chunk, 2));
    let directory = after_power_loss(directory, dir.path(), || {
        remove(dir.path(), 1);
        // Never flushed: one was lost, one came to be half on the disk, one whole.
        remove(dir.path(), 3);
        let half = fs::OpenOptions::new().write(true).open(dir.path().join((4 * CHUNK).to_string())).unwrap();
        half.set_len(100).unwrap();
    });
    assert_eq!(read(&directory, 0).unwrap(), bytes(&directory, 0, 1));
    assert_eq!(read(&directory, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(read(&directory, 2).unwrap(), bytes(&directory, 2, 2));
    assert!(is_zero(&read(&directory, 3).unwrap()) && is_zero(&read(&directory, 4).unwrap()));
    assert_eq!(read(&directory, 5).unwrap(), bytes(&directory, 5, 2));
    write(&directory, 4, 3);
    assert_eq!(read(&directory, 4).unwrap(), bytes(&directory, 4, 3));
    // From now on a chunk that is gone is gone: there was no loss of power since.
    remove(dir.path(), 5);
    drop(directory);
    assert_eq!(read(&open(dir.path()), 5).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_reader_does_not_let_go_of_what_was_lost() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 0, 1);
    directory.chunks.table.forget_boot();
    drop(directory);
    let read_only = DirectorySettings { read_only: true, ..settings() };
    drop(Directory::open(dir.path(), &read_only).unwrap());
    remove(dir.path(), 0);
    let error = Directory::open(dir.path(), &read_only).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("lost with the power"), "{error}");
    assert!(is_zero(&read(&open(dir.path()), 0).unwrap()));
}

#[test]
fn a_file_without_its_bit_does_not_count() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    // A first write that was killed: the file is there, longer than it should be even, but was never acknowledged.
    fs::write(dir.path().join("0"), vec![7; 9999]).unwrap();
    assert!(is_zero(&read(&directory, 0).unwrap()));
    write(&directory, 0, 1);
    assert_eq!(read(&directory, 0).unwrap(), bytes(&directory, 0, 1));
    assert_eq!(fs::metadata(dir.path().join("0")).unwrap().len(), CHUNK);
}

#[test]
fn trimming_a_durable_chunk_forgets_that_it_was() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 0, 1);
    directory.chunks.flush().unwrap();
    directory.chunks.trim(0..CHUNK).unwrap();
    assert_eq!(directory.chunks.table.durable_chunks(), 0);
    write(&directory, 0, 2);
    // The new file was never flushed, so that it may be lost.
    let directory = after_power_loss(directory, dir.path(), || remove(dir.path(), 0));
    assert!(is_zero(&read(&directory, 0).unwrap()));
}

#[test]
fn a_durable_chunk_is_durably_forgotten_before_its_file_goes() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 0, 1);
    write(&directory, 1, 1);
    directory.chunks.flush().unwrap();
    write(&directory, 2, 1);
    let (seen, path) = (Rc::new(RefCell::new(Vec::new())), dir.path().join("0"));
    let at_sync = seen.clone();
    on_sync::set(move || at_sync.borrow_mut().push(path.exists()));
    // One that is not durable can go without.
    directory.chunks.trim(2 * CHUNK..3 * CHUNK).unwrap();
    assert_eq!(*seen.borrow(), []);
    directory.chunks.trim(0..2 * CHUNK).unwrap();
    on_sync::unset();
    assert_eq!(*seen.borrow(), [true]);
    assert!(!dir.path().join("0").exists() && !dir.path().join("8192").exists());
}

#[test]
fn what_is_written_while_a_flush_runs_is_left_to_the_next() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 0, 1);
    write(&directory, 1, 1);
    let table = &directory.chunks.table;
    let unflushed = table.begin_flush().unwrap();
    assert_eq!(unflushed.first(), Some(&(0..2)));
    directory.chunks.trim(0..CHUNK).unwrap();
    write(&directory, 0, 2);
    write(&directory, 5, 1);
    table.set_durable(&unflushed).unwrap();
    assert_eq!(table.durable_chunks(), 1);
    assert_eq!(table.begin_flush().unwrap(), [0..1, 5..6]);
    directory.chunks.flush().unwrap();
    assert_eq!(table.durable_chunks(), 3);
}

#[test]
fn a_flush_that_was_killed_is_made_up_for_by_the_next() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 0, 1);
    directory.chunks.flush().unwrap();
    write(&directory, 0, 2);
    write(&directory, 5, 1);
    let unflushed = directory.chunks.table.begin_flush().unwrap();
    assert_eq!(unflushed, [0..1, 5..6]);
    // Here it is killed: the first chunk counts as durable by its first flush, and its file may not be on the disk.
    drop(directory);
    let directory = open(dir.path());
    assert_eq!(directory.chunks.table.begin_flush().unwrap(), unflushed);
    directory.chunks.flush().unwrap();
    assert_eq!(directory.chunks.table.begin_flush().unwrap(), []);
}

#[test]
fn many_files_are_flushed_together() {
    let dir = TempDir::new().unwrap();
    let settings = DirectorySettings { size: Some(200 * CHUNK), ..settings() };
    let directory = Directory::open(dir.path(), &settings).unwrap();
    (0..100).for_each(|chunk| write(&directory, 2 * chunk, 1));
    directory.chunks.flush().unwrap();
    assert_eq!(directory.chunks.table.durable_chunks(), 100);
}

#[test]
fn a_flush_names_the_chunk_that_is_gone_and_works_once_it_is_back() {
    let dir = TempDir::new().unwrap();
    let directory = open(dir.path());
    write(&directory, 2, 1);
    remove(dir.path(), 2);
    let error = directory.chunks.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("/8192: the chunk's file is gone"), "{error}");
    write(&directory, 2, 2);
    directory.chunks.flush().unwrap();
    assert_eq!(fs::read(dir.path().join("8192")).unwrap(), bytes(&directory, 2, 2));
}
