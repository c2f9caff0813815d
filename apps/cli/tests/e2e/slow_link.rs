//! A slow link, and nothing set for it: time-outs count silence, so what moves gets there.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use r3map_testkit::proxy::DelayProxy;

use crate::support::{MIB, SOON, Scene, Served, make_file};

const LONG: Duration = Duration::from_secs(180);
/// 1 Mbit/s, in bytes.
const MEGABIT: u64 = 125_000;

/// A line of so many bits a second to a server.
fn line(server: &Served, megabits: f64) -> (DelayProxy, String) {
    let proxy = DelayProxy::tcp(server.address(), Duration::from_millis(50)).expect("it can listen");
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some bits a second")]
    proxy.set_rate(NonZeroU64::new((MEGABIT as f64 * megabits) as u64));
    let uri = format!("grpc://{}", proxy.socket_addr());
    (proxy, uri)
}

/// One request takes longer than any may be silent, all of them longer than unmounting has for what the kernel holds.
#[test]
fn everything_is_stored_over_a_link_of_half_a_megabit() {
    Scene::with_fuse(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), 8 * MIB, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let (_proxy, uri) = line(&server, 0.5);
        let mounted = scene.mount(&uri, "region", &["--pull-workers", "0", "--push-interval", "1h"]);
        let bytes = expected.write(MIB..6 * MIB, 2);
        mounted.open().write_all_at(&bytes, MIB).expect("it can be written");
        mounted.program.terminate();
        let start = Instant::now();
        let outcome = mounted.program.end_well(LONG);
        assert!(start.elapsed() > Duration::from_secs(70), "that was not half a megabit: {outcome:?}");
        assert!(
            outcome.events().iter().all(|event| event["event"] != "waiting"),
            "nothing was tried again: {outcome:?}"
        );
        expected.keep();
        expected.check_file(&scene.path("source"));
    });
}

/// The same through a device, which has a time-out of its own for being removed.
#[test]
fn everything_is_stored_through_a_device_over_a_link_of_half_a_megabit() {
    Scene::with_root(LONG, |scene| {
        let mut expected = make_file(&scene.path("source"), 8 * MIB, 1);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        let (_proxy, uri) = line(&server, 0.5);
        let device = scene.name("disk");
        let settings = ["--as", "loop", "--pull-workers", "0", "--push-interval", "1h"];
        let mut program = scene.r3map(&[&["--json", "mount", &uri, &device], &settings[..]].concat());
        program.wait_for_event(SOON, "ready");
        let bytes = expected.write(MIB..6 * MIB, 2);
        let file = File::options().write(true).open(&device).expect("the link leads to the device");
        file.write_all_at(&bytes, MIB).expect("it can be written");
        drop(file);
        program.terminate();
        let start = Instant::now();
        program.end_well(LONG);
        assert!(start.elapsed() > Duration::from_secs(70), "that was not half a megabit");
        expected.keep();
        expected.check_file(&scene.path("source"));
    });
}

/// What is pulled in the background does not make readers fail who wait behind it.
#[test]
fn everything_is_read_over_a_link_of_a_megabit() {
    Scene::with_fuse(LONG, |scene| {
        let expected = make_file(&scene.path("source"), 4 * MIB, 3);
        let server = scene.serve(&format!("file:{}", scene.name("source")), &[]);
        for mode in ["managed", "direct"] {
            let (proxy, uri) = line(&server, 1.0);
            let mounted = scene.mount(&uri, "region", &["--mode", mode]);
            let mut last = [0; 4096];
            mounted.open().read_exact_at(&mut last, 4 * MIB - 4096).expect("it comes, before or behind the rest");
            expected.check(4 * MIB - 4096, &last).unwrap_or_else(|wrong| panic!("{wrong}"));
            expected.check_file(&mounted.path);
            proxy.set_rate(None);
            mounted.unmount();
        }
    });
}
