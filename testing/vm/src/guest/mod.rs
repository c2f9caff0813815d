//! The first process of the virtual machine: boots it, carries out the plan, tells the host, powers off.

mod boot;
mod child;
mod port;
mod stuck;
mod tests;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result};
use rustix::system::{RebootCommand, reboot};

use crate::plan::{Orders, PLACE, Work};
use crate::protocol::Message;
use port::Port;

/// Runs as the first process; powers the machine off at the end. As any other process it only says that it is none.
pub fn main() -> ExitCode {
    if std::process::id() != 1 {
        let _ =
            writeln!(std::io::stderr(), "error: this is the first process of a virtual machine; see cargo xtask vm");
        return ExitCode::FAILURE;
    }
    if let Err(error) = run() {
        // The port may be what failed. The console's tail is shown then.
        let _ = writeln!(std::io::stderr(), "r3map-vm-guest: {error:#}");
    }
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    boot::mount_all()?;
    let port = Port::open()?;
    let outcome = carry_out(&port);
    if let Err(error) = &outcome {
        port.send(&Message::Broken { reason: format!("{error:#}") });
    }
    port.send(&Message::Finished);
    port.drain();
    outcome
}

fn carry_out(port: &Port) -> Result<()> {
    port.send(&Message::Ready { kernel: rustix::system::uname().release().to_string_lossy().into_owned() });
    let text = std::fs::read(PLACE).context("there is no plan")?;
    let orders: Orders = serde_json::from_slice(&text).context("the plan cannot be read")?;
    boot::load(&orders.modules)?;
    boot::loopback()?;
    let runner = tests::Runner::new(port, &orders.plan);
    match &orders.plan.work {
        Work::Tests { binaries, filter } => {
            for binary in binaries {
                runner.binary(binary, filter.as_deref());
            }
        }
        Work::Command { path, arguments } => runner.command(path, arguments),
    }
    Ok(())
}
