//! What becomes of a request: the backend is asked, and the bytes of the answer are made.

use std::sync::Arc;

use r3map_core::{Backend, Extent, ExtentKind, Piece, Result};
use r3map_pipeline::User;

use crate::server::buffers::{Buffer, Share};
use crate::server::check::{Refusal, Terms, check_range};
use crate::server::export::Served;
use crate::wire::{
    Chunk, ChunkHeader, Command, CommandFlags, Descriptor, Errno, Framing, ReplyFlags, Request, SimpleReply,
    StateFlags, StatusPayload, Text, encode_data_header,
};

/// What `base:allocation` is called in transmission.
pub(crate) const ALLOCATION: u32 = 1;
/// The most extents in a reply: 64 KiB of them.
const EXTENTS: usize = 4096;
/// Zeros that are shorter than this are sent as data: a chunk costs more than it saves.
pub(crate) const SHORTEST_HOLE: u64 = 4096;
/// How much is read at once for `CACHE`.
const STEP: u64 = 1 << 20;
/// What is written where zeros have to be written.
pub(crate) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What a connection serves, shared by its requests.
pub(crate) struct Link {
    pub(crate) export: Arc<Served>,
    /// Who flushes. Connections do not say whose they are, and a flush on one stands for what was written on all of a
    /// client's: each of them is told of what is lost.
    pub(crate) user: Arc<User>,
    pub(crate) terms: Terms,
}

/// The answer to a request.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Done; there is nothing more to say.
    Done,
    /// A read's whole reply, with headers.
    Reply(Buffer),
    /// The extents from the request's offset on.
    Extents(Vec<Descriptor>),
    /// It did not work.
    Failed(Refusal),
}

impl From<Result<()>> for Answer {
    fn from(result: Result<()>) -> Self {
        match result {
            Ok(()) => Self::Done,
            Err(error) => failed(&error),
        }
    }
}

pub(crate) fn failed(error: &r3map_core::Error) -> Answer {
    tracing::debug!("a request failed: {error}");
    Answer::Failed(Refusal::new(Errno::from_kind(error.kind()), error.to_string()))
}

impl Answer {
    /// Adds the answer's bytes to `out`, unless it is a whole reply.
    pub(crate) fn encode(&self, framing: Framing, request: &Request, out: &mut Vec<u8>) {
        let Request { cookie, offset, .. } = *request;
        let chunk = match self {
            Self::Reply(_) => return,
            Self::Done if framing < Framing::Extended && request.command != Command::Read => {
                return SimpleReply { error: None, cookie }.encode(out);
            }
            Self::Failed(refusal) if framing == Framing::Simple => {
                return SimpleReply { error: Some(refusal.errno), cookie }.encode(out);
            }
            // A read of no bytes.
            Self::Done if framing == Framing::Simple => return SimpleReply { error: None, cookie }.encode(out),
            Self::Done => Chunk::None,
            Self::Extents(extents) => Chunk::BlockStatus { context: ALLOCATION, extents: extents.clone() },
            Self::Failed(refusal) => {
                Chunk::Error { error: refusal.errno, message: Text::cut(&refusal.reason), offset: None }
            }
        };
        chunk.encode(framing, ReplyFlags::DONE, cookie, offset, out);
    }
}

/// How much room a request's payload or its reply needs, in bytes.
pub(crate) fn room(request: &Request, framing: Framing) -> u64 {
    match request.command {
        Command::Read => request.length,
        Command::Cache => request.length.min(STEP),
        Command::BlockStatus => (EXTENTS * size_of::<Descriptor>()) as u64,
        _ => request.payload_len(framing),
    }
}

impl Link {
    /// Whether a read may be lent rather than copied: the backend can, and an error can be told after the first chunk.
    pub(crate) fn lends(&self, request: &Request) -> bool {
        request.command == Command::Read
            && !request.flags.contains(CommandFlags::DF)
            && self.terms.framing >= Framing::Structured
            && self.export.backend.capabilities().pieces.is_some()
    }

