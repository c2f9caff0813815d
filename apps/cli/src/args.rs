//! The command line: what `--help`, the man pages and the shell completions say, and nothing that acts on it.

use std::ffi::OsString;
use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use r3map::{ChunkSize, Uri, size};

mod migration;

pub(crate) use migration::{Application, DemoMigrate, DemoOf, Finalize, Leech, Seed, Show};

/// Use any resource as if it were your own memory or file: read what you touch on demand, have the rest pulled in the
/// background, and have your writes pushed back.
#[derive(Parser, Debug)]
#[command(name = "r3map", version, propagate_version = true, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Print every event as one line of JSON on standard output.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  See it work, with nothing to set up:
    r3map demo
  Lend a file, and use it elsewhere as ./region, or as a disk:
    r3map serve file:/data/disk.img --listen grpc://0.0.0.0:1337
    r3map mount grpc://host:1337 ./region
    r3map mount grpc://host:1337 --as block
  Fetch all of it:
    r3map copy grpc://host:1337 file:./disk.img
  Use it here, until another host moves it there while it is used:
    r3map seed file:/data/disk.img ./region --listen grpc://0.0.0.0:1337
    r3map leech grpc://host:1337 ./region";

/// What the command does.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    Serve(Serve),
    Mount(Mount),
    Remove(Remove),
    Info(Info),
    Copy(Copy),
    Seed(Seed),
    Leech(Leech),
    Nbd(Nbd),
    Demo(Demo),
    Completions(Completions),
    Man(Man),
}

/// Serve a region to other hosts.
///
/// Prints a `ready` line with the address of each listener. Ctrl-C or SIGTERM finishes what is in flight and flushes.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map serve file:/data/disk.img --listen grpc://0.0.0.0:1337
  r3map serve file:/data/new.img --create --size 4GiB \\
    --listen grpc+unix:///run/r3map.sock
  r3map serve memory: --size 1GiB --listen 'grpc://[::1]:0'
  r3map serve file:/data/disk.img --listen nbd://0.0.0.0/disk \\
    --listen 'nbd+unix:///disk?socket=/run/disk.sock'
  r3map serve file:/data/disk.img \\
    --listen 'nbds://0.0.0.0/disk?tls-certificates=/etc/pki/nbd'

A directory of certificates holds server-cert.pem and server-key.pem. With nbds every client must use TLS, with nbd and \
tls-certificates it may.
What such a client must show of itself is said by:
  tls-verify-peer=0         nothing (the default)
  tls-verify-peer=1         a certificate that ca-cert.pem there vouches for;
                            only with nbds
  tls-verify-peer=optional  such a certificate or none, but no other one")]
pub(crate) struct Serve {
    /// The region, e.g. file:/data/disk.img, directory:/data/chunks, memory:?size=1GiB, grpc://host:1337,
    /// nbd://host/disk.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// Where to listen: grpc://ADDRESS:PORT, grpc+unix://PATH, nbd://ADDRESS[:PORT]/NAME or
    /// nbd+unix:///NAME?socket=PATH; may be given several times.
    #[arg(long, required = true, value_name = "URI", value_parser = parse_place)]
    pub(crate) listen: Vec<Uri>,
    /// Refuse writes.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Who cuts requests into whole chunks, for a region that is kept in them.
    #[arg(long, value_enum, default_value_t = Chunking::Server)]
    pub(crate) chunking: Chunking,
    /// End at once when the thread that has started this ends, which is one of this process: as the demo's server does.
    #[arg(long, hide = true)]
    pub(crate) end_with: Option<i32>,
    #[command(flatten)]
    pub(crate) open: Open,
}

/// How the region is opened.
#[derive(Args, Debug, Clone)]
pub(crate) struct Open {
    /// The region's size, where the resource does not know it, e.g. 1GiB.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// The unit of transfer, a power of two from 4KiB to 64MiB; the resource's own, or 64KiB, by default.
    #[arg(long, value_parser = parse_chunk, value_name = "SIZE")]
    pub(crate) chunk_size: Option<ChunkSize>,
    /// Create the resource if it does not exist; needs --size.
    #[arg(long)]
    pub(crate) create: bool,
}

