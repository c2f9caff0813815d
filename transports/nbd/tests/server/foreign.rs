//! Other people's clients: libnbd's tools, qemu's, fio.

use std::sync::Arc;

use r3map_local::{Directory, DirectorySettings, Memory};
use r3map_nbd::{ServerExport, ServerSettings};
use r3map_testkit::store::Store;
use serde_json::json;

use crate::support::{Running, contents, extents, filled, memory, parsed, run, try_run};

const MIB: u64 = 1 << 20;
/// No multiple of anything.
const ODD: u64 = 5 * MIB + 1234;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_sees_every_field() {
    let running = Running::one(memory(ODD, 1)).await;
    let info = parsed(&run("nbdinfo", &["--json", &running.uri("disk")]));
    let expected = json!({
        "export-name": "disk", "export-size": ODD, "is_rotational": false, "is_read_only": false, "can_cache": true,
        "can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true,
        "can_trim": true, "can_zero": true, "block_size_minimum": 1, "block_size_preferred": 4096, "block_size_maximum": 33_554_432,
        "contexts": ["base:allocation"],
    });
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!((&info["TLS"], &info["structured"]), (&json!(false), &json!(true)));
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&info["exports"][0][field], value, "{field}");
    }
    assert_eq!(run("nbdinfo", &["--size", &running.uri("")]), ODD.to_string());
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_lists_exports_and_their_descriptions() {
    let mut second = ServerExport::new("häß/ 2", Arc::new(Store::new(4096).read_only()));
    second.description = "the second one".to_owned();
    let first = ServerExport::new("first", Arc::new(Store::new(5000).plain()));
    let running = Running::start(vec![first, second], ServerSettings::default()).await;
    let info = parsed(&run("nbdinfo", &["--json", "--list", &running.uri("")]));
    let exports = info["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 2, "{info}");
    assert_eq!((&exports[0]["export-name"], &exports[0]["export-size"]), (&json!("first"), &json!(5000)));
    assert_eq!((&exports[0]["can_trim"], &exports[0]["is_read_only"]), (&json!(false), &json!(false)));
    assert_eq!((&exports[1]["export-name"], &exports[1]["description"]), (&json!("häß/ 2"), &json!("the second one")));
    assert_eq!((&exports[1]["is_read_only"], &exports[1]["can_zero"]), (&json!(true), &json!(false)));
    let (success, output) = try_run("nbdinfo", &[&running.uri("third")]);
    assert!(!success && output.contains("No such file or directory for export: third"), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maps_of_nbdinfo_and_qemu_img_show_holes() {
    let memory = Arc::new(Memory::new(4 * MIB).unwrap());
    memory.write_now(MIB, &filled(2 * MIB, 1)).unwrap();
    let running = Running::one(memory).await;
    let map = parsed(&run("nbdinfo", &["--map", "--json", &running.uri("disk")]));
    assert_eq!(extents(&map), [[0, MIB, 3], [MIB, 2 * MIB, 0], [3 * MIB, MIB, 3]]);
    let map = parsed(&run("qemu-img", &["map", "--output=json", &running.uri("disk")]));
    let data: Vec<_> = map.as_array().unwrap().iter().map(|extent| (&extent["start"], &extent["data"])).collect();
    assert_eq!(data, [(&json!(0), &json!(false)), (&json!(MIB), &json!(true)), (&json!(3 * MIB), &json!(false))]);
    // A backend that does not know is all data.
    let running = Running::one(Arc::new(Store::new(MIB).plain())).await;
    let map = parsed(&run("nbdinfo", &["--map", "--json", &running.uri("disk")]));
    assert_eq!((map.as_array().unwrap().len(), &map[0]["type"]), (1, &json!(0)));
}

async fn nbdcopy_both_ways(options: &[&str]) {
    let running = Running::one(memory(ODD, 1)).await;
    let (out, uri) = (running.file("out"), running.uri("disk"));
    let out_path = out.to_str().unwrap();
    run("nbdcopy", &[options, &[&uri, out_path]].concat());
    assert!(std::fs::read(&out).unwrap() == filled(ODD, 1), "what was copied out is not what was there");
    let target = Arc::new(Memory::new(ODD).unwrap());
    let running = Running::one(target.clone()).await;
    std::fs::write(&out, filled(ODD, 2)).unwrap();
    run("nbdcopy", &[options, &[out_path, &running.uri("disk")]].concat());
    assert!(contents(&target) == filled(ODD, 2), "what was copied in is not what is there");
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_over_one_connection() {
    nbdcopy_both_ways(&["--connections=1"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_over_several_connections_with_flush() {
    nbdcopy_both_ways(&["--connections=4", "--requests=64", "--flush"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_of_small_requests_one_by_one() {
    nbdcopy_both_ways(&["--synchronous", "--request-size=4096"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_from_one_export_to_another_keeps_holes() {
    let source = Arc::new(Memory::new(8 * MIB).unwrap());
    source.write_now(3 * MIB + 17, &filled(MIB, 1)).unwrap();
    let target = memory(8 * MIB, 2);
    let exports = vec![ServerExport::new("source", source.clone()), ServerExport::new("target", target.clone())];
    let running = Running::start(exports, ServerSettings::default()).await;
    run("nbdcopy", &[&running.uri("source"), &running.uri("target")]);
    assert!(contents(&target) == contents(&source));
    let map = run("nbdinfo", &["--map", "--totals", &running.uri("target")]);
    assert!(map.contains("hole"), "{map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_chunks_that_waits_for_the_disk_is_copied_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let settings = DirectorySettings { size: Some(4 * MIB), create: true, ..DirectorySettings::default() };
    let directory = Directory::open(folder.path().join("chunks"), &settings).unwrap();
    let any = r3map_pipeline::Aligned::new(Arc::new(directory)).unwrap();
    let running = Running::one(Arc::new(any)).await;
    let file = running.file("data");
    std::fs::write(&file, filled(4 * MIB, 3)).unwrap();
    run("nbdcopy", &["--flush", file.to_str().unwrap(), &running.uri("disk")]);
    let out = running.file("out");
    run("nbdcopy", &[&running.uri("disk"), out.to_str().unwrap()]);
    assert!(std::fs::read(out).unwrap() == filled(4 * MIB, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_converts_and_compares() {
    let running = Running::one(memory(4 * MIB, 1)).await;
    let (copy, uri) = (running.file("copy.qcow2"), running.uri("disk"));
    let copy = copy.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, copy]);
    let target = memory(4 * MIB, 2);
    let second = Running::one(target.clone()).await;
    let target_uri = second.uri("disk");
    let (same, output) = try_run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", copy, &target_uri]);
    assert!(!same && output.contains("mismatch"), "{output}");
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", copy, &target_uri]);
    assert!(contents(&target) == filled(4 * MIB, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_writes_reads_zeroes_and_discards_at_odd_offsets() {
    let memory = memory(MIB + 77, 1);
    let running = Running::one(memory.clone()).await;
    let commands = [
        "write -P 0xab 4097 8191",
        "read -P 0xab 4097 8191",
        "write -f -P 0xcd 100000 333",
        "read -P 0xcd 100000 333",
        "write -z 200001 70001",
        "read -P 0 200001 70001",
        "write -z -u 300000 100000",
        "read -P 0 300000 100000",
        "discard 500001 100000",
        "flush",
        "aio_write -P 0x11 700000 65536",
        "aio_write -P 0x22 800000 65537",
        "aio_flush",
        "read -P 0x11 700000 65536",
        "read -P 0x22 800000 65537",
        "write -P 0x33 1048576 77",
        "read -P 0x33 1048576 77",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    let uri = running.uri("disk");
    arguments.push(&uri);
    let output = run("qemu-io", &arguments);
    assert!(!output.contains("failed"), "{output}");
    let mut expected = filled(MIB + 77, 1);
    expected[4097..4097 + 8191].fill(0xab);
    expected[100_000..100_333].fill(0xcd);
    expected[200_001..270_002].fill(0);
    expected[300_000..400_000].fill(0);
    expected[700_000..765_536].fill(0x11);
    expected[800_000..865_537].fill(0x22);
    expected[1_048_576..].fill(0x33);
    let mut found = contents(&memory);
    // Discarding is a hint, which qemu rounds inwards.
    let discarded = 500_001..600_001;
    assert!(
        found[discarded.clone()]
            .iter()
            .zip(&expected[discarded.clone()])
            .all(|(found, old)| *found == 0 || found == old)
    );
    found[discarded.clone()].copy_from_slice(&expected[discarded]);
    assert!(found == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_what_it_wrote() {
    if !run("fio", &["--enghelp"]).contains("nbd") {
        return r3map_testkit::skip("fio was built without NBD");
    }
    let running = Running::one(Arc::new(Memory::new(32 * MIB).unwrap())).await;
    let uri = format!("--uri={}", running.uri("disk"));
    let common = ["--name=v", "--ioengine=nbd", "--size=32M", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=32"];
    let verify =
        ["--rw=randrw", "--rwmixread=30", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randseed=1"];
    let directory = running.directory.path().to_str().unwrap().to_owned();
    let aux = format!("--aux-path={directory}");
    run("fio", &[&common[..], &verify[..], &[&uri, &aux, "--fsync=64"]].concat());
    running.is_left().await;
}

/// The one that Debian's packages are for: `nbdsh` itself takes the first in the path.
const PYTHON: &str = "/usr/bin/python3";

fn shell(arguments: &[&str]) {
    let output = run(PYTHON, &[&["-m", "nbd"], arguments, &["-c", "print('to the end')"]].concat());
    assert_eq!(output, "to the end");
}

/// A script for nbdsh. Its assertions are Python's.
fn nbdsh(running: &Running, export: &str, script: &str) {
    let uri = running.uri(export);
    shell(&["--base-allocation", "--uri", &uri, "-c", script]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdsh_finds_errors_where_they_belong_and_goes_on() {
    let running = Running::one(memory(MIB, 1)).await;
    nbdsh(
        &running,
        "disk",
        r#"
import errno
h.set_strict_mode(0)
def fails(number, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errnum == number, (error, number)
    else:
        raise Exception("it did not fail")
size = h.get_size()
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.ENOSPC, h.pwrite, b"x" * 512, size - 511)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.EINVAL, h.block_status, 512, size, lambda *a: 0)
fails(errno.EINVAL, h.pwrite, b"x", 0, nbd.CMD_FLAG_DF)
fails(errno.EINVAL, h.pread, 1, 0, nbd.CMD_FLAG_REQ_ONE)
fails(errno.ENOTSUP, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(512, 0) == bytes(512)
h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.pwrite(b"odd", 1001, nbd.CMD_FLAG_FUA)
assert h.pread(3, 1001) == b"odd"
h.cache(size, 0)
h.trim(size, 0, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(size, 0) == bytes(size)
found = []
h.block_status(size, 0, lambda context, offset, entries, error: found.append((context, offset, list(entries))) or 0)
assert found == [("base:allocation", 0, [size, 3])], found
h.pwrite(b"x", 70000)
found.clear()
h.block_status(size, 0, lambda c, o, entries, e: found.append(list(entries)) or 0, nbd.CMD_FLAG_REQ_ONE)
assert found == [[65536, 3]], found
chunks = []
h.pread_structured(200000, 0, lambda data, offset, status, error: chunks.append((len(data), offset, status)) or 0)
assert sorted(chunks, key=lambda c: c[1]) == [(65536, 0, 2), (65536, 65536, 1), (68928, 131072, 2)], chunks
chunks.clear()
h.pread_structured(65536, 32768, lambda data, offset, status, error: chunks.append((len(data), status)) or 0, nbd.CMD_FLAG_DF)
assert chunks == [(65536, 1)], chunks
assert h.pread(0, 0) == b""
"#,
    );
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdsh_asks_for_too_much_and_goes_on() {
    let running = Running::one(Arc::new(Memory::new(80 * MIB).unwrap())).await;
    nbdsh(
        &running,
        "disk",
        r#"
import errno
h.set_strict_mode(0)
for number, ask in [
    (errno.EOVERFLOW, lambda: h.pread(33 << 20, 0)),
    (errno.EINVAL, lambda: h.pwrite(b"x" * (33 << 20), 0)),
]:
    try:
        ask()
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise Exception("it was done")
    h.pwrite(b"y" * (32 << 20), 12345)
    assert h.pread(32 << 20, 12345) == b"y" * (32 << 20)
h.zero(80 << 20, 0)
h.trim(80 << 20, 0)
h.cache(80 << 20, 0)
"#,
    );
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdsh_cannot_change_what_is_read_only() {
    let mut export = ServerExport::new("disk", memory(MIB, 1));
    export.read_only = true;
    let running = Running::start(vec![export], ServerSettings::default()).await;
    nbdsh(
        &running,
        "disk",
        r#"
import errno
h.set_strict_mode(0)
assert h.is_read_only() and not h.can_zero() and not h.can_trim()
for change in [lambda: h.pwrite(b"x", 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)]:
    try:
        change()
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
    else:
        raise Exception("it was changed")
h.flush()
"#,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdsh_without_structured_replies_and_without_go() {
    let running = Running::one(memory(MIB, 1)).await;
    let socket = running.socket();
    let script = format!(
        r#"
h.set_request_structured_replies(False)
h.set_handshake_flags(FLAGS)
h.set_opt_mode(OPT)
h.set_export_name("disk")
h.connect_unix("{}")
if OPT:
    h.opt_go()
assert not h.get_structured_replies_negotiated()
data = h.pread(100000, 12345)
h.pwrite(data, 500001)
assert h.pread(100000, 500001) == data
try:
    h.set_strict_mode(0)
    h.pread(512, h.get_size())
except nbd.Error as error:
    assert error.errno == "EINVAL", error
else:
    raise Exception("it did not fail")
h.shutdown()
"#,
        socket.display()
    );
    for (flags, haggles) in [("0", "False"), ("nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE", "True"), ("3", "True")] {
        let script = script.replace("FLAGS", flags).replace("OPT", haggles);
        shell(&["-c", &script]);
    }
    running.is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_on_one_connection_covers_writes_of_another() {
    let store = Arc::new(Store::new(MIB).volatile_cache());
    let running = Running::one(store.clone()).await;
    let script = format!(
        r#"
other = nbd.NBD()
other.connect_uri("{}")
assert h.can_multi_conn() and other.can_multi_conn()
h.pwrite(b"one" * 1000, 1000)
other.flush()
h.pwrite(b"two" * 1000, 100000)
other.pwrite(b"fua" * 1000, 200000, nbd.CMD_FLAG_FUA)
h.pwrite(b"three" * 1000, 300000)
"#,
        running.uri("disk")
    );
    nbdsh(&running, "disk", &script);
    store.lose_unflushed();
    let bytes = store.snapshot();
    let is = |at: usize, word: &[u8]| bytes[at..at + 1000 * word.len()] == word.repeat(1000)[..];
    assert!(is(1000, b"one"), "flushed");
    assert!(is(100_000, b"two"), "FUA flushes the backend, so this too");
    assert!(is(200_000, b"fua"), "written durably");
    assert!(is(300_000, b"\0\0\0\0\0"), "nobody flushed this");
}
