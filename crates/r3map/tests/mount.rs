//! Mounts: direct and managed, each as slice, path and opened file, against a plain copy of what the region should be.

use std::num::NonZeroU32;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use r3map::{
    Backend, Cache, ChunkSize, Error, ErrorKind, ListenOptions, Mount, OpenOptions, Operation, Priority, PullSettings,
    PushSettings, Registry, RetrySettings, Settings, Workers,
};
use r3map_testkit::faults::{Faults, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{crash, deadline, fill, skip};

const SIZE: u64 = (1 << 20) + 4097;
const LIMIT: Duration = Duration::from_secs(60);

fn remote() -> Arc<Store> {
    Arc::new(Store::new(SIZE).filled(1))
}

fn expected() -> Vec<u8> {
    fill::bytes(0, usize::try_from(SIZE).unwrap(), 1)
}

/// Offsets and lengths that cross blocks, chunks and neither, at both ends.
fn writes() -> Vec<(u64, Vec<u8>)> {
    [(0, 1), (4095, 2), (65_000, 70_000), (1 << 19, 4096), (SIZE - 10, 10)]
        .map(|(offset, len)| (offset, fill::bytes(offset, len, 9)))
        .into()
}

fn apply(bytes: &mut [u8], writes: &[(u64, Vec<u8>)]) {
    for (offset, data) in writes {
        let start = usize::try_from(*offset).unwrap();
        bytes[start..start + data.len()].copy_from_slice(data);
    }
}

fn both(remote: &Arc<Store>) -> [Mount; 2] {
    [Mount::direct(remote.clone()), Mount::managed(remote.clone())]
}

/// Blocking work, as an application does it, off the runtime.
async fn app<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    deadline(LIMIT, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}

#[tokio::test]
async fn slices_read_and_write_every_byte() {
    for mode in 0..2 {
        let remote = remote();
        let [direct, managed] = both(&remote);
        let mut slice = if mode == 0 { direct } else { managed }.slice().await.unwrap();
        let (mut slice, seen) = app(move || {
            let seen = slice.as_slice().to_vec();
            apply(slice.as_mut_slice().unwrap(), &writes());
            (slice, seen)
        })
        .await;
        assert!(seen == expected());
        slice.flush().await.unwrap();
        let mut bytes = expected();
        apply(&mut bytes, &writes());
        assert!(remote.snapshot() == bytes, "after the flush, mode {mode}");
        slice.write_at(77, b"last").unwrap();
        slice.close().await.unwrap();
        apply(&mut bytes, &[(77, b"last".to_vec())]);
        assert!(remote.snapshot() == bytes, "after the close, mode {mode}");
    }
}

#[tokio::test]
async fn files_read_and_write_every_byte() {
    if !std::path::Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    for mode in 0..2 {
        let remote = remote();
        let [direct, managed] = both(&remote);
        let path = folder.path().join("region");
        let mount = if mode == 0 { direct } else { managed }.path(&path).await.unwrap();
        let file = path.clone();
        let seen = app(move || {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
            let mut seen = vec![0; usize::try_from(SIZE).unwrap()];
            file.read_exact_at(&mut seen, 0).unwrap();
            writes().iter().for_each(|(offset, data)| file.write_all_at(data, *offset).unwrap());
            seen
        })
        .await;
        assert!(seen == expected());
        mount.flush().await.unwrap();
        let mut bytes = expected();
        apply(&mut bytes, &writes());
        assert!(remote.snapshot() == bytes, "mode {mode}");
        mount.close().await.unwrap();
        assert!(!path.exists(), "the mount left its file behind");

        let [direct, managed] = both(&remote);
        let opened = if mode == 0 { direct } else { managed }.file().await.unwrap();
        let file = opened.file().try_clone().unwrap();
        app(move || file.write_all_at(b"opened", 100).unwrap()).await;
        opened.close().await.unwrap();
        apply(&mut bytes, &[(100, b"opened".to_vec())]);
        assert!(remote.snapshot() == bytes, "mode {mode}");
    }
}

#[tokio::test]
async fn hooks_are_called() {
    let (chunks, flushes, closes) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (a, b, c) = (chunks.clone(), flushes.clone(), closes.clone());
    let count = |counter: Arc<AtomicU64>| {
        move || {
            counter.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(()))
        }
    };
    let mount = Mount::managed(remote()).on_chunk_local(move |_| {
        a.fetch_add(1, Ordering::Relaxed);
    });
    let mut slice = mount.on_before_flush(count(b)).on_before_close(count(c)).slice().await.unwrap();
    deadline(LIMIT, "pulling", slice.region().pulled()).await.unwrap();
    slice.flush().await.unwrap();
    assert_eq!(chunks.load(Ordering::Relaxed), SIZE.div_ceil(ChunkSize::DEFAULT.bytes()));
    assert!(flushes.load(Ordering::Relaxed) >= 1);
    assert_eq!(closes.load(Ordering::Relaxed), 0);
    slice.close().await.unwrap();
    assert_eq!(closes.load(Ordering::Relaxed), 1);

    let refuse = || std::future::ready(Err(Error::new(ErrorKind::Conflict, Operation::Flush, "not now")));
    let slice = Mount::managed(remote()).on_before_flush(refuse).slice().await.unwrap();
    assert_eq!(slice.flush().await.unwrap_err().kind(), ErrorKind::Conflict);
}