/// Show a region as a file or a block device on this host.
///
/// Runs in the foreground and prints a `ready` line once it is usable. Ctrl-C or SIGTERM pushes what is left and
/// unmounts; a second one gives up and says what was lost. Block devices need root, and a region of whole sectors.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map mount grpc://host:1337 ./region
  r3map mount grpc://host:1337 ./region --push-interval 5s \\
    --cache /var/cache/region.cache
  r3map mount grpc+unix:///run/r3map.sock ./region --mode direct --read-only
  The region as a file in a directory, ./disks/sda.img:
    r3map mount grpc://host:1337 ./disks --entry sda.img
  The best kind of device that works here, or ublk with a symbolic link to it:
    r3map mount grpc://host:1337 --as block
    r3map mount grpc://host:1337 --as ublk /run/disk
  A device, /dev/ublkb7, that outlives this process until it is started again:
    r3map mount grpc://host:1337 --as ublk --keep 7 --mode direct
  From a server of the Go programs:
    r3map mount 'grpc://host:1337?size=512MiB&chunk=4KiB' ./region

A server of the Go programs does not say what it serves: give --size, and --chunk-size as it was started with. It is asked \
for one chunk at a time, which is right for each of them. One that cuts requests into chunks itself (-chunking, or -backend \
file or memory) is faster to use, and needs no --chunk-size, with chunking=server in its name: \
'grpc://host:1337?size=512MiB&chunking=server'")]
pub(crate) struct Mount {
    /// The region, e.g. grpc://host:1337.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// The file to show it as: one that does not exist yet, or an empty one; with --entry a directory, likewise. For a
    /// block device it can be left out, and is a symbolic link to the device otherwise.
    #[arg(value_hint = ValueHint::AnyPath, required_unless_present("as"), required_if_eq("as", "file"))]
    pub(crate) path: Option<PathBuf>,
    /// What to show it as.
    #[arg(long, value_enum, default_value_t = As::File)]
    pub(crate) r#as: As,
    /// Keep the device /dev/ublkbN when this process dies: the next one takes it over (needs --as ublk, and --mode direct
    /// or --cache FILE).
    #[arg(long, value_name = "N")]
    pub(crate) keep: Option<u32>,
    /// What users of a kept device get while nobody serves it.
    #[arg(long, value_enum, default_value_t = Meanwhile::Fail, requires = "keep")]
    pub(crate) meanwhile: Meanwhile,
    /// The logical block size of a block device, 512 to 4096 [default: 512].
    #[arg(long, value_parser = parse_block, value_name = "SIZE")]
    pub(crate) block_size: Option<u32>,
    /// Queues of a ublk device, each with a thread of its own; one per processor, at most four, by default. The kernel
    /// gives no more than there are processors.
    #[arg(long, value_parser = parse_count::<NonZeroU16>, value_name = "N")]
    pub(crate) queues: Option<NonZeroU16>,
    /// How many requests each queue may have under way, up to 4096 [default: 128].
    #[arg(long, value_parser = parse_count::<NonZeroU16>, value_name = "N")]
    pub(crate) queue_depth: Option<NonZeroU16>,
    /// Make PATH a directory, and show the region as the file NAME in it.
    #[arg(long, value_name = "NAME")]
    pub(crate) entry: Option<OsString>,
    /// Keep a local copy in step in the background, or go to the remote for whatever the kernel has not cached (see
    /// --direct-io).
    #[arg(long, value_enum, default_value_t = Mode::Managed)]
    pub(crate) mode: Mode,
    /// Where the local copy is kept: `memory`, or a file that survives a crash and is used again: as long as nobody else
    /// writes the region in between, which it does not notice.
    #[arg(long, default_value = "memory", value_name = "memory|FILE")]
    pub(crate) cache: Cache,
    /// Background pulls in flight: `auto` fits the link, 0 pulls only what is touched [default: auto].
    #[arg(long, value_name = "auto|N|0")]
    pub(crate) pull_workers: Option<Workers>,
    /// Pull everything before the file is shown.
    #[arg(long)]
    pub(crate) pull_first: bool,
    /// Pull these first: a file with one byte offset or range (`FROM-TO`) a line, sizes like 4MiB allowed.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) pull_order: Option<PathBuf>,
    /// How often changes are pushed [default: 20s].
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pub(crate) push_interval: Option<Duration>,
    /// How much may be changed and not yet pushed; writers wait beyond that [default: 256MiB].
    #[arg(long, value_parser = parse_size, value_name = "SIZE")]
    pub(crate) dirty_budget: Option<u64>,
    /// What fsync waits for: that the remote has everything, or only the cache file (needs --cache FILE).
    #[arg(long, value_enum, default_value_t = Fsync::Remote)]
    pub(crate) fsync: Fsync,
    /// How long to keep trying a remote that does not answer before readers get an error, and one that has no room when the
    /// mount is to end: a time, or `forever`.
    #[arg(long, default_value = "60s", value_parser = parse_retry, value_name = "TIME|forever")]
    pub(crate) retry: Patience,
    /// How long to wait for an answer while nothing moves on the link, before the request is made again. However slow
    /// the link, as long as bytes move it waits.
    #[arg(long, default_value = "10s", value_parser = parse_time, value_name = "TIME")]
    pub(crate) attempt_timeout: Duration,
    /// Open files without the kernel's cache: with --mode direct, each read and write goes to the remote, and sees what
    /// others wrote before; only mappings are cached.
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Let other users use the file too.
    #[arg(long)]
    pub(crate) allow_other: bool,
    /// Refuse writes.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The region's size, where the remote does not say it (servers of the Go programs).
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// The unit of transfer, a power of two from 4KiB to 64MiB; the remote's own, or 64KiB, by default. For a server of the Go
    /// programs it must be the one that it was started with, by default 4KiB.
    #[arg(long, value_parser = parse_chunk, value_name = "SIZE")]
    pub(crate) chunk_size: Option<ChunkSize>,
}

