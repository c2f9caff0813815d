//! `r3map demo migrate`: a program that counts in memory is moved to another process while it counts.
//!
//! The region is a table of counters, and all that the program knows is in it. It counts in one of them after another,
//! and in the first how often it has counted: whoever sees the region at a moment when the program stands still can say
//! whether a count is missing. A proxy between the processes adds the round trip.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration, Place, SeederPhase};
use r3map::{Mount, OpenOptions, Registry, SliceMount, Uri, size};
use r3map_testkit::proxy::DelayProxy;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::oneshot;

use crate::args::DemoMigrate;
use crate::output::Output;

/// How long the other process may take for all of it.
const LIMIT: Duration = Duration::from_secs(300);
/// How long the program counts before it is moved, and after.
const WHILE: Duration = Duration::from_millis(500);
/// Bytes of a counter.
const COUNTER: usize = 8;

pub(super) async fn run(args: DemoMigrate, output: Output) -> Result<()> {
    match &args.arrive {
        Some(uri) => arrive(uri, output).await,
        None => leave(&args, output).await,
    }
}

/// A program that counts on a thread of its own.
struct Counting {
    stop: Arc<AtomicBool>,
    stopped: oneshot::Receiver<(SliceMount, u64)>,
}

impl Counting {
    fn start(mut memory: SliceMount) -> Self {
        let (stop, (tell, stopped)) = (Arc::new(AtomicBool::new(false)), oneshot::channel());
        let asked = stop.clone();
        std::thread::spawn(move || {
            let mut counted = 0;
            while let (false, Ok(bytes)) = (asked.load(Ordering::Relaxed), memory.as_mut_slice()) {
                for _ in 0..1000 {
                    count(bytes);
                }
                counted += 1000;
                std::thread::sleep(Duration::from_micros(500));
            }
            let _ = tell.send((memory, counted));
        });
        Self { stop, stopped }
    }

    /// Stops it; the memory, and how often it has counted here.
    async fn stop(self) -> Result<(SliceMount, u64)> {
        self.stop.store(true, Ordering::Relaxed);
        self.stopped.await.context("the program that counts has failed")
    }
}

/// Counts once: in the counter whose turn it is, and in the first.
fn count(bytes: &mut [u8]) {
    let counters = bytes.len() / COUNTER - 1;
    let total = counter(bytes, 0);
    #[expect(clippy::cast_possible_truncation, reason = "a remainder of the number of counters")]
    let turn = 1 + (total.wrapping_mul(7919) % counters as u64) as usize;
    let count = counter(bytes, turn) + 1;
    set(bytes, turn, count);
    set(bytes, 0, total + 1);
}

fn counter(bytes: &[u8], index: usize) -> u64 {
    let at = index * COUNTER;
    bytes[at..at + COUNTER].try_into().map(u64::from_le_bytes).unwrap_or_default()
}

fn set(bytes: &mut [u8], index: usize, value: u64) {
    bytes[index * COUNTER..][..COUNTER].copy_from_slice(&value.to_le_bytes());
}

/// The number of counts that the first counter knows, and that the others have.
fn totals(bytes: &[u8]) -> (u64, u64) {
    let others = (1..bytes.len() / COUNTER).map(|index| counter(bytes, index)).sum();
    (counter(bytes, 0), others)
}

/// This process has the program, until the other one takes it.
async fn leave(args: &DemoMigrate, output: Output) -> Result<()> {
    let registry = Registry::standard();
    let uri = format!("memory:?size={}", args.size.max(1 << 20)).parse()?;
    let memory = registry.open(&uri, &OpenOptions::default()).await?;
    let mount = Mount::direct(memory).slice().await?;
    let source = mount.source();
    let counting = Arc::new(tokio::sync::Mutex::new(Some(Counting::start(mount))));
    let left = Arc::new(tokio::sync::Mutex::new(None));
    let migration = Migration::new().hooks(suspending(&counting, &left));
    let seeding =
        migration.seed(&registry, &["grpc://127.0.0.1:0".parse()?], vec![("counters".into(), source)]).await?;
    let address = seeding.uris()[0].trim_start_matches("grpc://").parse::<std::net::SocketAddr>()?;
    let proxy = DelayProxy::tcp(address, args.rtt).context("cannot start the delay proxy")?;
    let human = format!(
        "a program counts in {} of memory; another process takes it over, {:?} away",
        size::format(args.size),
        args.rtt
    );
    output.event("counting", &human, json!({ "size": args.size, "rtt_seconds": args.rtt.as_secs_f64() }));
    tokio::time::sleep(WHILE).await;
    let uri = format!("grpc://{}", proxy.socket_addr());
    let told =
        tokio::time::timeout(LIMIT, other_process(&uri, output)).await.context("the other process took too long")??;
    let Some((_memory, counted)) = left.lock().await.take() else { bail!("the program never left") };
    if seeding.seeder().progress().borrow().phase != SeederPhase::Gone {
        bail!("the other process did not say that it has everything");
    }
    prove(counted, &told, output)
}

