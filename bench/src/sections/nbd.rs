//! The NBD transport against the programs that others use: our client and libnbd's nbdcopy, reading from the same nbdkit.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use r3map_core::Backend;
use r3map_nbd::{Client, ClientSettings, NbdUri};
use r3map_testkit::fill;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::figure::{Spec, Target, Unit};
use crate::run::{Bench, Settings, throughput};

const NAME: &str = "nbd";
/// The length of a request in bytes, which is nbdcopy's own choice.
const REQUEST: u64 = 256 << 10;
/// Requests in flight of our client, in all; nbdcopy has 64 on each connection.
const IN_FLIGHT: u64 = 32;
/// How much longer a copy is than the figure's size: starting nbdcopy must not show.
const TIMES: u64 = 4;

pub(crate) fn run(bench: &mut Bench) {
    client(bench);
    super::nbd_server::run(bench);
}

/// Reads all of what nbdkit has in memory, connecting included, as nbdcopy does with `null:`.
fn client(bench: &mut Bench) {
    let setting = Nbdkit::start(&bench.settings);
    for (name, connections) in [("client: read, 4 connections", 4), ("client: read, 1 connection", 1)] {
        let spec = Spec::new(NAME, name, Unit::MebibytesPerSecond)
            .limit("nbdcopy, from the same nbdkit memory to null:, as many connections")
            .target(Target::RatioAtLeast(1.0));
        let server = match &setting {
            Ok(server) => server,
            Err(error) => {
                bench.finish(spec, Err(anyhow::anyhow!("{error:#}")));
                continue;
            }
        };
        let mebibytes = crate::run::mebibytes(server.size);
        bench.pair(
            spec,
            || throughput(mebibytes, || server.read(connections)),
            || throughput(mebibytes, || server.nbdcopy(connections)),
        );
    }
}

/// nbdkit with its memory plugin, full of data, on a Unix socket.
struct Nbdkit {
    child: Child,
    directory: TempDir,
    size: u64,
    runtime: Runtime,
}

impl Nbdkit {
    fn start(settings: &Settings) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = socket(directory.path());
        let size = settings.size * TIMES;
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket).args(["memory", &size.to_string()]);
        let child = command.stdin(Stdio::null()).spawn().context("nbdkit, of the package of that name")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let this = Self { child, directory, size, runtime };
        this.wait()?;
        this.runtime.block_on(this.fill(settings.seed))?;
        Ok(this)
    }

    fn wait(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(socket(self.directory.path())).is_err() {
            if Instant::now() > end {
                bail!("nbdkit does not listen");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn uri(&self) -> Result<NbdUri> {
        Ok(format!("nbd+unix:///?socket={}", socket(self.directory.path()).display()).parse()?)
    }

    async fn fill(&self, seed: u64) -> Result<()> {
        let client = Client::connect(self.uri()?, ClientSettings::default()).await?;
        for offset in (0..self.size).step_by(usize::try_from(REQUEST)?) {
            let len = usize::try_from(REQUEST.min(self.size - offset))?;
            client.write_at(offset, &fill::bytes(offset, len, seed)).await?;
        }
        let mut bytes = vec![0; 5000];
        client.read_at(self.size - 5000, &mut bytes).await?;
        fill::check(&bytes, self.size - 5000, seed).map_err(anyhow::Error::msg)
    }

    /// Reads everything with our client.
    fn read(&self, connections: usize) -> Result<()> {
        let settings = ClientSettings { connections: connections.try_into()?, ..ClientSettings::default() };
        let (uri, size) = (self.uri()?, self.size);
        self.runtime.block_on(async {
            let client = Arc::new(Client::connect(uri, settings).await?);
            let next = Arc::new(AtomicU64::new(0));
            let mut readers = JoinSet::new();
            for _ in 0..IN_FLIGHT {
                readers.spawn(read_on(client.clone(), next.clone(), size));
            }
            while let Some(reader) = readers.join_next().await {
                reader??;
            }
            Ok(())
        })
    }

    /// Reads everything with nbdcopy.
    fn nbdcopy(&self, connections: usize) -> Result<()> {
        let mut command = Command::new("nbdcopy");
        command.arg(format!("--connections={connections}")).arg(self.uri()?.to_string()).arg("null:");
        let status = command.stdin(Stdio::null()).status().context("nbdcopy, of the package libnbd-bin")?;
        if status.success() { Ok(()) } else { bail!("nbdcopy: {status}") }
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        // It has nothing to save.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("nbd.sock")
}

async fn read_on(client: Arc<Client>, next: Arc<AtomicU64>, size: u64) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(REQUEST)?];
    loop {
        let at = next.fetch_add(REQUEST, Ordering::Relaxed);
        if at >= size {
            return Ok(());
        }
        let len = buffer.len().min(usize::try_from(size - at)?);
        client.read_at(at, &mut buffer[..len]).await?;
    }
}