/// Remove a block device that was kept when its `r3map mount` died.
///
/// Whatever waits for it gets errors. To go on using it instead, start the same `r3map mount` again.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map remove /dev/ublkb7")]
pub(crate) struct Remove {
    /// The device.
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) device: PathBuf,
}

/// Say what a region is: size, chunk size, what it can do.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map info grpc://host:1337
  r3map --json info file:/data/disk.img
  Which parts hold data:
    r3map info --map nbd://host/disk")]
pub(crate) struct Info {
    /// The region.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// List the runs of data and the holes too, where the resource knows.
    #[arg(long)]
    pub(crate) map: bool,
    /// The region's size, where the resource does not know it.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// The chunk size, where the resource does not know it.
    #[arg(long, value_parser = parse_chunk, value_name = "SIZE")]
    pub(crate) chunk_size: Option<ChunkSize>,
}

/// Talk to NBD servers.
#[derive(Args, Debug)]
pub(crate) struct Nbd {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: NbdCommand,
}

/// What `r3map nbd` does.
#[derive(Subcommand, Debug)]
pub(crate) enum NbdCommand {
    List(NbdList),
    Attach(NbdAttach),
    Detach(NbdDetach),
}

/// List the exports of an NBD server, with what it says about each.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map nbd list nbd://host
  r3map nbd list 'nbds://host?tls-certificates=/etc/pki/nbd'
  r3map --json nbd list 'nbd+unix:///?socket=/run/nbd.sock'")]
pub(crate) struct NbdList {
    /// The server, e.g. nbd://host; an export in it does not matter.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
}

/// Make a block device, /dev/nbdN, of an export, by the kernel's own client.
///
/// Prints the device. No process is needed for it: it stays until `r3map nbd detach`, or until its server is gone. Needs
/// root and the kernel module `nbd`. There is no local copy and no TLS; for these mount it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map nbd attach nbd://host/disk
  r3map nbd attach nbd://host/disk /dev/nbd3 --wait 10m
  After the server has restarted:
    r3map nbd attach nbd://host/disk --take-over")]
