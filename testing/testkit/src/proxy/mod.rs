//! A proxy that puts a round trip between two programs: each direction is delayed by half of it, and no bandwidth is
//! lost, unless it is asked to let through only so many bytes a second. It can be cut, stalled, healed and pointed elsewhere while connections run.
//!
//! The kernel's own tool for this, netem, is missing on many machines. What differs from a real long line: the kernel at
//! each side sees a near neighbour, so TCP's own slow start and connection set-up cost no round trips.
//!
//! Each direction has two threads with blocking sockets, since tokio's timer is too coarse (1 ms). Bytes are stamped on
//! arrival and leave when they are due, never earlier. How late a round trip is depends on how long threads wait for a
//! processor. Measured with the example `proxy_limits` on a virtual machine of two busy cores: with real-time priority half
//! of them by up to 0.55 ms, one in a hundred by up to 1.1 ms; without it (19 threads that want to run) half of them by 0.1 to
//! 0.3 ms, but by 12 ms at a round trip of 40 ms, and one in a hundred by 25 to 40 ms.

mod connection;
mod queue;
mod socket;

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use connection::Connection;
use queue::Pace;
use socket::{Listener, Socket};

/// Where a stream socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl From<&Path> for Address {
    fn from(path: &Path) -> Self {
        Self::Unix(path.to_owned())
    }
}

/// A proxy with a delay. Dropping it resets all connections and stops listening.
#[derive(Debug)]
pub struct DelayProxy {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    address: Address,
    acceptor: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    pace: Arc<Pace>,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    target: Address,
    state: State,
    connections: Vec<Weak<Connection>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Whole,
    Stalled,
    Cut,
}

impl DelayProxy {
    /// Listens on a free TCP port of the loopback interface and passes on to `target`, with `rtt` of delay for a round
    /// trip.
    ///
    /// # Errors
    /// When it cannot listen. An unreachable target shows when somebody connects: the connection is reset.
    pub fn tcp(target: impl Into<Address>, rtt: Duration) -> io::Result<Self> {
        Self::listen(&Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))), target.into(), rtt)
    }

    /// As [`Self::tcp`], but listens on a Unix socket at `path`.
    ///
    /// # Errors
    /// As [`Self::tcp`], and if something is at `path`.
    pub fn unix(path: &Path, target: impl Into<Address>, rtt: Duration) -> io::Result<Self> {
        Self::listen(&path.into(), target.into(), rtt)
    }

    fn listen(on: &Address, target: Address, rtt: Duration) -> io::Result<Self> {
        let listener = Arc::new(Listener::bind(on)?);
        let address = listener.address(on)?;
        let pace = Arc::new(Pace::new(rtt / 2));
        let line = Mutex::new(Line { target, state: State::Whole, connections: Vec::new() });
        let shared = Arc::new(Shared { pace, line });
        let acceptor = {
            let (shared, listener) = (shared.clone(), listener.clone());
            std::thread::Builder::new().name("proxy".into()).spawn(move || shared.accept(&listener))?
        };
        Ok(Self { shared, listener, address, acceptor: Some(acceptor) })
    }

    /// Where to connect.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The TCP address to connect to.
    ///
    /// # Panics
    /// If it listens on a Unix socket.
    #[must_use]
    pub fn socket_addr(&self) -> SocketAddr {
        match self.address {
            Address::Tcp(address) => address,
            Address::Unix(_) => panic!("this proxy listens on a Unix socket"),
        }
    }

    /// Changes the delay, for bytes that arrive from now on.
    pub fn set_rtt(&self, rtt: Duration) {
        self.shared.pace.set_delay(rtt / 2);
    }

    /// Lets each connection have so many bytes a second in each direction, from now on; `None` is as many as there are.
    /// Little is held on the way then: who sends more is held back, as by a full line.
    pub fn set_rate(&self, bytes_per_second: Option<NonZeroU64>) {
        self.shared.pace.set_rate(bytes_per_second);
    }

    /// Passes new connections on to another target.
    pub fn retarget(&self, target: impl Into<Address>) {
        self.shared.line().target = target.into();
    }

    /// Resets all connections, and every new one, until [`Self::heal`]. Bytes under way are lost.
    pub fn cut(&self) {
        self.shared.change(State::Cut);
        self.reset();
    }

    /// Resets all connections once; new ones are served. Bytes under way are lost.
    pub fn reset(&self) {
        self.shared.reset();
    }

    /// Stops moving bytes, as a line that swallows packets, until [`Self::heal`]. Nothing is lost.
    pub fn stall(&self) {
        self.shared.change(State::Stalled);
    }

    /// Ends [`Self::cut`] and [`Self::stall`].
    pub fn heal(&self) {
        self.shared.change(State::Whole);
    }

    /// How many connections are passed on now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.line().connections.iter().filter(|connection| connection.strong_count() > 0).count()
    }
}

impl Drop for DelayProxy {
    fn drop(&mut self) {
        self.shared.change(State::Cut);
        self.listener.stop();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.reset();
        if let Address::Unix(path) = &self.address {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Shared {
    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        while let Ok(client) = listener.accept() {
            let shared = self.clone();
            // Reaching the target may take a while; others can be served meanwhile.
            std::thread::spawn(move || shared.serve(client));
        }
    }

    fn serve(&self, client: Socket) {
        let (target, state) = {
            let line = self.line();
            (line.target.clone(), line.state)
        };
        let server =
            if state == State::Cut { Err(io::ErrorKind::ConnectionRefused.into()) } else { Socket::connect(&target) };
        match server {
            Ok(server) => self.pass(client, server),
            Err(_) => client.reset_on_close(),
        }
    }

    fn pass(&self, client: Socket, server: Socket) {
        let mut line = self.line();
        let connection = Connection::new(client, server, &self.pace);
        connection.stall(line.state == State::Stalled);
        if line.state == State::Cut {
            connection.reset();
        }
        line.connections.retain(|other| other.strong_count() > 0);
        line.connections.push(Arc::downgrade(&connection));
        drop(line);
        Connection::run(&connection);
    }

    fn change(&self, state: State) {
        let mut line = self.line();
        line.state = state;
        line.connections.iter().filter_map(Weak::upgrade).for_each(|it| it.stall(state == State::Stalled));
    }

    /// Resets what there is, and waits until its sockets are closed.
    fn reset(&self) {
        let connections = std::mem::take(&mut self.line().connections);
        connections.iter().filter_map(Weak::upgrade).for_each(|connection| connection.reset());
        let end = Instant::now() + Duration::from_secs(5);
        while connections.iter().any(|connection| connection.strong_count() > 0) && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

#[cfg(test)]
mod tests;
