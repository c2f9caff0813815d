//! What cannot be read is an error at the mounted file: never zeros, never old bytes. One test for every way to fail.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use r3map_core::{ErrorKind, Operation};
use r3map_sys::{FileMapping, Sharing};
use r3map_testkit::faults::Rule;

use crate::support::{Bitflip, Expected, Lent, MIB, Mounted, SOON, Scene, is_mounted, make_file, wait_until};

const LONG: Duration = Duration::from_secs(120);
const SIZE: u64 = 16 * MIB + 1;
/// A place that nothing has touched yet, and the chunk that holds it.
const PLACE: u64 = 8 * MIB;
const CHUNK: u64 = 64 << 10;
/// EIO.
const IO_ERROR: i32 = 5;
/// EBUSY: the remote is there, but it is not the one that was mounted.
const ANOTHER: i32 = 16;

/// Ways to mount that pull nothing unasked, and give up soon.
const WAYS: [&[&str]; 2] = [&["--pull-workers", "0", "--retry", "1s"], &["--mode", "direct", "--retry", "1s"]];

/// Reads one page.
fn read(file: &File, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut page = vec![0; 4096];
    file.read_exact_at(&mut page, offset).map(|()| page)
}

/// A read there fails, as a call and through a mapping, and goes on to fail.
fn fails(mounted: &Mounted, offset: u64) {
    let file = mounted.open();
    for _ in 0..2 {
        let error = read(&file, offset).expect_err("that cannot be read");
        assert!([IO_ERROR, ANOTHER].contains(&error.raw_os_error().expect("an errno")), "{error}");
    }
    let len = usize::try_from(file.metadata().expect("it is open").len()).expect("it fits");
    let mapping = FileMapping::new(&file, len, Sharing::Shared, false).expect("it can be mapped");
    let offset = usize::try_from(offset).expect("it fits");
    mapping.read(offset, &mut [0; 100]).expect_err("nor through a mapping");
}

/// A read there gives what is expected.
fn works(mounted: &Mounted, expected: &Expected, offset: u64) {
    let page = read(&mounted.open(), offset).unwrap_or_else(|error| panic!("at {offset}: {error}"));
    expected.check(offset, &page).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn the_server_is_gone() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 1);
        for way in WAYS {
            let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
            let mounted = scene.mount(&server.uri, "region", way);
            works(&mounted, &expected, 0);
            server.kill();
            fails(&mounted, PLACE);
            drop(mounted);
        }
    });
}

#[test]
fn a_chunk_is_missing_from_a_directory_that_had_it() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 2);
        let region = format!("directory:{}?size={SIZE}&chunk=64KiB", scene.name("chunks"));
        let copied = scene.ended(&["copy", &format!("file:{}", scene.name("source")), &region]);
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let lost = chunk_file(scene, &expected, PLACE);
        let kept = std::fs::read(&lost).expect("it is there");
        for way in WAYS {
            let server = scene.serve(&region, &[]);
            let mounted = scene.mount(&server.uri, "region", way);
            std::fs::remove_file(&lost).expect("it is there");
            fails(&mounted, PLACE);
            works(&mounted, &expected, PLACE - CHUNK);
            mounted.unmount();
            server.stop();

            // Also for a server that has never seen it.
            let server = scene.serve(&region, &[]);
            let mounted = scene.mount(&server.uri, "region", way);
            fails(&mounted, PLACE);
            std::fs::write(&lost, &kept[..kept.len() / 2]).expect("there is room");
            fails(&mounted, PLACE);
            std::fs::write(&lost, &kept).expect("there is room");
            works(&mounted, &expected, PLACE);
            mounted.unmount();
        }
        std::fs::remove_file(&lost).expect("it is there");
        let outcome = scene.ended(&["copy", &region, &format!("file:{}", scene.name("copy"))]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");
    });
}

