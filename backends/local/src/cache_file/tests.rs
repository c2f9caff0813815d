//! What a kill and a loss of power leave of a cache file, page by page.
#![expect(clippy::cast_possible_truncation, reason = "forty blocks fit")]

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use proptest::prelude::*;
use r3map_core::{BLOCK_SIZE, ChunkSize};
use r3map_testkit::fill;
use tempfile::TempDir;

use super::*;
use crate::durability::on_sync;

const BLOCKS: u64 = 40;
const SIZE: u64 = BLOCKS * BLOCK_SIZE - 1000;

fn geometry() -> Geometry {
    Geometry::new(SIZE, ChunkSize::new(8192).unwrap()).unwrap()
}

/// Somewhere where `fdatasync` costs nothing, if there is such a place.
fn scratch() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

fn open(path: &Path) -> CacheFile {
    CacheFile::open(path, "region", geometry()).unwrap()
}

fn states(cache: &CacheFile) -> Vec<Option<Recorded>> {
    let mut states = vec![None; BLOCKS as usize];
    cache.load(&mut |blocks, state| states[blocks.start as usize..blocks.end as usize].fill(Some(state))).unwrap();
    states
}

fn set_boot(path: &Path, boot: Option<BootId>) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut page = [0; header::LEN];
    file.read_exact_at(&mut page, 0).unwrap();
    let header = Header::from_page(&page).unwrap();
    file.write_all_at(&Header { boot, ..header }.to_page(), 0).unwrap();
}

/// What the application, the puller and the pusher do to blocks, in the order that the contract asks for.
#[derive(Debug, Clone)]
enum Step {
    Pull(Range<u64>),
    Write(Range<u64>),
    Push(Range<u64>),
    Forget(Range<u64>),
    Checkpoint,
}

fn any_step() -> impl Strategy<Value = Step> {
    let blocks = || (0..BLOCKS, 1..8u64).prop_map(|(start, len)| start..(start + len).min(BLOCKS));
    prop_oneof![
        3 => blocks().prop_map(Step::Pull),
        4 => blocks().prop_map(Step::Write),
        2 => blocks().prop_map(Step::Push),
        2 => blocks().prop_map(Step::Forget),
        1 => Just(Step::Checkpoint),
    ]
}

/// The file as it was after each call since the last `fdatasync`, that one included; without the gap before the data.
#[derive(Clone)]
struct Disk {
    path: PathBuf,
    gap: Range<usize>,
    images: Rc<RefCell<Vec<Vec<u8>>>>,
}

impl Disk {
    fn watch(path: &Path, table: &Table) -> Self {
        let gap = table.promised.end() as usize..table.data_start() as usize;
        let disk = Self { path: path.to_owned(), gap, images: Rc::default() };
        disk.synced();
        let watched = disk.clone();
        on_sync::set(move || watched.synced());
        disk
    }

    fn synced(&self) {
        self.images.borrow_mut().clear();
        self.changed();
    }

    fn changed(&self) {
        let file = fs::File::open(&self.path).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize - self.gap.len()];
        let (table, data) = bytes.split_at_mut(self.gap.start);
        file.read_exact_at(table, 0).unwrap();
        file.read_exact_at(data, self.gap.end as u64).unwrap();
        self.images.borrow_mut().push(bytes);
    }

    /// Each page as it was at some time since the last `fdatasync`.
    fn after_power_loss(&self, seed: u64) -> Vec<u8> {
        let mut random = r3map_testkit::random::Random::new(seed);
        let images = self.images.borrow();
        let mut bytes = images[0].clone();
        for (at, page) in (0..).step_by(header::LEN).zip(bytes.chunks_mut(header::LEN)) {
            let image = &images[random.below(images.len() as u64) as usize];
            page.copy_from_slice(&image[at..at + page.len()]);
        }
        bytes.splice(self.gap.start..self.gap.start, vec![0; self.gap.len()]);
        bytes
    }
}

/// A cache that is used as it should be, and what must be in it.
struct Model {
    cache: CacheFile,
    disk: Disk,
    states: Vec<Option<Recorded>>,
    /// The version of each block's bytes.
    versions: Vec<u64>,
    next_version: u64,
    /// Blocks that are dirty since the last checkpoint or longer, and the version they had then.
    promised: Vec<Option<u64>>,
}

