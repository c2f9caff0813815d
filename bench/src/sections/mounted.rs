//! A mount as the benchmark uses it: from this thread, which may wait, whatever it is shown as.

use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use r3map::migration::Source;
use r3map::{Backend, Mount, OpenOptions as Open, PathMount, Registry, Settings, SliceMount};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::peer::Shown;

/// Whether there is a local copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    Managed,
    Direct,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Managed => "managed",
            Self::Direct => "direct",
        }
    }
}

/// A mount through the front door, with everything as it comes unless settings say otherwise.
pub(crate) struct Mounted {
    view: View,
    runtime: Runtime,
}

enum View {
    Slice(Box<SliceMount>),
    File { mount: PathMount, file: File, _directory: TempDir },
}

impl Mounted {
    pub(crate) fn open(remote: Arc<dyn Backend>, mode: Mode, shown: Shown, settings: Settings) -> Result<Self> {
        let mount = match mode {
            Mode::Managed => Mount::managed(remote),
            Mode::Direct => Mount::direct(remote),
        };
        Self::show(mount.settings(settings), shown)
    }

    /// Shows a mount that is described.
    pub(crate) fn show(mount: Mount, shown: Shown) -> Result<Self> {
        let runtime = runtime()?;
        let view = match shown {
            Shown::Slice => View::Slice(Box::new(runtime.block_on(mount.slice())?)),
            Shown::File => {
                let directory = TempDir::with_prefix("r3map-bench-")?;
                let mount = runtime.block_on(mount.path(directory.path().join("region")))?;
                let file = OpenOptions::new().read(true).write(true).open(mount.path())?;
                View::File { mount, file, _directory: directory }
            }
        };
        Ok(Self { view, runtime })
    }

    /// The same as a region that can leave.
    pub(crate) fn source(&self) -> Result<Arc<dyn Source>> {
        match &self.view {
            View::Slice(mount) => Ok(mount.source()),
            View::File { mount, .. } => Ok(mount.source()?),
        }
    }

    /// Waits until all of it is local.
    pub(crate) fn pulled(&self) -> Result<()> {
        let region = match &self.view {
            View::Slice(mount) => mount.region(),
            View::File { mount, .. } => mount.region(),
        };
        Ok(self.runtime.block_on(region.pulled())?)
    }

    /// Fills `buffer` from `offset`, as a program would.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match &self.view {
            View::Slice(mount) => {
                let start = usize::try_from(offset)?;
                buffer.copy_from_slice(&mount.as_slice()[start..start + buffer.len()]);
            }
            View::File { file, .. } => file.read_exact_at(buffer, offset)?,
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`, as a program would.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        match &mut self.view {
            View::Slice(mount) => {
                let start = usize::try_from(offset)?;
                mount.as_mut_slice()?[start..start + bytes.len()].copy_from_slice(bytes);
            }
            View::File { file, .. } => file.write_all_at(bytes, offset)?,
        }
        Ok(())
    }

    pub(crate) fn flush(&self) -> Result<()> {
        match &self.view {
            View::Slice(mount) => self.runtime.block_on(mount.flush())?,
            View::File { file, .. } => file.sync_all()?,
        }
        Ok(())
    }

    /// Ends the mount without storing anything more.
    pub(crate) fn abandon(self) {
        match self.view {
            View::Slice(mount) => mount.abandon(),
            View::File { mount, file, _directory } => {
                drop(file);
                self.runtime.block_on(mount.abandon());
            }
        }
    }

    /// Stores everything and ends the mount.
    pub(crate) fn close(self) -> Result<()> {
        match self.view {
            View::Slice(mut mount) => self.runtime.block_on(mount.close())?,
            View::File { mount, file, _directory } => {
                drop(file);
                self.runtime.block_on(mount.close())?;
            }
        }
        Ok(())
    }
}

/// Longer than a run.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// Settings with which nothing is looked for or pushed behind the back of a measurement.
pub(crate) fn alone() -> Settings {
    let mut settings = Settings::default();
    (settings.push.interval, settings.push.collect_interval) = (NEVER, NEVER);
    settings.dirty_budget(NonZeroU64::MAX)
}

/// What waits for mounts; they work on threads of their own.
pub(crate) fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// Connects to a gRPC server, as the command line does.
pub(crate) fn connect(server: SocketAddr) -> Result<Arc<dyn Backend>> {
    open_uri(&format!("grpc://{server}"))
}

/// Opens a region by its name.
pub(crate) fn open_uri(uri: &str) -> Result<Arc<dyn Backend>> {
    Ok(runtime()?.block_on(Registry::standard().open(&uri.parse()?, &Open::default()))?)
}
