//! Other programs under test: started with their output captured, waited for with a limit, killed when the test ends.
//!
//! Calls block. In an async test use a multi-threaded runtime, so that servers of the test itself go on meanwhile.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(2);

/// A running program. Dropping it kills it, and everything that it started, with signal 9.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    incoming: Receiver<Line>,
    lines: Vec<Line>,
    /// How many of `lines` earlier waits have passed.
    passed: usize,
}

#[derive(Debug, Clone)]
struct Line {
    stream: &'static str,
    text: String,
}

impl Process {
    /// Starts a program in a process group of its own, with a pipe on each of its three streams.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let (sender, incoming) = channel();
        collect("stdout", child.stdout.take().expect("stdout is a pipe"), sender.clone());
        collect("stderr", child.stderr.take().expect("stderr is a pipe"), sender);
        Self { child, name, incoming, lines: Vec::new(), passed: 0 }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line, on either stream, that contains `text`, and gives it back. Lines before it are passed.
    ///
    /// # Panics
    /// If it does not come within `limit`, or can come no more; with all that was printed.
    pub fn wait_for_line(&mut self, limit: Duration, text: &str) -> String {
        let end = Instant::now() + limit;
        loop {
            while let Some(line) = self.lines.get(self.passed) {
                self.passed += 1;
                if line.text.contains(text) {
                    return line.text.clone();
                }
            }
            match self.incoming.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => self.lines.push(line),
                Err(RecvTimeoutError::Timeout) => self.complain(&format!("did not print {text:?} within {limit:?}")),
                Err(RecvTimeoutError::Disconnected) => self.complain(&format!("ended without printing {text:?}")),
            }
        }
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// If it has not within `limit`; with all that was printed.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            if Instant::now() >= end {
                self.complain(&format!("did not end within {limit:?}"));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// What it has printed on its standard output so far, line by line; all of it after [`Self::wait`], unless a program
    /// that it started goes on printing.
    pub fn stdout(&mut self) -> Vec<String> {
        self.stream("stdout")
    }

    /// As [`Self::stdout`], for its standard error.
    pub fn stderr(&mut self) -> Vec<String> {
        self.stream("stderr")
    }

    /// Kills it with signal 9, without a chance to tidy up, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Asks it to end (SIGTERM).
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// What a terminal that goes away does (SIGHUP).
    pub fn hang_up(&self) {
        self.signal(Signal::HUP);
    }

    /// What Ctrl-C does (SIGINT).
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Stops it in its tracks (SIGSTOP), as a host that is wedged. Returns when each of its threads has stopped.
    ///
    /// # Panics
    /// If one goes on for ten seconds.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let end = Instant::now() + Duration::from_secs(10);
        while !self.is_frozen() {
            assert!(Instant::now() < end, "{} does not stop", self.name);
            std::thread::sleep(POLL);
        }
    }

    /// Whether the kernel says of each thread that it is stopped (`T`, proc_pid_stat(5)).
    fn is_frozen(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        tasks.into_iter().flatten().flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('T'))
        })
    }

    /// Lets it go on after [`Self::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// If that was closed, here or there.
    pub fn send(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("its standard input is open");
        if let Err(error) = stdin.write_all(text.as_bytes()) {
            self.complain(&format!("does not take {text:?}: {error}"));
        }
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin = None;
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a child can be signalled");
    }

    fn pid(&self) -> Pid {
        let id = i32::try_from(self.child.id()).expect("process ids are small");
        Pid::from_raw(id).expect("process ids are positive")
    }

    fn stream(&mut self, name: &str) -> Vec<String> {
        if !self.is_running() {
            // The last lines may still be on their way from the pipe.
            while let Ok(line) = self.incoming.recv_timeout(Duration::from_millis(500)) {
                self.lines.push(line);
            }
        }
        self.lines.extend(self.incoming.try_iter());
        self.lines.iter().filter(|line| line.stream == name).map(|line| line.text.clone()).collect()
    }

    fn complain(&mut self, what: &str) -> ! {
        self.lines.extend(self.incoming.try_iter());
        let mut output = String::new();
        for Line { stream, text } in &self.lines {
            let _ = write!(output, "\n  {stream}: {text}");
        }
        panic!("{} {what}; it printed:{output}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended long ago: then nobody is left in its group, or only what it started.
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
    }
}

fn collect(stream: &'static str, pipe: impl Read + Send + 'static, lines: Sender<Line>) {
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        while pipe.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_owned();
            if lines.send(Line { stream, text }).is_err() {
                return;
            }
            bytes.clear();
        }
    });
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::conformance::panic_message;

    const LONG: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> Process {
        Process::start(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn waits_for_lines_and_for_the_end() {
        let mut process = shell("echo one; echo two >&2; echo three; exit 3");
        assert_eq!(process.wait_for_line(LONG, "thr"), "three");
        assert_eq!(process.wait(LONG).code(), Some(3));
        assert_eq!((process.stdout(), process.stderr()), (vec!["one".into(), "three".into()], vec!["two".into()]));
        assert!(!process.is_running());
    }

    #[test]
    fn is_told_things() {
        let mut process = Process::start(&mut Command::new("cat"));
        process.send("one\n");
        assert_eq!(process.wait_for_line(LONG, "one"), "one");
        process.send("two\n");
        process.close_stdin();
        assert!(process.wait(LONG).success());
        assert_eq!(process.stdout(), ["one", "two"]);
    }

    #[test]
    fn says_what_was_printed_instead() {
        let mut process = shell("echo something else");
        let panic = catch_unwind(AssertUnwindSafe(|| process.wait_for_line(LONG, "ready"))).unwrap_err();
        let message = panic_message(&*panic);
        assert!(message.contains("ended without printing \"ready\""), "{message}");
        assert!(message.contains("stdout: something else"), "{message}");
        let mut process = shell("echo slow; sleep 100");
        let limit = Duration::from_millis(50);
        let panic = catch_unwind(AssertUnwindSafe(|| process.wait_for_line(limit, "ready"))).unwrap_err();
        assert!(panic_message(&*panic).contains("did not print \"ready\" within 50ms"));
    }

    #[test]
    fn signals_reach_it_and_dropping_leaves_nothing() {
        let mut process = shell("trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.01; done");
        process.wait_for_line(LONG, "ready");
        process.freeze();
        process.terminate();
        process.thaw();
        process.wait_for_line(LONG, "asked");
        assert_eq!(process.wait(LONG).code(), Some(7));

        let mut process = shell("sleep 1000 & echo $!; wait");
        let grandchild: i32 = process.wait_for_line(LONG, "").parse().unwrap();
        drop(process);
        let gone = |pid| !std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists();
        let end = Instant::now() + LONG;
        while !gone(grandchild) {
            assert!(Instant::now() < end, "the grandchild lives on");
            std::thread::sleep(POLL);
        }
    }
}
