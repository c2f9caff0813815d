//! `r3map-bench`: r3map's own figures, each beside the limit of the machine it runs on, measured in the same run.
//!
//! `docs/benchmarks.md` says what each figure and each limit is. This file reads the command line and runs sections.

mod figure;
mod limits;
mod machine;
mod peer;
mod report;
mod run;
mod sections;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use crate::machine::Machine;
use crate::report::{Report, Style};
use crate::run::{Bench, Settings};

/// Measures r3map against the limits of the machine, in one run.
///
/// Each figure is measured in turn with its limit, several times after one run to warm up, and reported as median and
/// spread. Progress goes to standard error. The exit code is 0 unless something could not be measured.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// What to measure; everything if none is named.
    #[arg(value_enum)]
    sections: Vec<Section>,
    /// Print one JSON object per line instead of a table.
    #[arg(long)]
    json: bool,
    /// Use tiny samples, only to see that everything works.
    #[arg(long)]
    quick: bool,
    /// The bytes that each throughput is measured over, at least 1 MiB; four times as many are migrated [default: 256MiB, 2MiB with --quick].
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// How often each figure is measured [default: 7, 1 with --quick].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: Option<u16>,
    /// Of the moves, measure only those whose name contains this, such as `busy slice, 0 ms`.
    #[arg(long)]
    only: Option<String>,
    /// The seed of offsets and contents.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Exit with a failure if a target is missed.
    #[arg(long)]
    check: bool,
    /// How this program starts itself for what must be another process.
    #[arg(long, hide = true)]
    peer: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Memory: installing, reading, faults, tracking of writes.
    Slice,
    /// A mounted file: reading and writing.
    File,
    /// The transport: throughput between two processes, and what it costs.
    Grpc,
    /// NBD against nbdkit and libnbd's tools.
    Nbd,
    /// Managed and direct mounts behind a round trip of 0 to 40 ms.
    Rtt,
    /// Opening a region of 1 TiB.
    Open,
    /// Moving a region to another process behind a round trip of 0 to 40 ms.
    Migrate,
    /// All of these.
    All,
    /// Block devices: ublk against kernel NBD and loop. Not part of all: it needs a kernel that has them, and root
    /// (cargo xtask vm --bench block --size 32MiB).
    Block,
}

/// Enough for several requests of the longest kind.
const LEAST: u64 = 1 << 20;

fn size(text: &str) -> Result<u64, String> {
    match r3map::size::parse(text) {
        Ok(size) if size < LEAST => Err("at least 1MiB is needed".to_owned()),
        // Whole MiB, so that every length of request divides it.
        Ok(size) => Ok(size.next_multiple_of(LEAST)),
        Err(error) => Err(error.message().to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match &arguments.peer {
        Some(role) => match peer::play(role) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "error: {error:#}");
                ExitCode::FAILURE
            }
        },
        None => run(&arguments),
    }
}

fn run(arguments: &Arguments) -> ExitCode {
    let quick = arguments.quick;
    let settings = Settings {
        size: arguments.size.unwrap_or(if quick { 2 << 20 } else { 256 << 20 }),
        runs: arguments.runs.map_or(if quick { 1 } else { 7 }, usize::from),
        seed: arguments.seed,
        only: arguments.only.clone(),
        quick,
    };
    let report = Report::new(if arguments.json { Style::Json } else { Style::Table });
    report.begin(&Machine::look(), &settings);
    let mut bench = Bench { settings, report };
    let all = arguments.sections.is_empty() || arguments.sections.contains(&Section::All);
    for (section, run) in SECTIONS {
        if all || arguments.sections.contains(&section) {
            run(&mut bench);
        }
    }
    if arguments.sections.contains(&Section::Block) {
        sections::block::run(&mut bench);
    }
    bench.report.end();
    let missed = arguments.check && bench.report.missed() > 0;
    if missed || bench.report.failed() > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

type Run = fn(&mut Bench);

const SECTIONS: [(Section, Run); 7] = [
    (Section::Slice, sections::slice::run),
    (Section::File, sections::file::run),
    (Section::Grpc, sections::grpc::run),
    (Section::Nbd, sections::nbd::run),
    (Section::Rtt, sections::rtt::run),
    (Section::Open, sections::open::run),
    (Section::Migrate, sections::migrate::run),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
        let arguments = Arguments::parse_from(["r3map-bench", "slice", "rtt", "--size", "3000KiB", "--runs", "3"]);
        assert_eq!(arguments.sections, [Section::Slice, Section::Rtt]);
        assert_eq!((arguments.size, arguments.runs), (Some(3 << 20), Some(3)));
        for wrong in [["--size", "12"], ["--size", "much"], ["--runs", "0"], ["--runs", "-1"]] {
            assert!(Arguments::try_parse_from(["r3map-bench", wrong[0], wrong[1]]).is_err(), "{wrong:?}");
        }
    }
}