pub(crate) struct NbdAttach {
    /// The export, e.g. nbd://host/disk.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// The device, e.g. /dev/nbd3; one that is free by default.
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) device: Option<PathBuf>,
    /// The most connections, where the server allows several.
    #[arg(long, default_value = "4", value_parser = parse_count::<NonZeroUsize>, value_name = "N")]
    pub(crate) connections: NonZeroUsize,
    /// How long one request may take before the connection counts as dead and another one is tried: longer than the server
    /// ever takes.
    #[arg(long, default_value = "60s", value_parser = parse_time, value_name = "TIME")]
    pub(crate) request_timeout: Duration,
    /// How long readers wait for --take-over when the server is gone, before they get an error.
    #[arg(long, default_value = "0s", value_parser = parse_duration, value_name = "TIME")]
    pub(crate) wait: Duration,
    /// Give the export's device new connections, so that its readers go on; its server has restarted.
    #[arg(long)]
    pub(crate) take_over: bool,
}

/// Detach a block device that was made of an export.
///
/// What was written to it is flushed first.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map nbd detach /dev/nbd3")]
pub(crate) struct NbdDetach {
    /// The device, e.g. /dev/nbd3.
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) device: PathBuf,
    /// Detach it even if it is in use, mounted for example; its user gets errors then.
    #[arg(long)]
    pub(crate) force: bool,
}

/// Copy one region onto another of the same size.
///
/// Holes stay holes. A file or directory that does not exist is created with the source's size.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map copy grpc://host:1337 file:./disk.img
  Go on after an interruption:
    r3map copy --skip-same grpc://host:1337 file:./disk.img")]
pub(crate) struct Copy {
    /// Where the bytes are.
    #[arg(value_parser = parse_uri)]
    pub(crate) source: Uri,
    /// Where they go.
    #[arg(value_parser = parse_uri)]
    pub(crate) destination: Uri,
    /// Read the destination too and write only what differs.
    #[arg(long)]
    pub(crate) skip_same: bool,
    /// The size of a region that does not know it.
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// The chunk size of a directory that is created.
    #[arg(long, value_parser = parse_chunk, value_name = "SIZE")]
    pub(crate) chunk_size: Option<ChunkSize>,
    /// How long to keep trying a side that does not answer: a time, or `forever`.
    #[arg(long, default_value = "60s", value_parser = parse_retry, value_name = "TIME|forever")]
    pub(crate) retry: Patience,
    /// Requests in flight, to both sides together.
    #[arg(long, default_value = "16", value_parser = parse_count::<NonZeroU32>, value_name = "N")]
    pub(crate) in_flight: NonZeroU32,
}

/// See it work: serve a file behind a simulated round trip, map it as memory and as a file, write, and check.
///
/// Needs nothing installed and leaves nothing behind. `r3map demo migrate` shows a live migration.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Demo {
    /// Something else to see.
    #[command(subcommand)]
    pub(crate) what: Option<DemoOf>,
    /// A file to use instead of a generated one of 256 MiB; a copy is served, the file itself is not changed.
    #[arg(long, value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// The simulated round trip.
    #[arg(long, default_value = "20ms", value_parser = parse_duration, value_name = "TIME")]
    pub(crate) rtt: Duration,
}

/// Print a completion script for a shell.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  source <(r3map completions bash)
  r3map completions fish > ~/.config/fish/completions/r3map.fish")]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Write the man pages into a folder.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// The folder, e.g. /usr/local/share/man/man1.
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) folder: PathBuf,
}

/// Who cuts requests into whole chunks.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chunking {
    /// The server; clients read and write what they like.
    Server,
    /// Clients; the server refuses whatever is not whole chunks.
    Client,
}

/// How a region is mounted.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// A local copy, pulled and pushed in the background.
    Managed,
    /// No local copy: what the kernel has not cached goes to the remote. A file that is open may show what it was before
    /// others changed it, until it is opened again; with --direct-io every read and write goes to the remote.
    Direct,
}

