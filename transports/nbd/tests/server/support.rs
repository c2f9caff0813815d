//! Servers that tests start, programs that connect to them, and connections that say what the test wants.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use r3map_core::Backend;
use r3map_local::Memory;
use r3map_nbd::{Address, Server, ServerExport, ServerSettings};
use r3map_testkit::process::Process;
use tempfile::TempDir;

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

    /// Waits until nobody is connected.
    pub(crate) async fn is_left(&self) {
        let end = Instant::now() + LONG;
        while self.server.connections() > 0 {
            assert!(Instant::now() < end, "{} connections are left", self.server.connections());
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
    let mut process = Process::start(Command::new(program).args(arguments));
    process.close_stdin();
    let success = process.wait(LONG).success();
    let mut lines = process.stdout();
    if !success {
        lines.extend(process.stderr());
    }
    (success, lines.join("\n"))
}
