//! The command line of migrations: `seed`, `leech` and `demo migrate`.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, ValueHint};
use r3map::{ChunkSize, Uri};

use super::{
    As, Cache, Open, Patience, parse_chunk, parse_count, parse_duration, parse_place, parse_retry, parse_size,
    parse_time, parse_uri,
};

/// Show a region as a file on this host, until another host takes it over while it is used.
///
/// Prints a `ready` line with the address of each listener. A leecher copies the region while PATH is used, then has it
/// handed over: from then on PATH can no longer be used, and what is missing over there is read here. Ends when the other
/// side has everything. Ctrl-C or SIGTERM before the handover stores everything and unmounts.
#[derive(Args, Debug)]
#[command(
    allow_missing_positional = true,
    after_help = "\
Examples:
  r3map seed file:/data/disk.img ./region --listen grpc://0.0.0.0:1337
  r3map seed file:/data/disk.img ./region --listen grpc://0.0.0.0:1337 \\
    --on-suspend 'systemctl stop app' --on-resume 'systemctl start app'
  A device, with a link to it:
    r3map seed file:/data/disk.img /run/disk --as block \\
      --listen grpc://0.0.0.0:1337
  Two regions that move as one:
    r3map seed 'memory:?size=1GiB' ./memory --also file:/data/disk.img ./disk \\
      --listen grpc://0.0.0.0:1337
  What `leech --cache` has kept:
    r3map seed --cache /var/lib/region ./region --listen grpc://0.0.0.0:1337
  What was handed over to a host that is gone for ever:
    r3map seed file:/data/disk.img ./region --take-back \\
      --listen grpc://0.0.0.0:1337

Who owns the region is written into a ledger, a file beside it with .ledger behind its name, so that it is known after a \
crash: started again, this goes on where it was. Until the other side has everything it serves what is missing there."
)]
pub(crate) struct Seed {
    /// The region, e.g. file:/data/disk.img; left out with --cache.
    #[arg(value_parser = parse_uri, required_unless_present = "cache", conflicts_with = "cache")]
    pub(crate) uri: Option<Uri>,
    /// The file to show it as: one that does not exist yet, or an empty one; with --entry a directory, likewise.
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// Where to listen: grpc://ADDRESS:PORT or grpc+unix://PATH; may be given several times.
    #[arg(long, required = true, value_name = "URI", value_parser = parse_place)]
    pub(crate) listen: Vec<Uri>,
    /// The region that `leech --cache FILE` has brought here.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) cache: Option<PathBuf>,
    /// One more region, with its own path, that leaves together with the first; may be given several times. With --cache
    /// it is a cache file too.
    #[arg(long, num_args = 2, value_names = ["URI|FILE", "PATH"], value_hint = ValueHint::AnyPath)]
    pub(crate) also: Vec<PathBuf>,
    /// Where it is written down who owns the region; by default beside the (first) region, if that is a file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ledger: Option<PathBuf>,
    /// Take a region back that was handed over. Only if the other side does not run and never will: whatever it has
    /// written is lost, and if it does run it is stopped when it hears of it, which may be late.
    #[arg(long)]
    pub(crate) take_back: bool,
    /// How long a leecher that copies may be silent before nothing is recorded for it any more: then it must copy
    /// everything again.
    #[arg(long, default_value = "5m", value_parser = parse_time, value_name = "TIME")]
    pub(crate) lease: Duration,
    /// Let the r3map programs written in Go in, which cannot show the secret: whoever can connect can use their service.
    /// Without --secret-file they are let in anyway.
    #[arg(long, requires = "secret_file")]
    pub(crate) open_to_go: bool,
    #[command(flatten)]
    pub(crate) show: Show,
    #[command(flatten)]
    pub(crate) application: Application,
    #[command(flatten)]
    pub(crate) open: Open,
}

/// What regions that move are shown as.
#[derive(Args, Debug, Clone)]
pub(crate) struct Show {
    /// What to show it as. Block devices need root, and a region of whole sectors; PATH is a symbolic link to the device.
    #[arg(long, value_enum, default_value_t = As::File)]
    pub(crate) r#as: As,
    /// Make PATH a directory, and show the region as the file NAME in it.
    #[arg(long, value_name = "NAME")]
    pub(crate) entry: Option<OsString>,
    /// Let other users use the file too.
    #[arg(long)]
    pub(crate) allow_other: bool,
}