    /// Does a request that was checked. `payload` is the room for its reply, or its data.
    pub(crate) async fn answer(&self, request: Request, payload: Payload) -> Answer {
        let flags = request.flags;
        let (offset, length) = (request.offset, request.length);
        match (request.command, payload) {
            (Command::Read, _) if length == 0 => Answer::Done,
            (Command::Read, Payload::Room(share)) => self.read(&request, offset, share).await,
            (Command::Write, Payload::Data(data)) => self.durably(flags, self.write(offset, data.used())).await.into(),
            (Command::Flush, _) => self.user.flush().await.into(),
            (Command::Trim, _) => self.durably(flags, self.trim(offset, length)).await.into(),
            (Command::WriteZeroes, _) => self.write_zeroes(flags, offset, length).await,
            (Command::Cache, Payload::Room(share)) => self.cache(offset, length, share).await.into(),
            (Command::BlockStatus, Payload::Data(data)) => self.chosen_status(&request, data.used()).await,
            (Command::BlockStatus, Payload::Room(_)) => self.block_status(flags, offset, length).await,
            // A write of no bytes, which has no payload.
            _ => Answer::Done,
        }
    }

    /// The change, and a flush after it if it is to be durable.
    async fn durably(&self, flags: CommandFlags, change: impl Future<Output = Result<()>>) -> Result<()> {
        if flags.contains(CommandFlags::FUA) { self.user.durably(change).await } else { change.await }
    }

