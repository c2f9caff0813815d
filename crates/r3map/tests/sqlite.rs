//! A database in a region that moves to and fro between two hosts, which are network namespaces with a link of 20 ms
//! between them. Its writer is stopped when the region leaves, and another goes on where the region has come to.
//!
//! Each stay is a process of its own on one of the hosts: it fetches the region from the process before, writes, and
//! hands over to the next.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use r3map::migration::{Hooks, Migration, Place, Seeding};
use r3map::{Mount, OpenOptions, Registry, Uri};
use r3map_testkit::hosts::Hosts;
use r3map_testkit::process::Process;
use r3map_testkit::proxy::DelayProxy;
use r3map_testkit::{crash, deadline, skip};

const TEST: &str = "a_database_moves_between_hosts_and_every_acknowledged_transaction_is_there";
/// How long anything may take that takes no time on an idle machine.
const SOON: Duration = Duration::from_secs(60);
const RTT: Duration = Duration::from_millis(20);
const MOVES: usize = 6;
/// What must be acknowledged, and how long it is written at least, before the region moves on.
const TRANSACTIONS: u64 = 20;
const STAY: Duration = Duration::from_secs(2);
const SIZE: u64 = 64 << 20;

#[test]
fn a_database_moves_between_hosts_and_every_acknowledged_transaction_is_there() {
    if let Some(argument) = crash::role("stay") {
        return stay(&argument);
    }
    if !Path::new("/dev/fuse").exists() {
        return skip("there is no /dev/fuse");
    }
    if Command::new("sqlite3").arg("-version").output().is_err() {
        return skip("sqlite3 is not installed");
    }
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let image = make_database(folder.path());
    let mut here = stay_on(&hosts, 0, &format!("file:{}", image.display()), folder.path());
    after(&mut here, "found ");
    for hop in 1..=MOVES {
        let from = after(&mut here, "seeding at ");
        let acknowledged = write_for_a_while(&mut here);
        let mut there = stay_on(&hosts, hop, &from, folder.path());
        let left: u64 = after(&mut here, "left with ").parse().unwrap();
        let found: u64 = after(&mut there, "found ").parse().unwrap();
        assert!(
            acknowledged <= left && left == found,
            "move {hop}: {acknowledged} acknowledged, {left}, {found} found"
        );
        assert!(here.wait(SOON).success(), "the old side ends by itself");
        here = there;
    }
    let last: u64 = after(&mut here, "left with ").parse().unwrap();
    assert_eq!(after(&mut here, "integrity "), "ok");
    assert_eq!(after(&mut here, "there are "), format!("{last} up to {last}"));
    assert!(here.wait(SOON).success());
}

/// What comes after `words` in the next line that has them.
fn after(process: &mut Process, words: &str) -> String {
    let line = process.wait_for_line(SOON, words);
    line.split_once(words).expect("the line has them").1.to_owned()
}

/// Watches transactions being acknowledged; the last of them.
fn write_for_a_while(process: &mut Process) -> u64 {
    let begun = Instant::now();
    let first: u64 = after(process, "done ").parse().unwrap();
    loop {
        let last: u64 = after(process, "done ").parse().unwrap();
        if last >= first + TRANSACTIONS && begun.elapsed() >= STAY {
            return last;
        }
    }
}

/// An empty database at the beginning of a file as long as the region.
fn make_database(folder: &Path) -> PathBuf {
    let image = folder.join("image");
    run("sqlite3", &[image.to_str().unwrap(), "CREATE TABLE entries(number INTEGER PRIMARY KEY, body BLOB)"]);
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(SIZE).unwrap();
    image
}

/// Runs a program to its good end; what it said.
fn run(program: &str, arguments: &[&str]) -> String {
    let mut process = Process::start(Command::new(program).args(arguments));
    let status = process.wait(SOON);
    let (out, errors) = (process.stdout().join("\n"), process.stderr().join("\n"));
    assert!(status.success(), "{program} {arguments:?}: {status}\n{errors}");
    out
}

/// A process on one of the hosts, then on the other. Its mounts are its own, and go with it.
fn stay_on(hosts: &Hosts, hop: usize, from: &str, folder: &Path) -> Process {
    let argument = format!("{hop} {from} {}", folder.display());
    crash::child_through(&hosts.wrapper(hop % 2), TEST, "stay", &argument)
}

/// The process on a host.
fn stay(argument: &str) {
    let [hop, from, folder] = argument.split(' ').collect::<Vec<_>>()[..] else { panic!("{argument}") };
    let hop: usize = hop.parse().unwrap();
    let place = Path::new(folder).join(format!("stay-{hop}"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        match hop {
            0 => first(from, &place).await,
            _ => arrived(from, &place, hop).await,
        }
    });
}

