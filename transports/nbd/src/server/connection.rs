//! One connection from its first byte to its last: handshake, TLS, transmission, and what the log says of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::server::answer::Link;
use crate::server::check::Terms;
use crate::server::clock::Patience;
use crate::server::export::Served;
use crate::server::haggle::{Failure, Haggling, Outcome, Security, greet};
use crate::server::transmission::{Fault, Limits, Transmission};
use crate::server::{Shared, Tls};
use crate::wire::Framing;

/// How long the other side may take to hear that this one has nothing more to say.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long it may take to close too.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    /// Who it is, for the log.
    peer: String,
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, peer: String) -> Self {
        shared.connected.fetch_add(1, Ordering::Relaxed);
        Self { shared, peer }
    }

    /// Serves a client from the greeting on.
    pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send>(self, stream: S) {
        let ending = self.shared.ending.clone();
        ending.run_until_cancelled(self.converse(stream)).await;
    }

    /// Serves a client that made no handshake.
    pub(super) async fn transmit_only<S: AsyncRead + AsyncWrite + Unpin + Send>(self, stream: S, export: Arc<Served>) {
        let terms = Terms { framing: Framing::Simple, allocation: false };
        let ending = self.shared.ending.clone();
        ending.run_until_cancelled(self.transmit(stream, Link { user: export.owner.clone(), export, terms })).await;
    }

    async fn converse<S: AsyncRead + AsyncWrite + Unpin + Send>(&self, mut stream: S) {
        let deadline = tokio::time::Instant::now() + self.shared.settings.handshake_limit;
        let (security, acceptor) = match &self.shared.settings.tls {
            Tls::Off => (Security::Off, None),
            Tls::Optional(config) => (Security::Offered, Some(TlsAcceptor::from(config.clone()))),
            Tls::Required(config) => (Security::Demanded, Some(TlsAcceptor::from(config.clone()))),
        };
        let opening = async {
            let zeroes = greet(&mut stream).await?;
            Ok((self.haggle(&mut stream, security, zeroes).await?, zeroes))
        };
        match (tokio::time::timeout_at(deadline, opening).await, acceptor) {
            (Ok(Ok((Outcome::Go(link), _))), _) => self.transmit(stream, link).await,
            (Ok(Ok((Outcome::StartTls, zeroes))), Some(acceptor)) => {
                let securing = async {
                    let mut secure = acceptor.accept(stream).await?;
                    let outcome = self.haggle(&mut secure, Security::On, zeroes).await?;
                    Ok((secure, outcome))
                };
                match tokio::time::timeout_at(deadline, securing).await {
                    Ok(Ok((stream, Outcome::Go(link)))) => self.transmit(stream, link).await,
                    Ok(Ok((stream, _))) => farewell(stream).await,
                    Ok(Err(failure)) => self.failed(&failure),
                    Err(_) => self.late(),
                }
            }
            (Ok(Ok(_)), _) => farewell(stream).await,
            (Ok(Err(failure)), _) => self.failed(&failure),
            (Err(_), _) => self.late(),
        }
    }

    async fn haggle<S>(&self, stream: &mut S, security: Security, zeroes: bool) -> Result<Outcome, Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let closing = || self.shared.closing.is_cancelled();
        let haggling = Haggling::new(stream, &self.shared.exports, security, zeroes, &closing).run();
        tokio::select! {
            outcome = haggling => outcome,
            // Whoever is in the middle of the handshake when the server closes has nothing to lose.
            () = self.shared.closing.cancelled() => Ok(Outcome::Closed),
        }
    }

    async fn transmit<S: AsyncRead + AsyncWrite + Unpin + Send>(&self, stream: S, link: Link) {
        let settings = &self.shared.settings;
        let name = link.export.name.clone();
        tracing::debug!("{} uses the export {name:?} with {:?} replies", self.peer, link.terms.framing);
        let (stall, least_rate, idle) = (settings.stall_limit, settings.least_rate, settings.idle_limit);
        let limits = Limits { requests: settings.requests.get(), patience: Patience { stall, least_rate, idle } };
        let room = self.shared.pool.room();
        let closing = self.shared.closing.clone().cancelled_owned();
        match Transmission::new(stream, link, limits, room, closing).run().await {
            Ok(stream) => farewell(stream).await,
            Err(Fault::Stream(error)) if is_gone(&error) => {
                tracing::debug!("{} left the export {name:?}: {error}", self.peer);
            }
            Err(fault) => tracing::warn!("the connection of {} to the export {name:?} is closed: {fault}", self.peer),
        }
    }

    fn failed(&self, failure: &Failure) {
        match failure {
            Failure::Stream(error) if is_gone(error) => {
                tracing::debug!("{} left during the handshake: {error}", self.peer);
            }
            failure => tracing::warn!("the handshake with {} failed: {failure}", self.peer),
        }
    }

    fn late(&self) {
        let limit = self.shared.settings.handshake_limit;
        tracing::warn!("{} did not choose an export within {} s", self.peer, limit.as_secs_f32());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the client just went away, which is its right.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// Ends the stream: TLS first, where it is spoken. Then what the client still sends is received and forgotten, until it
/// closes too: TCP resets a connection that is closed with something unread, and drops what it has not delivered.
async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    if let Ok(Ok(())) = timeout(FAREWELL, stream.shutdown()).await {
        let _ = timeout(LAST_WORDS, tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
    }
}
