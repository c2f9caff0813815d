//! A figure: what was measured, beside its limit and its target. Pure data and arithmetic; nothing is measured here.

use serde::Serialize;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Throughput: more is better.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// How often something is done: more is better.
    #[serde(rename = "1/s")]
    PerSecond,
    /// How often something is done in one piece of work: less is better.
    #[serde(rename = "×")]
    Times,
    /// Size: less is better.
    #[serde(rename = "MB")]
    Megabytes,
    /// Time: less is better.
    #[serde(rename = "ns")]
    Nanoseconds,
    /// Time: less is better.
    #[serde(rename = "µs")]
    Microseconds,
    /// Time: less is better.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Time per GiB moved or looked through: less is better.
    #[serde(rename = "ms/GiB")]
    MillisecondsPerGibibyte,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::MebibytesPerSecond => "MiB/s",
            Self::PerSecond => "1/s",
            Self::Times => "×",
            Self::Megabytes => "MB",
            Self::Nanoseconds => "ns",
            Self::Microseconds => "µs",
            Self::Milliseconds => "ms",
            Self::MillisecondsPerGibibyte => "ms/GiB",
        }
    }
}

/// What is aimed at.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// Ours ÷ limit is at least this.
    RatioAtLeast(f64),
    /// Ours ÷ limit is at most this.
    RatioAtMost(f64),
    /// Ours ÷ limit is at most this in every run.
    EveryRatioAtMost(f64),
    /// Ours is at most this, in the figure's unit.
    AtMost(f64),
}

impl Target {
    fn is_met(self, ours: &Samples, ratio: Option<&Samples>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(least) => ratio.map(|ratio| ratio.median >= least),
            Self::RatioAtMost(most) => ratio.map(|ratio| ratio.median <= most),
            Self::EveryRatioAtMost(most) => ratio.map(|ratio| ratio.max <= most),
            Self::AtMost(most) => Some(ours.median <= most),
        }
    }
}

/// What one figure is, before it is measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Spec {
    pub(crate) section: &'static str,
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// What the limit is, in words; none where there is nothing to compare with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit_is: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

impl Spec {
    pub(crate) fn new(section: &'static str, name: impl Into<String>, unit: Unit) -> Self {
        Self { section, name: name.into(), unit, limit_is: None, target: None, note: None }
    }

    pub(crate) fn limit(mut self, what: impl Into<String>) -> Self {
        self.limit_is = Some(what.into());
        self
    }

    pub(crate) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// What several runs gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Samples {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Every run, in order.
    pub(crate) runs: Vec<f64>,
}

impl Samples {
    /// None without runs.
    pub(crate) fn new(runs: Vec<f64>) -> Option<Self> {
        let mut sorted = runs.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self { median: median(&sorted), min, max, runs })
    }
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] }
}

/// The median of unsorted values; NaN of none.
pub(crate) fn median_of(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    if values.is_empty() { f64::NAN } else { median(&values) }
}

/// A figure that was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    #[serde(flatten)]
    pub(crate) spec: Spec,
    pub(crate) ours: Samples,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) limit: Option<Samples>,
    /// Ours ÷ limit, run by run: what disturbs the machine for a while disturbs both sides of a run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<Samples>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) met: Option<bool>,
}

impl Figure {
    /// Puts runs together; `limit` is empty, or has as many as `ours`. None without runs.
    pub(crate) fn new(spec: Spec, ours: Vec<f64>, limit: Vec<f64>) -> Option<Self> {
        let ratios: Vec<f64> = ours.iter().zip(&limit).map(|(ours, limit)| ours / limit).collect();
        // A limit that was too small to be measured gives none.
        let ratio = ratios.iter().all(|ratio| ratio.is_finite()).then(|| Samples::new(ratios)).flatten();
        let (ours, limit) = (Samples::new(ours)?, Samples::new(limit));
        let met = spec.target.and_then(|target| target.is_met(&ours, ratio.as_ref()));
        Some(Self { spec, ours, limit, ratio, met })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(target: Target, ours: &[f64], limit: &[f64]) -> Figure {
        let spec = Spec::new("test", "a figure", Unit::Milliseconds).target(target);
        Figure::new(spec, ours.to_vec(), limit.to_vec()).unwrap()
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median_of(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median_of(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median_of(vec![]).is_nan());
        let samples = Samples::new(vec![3.0, 1.0, 9.0]).unwrap();
        assert_eq!((samples.min, samples.median, samples.max), (1.0, 3.0, 9.0));
        assert_eq!(samples.runs, [3.0, 1.0, 9.0]);
        assert_eq!(Samples::new(vec![]), None);
    }

    #[test]
    fn ratios_are_taken_run_by_run() {
        // Twice as slow in the second run on both sides: the ratio does not notice.
        let figure = figure(Target::RatioAtLeast(0.5), &[50.0, 25.0, 50.0], &[100.0, 50.0, 100.0]);
        let ratio = figure.ratio.unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 0.5, 0.5));
        assert_eq!(figure.met, Some(true));
    }

    #[test]
    fn targets_are_met_or_missed() {
        assert_eq!(figure(Target::RatioAtLeast(0.8), &[7.9], &[10.0]).met, Some(false));
        assert_eq!(figure(Target::RatioAtMost(1.3), &[13.0], &[10.0]).met, Some(true));
        assert_eq!(figure(Target::RatioAtMost(1.3), &[13.1], &[10.0]).met, Some(false));
        assert_eq!(figure(Target::EveryRatioAtMost(1.0), &[1.0, 10.0, 1.0], &[10.0; 3]).met, Some(true));
        assert_eq!(figure(Target::EveryRatioAtMost(1.0), &[1.0, 10.1, 1.0], &[10.0; 3]).met, Some(false));
        assert_eq!(figure(Target::AtMost(100.0), &[101.0], &[]).met, Some(false));
        assert_eq!(figure(Target::AtMost(100.0), &[100.0], &[]).met, Some(true));
        // Without a limit, or with one too small to be measured, there is no ratio to judge.
        assert_eq!(figure(Target::RatioAtLeast(0.8), &[1.0], &[]).met, None);
        assert_eq!(figure(Target::RatioAtLeast(0.8), &[1.0], &[0.0]).met, None);
    }
}
