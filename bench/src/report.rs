//! What a run says: a table for people or JSON lines for programs on standard output, progress on standard error.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Instant;

use serde::Serialize;

use crate::figure::{Figure, Samples, Spec, Target};
use crate::machine::{self, Machine};
use crate::run::Settings;

/// How a run is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// A table.
    Table,
    /// One JSON object per line; `kind` says what it is.
    Json,
}

/// A line of the JSON report.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Line<'a> {
    /// First: what is measured on, and how.
    Run {
        machine: &'a Machine,
        settings: &'a Settings,
    },
    Figure(&'a Figure),
    /// Something could not be measured.
    Failure {
        section: &'a str,
        name: &'a str,
        error: String,
    },
    /// Last.
    Summary {
        met: usize,
        missed: usize,
        failed: usize,
        seconds: f64,
        load: Option<f64>,
    },
}

/// Collects and prints.
pub(crate) struct Report {
    style: Style,
    start: Instant,
    section: Option<&'static str>,
    met: usize,
    missed: usize,
    failed: usize,
}

impl Report {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, start: Instant::now(), section: None, met: 0, missed: 0, failed: 0 }
    }

    pub(crate) fn missed(&self) -> usize {
        self.missed
    }

    pub(crate) fn failed(&self) -> usize {
        self.failed
    }

    pub(crate) fn begin(&self, machine: &Machine, settings: &Settings) {
        if machine.profile == "debug" {
            say("warning: this is a debug build; measure with --release");
        }
        if machine.load.is_some_and(|load| load > 0.5) {
            say("warning: the machine is busy; the spread will tell");
        }
        match self.style {
            Style::Json => self.line(&Line::Run { machine, settings }),
            Style::Table => print(&heading(machine, settings)),
        }
    }

    /// Says what is measured now.
    pub(crate) fn progress(&self, spec: &Spec) {
        say(&format!("[{:4.0} s] {}: {}", self.start.elapsed().as_secs_f64(), spec.section, spec.name));
    }

    pub(crate) fn figure(&mut self, figure: Figure) {
        match figure.met {
            Some(true) => self.met += 1,
            Some(false) => self.missed += 1,
            None => {}
        }
        match self.style {
            Style::Json => self.line(&Line::Figure(&figure)),
            Style::Table => {
                self.section(&figure.spec);
                print(&row(&figure));
            }
        }
    }

    pub(crate) fn failure(&mut self, spec: &Spec, error: &anyhow::Error) {
        self.failed += 1;
        let (section, name) = (spec.section, spec.name.as_str());
        match self.style {
            Style::Json => self.line(&Line::Failure { section, name, error: format!("{error:#}") }),
            Style::Table => {
                self.section(spec);
                print(&format!("  {name}: could not be measured: {error:#}"));
            }
        }
    }

    pub(crate) fn end(&self) {
        let (met, missed, failed) = (self.met, self.missed, self.failed);
        let (seconds, load) = (self.start.elapsed().as_secs_f64(), machine::load());
        match self.style {
            Style::Json => self.line(&Line::Summary { met, missed, failed, seconds, load }),
            Style::Table => {
                print(&format!("\ntargets: {met} met, {missed} missed; {failed} failed to run; {seconds:.0} s"));
            }
        }
    }

    fn section(&mut self, spec: &Spec) {
        if self.section != Some(spec.section) {
            self.section = Some(spec.section);
            print(&format!("\n{}", spec.section));
            print(&columns(["", "ours", "spread", "limit", "spread", "ratio", "target", ""]));
        }
    }

    fn line(&self, line: &Line<'_>) {
        match serde_json::to_string(line) {
            Ok(text) => print(&text),
            Err(error) => say(&format!("error: cannot write a line of the report: {error}")),
        }
    }
}

