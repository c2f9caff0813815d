//! Where one test plays: a folder of its own, and a limit of time after which it fails. Whatever happens, nothing of it
//! is left: no process, no mount, no loop device.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use r3map_testkit::process::Process;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

/// A test's folder and programs.
pub(crate) struct Scene {
    dir: TempDir,
    programs: Mutex<Vec<u32>>,
    steps: Mutex<String>,
}

impl Scene {
    /// Plays a test that needs nothing but the command.
    ///
    /// # Panics
    /// When it takes longer than `limit`, naming its last step, and when it panics.
    pub(crate) fn play(limit: Duration, act: impl FnOnce(&Scene) + Send + 'static) {
        let scene = Arc::new(Self::new());
        let (ends, end) = channel::<()>();
        let actor = {
            let scene = scene.clone();
            // The thread drops both when it ends, however it ends.
            let act = move || {
                let (_ends, scene) = (ends, scene);
                act(&scene);
            };
            std::thread::Builder::new().name("actor".into()).spawn(act).expect("a thread can be had")
        };
        if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            scene.clear();
            panic!("stuck: not done within {limit:?}; the last step was {:?}", scene.step_so_far());
        }
        if let Err(panic) = actor.join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Plays a test that mounts.
    pub(crate) fn with_fuse(limit: Duration, act: impl FnOnce(&Scene) + Send + 'static) {
        if !Path::new("/dev/fuse").exists() {
            return r3map_testkit::skip("this system has no /dev/fuse");
        }
        Self::play(limit, act);
    }

    /// Plays a test that mounts, and that does what only root may (loop devices, tmpfs, other users).
    pub(crate) fn with_root(limit: Duration, act: impl FnOnce(&Scene) + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            return r3map_testkit::skip("only root has loop devices, tmpfs and other users");
        }
        if !Path::new("/dev/loop-control").exists() {
            return r3map_testkit::skip("this system has no /dev/loop-control");
        }
        Self::with_fuse(limit, act);
    }

    fn new() -> Self {
        let dir = TempDir::with_prefix("r3map-e2e-").expect("a temporary folder can be made");
        // Other users are to reach what lies in it.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("it is ours");
        Self { dir, programs: Mutex::default(), steps: Mutex::default() }
    }

    /// The path of something in the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// As [`Self::path`], as an argument for a program.
    pub(crate) fn name(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().expect("temporary folders have plain names")
    }

    /// Says what comes now, for the message if it hangs.
    pub(crate) fn step(&self, what: impl Into<String>) {
        *guard(&self.steps) = what.into();
    }

    fn step_so_far(&self) -> String {
        guard(&self.steps).clone()
    }

    /// Starts a program that is killed at the latest when the test ends.
    pub(crate) fn start(&self, command: &mut Command) -> Process {
        self.step(format!("{command:?}"));
        let process = Process::start(command.current_dir(self.dir.path()));
        guard(&self.programs).push(process.id());
        process
    }

    /// Runs a program to its end, which must be a good one, and gives what it printed on its standard output.
    ///
    /// # Panics
    /// If it fails, with its output, or takes longer than `limit`.
    pub(crate) fn run(&self, limit: Duration, program: &str, arguments: &[&str]) -> String {
        let mut process = self.start(Command::new(program).args(arguments));
        process.close_stdin();
        let status = process.wait(limit);
        let (out, err) = (process.stdout().join("\n"), process.stderr().join("\n"));
        assert!(status.success(), "{program} {arguments:?}: {status}\n{out}\n{err}");
        out
    }

    /// A tmpfs with room for `size` bytes.
    pub(crate) fn tmpfs(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).expect("the folder is empty");
        let size = format!("size={size}");
        self.run(super::SOON, "mount", &["-t", "tmpfs", "-o", &size, "tmpfs", &self.name(name)]);
        path
    }

    /// Kills the programs, detaches the loop devices and unmounts what is mounted inside.
    fn clear(&self) {
        for id in guard(&self.programs).drain(..) {
            let id = i32::try_from(id).ok().and_then(Pid::from_raw).expect("process ids are positive");
            // Most have ended long ago.
            let _ = kill_process_group(id, Signal::KILL);
        }
        let loops = loop_devices_in(self.dir.path());
        for point in mounts_in(self.dir.path()) {
            let _ = unmount(point.as_path(), UnmountFlags::DETACH | UnmountFlags::FORCE);
        }
        for device in loops {
            let _ = Command::new("losetup").arg("-d").arg(device).output();
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What is mounted below a folder, the latest first.
pub(crate) fn mounts_in(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // The fifth field; names of temporary folders have nothing that would be escaped.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut points: Vec<_> = points.filter(|point| point.starts_with(dir)).collect();
    points.reverse();
    points
}

fn loop_devices_in(dir: &Path) -> Vec<PathBuf> {
    let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let backed = devices.filter(|device| {
        std::fs::read(device.path().join("loop/backing_file"))
            .is_ok_and(|file| Path::new(OsStr::from_bytes(&file)).starts_with(dir))
    });
    backed.map(|device| Path::new("/dev").join(device.file_name())).collect()
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