/// What the application is told, and who may take its region away.
#[derive(Args, Debug, Clone)]
pub(crate) struct Application {
    /// Run this before the region leaves: it must stop whatever writes to PATH, which is in $R3MAP_PATH; a file system on a
    /// device must be frozen or unmounted. If it fails, or takes longer than --hook-timeout, the region stays. On the side to which
    /// the region went it is run when the region turns out to have been taken back over there.
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString)]
    pub(crate) on_suspend: Option<String>,
    /// Run this when PATH may be used: after the region has arrived, and when a handover came to nothing.
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString)]
    pub(crate) on_resume: Option<String>,
    /// How long each of these commands, and storing what was written, may take. A command that takes longer is killed. For
    /// more than 30s, tell both sides.
    #[arg(long, default_value = "30s", value_parser = parse_time, value_name = "TIME")]
    pub(crate) hook_timeout: Duration,
    /// A file with what both sides must know. Without one, whoever can connect may read the region, and take it away.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) secret_file: Option<PathBuf>,
}

/// Take a region over from the host that seeds it, while it is used there.
///
/// Copies it in the background, then has it handed over, and shows it as PATH; what is still missing is read from the
/// seeder when it is touched. Prints `running` when PATH is usable and `pulled` when nothing is missing; then it shows PATH
/// until Ctrl-C or SIGTERM, or until it is taken over by the next (--then-seed). Ctrl-C before the handover leaves the
/// region where it is. After it, Ctrl-C first fetches what is missing; a second one gives up, and says what that means.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  r3map leech grpc://host:1337 ./region
  What survives kill -9: run the same command again:
    r3map leech grpc://host:1337 ./region --cache /var/lib/region
  Enter or SIGUSR1 moves it:
    r3map leech grpc://host:1337 ./region --finalize manual
  Only if it can be moved quickly:
    r3map leech grpc://host:1337 ./region --finalize downtime=20ms \\
      --max-time 10m --unconverged give-up
  Then on to the next host:
    r3map leech grpc://host:1337 ./region --then-seed grpc://0.0.0.0:1337
  A device, with a link to it:
    r3map leech grpc://host:1337 /run/disk --as block
  Two regions that were seeded as one:
    r3map leech grpc://host:1337 ./memory --also ./disk

With --cache FILE a ledger, FILE.ledger, says after a crash who owns the region; the same command goes on where it was.")]
pub(crate) struct Leech {
    /// The seeder, e.g. grpc://host:1337.
    #[arg(value_parser = parse_uri)]
    pub(crate) uri: Uri,
    /// The file to show it as: one that does not exist yet, or an empty one; with --entry a directory, likewise.
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) path: PathBuf,
    /// The path of one more region, in the order in which they are seeded; may be given several times.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) also: Vec<PathBuf>,
    /// Where the region is kept: `memory` (the default), or a file that survives a crash and can be seeded later. For
    /// several regions it is given once for each, in their order.
    #[arg(long, value_name = "memory|FILE")]
    pub(crate) cache: Vec<Cache>,
    /// Where it is written down who owns the region; by default beside the (first) cache file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "cache")]
    pub(crate) ledger: Option<PathBuf>,
    /// When to move it: as soon as the rest is small (it could be pulled in 50ms), when it could be pulled in TIME, or on
    /// Enter. SIGUSR1 moves it at once, whatever is given here.
    #[arg(long, default_value = "ready", value_name = "ready|downtime=TIME|manual")]
    pub(crate) finalize: Finalize,
    /// How often to copy again what was written meanwhile, before that counts as not converging.
    #[arg(long, default_value = "30", value_parser = parse_count::<NonZeroU32>, value_name = "N")]
    pub(crate) max_rounds: NonZeroU32,
    /// How long to copy before that counts as not converging, looked at after each round; without limit by default.
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub(crate) max_time: Option<Duration>,
    /// What to do when the region is written to faster than it can be copied.
    #[arg(long, value_enum, default_value_t = Unconverged::Finalize)]
    pub(crate) unconverged: Unconverged,
    /// Once nothing is missing, offer the region to the next leecher here; may be given several times.
    #[arg(long, value_name = "URI", value_parser = parse_place)]
    pub(crate) then_seed: Vec<Uri>,
    /// As for `r3map seed`, when the region is offered to the next leecher.
    #[arg(long, requires_all = ["then_seed", "secret_file"])]
    pub(crate) open_to_go: bool,
    /// As for `r3map seed`, when the region is offered to the next leecher.
    #[arg(long, default_value = "5m", value_parser = parse_time, value_name = "TIME", requires = "then_seed")]
    pub(crate) lease: Duration,
    /// How long to go on asking a seeder that does not say whether it has handed over, or to tell one that does not hear
    /// that it has the region again, or that it may go; and, with --cache, to wait for one of which nothing comes while
    /// something is missing here: a time, or `forever`. After Ctrl-C it is told for half a minute at most. When --retry has
    /// passed and this too (this alone where --retry is `forever`), it ends with an error, and says how to go on.
    #[arg(long, default_value = "forever", value_name = "TIME|forever")]
    pub(crate) give_up_after: Patience,
    /// How long to keep trying a seeder that does not answer: a time, or `forever`. Before the handover this gives up
    /// then, and the region stays; after it readers get an error then, and it is tried on.
    #[arg(long, default_value = "60s", value_parser = parse_retry, value_name = "TIME|forever")]
    pub(crate) retry: Patience,
    /// How long to wait for an answer while nothing moves on the link, before the request is made again.
    #[arg(long, default_value = "10s", value_parser = parse_time, value_name = "TIME")]
    pub(crate) attempt_timeout: Duration,
    #[command(flatten)]
    pub(crate) show: Show,
    #[command(flatten)]
    pub(crate) application: Application,
    /// The region's size in bytes, where the seeder does not say it (Go).
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
        let text = text.strip_prefix("when=").unwrap_or(text);
        match (text, text.strip_prefix("downtime=")) {
            ("ready", _) => Ok(Self::Ready),
            ("manual", _) => Ok(Self::Manual),
            (_, Some(time)) => parse_duration(time).map(Self::Downtime),
            _ => Err("give `ready`, `manual`, or a time like `downtime=50ms`".to_owned()),
        }
    }
}

