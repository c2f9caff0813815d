//! One connection in transmission, and requests over it. Once broken it stays so: `links` opens the next one.
//!
//! Three tables, each under a lock that is held only while somebody does not wait: what arrives, what leaves, and the
//! requests themselves. Calls send and receive where they stand; the connection's one task, its driver, waits for headers,
//! sends what did not fit, watches for silence, and says farewell.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use r3map_core::RangeGuard;
use r3map_sys::socket::unacknowledged;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::client::calls::{Asked, Calls, Failure, Progress, Reply, Spilled};
use crate::client::driver::Driver;
use crate::client::ending::Ending;
use crate::client::facts::Facts;
use crate::client::incoming::{Incoming, Owner};
use crate::client::outgoing::Outgoing;
use crate::client::unflushed::{Moment, Unflushed};
use crate::stream::Stream;
use crate::wire::{Command, CommandFlags, Framing, Request};

/// How long saying farewell may take.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a connection that was given up holds the ranges of changes that may still land, beyond the time for which TCP
/// may still try to deliver them. A server that lives closes its end as soon as it has done them.
const LINGER: Duration = Duration::from_secs(60);

/// An open connection. Dropping it ends what is under way (requests whose callers have gone), then the connection.
pub(crate) struct Link {
    shared: Arc<Shared>,
    framing: Framing,
    name: Moment,
}

/// What the calls and the driver share. Locks are taken in the order of the fields.
pub(crate) struct Shared {
    pub(crate) ending: Ending,
    pub(crate) incoming: Mutex<Incoming>,
    pub(crate) outgoing: Mutex<Outgoing>,
    pub(crate) calls: Mutex<Calls>,
    /// The socket, if it is one, for as long as the connection is open.
    pub(crate) socket: Mutex<Option<OwnedFd>>,
    /// Wakes the driver.
    pub(crate) driver: Mutex<Waker>,
    /// The link is dropped.
    pub(crate) leaving: AtomicBool,
    /// The driver has seen no request for a while and sleeps until it is woken.
    pub(crate) idle: AtomicBool,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Link {
    /// Takes a stream on which the handshake is over. Its driver runs on `runtime`.
    pub(crate) fn new(
        stream: Stream,
        facts: &Facts,
        unflushed: Arc<Unflushed>,
        silence: Duration,
        runtime: &Handle,
    ) -> Self {
        let name = unflushed.now();
        let socket = Mutex::new(stream.socket());
        let (reading, writing) = stream.split();
        let max_data = u32::try_from(facts.longest()).unwrap_or(u32::MAX);
        let ending = Ending::default();
        let shared = Arc::new(Shared {
            ending: ending.clone(),
            incoming: Mutex::new(Incoming::new(reading, ending.clone(), facts.framing, max_data)),
            outgoing: Mutex::new(Outgoing::new(writing, ending.clone())),
            calls: Mutex::new(Calls::new(name, unflushed, facts.allocation)),
            socket,
            driver: Mutex::new(Waker::noop().clone()),
            leaving: AtomicBool::new(false),
            idle: AtomicBool::new(true),
        });
        runtime.spawn(run(shared.clone(), silence, facts.framing));
        Self { shared, framing: facts.framing, name }
    }

    /// Names the connection among those that its `Unflushed` knows.
    pub(crate) fn name(&self) -> Moment {
        self.name
    }

    /// Whether requests can be made. One that broke without a word is found out only when it is used.
    pub(crate) fn is_open(&self) -> bool {
        lock(&self.shared.calls).is_open()
    }

    /// Bytes that came, and that have arrived at the other side as far as the kernel knows.
    pub(crate) fn moved(&self) -> u64 {
        let (received, sent) = (lock(&self.shared.incoming).received(), lock(&self.shared.outgoing).sent());
        let under_way = lock(&self.shared.socket).as_ref().map_or(0, |socket| unacknowledged(socket).unwrap_or(0));
        received + sent.saturating_sub(under_way)
    }

    /// How many requests are under way.
    pub(crate) fn load(&self) -> usize {
        lock(&self.shared.calls).unanswered()
    }

    /// Fills `buf` from `offset`. The server must take a read of that length. Dropping the future gives the call up.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        let asked = Asked { command: Command::Read, offset, length: buf.len() as u64 };
        let call = self.ask(asked, CommandFlags::empty(), &[], None).await?;
        std::future::poll_fn(|context| call.poll(context, buf)).await.map(|_| ())
    }

    /// Makes a request that carries no data back. `guard` is held until its fate is known. Dropping the future before it
    /// is sent takes it back; later it goes on.
    ///
    /// # Errors
    /// As [`Failure`] says.
    pub(crate) async fn request(
        &self,
        asked: Asked,
        flags: CommandFlags,
        payload: &[u8],
        guard: Option<Arc<RangeGuard>>,
    ) -> Result<Reply, Failure> {
        let call = self.ask(asked, flags, payload, guard).await?;
        std::future::poll_fn(|context| call.poll(context, &mut [])).await
    }