impl Model {
    fn new(path: &Path) -> Self {
        let cache = open(path);
        let disk = Disk::watch(path, &cache.table);
        let blocks = BLOCKS as usize;
        Self {
            cache,
            disk,
            states: vec![None; blocks],
            versions: vec![0; blocks],
            next_version: 1,
            promised: vec![None; blocks],
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Pull(blocks) => self.each(blocks, |model, block| {
                if model.states[block as usize].is_none() {
                    model.put(block);
                    model.record(block, Recorded::Clean);
                }
            }),
            Step::Write(blocks) => self.each(blocks, |model, block| match model.states[block as usize] {
                Some(_) => {
                    model.record(block, Recorded::Dirty);
                    model.put(block);
                }
                None => {
                    model.put(block);
                    model.record(block, Recorded::Dirty);
                }
            }),
            Step::Push(blocks) => self.each(blocks, |model, block| {
                if model.states[block as usize] == Some(Recorded::Dirty) {
                    model.record(block, Recorded::Clean);
                    model.promised[block as usize] = None;
                }
            }),
            Step::Forget(blocks) => self.each(blocks, |model, block| {
                if model.states[block as usize] == Some(Recorded::Clean) {
                    model.cache.forget(block..block + 1).unwrap();
                    model.states[block as usize] = None;
                    model.disk.changed();
                }
            }),
            Step::Checkpoint => {
                let durability = self.cache.window.durability();
                let fault = |error| Error::from_io(Operation::Flush, "checkpoint", error);
                durability.make(|| self.cache.table.checkpoint(self.cache.file()), fault).unwrap();
                let dirty =
                    |(state, version): (&Option<Recorded>, &u64)| (*state == Some(Recorded::Dirty)).then_some(*version);
                self.promised = self.states.iter().zip(&self.versions).map(dirty).collect();
            }
        }
    }

    fn each(&mut self, blocks: &Range<u64>, mut run: impl FnMut(&mut Self, u64)) {
        blocks.clone().for_each(|block| run(self, block));
    }

    fn put(&mut self, block: u64) {
        let range = geometry().block_range(block);
        let bytes = fill::bytes(range.start, (range.end - range.start) as usize, self.next_version);
        self.cache.file().write_all_at(&bytes, self.cache.table.data_start() + range.start).unwrap();
        self.cache.window.durability().changed();
        self.versions[block as usize] = self.next_version;
        self.next_version += 1;
        self.disk.changed();
    }

    fn record(&mut self, block: u64, state: Recorded) {
        self.cache.record(block..block + 1, state).unwrap();
        self.states[block as usize] = Some(state);
        self.disk.changed();
    }

    /// The newest version of a block's bytes that a file has, if it is whole and one of `versions`.
    fn version_in(&self, file: &fs::File, block: u64, versions: Range<u64>) -> Option<u64> {
        let range = geometry().block_range(block);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, self.cache.table.data_start() + range.start).unwrap();
        versions.rev().find(|version| bytes == fill::bytes(range.start, bytes.len(), *version))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn after_a_kill_everything_is_as_it_was(steps in proptest::collection::vec(any_step(), 1..25)) {
        let dir = scratch();
        let mut model = Model::new(&dir.path().join("cache"));
        steps.iter().for_each(|step| model.run(step));
        on_sync::unset();
        let left = dir.path().join("left");
        fs::copy(&model.disk.path, &left).unwrap();
        let opened = open(&left);
        prop_assert_eq!(&states(&opened), &model.states);
        for block in 0..BLOCKS {
            let version = model.versions[block as usize];
            if version > 0 {
                prop_assert_eq!(model.version_in(opened.file(), block, version..version + 1), Some(version));
            }
        }
    }

