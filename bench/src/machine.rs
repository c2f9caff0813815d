//! What the figures were measured on: without it they mean nothing. It only reads; what is not known is left out.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// The machine and the program under test.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) architecture: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) processor: Option<String>,
    pub(crate) cores: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_mib: Option<u64>,
    /// Whether the processor says that it is virtual.
    pub(crate) virtual_machine: bool,
    /// What `/sys/kernel/mm/transparent_hugepage/enabled` has chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) huge_pages: Option<String>,
    /// The load average over one minute when the run began: a busy machine measures badly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) load: Option<f64>,
    /// The revision of the source tree, where it is still there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revision: Option<String>,
    pub(crate) profile: &'static str,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let uname = rustix::system::uname();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            processor: value(&cpuinfo, "model name").map(str::to_owned),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_mib(),
            virtual_machine: value(&cpuinfo, "flags").is_some_and(|flags| flags.contains("hypervisor")),
            huge_pages: huge_pages(),
            load: load(),
            revision: revision(),
            profile: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

/// The value of the first `name : value` line.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, value) = text.lines().find(|line| line.starts_with(name))?.split_once(':')?;
    Some(value.trim())
}

fn memory_mib() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = value(&meminfo, "MemTotal")?.strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024)
}

/// The word in brackets is the choice.
fn huge_pages() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// The load average over the last minute.
pub(crate) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

fn revision() -> Option<String> {
    let git = ["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty", "--abbrev=10"];
    let output = Command::new("git").args(git).stderr(std::process::Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// Processor time that a process has used so far, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Times {
    /// In the program.
    pub(crate) user: f64,
    /// In the kernel, on the program's behalf.
    pub(crate) system: f64,
}

impl Times {
    /// Of any process, to a hundredth of a second (proc(5), `/proc/PID/stat`).
    pub(crate) fn of(process: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name of the program, in parentheses, may contain anything; the times are 11 and 12 fields after it.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let mut next = || Some(fields.next()?.parse::<f64>().ok()? / ticks);
        Some(Self { user: next()?, system: next()? })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { user: self.user - before.user, system: self.system - before.system }
    }
}

/// The memory of this process that is in use now, in MB: what is resident, and page tables.
pub(crate) fn used_megabytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kib = |name| value(&status, name)?.strip_suffix(" kB")?.parse::<f64>().ok();
    Some((kib("VmRSS")? + kib("VmPTE")?) * 1024.0 / 1e6)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn this_machine_has_a_kernel_and_cores() {
        let machine = Machine::look();
        assert!(!machine.kernel.is_empty() && machine.cores > 0);
        assert!(machine.memory_mib > Some(16));
        assert!(used_megabytes() > Some(0.1));
    }

    #[test]
    fn work_takes_time_in_the_program() {
        let before = Times::of(std::process::id()).unwrap();
        let start = Instant::now();
        let mut sum = 0u64;
        while start.elapsed() < Duration::from_millis(300) {
            sum = std::hint::black_box(sum + 1);
        }
        let used = Times::of(std::process::id()).unwrap().since(before);
        assert!(used.user + used.system > 0.0, "{used:?}");
        assert_eq!(Times::of(u32::MAX), None);
    }

    #[test]
    fn values_are_found_by_name() {
        let text = "processor\t: 0\nmodel name\t: A: B\n";
        assert_eq!(value(text, "model name"), Some("A: B"));
        assert_eq!(value(text, "flags"), None);
    }
}