/// What a region is shown as.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum As {
    /// A file on a path.
    File,
    /// A block device of the best kind that works here (`auto` is the same).
    #[value(alias = "auto")]
    Block,
    /// A block device through ublk.
    Ublk,
    /// A block device through the kernel's NBD client.
    Nbd,
    /// A loop device.
    Loop,
}

impl As {
    /// The kind of device, if one was asked for.
    pub(crate) fn kind(self) -> Option<r3map::Kind> {
        match self {
            Self::File | Self::Block => None,
            Self::Ublk => Some(r3map::Kind::Ublk),
            Self::Nbd => Some(r3map::Kind::Nbd),
            Self::Loop => Some(r3map::Kind::Loop),
        }
    }
}

/// What users of a kept device get while nobody serves it.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meanwhile {
    /// Errors (needs Linux 6.13).
    Fail,
    /// They wait, and cannot be killed until it is taken over or removed.
    Wait,
}

impl From<Meanwhile> for r3map::Meanwhile {
    fn from(meanwhile: Meanwhile) -> Self {
        match meanwhile {
            Meanwhile::Fail => Self::Fail,
            Meanwhile::Wait => Self::Wait,
        }
    }
}

/// What fsync waits for.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fsync {
    /// The remote has everything, durably.
    Remote,
    /// The cache file has everything, durably.
    Local,
}

/// Where the local copy is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cache {
    /// In memory.
    Memory,
    /// In this file.
    File(PathBuf),
}

impl FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("give `memory` or the path of a file".to_owned()),
            "memory" => Ok(Self::Memory),
            path => Ok(Self::File(path.into())),
        }
    }
}

/// How many pulls are in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Workers {
    /// As many as the link takes.
    Auto,
    /// None.
    Off,
    /// This many.
    Fixed(NonZeroU32),
}

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let number: u32 =
            text.parse().map_err(|_| "give `auto` or a number; 0 pulls only what is touched".to_owned())?;
        Ok(NonZeroU32::new(number).map_or(Self::Off, Self::Fixed))
    }
}

/// How long to keep trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until it works.
    Forever,
    /// This long.
    For(Duration),
}

impl Patience {
    /// The time, if there is one.
    pub(crate) fn limit(self) -> Option<Duration> {
        match self {
            Self::Forever => None,
            Self::For(limit) => Some(limit),
        }
    }
}

impl FromStr for Patience {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "forever" { Ok(Self::Forever) } else { parse_duration(text).map(Self::For) }
    }
}

fn parse_uri(text: &str) -> Result<Uri, String> {
    // The command line's own message has the text already.
    let again = format!("{text:?}: ");
    text.parse().map_err(|error: r3map::Error| error.message().trim_start_matches(&again).to_owned())
}

/// Where to listen: what has no scheme is no file.
fn parse_place(text: &str) -> Result<Uri, String> {
    let port = text.rsplit_once(':').map_or(text, |(_, port)| port);
    match (parse_uri(text), port.parse::<u16>()) {
        (Err(_), Ok(port)) => Err(format!("write it like grpc://0.0.0.0:{port}")),
        (Err(_), Err(_)) => Err("write it like grpc://0.0.0.0:1337".to_owned()),
        (Ok(uri), _) => Ok(uri),
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|error| error.message().to_owned())
}

fn parse_chunk(text: &str) -> Result<ChunkSize, String> {
    ChunkSize::new(parse_size(text)?).map_err(|error| error.message().to_owned())
}

fn parse_block(text: &str) -> Result<u32, String> {
    u32::try_from(parse_size(text)?).map_err(|_| "a logical block has 512, 1024, 2048 or 4096 bytes".to_owned())
}

/// A time with a unit, e.g. 20ms, 1.5s, 2m.
fn parse_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("{text:?} is not a time; write it like 20ms, 5s or 2m"))
}

/// As [`parse_duration`], where none at all makes no sense.
fn parse_time(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("a time longer than zero is needed".to_owned()),
        time => Ok(time),
    }
}