/// Stops the program when it leaves, and keeps what it had.
fn suspending(
    counting: &Arc<tokio::sync::Mutex<Option<Counting>>>,
    left: &Arc<tokio::sync::Mutex<Option<(SliceMount, u64)>>>,
) -> Hooks {
    let (counting, left) = (counting.clone(), left.clone());
    Hooks::default().on_suspend(move || {
        let (counting, left) = (counting.clone(), left.clone());
        async move {
            if let Some(program) = counting.lock().await.take() {
                let stopped = program.stop().await.map_err(|error| {
                    r3map::Error::new(r3map::ErrorKind::Cancelled, r3map::Operation::Close, error.to_string())
                })?;
                *left.lock().await = Some(stopped);
            }
            Ok(())
        }
    })
}

/// Runs the other process; its last words.
async fn other_process(uri: &str, output: Output) -> Result<Value> {
    let mut other = tokio::process::Command::new(std::env::current_exe()?);
    other.args(["--json", "demo", "migrate", "--arrive", uri]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = other.kill_on_drop(true).spawn().context("cannot start another process")?;
    let stdout = child.stdout.take().context("it has a standard output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut last = None;
    while let Some(line) = lines.next_line().await? {
        let event: Value = serde_json::from_str(&line).with_context(|| format!("the other process said {line:?}"))?;
        match event["event"].as_str() {
            Some("arrived") => last = Some(event),
            Some("error") => bail!("the other process failed: {}", event["message"]),
            Some("moved") => output.note("moved", event["human"].as_str().unwrap_or_default()),
            _ => {}
        }
    }
    child.wait().await?;
    last.context("the other process ended without a word")
}

/// Compares what both sides know.
fn prove(counted: u64, told: &Value, output: Output) -> Result<()> {
    let number = |name: &str| told[name].as_u64().with_context(|| format!("the other process did not say {name}"));
    let (found, sum, after, end, end_sum) =
        (number("found")?, number("found_sum")?, number("counted")?, number("total")?, number("total_sum")?);
    if (found, sum) != (counted, counted) {
        bail!("{counted} counts left, {found} arrived, and the counters have {sum} of them");
    }
    if (end, end_sum) != (counted + after, counted + after) {
        bail!("{} counts were made, and there are {end} and {end_sum}", counted + after);
    }
    let downtime = told["downtime_seconds"].as_f64().unwrap_or_default();
    let human = format!(
        "proved: {counted} counts before the move and {after} after, none is missing; downtime {:.1} ms",
        downtime * 1e3
    );
    let value = json!({ "before": counted, "after": after, "downtime_seconds": downtime, "report": told["report"] });
    output.event("proved", &human, value);
    Ok(())
}

/// The process that the program moves to.
async fn arrive(uri: &Uri, output: Output) -> Result<()> {
    let leecher = Migration::new().leech(&Registry::standard(), uri, vec![Place::slice()]).await?;
    leecher.ready().await?;
    let running = leecher.finalize().await.map_err(|left| anyhow::anyhow!("{left}"))?;
    let memory = running.regions()[0].take_slice().context("the region is memory")?;
    let (memory, found) = looked_at(memory).await?;
    let downtime = running.report().downtime;
    output.event("moved", "", json!({ "human": format!("the program runs over there, downtime {downtime}") }));
    let counting = Counting::start(memory);
    tokio::time::sleep(WHILE).await;
    let report = running.pulled().await?;
    let (memory, counted) = counting.stop().await?;
    let (_memory, total) = looked_at(memory).await?;
    running.confirmed()?;
    output.event(
        "arrived",
        "",
        json!({
            "found": found.0,
            "found_sum": found.1,
            "counted": counted,
            "total": total.0,
            "total_sum": total.1,
            "downtime_seconds": downtime.total().as_secs_f64(),
            "report": {
                "rounds": report.rounds,
                "pulled_before": report.pulled_before,
                "pulled_after": report.pulled_after,
                "dirty_bytes": report.dirty,
                "total_seconds": report.total.as_secs_f64(),
            },
        }),
    );
    Ok(())
}

/// Reads all of the memory, on a thread that may wait for what is missing.
async fn looked_at(memory: SliceMount) -> Result<(SliceMount, (u64, u64))> {
    let looked = tokio::task::spawn_blocking(move || {
        let totals = totals(memory.as_slice());
        (memory, totals)
    });
    looked.await.context("the memory could not be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_count_shows() {
        let mut bytes = vec![0; 8000];
        (0..5000).for_each(|_| count(&mut bytes));
        assert_eq!(totals(&bytes), (5000, 5000));
        let turn = (1..1000).find(|index| counter(&bytes, *index) > 0).unwrap();
        let less = counter(&bytes, turn) - 1;
        set(&mut bytes, turn, less);
        assert_eq!(totals(&bytes), (5000, 4999));
    }
}