    async fn ask(
        &self,
        asked: Asked,
        flags: CommandFlags,
        payload: &[u8],
        guard: Option<Arc<RangeGuard>>,
    ) -> Result<Call<'_>, Failure> {
        let shared = &*self.shared;
        std::future::poll_fn(|context| lock(&shared.outgoing).poll_room(context)).await;
        let cookie = lock(&shared.calls).begin(asked, guard)?;
        let call = Call { shared, cookie };
        let Asked { command, offset, length } = asked;
        let mut flags = flags;
        flags.set(CommandFlags::PAYLOAD_LEN, self.framing == Framing::Extended && command == Command::Write);
        let mut header = Vec::with_capacity(Request::MAX_LEN);
        let request = Request { flags, command, cookie, offset, length };
        if request.encode(self.framing, &mut header).is_err() {
            return Err(Failure::Corrupt("a request that is too long for its framing".to_owned()));
        }
        let driver = lock(&shared.driver).clone();
        lock(&shared.outgoing).send(&mut Context::from_waker(&driver), &header, payload);
        if shared.idle.swap(false, Ordering::AcqRel) {
            driver.wake();
        }
        Ok(call)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.leaving.store(true, Ordering::Release);
        lock(&self.shared.driver).wake_by_ref();
    }
}

/// A request that somebody waits for.
struct Call<'a> {
    shared: &'a Shared,
    cookie: u64,
}

impl Call<'_> {
    /// Receives what is there for it. `buf` is the read's buffer, the same each time; empty for others.
    fn poll(&self, context: &mut Context<'_>, buf: &mut [u8]) -> Poll<Result<Reply, Failure>> {
        let (spilled, progress) = lock(&self.shared.calls).poll(self.cookie, context.waker());
        take(spilled, buf);
        if let Progress::Done(result) = progress {
            return Poll::Ready(result);
        }
        if !self.receive(context, buf) {
            return Poll::Pending;
        }
        let (spilled, progress) = lock(&self.shared.calls).poll(self.cookie, context.waker());
        take(spilled, buf);
        match progress {
            Progress::Done(result) => Poll::Ready(result),
            Progress::Waiting => Poll::Pending,
        }
    }

    /// Receives, if it is this call's turn, and says whether it was.
    fn receive(&self, context: &mut Context<'_>, buf: &mut [u8]) -> bool {
        let mut incoming = lock(&self.shared.incoming);
        if incoming.awaited() != Some(self.cookie) {
            return false;
        }
        let driver = lock(&self.shared.driver).clone();
        let owner = Owner { cookie: self.cookie, buf, context };
        if let Poll::Ready(Err(failure)) =
            incoming.poll(&mut Context::from_waker(&driver), &self.shared.calls, Some(owner))
        {
            drop(incoming);
            // The driver holds what must outlast the connection's end.
            lock(&self.shared.calls).doom(failure);
            driver.wake();
        }
        true
    }
}

/// Puts what others have received where it belongs.
fn take(spilled: Vec<(usize, Spilled)>, buf: &mut [u8]) {
    for (at, bytes) in spilled {
        match bytes {
            Spilled::Bytes(bytes) => buf[at..at + bytes.len()].copy_from_slice(&bytes),
            Spilled::Zeroes(len) => buf[at..at + len].fill(0),
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let unanswered = lock(&self.shared.calls).abandon(self.cookie);
        // If it was this call's turn to receive, it is the driver's now.
        if unanswered && lock(&self.shared.incoming).awaited() == Some(self.cookie) {
            lock(&self.shared.driver).wake_by_ref();
        }
    }
}

/// Fails whatever is under way when the driver ends, also if its runtime ends first, and closes the socket, although
/// somebody may still hold the link.
struct Leaving(Arc<Shared>);

impl Drop for Leaving {
    fn drop(&mut self) {
        lock(&self.0.outgoing).release();
        lock(&self.0.incoming).release();
        lock(&self.0.socket).take();
        let failure = Failure::GivenUp("the runtime that the client was connected on has shut down".to_owned());
        drop(lock(&self.0.calls).fail(failure));
    }
}

/// What the driver does, from the first request to the end of the connection.
async fn run(shared: Arc<Shared>, silence: Duration, framing: Framing) {
    let leaving = Leaving(shared.clone());
    match Driver::new(shared.clone(), silence).await {
        None => farewell(&shared, framing).await,
        Some(failure) => {
            tracing::debug!("connection lost: {failure:?}");
            lock(&shared.outgoing).close();
            let closed = matches!(failure, Failure::Closed(_));
            let guards = lock(&shared.calls).fail(failure);
            if !closed && !guards.is_empty() {
                let _ = timeout(LINGER.saturating_add(silence.saturating_mul(2)), gone(&shared)).await;
            }
        }
    }
    drop(leaving);
}

/// Ends a connection on which nothing is under way (proto.md, "Terminating the transmission phase").
async fn farewell(shared: &Shared, framing: Framing) {
    let request =
        Request { flags: CommandFlags::empty(), command: Command::Disconnect, cookie: 0, offset: 0, length: 0 };
    let mut header = Vec::with_capacity(Request::MAX_LEN);
    if request.encode(framing, &mut header).is_ok() {
        let driver = lock(&shared.driver).clone();
        lock(&shared.outgoing).send(&mut Context::from_waker(&driver), &header, &[]);
    }
    let sent = std::future::poll_fn(|context| lock(&shared.outgoing).poll(context));
    let _ = timeout(FAREWELL, sent).await;
    let _ = timeout(FAREWELL, std::future::poll_fn(|context| lock(&shared.outgoing).poll_shutdown(context))).await;
}

/// Waits until the server's end is closed too.
async fn gone(shared: &Shared) {
    std::future::poll_fn(|context| lock(&shared.outgoing).poll_shutdown(context)).await;
    std::future::poll_fn(|context| lock(&shared.incoming).poll_end(context)).await;
}
