//! What the guest shall do: written by the host into the image, read by the guest.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the plan is in the guest.
pub(crate) const PLACE: &str = "/r3map/plan.json";

/// The variable that tells a test that it runs in the virtual machine. Without it a `vm` test says `skipped: …`, which
/// testkit's `in_vm` does.
pub const VARIABLE: &str = "R3MAP_VM";

/// A test binary of the host: libtest's, or anything that understands `--list --format terse` and `--exact NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binary {
    /// What to call it: the first part of its tests' names.
    pub name: String,
    /// Where it is on the host; it is at the same place in the guest.
    pub path: PathBuf,
    /// The folder that its tests start in, as cargo does it; it exists in the guest, empty.
    pub directory: PathBuf,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Each test of these binaries, one process a test.
    Tests {
        /// The binaries.
        binaries: Vec<Binary>,
        /// Only tests whose full name, `binary::test`, contains this.
        filter: Option<String>,
    },
    /// One program with its arguments, whose output is passed on. Its last test, so to speak.
    Command {
        /// Where it is on the host; it is at the same place in the guest.
        path: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

/// Everything that the guest needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// What to run.
    pub work: Work,
    /// Other programs of the host that tests start, at the same place in the guest, and by name on its `PATH`.
    pub programs: Vec<PathBuf>,
    /// Variables for what runs, besides [`VARIABLE`].
    pub environment: Vec<(String, String)>,
    /// How long one test may take, or the command.
    pub deadline: Duration,
}

/// What the image's maker adds for the guest alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) plan: Plan,
    /// Files of modules in the order to load them, with parameters.
    pub(crate) modules: Vec<(PathBuf, String)>,
}
