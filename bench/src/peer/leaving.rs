//! The side that a region leaves: an application that writes to it, and stops when it is told to. It begins to write when
//! its parent says so.

use std::io::{BufRead, Read};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration, Seeding};
use r3map::{Error, ErrorKind, Mount, Operation, Registry};
use r3map_grpc::{Server, ServerSettings, Target};
use r3map_local::Memory;
use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

use super::{Shown, announce};
use crate::sections::mounted::{Mounted, alone};
use crate::sections::{filled, mounted};

/// What is written at a time: a chunk.
pub(crate) const PIECE: usize = 64 << 10;
/// One piece of so many is written.
const SPACING: u64 = 16;

/// A region that leaves, and how it is used meanwhile.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Leaving {
    pub(crate) size: u64,
    pub(crate) seed: u64,
    pub(crate) shown: Shown,
    pub(crate) writing: Writing,
    pub(crate) rtt: Duration,
}

/// How the application writes. A sixteenth of the region is written: a chunk, and then fifteen are left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Writing {
    /// Once, evenly over the time that it is told.
    Once,
    /// Again and again, as fast as it can.
    Always,
}

/// Where the region is, behind the round trip.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Offered {
    /// To be moved.
    pub(crate) leaving: SocketAddr,
    /// The same bytes, to be copied.
    pub(crate) copy: SocketAddr,
}

/// How the application was left.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Left {
    /// Pieces that it has written.
    writes: u64,
    /// The instant from which it ran no more, as [`now`] says.
    pub(crate) stopped: Duration,
}

/// The machine's clock: the same in both processes.
pub(crate) fn now() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

impl Leaving {
    /// How many pieces are written, at least one.
    fn pieces(&self) -> u64 {
        (self.size / (PIECE as u64 * SPACING)).max(1)
    }

    fn offset(&self, piece: u64) -> u64 {
        piece * PIECE as u64 * SPACING
    }

    /// Fills `buf` with what piece number `piece` holds when it was written so often.
    fn fill(&self, buf: &mut [u8], piece: u64, times: u64) {
        fill::write(buf, self.offset(piece), self.seed + times);
    }

    /// Where each piece that was written is, and the seed of what it holds.
    pub(crate) fn expected(&self, left: Left) -> impl Iterator<Item = (u64, u64)> {
        let (rounds, rest) = (left.writes / self.pieces(), left.writes % self.pieces());
        (0..self.pieces()).map(move |piece| (self.offset(piece), self.seed + rounds + u64::from(piece < rest)))
    }

    /// Plays the role until standard input ends.
    pub(super) fn play(self) -> Result<()> {
        let (application, asked) = Application::new();
        let place = Place::new(&self, application.hooks())?;
        announce(&place.offered)?;
        let mut line = String::new();
        let mut input = std::io::stdin().lock();
        input.read_line(&mut line)?;
        if line.is_empty() {
            place.mounted.abandon();
            return Ok(());
        }
        let over: Duration = serde_json::from_str(&line).context("for how long to write")?;
        let Place { mounted, parts: _parts, .. } = place;
        let working = std::thread::spawn(move || self.work(mounted, over, &asked));
        input.read_to_end(&mut Vec::new())?;
        application.end();
        match working.join() {
            Ok(mounted) => mounted?.abandon(),
            Err(_) => bail!("the application has panicked"),
        }
        Ok(())
    }

    /// The application's own work. It accepts to be stopped once it has written everything once.
    fn work(&self, mut mounted: Mounted, over: Duration, asked: &Receiver<Stop>) -> Result<Mounted> {
        let (begun, mut bytes) = (Instant::now(), vec![0; PIECE]);
        let mut writes = 0;
        let stop = loop {
            match self.writing {
                Writing::Once if writes == self.pieces() => break asked.recv().ok(),
                Writing::Once => {
                    let due = begun + over.mul_f64(writes as f64 / self.pieces() as f64);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
                Writing::Always => match asked.try_recv() {
                    Ok(stop) => break Some(stop),
                    Err(TryRecvError::Disconnected) => break None,
                    Err(TryRecvError::Empty) => {}
                },
            }
            let piece = writes % self.pieces();
            self.fill(&mut bytes, piece, writes / self.pieces() + 1);
            mounted.write(self.offset(piece), &bytes).context("the application's write")?;
            writes += 1;
        };
        if let Some(stop) = stop {
            let left = Left { writes, stopped: now() };
            let _ = stop.send(());
            announce(&left)?;
        }
        Ok(mounted)
    }
}

/// Asks the application to stop, and is told when it has.
type Stop = oneshot::Sender<()>;

/// How the application is asked to stop.
#[derive(Clone)]
struct Application {
    ask: Arc<Mutex<Option<Sender<Stop>>>>,
}

impl Application {
    fn new() -> (Self, Receiver<Stop>) {
        let (ask, asked) = channel();
        (Self { ask: Arc::new(Mutex::new(Some(ask))) }, asked)
    }

