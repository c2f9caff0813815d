//! The transmission phase of one connection: requests in, answers out, many at once.
//!
//! Everything is done by the connection's one task. A request is begun where it stands: a backend that can answer at
//! once costs no task and no wake-up. One that cannot waits among the running ones while the next requests are taken,
//! and is answered whenever it is done. Answers are gathered and sent by one call before more is received.
//!
//! ```text
//!          ┌────────────── begin, done at once ─────────────┐
//! input ──► Header ──► Room ──► Payload ──► running ──► output
//!             │                                            ▲
//!             └── refused ──► Skip (its payload) ──────────┘
//! ```

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use r3map_core::Piece;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::server::answer::{Answer, Link, Payload, failed, room};
use crate::server::buffers::{Buffer, Room};
use crate::server::check::{Refusal, check};
use crate::server::clock::{Clock, Late, Patience, Waits};
use crate::server::io::{Input, Output, poll_read};
use crate::server::lend::{self, Lend, Lending};
use crate::wire::{Command, DEFAULT_MAX_PAYLOAD, Errno, Framing, Malformed, Request};

/// The most segments that wait to be sent while more requests are taken.
const BACKLOG: usize = 256;
/// Payloads with more than this missing are received in place rather than through the input.
const LARGE: usize = 8 << 10;

/// Why a connection was given up.
#[derive(Debug)]
pub(super) enum Fault {
    /// The client said something that cannot be.
    Malformed(Malformed),
    /// The client went away in the middle of something.
    Cut,
    /// The client lets others wait for too long.
    Late(Late),
    /// The stream broke.
    Stream(io::Error),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Malformed(malformed) => write!(f, "{malformed}"),
            Self::Cut => f.write_str("the client went away in the middle of a request"),
            Self::Late(Late::Sending) => f.write_str("the client does not send the rest, or too slowly"),
            Self::Late(Late::Receiving) => f.write_str("the client does not take its answers, or too slowly"),
            Self::Late(Late::Idle) => f.write_str("the client has been idle for too long"),
            Self::Stream(error) => write!(f, "{error}"),
        }
    }
}

/// What a connection may take, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) requests: usize,
    pub(super) patience: Patience,
}

type Running = Pin<Box<dyn Future<Output = (Request, Answer)> + Send>>;

/// What is being received.
#[derive(Debug)]
enum Stage {
    Header,
    /// A request that waits for room.
    Room(Request),
    Payload(Request, Buffer),
    /// So many bytes of a payload that nobody wants, and what to answer then.
    Skip(u64, Request, Refusal),
    /// Nothing any more.
    Closed,
}

