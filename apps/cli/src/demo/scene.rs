//! The demo's stage: the file, the process that serves it, the proxy between, and the proof at the end.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map::{Backend, Mount, OpenOptions, Registry};
use r3map_testkit::fill;
use r3map_testkit::proxy::DelayProxy;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::output::Output;

/// The size of the file that is generated, in bytes.
const GENERATED: u64 = 256 << 20;
const STEP: usize = 1 << 20;
/// How long the server may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A write that the demo made: these bytes at this offset.
pub(super) struct Written {
    offset: u64,
    bytes: Vec<u8>,
}

pub(super) struct Scene {
    server: Server,
    proxy: DelayProxy,
    original: Option<PathBuf>,
    /// What is served. It has no name, so that nothing is left of it, however this process ends.
    served: File,
    size: u64,
    rtt: Duration,
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Scene {
    pub(super) async fn set_up(original: Option<&Path>, rtt: Duration, output: Output) -> Result<Self> {
        let mut served = tempfile::tempfile().with_context(|| {
            format!("cannot create a temporary file in {}; TMPDIR says where", std::env::temp_dir().display())
        })?;
        let size = match original {
            Some(file) => copy_file(file, &mut served)?,
            None => generate(&mut served, output)?,
        };
        // From this thread, whose end is the end of the server.
        let (server, stdout) = serve(&served)?;
        let address = tokio::task::spawn_blocking(move || address(stdout));
        let address =
            tokio::time::timeout(START_LIMIT, address).await.context("the server did not start in time")???;
        let proxy = DelayProxy::tcp(address, rtt).context("cannot start the delay proxy")?;
        Ok(Self { server, proxy, original: original.map(Path::to_owned), served, size, rtt })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn rtt(&self) -> Duration {
        self.rtt
    }

    /// The region, on a connection of its own.
    pub(super) async fn connect(&self) -> Result<Arc<dyn Backend>> {
        let uri = format!("grpc://{}", self.proxy.socket_addr()).parse()?;
        Ok(Registry::standard().open(&uri, &OpenOptions::default()).await?)
    }

    /// Whether FUSE works here; says why if not.
    pub(super) async fn can_mount_files(&self, output: Output) -> bool {
        let tried = async {
            let tiny = Registry::standard().open(&"memory:?size=1".parse()?, &OpenOptions::default()).await?;
            Mount::direct(tiny).file().await?.close().await
        };
        match tried.await {
            Ok(()) => true,
            Err(error) => {
                output.note("note", &format!("files are left out: {error}"));
                false
            }
        }
    }

    /// Writes here and there through a managed slice, and through a managed file where that works, and flushes.
    pub(super) async fn write_everywhere(&self, files: bool) -> Result<Vec<Written>> {
        let mut written = writes(self.size, 1);
        let mut slice = Mount::managed(self.connect().await?).slice().await?;
        for write in &written {
            let end = write.offset + write.bytes.len() as u64;
            slice.demand(write.offset..end).await?;
            slice.write_at(write.offset, &write.bytes)?;
        }
        slice.flush().await?;
        slice.close().await?;
        if files {
            let through_file = writes(self.size, 2);
            let file = Mount::managed(self.connect().await?).file().await?;
            let handle = file.file().try_clone()?;
            let done = tokio::task::spawn_blocking(move || {
                for write in &through_file {
                    std::os::unix::fs::FileExt::write_all_at(&handle, &write.bytes, write.offset)?;
                }
                handle.sync_all()?;
                std::io::Result::Ok(through_file)
            });
            written.extend(done.await??);
            file.close().await?;
        }
        Ok(written)
    }

    /// Stops the server and compares its file with what it should be.
    pub(super) async fn tear_down(self, written: &[Written], output: Output) -> Result<()> {
        let Self { server, proxy, original, mut served, size, .. } = self;
        drop(server);
        drop(proxy);
        let bar = output.bar("checking", size);
        served.rewind()?;
        let stored = hash(&mut served, size, |at, _| bar.set(at, ""))?;
        let overlay = |at: u64, buf: &mut [u8]| written.iter().for_each(|write| write.lay_over(at, buf));
        let expected = match &original {
            Some(file) => hash(&mut File::open(file)?, size, overlay)?,
            None => hash(&mut Generated { at: 0 }, size, overlay)?,
        };
        bar.finish();
        let bytes: usize = written.iter().map(|write| write.bytes.len()).sum();
        if stored != expected {
            bail!("the source is not what was written: its SHA-256 is {stored}, it should be {expected}");
        }
        let human = format!(
            "wrote {} here and there, flushed, and checked every byte at the source: SHA-256 {stored}, as it should be",
            r3map::size::format(bytes as u64)
        );
        output.event("checked", &human, json!({ "sha256": stored, "written": bytes, "size": size }));
        Ok(())
    }
}

impl Written {
    /// Replaces what this write changed in `buf`, which stands at `at`.
    fn lay_over(&self, at: u64, buf: &mut [u8]) {
        let (start, end) = (self.offset.max(at), (self.offset + self.bytes.len() as u64).min(at + buf.len() as u64));
        if start < end {
            let (from, to) = (index(start - at), index(end - at));
            let skip = index(start - self.offset);
            buf[from..to].copy_from_slice(&self.bytes[skip..skip + to - from]);
        }
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("it lies inside a buffer")
}

/// Writes of all sorts: across chunks, inside a block, at both ends.
fn writes(size: u64, seed: u64) -> Vec<Written> {
    let lengths = [1, 100, 4096, 70_000, 1 << 20];
    let count = lengths.len() as u64;
    let places = (0..count).map(|i| (size / count * i + seed * 12_345) % size);
    let mut written: Vec<Written> = places.zip(lengths).map(|(offset, len)| write(offset, len, size, seed)).collect();
    written.push(write(size - 1, 1, size, seed));
    written
}

fn write(offset: u64, len: u64, size: u64, seed: u64) -> Written {
    let mut bytes = vec![0; index(len.min(size - offset))];
    fill::write(&mut bytes, offset, seed);
    Written { offset, bytes }
}

/// The bytes of the generated file.
struct Generated {
    at: u64,
}

impl Read for Generated {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        fill::write(buf, self.at, 0);
        self.at += buf.len() as u64;
        Ok(buf.len())
    }
}

fn generate(file: &mut File, output: Output) -> Result<u64> {
    let bar = output.bar("making", GENERATED);
    let mut source = Generated { at: 0 };
    let mut buf = vec![0; STEP];
    while source.at < GENERATED {
        source.read_exact(&mut buf)?;
        file.write_all(&buf).context("cannot write the demo's file; is the disk full?")?;
        bar.set(source.at, "");
    }
    bar.finish();
    Ok(GENERATED)
}

fn copy_file(from: &Path, to: &mut File) -> Result<u64> {
    let name = from.display();
    let mut file = File::open(from).with_context(|| format!("cannot open {name}"))?;
    if file.metadata()?.is_dir() {
        bail!("{name} is a directory; --file takes a file");
    }
    let size = file.seek(SeekFrom::End(0))?;
    if size == 0 {
        bail!("{name} is empty; a region has at least one byte");
    }
    file.rewind()?;
    // Some report a size before there is anything, or another one than they have.
    let copied = std::io::copy(&mut file, to).with_context(|| format!("cannot copy {name}"))?;
    if copied != size {
        bail!("{name} was changed while it was copied; let it rest, or take another file");
    }
    Ok(size)
}

/// Starts this program once more, as a server, which says on its standard output where it listens. It ends with the thread
/// that calls this, at the latest.
fn serve(file: &File) -> Result<(Server, ChildStdout)> {
    let own = std::process::id().to_string();
    let name = format!("file:/proc/{own}/fd/{}", file.as_raw_fd());
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--json", "serve", &name, "--listen", "grpc://127.0.0.1:0", "--end-with", &own])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the server")?;
    let stdout = child.stdout.take();
    let server = Server(child);
    Ok((server, stdout.context("the server has no output")?))
}

/// Where a server listens, once it does.
fn address(stdout: ChildStdout) -> Result<std::net::SocketAddr> {
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let said: Value = serde_json::from_str(&line).context("the server did not start")?;
    match (said["uri"].as_str(), said["message"].as_str()) {
        (Some(uri), _) => Ok(uri.trim_start_matches("grpc://").parse()?),
        (None, message) => bail!("the server did not start: {}", message.unwrap_or("it did not say why")),
    }
}

/// The SHA-256 of `size` bytes, each piece first changed by `overlay`.
fn hash(source: &mut impl Read, size: u64, overlay: impl Fn(u64, &mut [u8])) -> Result<String> {
    let (mut hash, mut buf, mut at) = (Sha256::new(), vec![0; STEP], 0);
    while at < size {
        let len = usize::try_from(size - at).unwrap_or(STEP).min(STEP);
        source.read_exact(&mut buf[..len])?;
        overlay(at, &mut buf[..len]);
        hash.update(&buf[..len]);
        at += len as u64;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
