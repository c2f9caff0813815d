//! A socket that others connect to, of either kind.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::fs::Mode;
use tokio::net::{TcpListener, UnixListener, UnixSocket, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::server::Site;
use crate::server::session::serve;
use crate::stream::Stream;
use crate::target::Target;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long to wait when a connection cannot be accepted for want of something, such as file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Socket,
    target: Target,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _file: SocketFile },
}

impl Listener {
    pub(crate) async fn bind(target: &Target) -> Result<Self> {
        let failed = |error: io::Error| {
            let message = format!("cannot listen on {target}");
            match ErrorKind::of_io(&error) {
                // No address of this host, or a name that cannot be looked up, which has no kind of its own.
                ErrorKind::Internal => Error::new(ErrorKind::InvalidInput, Operation::Open, message).with_source(error),
                _ => Error::from_io(Operation::Open, message, error),
            }
        };
        match target {
            Target::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).await.map_err(failed)?;
                let port = socket.local_addr().map_err(failed)?.port();
                Ok(Self { socket: Socket::Tcp(socket), target: Target::Tcp { host: host.clone(), port } })
            }
            Target::Unix(path) => {
                let (listener, file) = bind_unix(path).await.map_err(failed)?;
                Ok(Self { socket: Socket::Unix { listener, _file: file }, target: target.clone() })
            }
        }
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Serves each connection in a task of its own, for ever.
    pub(crate) async fn accept_all(
        self,
        site: Arc<Site>,
        tasks: TaskTracker,
        closing: CancellationToken,
        ending: CancellationToken,
    ) {
        loop {
            let Ok(permit) = site.connections.clone().acquire_owned().await else { return };
            match self.accept().await {
                Ok(stream) => {
                    let serving = serve(stream, site.clone(), tasks.clone(), closing.clone(), ending.clone());
                    tasks.spawn(async move {
                        serving.await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!("cannot accept a connection on {}: {error}", self.target);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(listener) => Stream::tcp(listener.accept().await?.0),
            Socket::Unix { listener, .. } => Stream::unix(listener.accept().await?.0),
        }
    }
}

async fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    clear(path).await?;
    let socket = UnixSocket::new_stream()?;
    // Linux gives the file the mode of the socket, so that nobody can connect before it is set.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(path)?;
    let file = SocketFile::new(path)?;
    Ok((socket.listen(BACKLOG)?, file))
}

/// Removes a socket that nobody listens on.
async fn clear(path: &Path) -> io::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there"));
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens there")),
    }
}

/// The file of a listening Unix socket, removed with it.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let found = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), identity: (found.dev(), found.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
