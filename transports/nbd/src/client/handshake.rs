//! The client's side of the handshake: from a fresh byte stream to transmission, or to a list of exports
//! (proto.md, "Handshake"; the chart is in [`crate::wire`]).
//!
//! It reads exactly what belongs to the handshake, so that TLS or transmission can go on with the stream. It has no
//! time-outs; whoever calls limits it.

use std::fmt;
use std::io;
use std::sync::Arc;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::client::facts::Facts;
use crate::stream::Stream;
use crate::tls;
use crate::wire::{
    BASE_ALLOCATION, BlockSizes, ClientFlags, ClientOption, Command, CommandFlags, ExportReply, Framing, Greeting,
    HandshakeFlags, Info, InfoRequest, InfoType, Malformed, MetaRequest, OptionReply, OptionReplyHeader, ReplyError,
    Request, Text, TransmissionFlags,
};

/// The most replies to one option: nobody has more exports, and nobody waits for more.
const MAX_REPLIES: usize = 1 << 14;

/// How TLS is used.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) config: Arc<rustls::ClientConfig>,
    /// The name that the server's certificate must have.
    pub(crate) name: ServerName<'static>,
    /// Whether to go on in plain if the server has no TLS.
    pub(crate) optional: bool,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("name", &self.name).field("optional", &self.optional).finish_non_exhaustive()
    }
}

/// An export on a server's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// A line for humans; often empty.
    pub description: String,
    /// What it is, if the server tells.
    pub export: Option<Export>,
}

/// What a server says about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The size in bytes.
    pub size: u64,
    /// What can be done with it.
    pub flags: TransmissionFlags,
    /// Which requests it takes.
    pub blocks: Option<BlockSizes>,
    /// A line for humans.
    pub description: Option<String>,
    /// The metadata contexts that it has.
    pub contexts: Vec<String>,
}

impl Export {
    /// What can be done with it, in words: `write`, `flush`, `fua`, `rotational`, `trim`, `write-zeroes`, `df`,
    /// `multi-conn`, `cache`, `fast-zero`, in this order.
    #[must_use]
    pub fn abilities(&self) -> Vec<&'static str> {
        let has = |flag| self.flags.contains(flag);
        let all = [
            (!has(TransmissionFlags::READ_ONLY), "write"),
            (has(TransmissionFlags::SEND_FLUSH), "flush"),
            (has(TransmissionFlags::SEND_FUA), "fua"),
            (has(TransmissionFlags::ROTATIONAL), "rotational"),
            (has(TransmissionFlags::SEND_TRIM), "trim"),
            (has(TransmissionFlags::SEND_WRITE_ZEROES), "write-zeroes"),
            (has(TransmissionFlags::SEND_DF), "df"),
            (has(TransmissionFlags::CAN_MULTI_CONN), "multi-conn"),
            (has(TransmissionFlags::SEND_CACHE), "cache"),
            (has(TransmissionFlags::SEND_FAST_ZERO), "fast-zero"),
        ];
        all.into_iter().filter_map(|(can, what)| can.then_some(what)).collect()
    }
}

/// A connection on which options are haggled over.
pub(crate) struct Handshake<'a> {
    stream: Stream,
    /// What the server is called in errors.
    peer: &'a (dyn fmt::Display + Send + Sync),
    zeroes: bool,
    framing: Framing,
    tls_name: String,
}

/// The last reply to an option.
type Verdict = Result<(), (ReplyError, Text)>;

