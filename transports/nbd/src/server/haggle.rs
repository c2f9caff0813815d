//! The handshake of one connection: greeting, options, and what was agreed on (proto.md, "Handshake").
//!
//! Nothing is received ahead of what is being decoded, so that TLS begins with the first byte after `STARTTLS`, and
//! transmission with the first after `GO`.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::server::answer::{ALLOCATION, Link};
use crate::server::check::Terms;
use crate::server::export::{Exports, Served};
use crate::wire::{
    BASE_ALLOCATION, ClientFlags, ClientOption, ExportReply, Framing, Greeting, HandshakeFlags, Info, InfoRequest,
    InfoType, Malformed, MetaRequest, OptionCode, OptionHeader, OptionReply, ReplyError, Text,
};

/// Whether TLS is spoken on a connection, or may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Security {
    /// There is none.
    Off,
    /// The client may ask for it.
    Offered,
    /// The client must ask for it before anything else.
    Demanded,
    /// It is spoken.
    On,
}

/// How a handshake ends.
pub(super) enum Outcome {
    /// Transmission begins.
    Go(Link),
    /// The client wants TLS, and was told that it begins.
    StartTls,
    /// There is no more to say.
    Closed,
}

/// Why a handshake cannot go on.
#[derive(Debug)]
pub(super) enum Failure {
    Malformed(Malformed),
    /// The client wants what it cannot be told about.
    Refused(String),
    Stream(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Stream(error)
    }
}

impl From<Malformed> for Failure {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Malformed(malformed) => write!(f, "{malformed}"),
            Self::Refused(reason) => f.write_str(reason),
            Self::Stream(error) => write!(f, "{error}"),
        }
    }
}

/// Greets, and returns whether zeros follow the reply to `EXPORT_NAME`.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<bool, Failure> {
    let flags = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    stream.write_all(&Greeting { flags }.encode()).await?;
    stream.flush().await?;
    let mut bytes = [0; ClientFlags::LEN];
    stream.read_exact(&mut bytes).await?;
    let taken = ClientFlags::decode(bytes);
    let unknown = taken.difference(ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES);
    if !unknown.is_empty() {
        return Err(Malformed::found("the client sets flags that were not offered", unknown.bits().into()).into());
    }
    Ok(!taken.contains(ClientFlags::NO_ZEROES))
}

