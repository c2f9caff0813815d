//! Our NBD server against the ones that others use, nbdkit and qemu-nbd: the same data in memory, a Unix socket, and the
//! same programs as clients, nbdcopy and fio.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use r3map_testkit::fill;
use serde_json::Value;
use tempfile::TempDir;

use crate::figure::{Spec, Target, Unit};
use crate::limits::processors::{on_processor, processors};
use crate::peer::{Peer, Role};
use crate::run::{Bench, Settings, mebibytes, throughput};

const NAME: &str = "nbd";
/// How much longer a copy is than the figure's size: starting nbdcopy must not show.
const TIMES: u64 = 4;
/// How long fio asks, in seconds.
const SECONDS: usize = 2;
/// Where files are in memory.
const MEMORY: &str = "/dev/shm";

/// What is measured of the server on a socket.
type Measure = Box<dyn Fn(&Path) -> Result<f64>>;

/// Something that a client does with each server.
struct Work {
    name: String,
    unit: Unit,
    measure: Measure,
}

pub(crate) fn run(bench: &mut Bench) {
    let settings = bench.settings.clone();
    let total = mebibytes(settings.size * TIMES);
    let copy = Work {
        name: "nbdcopy to null:".into(),
        unit: Unit::MebibytesPerSecond,
        measure: Box::new(move |socket| throughput(total, || copy_out(socket))),
    };
    let random = ["--rw=randread", "--bs=4k", "--iodepth=32"];
    let random = fio("random read of 4 KiB, depth 32", Unit::PerSecond, random, &settings);
    let sequential = ["--rw=read", "--bs=1m", "--iodepth=8"];
    let sequential = fio("sequential read of 1 MiB, depth 8", Unit::MebibytesPerSecond, sequential, &settings);
    compare(bench, &Servers::start(&settings), [copy, random, sequential]);
    one_at_a_time(bench);
}

/// With the client and the server on one processor, and on two: which of the two the kernel chooses by itself changes from
/// moment to moment, for each server apart, and decides more than what a server does to answer.
fn one_at_a_time(bench: &mut Bench) {
    let settings = bench.settings.clone();
    let processors = match processors() {
        Ok(processors) => processors,
        Err(error) => return bench.finish(Spec::new(NAME, "server: depth 1", Unit::PerSecond), Err(error)),
    };
    let mut clients = processors.iter().rev().copied();
    let Some(server) = clients.clone().next() else { return };
    // Processes stay on the processors of the thread that has started them.
    let servers = on_processor(server, || Servers::start(&settings));
    for (place, client) in ["one processor", "two processors"].into_iter().zip(&mut clients) {
        let name = format!("random read of 4 KiB, depth 1, {place}");
        let fio = fio(&name, Unit::PerSecond, ["--rw=randread", "--bs=4k", "--iodepth=1"], &settings);
        let measure = Box::new(move |socket: &Path| on_processor(client, || (fio.measure)(socket)));
        compare(bench, &servers, [Work { measure, ..fio }]);
    }
}

/// Measures each work with each of the others, in turns with ours.
fn compare<const N: usize>(bench: &mut Bench, servers: &Result<Servers>, works: [Work; N]) {
    for (peer, name) in [(Which::Nbdkit, "nbdkit memory"), (Which::Qemu, "qemu-nbd of a file in memory")] {
        for Work { name: what, unit, measure } in &works {
            let spec = Spec::new(NAME, format!("server: {what}, to {}", peer.short()), *unit)
                .limit(format!("{name}, same data, same client"))
                .target(Target::RatioAtLeast(1.0));
            match servers {
                Ok(servers) => bench.pair(spec, || measure(&servers.ours), || measure(servers.socket(peer))),
                Err(error) => bench.finish(spec, Err(anyhow::anyhow!("{error:#}"))),
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Nbdkit,
    Qemu,
}

impl Which {
    fn short(self) -> &'static str {
        match self {
            Self::Nbdkit => "nbdkit",
            Self::Qemu => "qemu-nbd",
        }
    }
}

/// Ours and the others, each with the same bytes.
struct Servers {
    ours: PathBuf,
    nbdkit: PathBuf,
    qemu: PathBuf,
    _peer: Peer<()>,
    _others: [Other; 2],
    _directory: TempDir,
}

impl Servers {
    fn start(settings: &Settings) -> Result<Self> {
        let directory = tempfile::tempdir_in(MEMORY).context("a place in memory for a file")?;
        let path = |name: &str| directory.path().join(name);
        let (size, data) = (settings.size * TIMES, path("data"));
        write(&data, size, settings.seed)?;
        let (ours, nbdkit, qemu) = (path("ours"), path("nbdkit"), path("qemu"));
        let peer = Peer::start(&Role::ServeNbd { size, seed: settings.seed, socket: ours.clone() })?;
        let kit = Other::start(
            Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&nbdkit).args(["memory", &size.to_string()]),
        )?;
        await_socket(&nbdkit)?;
        succeed(Command::new("nbdcopy").arg(&data).arg(uri(&nbdkit)))?;
        let nbd = Other::start(
            Command::new("qemu-nbd")
                .args(["--persistent", "--shared=0", "--format=raw", "--socket"])
                .arg(&qemu)
                .arg(&data),
        )?;
        await_socket(&qemu)?;
        Ok(Self { ours, nbdkit, qemu, _peer: peer, _others: [kit, nbd], _directory: directory })
    }

    fn socket(&self, which: Which) -> &Path {
        match which {
            Which::Nbdkit => &self.nbdkit,
            Which::Qemu => &self.qemu,
        }
    }
}

fn write(path: &Path, size: u64, seed: u64) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    for offset in (0..size).step_by(usize::try_from(STEP)?) {
        std::io::Write::write_all(&mut file, &fill::bytes(offset, usize::try_from(STEP.min(size - offset))?, seed))?;
    }
    Ok(std::io::Write::flush(&mut file)?)
}

/// Another server, killed with this.
struct Other(Child);

impl Other {
    fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        Ok(Self(
            command
                .stdin(Stdio::null())
                .spawn()
                .with_context(|| format!("{name}, which `cargo xtask setup` installs"))?,
        ))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It has nothing to save.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn await_socket(socket: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        if Instant::now() > end {
            bail!("nobody listens on {}", socket.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

fn copy_out(socket: &Path) -> Result<()> {
    succeed(Command::new("nbdcopy").arg(uri(socket)).arg("null:"))
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("{command:?}"))?;
    if status.success() { Ok(()) } else { bail!("{command:?}: {status}") }
}

/// What fio is to do: a name for it, what is measured, and the arguments.
fn fio(name: &str, unit: Unit, arguments: [&'static str; 3], settings: &Settings) -> Work {
    let seconds = settings.count(SECONDS, 1);
    let measure = move |socket: &Path| {
        let mut command = Command::new("fio");
        command.args(["--name=read", "--ioengine=nbd", "--time_based", "--output-format=json", "--randrepeat=1"]);
        command.args(arguments).arg(format!("--uri={}", uri(socket))).arg(format!("--runtime={seconds}"));
        let output = command.stdin(Stdio::null()).output().context("fio")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let report: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())
            .with_context(|| format!("what fio says: {text} {}", String::from_utf8_lossy(&output.stderr)))?;
        let read = |field: &str| report["jobs"][0]["read"][field].as_f64().context("what fio reports");
        if unit == Unit::MebibytesPerSecond { Ok(read("bw_bytes")? / f64::from(1 << 20)) } else { read("iops") }
    };
    Work { name: format!("fio {name}"), unit, measure: Box::new(measure) }
}
