//! `r3map copy`: one region onto another.

use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::{Error, Result, anyhow, bail};
use r3map::{Backend, CopySettings, ErrorKind, OpenOptions, Operation, Registry, RetrySettings, size};
use serde_json::json;

use crate::args;
use crate::output::Output;
use crate::signals::Signals;

pub(crate) async fn run(registry: &Registry, args: args::Copy, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    let (source, destination) = tokio::select! {
        sides = open(registry, &args) => sides?,
        () = signals.next() => bail!("stopped before anything was copied"),
    };
    let settings = CopySettings {
        skip_same: args.skip_same,
        in_flight: NonZeroUsize::try_from(args.in_flight)?,
        retry: RetrySettings { limit: args.retry.limit(), ..RetrySettings::default() },
    };
    let bar = output.bar("copying", source.size());
    let copied = tokio::select! {
        copied = r3map::copy(source, destination, settings, |progress| bar.set(progress.done, "")) => copied,
        () = signals.next() => bail!("stopped before the end; run it again with --skip-same to go on"),
    };
    bar.finish();
    let copied = copied.map_err(|error| match how_to_go_on(&error) {
        Some(how) => anyhow!("{:#}; {how}", Error::from(error)),
        None => error.into(),
    })?;
    let human = format!(
        "copied {}: {} written, {} already the same, {} zeros not sent",
        size::format(copied.size),
        size::format(copied.written),
        size::format(copied.same),
        size::format(copied.zeroes)
    );
    let value = json!({ "size": copied.size, "written": copied.written, "same": copied.same, "zeroes": copied.zeroes });
    output.event("copied", &human, value);
    Ok(())
}

/// Opens the source and, as large as that is, the destination.
async fn open(registry: &Registry, args: &args::Copy) -> Result<(Arc<dyn Backend>, Arc<dyn Backend>)> {
    let options = OpenOptions { size: args.size, chunk_size: None, read_only: true, create: false };
    let source = registry.open(&args.source, &options).await?;
    let options =
        OpenOptions { size: Some(source.size()), chunk_size: args.chunk_size, read_only: false, create: true };
    let destination = registry.open(&args.destination, &options).await?;
    Ok((source, destination))
}

fn how_to_go_on(error: &r3map::Error) -> Option<&'static str> {
    match (error.kind(), error.operation()) {
        // It would be as wrong again.
        (ErrorKind::InvalidInput | ErrorKind::Denied, _) => None,
        (ErrorKind::Unavailable, _) => Some("run it again with --skip-same to go on"),
        // What is not durable can be read all the same, until it is gone.
        (_, Operation::Flush) => Some("what was written may be lost: run it again, without --skip-same"),
        (ErrorKind::Exhausted, _) => Some("make room, and run it again with --skip-same to go on"),
        _ => Some("run it again with --skip-same to go on"),
    }
}
