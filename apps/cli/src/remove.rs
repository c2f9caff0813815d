//! `r3map remove`: removes a block device that outlived its daemon.

use anyhow::Result;
use serde_json::json;

use crate::args;
use crate::output::Output;

pub(crate) async fn run(args: args::Remove, output: Output) -> Result<()> {
    let device = args.device.clone();
    tokio::task::spawn_blocking(move || r3map::remove_device(device)).await??;
    let device = args.device.display().to_string();
    output.event("removed", &format!("removed: {device}"), json!({ "device": device }));
    Ok(())
}