/// The file of the chunk at `offset`, found by what it holds.
fn chunk_file(scene: &Scene, expected: &Expected, offset: u64) -> std::path::PathBuf {
    let mut folders = vec![scene.path("chunks")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if std::fs::read(&entry).is_ok_and(|bytes| {
                bytes.len() as u64 >= CHUNK && expected.check(offset, &bytes[..bytes.len().min(4096)]).is_ok()
            }) {
                return entry;
            }
        }
    }
    panic!("no file holds the chunk at {offset}");
}

#[test]
fn the_source_file_is_truncated() {
    Scene::with_fuse(LONG, |scene| {
        for way in WAYS {
            let expected = make_file(&scene.path("source"), SIZE, 3);
            let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
            let mounted = scene.mount(&server.uri, "region", way);
            let source = File::options().write(true).open(scene.path("source")).expect("it is there");
            source.set_len(PLACE + 10).expect("it can be cut");
            fails(&mounted, PLACE);
            fails(&mounted, SIZE - 5000);
            works(&mounted, &expected, PLACE - CHUNK);
            // What is not there any more does not come back as a hole either.
            mounted.program.terminate();
            drop(mounted);
            server.program.terminate();
        }
    });
}

#[test]
fn the_server_reads_short_or_fails() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 4);
        let lent = Lent::new(&format!("file:{}", scene.name("source")));
        let there = Rule::on(Operation::Read).touching(PLACE..PLACE + CHUNK);
        let kinds = [ErrorKind::Corrupt, ErrorKind::Internal, ErrorKind::NotFound, ErrorKind::Unavailable];
        let mut faults: Vec<_> = kinds.into_iter().map(|kind| there.clone().fail(kind)).collect();
        faults.push(there.short(100));
        for fault in faults {
            for way in WAYS {
                let mounted = scene.mount(&lent.uri, "region", way);
                lent.faults.add(fault.clone());
                let error = read(&mounted.open(), PLACE).expect_err(&format!("with {fault:?}"));
                assert_ne!(error.kind(), std::io::ErrorKind::UnexpectedEof, "with {fault:?}: {error}");
                works(&mounted, &expected, PLACE + 4 * MIB);
                lent.faults.clear();
                works(&mounted, &expected, PLACE);
                mounted.unmount();
            }
        }
    });
}

#[test]
fn bits_flip_on_the_way() {
    // Shorter than the period of the fill, so that what is marked occurs once.
    const SIZE: u64 = 900_001;
    const PLACE: u64 = 512 << 10;
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 5);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let marked = r3map_testkit::fill::bytes(PLACE, usize::try_from(CHUNK).expect("it fits"), 5);
        for way in WAYS {
            let line = Bitflip::new(server.address(), marked.clone());
            let mounted = scene.mount(&format!("grpc://{}", line.address), "region", way);
            works(&mounted, &expected, 0);
            fails(&mounted, PLACE);
            assert!(line.flips() > 0, "nothing was flipped; the test proves nothing");
            line.heal();
            let file = mounted.open();
            wait_until(SOON, "reading again", || read(&file, PLACE).is_ok());
            drop(file);
            expected.check_file(&mounted.path);
            mounted.unmount();
        }
        let line = Bitflip::new(server.address(), marked);
        let from = format!("grpc://{}", line.address);
        let outcome = scene.ended(&["copy", &from, &format!("file:{}", scene.name("copy"))]);
        assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{outcome:?}");
    });
}

#[test]
fn the_server_comes_back_with_another_size() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 6);
        for (size, name) in [(SIZE / 2, "shorter"), (SIZE * 2, "longer")] {
            make_file(&scene.path(name), size, 7);
            for way in WAYS {
                let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
                let mounted = scene.mount(&server.uri, "region", way);
                let address = server.kill();
                let server = scene.serve_again(&format!("file:{}", scene.name(name)), address);
                fails(&mounted, 0);
                fails(&mounted, PLACE);
                drop(mounted);
                server.stop();
            }
        }
    });
}

