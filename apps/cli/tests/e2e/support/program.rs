//! The `r3map` command as a running program: a server, a mount, or anything that ends by itself.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use r3map_testkit::process::Process;
use serde_json::Value;

use super::scene::mounts_in;
use super::{SOON, Scene};

/// The command under test.
const R3MAP: &str = env!("CARGO_BIN_EXE_r3map");

/// The command, running.
pub(crate) struct Program(Process);

/// How it ended, and what it said.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// None if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Lines on standard output.
    pub(crate) out: Vec<String>,
    /// Lines on standard error.
    pub(crate) err: Vec<String>,
}

impl Outcome {
    /// Its events, where it was started with `--json`.
    ///
    /// # Panics
    /// If a line is no JSON object with the name of an event.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.out.iter().map(|line| event(line)).collect()
    }

    /// The last event of that name.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn event(&self, name: &str) -> Value {
        let found = self.events().into_iter().rfind(|event| event["event"] == name);
        found.unwrap_or_else(|| panic!("there is no event {name}: {self:?}"))
    }

    /// Everything it said.
    pub(crate) fn text(&self) -> String {
        [self.out.join("\n"), self.err.join("\n")].join("\n")
    }
}

/// Reads one event.
pub(crate) fn event(line: &str) -> Value {
    let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is not JSON: {error}"));
    assert!(value["event"].is_string(), "{line:?} is not an event");
    value
}

impl Program {
    /// Waits for the next event of that name.
    pub(crate) fn wait_for_event(&mut self, limit: Duration, name: &str) -> Value {
        event(&self.wait_for_line(limit, &format!("\"event\":\"{name}\"")))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end within `limit`.
    pub(crate) fn end(mut self, limit: Duration) -> Outcome {
        let code = self.wait(limit).code();
        Outcome { code, out: self.stdout(), err: self.stderr() }
    }

    /// As [`Self::end`], for an end that must be good.
    ///
    /// # Panics
    /// Also if it fails.
    pub(crate) fn end_well(self, limit: Duration) -> Outcome {
        let outcome = self.end(limit);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        outcome
    }
}

impl Deref for Program {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.0
    }
}

/// `r3map serve`, ready.
pub(crate) struct Served {
    /// The server.
    pub(crate) program: Program,
    /// What a client connects to.
    pub(crate) uri: String,
}

impl Served {
    /// The address behind a `grpc://` name, for a proxy.
    pub(crate) fn address(&self) -> SocketAddr {
        let address = self.uri.strip_prefix("grpc://").and_then(|address| address.parse().ok());
        address.unwrap_or_else(|| panic!("{} is no TCP address", self.uri))
    }

    /// Kills it with signal 9.
    pub(crate) fn kill(mut self) -> SocketAddr {
        let address = self.address();
        self.program.kill();
        address
    }

    /// Ends it as Ctrl-C does.
    pub(crate) fn stop(self) {
        self.program.terminate();
        self.program.end_well(SOON);
    }
}

/// `r3map mount`, ready.
pub(crate) struct Mounted {
    /// The command.
    pub(crate) program: Program,
    /// The file.
    pub(crate) path: PathBuf,
    /// Whether something was there before.
    existed: bool,
}

impl Mounted {
    /// Opens the file to read and write.
    ///
    /// # Panics
    /// If that does not work.
    pub(crate) fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.path).expect("the mounted file can be opened")
    }

    /// The path as an argument.
    pub(crate) fn name(&self) -> &str {
        self.path.to_str().expect("temporary folders have plain names")
    }

    /// Kills it with signal 9; the mount point is left as it is.
    pub(crate) fn kill(mut self) {
        self.program.kill();
    }

    /// Asks it to end, and expects a good end: everything pushed, nothing mounted.
    pub(crate) fn unmount(self) -> Outcome {
        self.program.terminate();
        self.wait_for_end()
    }

    /// Expects a good end that somebody else has asked for.
    pub(crate) fn wait_for_end(self) -> Outcome {
        let outcome = self.program.end_well(SOON);
        assert!(!is_mounted(&self.path), "it is still mounted");
        assert_eq!(self.path.exists(), self.existed, "what it makes it removes, and nothing else");
        outcome
    }

    /// Waits until the whole region is local.
    pub(crate) fn wait_pulled(&mut self) {
        self.program.wait_for_event(SOON, "pulled");
    }
}

