//! Read-only maps of any backend.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use r3map_core::{Backend, Error, ErrorKind, Operation, Result};
use r3map_slice::{Slice, map};

/// Position-dependent bytes, and how many reads there were.
struct Counted {
    size: u64,
    reads: AtomicUsize,
}

fn byte(offset: u64) -> u8 {
    (offset % 251) as u8 + 1
}

#[async_trait]
impl Backend for Counted {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        (offset..).zip(buf).for_each(|(at, slot)| *slot = byte(at));
        Ok(())
    }

    async fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Denied, Operation::Write, "read-only"))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

fn open(size: u64) -> (Slice, Arc<Counted>) {
    let source = Arc::new(Counted { size, reads: AtomicUsize::new(0) });
    (map(source.clone()).unwrap(), source)
}

#[test]
fn every_byte_is_there_and_each_chunk_is_read_once() {
    for size in [1, 4095, 4096, 4097, 65535, 65536, 65537, 1_000_003] {
        let (map, source) = open(size);
        assert_eq!(map.len() as u64, size);
        assert!(map.iter().zip(0..).all(|(found, at)| *found == byte(at)), "{size}");
        assert_eq!(source.reads.load(Ordering::Relaxed) as u64, size.div_ceil(65536));
    }
}

#[test]
fn only_what_is_touched_is_read() {
    let (map, source) = open(1 << 40);
    assert_eq!(map[1 << 39], byte(1 << 39));
    assert_eq!(map[map.len() - 1], byte((1 << 40) - 1));
    assert_eq!(source.reads.load(Ordering::Relaxed), 2);
}

#[test]
fn threads_that_want_the_same_chunk_share_one_read() {
    let (map, source) = open(64 << 16);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let map = &map;
            scope.spawn(move || {
                for chunk in 0..64 {
                    let at = chunk * 65536 + thread * 4096;
                    assert_eq!(map[at], byte(at as u64));
                }
            });
        }
    });
    assert_eq!(source.reads.load(Ordering::Relaxed), 64);
}

#[tokio::test]
async fn it_can_be_opened_and_dropped_in_asynchronous_code() {
    let (map, _) = open(100);
    assert_eq!(map[99], byte(99));
}

/// The examples do what they say: they are programs that somebody starts from.
#[test]
fn the_examples_run() {
    let examples = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "one\ntwo\nthree\n".repeat(5000)).unwrap();
    let run = |name: &str, argument: Option<&std::path::Path>| {
        let output = std::process::Command::new(examples.join(name)).args(argument).output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let counted = run("map_file", Some(file.path()));
    assert!(counted.ends_with(": 70000 bytes, 15000 lines\n"), "{counted}");
    let fetched = run("map_remote", None);
    assert!(fetched.starts_with("of 1073741824 bytes, the first, middle and last are [0, "), "{fetched}");
}
