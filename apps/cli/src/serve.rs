//! `r3map serve`: lends a region to other hosts until it is told to stop.

use anyhow::Result;
use r3map::{Chunking, ListenOptions, OpenOptions, Registry};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use serde_json::json;

use crate::args;
use crate::output::Output;
use crate::signals::Signals;

pub(crate) async fn run(registry: &Registry, args: args::Serve, output: Output) -> Result<()> {
    let mut signals = Signals::new()?;
    if let Some(parent) = args.end_with {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before.
        if getppid().map(Pid::as_raw_pid) != Some(parent) {
            anyhow::bail!("process {parent}, which this was to end with, has ended");
        }
    }
    let options = OpenOptions {
        size: args.open.size,
        chunk_size: args.open.chunk_size,
        read_only: args.read_only,
        create: args.open.create,
    };
    let backend = tokio::select! {
        backend = registry.open(&args.uri, &options) => backend?,
        () = signals.next() => anyhow::bail!("stopped before anything was served"),
    };
    let listen = ListenOptions {
        read_only: args.read_only,
        chunk_size: args.open.chunk_size,
        identity: registry.identity(&args.uri)?,
        chunking: match args.chunking {
            args::Chunking::Server => Chunking::Server,
            args::Chunking::Client => Chunking::Client,
        },
    };
    let listeners = registry.listen(&args.listen, backend.clone(), &listen).await?;
    let size = backend.size();
    for listener in &listeners {
        let uri = listener.uri();
        let human = format!("ready: {} ({}) at {uri}", args.uri, r3map::size::format(size));
        output.event("ready", &human, json!({ "uri": uri, "region": args.uri.to_string(), "size": size }));
    }
    signals.next().await;
    output.note("stopping", "finishing what is in flight; Ctrl-C again gives up");
    let shutdown = async {
        let mut done = Ok(());
        for listener in listeners {
            done = done.and(listener.shutdown().await);
        }
        // Also when requests had to be given up: what was acknowledged is flushed.
        backend.flush().await.and(done)
    };
    tokio::select! {
        done = shutdown => done?,
        () = signals.next() => anyhow::bail!("gave up before everything in flight was finished and flushed"),
    }
    output.event("stopped", "stopped; everything that was acknowledged is flushed", json!({}));
    Ok(())
}
