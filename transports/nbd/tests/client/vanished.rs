//! Peers that are gone without a word, as when their host loses its power or the way to them is cut: no end of the
//! stream, no refusal, nothing.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::{Backend, ErrorKind, Operation};
use r3map_nbd::{Address, Client, ClientSettings, NbdUri, Server, ServerExport, ServerSettings};
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::hosts::Hosts;
use r3map_testkit::store::Store;
use r3map_testkit::{deadline, fill};
use tokio::runtime::{Builder, Runtime};

use crate::support::read;

const SIZE: u64 = 1 << 20;
/// How long anything may take that takes no time on an idle machine.
const SOON: Duration = Duration::from_secs(60);
/// What a loaded machine may add to a limit. Without it the system would wait for a quarter of an hour.
const SLACK: Duration = Duration::from_secs(30);

/// A client's host and a server's with what runs there.
struct Scene {
    hosts: Hosts,
    near: Runtime,
    far: Runtime,
    calls: Arc<Faults>,
    server: Server,
    uri: NbdUri,
}

impl Scene {
    /// A server on one host. Nothing where there are no hosts.
    fn new(settings: ServerSettings) -> Option<Self> {
        let hosts = Hosts::new()?;
        let runtime = || Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (near, far) = (hosts.on(0, runtime), hosts.on(1, runtime));
        let calls = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
        let server = Server::new(vec![ServerExport::new("", calls.clone())], settings).unwrap();
        let any = Address::Tcp { host: Hosts::address(1), port: 0 };
        let bound = hosts.on(1, || far.block_on(server.listen(&any)).unwrap());
        let uri = format!("nbd://{bound}").parse().unwrap();
        Some(Self { hosts, near, far, calls, server, uri })
    }

    /// A client on the other host.
    fn client(&self, settings: ClientSettings) -> Arc<Client> {
        Arc::new(self.near.block_on(Client::connect(self.uri.clone(), settings)).unwrap())
    }

    /// Does something on the client's host.
    fn near<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        self.near.block_on(deadline(SOON * 2, what, work))
    }
}

fn hasty(silence: Duration) -> ClientSettings {
    ClientSettings { silence, connect_timeout: Duration::from_secs(1), ..ClientSettings::default() }
}

#[test]
fn calls_to_a_server_that_has_vanished_fail_in_time_and_work_when_it_is_back() {
    let Some(scene) = Scene::new(ServerSettings::default()) else { return };
    let settings = hasty(Duration::from_secs(1));
    let limit = settings.silence + settings.connect_timeout + SLACK;
    let client = scene.client(settings);
    scene.near("writing", async { client.write_at(0, &fill::bytes(0, 1000, 2)).await.unwrap() });
    scene.near("flushing", client.flush()).unwrap();
    scene.hosts.cut();
    let start = Instant::now();
    let mut buf = [0; 1000];
    let (read_in_vain, written_in_vain) =
        scene.near("failing", async { tokio::join!(client.read_at(0, &mut buf), client.write_at(4096, &[9; 512])) });
    let took = start.elapsed();
    for result in [read_in_vain, written_in_vain] {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    assert!(took < limit, "{took:?}");
    scene.hosts.mend();
    let back = scene.near("reading again", read(&*client, 0, 1000));
    fill::check(&back, 0, 2).unwrap();
    scene.near("writing again", client.write_at(8192, &[3; 100])).unwrap();
    scene.near("flushing again", client.flush()).unwrap();
    assert_eq!(scene.near("reading what was written", read(&*client, 8192, 100)), [3; 100]);
}

#[test]
fn a_break_that_is_shorter_than_the_limit_goes_unnoticed() {
    let Some(scene) = Scene::new(ServerSettings::default()) else { return };
    // With two calls at once it would open another one if it might, which may be there in the end or not.
    let client = scene.client(ClientSettings { connections: NonZeroUsize::MIN, ..ClientSettings::default() });
    scene.hosts.cut();
    let both = {
        let client = client.clone();
        scene.near.spawn(async move {
            let mut buf = [0; 1000];
            let (read, written) = tokio::join!(client.read_at(0, &mut buf), client.write_at(4096, &[9; 512]));
            read.and(written).map(|()| buf)
        })
    };
    std::thread::sleep(Duration::from_millis(300));
    assert!(!both.is_finished(), "the wire is cut");
    scene.hosts.mend();
    let read = scene.near("both", both).unwrap().unwrap();
    fill::check(&read, 0, 1).unwrap();
    assert_eq!(scene.server.connections(), 1, "it is the connection of before");
}

/// What a client has sent may still arrive after it has given the connection up, and the wire works again.
#[test]
fn a_write_that_was_given_up_during_a_break_never_lands_after_a_later_one() {
    let Some(scene) = Scene::new(ServerSettings::default()) else { return };
    let client = scene.client(ClientSettings { connections: NonZeroUsize::MIN, ..hasty(Duration::from_secs(4)) });
    scene.hosts.cut();
    let error = scene.near("giving up", client.write_at(0, &fill::bytes(0, 1000, 2))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    scene.hosts.mend();
    scene.near("the later one", client.write_at(0, &fill::bytes(0, 1000, 3))).unwrap();
    // Whatever is still on its way has arrived when the server has closed the old connection.
    let end = Instant::now() + SOON;
    while scene.server.connections() > 1 {
        assert!(Instant::now() < end, "the old connection is still open");
        std::thread::sleep(Duration::from_millis(10));
    }
    fill::check(&scene.near("reading", read(&*client, 0, 1000)), 0, 3).unwrap();
}

#[test]
fn clients_that_have_vanished_give_up_their_places_and_disturb_nobody() {
    let stall_limit = Duration::from_secs(3);
    let settings =
        ServerSettings { stall_limit, connections: NonZeroUsize::new(4).unwrap(), ..ServerSettings::default() };
    let Some(scene) = Scene::new(settings) else { return };
    let (never, later) = (Pause::new(), Pause::new());
    scene.calls.add(Rule::on(Operation::Read).touching(0..1).hold(&never));
    scene.calls.add(Rule::on(Operation::Read).touching(1..2).hold(&later));
    // One is idle, one waits for an answer, and one is being answered when the wire is cut.
    let one = ClientSettings { connections: NonZeroUsize::MIN, ..ClientSettings::default() };
    let clients = [0; 3].map(|_| scene.client(one.clone()));
    for (client, at) in clients.iter().zip([None, Some(0), Some(1)]) {
        let client = client.clone();
        if let Some(at) = at {
            scene.near.spawn(async move { client.read_at(at, &mut [0; 1]).await });
        }
    }
    scene.near("reading", async { tokio::join!(never.wait_held(1), later.wait_held(1)) });
    let other = scene.far.block_on(Client::connect(scene.uri.clone(), one)).unwrap();
    assert_eq!(scene.server.connections(), 4, "there is no place left");
    scene.hosts.cut();
    later.release();
    let cut = Instant::now();
    scene.far.block_on(async {
        let patient = ClientSettings { connect_timeout: SOON, ..ClientSettings::default() };
        let waiting = tokio::spawn(Client::connect(scene.uri.clone(), patient));
        while !waiting.is_finished() || scene.server.connections() > 2 {
            let read = deadline(stall_limit, "a client that is there", read(&other, 4096, 1000)).await;
            fill::check(&read, 4096, 1).unwrap();
            assert!(cut.elapsed() < stall_limit + SLACK, "{} are connected", scene.server.connections());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        waiting.await.unwrap().expect("there is a place");
    });
    assert_eq!(scene.calls.in_flight(), 0, "what was asked for them is given up");
}
