//! The programs of a newer Debian on our server: those of the machine may be too old for extended headers.

use std::path::Path;
use std::sync::Arc;

use r3map_local::Memory;
use r3map_testkit::skip;
use serde_json::json;

use crate::support::{Running, contents, extents, filled, memory, parsed, run};

const GIB: u64 = 1 << 30;
/// No multiple of anything.
const ODD: u64 = (5 << 20) + 1234;

/// Where a program is.
fn newer(program: &str) -> Option<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/trixie/bin").join(program);
    if !path.exists() {
        skip(&format!("the {program} of a newer Debian is not there; `cargo xtask setup` gets it"));
        return None;
    }
    Some(path.to_str().expect("plain names").to_owned())
}

/// A sparse region that no 32 bits count, with a little in it.
fn large() -> Arc<Memory> {
    let memory = Memory::new(12 * GIB).unwrap();
    memory.write_now(9 * GIB, &filled(1 << 20, 1)).unwrap();
    Arc::new(memory)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_agrees_on_extended_headers_and_sees_extents_of_more_than_32_bits() {
    let Some(nbdinfo) = newer("nbdinfo") else { return };
    let running = Running::one(large()).await;
    let info = parsed(&run(&nbdinfo, &["--json", &running.uri("disk")]));
    assert_eq!((&info["structured"], &info["extended"]), (&json!(true), &json!(true)));
    let expected = json!({
        "export-name": "disk", "export-size": 12 * GIB, "is_read_only": false,
        "can_cache": true, "can_df": true, "can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true,
        "can_trim": true, "can_zero": true, "contexts": ["base:allocation"],
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&info["exports"][0][field], value, "{field}");
    }
    let map = parsed(&run(&nbdinfo, &["--map", "--json", &running.uri("disk")]));
    assert_eq!(extents(&map), [[0, 9 * GIB, 3], [9 * GIB, 1 << 20, 0], [9 * GIB + (1 << 20), 3 * GIB - (1 << 20), 3]]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_copies_both_ways_with_extended_headers() {
    let Some(nbdcopy) = newer("nbdcopy") else { return };
    let running = Running::one(memory(ODD, 1)).await;
    let (out, uri) = (running.file("out"), running.uri("disk"));
    let out = out.to_str().unwrap();
    run(&nbdcopy, &[&uri, out]);
    assert!(std::fs::read(out).unwrap() == filled(ODD, 1));
    let there = memory(ODD, 2);
    let running = Running::one(there.clone()).await;
    run(&nbdcopy, &["--flush", out, &running.uri("disk")]);
    assert!(contents(&there) == filled(ODD, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_reads_writes_zeroes_and_maps_with_extended_headers() {
    let (Some(qemu_io), Some(qemu_img)) = (newer("qemu-io"), newer("qemu-img")) else { return };
    let running = Running::one(large()).await;
    let uri = running.uri("disk");
    let said = run(
        &qemu_io,
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 10G 1M",
            "-c",
            "read -P 7 10G 1M",
            "-c",
            "read -P 0 0 1M",
            "-c",
            "write -z -u 9G 1M",
            "-c",
            "read -P 0 9G 1M",
            "-c",
            "discard 11G 1M",
            "-c",
            "flush",
            &uri,
        ],
    );
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    let map = parsed(&run(&qemu_img, &["map", "-f", "raw", "--output=json", &uri]));
    let data: Vec<_> = map.as_array().unwrap().iter().filter(|extent| extent["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&json!(10 * GIB), &json!(1 << 20)));
}
