//! A server that a test writes: an honest handshake, and whatever replies the test wants; cut or changed where it wants.

use std::sync::Arc;

use r3map_nbd::wire::{
    BASE_ALLOCATION, Chunk, ClientOption, Command, Framing, Greeting, HandshakeFlags, Info, OptionCode, OptionHeader,
    OptionReply, ReplyError, ReplyFlags, Request, SimpleReply, Text, TransmissionFlags,
};
use r3map_nbd::{Client, ClientSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// The id of `base:allocation` here.
pub(crate) const CONTEXT: u32 = 7;
/// The export's size in bytes.
pub(crate) const SIZE: u64 = 1 << 20;

/// What the server answers to a request, in bytes.
type Answer = Arc<dyn Fn(&Request) -> Vec<u8> + Send + Sync>;

/// A server for one connection.
#[derive(Clone)]
pub(crate) struct Liar {
    framing: Framing,
    answer: Answer,
    /// How many bytes it sends before it closes.
    cut: Option<usize>,
    /// A bit that it sends wrong, counted from the first byte of transmission.
    flip: Option<(usize, u8)>,
    /// Whether it closes after its first answer.
    once: bool,
}

impl Liar {
    pub(crate) fn new(framing: Framing, answer: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self { framing, answer: Arc::new(answer), cut: None, flip: None, once: false }
    }

    /// Sends only so many bytes in all.
    pub(crate) fn cut(self, bytes: usize) -> Self {
        Self { cut: Some(bytes), ..self }
    }

    /// Changes a bit of what it answers to requests.
    pub(crate) fn flip(self, byte: usize, bit: u8) -> Self {
        Self { flip: Some((byte, bit)), ..self }
    }

    /// Closes after the first answer.
    pub(crate) fn once(self) -> Self {
        Self { once: true, ..self }
    }

    /// A client of it, on a fresh connection.
    pub(crate) async fn client(&self) -> r3map_core::Result<Client> {
        let (here, there) = tokio::io::duplex(1 << 16);
        let line = Line { stream: there, left: self.cut.unwrap_or(usize::MAX) };
        // It ends when either side closes; why does not matter here.
        tokio::spawn(self.clone().serve(line));
        let settings = ClientSettings { silence: std::time::Duration::from_secs(2), ..ClientSettings::default() };
        Client::over(here, "", settings).await
    }

    async fn serve(self, mut line: Line) -> Option<()> {
        line.send(&Greeting { flags: HandshakeFlags::FIXED_NEWSTYLE }.encode()).await?;
        line.stream.read_exact(&mut [0; 4]).await.ok()?;
        while !self.option(&mut line).await? {}
        let mut sent = 0;
        loop {
            let mut header = vec![0; Request::len(self.framing)];
            line.stream.read_exact(&mut header).await.ok()?;
            let request = Request::decode(self.framing, &header).ok()??;
            let mut payload = vec![0; usize::try_from(request.payload_len(self.framing)).ok()?];
            line.stream.read_exact(&mut payload).await.ok()?;
            let mut answer = (self.answer)(&request);
            if let Some((byte, bit)) = self.flip
                && let Some(byte) = byte.checked_sub(sent).and_then(|at| answer.get_mut(at))
            {
                *byte ^= 1 << bit;
            }
            sent += answer.len();
            line.send(&answer).await?;
            if self.once {
                return None;
            }
        }
    }

    /// Answers one option, and says whether transmission begins.
    async fn option(&self, line: &mut Line) -> Option<bool> {
        let mut header = [0; OptionHeader::LEN];
        line.stream.read_exact(&mut header).await.ok()?;
        let header = OptionHeader::decode(&header).ok()?;
        let mut data = vec![0; header.length as usize];
        line.stream.read_exact(&mut data).await.ok()?;
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_WRITE_ZEROES;
        let (mut out, code) = (Vec::new(), header.code);
        let allowed = match code {
            OptionCode::ExtendedHeaders => self.framing == Framing::Extended,
            OptionCode::StructuredReply => self.framing == Framing::Structured,
            _ => true,
        };
        if !allowed {
            OptionReply::Error { error: ReplyError::Unsupported, message: Text::default() }.encode(code, &mut out);
            line.send(&out).await?;
            return Some(false);
        }
        if let Ok(ClientOption::SetMetaContext(_)) = ClientOption::decode(code, &data) {
            let name = Text::new(BASE_ALLOCATION).ok()?;
            OptionReply::MetaContext { id: CONTEXT, name }.encode(code, &mut out);
        }
        if code == OptionCode::Go {
            OptionReply::Info(Info::Export { size: SIZE, flags }).encode(code, &mut out);
        }
        OptionReply::Ack.encode(code, &mut out);
        line.send(&out).await?;
        Some(code == OptionCode::Go)
    }
}

/// A line that breaks after some bytes.
struct Line {
    stream: DuplexStream,
    left: usize,
}

impl Line {
    async fn send(&mut self, bytes: &[u8]) -> Option<()> {
        let part = &bytes[..bytes.len().min(self.left)];
        self.left -= part.len();
        self.stream.write_all(part).await.ok()?;
        (part.len() == bytes.len()).then_some(())
    }
}

/// Bytes of the export.
pub(crate) fn bytes(offset: u64, len: u64) -> Vec<u8> {
    r3map_testkit::fill::bytes(offset, usize::try_from(len).unwrap(), 1)
}

/// A chunk, as an answer to a request.
pub(crate) fn chunk(framing: Framing, request: &Request, last: bool, chunk: &Chunk<'_>) -> Vec<u8> {
    let flags = if last { ReplyFlags::DONE } else { ReplyFlags::empty() };
    let mut out = Vec::new();
    chunk.encode(framing, flags, request.cookie, request.offset, &mut out);
    out
}

/// What an honest server answers; a read has data, a hole in the middle, and data again.
pub(crate) fn honest(framing: Framing) -> impl Fn(&Request) -> Vec<u8> {
    move |request| {
        let (offset, third) = (request.offset, request.length / 3);
        if framing == Framing::Simple {
            let mut out = Vec::new();
            SimpleReply { error: None, cookie: request.cookie }.encode(&mut out);
            if request.command == Command::Read {
                out.extend(holey(offset, request.length));
            }
            return out;
        }
        match request.command {
            Command::Read => {
                let (first, last) = (bytes(offset, third), bytes(offset + 2 * third, request.length - 2 * third));
                let hole = u32::try_from(third).unwrap();
                [
                    chunk(framing, request, false, &Chunk::Data { offset: offset + 2 * third, bytes: &last }),
                    chunk(framing, request, false, &Chunk::Hole { offset: offset + third, length: hole }),
                    chunk(framing, request, true, &Chunk::Data { offset, bytes: &first }),
                ]
                .concat()
            }
            _ => chunk(framing, request, true, &Chunk::None),
        }
    }
}

/// What a read from an honest server gives.
pub(crate) fn holey(offset: u64, len: u64) -> Vec<u8> {
    let (mut all, third) = (bytes(offset, len), usize::try_from(len / 3).unwrap());
    all[third..2 * third].fill(0);
    all
}
