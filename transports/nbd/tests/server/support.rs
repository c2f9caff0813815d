//! Servers that tests start, programs that connect to them, and connections that say what the test wants.

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::Backend;
use r3map_local::Memory;
use r3map_nbd::wire::{
    Chunk, ClientFlags, ClientOption, Command, CommandFlags, Errno, ExportReply, Framing, Greeting, InfoRequest,
    MetaRequest, OptionCode, OptionHeader, OptionReply, OptionReplyHeader, ReplyHeader, Request, SimpleReply, Text,
};
use r3map_nbd::{Address, Server, ServerExport, ServerSettings};
use r3map_testkit::process::Process;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How long anything may take.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A server on a Unix socket in a directory of its own.
pub(crate) struct Running {
    pub(crate) server: Server,
    pub(crate) directory: TempDir,
}

impl Running {
    pub(crate) async fn start(exports: Vec<ServerExport>, settings: ServerSettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new(exports, settings).unwrap();
        server.listen(&Address::Unix(directory.path().join("nbd.sock"))).await.unwrap();
        Self { server, directory }
    }

    /// One export, called `disk`.
    pub(crate) async fn one(backend: Arc<dyn Backend>) -> Self {
        Self::start(vec![ServerExport::new("disk", backend)], ServerSettings::default()).await
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A connection on which nothing was said.
    pub(crate) async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.socket()).await.unwrap()
    }

    /// A connection in transmission.
    pub(crate) async fn transmit(&self, framing: Framing) -> Raw {
        let mut raw = Raw { stream: self.connect().await, framing };
        raw.greet().await;
        raw.go().await;
        raw
    }

    /// How many connections the system has open at the server's socket.
    fn open_sockets(&self) -> usize {
        let table = std::fs::read_to_string("/proc/net/unix").unwrap();
        let path = self.socket();
        // State 3 is connected; the listener has 1.
        let is_one =
            |line: &&str| line.ends_with(path.to_str().unwrap()) && line.split_whitespace().nth(5) == Some("03");
        table.lines().filter(is_one).count()
    }

    /// Waits until nobody is connected, and no socket is left of who was.
    pub(crate) async fn is_left(&self) {
        let end = Instant::now() + LONG;
        while self.server.connections() > 0 || self.open_sockets() > 0 {
            let (connections, sockets) = (self.server.connections(), self.open_sockets());
            assert!(Instant::now() < end, "{connections} connections and {sockets} sockets are left");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// A region in memory, filled as `r3map_testkit::fill` has it.
pub(crate) fn memory(size: u64, seed: u64) -> Arc<Memory> {
    let memory = Memory::new(size).unwrap();
    memory.write_now(0, &filled(size, seed)).unwrap();
    Arc::new(memory)
}

pub(crate) fn filled(size: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    r3map_testkit::fill::write(&mut bytes, 0, seed);
    bytes
}

pub(crate) fn contents(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.size()).unwrap()];
    memory.read_now(0, &mut bytes).unwrap();
    bytes
}

/// Runs a program to its end; what it printed on its standard output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let (success, output) = try_run(program, arguments);
    assert!(success, "{program} {arguments:?} failed: {output}");
    output
}

/// Runs a program to its end; whether it succeeded, and what it printed.
pub(crate) fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let mut running = Process::start(process::Command::new(program).args(arguments));
    running.close_stdin();
    let success = running.wait(LONG).success();
    let mut lines = running.stdout();
    if !success {
        lines.extend(running.stderr());
    }
    (success, lines.join("\n"))
}

/// A client that says exactly what it is told to.
pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) framing: Framing,
}

impl Raw {
    /// Receives the greeting and answers it.
    pub(crate) async fn greet(&mut self) {
        let mut greeting = [0; Greeting::LEN];
        self.stream.read_exact(&mut greeting).await.unwrap();
        Greeting::decode(&greeting).unwrap();
        let flags = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        self.stream.write_all(&flags.encode()).await.unwrap();
    }

    /// Sends an option, and receives all replies to it.
    pub(crate) async fn option(&mut self, option: &ClientOption) -> Vec<OptionReply> {
        let mut out = Vec::new();
        option.encode(&mut out);
        self.stream.write_all(&out).await.unwrap();
        self.option_replies(option.code()).await
    }

    /// The same with any data, which need not make sense.
    pub(crate) async fn option_with(&mut self, code: OptionCode, data: &[u8]) -> Vec<OptionReply> {
        let header = OptionHeader { code, length: u32::try_from(data.len()).unwrap() };
        self.stream.write_all(&header.encode()).await.unwrap();
        self.stream.write_all(data).await.unwrap();
        self.option_replies(code).await
    }

