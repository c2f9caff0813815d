//! The command line of migrations: `seed` and `leech`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};
use r3map::{ChunkSize, Uri};

use super::{Cache, Open, Patience, parse_chunk, parse_duration, parse_size, parse_uri};

/// Show a region as a file on this host, until another host takes it over while it is used.
///
/// Prints a `ready` line with the address of each listener. A leecher copies the region while PATH is used, then has it
/// handed over: from then on writing to PATH fails, and what is missing over there is read here. Ends when the other side
/// has everything. Ctrl-C or SIGTERM before the handover stores everything and unmounts.
#[derive(Args, Debug)]
#[command(
    allow_missing_positional = true,
    after_help = "\
Examples:
  r3map seed file:/data/disk.img ./region --listen grpc://0.0.0.0:1337
  r3map seed --cache /var/cache/region ./region --listen grpc://0.0.0.0:1337    what a leech has kept there
  r3map seed memory: ./region --size 1GiB --listen grpc://[::1]:0 --on-suspend 'systemctl stop app'"
)]
pub(crate) struct Seed {
    /// The region, e.g. file:/data/disk.img; left out with --cache.
    #[arg(value_parser = parse_uri, required_unless_present = "cache", conflicts_with = "cache")]
    pub(crate) uri: Option<Uri>,
    /// The file to show it as: one that does not exist yet, or an empty one.
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// Where to listen: grpc://ADDRESS:PORT or grpc+unix://PATH; may be given several times.
    #[arg(long, required = true, value_name = "URI", value_parser = parse_uri)]
    pub(crate) listen: Vec<Uri>,
    /// A region that `leech --cache FILE` has brought here.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) cache: Option<PathBuf>,
    /// Where it is written down who owns the region; beside the region by default, where that outlives the process.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ledger: Option<PathBuf>,
    /// Take a region back that was handed over. Only if the other side does not run and never will.
    #[arg(long)]
    pub(crate) take_back: bool,
    #[command(flatten)]
    pub(crate) application: Application,
    #[command(flatten)]
    pub(crate) open: Open,
}

/// What the application is told, and who may take it away.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct Application {
    /// Run this before the region leaves: it must stop whatever writes to PATH. If it fails the region stays.
    #[arg(long, value_name = "CMD")]
    pub(crate) on_suspend: Option<String>,
    /// Run this when PATH may be used: after the region has arrived, and when a handover came to nothing.
    #[arg(long, value_name = "CMD")]
    pub(crate) on_resume: Option<String>,
    /// A file with what both sides must know. Without one, whoever can connect may take the region away.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) secret_file: Option<PathBuf>,
}

/// Take a region over from the host that seeds it, while it is used there.
///
/// Copies it in the background, then has it handed over, and shows it as PATH; what is still missing is read from the
/// seeder when it is touched. Prints `running` when PATH is usable, `pulled` when nothing is missing. Then it shows PATH
/// until Ctrl-C or SIGTERM, or seeds it on.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map leech grpc://host:1337 ./region --cache /var/cache/region
  r3map leech grpc://host:1337 ./region --finalize manual        Enter or SIGUSR1 moves it
  r3map leech grpc://host:1337 ./region --then-seed grpc://0.0.0.0:1337")]
pub(crate) struct Leech {
    /// The seeder, e.g. grpc://host:1337.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// The file to show it as: one that does not exist yet, or an empty one.
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) path: PathBuf,
    /// Where the region is kept: `memory`, or a file that survives a crash and can be seeded later.
    #[arg(long, default_value = "memory", value_name = "memory|FILE")]
    pub(crate) cache: Cache,
    /// When to move it: as soon as the rest is small, when it could be pulled in a certain time, or on Enter or SIGUSR1.
    #[arg(long, default_value = "ready", value_name = "ready|downtime=TIME|manual")]
    pub(crate) finalize: Finalize,
    /// Leave it where it is if it is written to faster than it can be copied.
    #[arg(long)]
    pub(crate) give_up: bool,
    /// Once nothing is missing, offer the region to the next leecher here.
    #[arg(long, value_name = "URI", value_parser = parse_uri)]
    pub(crate) then_seed: Option<Uri>,
    /// How long to keep trying a seeder that does not answer: a time, or `forever`.
    #[arg(long, default_value = "60s", value_name = "TIME|forever")]
    pub(crate) retry: Patience,
    #[command(flatten)]
    pub(crate) application: Application,
    /// The region's size, where the seeder does not say it (Go).
    #[arg(long, value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// The unit of transfer, where the seeder does not say it (Go).
    #[arg(long, value_parser = parse_chunk, value_name = "SIZE")]
    pub(crate) chunk_size: Option<ChunkSize>,
}

/// When a region is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finalize {
    /// When the rest is small.
    Ready,
    /// When the rest can be pulled in this time.
    Downtime(Duration),
    /// When somebody says so.
    Manual,
}

impl FromStr for Finalize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("downtime=")) {
            ("ready", _) => Ok(Self::Ready),
            ("manual", _) => Ok(Self::Manual),
            (_, Some(time)) => parse_duration(time).map(Self::Downtime),
            _ => Err("give `ready`, `manual`, or a time like `downtime=50ms`".to_owned()),
        }
    }
}

/// What else can be shown.
#[derive(Subcommand, Debug)]
pub(crate) enum DemoOf {
    Migrate(DemoMigrate),
}

/// Move a program that keeps counting in a region from one process to another, and prove that no count was lost.
#[derive(Args, Debug)]
pub(crate) struct DemoMigrate {
    /// The region's size.
    #[arg(long, default_value = "256MiB", value_parser = parse_size)]
    pub(crate) size: u64,
    /// The simulated round trip.
    #[arg(long, default_value = "20ms", value_parser = parse_duration, value_name = "TIME")]
    pub(crate) rtt: Duration,
    /// This is the process that the program moves to.
    #[arg(long, hide = true, value_parser = parse_uri)]
    pub(crate) arrive: Option<Uri>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_seed_has_a_region_or_a_cache() {
        let listen = ["--listen", "grpc://[::1]:0"];
        let seed = |words: &[&str]| Cli::try_parse_from([&["r3map", "seed"], words, &listen].concat());
        let Command::Seed(found) = seed(&["file:/a", "b"]).unwrap().command else { panic!("that is a seed") };
        assert_eq!((found.uri.map(|uri| uri.to_string()), found.path), (Some("file:/a".into()), "b".into()));
        let Command::Seed(found) = seed(&["b", "--cache", "c"]).unwrap().command else { panic!("that is a seed") };
        assert_eq!((found.uri, found.path, found.cache), (None, "b".into(), Some("c".into())));
        assert!(seed(&["b"]).is_err() && seed(&["file:/a", "b", "--cache", "c"]).is_err());
    }

    #[test]
    fn when_to_finalize_is_read() {
        assert_eq!("ready".parse(), Ok(Finalize::Ready));
        assert_eq!("manual".parse(), Ok(Finalize::Manual));
        assert_eq!("downtime=50ms".parse(), Ok(Finalize::Downtime(Duration::from_millis(50))));
        assert!("soon".parse::<Finalize>().is_err() && "downtime=x".parse::<Finalize>().is_err());
    }
}