/// A direct mount has no local copy that would call them, and calls them all the same.
#[tokio::test]
async fn hooks_are_called_for_files_and_what_they_write_is_stored() {
    if !std::path::Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    for mode in 0..2 {
        for on_a_path in [true, false] {
            let remote = remote();
            let [direct, managed] = both(&remote);
            let cell: Arc<OnceLock<Arc<dyn Backend>>> = Arc::default();
            let told: Arc<Mutex<Vec<&str>>> = Arc::default();
            let hook = |name: &'static str, offset: u64| {
                let (cell, told) = (cell.clone(), told.clone());
                move || {
                    told.lock().unwrap().push(name);
                    let region = cell.get().unwrap().clone();
                    async move { region.write_at(offset, name.as_bytes()).await }
                }
            };
            let mount = if mode == 0 { direct } else { managed };
            let mount = mount.on_before_flush(hook("flush", 100)).on_before_close(hook("close", 70_000));
            let sync = |file: std::fs::File| app(move || file.sync_all().unwrap());
            if on_a_path {
                let mount = mount.path(folder.path().join("region")).await.unwrap();
                assert!(cell.set(mount.region().backend()).is_ok());
                sync(std::fs::File::open(mount.path()).unwrap()).await;
                assert_eq!(*told.lock().unwrap(), ["flush"]);
                mount.close().await.unwrap();
            } else {
                let mount = mount.file().await.unwrap();
                assert!(cell.set(mount.region().backend()).is_ok());
                sync(mount.file().try_clone().unwrap()).await;
                assert_eq!(*told.lock().unwrap(), ["flush"]);
                mount.close().await.unwrap();
            }
            let told = told.lock().unwrap();
            assert_eq!(told.iter().filter(|name| **name == "close").count(), 1, "{told:?}");
            assert_eq!(told.last(), Some(&"flush"), "{told:?}");
            let mut bytes = expected();
            apply(&mut bytes, &[(100, b"flush".to_vec()), (70_000, b"close".to_vec())]);
            assert!(remote.snapshot() == bytes, "mode {mode}, on a path: {on_a_path}");
        }
    }
    let refuse = || std::future::ready(Err(Error::new(ErrorKind::Conflict, Operation::Flush, "not now")));
    let mount = Mount::direct(remote()).on_before_flush(refuse).path(folder.path().join("region")).await.unwrap();
    assert_eq!(mount.flush().await.unwrap_err().kind(), ErrorKind::Conflict);
    mount.abandon().await;
}

/// Nor can whoever closes once only lose what was written by what a hook says.
#[tokio::test]
async fn a_hook_that_fails_before_closing_keeps_nothing_from_being_stored() {
    if !std::path::Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    for mode in 0..2 {
        let remote = remote();
        let [direct, managed] = both(&remote);
        let refuses = Arc::new(AtomicBool::new(true));
        let cell: Arc<OnceLock<Arc<dyn Backend>>> = Arc::default();
        let (asked, writer) = (refuses.clone(), cell.clone());
        let hook = move || {
            let (refuses, region) = (asked.load(Ordering::SeqCst), writer.get().unwrap().clone());
            async move {
                region.write_at(70_000, b"hook").await?;
                let error = || Error::new(ErrorKind::Denied, Operation::Close, "not now");
                if refuses { Err(error()) } else { Ok(()) }
            }
        };
        let mount = if mode == 0 { direct } else { managed }.on_before_close(hook);
        let mount = mount.path(folder.path().join("region")).await.unwrap();
        assert!(cell.set(mount.region().backend()).is_ok());
        let path = mount.path().to_owned();
        app(move || {
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(b"written", 5000).unwrap();
        })
        .await;
        let refused = deadline(LIMIT, "closing", mount.close()).await.unwrap_err();
        assert!(refused.kind() == ErrorKind::Denied && refused.to_string().contains("not now"), "{refused}");
        let mut bytes = expected();
        apply(&mut bytes, &[(5000, b"written".to_vec()), (70_000, b"hook".to_vec())]);
        assert!(remote.snapshot() == bytes, "mode {mode}");
        assert!(deadline(LIMIT, "closing", mount.close()).await.is_err(), "it is asked again");
        refuses.store(false, Ordering::SeqCst);
        deadline(LIMIT, "closing", mount.close()).await.unwrap();
    }
}

