//! `r3map info`: what a region is.

use std::fmt::Write;

use anyhow::Result;
use r3map::{Access, Extent, ExtentKind, Look, OpenOptions, Registry, size};
use serde_json::{Value, json};

use crate::args;
use crate::output::Output;

pub(crate) async fn run(registry: &Registry, args: args::Info, output: Output) -> Result<()> {
    let options = OpenOptions { size: args.size, chunk_size: args.chunk_size, ..OpenOptions::default() };
    let Look { backend, writable } = registry.look(&args.uri, &options).await?;
    let extents = extents(&*backend).await?;
    let data = extents.as_deref().map(data_bytes);
    let able = backend.capabilities();
    let abilities: Vec<&str> = [
        (writable, "write"),
        (writable && able.trim.is_some(), "trim"),
        (writable && able.write_zeroes.is_some(), "write-zeroes"),
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
    line("can", &[&["read"], &*abilities].concat().join(", "));
    let map = extents.filter(|_| args.map);
    for extent in map.iter().flatten() {
        line(kind(extent), &format!("{}-{}", extent.range.start, extent.range.end));
    }
    output.answer(
        "info",
        human.trim_end(),
        json!({
            "region": args.uri.to_string(),
            "size": backend.size(),
            "data": data,
            "chunk_size": chunk.map(r3map::ChunkSize::bytes),
            "whole_chunks": whole,
            "max_request": able.max_request,
            "read_only": !writable,
            "abilities": abilities,
            "extents": map.map(|extents| extents.iter().map(json_of).collect::<Vec<_>>()),
        }),
    )
}

/// Which parts of the region hold data, where it knows; neighbours differ.
async fn extents(backend: &dyn r3map::Backend) -> Result<Option<Vec<Extent>>> {
    let Some(ability) = backend.capabilities().extents else { return Ok(None) };
    let (mut at, mut all) = (0, Vec::<Extent>::new());
    while at < backend.size() {
        for extent in ability.extents(at, backend.size() - at).await? {
            at = extent.range.end;
            match all.last_mut().filter(|last| last.kind == extent.kind) {
                Some(last) => last.range.end = at,
                None => all.push(extent),
            }
        }
    }
    Ok(Some(all))
}

/// How much of the region holds data.
fn data_bytes(extents: &[Extent]) -> u64 {
    let data = extents.iter().filter(|extent| extent.kind == ExtentKind::Data);
    data.map(|extent| extent.range.end - extent.range.start).sum()
}

fn kind(extent: &Extent) -> &'static str {
    match extent.kind {
        ExtentKind::Data => "data",
        ExtentKind::Hole => "hole",
    }
}

fn json_of(extent: &Extent) -> Value {
    json!({ "offset": extent.range.start, "length": extent.range.end - extent.range.start, "kind": kind(extent) })
}
