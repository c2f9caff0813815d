//! `r3map demo migrate`.

use crate::commands::processes_in_group;
use crate::support::{MIB, SOON, Scene, wait_until};

#[test]
fn the_demo_proves_that_no_count_is_lost() {
    Scene::play(SOON, |scene| {
        let outcome = scene.r3map(&["--json", "demo", "migrate", "--size", "8MiB", "--rtt", "5ms"]).end_well(SOON);
        let proved = outcome.event("proved");
        let number = |name: &str| proved[name].as_f64().unwrap_or_else(|| panic!("{proved}"));
        assert!(number("before") > 0.0 && number("after") > 0.0 && number("pause_seconds") > 0.0, "{proved}");
        assert!(outcome.event("moved")["pulled_before"].as_u64().is_some_and(|bytes| bytes >= 8 * MIB), "{outcome:?}");
    });
}

/// Whether it is interrupted or killed, the process that the program moves to ends too.
#[test]
fn the_demo_leaves_no_process_behind() {
    Scene::play(SOON, |scene| {
        for kill in [false, true] {
            let mut demo = scene.r3map(&["--json", "demo", "migrate", "--size", "8MiB", "--rtt", "5ms"]);
            // From here on the other process counts for some time.
            demo.wait_for_event(SOON, "moved");
            if kill {
                demo.kill();
            } else {
                demo.interrupt();
            }
            demo.wait(SOON);
            wait_until(SOON, "the other process ends", || processes_in_group(demo.id()) == 0);
        }
    });
}