    #[test]
    fn after_a_loss_of_power_what_was_promised_is_there_and_nothing_counts_as_clean(
        steps in proptest::collection::vec(any_step(), 1..25),
        seed: u64,
    ) {
        let dir = scratch();
        let mut model = Model::new(&dir.path().join("cache"));
        steps.iter().for_each(|step| model.run(step));
        on_sync::unset();
        let left = dir.path().join("left");
        fs::write(&left, model.disk.after_power_loss(seed)).unwrap();
        set_boot(&left, None);
        let opened = open(&left);
        let states = states(&opened);
        for block in 0..BLOCKS {
            let state = states[block as usize];
            prop_assert_ne!(state, Some(Recorded::Clean), "block {}", block);
            if let Some(version) = model.promised[block as usize] {
                prop_assert_eq!(state, Some(Recorded::Dirty), "block {} was promised", block);
                prop_assert!(model.version_in(opened.file(), block, version..model.next_version).is_some());
            }
            if state.is_some() {
                prop_assert!(model.version_in(opened.file(), block, 1..model.next_version).is_some());
            }
        }
    }
}

/// The order inside a checkpoint: power is lost between its two `fdatasync`s.
#[test]
fn a_promise_is_never_made_before_the_bytes_are_there() {
    let dir = scratch();
    let mut model = Model::new(&dir.path().join("cache"));
    model.run(&Step::Write(3..9));
    let images = Rc::new(RefCell::new(Vec::new()));
    let (taken, path) = (images.clone(), model.disk.path.clone());
    on_sync::set(move || taken.borrow_mut().push(fs::read(&path).unwrap()));
    model.run(&Step::Checkpoint);
    on_sync::unset();
    let images = images.borrow();
    let promised = model.cache.table.promised.range();
    let promised = promised.start as usize..promised.end as usize;
    assert_eq!(images.len(), 2, "the bytes are made durable, then the promise");
    assert!(is_zero(&images[0][promised.clone()]) && !is_zero(&images[1][promised]));
}

/// What becomes dirty while a checkpoint runs may not be on the disk yet, and what becomes clean needs no promise.
#[test]
fn a_checkpoint_promises_only_what_was_dirty_when_it_began_and_still_is() {
    let dir = scratch();
    let cache = Rc::new(open(&dir.path().join("cache")));
    cache.record(0..4, Recorded::Dirty).unwrap();
    let meanwhile = cache.clone();
    on_sync::set(move || {
        meanwhile.record(6..8, Recorded::Dirty).unwrap();
        meanwhile.record(1..2, Recorded::Clean).unwrap();
    });
    cache.table.checkpoint(cache.file()).unwrap();
    on_sync::unset();
    let promised = || cache.table.promised.read(cache.file(), 0).unwrap()[0];
    assert_eq!(promised(), 0b1101);
    cache.table.checkpoint(cache.file()).unwrap();
    assert_eq!(promised(), 0b1100_1101);
}

#[test]
fn a_file_that_was_closed_is_trusted_on_any_machine_and_one_that_was_not_is_not() {
    let dir = scratch();
    let path = dir.path().join("cache");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let cache = open(&path);
    cache.record(0..5, Recorded::Clean).unwrap();
    runtime.block_on(cache.checkpoint()).unwrap();
    drop(cache);
    set_boot(&path, None);
    let cache = open(&path);
    assert_eq!(states(&cache)[..5], [Some(Recorded::Clean); 5]);
    assert_eq!(states(&cache)[5], None);
    cache.record(5..6, Recorded::Clean).unwrap();
    drop(cache);
    set_boot(&path, None);
    assert_eq!(states(&open(&path)), [None; BLOCKS as usize]);
}

#[test]
fn after_a_failed_sync_the_page_cache_is_not_trusted() {
    let dir = scratch();
    let path = dir.path().join("cache");
    let cache = open(&path);
    cache.record(0..BLOCKS, Recorded::Clean).unwrap();
    // What a failed fdatasync does, without a disk that fails.
    cache.table.distrust(cache.file());
    drop(cache);
    assert_eq!(states(&open(&path)), [None; BLOCKS as usize]);
}

#[test]
fn blocks_past_the_end_are_refused_and_found() {
    let dir = scratch();
    let path = dir.path().join("cache");
    let cache = open(&path);
    assert_eq!(cache.record(0..BLOCKS + 1, Recorded::Clean).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(cache.forget(0..BLOCKS + 1).unwrap_err().kind(), ErrorKind::InvalidInput);
    cache.file().write_all_at(&[0xff], cache.table.valid.range().start + BLOCKS / 8).unwrap();
    assert_eq!(cache.load(&mut |_, _| ()).unwrap_err().kind(), ErrorKind::Corrupt);
}
