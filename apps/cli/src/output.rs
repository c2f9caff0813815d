//! How the command talks: bars on a terminal, plain lines elsewhere, one JSON object a line with `--json`.
//!
//! Results go to standard output, everything else to standard error, so that a script can read the one and a person
//! the other.

use std::io::{ErrorKind, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

/// Where events go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// A result: `human` as it is, or `value` as an event called `event`.
    pub(crate) fn event(self, event: &str, human: &str, value: impl Serialize) {
        if self.json {
            print_json(event, &value);
        } else {
            let _ = writeln!(std::io::stdout(), "{human}");
        }
    }

    /// What a command is there to say, as [`Self::event`] says it: that it cannot be written is an error.
    pub(crate) fn answer(self, event: &str, human: &str, value: impl Serialize) -> Result<()> {
        let text = if self.json { json_of(event, &value) } else { human.to_owned() };
        write_out(text.as_bytes())
    }

    /// Something that a person should know, but no result.
    pub(crate) fn note(self, event: &str, human: &str) {
        if self.json {
            print_json(event, &json!({ "message": human }));
        } else {
            say_line(&format!("{event}: {human}"));
        }
    }

    /// As [`Self::note`], with `value` as the event.
    pub(crate) fn tell(self, event: &str, human: &str, value: impl Serialize) {
        if self.json {
            print_json(event, &value);
        } else {
            say_line(&format!("{event}: {human}"));
        }
    }

    /// A step of something whose bar shows it too: said only where there is no bar.
    pub(crate) fn step(self, event: &str, human: &str, value: impl Serialize) {
        if self.json || !has_bars() {
            self.tell(event, human, value);
        }
    }

    /// A bar over `size` bytes.
    pub(crate) fn bar(self, what: &'static str, size: u64) -> Bar {
        Bar::new(self, what, size)
    }
}

/// What a command that does one thing could not do, in its own words: the library's word for it, such as `mount`, is none
/// that was given.
pub(crate) fn cannot(what: &str, error: &r3map::Error) -> anyhow::Error {
    anyhow!("cannot {what}: {}", error.reason())
}

/// Writes a line to standard error in one piece, so that others who write there too do not come between.
fn say_line(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn print_json(event: &str, value: &impl Serialize) {
    let _ = writeln!(std::io::stdout(), "{}", json_of(event, value));
}

fn json_of(event: &str, value: &impl Serialize) -> String {
    let mut object = json!({ "event": event });
    if let (Some(object), Ok(Value::Object(fields))) = (object.as_object_mut(), serde_json::to_value(value)) {
        object.extend(fields);
    }
    object.to_string()
}

/// Writes a text to standard output, and ends it with a line feed. Whoever reads no further has had enough.
pub(crate) fn write_out(text: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.trim_ascii_end()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to standard output"),
    }
}

/// Whether bars can be drawn: not where standard error is no terminal, nor on one that takes nothing but lines.
fn has_bars() -> bool {
    !ProgressDrawTarget::stderr().is_hidden()
}

/// How often progress is said where no bar can be drawn.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// The progress of one long thing, with rate and time left.
pub(crate) struct Bar {
    output: Output,
    what: &'static str,
    size: u64,
    start: Instant,
    first: Mutex<Option<u64>>,
    said: Mutex<Instant>,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn new(output: Output, what: &'static str, size: u64) -> Self {
        let drawn = !output.json && has_bars();
        let style = "{prefix:>8} [{bar:30}] {binary_bytes:>10} of {binary_total_bytes} {binary_bytes_per_sec:>12} {left:>9} {msg}";
        let bar = drawn.then(|| {
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            let style = style.with_key("left", say_left).progress_chars("=> ");
            ProgressBar::new(size).with_style(style).with_prefix(what)
        });
        let now = Instant::now();
        Self { output, what, size, start: now, first: Mutex::new(None), said: Mutex::new(now), bar }
    }

    /// `done` bytes are done; `extra` is a word or two more.
    pub(crate) fn set(&self, done: u64, extra: &str) {
        let first = *lock(&self.first).get_or_insert(done);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(extra.to_owned());
            return;
        }
        let mut said = lock(&self.said);
        if said.elapsed() >= PLAIN_INTERVAL {
            *said = Instant::now();
            self.say(done, done.saturating_sub(first), extra);
        }
    }

    fn say(&self, done: u64, moved: u64, extra: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = moved as f64 / seconds.max(1e-9);
        #[expect(clippy::cast_precision_loss, reason = "a time for people")]
        let left = self.size.saturating_sub(done) as f64 / rate;
        // While nothing moves nobody knows.
        let left = left.is_finite().then(|| left.round());
        if self.output.json {
            let (what, size) = (self.what, self.size);
            print_json(
                "progress",
                &json!({ "what": what, "done": done, "size": size, "bytes_per_second": rate.round(), "seconds_left": left }),
            );
            return;
        }
        let percent = done * 100 / self.size.max(1);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people")]
        let rate = r3map::size::format(rate as u64);
        let (what, of) = (self.what, r3map::size::format(self.size));
        let left = left.map_or_else(String::new, |left| format!(", {left:.0} s left"));
        say_line(format!("{what}: {percent} % of {of}, {rate}/s{left} {extra}").trim_end());
    }

    /// Has `say` print something while the bar is out of the way.
    pub(crate) fn aside(&self, say: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }

    /// It is over; the bar goes away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long it takes still. While nothing moves nobody knows.
fn say_left(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    if state.per_sec() > 0.0 {
        let _ = write!(out, "{:#} left", HumanDuration(state.eta()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