/// A connection.
pub(super) struct Transmission<S> {
    stream: S,
    link: Arc<Link>,
    limits: Limits,
    room: Room,
    input: Input,
    stage: Stage,
    /// The client has stopped sending without saying goodbye.
    cut: bool,
    running: FuturesUnordered<Running>,
    output: Output,
    /// Whether the last read was done at once: the guess for the next one. One that waits is better not begun twice.
    prompt: bool,
    /// The server is being shut down: no more is received, and what has arrived is refused.
    closing: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    clock: Clock,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transmission<S> {
    pub(super) fn new(
        stream: S,
        link: Link,
        limits: Limits,
        room: Room,
        closing: WaitForCancellationFutureOwned,
    ) -> Self {
        Self {
            stream,
            link: Arc::new(link),
            limits,
            room,
            input: Input::new(),
            stage: Stage::Header,
            cut: false,
            running: FuturesUnordered::new(),
            output: Output::default(),
            prompt: true,
            closing: Some(Box::pin(closing)),
            clock: Clock::new(limits.patience),
        }
    }

    /// Serves requests until the client disconnects, or the server is closing and everything is answered. Gives the
    /// stream back. What runs when this is dropped is given up.
    ///
    /// # Errors
    /// Why the connection cannot go on.
    pub(super) async fn run(mut self) -> Result<S, Fault> {
        std::future::poll_fn(|context| self.poll(context)).await?;
        Ok(self.stream)
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        if self.closing.as_mut().is_some_and(|closing| closing.as_mut().poll(context).is_ready()) {
            self.closing = None;
        }
        loop {
            let mut moved = self.finish(context);
            moved |= self.take(context)?;
            moved |= self.send(context)?;
            moved |= self.receive(context)?;
            if self.is_over() {
                return Poll::Ready(Ok(()));
            }
            self.clock.moved |= moved;
            if !moved {
                break;
            }
        }
        if self.cut && self.clock.moved {
            self.clock.sending.rest();
        }
        let waits = Waits { sending: self.waits_for_input(), receiving: !self.output.is_empty(), idle: self.is_idle() };
        self.clock.poll(context, waits).map(|late| Err(Fault::Late(late)))
    }

    /// Whether everything was said.
    fn is_over(&self) -> bool {
        let no_more = matches!(self.stage, Stage::Closed) || self.closing.is_none();
        no_more && !matches!(self.stage, Stage::Room(_)) && self.running.is_empty() && self.output.is_empty()
    }

    /// Whether the client is to send the rest of something, or has stopped sending without a word.
    fn waits_for_input(&self) -> bool {
        match self.stage {
            Stage::Header => !self.input.bytes().is_empty() && self.may_begin(),
            Stage::Payload(..) | Stage::Skip(..) => true,
            // It may have gone altogether, which cannot be told from one that still receives: what it asked for must not
            // hold its place for ever. One that has said goodbye has its requests done, however long that takes.
            Stage::Closed => self.cut,
            Stage::Room(_) => false,
        }
    }

    fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Header) && self.input.bytes().is_empty() && self.running.is_empty()
    }

    /// Whether there is place for one more request.
    fn may_begin(&self) -> bool {
        self.running.len() < self.limits.requests && self.output.len() < BACKLOG
    }

    /// Answers requests that are done.
    fn finish(&mut self, context: &mut Context<'_>) -> bool {
        let mut moved = false;
        while let Poll::Ready(Some((request, answer))) = self.running.poll_next_unpin(context) {
            self.say(&request, answer);
            moved = true;
        }
        moved
    }

    fn say(&mut self, request: &Request, answer: Answer) {
        match answer {
            Answer::Reply(reply) => self.output.push(reply),
            answer => answer.encode(self.link.terms.framing, request, self.output.gathered()),
        }
    }

    /// Takes requests from the input, as far as it and the limits go.
    fn take(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        let mut moved = false;
        while self.step(context)? {
            moved = true;
        }
        Ok(moved)
    }

    /// One step of the chart above; whether there was one to take.
    fn step(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        match std::mem::replace(&mut self.stage, Stage::Header) {
            Stage::Header if !self.may_begin() => Ok(false),
            Stage::Header => self.take_header(),
            Stage::Room(request) => Ok(self.take_room(context, request)),
            Stage::Payload(request, buffer) => Ok(self.take_payload(context, request, buffer)),
            Stage::Skip(left, request, refusal) => Ok(self.skip(left, request, refusal)),
            Stage::Closed => {
                self.stage = Stage::Closed;
                Ok(false)
            }
        }
    }

    fn take_header(&mut self) -> Result<bool, Fault> {
        let framing = self.link.terms.framing;
        let Some(request) = Request::decode(framing, self.input.bytes()).map_err(Fault::Malformed)? else {
            return Ok(false);
        };
        self.input.consume(Request::len(framing));
        if request.command == Command::Disconnect {
            self.stage = Stage::Closed;
            return Ok(true);
        }
        let payload = request.payload_len(framing);
        let longest = self.link.export.sizes.maximum.max(DEFAULT_MAX_PAYLOAD);
        if framing == Framing::Extended && payload > u64::from(longest) {
            return Err(Fault::Malformed(Malformed::found("a payload is too long to be skipped", payload)));
        }
        let checked = match self.closing {
            Some(_) => check(&request, &self.link.export, &self.link.terms),
            None => Err(Refusal::new(Errno::Shutdown, "the server is being shut down")),
        };
        self.stage = match checked {
            Ok(()) => Stage::Room(request),
            Err(refusal) => Stage::Skip(payload, request, refusal),
        };
        Ok(true)
    }

    fn take_room(&mut self, context: &mut Context<'_>, request: Request) -> bool {
        let framing = self.link.terms.framing;
        let Poll::Ready(share) = self.room.poll_share(context, room(&request, framing)) else {
            self.stage = Stage::Room(request);
            return false;
        };
        match length(request.payload_len(framing)) {
            0 => self.begin(context, request, Payload::Room(share)),
            length => self.stage = Stage::Payload(request, share.buffer(length)),
        }
        true
    }

    fn take_payload(&mut self, context: &mut Context<'_>, request: Request, mut buffer: Buffer) -> bool {
        let length = length(request.payload_len(self.link.terms.framing));
        let count = self.input.move_to(buffer.missing(length));
        buffer.more(count);
        if buffer.used().len() == length {
            self.begin(context, request, Payload::Data(buffer));
            return true;
        }
        self.stage = Stage::Payload(request, buffer);
        count > 0
    }

    fn skip(&mut self, left: u64, request: Request, refusal: Refusal) -> bool {
        let count = length(left).min(self.input.bytes().len());
        self.input.consume(count);
        if left == count as u64 {
            self.say(&request, Answer::Failed(refusal));
            return true;
        }
        self.stage = Stage::Skip(left - count as u64, request, refusal);
        count > 0
    }

    /// Begins a request, and answers it if it is done at once.
    fn begin(&mut self, context: &mut Context<'_>, request: Request, payload: Payload) {
        match payload {
            Payload::Room(share) if self.prompt && request.length >= lend::SHORTEST && self.link.lends(&request) => {
                self.output.push_lend(Lend { request, at: request.offset, share });
            }
            payload => {
                let link = self.link.clone();
                self.start(context, request, async move { link.answer(request, payload).await });
            }
        }
    }

    fn start(
        &mut self,
        context: &mut Context<'_>,
        request: Request,
        answering: impl Future<Output = Answer> + Send + 'static,
    ) {
        // A backend that panics must not take the other requests with it.
        let answering = AssertUnwindSafe(answering).catch_unwind();
        let mut running: Running =
            Box::pin(answering.map(move |answer| (request, answer.unwrap_or_else(|_| broken_backend()))));
        let polled = running.as_mut().poll(context);
        if request.command == Command::Read {
            self.prompt = polled.is_ready();
        }
        match polled {
            Poll::Ready((request, answer)) => self.say(&request, answer),
            Poll::Pending => self.running.push(running),
        }
    }

    fn send(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        let mut moved = false;
        while !self.output.is_empty() {
            if let Some(lend) = self.output.take_lend() {
                moved |= self.lend(context, lend)?;
                continue;
            }
            match self.output.poll_send(&mut self.stream, context).map_err(Fault::Stream)? {
                Poll::Ready(sent) => {
                    self.clock.receiving.add(sent);
                    moved = true;
                }
                Poll::Pending => break,
            }
        }
        Ok(moved)
    }

    /// Sends a read's reply from where the backend has its bytes, as far as the stream takes it and the backend has it
    /// at once.
    fn lend(&mut self, context: &mut Context<'_>, lend: Lend) -> Result<bool, Fault> {
        let (link, request, from) = (self.link.clone(), lend.request, lend.at);
        let framing = link.terms.framing;
        let left = self.output.take_spare();
        let mut lending = Lending::new(&mut self.stream, context.waker().clone(), framing, &lend, left);
        let polled = poll_pieces(&link, lend.at, lend.end(), context, &mut lending);
        let Lending { at, mut left, blocked, broken, sent, .. } = lending;
        if let Some(error) = broken {
            return Err(Fault::Stream(error));
        }
        self.clock.receiving.add(sent);
        let lend = Lend { at, ..lend };
        let rest = match polled {
            _ if at == lend.end() => None,
            Poll::Ready(Some(Ok(()))) if at > from => Some(lend),
            Poll::Ready(Some(Err(_))) if blocked => Some(lend),
            Poll::Ready(Some(Err(error))) => {
                failed(&error).encode(framing, &request, &mut left);
                None
            }
            Poll::Ready(_) => {
                broken_backend().encode(framing, &request, &mut left);
                None
            }
            Poll::Pending => {
                self.output.put_back(left, None);
                self.start(context, request, async move { link.read(&request, at, lend.share).await });
                return Ok(true);
            }
        };
        let progress = sent > 0 || !left.is_empty() || rest.is_none();
        self.output.put_back(left, rest);
        Ok(progress)
    }

    /// Receives what the stage waits for, once.
    fn receive(&mut self, context: &mut Context<'_>) -> Result<bool, Fault> {
        if self.closing.is_none() || !self.wants_more() {
            return Ok(false);
        }
        let framing = self.link.terms.framing;
        let count = match &mut self.stage {
            Stage::Payload(request, buffer) if missing(request, buffer, framing) > LARGE => {
                let length = length(request.payload_len(framing));
                let count = poll_read(&mut self.stream, context, buffer.missing(length));
                if let Poll::Ready(Ok(count)) = count {
                    buffer.more(count);
                }
                count
            }
            _ => self.input.poll_fill(&mut self.stream, context),
        };
        match count.map_err(Fault::Stream)? {
            Poll::Pending => Ok(false),
            Poll::Ready(0) => self.end_of_stream(),
            Poll::Ready(count) => {
                self.clock.sending.add(count);
                Ok(true)
            }
        }
    }

    fn wants_more(&self) -> bool {
        match self.stage {
            Stage::Header => self.may_begin(),
            Stage::Payload(..) | Stage::Skip(..) => true,
            Stage::Room(_) | Stage::Closed => false,
        }
    }

    /// A client that only shuts its sending side down still gets its answers.
    fn end_of_stream(&mut self) -> Result<bool, Fault> {
        if !matches!(self.stage, Stage::Header) || !self.input.bytes().is_empty() {
            return Err(Fault::Cut);
        }
        self.stage = Stage::Closed;
        self.cut = true;
        Ok(true)
    }
}

/// Asks for pieces once, for as long as the backend takes: `None` if it panicked.
fn poll_pieces<S: AsyncWrite + Unpin + Send>(
    link: &Link,
    from: u64,
    end: u64,
    context: &mut Context<'_>,
    lending: &mut Lending<'_, S>,
) -> Poll<Option<r3map_core::Result<()>>> {
    let Some(pieces) = link.export.backend.capabilities().pieces else { return Poll::Ready(None) };
    let mut visit = |_: u64, piece: Piece<'_>| lending.visit(piece);
    let mut reading = pieces.read_pieces(from, link.export.step.min(end - from), &mut visit);
    match catch_unwind(AssertUnwindSafe(|| reading.as_mut().poll(context))) {
        Ok(polled) => polled.map(Some),
        Err(_) => Poll::Ready(None),
    }
}

fn broken_backend() -> Answer {
    tracing::error!("the backend panicked; its request is answered with EIO");
    Answer::Failed(Refusal::new(Errno::Io, "the backend panicked"))
}

fn missing(request: &Request, buffer: &Buffer, framing: Framing) -> usize {
    length(request.payload_len(framing)) - buffer.used().len()
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
