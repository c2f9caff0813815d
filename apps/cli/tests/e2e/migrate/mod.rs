//! `r3map seed`, `r3map leech` and `r3map demo migrate`: regions that change hosts while they are used.

mod demo;
mod full_disk;
mod killed;
mod moves;
mod patience;
mod refusals;
mod stopped;
mod taken_back;

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use r3map_testkit::proxy::DelayProxy;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{MIB, Outcome, Program, SOON, Scene, Stamps, make_file};

pub(crate) const LISTEN: [&str; 2] = ["--listen", "grpc://127.0.0.1:0"];
const SIZE: u64 = 8 * MIB;
/// Bytes a second of a link on which the region takes long, also as a busy machine sees it.
const SLOW: u64 = MIB / 2;
/// A few stamps.
const FEW: usize = 100;

/// `r3map seed`, or `r3map leech --then-seed`, and where it can be reached.
pub(crate) struct Seeder {
    pub(crate) program: Program,
    pub(crate) uri: String,
}

impl Seeder {
    pub(crate) fn address(&self) -> SocketAddr {
        self.uri.trim_start_matches("grpc://").parse().expect("it is a TCP address")
    }

    /// It has handed the region over and has nothing to do any more.
    pub(crate) fn ends(self) {
        let gone = self.program.end_well(SOON);
        gone.event("handed_over");
        gone.event("gone");
    }
}

/// Seeds a file of `size` bytes on the path `here`.
fn seed_file(scene: &Scene, size: u64, more: &[&str]) -> (Seeder, PathBuf, Stamps) {
    seed_file_at(scene, ("disk.img", "here"), size, more)
}

/// The same with these names of the file and the path.
pub(crate) fn seed_file_at(
    scene: &Scene,
    (image, path): (&str, &str),
    size: u64,
    more: &[&str],
) -> (Seeder, PathBuf, Stamps) {
    make_file(&scene.path(image), size, 1);
    let (region, here) = (format!("file:{}", scene.name(image)), scene.name(path));
    let seeder = seed(scene, &[&[region.as_str(), &here], &LISTEN[..], more].concat());
    (seeder, scene.path(path), Stamps::new(size, 1))
}

fn seed(scene: &Scene, arguments: &[&str]) -> Seeder {
    let mut program = scene.r3map(&[&["--json", "seed"], arguments].concat());
    let uri = address(&mut program, "ready");
    Seeder { program, uri }
}

/// Seeds the file of [`seed_file`] once more, also where it must not be shown.
fn seed_again(scene: &Scene, more: &[&str]) -> Seeder {
    let (region, here) = (format!("file:{}", scene.name("disk.img")), scene.name("here"));
    seed(scene, &[&[region.as_str(), &here], &LISTEN[..], more].concat())
}

fn address(program: &mut Program, event: &str) -> String {
    program.wait_for_event(SOON, event)["uri"].as_str().expect("it tells its address").to_owned()
}

pub(crate) fn leech(scene: &Scene, uri: &str, path: &str, more: &[&str]) -> Program {
    scene.r3map(&[&["--json", "leech", uri, &scene.name(path)], more].concat())
}

/// A leech that moves the region as soon as it knows of it, over a slow line that stalls then: nearly all of it is
/// missing, and does not come.
fn leech_at_once(scene: &Scene, seeder: &Seeder, path: &str, more: &[&str]) -> (Program, DelayProxy) {
    let line = DelayProxy::tcp(seeder.address(), Duration::ZERO).expect("a port is free");
    line.set_rate(NonZeroU64::new(SLOW));
    let uri = format!("grpc://{}", line.socket_addr());
    let mut leecher = leech(scene, &uri, path, &[&["--finalize", "manual"], more].concat());
    leecher.wait_for_event(SOON, "connected");
    tell(&leecher);
    leecher.wait_for_event(SOON, "running");
    line.stall();
    (leecher, line)
}

/// The leecher goes on from its cache, after which the seeder has nothing to do any more.
fn goes_on(scene: &Scene, seeder: Seeder, cache: &[&str], stamps: &Stamps) -> Program {
    scene.step("the same command again");
    let mut leecher = leech(scene, &seeder.uri, "there", cache);
    leecher.wait_for_event(SOON, "resuming");
    assert_eq!(leecher.wait_for_event(SOON, "running")["resumed"], true);
    leecher.wait_for_event(SOON, "pulled");
    seeder.ends();
    stamps.check(&scene.path("there"));
    leecher
}

/// Sends SIGUSR1.
pub(crate) fn tell(leecher: &Program) {
    let id = Pid::from_raw(leecher.id().try_into().expect("process ids are small")).expect("it is one");
    kill_process(id, Signal::USR1).expect("it runs");
}

/// That something went wrong is said in one line.
fn complains(outcome: &Outcome, what: &str) {
    let errors: Vec<_> = outcome.err.iter().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains(what), "{outcome:?}");
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
}

/// As [`complains`], of a command that was started with `--json`.
fn complains_as_event(outcome: &Outcome, what: &str) {
    let error = outcome.event("error")["message"].to_string();
    assert!(outcome.code == Some(1) && error.contains(what), "{outcome:?}");
}

fn leech_ended(scene: &Scene, arguments: &[&str]) -> Outcome {
    scene.ended(&[&["leech"], arguments].concat())
}

/// A seeder whose application takes its time to stop, until `may-go` or `may-not` is there.
fn slow_to_stop(scene: &Scene) -> (Seeder, PathBuf, Stamps) {
    let (go, no) = (scene.name("may-go"), scene.name("may-not"));
    let suspend = format!("until test -e {go} -o -e {no}; do sleep 0.01; done; test -e {go}");
    seed_file(scene, MIB, &["--on-suspend", &suspend, "--hook-timeout", "1h"])
}
