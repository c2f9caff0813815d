//! What the tests share: a device over a region that counts and fails as it is told, and programs with limits.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use r3map_block::{BlockDevice, BlockSettings, Kind};
use r3map_core::Backend;
use r3map_testkit::process::Process;

/// How long anything may take that takes no time on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// Whether ublk is here; says so if not.
pub(crate) fn has_ublk() -> bool {
    match r3map_block::check(Kind::Ublk) {
        Ok(()) => true,
        Err(error) => {
            r3map_testkit::skip_allowed(&error.to_string());
            false
        }
    }
}

/// A device over `backend`.
pub(crate) async fn device(backend: Arc<dyn Backend>) -> BlockDevice {
    device_with(backend, BlockSettings::default()).await
}

/// A device over `backend`, with these settings.
pub(crate) async fn device_with(backend: Arc<dyn Backend>, settings: BlockSettings) -> BlockDevice {
    r3map_testkit::deadline(SOON, "making a device", BlockDevice::open(Kind::Ublk, backend, settings)).await.unwrap()
}

/// Runs a program to its good end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let mut process = Process::start(Command::new(program).args(arguments));
    let status = process.wait(SOON);
    assert!(
        status.success(),
        "{program} {arguments:?}: {status}\n{}\n{}",
        process.stdout().join("\n"),
        process.stderr().join("\n")
    );
    process.stdout().join("\n")
}

/// Blocking work, as an application does it, off the runtime.
pub(crate) async fn app<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    r3map_testkit::deadline(SOON * 2, "the application", tokio::task::spawn_blocking(work)).await.unwrap()
}