impl<'a> Handshake<'a> {
    /// Greets, and begins TLS as `tls` says.
    ///
    /// # Errors
    /// `Unavailable` if the server closes, `Corrupt` or `InvalidInput` if it is no NBD server of today, `Denied` if there
    /// is no TLS where it must be or one side does not trust the other.
    pub(crate) async fn begin(
        stream: Stream,
        peer: &'a (dyn fmt::Display + Send + Sync),
        tls: Option<&Tls>,
    ) -> Result<Self> {
        let mut this = Self { stream, peer, zeroes: true, framing: Framing::Simple, tls_name: String::new() };
        let mut greeting = [0; Greeting::LEN];
        this.read(&mut greeting).await?;
        let offered = Greeting::decode(&greeting).map_err(|why| this.no_server(why))?.flags;
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            return Err(this.error(ErrorKind::InvalidInput, "the server is too old: it cannot answer options"));
        }
        let mut flags = ClientFlags::FIXED_NEWSTYLE;
        flags.set(ClientFlags::NO_ZEROES, offered.contains(HandshakeFlags::NO_ZEROES));
        this.zeroes = !flags.contains(ClientFlags::NO_ZEROES);
        this.write(&flags.encode()).await?;
        match tls {
            None => Ok(this),
            Some(tls) => this.start_tls(tls).await,
        }
    }

    async fn start_tls(mut self, tls: &Tls) -> Result<Self> {
        match self.ask(&ClientOption::StartTls, |_| Ok(())).await? {
            Ok(()) => {}
            Err(_) if tls.optional => return Ok(self),
            Err((error, message)) => {
                let what = format!("TLS is demanded, and the server has none ({})", said(error, &message));
                let why = self.error(ErrorKind::Denied, &what);
                return Err(self.part(why).await);
            }
        }
        let name = tls.name.to_str().into_owned();
        let connector = TlsConnector::from(tls.config.clone());
        let stream = connector.connect(tls.name.clone(), self.stream).await;
        let stream = stream.map_err(|error| tls::explain(self.peer, &name, error))?;
        Ok(Self { stream: Stream::Tls(Box::new(stream)), tls_name: name, ..self })
    }

    /// Negotiates all that helps, and begins transmission with an export.
    ///
    /// # Errors
    /// `NotFound` for an export that is not there, `Denied` where the server says so; otherwise as [`Self::begin`].
    pub(crate) async fn go(mut self, export: &str) -> Result<(Stream, Facts)> {
        match self.negotiate_framing().await {
            Ok(()) => self.go_plainly(export).await,
            Err(why) => Err(self.part(why).await),
        }
    }

    /// As [`Self::go`], but with simple replies if no other framing was negotiated: what the kernel's client speaks.
    ///
    /// # Errors
    /// As [`Self::go`].
    pub(crate) async fn go_plainly(mut self, export: &str) -> Result<(Stream, Facts)> {
        match self.choose(export).await {
            Ok(facts) => match facts.check(self.peer) {
                Ok(facts) => Ok((self.stream, facts)),
                Err(why) => Err(self.disconnect(why).await),
            },
            Err(why) => Err(self.part(why).await),
        }
    }

    async fn choose(&mut self, export: &str) -> Result<Facts> {
        let name = self.text(export)?;
        let allocation = self.select_allocation(&name).await?;
        let request = InfoRequest { name: name.clone(), wanted: vec![InfoType::BlockSize] };
        let mut told = Told::default();
        match self.ask(&ClientOption::Go(request), |reply| told.take(reply)).await? {
            Ok(()) => {
                let (size, flags) = told.export.ok_or_else(|| self.malformed("an export without a size"))?;
                Ok(Facts { size, flags, framing: self.framing, allocation, blocks: told.blocks })
            }
            Err((ReplyError::Unsupported, _)) if self.framing != Framing::Extended => {
                let (size, flags) = self.export_name(name).await?;
                Ok(Facts { size, flags, framing: self.framing, allocation, blocks: None })
            }
            Err((error, message)) => Err(self.refused(export, error, &message)),
        }
    }

    /// Ends a session that comes to nothing, as a client must (proto.md, "Termination of the session during option
    /// haggling"), and gives `why` back.
    async fn part(&mut self, why: Error) -> Error {
        let mut bytes = Vec::new();
        ClientOption::Abort.encode(&mut bytes);
        self.end(&bytes, why).await
    }

    /// The same when transmission has begun.
    async fn disconnect(&mut self, why: Error) -> Error {
        let (flags, command) = (CommandFlags::empty(), Command::Disconnect);
        let request = Request { flags, command, cookie: 0, offset: 0, length: 0 };
        let mut bytes = Vec::new();
        request.encode(self.framing, &mut bytes).expect("nothing is short enough for any framing");
        self.end(&bytes, why).await
    }

    async fn end(&mut self, last_words: &[u8], why: Error) -> Error {
        // Where that fails the server has gone itself. What it answers does not matter.
        if self.write(last_words).await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
        why
    }

    /// The way in that old servers have: they close the connection if they do not like it.
    async fn export_name(&mut self, name: Text) -> Result<(u64, TransmissionFlags)> {
        let export = name.to_string();
        let mut bytes = Vec::new();
        ClientOption::ExportName(name).encode(&mut bytes);
        self.write(&bytes).await?;
        let mut reply = [0; ExportReply::LEN];
        self.read(&mut reply).await.map_err(|error| match error.kind() {
            ErrorKind::Unavailable => {
                self.error(ErrorKind::NotFound, &format!("the server closes at the export {export:?}: check its name"))
            }
            _ => error,
        })?;
        let reply = ExportReply::decode(&reply).map_err(|why| self.malformed(why))?;
        if self.zeroes {
            self.read(&mut [0; ExportReply::ZEROES]).await?;
        }
        Ok((reply.size, reply.flags))
    }

    /// Names the server's exports, with what it says about each.
    ///
    /// # Errors
    /// `Denied` if the server does not tell; otherwise as [`Self::begin`].
    pub(crate) async fn list(mut self) -> Result<Vec<Listed>> {
        match self.list_all().await {
            Ok(listed) => {
                let _ = self.ask(&ClientOption::Abort, |_| Ok(())).await;
                Ok(listed)
            }
            Err(why) => Err(self.part(why).await),
        }
    }

    async fn list_all(&mut self) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        let verdict = self.ask(&ClientOption::List, |reply| {
            if let OptionReply::Server { name, description } = reply {
                let (name, description) = (name.into_string(), description.into_string());
                listed.push(Listed { name, description, export: None });
            }
            Ok(())
        });
        match verdict.await? {
            Ok(()) => {}
            Err((error, message)) => {
                let what = format!("the server does not list its exports ({})", said(error, &message));
                return Err(self.error(kind(error), &what));
            }
        }
        self.negotiate_framing().await?;
        for listed in &mut listed {
            listed.export = self.info(&listed.name).await?;
        }
        Ok(listed)
    }

    async fn info(&mut self, export: &str) -> Result<Option<Export>> {
        let name = self.text(export)?;
        let mut contexts = Vec::new();
        if self.framing != Framing::Simple {
            let option = ClientOption::ListMetaContext(MetaRequest { name: name.clone(), queries: Vec::new() });
            let verdict = self.ask(&option, |reply| {
                if let OptionReply::MetaContext { name, .. } = reply {
                    contexts.push(name.into_string());
                }
                Ok(())
            });
            if verdict.await?.is_err() {
                contexts.clear();
            }
        }
        let wanted = vec![InfoType::BlockSize, InfoType::Description];
        let mut told = Told::default();
        let verdict = self.ask(&ClientOption::Info(InfoRequest { name, wanted }), |reply| told.take(reply)).await?;
        let export = told.export.filter(|_| verdict.is_ok());
        Ok(export.map(|(size, flags)| Export {
            size,
            flags,
            blocks: told.blocks,
            description: told.description,
            contexts,
        }))
    }

    /// The richest framing that the server has.
    async fn negotiate_framing(&mut self) -> Result<()> {
        for (option, framing) in
            [(ClientOption::ExtendedHeaders, Framing::Extended), (ClientOption::StructuredReply, Framing::Structured)]
        {
            match self.ask(&option, |_| Ok(())).await? {
                Ok(()) => {
                    self.framing = framing;
                    return Ok(());
                }
                Err((ReplyError::TlsRequired, message)) => {
                    return Err(self.refused("", ReplyError::TlsRequired, &message));
                }
                Err((ReplyError::Shutdown, message)) => return Err(self.refused("", ReplyError::Shutdown, &message)),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Selects `base:allocation`, and gives its id if the server has it.
    async fn select_allocation(&mut self, name: &Text) -> Result<Option<u32>> {
        if self.framing == Framing::Simple {
            return Ok(None);
        }
        let request = MetaRequest { name: name.clone(), queries: vec![self.text(BASE_ALLOCATION)?] };
        let option = ClientOption::SetMetaContext(request);
        let mut id = None;
        let verdict = self.ask(&option, |reply| match reply {
            OptionReply::MetaContext { id: new, name } if &*name == BASE_ALLOCATION && id.is_none() => {
                id = Some(new);
                Ok(())
            }
            OptionReply::MetaContext { .. } => Err("a metadata context that was not asked for"),
            _ => Ok(()),
        });
        Ok(if verdict.await?.is_ok() { id } else { None })
    }

    /// Sends an option and takes its replies, up to the last.
    async fn ask(
        &mut self,
        option: &ClientOption,
        mut take: impl FnMut(OptionReply) -> Result<(), &'static str>,
    ) -> Result<Verdict> {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.write(&bytes).await?;
        for _ in 0..MAX_REPLIES {
            let mut header = [0; OptionReplyHeader::LEN];
            self.read(&mut header).await?;
            let header = OptionReplyHeader::decode(&header).map_err(|why| self.malformed(why))?;
            if header.option != option.code() {
                return Err(self.malformed(format!("a reply to an option that was not sent ({:?})", header.option)));
            }
            // The codec has checked the length.
            let mut data = vec![0; header.length as usize];
            self.read(&mut data).await?;
            match OptionReply::decode(header.kind, &data).map_err(|why| self.malformed(why))? {
                OptionReply::Ack => return Ok(Ok(())),
                OptionReply::Error { error, message } => return Ok(Err((error, message))),
                reply => take(reply).map_err(|why| self.malformed(why))?,
            }
        }
        Err(self.malformed(format!("more than {MAX_REPLIES} replies to one option")))
    }

    async fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        let read = self.stream.read_exact(bytes).await.map(|_| ());
        read.map_err(|error| self.lost(error))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        written.await.map_err(|error| self.lost(error))
    }

    fn text(&self, text: &str) -> Result<Text> {
        Text::new(text).map_err(|why| self.error(ErrorKind::InvalidInput, &why.to_string()))
    }

    fn error(&self, kind: ErrorKind, what: &str) -> Error {
        Error::new(kind, Operation::Open, format!("{}: {}", self.peer, what.replace(['\r', '\n'], " ")))
    }

    fn no_server(&self, why: Malformed) -> Error {
        self.error(ErrorKind::InvalidInput, &why.to_string())
    }

    fn malformed(&self, why: impl fmt::Display) -> Error {
        self.error(ErrorKind::Corrupt, &format!("the server answered with {why}"))
    }

    /// The connection broke. What TLS has to say about it, where there is TLS, tells more: a server that does not like
    /// the client's certificate says so only after the TLS handshake.
    fn lost(&self, error: io::Error) -> Error {
        let tells = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        if tells {
            return tls::explain(self.peer, &self.tls_name, error);
        }
        let closed = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        let what = match (closed, self.stream.is_tls()) {
            (true, true) => {
                "the server closed the connection after the TLS handshake; does it ask for a client certificate?"
            }
            (true, false) => "the server closed the connection during the handshake",
            _ => return Error::from_io(Operation::Open, format!("{}: the connection is lost", self.peer), error),
        };
        self.error(ErrorKind::Unavailable, what)
    }

    fn refused(&self, export: &str, error: ReplyError, message: &Text) -> Error {
        let name = if export.is_empty() { "default export".to_owned() } else { format!("export {export:?}") };
        let what = match error {
            ReplyError::UnknownExport => format!("the server has no {name}: see which it has with `r3map nbd list`"),
            ReplyError::TlsRequired => "the server demands TLS: use nbds:// instead of nbd://".to_owned(),
            other => format!("the server refuses the {name} ({})", said(other, message)),
        };
        self.error(kind(error), &what)
    }
}

/// What `INFO` and `GO` tell.
#[derive(Default)]
struct Told {
    export: Option<(u64, TransmissionFlags)>,
    blocks: Option<BlockSizes>,
    description: Option<String>,
}

impl Told {
    fn take(&mut self, reply: OptionReply) -> Result<(), &'static str> {
        match reply {
            OptionReply::Info(Info::Export { size, flags }) => self.export = Some((size, flags)),
            OptionReply::Info(Info::BlockSize(sizes)) => self.blocks = Some(sizes),
            OptionReply::Info(Info::Description(text)) => self.description = Some(text.into_string()),
            OptionReply::Info(_) => {}
            _ => return Err("something else than information about an export"),
        }
        Ok(())
    }
}

fn kind(error: ReplyError) -> ErrorKind {
    match error {
        ReplyError::UnknownExport => ErrorKind::NotFound,
        ReplyError::Policy | ReplyError::TlsRequired => ErrorKind::Denied,
        ReplyError::Shutdown => ErrorKind::Unavailable,
        _ => ErrorKind::InvalidInput,
    }
}

fn said(error: ReplyError, message: &Text) -> String {
    match message.is_empty() {
        true => error.to_string(),
        false => format!("{error}: {message}"),
    }
}