#[test]
fn the_wrong_size_or_chunk_size_is_refused() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 8);
        let region = format!("directory:{}?size={SIZE}&chunk=64KiB", scene.name("chunks"));
        let copied = scene.ended(&["copy", &format!("file:{}", scene.name("source")), &region]);
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let server = scene.serve(&region, &[]);
        let chunks = scene.name("chunks");
        let wrong: [&[&str]; 5] = [
            &["mount", &server.uri, &scene.name("region"), "--size", "15MiB"],
            &["info", &server.uri, "--size", "17MiB"],
            &["info", &format!("directory:{chunks}?size={SIZE}&chunk=128KiB")],
            &["info", &format!("directory:{chunks}?size=1MiB&chunk=64KiB")],
            &["info", &format!("file:{}", scene.name("source")), "--size", "1MiB"],
        ];
        for arguments in wrong {
            let outcome = scene.ended(arguments);
            assert!(outcome.code != Some(0) && outcome.err.len() == 1, "{arguments:?}: {outcome:?}");
        }
        assert!(!is_mounted(&scene.path("region")));
    });
}

/// Reads into a buffer that it has filled, until it is interrupted; says whether anything was read, and what became of the
/// buffer.
const READER: &str = r#"
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, lambda *_: None)
signal.siginterrupt(signal.SIGINT, True)
# Python itself would go on reading after a signal.
pread = ctypes.CDLL(None, use_errno=True).pread
pread.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_longlong]
pread.restype = ctypes.c_ssize_t
file, place = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
buffer = ctypes.create_string_buffer(b"\xaa" * 4096, 4096)
print("waiting", flush=True)
count = pread(file, buffer, 4096, place)
print("read", count, "buffer", "as before" if buffer.raw == b"\xaa" * 4096 else "changed", flush=True)
"#;

/// A reader that is interrupted while it waits goes away (around the kernel's cache not before its read has failed, after
/// the limit), and leaves nothing wrong behind.
#[test]
fn a_reader_is_interrupted() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), SIZE, 9);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        for way in WAYS {
            let mounted = scene.mount(&server.uri, "region", way);
            server.program.freeze();
            for block in [128, 129] {
                let place = (block * CHUNK).to_string();
                let mut reader = scene.start(Command::new("python3").args(["-c", READER, mounted.name(), &place]));
                reader.wait_for_line(SOON, "waiting");
                std::thread::sleep(Duration::from_millis(300));
                assert!(reader.is_running(), "it waits");
                reader.interrupt();
                let status = reader.wait(SOON);
                let (said, complaint) = (reader.stdout(), reader.stderr());
                assert_eq!(said.last().map(String::as_str), Some("read -1 buffer as before"), "{status} {complaint:?}");
            }
            server.program.thaw();
            works(&mounted, &expected, 128 * CHUNK);
            works(&mounted, &expected, 129 * CHUNK);
            expected.check_file(&mounted.path);
            mounted.unmount();
        }
    });
}

/// What was read before it changed at the source is not shown by a later mount.
#[test]
fn nothing_old_is_left_in_the_kernel() {
    Scene::with_fuse(LONG, |scene| {
        make_file(&scene.path("source"), SIZE, 10);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        for seed in 11..14 {
            let mounted = scene.mount(&server.uri, "region", &[]);
            std::fs::read(&mounted.path).expect("it can be read");
            mounted.unmount();
            let expected = make_file(&scene.path("source"), SIZE, seed);
            let mounted = scene.mount(&server.uri, "region", &[]);
            expected.check_file(&mounted.path);
            mounted.unmount();
        }
    });
}

/// With no cache in between, what one host writes is what another reads next.
#[test]
fn two_direct_mounts_see_one_another() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), MIB, 14);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let way = ["--mode", "direct", "--direct-io"];
        let (one, other) = (scene.mount(&server.uri, "one", &way), scene.mount(&server.uri, "other", &way));
        for (writer, reader) in [(&one, &other), (&other, &one)].into_iter().cycle().take(6) {
            let bytes = expected.write(1000..90_000, expected.written().len() as u64 + 20);
            writer.open().write_all_at(&bytes, 1000).expect("it can be written");
            expected.keep();
            expected.check_file(&reader.path);
        }
        one.unmount();
        other.unmount();
    });
}
