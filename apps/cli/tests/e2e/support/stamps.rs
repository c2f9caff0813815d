//! An application that uses a region: it stamps one block after another with a number that grows, and knows which stamp
//! each block must have.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use r3map_testkit::fill;

use super::{SOON, wait_until};

const BLOCK: usize = 4096;
/// Bytes of a stamp.
const STAMP: usize = 8;
/// Between two stamps: a region that is written to as fast as it can be is one that does not come to an end.
const PAUSE: Duration = Duration::from_micros(200);

/// What a region of whole blocks must hold: the fill of a seed, and the stamps over it.
pub(crate) struct Stamps {
    last: Vec<u64>,
    next: u64,
    /// Stamps that were refused, of blocks that were not stamped since: they may be there or not.
    open: HashMap<usize, u64>,
    seed: u64,
}

/// The application while it runs.
pub(crate) struct Stamping {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Stamps>,
}

impl Stamps {
    /// For a region of `size` bytes that holds the fill of `seed`.
    pub(crate) fn new(size: u64, seed: u64) -> Self {
        let blocks = usize::try_from(size).expect("regions of tests fit") / BLOCK;
        Self { last: vec![0; blocks], next: 1, open: HashMap::new(), seed }
    }

    /// Has the application run on the file until it is stopped, or the file no longer takes what it writes.
    pub(crate) fn start(mut self, path: PathBuf) -> Stamping {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), written.clone());
        let thread = std::thread::spawn(move || {
            let file = OpenOptions::new().write(true).open(&path).expect("the region can be opened");
            while !stopped.load(Ordering::SeqCst) && self.stamp(|bytes, at| file.write_all_at(bytes, at).is_ok()) {
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(PAUSE);
            }
            self
        });
        Stamping { stop, written, thread }
    }

    /// Stamps the next block. Whether that was taken.
    fn stamp(&mut self, write: impl FnOnce(&[u8], u64) -> bool) -> bool {
        let blocks = self.last.len() as u64;
        let block = usize::try_from(self.next.wrapping_mul(7919) % blocks).expect("it is a block");
        let taken = write(&self.next.to_le_bytes(), (block * BLOCK) as u64);
        if taken {
            self.last[block] = self.next;
            self.open.remove(&block);
        } else {
            self.open.insert(block, self.next);
        }
        self.next += 1;
        taken
    }

    /// Stamps some blocks, written whole so that nothing of them needs to be there before, and has them made durable.
    pub(crate) fn stamp_durably(&mut self, path: &Path, count: usize) {
        let file = OpenOptions::new().write(true).open(path).expect("the region can be opened");
        for _ in 0..count {
            let seed = self.seed;
            let whole = |stamp: &[u8], at: u64| [stamp, &fill::bytes(at + STAMP as u64, BLOCK - STAMP, seed)].concat();
            assert!(self.stamp(|stamp, at| file.write_all_at(&whole(stamp, at), at).is_ok()), "it must be taken");
        }
        file.sync_all().expect("it can be made durable");
    }

    /// Compares every byte.
    pub(crate) fn check(&self, path: &Path) {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(bytes.len(), self.last.len() * BLOCK, "its size");
        for (block, (bytes, stamp)) in bytes.chunks(BLOCK).zip(&self.last).enumerate() {
            let at = block * BLOCK;
            let (stamped, rest) = bytes.split_at(STAMP);
            let expected = match stamp {
                0 => fill::bytes(at as u64, STAMP, self.seed),
                stamp => stamp.to_le_bytes().to_vec(),
            };
            let open = self.open.get(&block).is_some_and(|stamp| stamped == stamp.to_le_bytes());
            assert!(
                stamped == expected || open,
                "block {block} has {stamped:?} and not {expected:?}, which is stamp {stamp}"
            );
            fill::check(rest, (at + STAMP) as u64, self.seed).unwrap_or_else(|wrong| panic!("block {block}: {wrong}"));
        }
    }
}

impl Stamping {
    /// Waits until it has made progress from now on.
    pub(crate) fn goes_on(&self) {
        let before = self.written.load(Ordering::SeqCst);
        wait_until(SOON, "the application goes on", || self.written.load(Ordering::SeqCst) > before + 10);
    }

    /// Stops it.
    pub(crate) fn stop(self) -> Stamps {
        self.stop.store(true, Ordering::SeqCst);
        self.refused()
    }

    /// Waits until the file has refused a write.
    pub(crate) fn refused(self) -> Stamps {
        self.thread.join().expect("the application does not fail")
    }
}