async fn first(image: &str, place: &Path) {
    let registry = Registry::standard();
    let region = registry.open(&image.parse().unwrap(), &OpenOptions::default()).await.unwrap();
    let mount = Mount::direct(region).migratable().path(place).await.unwrap();
    let (writer, regions) = (Writer::start(place).await, vec![("database".into(), mount.source().unwrap())]);
    let listen = listen(0);
    let seeding = Migration::new().hooks(writer.hooks()).seed(&registry, &listen, regions).await.unwrap();
    hand_over(seeding).await;
    mount.abandon().await;
}

async fn arrived(from: &str, place: &Path, hop: usize) {
    let registry = Registry::standard();
    let target = from.strip_prefix("grpc://").and_then(|rest| rest.split('/').next()).unwrap();
    let link = DelayProxy::tcp(target.parse::<std::net::SocketAddr>().unwrap(), RTT).unwrap();
    let uri: Uri = from.replace(target, &link.socket_addr().to_string()).parse().unwrap();
    let leeching = Migration::new().leech(&registry, &uri, vec![Place::path(place)]);
    let leecher = deadline(SOON, "connecting", leeching).await.unwrap();
    deadline(SOON, "copying", leecher.ready()).await.unwrap();
    let running = deadline(SOON, "moving", leecher.finalize()).await.map_err(|left| left.error).unwrap();
    let writer = Writer::start(place).await;
    deadline(SOON, "the rest", running.pulled()).await.unwrap();
    let mount = running.regions()[0].clone();
    if hop == MOVES {
        writer.stop().await;
        let ask = |question| run("sqlite3", &[place.to_str().unwrap(), question]);
        crash::reached(&format!("integrity {}", ask("PRAGMA integrity_check")));
        let found = ask("SELECT count(*) || ' up to ' || max(number) FROM entries");
        crash::reached(&format!("there are {found}"));
        return mount.path().unwrap().close().await.unwrap();
    }
    let seeding = Migration::new().hooks(writer.hooks()).release(&registry, &listen(hop), running).await.unwrap().1;
    hand_over(seeding).await;
    mount.path().unwrap().abandon().await;
}

fn listen(hop: usize) -> Vec<Uri> {
    vec![format!("grpc://{}:0", Hosts::address(hop % 2)).parse().unwrap()]
}

/// Waits until the next host has everything.
async fn hand_over(seeding: Seeding) {
    crash::reached(&format!("seeding at {}", seeding.uris()[0]));
    deadline(SOON * 2, "the next host", seeding.seeder().gone()).await;
    seeding.close().await.unwrap();
}

/// A program that commits numbered transactions and says so after each.
#[derive(Clone)]
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Writer {
    async fn start(database: &Path) -> Self {
        let mut process = Process::start(Command::new("sqlite3").arg("-bail").arg(database));
        let opening = tokio::task::spawn_blocking(move || {
            // What it says on its standard error comes at once.
            process.send(".output stderr\nPRAGMA synchronous=EXTRA;\n");
            process.send("SELECT 'last ' || coalesce(max(number), 0) FROM entries;\n");
            let last: u64 = after(&mut process, "last ").parse().unwrap();
            crash::reached(&format!("found {last}"));
            (process, last)
        });
        let (mut process, mut last) = opening.await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = std::thread::spawn(move || {
            while !asked.load(Ordering::SeqCst) {
                last += 1;
                let row = format!("{last}, randomblob({})", 100 + last * 37 % 2000);
                process.send(&format!("BEGIN; INSERT INTO entries VALUES({row}); COMMIT; SELECT 'done {last}';\n"));
                process.wait_for_line(SOON, &format!("done {last}"));
                crash::reached(&format!("done {last}"));
            }
            process.close_stdin();
            assert!(process.wait(SOON).success());
            crash::reached(&format!("left with {last}"));
        });
        Self { stop, thread: Arc::new(Mutex::new(Some(thread))) }
    }

    /// Stops it when its region leaves.
    fn hooks(&self) -> Hooks {
        let writer = self.clone();
        Hooks::default().on_suspend(move || {
            let writer = writer.clone();
            async move {
                writer.stop().await;
                Ok(())
            }
        })
    }

    /// Has it finish its transaction, and close the database.
    async fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.lock().unwrap().take().expect("it is stopped once");
        let ended = tokio::task::spawn_blocking(move || thread.join());
        ended.await.unwrap().expect("the writer has not failed");
    }
}