    async fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let step = usize::try_from(self.export.step).unwrap_or(usize::MAX);
        let mut at = offset;
        for part in data.chunks(step) {
            self.export.backend.write_at(at, part).await?;
            at += part.len() as u64;
        }
        Ok(())
    }

    async fn trim(&self, offset: u64, length: u64) -> Result<()> {
        match self.export.backend.capabilities().trim {
            Some(trim) => trim.trim(offset, length).await,
            None => Ok(()),
        }
    }

    /// Zeros by the quickest way that does what was asked for. Where they must have storage they are written as bytes.
    async fn write_zeroes(&self, flags: CommandFlags, offset: u64, length: u64) -> Answer {
        let capabilities = self.export.backend.capabilities();
        let may_be_hole = !flags.contains(CommandFlags::NO_HOLE);
        let zeroing = async {
            match (capabilities.write_zeroes, capabilities.trim) {
                (Some(zero), _) if may_be_hole => zero.write_zeroes(offset, length).await,
                (None, Some(trim)) if may_be_hole => trim.trim(offset, length).await,
                _ => self.write_plain_zeroes(offset, length).await,
            }
        };
        let quick = may_be_hole && (capabilities.write_zeroes.is_some() || capabilities.trim.is_some());
        if flags.contains(CommandFlags::FAST_ZERO) && !quick {
            return Answer::Failed(Refusal::new(Errno::NotSup, "zeros would have to be written"));
        }
        self.durably(flags, zeroing).await.into()
    }

    async fn write_plain_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        for (at, len) in steps(offset, length, self.export.step.min(ZEROES.len() as u64)) {
            self.export.backend.write_at(at, &ZEROES[..len]).await?;
        }
        Ok(())
    }

    /// Reads and forgets, so that whatever caches below has it.
    async fn cache(&self, offset: u64, length: u64, share: Share) -> Result<()> {
        let mut buffer = None;
        let mut share = Some(share);
        for (at, len) in steps(offset, length, self.export.step.min(STEP)) {
            if let Some(pieces) = self.export.backend.capabilities().pieces {
                pieces.read_pieces(at, len as u64, &mut |_, _| Ok(())).await?;
                continue;
            }
            let buffer: &mut Buffer = buffer.get_or_insert_with(|| share.take().expect("taken once").buffer(len));
            let start = buffer.used().len();
            let part = if start < len { buffer.more(len - start) } else { &mut buffer.used_mut()[..len] };
            self.export.backend.read_at(at, part).await?;
        }
        Ok(())
    }

    async fn chosen_status(&self, request: &Request, payload: &[u8]) -> Answer {
        let chosen = match StatusPayload::decode(payload) {
            Ok(chosen) => chosen,
            Err(error) => return Answer::Failed(Refusal::new(Errno::Inval, error.to_string())),
        };
        if let Err(refusal) = check_range(Command::BlockStatus, request.offset, chosen.length, &self.export) {
            return Answer::Failed(refusal);
        }
        match chosen.contexts[..] {
            [] => Answer::Done,
            [ALLOCATION] => self.block_status(request.flags, request.offset, chosen.length).await,
            _ => Answer::Failed(Refusal::new(Errno::Inval, "contexts that were not selected, or one twice")),
        }
    }

    async fn block_status(&self, flags: CommandFlags, offset: u64, length: u64) -> Answer {
        let most = if flags.contains(CommandFlags::REQ_ONE) { 1 } else { EXTENTS };
        let Some(extents) = self.export.backend.capabilities().extents else {
            return Answer::Extents(vec![Descriptor { length, flags: 0 }]);
        };
        match extents.extents(offset, length).await {
            Ok(found) => Answer::Extents(descriptors(&found, most)),
            Err(error) => failed(&error),
        }
    }

    /// Reads from `from` on, where what comes before has been told already.
    pub(crate) async fn read(&self, request: &Request, from: u64, share: Share) -> Answer {
        let length = request.offset + request.length - from;
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        let mut reply = Reply::new(self.terms.framing, request, share.buffer(len));
        let result = match self.export.backend.capabilities().pieces {
            Some(_) => self.read_pieces(request, from, &mut reply).await,
            None => self.read_whole(from, reply.data(from, len)).await,
        };
        match result {
            Ok(()) => Answer::Reply(reply.finish()),
            Err(error) => failed(&error),
        }
    }

    async fn read_whole(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let step = usize::try_from(self.export.step).unwrap_or(usize::MAX);
        let mut at = offset;
        for part in buf.chunks_mut(step) {
            self.export.backend.read_at(at, part).await?;
            at += part.len() as u64;
        }
        Ok(())
    }

    async fn read_pieces(&self, request: &Request, from: u64, reply: &mut Reply) -> Result<()> {
        let holes = self.terms.framing >= Framing::Structured && !request.flags.contains(CommandFlags::DF);
        for (at, len) in steps(from, request.offset + request.length - from, self.export.step) {
            let Some(pieces) = self.export.backend.capabilities().pieces else { return Ok(()) };
            let mut visit = |at: u64, piece: Piece<'_>| {
                reply.piece(at, piece, holes);
                Ok(())
            };
            pieces.read_pieces(at, len as u64, &mut visit).await?;
        }
        Ok(())
    }
}

/// What a request comes with: its data, or room for its reply.
#[derive(Debug)]
pub(crate) enum Payload {
    Room(Share),
    Data(Buffer),
}

/// A range in steps.
fn steps(offset: u64, length: u64, step: u64) -> impl Iterator<Item = (u64, usize)> {
    let step = step.min(usize::MAX as u64);
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let len = step.min(end - at);
        let found = (at, usize::try_from(len).unwrap_or(usize::MAX));
        at += len;
        (len > 0).then_some(found)
    })
}

/// Extents as descriptors: neighbours of one kind are one, and there are at most `most`.
fn descriptors(extents: &[Extent], most: usize) -> Vec<Descriptor> {
    let mut found: Vec<Descriptor> = Vec::new();
    for extent in extents {
        let length = extent.range.end - extent.range.start;
        let flags = match extent.kind {
            ExtentKind::Data => StateFlags::empty(),
            ExtentKind::Hole => StateFlags::HOLE | StateFlags::ZERO,
        };
        let full = found.len() == most;
        match found.last_mut() {
            Some(last) if last.flags == flags.bits() => last.length += length,
            _ if full => break,
            _ => found.push(Descriptor { length, flags: flags.bits() }),
        }
    }
    found
}

