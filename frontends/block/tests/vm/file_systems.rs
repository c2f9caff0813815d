//! A file system on a device, and programs that check it.

use std::sync::Arc;

use r3map_core::Operation;
use r3map_testkit::faults::Faults;
use r3map_testkit::in_vm;
use r3map_testkit::store::Store;

use crate::support::{Mounted, app, device, each_kind, name, run, unmount};

const SIZE: u64 = 32 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn ext4_is_sound_and_trims_reach_the_backend() {
    if !in_vm() {
        return;
    }
    each_kind(async |kind| {
        let faults = Faults::new(Arc::new(Store::new(SIZE)));
        let device = device(kind, faults.clone()).await;
        let path = device.path().to_owned();
        let trimmed = faults.clone();
        app(move || {
            run("mkfs.ext4", &["-q", "-F", &name(&path)]);
            let mounted = Mounted::new(&path);
            let file = format!("--filename={}", name(&mounted.path("file")));
            let job =
                ["--name=v", &file, "--size=4M", "--rw=randwrite", "--bs=16k", "--verify=crc32c", "--end_fsync=1"];
            run("fio", &[&job[..], &["--ioengine=libaio", "--iodepth=16", "--direct=1"]].concat());
            let before = trimmed.bytes(Operation::Trim);
            std::fs::remove_file(mounted.path("file")).unwrap();
            run("sync", &[]);
            crate::support::wait_until("the removed file is trimmed", || trimmed.bytes(Operation::Trim) > before);
            mounted.unmount();
            run("e2fsck", &["-fn", &name(&path)]);
        })
        .await;
        assert!(faults.count(Operation::Flush) > 0, "{kind}: the journal was flushed");
        unmount(device).await;
    })
    .await;
}