/// What a function finds worth most comes first.
#[tokio::test]
async fn a_function_says_what_is_pulled_first() {
    let order: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = order.clone();
    let one = Workers::Fixed(NonZeroU32::MIN.try_into().unwrap());
    let max_request = ChunkSize::DEFAULT.bytes().try_into().unwrap();
    let settings =
        Settings { pull: PullSettings { workers: one, max_request, ..PullSettings::default() }, ..Settings::default() };
    let value = Priority::Function(Arc::new(|chunk| if chunk == 7 { 100 } else { i64::try_from(chunk).unwrap() }));
    let mount = Mount::managed(Arc::new(Store::new(SIZE).filled(1).plain())).settings(settings).priority(value);
    let slice = mount.on_chunk_local(move |chunk| seen.lock().unwrap().push(chunk)).slice().await.unwrap();
    deadline(LIMIT, "pulling", slice.region().pulled()).await.unwrap();
    assert_eq!(order.lock().unwrap()[..3], [7, 16, 15]);
}

#[tokio::test]
async fn everything_is_pulled_first_and_in_the_order_asked_for() {
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1).plain()));
    let order: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = order.clone();
    let one = Workers::Fixed(NonZeroU32::MIN.try_into().unwrap());
    let max_request = ChunkSize::DEFAULT.bytes().try_into().unwrap();
    let settings = Settings {
        pull_first: true,
        pull: PullSettings { workers: one, max_request, ..PullSettings::default() },
        ..Settings::default()
    };
    let mount = Mount::managed(faults.clone()).settings(settings).priority(Priority::List([9, 3, 16].into()));
    let mount = mount.on_chunk_local(move |chunk| seen.lock().unwrap().push(chunk));
    let slice = deadline(LIMIT, "pulling first", mount.slice()).await.unwrap();
    assert_eq!(faults.bytes(Operation::Read), SIZE);
    assert_eq!(order.lock().unwrap()[..4], [9, 3, 16, 0]);
    let reads = faults.count(Operation::Read);
    assert!(app(move || slice.as_slice() == expected()).await);
    assert_eq!(faults.count(Operation::Read), reads, "it was all there");
}

#[tokio::test]
async fn a_cache_file_is_used_again_and_only_for_its_region() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::File(folder.path().join("cache"));
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    let mount = |identity: &str| Mount::managed(faults.clone()).cache(cache.clone()).identity(identity);

    let mut slice = mount("one").slice().await.unwrap();
    deadline(LIMIT, "pulling", slice.region().pulled()).await.unwrap();
    slice.write_at(5, b"hello").unwrap();
    slice.close().await.unwrap();
    drop(slice);
    let error = mount("two").slice().await.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::InvalidInput), "{error}");

    let _ = faults.take_calls();
    let slice = mount("one").slice().await.unwrap();
    let seen = app(move || slice.as_slice().to_vec()).await;
    let mut bytes = expected();
    apply(&mut bytes, &[(5, b"hello".to_vec())]);
    assert!(seen == bytes);
    assert_eq!(faults.bytes(Operation::Read), 0, "what was valid was pulled again");
}

#[tokio::test]
async fn a_remote_that_is_gone_is_an_error_after_the_limit() {
    let faults = Faults::new(remote());
    faults.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let retry = RetrySettings { limit: Some(Duration::from_millis(200)), ..RetrySettings::default() };
    for mount in [Mount::direct(faults.clone()), Mount::managed(faults.clone())] {
        let slice = mount.settings(Settings { retry: retry.clone(), ..Settings::default() }).slice().await.unwrap();
        let (slice, error) = app(move || {
            let error = slice.read_at(0, &mut [0; 10]).unwrap_err();
            (slice, error)
        })
        .await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        drop(slice);
    }
}