    async fn option_replies(&mut self, code: OptionCode) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let mut head = [0; OptionReplyHeader::LEN];
            self.stream.read_exact(&mut head).await.unwrap();
            let header = OptionReplyHeader::decode(&head).unwrap();
            assert_eq!(header.option, code);
            let mut data = vec![0; header.length as usize];
            self.stream.read_exact(&mut data).await.unwrap();
            replies.push(OptionReply::decode(header.kind, &data).unwrap());
            if matches!(replies.last(), Some(OptionReply::Ack | OptionReply::Error { .. })) {
                return replies;
            }
        }
    }

    /// Agrees on the framing and `base:allocation`, and begins with the default export.
    pub(crate) async fn go(&mut self) {
        let framing = match self.framing {
            Framing::Simple => None,
            Framing::Structured => Some(ClientOption::StructuredReply),
            Framing::Extended => Some(ClientOption::ExtendedHeaders),
        };
        let name = Text::default();
        if let Some(framing) = framing {
            assert_eq!(self.option(&framing).await, [OptionReply::Ack]);
            let queries = vec![Text::new("base:allocation").unwrap()];
            let set = ClientOption::SetMetaContext(MetaRequest { name: name.clone(), queries });
            assert_eq!(self.option(&set).await.len(), 2);
        }
        let replies = self.option(&ClientOption::Go(InfoRequest { name, wanted: vec![] })).await;
        assert_eq!(replies.last(), Some(&OptionReply::Ack), "{replies:?}");
    }

    pub(crate) async fn export_name(&mut self, name: &str) -> Option<ExportReply> {
        let mut out = Vec::new();
        ClientOption::ExportName(Text::new(name).unwrap()).encode(&mut out);
        self.stream.write_all(&out).await.unwrap();
        let mut reply = [0; ExportReply::LEN];
        self.stream.read_exact(&mut reply).await.ok()?;
        Some(ExportReply::decode(&reply).unwrap())
    }

    pub(crate) async fn send(&mut self, request: Request, payload: &[u8]) {
        let mut out = Vec::new();
        request.encode(self.framing, &mut out).unwrap();
        out.extend_from_slice(payload);
        self.stream.write_all(&out).await.unwrap();
    }

    /// Whether the other side says nothing more.
    pub(crate) async fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        let read = tokio::time::timeout(LONG, self.stream.read_to_end(&mut rest)).await.expect("stuck");
        rest.is_empty() || read.is_err()
    }

    /// Receives a reply to `request`: the error, if it failed, and the data of a read.
    pub(crate) async fn reply(&mut self, request: &Request) -> Result<Vec<u8>, Errno> {
        let (cookie, reply) = self.any_reply(request).await;
        assert_eq!(cookie, request.cookie);
        reply
    }

    /// The same, whichever request it answers: those that are under way must be alike.
    pub(crate) async fn any_reply(&mut self, request: &Request) -> (u64, Result<Vec<u8>, Errno>) {
        let length = usize::try_from(request.length).unwrap();
        let mut data = vec![0; if request.command == Command::Read { length } else { 0 }];
        let mut failed = None;
        loop {
            let header = self.header().await;
            match header {
                ReplyHeader::Simple(SimpleReply { error: Some(error), cookie }) => return (cookie, Err(error)),
                ReplyHeader::Simple(SimpleReply { error: None, cookie }) => {
                    let mut payload = vec![0; if self.framing == Framing::Simple { data.len() } else { 0 }];
                    self.stream.read_exact(&mut payload).await.unwrap();
                    return (cookie, Ok(payload));
                }
                ReplyHeader::Chunk(header) => {
                    assert!(header.offset.is_none_or(|offset| offset == request.offset));
                    let mut payload = vec![0; header.length as usize];
                    self.stream.read_exact(&mut payload).await.unwrap();
                    match Chunk::decode(header.kind, &payload).unwrap() {
                        Chunk::Data { offset, bytes } => {
                            let at = usize::try_from(offset - request.offset).unwrap();
                            data[at..at + bytes.len()].copy_from_slice(bytes);
                        }
                        Chunk::Error { error, .. } => failed = Some(error),
                        Chunk::BlockStatus { extents, .. } => {
                            data.extend(extents.iter().flat_map(|extent| extent.length.to_be_bytes()));
                        }
                        Chunk::Hole { .. } | Chunk::None => {}
                    }
                    if header.is_last() {
                        return (header.cookie, failed.map_or(Ok(data), Err));
                    }
                }
            }
        }
    }

    async fn header(&mut self) -> ReplyHeader {
        let mut bytes = Vec::new();
        loop {
            if let Some(header) = ReplyHeader::decode(self.framing, 32 << 20, &bytes).unwrap() {
                return header;
            }
            bytes.push(tokio::time::timeout(LONG, self.stream.read_u8()).await.expect("stuck").unwrap());
        }
    }

    /// Sends a request and receives its reply.
    pub(crate) async fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        self.send(request, payload).await;
        self.reply(&request).await
    }
}

/// A request without flags.
pub(crate) fn request(command: Command, cookie: u64, offset: u64, length: u64) -> Request {
    Request { flags: CommandFlags::empty(), command, cookie, offset, length }
}

/// A write, as the framing wants it.
pub(crate) fn write(framing: Framing, cookie: u64, offset: u64, length: u64) -> Request {
    let mut request = request(Command::Write, cookie, offset, length);
    request.flags.set(CommandFlags::PAYLOAD_LEN, framing == Framing::Extended);
    request
}

pub(crate) const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

/// What a program has said in JSON.
pub(crate) fn parsed(output: &str) -> Value {
    serde_json::from_str(output).unwrap_or_else(|error| panic!("{error}: {output}"))
}

/// Offset, length and type of each extent in a map of nbdinfo.
pub(crate) fn extents(map: &Value) -> Vec<[u64; 3]> {
    let fields = |extent: &Value| ["offset", "length", "type"].map(|field| extent[field].as_u64().unwrap());
    map.as_array().unwrap().iter().map(fields).collect()
}
