//! A process that may have no more files open.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::support::{SOON, Scene, block_on, open, wait_until};

const FILES: usize = 64;
const PLACES: [&str; 2] = ["grpc://127.0.0.1:0", "nbd://127.0.0.1:0/x"];

#[test]
fn who_cannot_listen_for_want_of_descriptors_is_told_what_to_do() {
    Scene::play(SOON, |scene| {
        for place in PLACES {
            let mut arguments = vec!["serve", "memory:?size=1MiB"];
            (0..FILES).for_each(|_| arguments.extend(["--listen", place]));
            let outcome = scene.r3map_with_files(FILES, &arguments).end(SOON);
            let [error] = outcome.err.as_slice() else { panic!("it does not say one line: {outcome:?}") };
            assert!(outcome.code == Some(1) && error.starts_with("error: "), "{outcome:?}");
            for words in ["cannot listen on", "(exhausted)", "ulimit -n", "Too many open files"] {
                assert!(error.contains(words), "{words:?}: {outcome:?}");
            }
        }
    });
}

/// Those who are connected notice nothing, those who come wait, and it does not try all the time to let them in.
#[test]
fn a_server_without_descriptors_goes_on() {
    Scene::play(SOON, |scene| {
        for place in PLACES {
            let arguments = ["--json", "serve", "memory:?size=1MiB", "--listen", place];
            let mut server = scene.r3map_with_files(FILES, &arguments);
            let uri = server.wait_for_event(SOON, "ready")["uri"].as_str().expect("it tells its address").to_owned();
            let region = open(&uri);
            let address = address(&uri);
            let crowd: Vec<_> =
                (0..2 * FILES).map(|_| TcpStream::connect(address).expect("the queue is long")).collect();
            wait_until(SOON, "no descriptor is left", || descriptors(server.id()) >= FILES - 1);
            let read = || block_on(region.read_at(4096, &mut [0; 4096])).expect("it is connected");
            wait_until(SOON, "it is seen that the server works", || {
                read();
                worked(server.id()) > Duration::ZERO
            });
            let (worked, began) = (worked(server.id()), Instant::now());
            while began.elapsed() < Duration::from_secs(1) {
                read();
                std::thread::sleep(Duration::from_millis(20));
            }
            let (worked, passed) = (self::worked(server.id()) - worked, began.elapsed());
            assert!(worked < passed / 2, "it is busy for {worked:?} of {passed:?}");
            drop(crowd);
            scene.r3map(&["info", &uri]).end_well(SOON);
            server.terminate();
            server.end_well(SOON);
        }
    });
}

fn address(uri: &str) -> SocketAddr {
    let address = uri.split("://").nth(1).and_then(|rest| rest.split('/').next());
    address.and_then(|address| address.parse().ok()).unwrap_or_else(|| panic!("{uri} has no address"))
}

/// How many a process has.
fn descriptors(process: u32) -> usize {
    std::fs::read_dir(format!("/proc/{process}/fd")).expect("it runs").count()
}

/// How long a process has run on a processor, with the threads that have ended: `utime` and `stime` of proc_pid_stat(5).
fn worked(process: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    // Behind the name, which may have spaces in it, comes the third field.
    let (_, fields) = stat.rsplit_once(')').expect("it has a name");
    let times = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("it is a number"));
    Duration::from_millis(times.sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second())
}