/// A remote that was restarted says so once; nobody but the application has what it lost.
#[tokio::test]
async fn a_direct_mount_goes_on_to_say_what_the_remote_has_lost() {
    if !std::path::Path::new("/dev/fuse").exists() {
        return r3map_testkit::skip("there is no /dev/fuse");
    }
    let chunks = Store::new(SIZE).filled(1).whole_chunks(ChunkSize::MIN);
    for (remote, heals) in [(Store::new(SIZE).filled(1), false), (chunks, true)] {
        let faults = Faults::new(Arc::new(remote));
        let mount = Mount::direct(faults.clone()).file().await.unwrap();
        let file = mount.file().try_clone().unwrap();
        let lose = faults.clone();
        app(move || {
            // Two writes to one chunk: writing one of them again is not writing the other again.
            file.write_all_at(b"lost", 10).unwrap();
            file.write_all_at(b"lost, too", 2000).unwrap();
            lose.add(Rule::on(Operation::Flush).times(1).fail(ErrorKind::Conflict));
            let sync = || file.sync_all().map_err(|error| ErrorKind::of_io(&error));
            assert_eq!((sync(), sync()), (Err(ErrorKind::Conflict), Err(ErrorKind::Conflict)));
            file.write_all_at(b"lost", 10).unwrap();
            assert_eq!(sync(), Err(ErrorKind::Conflict));
            if heals {
                file.write_all_at(b"lost, too", 2000).unwrap();
                assert_eq!((sync(), sync()), (Ok(()), Ok(())));
            }
        })
        .await;
        match mount.close().await {
            Ok(()) => assert!(heals),
            Err(error) => {
                assert!(!heals, "{error}");
                assert_eq!((error.kind(), error.range()), (ErrorKind::Conflict, Some((2000, 9))), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn read_only_is_refused_and_settings_are_checked() {
    let settings = Settings { read_only: true, ..Settings::default() };
    let mut slice = Mount::managed(remote()).settings(settings).slice().await.unwrap();
    assert!(slice.region().is_read_only());
    assert_eq!(slice.write_at(0, b"x").unwrap_err().kind(), ErrorKind::Denied);

    let zero = PushSettings { interval: Duration::ZERO, ..PushSettings::default() };
    let settings = Settings { push: zero, ..Settings::default() };
    let error = Mount::managed(remote()).settings(settings).slice().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let settings = Settings { chunk_size: Some(ChunkSize::MIN), ..Settings::default() };
    let chunks = Arc::new(Store::new(SIZE).whole_chunks(ChunkSize::DEFAULT));
    let error = Mount::managed(chunks).settings(settings).slice().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

#[tokio::test]
async fn a_cache_file_notices_another_region_under_the_same_name() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::File(folder.path().join("cache"));
    let registry = Registry::standard();
    let socket = format!("grpc+unix://{}", folder.path().join("socket").display());
    for first in [true, false] {
        let options = ListenOptions { identity: Some(format!("region {first}")), ..ListenOptions::default() };
        let listeners = registry.listen(&[socket.parse().unwrap()], remote(), &options).await.unwrap();
        let client = registry.open(&socket.parse().unwrap(), &OpenOptions::default()).await.unwrap();
        let mounted = Mount::managed(client).cache(cache.clone()).identity(&socket).slice().await;
        match mounted {
            Ok(mut slice) if first => slice.close().await.unwrap(),
            Err(error) if !first => assert_eq!(error.kind(), ErrorKind::Conflict, "{error}"),
            other => panic!("first: {first}, {other:?}"),
        }
        for listener in listeners {
            listener.shutdown().await.unwrap();
        }
    }
    let nameless = Mount::managed(remote()).cache(cache).slice().await.unwrap_err();
    assert_eq!(nameless.kind(), ErrorKind::InvalidInput, "{nameless}");
}

/// A thread that waits for its own process's file system would keep the process, and the process the thread.
#[test]
fn a_process_can_be_killed_while_it_flushes_the_file_that_it_serves() {
    if let Some(path) = crash::role("server") {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let faults = Faults::new(remote());
            let mount = Mount::direct(faults.clone()).migratable();
            let (_path, _file, source);
            if path.is_empty() {
                let mount = mount.file().await.unwrap();
                source = mount.source().unwrap();
                _file = mount;
            } else {
                let mount = mount.path(&path).await.unwrap();
                source = mount.source().unwrap();
                _path = mount;
            }
            faults.add(Rule::on(Operation::Flush).hang());
            tokio::spawn(async move { source.flush().await });
            deadline(LIMIT, "the flush", faults.wait_in_flight(1)).await;
            crash::stop("flushing");
        });
    }
    if !std::path::Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("region");
    let test = "a_process_can_be_killed_while_it_flushes_the_file_that_it_serves";
    for path in ["", path.to_str().unwrap()] {
        let mut server = crash::child(test, "server", path);
        server.wait_for_line(LIMIT, "flushing");
        server.kill();
    }
    // What is left of it, for the folder to be removed.
    let mounted = std::process::Command::new("umount").arg(&path).status();
    assert!(mounted.is_ok_and(|status| status.success()));
}
