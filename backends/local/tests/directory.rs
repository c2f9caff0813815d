//! The chunk directory: against the contract, against everything that can happen to its files, and after `kill -9`.

mod common;

use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{SmallDisk, assert_says, fresh, scratch};
use r3map_core::{Access, Backend, ChunkSize, Error, ErrorKind, Extent, ExtentKind, is_zero};
use r3map_local::{Directory, DirectorySettings};
use r3map_testkit::{conformance, crash, deadline, fill, model, skip};
use tempfile::TempDir;

const SIZE: u64 = 300_001;
const CHUNK: usize = 8192;

fn settings() -> DirectorySettings {
    let chunk_size = Some(ChunkSize::new(CHUNK as u64).unwrap());
    DirectorySettings { size: Some(SIZE), chunk_size, create: true, ..DirectorySettings::default() }
}

fn open(path: &Path) -> Result<Directory, Error> {
    Directory::open(path, &settings())
}

fn existing(path: &Path) -> Result<Directory, Error> {
    Directory::open(path, &DirectorySettings::default())
}

/// The names of the chunks in a directory, in order.
fn names(path: &Path) -> Vec<u64> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<u64> = names.filter(|name| !name.starts_with('.')).map(|name| name.parse().unwrap()).collect();
    names.sort_unstable();
    names
}

async fn read_chunk(directory: &Directory, index: u64) -> Result<Vec<u8>, Error> {
    let range = directory.geometry().chunk_range(index);
    let mut buf = vec![1; usize::try_from(range.end - range.start).unwrap()];
    directory.read_at(range.start, &mut buf).await.map(|()| buf)
}

