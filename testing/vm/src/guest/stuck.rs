//! What a test leaves behind: its processes are killed, and what cannot be killed is a failure.
//!
//! A task in uninterruptible sleep (state D) waits for a device. That is normal for a moment, and a wedged device if it
//! lasts. Threads of the kernel count too: a file system's own thread hangs on a wedged device as well.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::child;

/// How long a task may stay in uninterruptible sleep after the end of its test, with everything else killed.
const LIMIT: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(20);

/// `PF_KTHREAD` in the flags of a task.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// A task as `/proc/PID/task/TID/stat` shows it (`proc_pid_stat(5)`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    process: i32,
    id: i32,
    name: String,
    state: char,
    of_kernel: bool,
}

impl Task {
    fn parse(process: i32, stat: &str) -> Option<Self> {
        // The name may contain spaces and parentheses itself.
        let (id, rest) = stat.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let flags: u64 = fields.get(6)?.parse().ok()?;
        Some(Self {
            process,
            id: id.parse().ok()?,
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            of_kernel: flags & KERNEL_THREAD != 0,
        })
    }

    /// One line: who it is and where it waits.
    fn describe(&self) -> String {
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/{}/task/{}/{file}", self.process, self.id)).unwrap_or_default()
        };
        let stack: Vec<String> = read("stack")
            .lines()
            .filter_map(|line| Some(line.split_once("] ")?.1.split('+').next()?.to_owned()))
            .collect();
        format!("{} {} ({}) in {}", self.state, self.id, self.name, stack.join(" < "))
    }
}

/// Kills every process but this one, and waits until they are gone. Then gives back the tasks that stay in
/// uninterruptible sleep, each described, except those in `known`, which it adds to.
pub(super) fn clean_up(known: &mut Vec<i32>) -> Vec<String> {
    let end = Instant::now() + LIMIT;
    loop {
        child::reap(Pid::INIT);
        let tasks = tasks();
        let left: Vec<&Task> = tasks.iter().filter(|task| is_left(task) && !known.contains(&task.id)).collect();
        if left.is_empty() {
            return Vec::new();
        }
        if Instant::now() > end {
            known.extend(left.iter().map(|task| task.id));
            return left.iter().map(|task| task.describe()).collect();
        }
        for task in left.iter().filter(|task| !task.of_kernel) {
            kill(task.process);
        }
        std::thread::sleep(POLL);
    }
}

/// All tasks that do not merely sleep, and all of processes, described.
pub(super) fn describe_all() -> Vec<String> {
    tasks()
        .iter()
        .filter(|task| task.process != 1 && (!task.of_kernel || task.state == 'D'))
        .map(Task::describe)
        .collect()
}

/// A process that is not this one, or a thread of the kernel that waits for a device.
fn is_left(task: &Task) -> bool {
    task.process != 1 && task.state != 'Z' && task.state != 'X' && (!task.of_kernel || task.state == 'D')
}

fn kill(process: i32) {
    if let Some(pid) = Pid::from_raw(process) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

fn tasks() -> Vec<Task> {
    let mut tasks = Vec::new();
    for process in numbers("/proc") {
        for id in numbers(&format!("/proc/{process}/task")) {
            let stat = fs::read_to_string(format!("/proc/{process}/task/{id}/stat")).unwrap_or_default();
            tasks.extend(Task::parse(process, &stat));
        }
    }
    tasks
}

fn numbers(folder: &str) -> Vec<i32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_task() {
        let stat = "77 (a) b (c) D 2 0 0 0 -1 2129984 0 0";
        let task = Task::parse(76, stat).unwrap();
        let expected = Task { process: 76, id: 77, name: "a) b (c".into(), state: 'D', of_kernel: true };
        assert_eq!(task, expected);
        assert!(is_left(&task));
        assert_eq!(Task::parse(1, "77 (a"), None);
        assert_eq!(Task::parse(1, ""), None);
    }

    #[test]
    fn sees_itself() {
        let own = std::process::id();
        assert!(tasks().iter().any(|task| u32::try_from(task.process).unwrap() == own && !task.of_kernel));
    }

    #[test]
    fn only_what_lives_is_left() {
        let task = |process, state, of_kernel| Task { process, id: process, name: String::new(), state, of_kernel };
        assert!(is_left(&task(5, 'S', false)) && is_left(&task(5, 'D', true)));
        assert!(!is_left(&task(1, 'R', false)) && !is_left(&task(5, 'Z', false)) && !is_left(&task(5, 'I', true)));
    }
}
