//! Foreign programs that do nothing but write, read and compare: fio and fsx.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{MIB, SOON, Scene, make_file};

const LONG: Duration = Duration::from_secs(240);

/// Runs fio on a region that is mounted with `arguments`.
fn fio(arguments: &'static [&'static str], jobs: &'static [&'static str]) {
    Scene::with_fuse(LONG, move |scene| {
        const SIZE: u64 = 96 * MIB + 1;
        make_file(&scene.path("source"), SIZE, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", arguments);
        let file = format!("--filename={}", mounted.name());
        let mut all = vec![
            "--name=verify",
            &file,
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--verify_backlog=64",
            "--group_reporting",
            "--allow_file_create=0",
            "--end_fsync=1",
            "--output-format=terse",
        ];
        all.extend(jobs);
        // It writes a state file into its folder, which is the scene's.
        scene.run(LONG, "fio", &all);
        mounted.unmount();
        server.stop();
    });
}

#[test]
fn fio_random_and_buffered() {
    fio(
        &["--push-interval", "200ms"],
        &[
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--blockalign=512",
            "--numjobs=4",
            "--size=16M",
            "--offset_increment=24M",
            "--ioengine=psync",
        ],
    );
}

#[test]
fn fio_random_and_direct() {
    fio(
        &["--dirty-budget", "4MiB"],
        &[
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
            "--numjobs=4",
            "--size=8M",
            "--offset_increment=24M",
            "--ioengine=libaio",
            "--iodepth=16",
        ],
    );
}

#[test]
fn fio_sequential_and_buffered() {
    fio(
        &["--push-interval", "200ms"],
        &[
            "--rw=write",
            "--bs=1M",
            "--numjobs=4",
            "--size=24M",
            "--offset_increment=24M",
            "--ioengine=psync",
            "--fsync=8",
        ],
    );
}

#[test]
fn fio_sequential_and_direct() {
    fio(
        &["--direct-io"],
        &[
            "--rw=write",
            "--bs=128k",
            "--direct=1",
            "--numjobs=3",
            "--size=16M",
            "--offset_increment=24M",
            "--ioengine=libaio",
            "--iodepth=8",
        ],
    );
}

#[test]
fn fio_through_mmap() {
    fio(
        &["--push-interval", "200ms"],
        // Its mmap engine does not take jobs at different places of one file.
        &["--rw=randwrite", "--bs=4k", "--size=32M", "--ioengine=mmap", "--fsync=512"],
    );
}

#[test]
fn fio_without_a_local_copy() {
    fio(
        &["--mode", "direct"],
        &["--rw=randrw", "--bsrange=4k-128k", "--numjobs=3", "--size=8M", "--offset_increment=24M", "--ioengine=psync"],
    );
}

/// What fsx does to a file of fixed size. It may not truncate it, or make it longer.
const FSX: &str = "\
flen = 3000001
blockmode = true
[opsize]
max = 200000
[weights]
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
fsync = 0.3
fdatasync = 0.3
punch_hole = 3
sendfile = 3
posix_fadvise = 2
copy_file_range = 2
truncate = 0
";
/// It leaves its mappings where they are, so that one run cannot be too long.
const OPERATIONS: &str = "4000";
/// How long, unless `R3MAP_FSX_SECONDS` says otherwise.
const SECONDS: u64 = 20;

/// The short form of an hour's work: `R3MAP_FSX_SECONDS=3600 cargo test -p r3map-cli --test e2e fsx` is the long one.
fn fsx(arguments: &'static [&'static str]) {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin/fsx");
    if !tool.exists() {
        return r3map_testkit::skip("fsx is not installed; `cargo xtask setup` does that");
    }
    let seconds = std::env::var("R3MAP_FSX_SECONDS").map_or(SECONDS, |text| text.parse().expect("a number of seconds"));
    let limit = Duration::from_secs(seconds);
    Scene::with_fuse(limit + LONG, move |scene| {
        make_file(&scene.path("source"), 3_000_001, 1);
        std::fs::write(scene.path("fsx.toml"), FSX).expect("there is room");
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", arguments);
        let (start, first) = (Instant::now(), r3map_testkit::random::fresh_seed() >> 16);
        for seed in (first..).take_while(|seed| *seed == first || start.elapsed() < limit) {
            let seed = seed.to_string();
            let command = &mut Command::new(&tool);
            command.args(["-f", &scene.name("fsx.toml"), "-P", &scene.name("."), "-N", OPERATIONS, "-S", &seed]);
            let mut fsx = scene.start(command.arg(mounted.name()));
            let status = fsx.wait(limit + LONG);
            assert!(status.success(), "fsx -S {seed}: {}", fsx.stderr().join("\n"));
        }
        // What fsx left must be what the source has.
        let left = std::fs::read(&mounted.path).expect("it can be read");
        mounted.open().sync_all().expect("it can be synced");
        assert!(left == std::fs::read(scene.path("source")).expect("it is there"), "the source has other bytes");
        mounted.unmount();
        server.stop();
    });
}

#[test]
fn fsx_on_a_managed_mount() {
    fsx(&["--push-interval", "20ms", "--chunk-size", "16KiB"]);
}

#[test]
fn fsx_on_a_managed_mount_with_little_room_for_changes() {
    fsx(&["--push-interval", "10ms", "--dirty-budget", "256KiB", "--pull-workers", "0"]);
}

#[test]
fn fsx_on_a_direct_mount() {
    fsx(&["--mode", "direct"]);
}

#[test]
fn tools_that_look_at_the_file() {
    Scene::with_fuse(SOON, |scene| {
        make_file(&scene.path("source"), MIB + 1, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let mounted = scene.mount(&server.uri, "region", &[]);
        scene.run(SOON, "cmp", &[&scene.name("source"), mounted.name()]);
        assert_eq!(scene.run(SOON, "stat", &["-c", "%F %s", mounted.name()]), format!("regular file {}", MIB + 1));
        let copy = scene.name("copy");
        scene.run(SOON, "dd", &[&format!("if={}", mounted.name()), &format!("of={copy}"), "bs=64K"]);
        scene.run(SOON, "cmp", &[&scene.name("source"), &copy]);
        scene.run(SOON, "cp", &[mounted.name(), &copy]);
        scene.run(SOON, "cmp", &[&scene.name("source"), &copy]);
        mounted.unmount();
    });
}
