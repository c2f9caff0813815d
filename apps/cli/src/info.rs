//! `r3map info`: what a region is.

use std::fmt::Write;

use anyhow::Result;
use r3map::{Access, ExtentKind, OpenOptions, Registry, size};
use serde_json::json;

use crate::args;
use crate::output::Output;

pub(crate) async fn run(registry: &Registry, args: args::Info, output: Output) -> Result<()> {
    let options =
        OpenOptions { size: args.size, chunk_size: args.chunk_size, read_only: true, ..OpenOptions::default() };
    let backend = registry.open(&args.uri, &options).await?;
    let data = data_bytes(&*backend).await?;
    let able = backend.capabilities();
    let abilities: Vec<&str> = [
        (!able.read_only, "write"),
        (able.trim.is_some(), "trim"),
        (able.write_zeroes.is_some(), "write-zeroes"),
        (able.extents.is_some(), "extents"),
        (able.read_many.is_some(), "read-many"),
    ]
    .into_iter()
    .filter_map(|(can, what)| can.then_some(what))
    .collect();
    let whole = matches!(able.access, Access::WholeChunks(_));
    let chunk = match able.access {
        Access::WholeChunks(chunk) => Some(chunk),
        Access::Any => able.preferred_chunk,
    };

    let mut human = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(human, "{name:<12} {value}");
    };
    line("region", &args.uri.to_string());
    line("size", &format!("{} ({} bytes)", size::format(backend.size()), backend.size()));
    if let Some(data) = data {
        line("data", &format!("{} ({data} bytes)", size::format(data)));
    }
    if let Some(chunk) = chunk {
        line("chunk size", &format!("{chunk}{}", if whole { ", whole chunks only" } else { "" }));
    }
    if let Some(limit) = able.max_request {
        line("request", &format!("up to {}", size::format(limit)));
    }
    line("can", &abilities.join(", "));
    output.event(
        "info",
        human.trim_end(),
        json!({
            "region": args.uri.to_string(),
            "size": backend.size(),
            "data": data,
            "chunk_size": chunk.map(r3map::ChunkSize::bytes),
            "whole_chunks": whole,
            "max_request": able.max_request,
            "read_only": able.read_only,
            "abilities": abilities,
        }),
    );
    Ok(())
}

/// How much of the region holds data, where it knows.
async fn data_bytes(backend: &dyn r3map::Backend) -> Result<Option<u64>> {
    let Some(extents) = backend.capabilities().extents else { return Ok(None) };
    let (mut at, mut data) = (0, 0);
    while at < backend.size() {
        for extent in extents.extents(at, backend.size() - at).await? {
            if extent.kind == ExtentKind::Data {
                data += extent.range.end - extent.range.start;
            }
            at = extent.range.end;
        }
    }
    Ok(Some(data))
}