/// The bytes of a read's reply, as the pieces come.
struct Reply {
    framing: Framing,
    request: Request,
    buffer: Buffer,
    /// Where the header of the chunk of data that is being made begins, and how much of its data there is.
    open: Option<(usize, u64)>,
}

impl Reply {
    fn new(framing: Framing, request: &Request, mut buffer: Buffer) -> Self {
        if framing == Framing::Simple {
            let mut header = Vec::with_capacity(SimpleReply::LEN);
            SimpleReply { error: None, cookie: request.cookie }.encode(&mut header);
            buffer.push(&header);
        }
        Self { framing, request: *request, buffer, open: None }
    }

    fn header_len(&self) -> usize {
        match self.framing {
            Framing::Simple => 0,
            Framing::Structured => ChunkHeader::STRUCTURED_LEN + 8,
            Framing::Extended => ChunkHeader::EXTENDED_LEN + 8,
        }
    }

    /// Room for `len` bytes of data at `at`, to be filled.
    fn data(&mut self, at: u64, len: usize) -> &mut [u8] {
        match &mut self.open {
            Some((_, length)) => *length += len as u64,
            None => {
                let start = self.buffer.used().len();
                self.buffer.more(self.header_len());
                self.open = Some((start, len as u64));
                self.put_header(start, at, len as u64, ReplyFlags::empty());
            }
        }
        self.buffer.more(len)
    }

    /// Adds a piece; holes stay holes if `holes` and they are long enough.
    fn piece(&mut self, at: u64, piece: Piece<'_>, holes: bool) {
        match piece {
            Piece::Data(bytes) => self.data(at, bytes.len()).copy_from_slice(bytes),
            Piece::Zeroes(length) if holes && length >= SHORTEST_HOLE => self.hole(at, length),
            Piece::Zeroes(length) => self.data(at, usize::try_from(length).unwrap_or(usize::MAX)).fill(0),
        }
    }

    fn hole(&mut self, at: u64, length: u64) {
        self.close(ReplyFlags::empty());
        let mut chunk = Vec::with_capacity(64);
        let length = u32::try_from(length).expect("a read is shorter than 4 GiB");
        let Request { cookie, offset, .. } = self.request;
        Chunk::Hole { offset: at, length }.encode(self.framing, ReplyFlags::empty(), cookie, offset, &mut chunk);
        self.buffer.push(&chunk);
    }

    /// Ends the chunk of data that is being made: its length is known now.
    fn close(&mut self, flags: ReplyFlags) {
        let Some((start, length)) = self.open.take() else { return };
        if self.framing == Framing::Simple {
            return;
        }
        let offset_at = start + self.header_len() - 8;
        let at = self.buffer.used()[offset_at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        self.put_header(start, at, length, flags);
    }

    fn put_header(&mut self, start: usize, at: u64, length: u64, flags: ReplyFlags) {
        if self.framing == Framing::Simple {
            return;
        }
        let length = u32::try_from(length).expect("a read is shorter than 4 GiB");
        let Request { cookie, offset, .. } = self.request;
        let mut header = Vec::with_capacity(64);
        encode_data_header(self.framing, flags, cookie, offset, at, length, &mut header);
        self.buffer.used_mut()[start..start + header.len()].copy_from_slice(&header);
    }

    /// The whole reply: the last chunk is marked as such, or followed by an empty one if it is a hole.
    fn finish(mut self) -> Buffer {
        if self.framing == Framing::Simple {
            return self.buffer;
        }
        if self.open.is_some() {
            self.close(ReplyFlags::DONE);
            return self.buffer;
        }
        let mut last = Vec::with_capacity(ChunkHeader::EXTENDED_LEN);
        let Request { cookie, offset, .. } = self.request;
        Chunk::None.encode(self.framing, ReplyFlags::DONE, cookie, offset, &mut last);
        self.buffer.push(&last);
        self.buffer
    }
}
