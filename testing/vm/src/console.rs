//! The end of what a kernel printed on its console: where a machine that died says why.

use std::path::Path;

/// How many lines are enough to see a panic with its stack.
const LINES: usize = 60;

/// The last lines of a console's log, without control characters; empty if there is no log.
pub(crate) fn tail(log: &Path) -> Vec<String> {
    let bytes = std::fs::read(log).unwrap_or_default();
    last_lines(&String::from_utf8_lossy(&bytes))
}

fn last_lines(text: &str) -> Vec<String> {
    let clean = |line: &str| line.chars().filter(|c| *c == '\t' || !c.is_control()).collect::<String>();
    let lines: Vec<String> = text.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end_and_no_control_characters() {
        let text: String = (0..100).map(|n| format!("\x1b[{n}\r\n\n")).collect();
        let lines = last_lines(&text);
        assert_eq!((lines.len(), lines.first().unwrap().as_str()), (LINES, "[40"));
        assert_eq!(lines.last().unwrap(), "[99");
        assert!(last_lines("").is_empty() && tail(Path::new("/no/such/file")).is_empty());
    }
}