/// Whether something is mounted on a path.
pub(crate) fn is_mounted(path: &Path) -> bool {
    !mounts_in(path).is_empty()
}

impl Scene {
    /// Starts the command.
    pub(crate) fn r3map(&self, arguments: &[&str]) -> Program {
        // What it makes for itself goes with the scene, also where it is killed.
        Program(self.start(Command::new(R3MAP).args(arguments).env("TMPDIR", self.path("."))))
    }

    /// Starts the command in a folder of the scene's.
    pub(crate) fn r3map_in(&self, folder: &str, arguments: &[&str]) -> Program {
        Program(self.start(Command::new("env").args(["-C", folder, R3MAP]).args(arguments)))
    }

    /// Starts the command as a user who may do nothing special.
    pub(crate) fn r3map_as_nobody(&self, arguments: &[&str]) -> Program {
        let copy = self.path("r3map");
        if !copy.exists() {
            // The build's own folder may be closed to others.
            std::fs::copy(R3MAP, &copy).expect("the command can be copied");
        }
        let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"];
        Program(self.start(Command::new("setpriv").args(nobody).arg(copy).args(arguments)))
    }

    /// Starts the command as a process that may have at most so many files open.
    pub(crate) fn r3map_with_files(&self, limit: usize, arguments: &[&str]) -> Program {
        let limit = format!("--nofile={limit}");
        Program(self.start(Command::new("prlimit").args([&limit, R3MAP]).args(arguments).env("TMPDIR", self.path("."))))
    }

    /// Runs the command to its end.
    pub(crate) fn ended(&self, arguments: &[&str]) -> Outcome {
        self.r3map(arguments).end(SOON)
    }

    /// Serves `region` on a free port.
    pub(crate) fn serve(&self, region: &str, arguments: &[&str]) -> Served {
        self.serve_at(region, "grpc://127.0.0.1:0", arguments)
    }

    /// Serves `region` again where a server was killed.
    pub(crate) fn serve_again(&self, region: &str, address: SocketAddr) -> Served {
        self.serve_at(region, &format!("grpc://{address}"), &[])
    }

    /// Serves `region` on a place to listen on.
    pub(crate) fn serve_at(&self, region: &str, listen: &str, arguments: &[&str]) -> Served {
        let mut all = vec!["--json", "serve", region, "--listen", listen];
        all.extend(arguments);
        let mut program = self.r3map(&all);
        let ready = program.wait_for_event(SOON, "ready");
        let uri = ready["uri"].as_str().expect("the ready line has an address").to_owned();
        Served { program, uri }
    }

    /// Mounts `uri` on a file called `name`.
    pub(crate) fn mount(&self, uri: &str, name: &str, arguments: &[&str]) -> Mounted {
        let mut mounted = self.mounting(uri, name, arguments);
        mounted.program.wait_for_event(SOON, "ready");
        mounted
    }

    /// As [`Self::mount`], but does not wait until it is ready.
    pub(crate) fn mounting(&self, uri: &str, name: &str, arguments: &[&str]) -> Mounted {
        let path = self.path(name);
        let mut all = vec!["--json", "mount", uri, path.to_str().expect("temporary folders have plain names")];
        all.extend(arguments);
        let existed = path.symlink_metadata().map_or_else(|error| error.kind() != ErrorKind::NotFound, |_| true);
        Mounted { program: self.r3map(&all), path, existed }
    }
}
