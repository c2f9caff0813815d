//! `r3map remove`: removes a block device that outlived its daemon.

use anyhow::Result;
use serde_json::json;

use crate::args;
use crate::output::{Output, cannot};

pub(crate) async fn run(args: args::Remove, output: Output) -> Result<()> {
    let device = args.device.display().to_string();
    let removed = tokio::task::spawn_blocking(move || r3map::remove_device(args.device)).await?;
    removed.map_err(|error| cannot(&format!("remove {device}"), &error))?;
    output.event("removed", &format!("removed: {device}"), json!({ "device": device }));
    Ok(())
}