async fn write_chunk(directory: &Directory, index: u64, seed: u64) -> Result<(), Error> {
    let range = directory.geometry().chunk_range(index);
    let bytes = fill::bytes(range.start, usize::try_from(range.end - range.start).unwrap(), seed);
    directory.write_at(range.start, &bytes).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract() {
    let dir = scratch();
    conformance::backend(async || Arc::new(open(&fresh(&dir)).unwrap()) as _).await;
    let one = DirectorySettings { size: Some(1), max_open_files: NonZeroUsize::MIN, ..settings() };
    conformance::backend(async || Arc::new(Directory::open(fresh(&dir), &one).unwrap()) as _).await;
    let few = DirectorySettings { max_open_files: NonZeroUsize::MIN.saturating_add(1), ..settings() };
    conformance::backend(async || Arc::new(Directory::open(fresh(&dir), &few).unwrap()) as _).await;
}

#[tokio::test]
async fn keeps_the_contract_read_only_and_when_it_is_opened_again() {
    let dir = scratch();
    let path = fresh(&dir);
    let directory = open(&path).unwrap();
    directory.write_at(0, &fill::bytes(0, 300_001, 7)).await.unwrap();
    drop(directory);
    let read_only = DirectorySettings { read_only: true, ..DirectorySettings::default() };
    conformance::filled(async || Arc::new(Directory::open(&path, &read_only).unwrap()) as _, 7).await;
    let path = fresh(&dir);
    conformance::durable(async || Arc::new(open(&path).unwrap()) as _).await;
}

#[tokio::test]
async fn agrees_with_the_model() {
    let dir = scratch();
    let make = async || Arc::new(open(&fresh(&dir)).unwrap()) as _;
    model::check(make, model::Settings { runs: 4, ..model::Settings::default() }).await;
}

#[tokio::test]
async fn chunks_are_files_named_by_offset_and_zeros_take_none() {
    let dir = scratch();
    let directory = open(dir.path()).unwrap();
    assert_eq!(directory.capabilities().access, Access::WholeChunks(ChunkSize::new(CHUNK as u64).unwrap()));
    for index in [0, 3, 36] {
        write_chunk(&directory, index, 1).await.unwrap();
    }
    directory.write_at(CHUNK as u64, &[0; CHUNK]).await.unwrap();
    assert_eq!(names(dir.path()), [0, 24576, 294_912]);
    assert_eq!(fs::read(dir.path().join("294912")).unwrap(), fill::bytes(294_912, 5089, 1));
    let extents = directory.capabilities().extents.unwrap().extents(100, SIZE - 100).await.unwrap();
    let expected = [
        (100..8192, ExtentKind::Data),
        (8192..24576, ExtentKind::Hole),
        (24576..32768, ExtentKind::Data),
        (32768..294_912, ExtentKind::Hole),
        (294_912..SIZE, ExtentKind::Data),
    ];
    assert_eq!(extents, expected.map(|(range, kind)| Extent { range, kind }));

    let trim = directory.capabilities().trim.unwrap();
    trim.trim(1, SIZE - 2).await.unwrap();
    assert_eq!(names(dir.path()), [0, 294_912]);
    assert_eq!(read_chunk(&directory, 0).await.unwrap()[..2], [fill::bytes(0, 1, 1)[0], 0]);
    trim.trim(0, SIZE).await.unwrap();
    assert_eq!(names(dir.path()), []);
}

#[tokio::test]
async fn a_chunk_that_is_gone_or_not_whole_is_an_error_never_zeros() {
    let dir = scratch();
    let directory = open(dir.path()).unwrap();
    for index in 0..5 {
        write_chunk(&directory, index, 1).await.unwrap();
    }
    let file = |index: u64| dir.path().join((index * CHUNK as u64).to_string());
    let damage = || {
        fs::remove_file(file(0)).unwrap();
        fs::OpenOptions::new().write(true).open(file(1)).unwrap().set_len(8191).unwrap();
        fs::OpenOptions::new().write(true).open(file(2)).unwrap().set_len(0).unwrap();
        fs::OpenOptions::new().write(true).open(file(3)).unwrap().set_len(8193).unwrap();
    };
    damage();
    let check = async |directory: &Directory| {
        assert_says(read_chunk(directory, 0).await, ErrorKind::Corrupt, "/0: the chunk's file is gone");
        for index in 1..4 {
            assert_says(read_chunk(directory, index).await, ErrorKind::Corrupt, "is not as long as the chunk");
        }
        let mut all = vec![0; 5 * CHUNK];
        assert_says(directory.read_at(0, &mut all).await, ErrorKind::Corrupt, "is gone");
        assert_eq!(read_chunk(directory, 4).await.unwrap(), fill::bytes(4 * CHUNK as u64, CHUNK, 1));
        let zeroes = directory.capabilities().write_zeroes.unwrap();
        assert_says(zeroes.write_zeroes(5, 10).await, ErrorKind::Corrupt, "is gone");
    };
    check(&directory).await;
    drop(directory);
    let directory = existing(dir.path()).unwrap();
    check(&directory).await;
    // All of it is written anew, so that it can be had again.
    for index in 0..4 {
        write_chunk(&directory, index, 2).await.unwrap();
        assert_eq!(read_chunk(&directory, index).await.unwrap(), fill::bytes(index * CHUNK as u64, CHUNK, 2));
    }
    directory.flush().await.unwrap();
    // A chunk that somebody removed while it was open is written to a file that has a name.
    fs::remove_file(file(0)).unwrap();
    write_chunk(&directory, 0, 3).await.unwrap();
    assert_eq!(fs::read(file(0)).unwrap(), fill::bytes(0, CHUNK, 3));
}

#[tokio::test]
async fn a_table_that_is_gone_or_cut_is_an_error_never_zeros() {
    let dir = scratch();
    let directory = open(dir.path()).unwrap();
    write_chunk(&directory, 0, 1).await.unwrap();
    let path = dir.path().join(".r3map-chunks");
    let table = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let size = table.metadata().unwrap().len();
    table.set_len(0).unwrap();
    let cut = "the table of chunks was truncated";
    assert_says(read_chunk(&directory, 0).await, ErrorKind::Corrupt, cut);
    assert_says(write_chunk(&directory, 1, 1).await, ErrorKind::Corrupt, cut);
    assert_says(directory.flush().await, ErrorKind::Corrupt, "truncated");
    assert_says(directory.capabilities().trim.unwrap().trim(0, SIZE).await, ErrorKind::Corrupt, "truncated");
    drop(directory);
    assert_says(existing(dir.path()), ErrorKind::Corrupt, "was truncated or extended");
    table.set_len(size).unwrap();
    assert_says(existing(dir.path()), ErrorKind::Corrupt, "is not a table of chunks");
    table.write_all_at(b"r3mchunk\x07", 0).unwrap();
    assert_says(existing(dir.path()), ErrorKind::InvalidInput, "is of another format");
    fs::remove_file(&path).unwrap();
    assert_says(existing(dir.path()), ErrorKind::NotFound, ".r3map-chunks");
}

#[test]
fn what_cannot_be_opened_is_refused_in_one_line() {
    let dir = scratch();
    let path = fresh(&dir);
    let invalid = ErrorKind::InvalidInput;
    assert_says(existing(&path), ErrorKind::NotFound, "cannot open the directory");
    assert_says(existing(dir.path()), invalid, "is not a chunk directory");
    let unsized_settings = DirectorySettings { create: true, ..DirectorySettings::default() };
    assert_says(Directory::open(&path, &unsized_settings), invalid, "say of what size");
    assert!(!path.exists(), "nothing was made");
    fs::create_dir(&path).unwrap();
    assert_says(Directory::open(&path, &unsized_settings), invalid, "say of what size");
    let read_only = DirectorySettings { read_only: true, ..settings() };
    assert_says(Directory::open(&path, &read_only), invalid, "is not a chunk directory");
    assert_says(open(&path.join("no/such")), ErrorKind::NotFound, "cannot make the directory");
    fs::write(fresh(&dir).with_extension("file"), "x").unwrap();

    let directory = open(&path).unwrap();
    assert_says(existing(&path), ErrorKind::Conflict, "is in use by someone else");
    let look = Directory::look(&path, None, None).unwrap();
    assert!(look.size() == SIZE && look.may_be_written());
    assert_says(Directory::look(&path, Some(5), None), invalid, "holds a region of 300001 bytes, not 5");
    drop(directory);
    drop((existing(&path).expect("whoever looks keeps nobody out"), look));
    assert_says(Directory::look(dir.path(), None, None), invalid, "is not a chunk directory");
    let other = |size, chunk| DirectorySettings { size: Some(size), chunk_size: Some(chunk), ..settings() };
    let chunk = settings().chunk_size.unwrap();
    assert_says(Directory::open(&path, &other(5, chunk)), invalid, "holds a region of 300001 bytes, not 5");
    assert_says(Directory::open(&path, &other(SIZE, ChunkSize::MIN)), invalid, "has chunks of 8KiB, not 4KiB");
    let readers = [(); 2].map(|()| Directory::open(&path, &read_only).unwrap());
    assert_says(existing(&path), ErrorKind::Conflict, "is in use by someone else");
    drop(readers);
    assert_eq!(existing(&path).unwrap().size(), SIZE);
    fs::write(path.join(".r3map-directory"), "r3map directory 9\n").unwrap();
    assert_says(existing(&path), invalid, "this version knows format 1 only");

    let file = fresh(&dir);
    fs::write(&file, "x").unwrap();
    assert_says(open(&file), invalid, "cannot open the directory");
}

#[tokio::test]
async fn what_a_go_program_wrote_is_taken_over() {
    let dir = scratch();
    for index in [0, 2, 36] {
        let (offset, len) = (index * CHUNK as u64, if index == 36 { 5089 } else { CHUNK });
        fs::write(dir.path().join(offset.to_string()), fill::bytes(offset, len, 1)).unwrap();
    }
    fs::create_dir(dir.path().join("lost+found")).unwrap();
    assert_says(existing(dir.path()), ErrorKind::InvalidInput, "is not a chunk directory");
    let directory = open(dir.path()).unwrap();
    for index in [0, 2, 36] {
        let bytes = read_chunk(&directory, index).await.unwrap();
        assert_eq!(fill::check(&bytes, index * CHUNK as u64, 1), Ok(()));
    }
    assert!(is_zero(&read_chunk(&directory, 1).await.unwrap()));
    fs::remove_file(dir.path().join("16384")).unwrap();
    assert_says(read_chunk(&directory, 2).await, ErrorKind::Corrupt, "is gone");
}

#[test]
fn other_peoples_directories_are_left_alone() {
    let invalid = ErrorKind::InvalidInput;
    for (name, len, kind, words) in [
        ("notes.txt", 5, invalid, "has other things in it (\"notes.txt\")"),
        ("007", 5, invalid, "has other things in it"),
        ("4096", CHUNK, invalid, "has a chunk at 4096, which this region does not have"),
        ("819200", CHUNK, invalid, "has a chunk at 819200"),
        ("0", CHUNK - 1, ErrorKind::Corrupt, "has a chunk at 0 of 8191 bytes, not 8192"),
    ] {
        let dir = scratch();
        fs::write(dir.path().join(name), vec![1; len]).unwrap();
        assert_says(open(dir.path()), kind, words);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was put there");
    }
}

/// How many files of a directory this process has open, its two own ones and the directory itself aside.
fn open_chunks(path: &Path) -> usize {
    let is_chunk = |link: &Path| link.parent() == Some(path) && !link.to_string_lossy().contains("/.r3map");
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.filter(|link| is_chunk(link)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_files_are_open_than_may_be() {
    let dir = scratch();
    let path = dir.path().canonicalize().unwrap();
    let max_open_files = NonZeroUsize::MIN.saturating_add(2);
    let directory = Arc::new(Directory::open(&path, &DirectorySettings { max_open_files, ..settings() }).unwrap());
    // The system lists open files one after the other: they are counted while nobody opens or closes any.
    let between = Arc::new(tokio::sync::Barrier::new(10));
    let work = |task: u64| {
        let (directory, between) = (directory.clone(), between.clone());
        tokio::spawn(async move {
            for round in 0..20 {
                let index = task * 4 + round % 4;
                write_chunk(&directory, index, round).await.unwrap();
                let bytes = read_chunk(&directory, index).await.unwrap();
                assert_eq!(fill::check(&bytes, index * CHUNK as u64, round), Ok(()));
                between.wait().await;
                between.wait().await;
            }
            directory.flush().await.unwrap();
        })
    };
    let tasks: Vec<_> = (0..9).map(work).collect();
    for _ in 0..20 {
        deadline(Duration::from_secs(60), "a round", between.wait()).await;
        let open = open_chunks(&path);
        assert!((1..=3).contains(&open), "{open} are open");
        between.wait().await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    for index in 0..4 {
        read_chunk(&directory, index).await.unwrap();
    }
    assert_eq!(open_chunks(&path), 3, "they stay open until the place is needed");
}

#[tokio::test]
async fn a_full_disk_is_exhausted_and_leaves_no_half_chunk() {
    let Some(disk) = SmallDisk::new(4) else { return skip("a tmpfs cannot be mounted (are you root?)") };
    let chunk_size = Some(ChunkSize::new(1 << 20).unwrap());
    let settings = DirectorySettings { size: Some(16 << 20), chunk_size, create: true, ..Default::default() };
    let directory = Directory::open(disk.path().join("chunks"), &settings).unwrap();
    let mut index = 0;
    let full = loop {
        match write_chunk(&directory, index, 1).await {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    assert_says::<()>(Err(full), ErrorKind::Exhausted, "input/output failed");
    assert!(index >= 2);
    assert_eq!(names(&disk.path().join("chunks")).len() as u64, index);
    assert!(is_zero(&read_chunk(&directory, index).await.unwrap()), "it is what it was");
    write_chunk(&directory, 0, 2).await.unwrap();
    directory.capabilities().trim.unwrap().trim(1 << 20, 1 << 20).await.unwrap();
    write_chunk(&directory, index, 2).await.unwrap();
    directory.flush().await.unwrap();
}

/// Writes, rewrites and trims chunks for ever; says how many rounds it has done.
fn use_until_killed(path: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = open(Path::new(path)).unwrap();
    runtime.block_on(async {
        for round in 1.. {
            for index in 0..36 {
                write_chunk(&directory, index, round).await.unwrap();
            }
            if round % 2 == 0 {
                let trim = directory.capabilities().trim.unwrap();
                trim.trim(20 * CHUNK as u64, 10 * CHUNK as u64).await.unwrap();
            }
            if round % 5 == 0 {
                directory.flush().await.unwrap();
            }
            crash::reached(&format!("round {round}"));
        }
    });
}

#[test]
fn after_kill_9_every_chunk_is_whole_and_is_what_was_written() {
    if let Some(path) = crash::role("user") {
        return use_until_killed(&path);
    }
    let dir = TempDir::new().unwrap();
    for rounds in [1, 2, 5, 8] {
        let path = fresh(&dir);
        let test = "after_kill_9_every_chunk_is_whole_and_is_what_was_written";
        let mut child = crash::child(test, "user", path.to_str().unwrap());
        child.wait_for_line(Duration::from_secs(60), &format!("round {rounds}"));
        std::thread::sleep(Duration::from_millis(rounds));
        child.kill();
        check_what_is_left(&path, rounds);
    }
}

fn check_what_is_left(path: &Path, rounds: u64) {
    let directory = existing(path).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for index in 0..36 {
        let bytes = runtime.block_on(read_chunk(&directory, index)).unwrap();
        // Trimmed in every other round, and the first write afterwards may not have happened.
        if (20..30).contains(&index) && is_zero(&bytes) {
            continue;
        }
        for (at, page) in (index * CHUNK as u64..).step_by(4096).zip(bytes.chunks(4096)) {
            let found = (rounds..rounds + 10_000).any(|round| page == fill::bytes(at, page.len(), round));
            assert!(found, "chunk {index} has neither what was written last nor what was being written");
        }
    }
    runtime.block_on(directory.flush()).unwrap();
}
