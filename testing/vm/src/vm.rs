//! One run from beginning to end: kernel, image, machine, reports.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::image;
use crate::kernel::Kernel;
use crate::machine::{Acceleration, Machine};
use crate::plan::{Plan, Work};
use crate::report::Report;
use crate::watch::Watch;

/// How long the guest may say nothing after the deadline of the test that it runs: it looks for stuck tasks then.
const SILENCE: Duration = Duration::from_secs(60);

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where downloads are kept, and the files of a run are while it lasts. Made if it is not there.
    pub cache: PathBuf,
    /// The kernel: a Debian package, or the folder (with a slash in its name) of one that is unpacked. Usually
    /// [`contents::KERNEL`](crate::contents::KERNEL).
    pub kernel: String,
    /// The program that becomes the guest's first process: this package's `r3map-vm-guest`.
    pub guest: PathBuf,
    /// Memory of the guest in MiB.
    pub memory_mib: u32,
    /// Processors of the guest.
    pub cpus: u32,
    /// How long the whole run may take, the boot too.
    pub limit: Duration,
}

/// Runs plans in virtual machines.
#[derive(Debug)]
pub struct Vm {
    settings: Settings,
}

impl Vm {
    /// A runner with these settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Boots a machine, carries out the plan in it, and ends it. `show` is given lines for people as they come.
    ///
    /// Blocks. A guest that dies or hangs is a failed test in the report, shown with the end of its console.
    ///
    /// # Errors
    /// When no machine could be started: no kernel to be had, a program missing, QEMU failing.
    pub fn run(&self, plan: &Plan, show: &mut dyn FnMut(&str)) -> Result<Report> {
        let start = Instant::now();
        let cache = &self.settings.cache;
        std::fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
        let cache = cache.canonicalize()?;
        let kernel = Kernel::obtain(&self.settings.kernel, &cache)?;
        let folder = tempfile::Builder::new().prefix("run").tempdir_in(&cache)?;
        let image = folder.path().join("image.cpio");
        image::write(&image, &kernel, plan, &self.settings.guest)?;
        let mut machine = self.boot(&kernel, &image, folder.path(), show)?;
        show(&format!("Linux {} is up after {:.1} s", machine.kernel, start.elapsed().as_secs_f64()));
        let report = follow(&mut machine, plan, start + self.settings.limit, show);
        show(&format!("the virtual machine has ended after {:.0} s", start.elapsed().as_secs_f64()));
        Ok(report)
    }

    fn boot(&self, kernel: &Kernel, image: &Path, folder: &Path, show: &mut dyn FnMut(&str)) -> Result<Machine> {
        if Path::new("/dev/kvm").exists() {
            match Machine::start(&self.settings, Acceleration::Kvm, kernel, image, folder) {
                Ok(machine) => return Ok(machine),
                Err(error) => show(&format!("no hardware virtualisation here ({error:#}): emulating")),
            }
        }
        Machine::start(&self.settings, Acceleration::Emulation, kernel, image, folder)
            .with_context(|| format!("the virtual machine does not start; see {}", folder.display()))
    }
}

/// Passes messages to the watch until nothing more can come.
fn follow(machine: &mut Machine, plan: &Plan, end: Instant, show: &mut dyn FnMut(&str)) -> Report {
    let mut watch = Watch::new(matches!(plan.work, Work::Command { .. }));
    let patience = plan.deadline + SILENCE;
    while !watch.is_finished() {
        let limit = patience.min(end.saturating_duration_since(Instant::now()));
        let lines = match machine.next(limit) {
            Ok(Some(message)) => watch.take(message),
            Ok(None) => watch.give_up("the virtual machine did not report in time", &machine.last_words()),
            Err(error) => watch.give_up(&error.to_string(), &machine.last_words()),
        };
        lines.iter().for_each(|line| show(line));
    }
    machine.wait();
    watch.into_report()
}
