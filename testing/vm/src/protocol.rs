//! What the guest tells the host while it runs: one JSON object a line, in one direction, over a virtio port.
//!
//! ```text
//!   ready ─► begin ─► output* ─► end ─► begin … ─► finished
//! ```
//! The host takes anything in any order, because a guest may die at any point: see `watch.rs`.

use serde::{Deserialize, Serialize};

use crate::report::Verdict;

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// The guest runs its first program.
    Ready {
        /// The kernel's release.
        kernel: String,
    },
    /// A test starts.
    Begin {
        /// Its full name.
        test: String,
    },
    /// A line that the test or command printed.
    Output {
        /// The line; what is no UTF-8 is replaced.
        text: String,
    },
    /// The test is over.
    End {
        /// How it went.
        verdict: Verdict,
        /// How long it took.
        seconds: f64,
    },
    /// The plan could not be carried out.
    Broken {
        /// Why.
        reason: String,
    },
    /// Everything in the plan is done.
    Finished,
}

impl Message {
    pub(crate) fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).expect("plain data has a JSON form");
        line.push('\n');
        line
    }

    /// The message on a line; nothing if it was cut off or is something else.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_and_comes_back() {
        let messages = [
            Message::Ready { kernel: "6.12".into() },
            Message::Begin { test: "a::b".into() },
            Message::Output { text: "two\nlines \u{fffd} \"quoted\"".into() },
            Message::End { verdict: Verdict::Failed { reason: "exit 1".into() }, seconds: 0.25 },
            Message::End { verdict: Verdict::Passed, seconds: 1.0 },
            Message::Broken { reason: "no plan".into() },
            Message::Finished,
        ];
        for message in messages {
            let line = message.to_line();
            assert_eq!(line.matches('\n').count(), 1);
            assert_eq!(Message::from_line(&line).as_ref(), Some(&message));
            assert_eq!(Message::from_line(&line.replace('\n', "\r\n")).as_ref(), Some(&message));
            for cut in 1..line.len() - 1 {
                if line.is_char_boundary(cut) {
                    assert_eq!(Message::from_line(&line[..cut]), None, "{}", &line[..cut]);
                }
            }
        }
    }
}
