//! `r3map nbd`: what an NBD server has, and exports as block devices by the kernel's own client.

use std::fmt::Write;

use anyhow::Result;
use r3map::{NbdExport, NbdListed, size};
use serde_json::{Value, json};

use crate::args::{self, NbdCommand};
use crate::output::{Output, cannot};

pub(crate) async fn run(args: args::Nbd, output: Output) -> Result<()> {
    match args.command {
        NbdCommand::List(args) => list(&args, output).await,
        NbdCommand::Attach(args) => attach(args, output).await,
        NbdCommand::Detach(args) => detach(args, output).await,
    }
}

async fn attach(args: args::NbdAttach, output: Output) -> Result<()> {
    let attach = r3map::NbdAttach {
        device: args.device,
        connections: args.connections,
        take_over: args.take_over,
        request_timeout: args.request_timeout,
        dead_connection_timeout: args.wait,
    };
    let attached = r3map::nbd_attach(&args.uri, attach).await;
    let device = attached.map_err(|error| cannot(&format!("attach {}", args.uri), &error))?;
    let device = device.display().to_string();
    output.event("attached", &device, json!({ "device": device, "uri": args.uri.to_string() }));
    Ok(())
}

async fn detach(args: args::NbdDetach, output: Output) -> Result<()> {
    let device = args.device.display().to_string();
    let detached = r3map::nbd_detach(args.device, args.force).await;
    detached.map_err(|error| cannot(&format!("detach {device}"), &error))?;
    if output.is_json() {
        output.event("detached", "", json!({ "device": device }));
    }
    Ok(())
}

async fn list(args: &args::NbdList, output: Output) -> Result<()> {
    let listed = r3map::nbd_list(&args.uri).await?;
    if listed.is_empty() {
        output.note("note", &format!("{} has no exports, or does not tell", args.uri));
    }
    for listed in &listed {
        output.event("export", human(listed).trim_end(), json(listed));
    }
    Ok(())
}

/// The line for humans that comes with the list or with the export.
fn description(listed: &NbdListed) -> Option<&str> {
    let own = listed.export.as_ref().and_then(|export| export.description.as_deref());
    own.or(Some(&listed.description)).filter(|text| !text.is_empty())
}

fn human(listed: &NbdListed) -> String {
    let mut human = format!("export       {:?}\n", listed.name);
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(human, "  {name:<10} {value}");
    };
    if let Some(text) = description(listed) {
        line("about", &text.replace(['\r', '\n'], " "));
    }
    let Some(export) = &listed.export else {
        line("size", "not told");
        return human;
    };
    line("size", &format!("{} ({} bytes)", size::format(export.size), export.size));
    if let Some(blocks) = export.blocks {
        let format = |bytes: u32| size::format(bytes.into());
        let (minimum, preferred, maximum) = (blocks.minimum, blocks.preferred, blocks.maximum);
        let text = format!("of {}, best {}, up to {}", format(minimum), format(preferred), format(maximum));
        line("requests", &text);
    }
    line("can", &export.abilities().join(", "));
    if !export.contexts.is_empty() {
        line("contexts", &export.contexts.join(", "));
    }
    human
}

fn json(listed: &NbdListed) -> Value {
    let export = listed.export.as_ref();
    let blocks = export
        .and_then(|export| export.blocks)
        .map(|blocks| json!({ "minimum": blocks.minimum, "preferred": blocks.preferred, "maximum": blocks.maximum }));
    json!({
        "name": listed.name,
        "description": description(listed),
        "size": export.map(|export| export.size),
        "block_size": blocks,
        "abilities": export.map(NbdExport::abilities),
        "contexts": export.map(|export| &export.contexts),
    })
}