/// What to do with a region that is written to faster than it can be copied.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unconverged {
    /// Move it all the same: the rest is pulled afterwards, and what is touched first of all.
    Finalize,
    /// Leave it where it is.
    GiveUp,
}

impl From<Unconverged> for r3map::migration::Unconverged {
    fn from(unconverged: Unconverged) -> Self {
        match unconverged {
            Unconverged::Finalize => Self::Finalize,
            Unconverged::GiveUp => Self::GiveUp,
        }
    }
}

/// What else can be shown.
#[derive(Subcommand, Debug)]
pub(crate) enum DemoOf {
    Migrate(DemoMigrate),
}

/// Move a program that keeps counting from one process to another while it runs, and prove that no count was lost.
///
/// Needs nothing installed and leaves nothing behind.
#[derive(Args, Debug)]
pub(crate) struct DemoMigrate {
    /// The size of the memory that the program counts in.
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
    fn more_regions_come_in_pairs() {
        let seed = |words: &str| Cli::try_parse_from(words.split(' '));
        let cli = seed("r3map seed file:/a a --also file:/b b --listen grpc://[::1]:0 --also memory: c").unwrap();
        let Command::Seed(found) = cli.command else { panic!("that is a seed") };
        assert_eq!(found.also, ["file:/b", "b", "memory:", "c"].map(PathBuf::from));
        assert!(seed("r3map seed file:/a a --listen grpc://[::1]:0 --also file:/b").is_err());
    }

    #[test]
    fn when_to_finalize_is_read() {
        assert_eq!("ready".parse(), Ok(Finalize::Ready));
        assert_eq!("when=ready".parse(), Ok(Finalize::Ready));
        assert_eq!("manual".parse(), Ok(Finalize::Manual));
        assert_eq!("downtime=50ms".parse(), Ok(Finalize::Downtime(Duration::from_millis(50))));
        assert!("soon".parse::<Finalize>().is_err() && "downtime=x".parse::<Finalize>().is_err());
    }

    #[test]
    fn the_demo_is_one_of_two() {
        let demo = |words: &str| {
            let Command::Demo(demo) = Cli::try_parse_from(words.split(' ')).unwrap().command else { panic!("{words}") };
            demo
        };
        assert!(demo("r3map demo --rtt 1ms").what.is_none());
        let Some(DemoOf::Migrate(migrate)) = demo("r3map demo migrate --size 1MiB").what else { panic!("it is there") };
        assert_eq!(migrate.size, 1 << 20);
    }
}