    fn hooks(&self) -> Hooks {
        let application = self.clone();
        Hooks::default().on_suspend(move || {
            let (tell, stopped) = oneshot::channel();
            let asked = application.sender().as_ref().is_some_and(|ask| ask.send(tell).is_ok());
            async move {
                let failed = || Error::new(ErrorKind::Internal, Operation::Close, "the application has failed");
                if asked { stopped.await.map_err(|_| failed()) } else { Err(failed()) }
            }
        })
    }

    /// Lets it end if nobody has stopped it.
    fn end(&self) {
        self.sender().take();
    }

    fn sender(&self) -> std::sync::MutexGuard<'_, Option<Sender<Stop>>> {
        self.ask.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The region, mounted, and offered behind the round trip.
struct Place {
    mounted: Mounted,
    offered: Offered,
    parts: Parts,
}

/// What must be kept. In this order it is dropped.
struct Parts {
    _proxies: [DelayProxy; 2],
    _seeding: Seeding,
    _server: Server,
    _runtime: Runtime,
}

impl Place {
    fn new(leaving: &Leaving, hooks: Hooks) -> Result<Self> {
        let memory = filled(leaving.size, leaving.seed)?;
        let (server, runtime, copy) = serve(memory.clone())?;
        let mounted = match leaving.shown {
            // Its memory is its own: nothing is pushed behind its back.
            Shown::Slice => Mounted::show(Mount::managed(memory).settings(alone()), Shown::Slice)?,
            Shown::File => Mounted::show(Mount::direct(memory).migratable(), Shown::File)?,
        };
        mounted.pulled()?;
        let regions = vec![("region".to_owned(), mounted.source()?)];
        let (registry, anywhere) = (Registry::standard(), ["grpc://127.0.0.1:0".parse()?]);
        let seeding = Migration::new().hooks(hooks).seed(&registry, &anywhere, regions);
        let seeding = mounted::runtime()?.block_on(seeding)?;
        let uri = seeding.uris().into_iter().next().context("the seeder listens nowhere")?;
        let address: SocketAddr = uri.strip_prefix("grpc://").context("the seeder's address")?.parse()?;
        let proxies = [DelayProxy::tcp(address, leaving.rtt)?, DelayProxy::tcp(copy, leaving.rtt)?];
        let offered = Offered { leaving: proxies[0].socket_addr(), copy: proxies[1].socket_addr() };
        let parts = Parts { _proxies: proxies, _seeding: seeding, _server: server, _runtime: runtime };
        Ok(Self { mounted, offered, parts })
    }
}

/// Serves a region as it is, to be copied.
fn serve(memory: Arc<Memory>) -> Result<(Server, Runtime, SocketAddr)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let server = Server::new(memory, ServerSettings::default())?;
    let target = Target::Tcp { host: std::net::Ipv4Addr::LOCALHOST.to_string(), port: 0 };
    let Target::Tcp { port, .. } = runtime.block_on(server.listen(&target))? else {
        bail!("the server listens on something that is not TCP");
    };
    Ok((server, runtime, (std::net::Ipv4Addr::LOCALHOST, port).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_known() {
        let (size, rtt) = (3 * PIECE as u64 * SPACING, Duration::ZERO);
        let leaving = Leaving { size, seed: 7, shown: Shown::Slice, writing: Writing::Always, rtt };
        let left = |writes| Left { writes, stopped: Duration::ZERO };
        let seeds = |writes| leaving.expected(left(writes)).map(|(_, seed)| seed).collect::<Vec<_>>();
        assert_eq!((seeds(0), seeds(3), seeds(7)), (vec![7; 3], vec![8; 3], vec![10, 9, 9]));
        let offsets: Vec<_> = leaving.expected(left(0)).map(|(offset, _)| offset).collect();
        assert_eq!(offsets, [0, 1 << 20, 2 << 20]);
    }
}
