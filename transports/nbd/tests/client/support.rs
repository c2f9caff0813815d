//! Servers that tests start, and connecting to them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::{Backend, ErrorKind};
use r3map_nbd::{Client, ClientSettings, NbdUri};
use r3map_testkit::process::Process;
use tempfile::TempDir;

/// How long a server may take to start.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// A server on a Unix socket in a directory of its own. Dropping it kills it.
pub(crate) struct Foreign {
    _process: Process,
    pub(crate) directory: TempDir,
}

impl Foreign {
    /// Starts nbdkit with arguments, the words of `text`.
    pub(crate) fn nbdkit(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { _process: nbdkit(&socket_in(directory.path()), text), directory }
    }

    /// Starts qemu-nbd with arguments, on a file of `size` bytes in its directory, called `disk`.
    pub(crate) fn qemu_nbd(arguments: &[&str], size: u64) -> Self {
        Self::qemu_nbd_at(Path::new("qemu-nbd"), arguments, size)
    }

    /// The same with a program of one's choice.
    pub(crate) fn qemu_nbd_at(program: &Path, arguments: &[&str], size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let mut command = Command::new(program);
        command.arg("--socket").arg(socket_in(directory.path())).args(["--persistent", "--format=raw"]);
        let process = Process::start(command.args(arguments).arg(&disk));
        Self { _process: process, directory }.ready()
    }

    /// Starts qemu-storage-daemon with an export `disk` of `size` bytes; with TLS on both sides, if it has certificates.
    pub(crate) fn qemu_storage_daemon(size: u64, certificates: Option<&Path>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (disk, socket) = (directory.path().join("disk"), socket_in(directory.path()));
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let mut command = Command::new("qemu-storage-daemon");
        command.arg(format!("--blockdev=driver=file,filename={},node-name=disk,discard=unmap", disk.display()));
        let mut listen = format!("--nbd-server=addr.type=unix,addr.path={},max-connections=0", socket.display());
        if let Some(directory) = certificates {
            command.arg(server_credentials(directory));
            listen += ",tls-creds=tls0";
        }
        command.arg(listen);
        command.arg("--export=type=nbd,id=export,node-name=disk,name=disk,writable=on");
        Self { _process: Process::start(&mut command), directory }.ready()
    }

    fn ready(self) -> Self {
        wait_for(&self.socket());
        self
    }

    pub(crate) fn socket(&self) -> PathBuf {
        socket_in(self.directory.path())
    }

    pub(crate) fn uri(&self, export: &str) -> NbdUri {
        unix_uri(&self.socket(), export)
    }

    pub(crate) async fn client(&self) -> Client {
        connect(&self.uri("")).await
    }
}

/// What tells qemu's servers to speak TLS as `tls0`, with clients that have certificates.
pub(crate) fn server_credentials(directory: &Path) -> String {
    format!("--object=tls-creds-x509,id=tls0,endpoint=server,dir={},verify-peer=yes", directory.display())
}

pub(crate) fn socket_in(directory: &Path) -> PathBuf {
    directory.join("nbd.sock")
}

/// Starts nbdkit on a socket, and waits until it listens.
pub(crate) fn nbdkit(socket: &Path, text: &str) -> Process {
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--unix"]).arg(socket).args(text.split_whitespace());
    let process = Process::start(&mut command);
    wait_for(socket);
    process
}

/// Waits until somebody listens on a socket.
pub(crate) fn wait_for(socket: &Path) {
    let end = Instant::now() + LONG;
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(Instant::now() < end, "nobody listens on {}", socket.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn unix_uri(socket: &Path, export: &str) -> NbdUri {
    format!("nbd+unix:///{export}?socket={}", socket.display()).parse().unwrap()
}

pub(crate) async fn connect(uri: &NbdUri) -> Client {
    Client::connect(uri.clone(), ClientSettings::default()).await.unwrap_or_else(|error| panic!("{uri}: {error}"))
}

/// Connects for a test that wants a backend.
pub(crate) async fn backend(uri: NbdUri) -> Arc<dyn Backend> {
    Arc::new(connect(&uri).await)
}

/// Connects in vain, and gives the error's kind and text, which is one line.
pub(crate) async fn refused(uri: &NbdUri) -> (ErrorKind, String) {
    let settings = ClientSettings { connect_timeout: LONG, ..ClientSettings::default() };
    let error = Client::connect(uri.clone(), settings).await.expect_err("this cannot be connected to");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text:?}");
    (error.kind(), text)
}

pub(crate) async fn read(backend: &dyn Backend, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xa5; len];
    backend.read_at(offset, &mut buf).await.unwrap_or_else(|error| panic!("{error}"));
    buf
}