/// A handshake after the greeting.
pub(super) struct Haggling<'a, S> {
    stream: &'a mut S,
    exports: &'a Exports,
    security: Security,
    zeroes: bool,
    /// Whether the server is being shut down.
    closing: &'a (dyn Fn() -> bool + Send + Sync),
    framing: Framing,
    /// The export that `base:allocation` was selected for.
    allocation: Option<Arc<Served>>,
    out: Vec<u8>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Haggling<'a, S> {
    pub(super) fn new(
        stream: &'a mut S,
        exports: &'a Exports,
        security: Security,
        zeroes: bool,
        closing: &'a (dyn Fn() -> bool + Send + Sync),
    ) -> Self {
        let (framing, allocation) = (Framing::Simple, None);
        Self { stream, exports, security, zeroes, closing, framing, allocation, out: Vec::new() }
    }

    /// Answers options until one of them ends the handshake. Limit its time from outside.
    ///
    /// # Errors
    /// If the client is out of step, or the stream broke or ended.
    pub(super) async fn run(mut self) -> Result<Outcome, Failure> {
        loop {
            let mut head = [0; OptionHeader::LEN];
            self.stream.read_exact(&mut head).await?;
            let header = OptionHeader::decode(&head)?;
            if header.code == OptionCode::SetMetaContext {
                // What was selected before is replaced, also by a selection that fails.
                self.allocation = None;
            }
            let option = self.option(header).await?;
            // What may not be asked now is refused as that, whatever its data says.
            let outcome = match (self.refusal(header.code), option) {
                (None, Ok(option)) => self.answer(option)?,
                (Some(refusal), _) | (None, Err(refusal)) => self.refuse(header.code, refusal)?,
            };
            self.stream.write_all(&self.out).await?;
            self.stream.flush().await?;
            self.out.clear();
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
        }
    }

    /// Receives an option's data, all of it, whether it can be decoded or not.
    async fn option(&mut self, header: OptionHeader) -> Result<Result<ClientOption, OptionReply>, Failure> {
        if !header.fits() {
            skip(self.stream, header.length.into()).await?;
            return Ok(Err(OptionReply::error(ReplyError::TooBig, "the option is too long")));
        }
        let mut data = vec![0; usize::try_from(header.length).unwrap_or(0)];
        self.stream.read_exact(&mut data).await?;
        let decoded = ClientOption::decode(header.code, &data);
        Ok(decoded.map_err(|malformed| OptionReply::error(ReplyError::Invalid, &malformed.to_string())))
    }

    /// Refuses an option; `EXPORT_NAME` has no way to say so but to end the session.
    fn refuse(&mut self, code: OptionCode, refusal: OptionReply) -> Result<Option<Outcome>, Failure> {
        if let (OptionCode::ExportName, OptionReply::Error { error, message }) = (code, &refusal) {
            return Err(Failure::Refused(format!("{error}: {message}")));
        }
        self.say(code, &refusal);
        Ok(None)
    }

    fn say(&mut self, code: OptionCode, reply: &OptionReply) {
        reply.encode(code, &mut self.out);
    }

    fn answer(&mut self, option: ClientOption) -> Result<Option<Outcome>, Failure> {
        let code = option.code();
        match option {
            ClientOption::ExportName(name) => return self.begin_without_words(&name).map(Some),
            ClientOption::Go(request) => return Ok(self.describe(code, &request)),
            ClientOption::Info(request) => drop(self.describe(code, &request)),
            ClientOption::List => self.list(),
            ClientOption::ListMetaContext(request) | ClientOption::SetMetaContext(request) => {
                self.contexts(code, &request);
            }
            ClientOption::StructuredReply => self.framing = Framing::Structured,
            ClientOption::ExtendedHeaders => self.framing = Framing::Extended,
            ClientOption::Abort | ClientOption::StartTls | ClientOption::Unknown(_) => {}
        }
        let answered = matches!(code, OptionCode::Info | OptionCode::ListMetaContext | OptionCode::SetMetaContext);
        if !answered {
            self.say(code, &OptionReply::Ack);
        }
        Ok(match code {
            OptionCode::Abort => Some(Outcome::Closed),
            OptionCode::StartTls => Some(Outcome::StartTls),
            _ => None,
        })
    }

    /// What speaks against an option, whatever its data says.
    fn refusal(&self, code: OptionCode) -> Option<OptionReply> {
        let refuse = |error, message: &str| Some(OptionReply::error(error, message));
        match (code, self.security) {
            (OptionCode::Abort, _) => None,
            _ if (self.closing)() => refuse(ReplyError::Shutdown, "the server is being shut down"),
            (OptionCode::StartTls, Security::Off) => refuse(ReplyError::Policy, "the server has no TLS"),
            (OptionCode::StartTls, Security::On) => refuse(ReplyError::Invalid, "TLS is spoken already"),
            (OptionCode::StartTls, _) => None,
            (_, Security::Demanded) => refuse(ReplyError::TlsRequired, "the server speaks only TLS"),
            (OptionCode::Unknown(_), _) => refuse(ReplyError::Unsupported, "unknown option"),
            (OptionCode::StructuredReply, _) if self.framing == Framing::Extended => {
                refuse(ReplyError::ExtendedHeadersRequired, "extended headers were agreed on")
            }
            (OptionCode::SetMetaContext | OptionCode::ListMetaContext, _) if self.framing == Framing::Simple => {
                refuse(ReplyError::Invalid, "structured replies must be agreed on first")
            }
            (OptionCode::ExportName, _) if self.framing == Framing::Extended => {
                refuse(ReplyError::Invalid, "with extended headers, GO must be used")
            }
            _ => None,
        }
    }

    fn list(&mut self) {
        for export in self.exports.iter() {
            let (name, description) = (export.name.clone(), export.description.clone());
            OptionReply::Server { name, description }.encode(OptionCode::List, &mut self.out);
        }
    }

    fn unknown_export(&mut self, code: OptionCode, name: &str) {
        self.say(code, &OptionReply::error(ReplyError::UnknownExport, &format!("there is no export {name:?}")));
    }

    /// Answers `INFO` and `GO`; what was agreed on, if the export exists.
    fn describe(&mut self, code: OptionCode, request: &InfoRequest) -> Option<Outcome> {
        let Some(export) = self.exports.find(&request.name).cloned() else {
            self.unknown_export(code, &request.name);
            return None;
        };
        let link = self.link(&export);
        let flags = export.flags(self.framing, link.terms.allocation);
        self.say(code, &OptionReply::Info(Info::Export { size: export.size, flags }));
        let wanted = |info| request.wanted.contains(&info);
        if wanted(InfoType::Name) {
            self.say(code, &OptionReply::Info(Info::Name(export.name.clone())));
        }
        if wanted(InfoType::Description) && !export.description.is_empty() {
            self.say(code, &OptionReply::Info(Info::Description(export.description.clone())));
        }
        if wanted(InfoType::BlockSize) {
            self.say(code, &OptionReply::Info(Info::BlockSize(export.sizes)));
        }
        self.say(code, &OptionReply::Ack);
        Some(Outcome::Go(link))
    }

    fn link(&self, export: &Arc<Served>) -> Link {
        let allocation = self.allocation.as_ref().is_some_and(|selected| Arc::ptr_eq(selected, export));
        let user = Arc::new(export.losses.user());
        Link { export: export.clone(), user, terms: Terms { framing: self.framing, allocation } }
    }

    fn begin_without_words(&mut self, name: &str) -> Result<Outcome, Failure> {
        let Some(export) = self.exports.find(name).cloned() else {
            return Err(Failure::Refused(format!("there is no export {name:?}")));
        };
        let link = self.link(&export);
        let flags = export.flags(self.framing, link.terms.allocation);
        ExportReply { size: export.size, flags }.encode(self.zeroes, &mut self.out);
        Ok(Outcome::Go(link))
    }

    /// Answers `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    fn contexts(&mut self, code: OptionCode, request: &MetaRequest) {
        let sets = code == OptionCode::SetMetaContext;
        let Some(export) = self.exports.find(&request.name).cloned() else {
            return self.unknown_export(code, &request.name);
        };
        let mut queries = request.queries.iter();
        let found = match sets {
            true => queries.any(|query| **query == *BASE_ALLOCATION),
            false => queries.len() == 0 || queries.any(|query| matches!(&**query, "base:" | BASE_ALLOCATION)),
        };
        if found {
            let name = Text::cut(BASE_ALLOCATION);
            self.say(code, &OptionReply::MetaContext { id: if sets { ALLOCATION } else { 0 }, name });
        }
        if sets {
            self.allocation = found.then_some(export);
        }
        self.say(code, &OptionReply::Ack);
    }
}

/// Receives and forgets.
async fn skip<S: AsyncRead + Unpin>(stream: &mut S, length: u64) -> io::Result<()> {
    let skipped = tokio::io::copy(&mut stream.take(length), &mut tokio::io::sink()).await?;
    if skipped == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
