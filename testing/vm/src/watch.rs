//! Follows what a guest reports: counts, words for people, and what it means when the reports stop. No I/O, no clock.

use std::time::Duration;

use crate::protocol::Message;
use crate::report::{Report, Verdict};

/// The lines of a test's output that are kept to be shown if it fails.
const KEPT: usize = 400;

/// The state of a run as far as the reports tell it.
#[derive(Debug)]
pub(crate) struct Watch {
    report: Report,
    running: Option<Running>,
    finished: bool,
    /// Output is passed on at once, instead of only if the test fails.
    pass_on: bool,
}

#[derive(Debug)]
struct Running {
    test: String,
    output: Vec<String>,
}

impl Watch {
    pub(crate) fn new(pass_on: bool) -> Self {
        Self { report: Report::default(), running: None, finished: false, pass_on }
    }

    /// Takes a message; gives back what to show.
    pub(crate) fn take(&mut self, message: Message) -> Vec<String> {
        match message {
            Message::Ready { .. } => Vec::new(),
            Message::Begin { test } => {
                self.running = Some(Running { test, output: Vec::new() });
                Vec::new()
            }
            Message::Output { text } if self.pass_on => vec![text],
            Message::Output { text } => {
                self.keep(text);
                Vec::new()
            }
            Message::End { verdict, seconds } => self.end(&verdict, Duration::try_from_secs_f64(seconds).ok()),
            Message::Broken { reason } => self.end(&Verdict::Failed { reason }, None),
            Message::Finished => {
                self.finished = true;
                Vec::new()
            }
        }
    }

    /// Whether nothing more is expected.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// The machine is gone, or is given up: whatever ran has failed. `last_words` is the end of its console.
    pub(crate) fn give_up(&mut self, why: &str, last_words: &[String]) -> Vec<String> {
        let mut lines = self.end(&Verdict::Failed { reason: why.to_owned() }, None);
        lines.push("the end of the virtual machine's console:".to_owned());
        lines.extend(last_words.iter().map(|line| format!("    {line}")));
        self.finished = true;
        lines
    }

    pub(crate) fn into_report(self) -> Report {
        self.report
    }

    fn keep(&mut self, text: String) {
        if let Some(running) = &mut self.running {
            if running.output.len() == KEPT {
                running.output.remove(0);
            }
            running.output.push(text);
        }
    }

    fn end(&mut self, verdict: &Verdict, took: Option<Duration>) -> Vec<String> {
        let running = self.running.take();
        let test = running.as_ref().map_or("the virtual machine", |running| &running.test);
        self.report.add(test, verdict);
        let time = took.map(|took| format!(" ({:.1} s)", took.as_secs_f64())).unwrap_or_default();
        let mut lines = vec![format!("test {test} ... {verdict}{time}")];
        if matches!(verdict, Verdict::Failed { .. }) {
            lines.extend(running.into_iter().flat_map(|running| running.output).map(|line| format!("    {line}")));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(test: &str) -> Message {
        Message::Begin { test: test.into() }
    }

    fn output(text: &str) -> Message {
        Message::Output { text: text.into() }
    }

    fn end(verdict: Verdict) -> Message {
        Message::End { verdict, seconds: 1.25 }
    }

    fn failed(reason: &str) -> Verdict {
        Verdict::Failed { reason: reason.into() }
    }

    fn follow(watch: &mut Watch, messages: impl IntoIterator<Item = Message>) -> Vec<String> {
        messages.into_iter().flat_map(|message| watch.take(message)).collect()
    }

    #[test]
    fn counts_and_shows_the_output_of_what_failed() {
        let mut watch = Watch::new(false);
        let skipped = Verdict::Skipped { reason: "no".into() };
        let messages = [
            Message::Ready { kernel: "6".into() },
            begin("a"),
            output("fine"),
            end(Verdict::Passed),
            begin("b"),
            output("why"),
            end(failed("exit code 101")),
            begin("c"),
            end(skipped),
        ];
        let lines = follow(&mut watch, messages);
        let expected = [
            "test a ... ok (1.2 s)",
            "test b ... FAILED: exit code 101 (1.2 s)",
            "    why",
            "test c ... skipped: no (1.2 s)",
        ];
        assert_eq!(lines, expected);
        assert!(!watch.is_finished());
        assert!(watch.take(Message::Finished).is_empty() && watch.is_finished());
        assert_eq!(watch.into_report(), Report { passed: 1, skipped: 1, failed: vec!["b".into()] });
    }

    #[test]
    fn a_machine_that_dies_fails_the_test_that_ran() {
        let mut watch = Watch::new(false);
        let mut lines = follow(&mut watch, [begin("a"), end(Verdict::Passed), begin("b"), output("last line")]);
        lines.extend(watch.give_up("it ended", &["Kernel panic".into()]));
        let rest = &lines[1..];
        let expected = [
            "test b ... FAILED: it ended",
            "    last line",
            "the end of the virtual machine's console:",
            "    Kernel panic",
        ];
        assert_eq!(rest, expected);
        assert!(watch.is_finished());
        assert_eq!(watch.into_report(), Report { passed: 1, skipped: 0, failed: vec!["b".into()] });
    }

    #[test]
    fn a_machine_that_dies_between_tests_is_a_failure_too() {
        let mut watch = Watch::new(false);
        watch.give_up("silent", &[]);
        assert_eq!(watch.into_report().failed, ["the virtual machine"]);
        let mut watch = Watch::new(false);
        watch.take(Message::Broken { reason: "no module nbd".into() });
        assert_eq!(watch.into_report().failed, ["the virtual machine"]);
    }

    #[test]
    fn a_commands_output_is_passed_on() {
        let mut watch = Watch::new(true);
        let lines = follow(&mut watch, [begin("bench"), output("1 GB/s"), end(failed("exit code 1"))]);
        assert_eq!(lines, ["1 GB/s", "test bench ... FAILED: exit code 1 (1.2 s)"]);
    }

    #[test]
    fn of_endless_output_the_end_is_kept() {
        let mut watch = Watch::new(false);
        follow(&mut watch, [begin("a")].into_iter().chain((0..KEPT + 5).map(|n| output(&n.to_string()))));
        let lines = watch.give_up("x", &[]);
        assert_eq!((lines[1].as_str(), lines.len()), ("    5", KEPT + 2));
    }
}
