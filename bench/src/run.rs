//! One run of the benchmark: its settings, and how a figure and its limit are measured side by side.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::figure::{Figure, Spec};
use crate::report::Report;

/// What a run is.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Settings {
    /// The bytes that each throughput is measured over.
    pub(crate) size: u64,
    /// How often each figure is measured, after one run that warms up and does not count.
    pub(crate) runs: usize,
    /// For everything that is random: offsets and contents.
    pub(crate) seed: u64,
    /// Tiny samples, to see that everything works; the figures mean little.
    pub(crate) quick: bool,
    /// What the names of the moves that are measured contain; all of them without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) only: Option<String>,
}

impl Settings {
    /// The size in MiB, for throughputs.
    pub(crate) fn mebibytes(&self) -> f64 {
        mebibytes(self.size)
    }

    /// `many`, or `few` in a quick run.
    pub(crate) fn count(&self, many: usize, few: usize) -> usize {
        if self.quick { few } else { many }
    }
}

pub(crate) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// A run under way.
pub(crate) struct Bench {
    pub(crate) settings: Settings,
    pub(crate) report: Report,
}

impl Bench {
    /// Measures a figure and its limit in turn, so that what disturbs the machine disturbs both. Each is called once to
    /// warm up. What fails is reported in place of the figure, and the run goes on.
    pub(crate) fn pair(
        &mut self,
        spec: Spec,
        mut ours: impl FnMut() -> Result<f64>,
        mut limit: impl FnMut() -> Result<f64>,
    ) {
        self.both(spec, || Ok((ours().context("ours")?, limit().context("the limit")?)));
    }

    /// The same for a figure and a limit that are measured by one piece of work.
    pub(crate) fn both(&mut self, spec: Spec, mut measure: impl FnMut() -> Result<(f64, f64)>) {
        self.report.progress(&spec);
        let runs = self.repeat(&mut measure);
        self.finish(spec, runs.map(|runs| runs.into_iter().unzip()));
    }

    /// Measures a figure that has no limit.
    pub(crate) fn alone(&mut self, spec: Spec, mut ours: impl FnMut() -> Result<f64>) {
        self.report.progress(&spec);
        let runs = self.repeat(&mut ours);
        self.finish(spec, runs.map(|ours| (ours, Vec::new())));
    }

    fn repeat<T>(&self, measure: &mut dyn FnMut() -> Result<T>) -> Result<Vec<T>> {
        measure().context("warming up")?;
        (0..self.settings.runs).map(|_| measure()).collect()
    }

    /// Reports what was measured elsewhere, as (ours, limit) for each run, or why it was not.
    pub(crate) fn finish(&mut self, spec: Spec, runs: Result<(Vec<f64>, Vec<f64>)>) {
        match runs {
            Err(error) => self.report.failure(&spec, &error),
            Ok((ours, limit)) => match Figure::new(spec.clone(), ours, limit) {
                Some(figure) => self.report.figure(figure),
                None => self.report.failure(&spec, &anyhow::anyhow!("nothing was measured")),
            },
        }
    }
}

/// How long something takes.
pub(crate) fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let value = work()?;
    Ok((value, start.elapsed()))
}

/// MiB per second that something moves.
pub(crate) fn throughput<T>(mebibytes: f64, work: impl FnOnce() -> Result<T>) -> Result<f64> {
    Ok(mebibytes / timed(work)?.1.as_secs_f64())
}

/// How much of a processor's time this thread spends on something: where other threads only disturb.
pub(crate) fn worked(work: impl FnOnce()) -> Duration {
    let now = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap_or_default()
    };
    let start = now();
    work();
    now().saturating_sub(start)
}

pub(crate) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