fn heading(machine: &Machine, settings: &Settings) -> String {
    let mut text = format!("r3map-bench {}", env!("CARGO_PKG_VERSION"));
    if let Some(revision) = &machine.revision {
        let _ = write!(text, " ({revision}, {} build)", machine.profile);
    }
    let kind = if machine.virtual_machine { "virtual " } else { "" };
    let _ = write!(text, "\nLinux {} {}, {} {kind}cores", machine.kernel, machine.architecture, machine.cores);
    for (what, value) in [("", &machine.processor), ("huge pages: ", &machine.huge_pages)] {
        if let Some(value) = value {
            let _ = write!(text, ", {what}{value}");
        }
    }
    if let Some(mib) = machine.memory_mib {
        let _ = write!(text, ", {} GiB", mib.div_ceil(1024));
    }
    if let Some(load) = machine.load {
        let _ = write!(text, ", load {load}");
    }
    let quick = if settings.quick { ", quick" } else { "" };
    let (size, runs, seed) = (r3map::size::format(settings.size), settings.runs, settings.seed);
    let _ = write!(text, "\nsize {size}, {runs} runs after one to warm up, seed {seed}{quick}; medians, ");
    text + "spread is least … most"
}

fn row(figure: &Figure) -> String {
    let unit = figure.spec.unit.name();
    let value = |samples: &Samples| format!("{} {unit}", number(samples.median));
    let spread = |samples: &Samples| format!("{} … {}", number(samples.min), number(samples.max));
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let verdict = match figure.met {
        Some(true) => "met",
        Some(false) => "MISSED",
        None => "",
    };
    let mut text = columns([
        &figure.spec.name,
        &value(&figure.ours),
        &spread(&figure.ours),
        &or_dash(figure.limit.as_ref().map(value)),
        &or_dash(figure.limit.as_ref().map(spread)),
        &or_dash(figure.ratio.as_ref().map(|ratio| number(ratio.median))),
        &or_dash(figure.spec.target.map(|target| wish(target, unit))),
        verdict,
    ]);
    if let Some(limit) = &figure.spec.limit_is {
        let _ = write!(text, "\n      limit: {limit}");
    }
    if let Some(note) = &figure.spec.note {
        let _ = write!(text, "\n      {note}");
    }
    text
}

fn wish(target: Target, unit: &str) -> String {
    match target {
        Target::RatioAtLeast(least) => format!("≥ {least}"),
        Target::RatioAtMost(most) => format!("≤ {most}"),
        Target::EveryRatioAtMost(most) => format!("all ≤ {most}"),
        Target::AtMost(most) => format!("≤ {most} {unit}"),
    }
}

fn columns(cells: [&str; 8]) -> String {
    let [name, ours, spread, limit, limit_spread, ratio, target, verdict] = cells;
    let text = format!(
        "  {name:<38} {ours:>13} {spread:>19} {limit:>13} {limit_spread:>19} {ratio:>7} {target:>9}  {verdict}"
    );
    text.trim_end().to_owned()
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A reader that has gone does not matter to the measuring.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figure::Unit;

    #[test]
    fn numbers_have_three_digits() {
        let texts = [1234.5, 99.96, 12.34, 1.234, 0.1234].map(number);
        assert_eq!(texts, ["1234", "100.0", "12.3", "1.23", "0.123"]);
    }

    #[test]
    fn a_row_says_everything() {
        let spec = Spec::new("slice", "reading", Unit::MebibytesPerSecond).limit("plain memory").note("so and so");
        let spec = spec.target(Target::RatioAtLeast(0.95));
        let text = row(&Figure::new(spec, vec![90.0, 80.0, 85.0], vec![100.0; 3]).unwrap());
        let words: Vec<_> = text.split_whitespace().collect();
        assert_eq!(words[..8], ["reading", "85.0", "MiB/s", "80.0", "…", "90.0", "100", "MiB/s"]);
        assert_eq!(words[11..15], ["0.850", "≥", "0.95", "MISSED"]);
        assert!(text.ends_with("limit: plain memory\n      so and so"), "{text}");
    }

    #[test]
    fn a_figure_is_one_flat_json_object() {
        let spec = Spec::new("open", "memory", Unit::Megabytes).target(Target::AtMost(100.0));
        let figure = Figure::new(spec, vec![7.0], vec![]).unwrap();
        let value = serde_json::to_value(Line::Figure(&figure)).unwrap();
        let expected = serde_json::json!({
            "kind": "figure", "section": "open", "name": "memory", "unit": "MB", "met": true,
            "target": {"at_most": 100.0},
            "ours": {"median": 7.0, "min": 7.0, "max": 7.0, "runs": [7.0]},
        });
        assert_eq!(value, expected);
    }
}