/// As [`Patience`], where none at all makes no sense.
fn parse_retry(text: &str) -> Result<Patience, String> {
    match text.parse()? {
        Patience::For(Duration::ZERO) => Err("a time longer than zero is needed, or `forever`".to_owned()),
        patience => Ok(patience),
    }
}

/// A number of which there must be one at least.
fn parse_count<N: FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{text:?} is no number from 1 on, or one that is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    /// Every command, with those below it.
    fn all(command: clap::Command) -> Vec<clap::Command> {
        let below = command.get_subcommands().cloned().flat_map(all).collect::<Vec<_>>();
        std::iter::once(command).chain(below).collect()
    }

    /// The words of a line as a shell has them: what is in single quotes is one.
    fn words(line: &str) -> Vec<String> {
        let parts = line.split('\'').enumerate();
        parts
            .flat_map(|(number, part)| match number % 2 {
                0 => part.split_whitespace().map(str::to_owned).collect(),
                _ => vec![part.to_owned()],
            })
            .collect()
    }

    /// They fit a narrow terminal, so that they can be copied from it.
    #[test]
    fn the_examples_of_the_help_are_understood() {
        let mut seen = 0;
        for command in all(Cli::command()) {
            let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples = text.split("\n\n").next().unwrap_or_default();
            assert!(examples.lines().all(|line| line.len() <= 80), "{examples}");
            for line in examples.replace("\\\n", " ").lines().map(str::trim).filter(|line| line.starts_with("r3map ")) {
                let words = words(line.split('>').next().unwrap_or_default());
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{line}: {error}");
                }
                seen += 1;
            }
        }
        assert!(seen > 30, "the help has only {seen} examples");
    }

    #[test]
    fn what_is_wrong_with_a_value_is_said_once_and_to_the_point() {
        for (line, hint) in [
            ("info /etc/hostname", "did you mean file:/etc/hostname? try --help"),
            ("serve null: --listen 1337", "write it like grpc://0.0.0.0:1337"),
            ("serve null: --listen 127.0.0.1:1338", "write it like grpc://0.0.0.0:1338"),
            ("mount null: a --retry 0s", "longer than zero is needed, or `forever`"),
            ("mount null: a --attempt-timeout 0s", "longer than zero"),
            ("seed null: a --listen grpc://a:1 --lease 0s", "longer than zero"),
            ("leech null: a --max-rounds 0", "no number from 1 on"),
        ] {
            let words = [&["r3map"], &line.split(' ').collect::<Vec<_>>()[..]].concat();
            let said = crate::one_line(&Cli::try_parse_from(&words).expect_err(line));
            assert!(said.contains(hint), "{line}: {said}");
        }
    }

    #[test]
    fn reads_what_the_readme_shows() {
        let cli = Cli::parse_from(["r3map", "mount", "grpc://host:1337", "./region", "--pull-workers", "0", "--json"]);
        assert!(cli.json);
        let Command::Mount(mount) = cli.command else { panic!("that is a mount") };
        assert_eq!(mount.pull_workers, Some(Workers::Off));
        assert_eq!(mount.cache, Cache::Memory);
        assert_eq!(mount.retry, Patience::For(Duration::from_secs(60)));
    }

    #[test]
    fn a_device_needs_no_path_and_a_file_does() {
        let read = |line: &str| Cli::try_parse_from(line.split(' '));
        for (word, kind) in [("block", As::Block), ("auto", As::Block), ("nbd", As::Nbd), ("loop", As::Loop)] {
            let cli = read(&format!("r3map mount memory: --as {word}")).unwrap();
            let Command::Mount(mount) = cli.command else { panic!("that is a mount") };
            assert_eq!((mount.r#as, mount.path), (kind, None));
        }
        for wrong in ["", " --as file", " --as nbd --meanwhile wait", " --as tape"] {
            assert!(read(&format!("r3map mount memory:{wrong}")).is_err(), "{wrong}");
        }
    }
}
