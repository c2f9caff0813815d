//! Opening a region of 1 TiB, each time in a fresh process.

use anyhow::Result;

use crate::figure::{Spec, Target, Unit};
use crate::peer::{Opened, Peer, Role, Shown};
use crate::run::Bench;

const NAME: &str = "open";
const SIZE: u64 = 1 << 40;

pub(crate) fn run(bench: &mut Bench) {
    for shown in [Shown::Slice, Shown::File] {
        let what = shown.name();
        let time = Spec::new(NAME, format!("1 TiB as {what}: time"), Unit::Milliseconds)
            .note("a managed mount of zeros, without background pulling, to the first byte")
            .target(Target::AtMost(100.0));
        let memory = Spec::new(NAME, format!("1 TiB as {what}: memory"), Unit::Megabytes)
            .note("resident memory and page tables of the whole process, after reading 1000 pages all over it")
            .target(Target::AtMost(100.0));
        bench.report.progress(&time);
        let runs: Result<Vec<Opened>> = (0..bench.settings.runs).map(|_| open(shown)).collect();
        let pick = |value: fn(&Opened) -> f64| match &runs {
            Ok(runs) => Ok((runs.iter().map(value).collect(), Vec::new())),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        bench.finish(time, pick(|opened| opened.milliseconds));
        bench.finish(memory, pick(|opened| opened.megabytes));
    }
}

fn open(shown: Shown) -> Result<Opened> {
    Ok(*Peer::start(&Role::Open { size: SIZE, shown })?.ready())
}
