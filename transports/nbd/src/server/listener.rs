//! A socket that others connect to, TCP or Unix. It accepts; what is said on a connection is not known here.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use r3map_core::{Error, ErrorKind, Operation, Result};
use rustix::fs::Mode;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixSocket, UnixStream};

use crate::stream::{Vanished, options};
use crate::uri::Address;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long to wait when a connection cannot be accepted for want of something, such as file descriptors.
pub(crate) const PAUSE: Duration = Duration::from_millis(50);

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Socket,
    address: Address,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix { listener: UnixListener, _file: Option<SocketFile> },
}

/// A connection that was accepted.
#[derive(Debug)]
pub(crate) enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    /// Listens on `address`; a Unix socket's file is made with mode 0600, and one that nobody listens on is replaced.
    ///
    /// # Errors
    /// Names the address: `Conflict` if it is in use, `Denied`, `InvalidInput` if it is no address of this host.
    pub(crate) async fn bind(address: &Address) -> Result<Self> {
        let failed = |error: io::Error| {
            let message = format!("cannot listen on {address}");
            match ErrorKind::of_io(&error) {
                // No address of this host, or a name that cannot be looked up, which has no kind of its own.
                ErrorKind::Internal => Error::new(ErrorKind::InvalidInput, Operation::Open, message).with_source(error),
                _ => Error::from_io(Operation::Open, message, error),
            }
        };
        match address {
            Address::Tcp { host, port } => {
                let socket = TcpListener::bind((host.as_str(), *port)).await.map_err(failed)?;
                let port = socket.local_addr().map_err(failed)?.port();
                Ok(Self { socket: Socket::Tcp(socket), address: Address::Tcp { host: host.clone(), port } })
            }
            Address::Unix(path) => {
                let (listener, file) = bind_unix(path).await.map_err(failed)?;
                Ok(Self { socket: Socket::Unix { listener, _file: file }, address: address.clone() })
            }
        }
    }

    /// Where it listens, with the port that the system chose where none was given.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The next connection, and who it is from. Over TCP a peer that vanishes is given up as `vanished` says.
    pub(crate) async fn accept(&self, vanished: Vanished) -> io::Result<(Accepted, String)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Accepted::Tcp(options(stream, vanished)?), peer.to_string()))
            }
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                let peer = match stream.peer_cred().ok().and_then(|peer| peer.pid()) {
                    Some(pid) => format!("process {pid}"),
                    None => "a process".to_owned(),
                };
                Ok((Accepted::Unix(stream), peer))
            }
        }
    }
}

/// An abstract name has no file.
fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_bytes().first() == Some(&0)
}

async fn bind_unix(path: &Path) -> io::Result<(UnixListener, Option<SocketFile>)> {
    let socket = UnixSocket::new_stream()?;
    if is_abstract(path) {
        socket.bind(path)?;
        return Ok((socket.listen(BACKLOG)?, None));
    }
    clear(path).await?;
    // Linux gives the file the mode of the socket, so that nobody can connect before it is set.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(path)?;
    let file = SocketFile::new(path)?;
    Ok((socket.listen(BACKLOG)?, Some(file)))
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
