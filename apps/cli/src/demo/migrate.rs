//! `r3map demo migrate`: a program that counts in memory is moved to another process while it counts.
//!
//! The region is a table of counters, and all that the program knows is in it. It counts in one of them after another,
//! and in the first how often it has counted; when it did so last is in the second. So whoever sees the region while the
//! program stands still can say whether a count is missing, and the program itself sees for how long it stood still. A
//! proxy between the processes adds the round trip.

use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use r3map::migration::{Hooks, Migration, Place, SeederPhase};
use r3map::{Mount, OpenOptions, Registry, SliceMount, Uri, size};
use r3map_testkit::proxy::DelayProxy;
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::oneshot;

use crate::args::DemoMigrate;
use crate::output::Output;

/// How long the other process may take for all of it.
const LIMIT: Duration = Duration::from_secs(300);
/// How long the program counts before it is moved, and at least after.
const WHILE: Duration = Duration::from_millis(500);
/// Bytes of a counter.
const COUNTER: usize = 8;
/// The counter of all counts.
const TOTAL: usize = 0;
/// The time of the last one, in nanoseconds.
const LAST: usize = 1;
/// The first of the others.
const OTHERS: usize = 2;
/// How many counters are in use most of the time: so many that what is written meanwhile is worth several rounds, and so
/// few that these become shorter.
const HOT: usize = 1 << 15;
/// Counts in a row; all but one are in the counters that are hot.
const ROW: u64 = 1000;

pub(super) async fn run(args: DemoMigrate, output: Output) -> Result<()> {
    match &args.arrive {
        Some(uri) => arrive(uri, output).await,
        None => leave(&args, output).await,
    }
}

/// A program that counts on a thread of its own.
struct Counting {
    stop: Arc<AtomicBool>,
    stopped: oneshot::Receiver<Counted>,
}

/// What it leaves when it stops.
struct Counted {
    memory: SliceMount,
    /// How often it has counted here.
    here: u64,
    /// How long it had not counted when it began here, as it sees it.
    pause: Duration,
}

impl Counting {
    fn start(mut memory: SliceMount) -> Self {
        let (stop, (tell, stopped)) = (Arc::new(AtomicBool::new(false)), oneshot::channel());
        let asked = stop.clone();
        std::thread::spawn(move || {
            let (mut here, mut pause) = (0, Duration::ZERO);
            while let (false, Ok(bytes)) = (asked.load(Ordering::SeqCst), memory.as_mut_slice()) {
                for number in 0..ROW {
                    count(bytes, number == 0);
                }
                let (before, time) = (counter(bytes, LAST), now());
                if here == 0 {
                    pause = time.saturating_sub(Duration::from_nanos(before));
                }
                set(bytes, LAST, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
                here += ROW;
                std::thread::sleep(Duration::from_micros(500));
            }
            let _ = tell.send(Counted { memory, here, pause });
        });
        Self { stop, stopped }
    }

    async fn stop(self) -> Result<Counted> {
        self.stop.store(true, Ordering::SeqCst);
        self.stopped.await.context("the program that counts has failed")
    }
}

/// A time that is the same in every process of this machine.
fn now() -> Duration {
    clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default()
}

/// Counts once: in the counter whose turn it is, and in that of all counts.
fn count(bytes: &mut [u8], anywhere: bool) {
    let total = counter(bytes, TOTAL);
    let others = bytes.len() / COUNTER - OTHERS;
    let among = if anywhere { others } else { others.min(HOT) };
    let turn = OTHERS + usize::try_from(total.wrapping_mul(7919) % among as u64).unwrap_or_default();
    set(bytes, turn, counter(bytes, turn).wrapping_add(1));
    set(bytes, TOTAL, total + 1);
}

fn counter(bytes: &[u8], index: usize) -> u64 {
    let at = index * COUNTER;
    bytes[at..at + COUNTER].try_into().map(u64::from_le_bytes).unwrap_or_default()
}

fn set(bytes: &mut [u8], index: usize, value: u64) {
    bytes[index * COUNTER..][..COUNTER].copy_from_slice(&value.to_le_bytes());
}

/// Where a counter begins: each somewhere else, so that all of the memory holds something, and one that lands in the
/// place of another shows.
fn first(index: usize) -> u64 {
    (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(bytes: &mut [u8]) {
    (OTHERS..bytes.len() / COUNTER).for_each(|index| set(bytes, index, first(index)));
}

/// The number of counts that the first counter knows, and that the others have.
fn totals(bytes: &[u8]) -> (u64, u64) {
    let others = (OTHERS..bytes.len() / COUNTER).map(|index| counter(bytes, index).wrapping_sub(first(index)));
    (counter(bytes, TOTAL), others.fold(0, u64::wrapping_add))
}

/// This process has the program, until the other one takes it.
async fn leave(args: &DemoMigrate, output: Output) -> Result<()> {
    const LEAST: u64 = 1 << 20;
    if args.size < LEAST {
        bail!("the program needs at least {}", size::format(LEAST));
    }
    let registry = Registry::standard();
    let memory = registry.open(&format!("memory:?size={}", args.size).parse()?, &OpenOptions::default()).await?;
    let mut mount = Mount::direct(memory).slice().await?;
    let source = mount.source();
    let filled = tokio::task::spawn_blocking(move || mount.as_mut_slice().map(fill).map(|()| mount));
    let program = Program::default();
    program.start(filled.await??);
    let here = "grpc://127.0.0.1:0".parse()?;
    let regions = vec![("counters".into(), source)];
    let seeding = Migration::new().hooks(program.hooks()).seed(&registry, &[here], regions).await?;
    let address = seeding.uris()[0].trim_start_matches("grpc://").parse::<std::net::SocketAddr>()?;
    let proxy = DelayProxy::tcp(address, args.rtt).context("cannot start the delay proxy")?;
    let human = format!(
        "a program counts in {} of memory; another process takes it over, {:?} away",
        size::format(args.size),
        args.rtt
    );
    output.event("counting", &human, json!({ "size": args.size, "rtt_seconds": args.rtt.as_secs_f64() }));
    tokio::time::sleep(WHILE).await;
    let other = other_process(format!("grpc://{}", proxy.socket_addr()), output);
    let told = tokio::time::timeout(LIMIT, other).await.context("the other process took too long")??;
    let left = program.left().context("the program never left")?;
    if seeding.seeder().progress().borrow().phase != SeederPhase::Gone {
        bail!("the other process did not say that it has everything");
    }
    prove(left.here, &told, output)
}

/// Where the program is.
#[derive(Clone, Default)]
struct Program {
    counting: Arc<Mutex<Option<Counting>>>,
    left: Arc<Mutex<Option<Counted>>>,
}

impl Program {
    fn start(&self, memory: SliceMount) {
        *lock(&self.counting) = Some(Counting::start(memory));
    }

    fn left(&self) -> Option<Counted> {
        lock(&self.left).take()
    }

    /// Stops it when it leaves, and keeps what it had: its memory is read until the other process has everything.
    fn hooks(&self) -> Hooks {
        let program = self.clone();
        Hooks::default().on_suspend(move || {
            let program = program.clone();
            async move {
                let counting = lock(&program.counting).take();
                if let Some(counting) = counting {
                    let failed = |error: anyhow::Error| {
                        r3map::Error::new(r3map::ErrorKind::Cancelled, r3map::Operation::Close, error.to_string())
                    };
                    *lock(&program.left) = Some(counting.stop().await.map_err(failed)?);
                }
                Ok(())
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the other process; its last words.
async fn other_process(uri: String, output: Output) -> Result<Value> {
    let mut other = tokio::process::Command::new(std::env::current_exe()?);
    other.args(["--json", "demo", "migrate", "--arrive", &uri]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = other.kill_on_drop(true).spawn().context("cannot start another process")?;
    let mut lines = BufReader::new(child.stdout.take().context("it has a standard output")?).lines();
    let mut last = None;
    while let Some(line) = lines.next_line().await? {
        let event: Value = serde_json::from_str(&line).with_context(|| format!("the other process said {line:?}"))?;
        match event["event"].as_str() {
            Some("error") => bail!("the other process failed: {}", event["message"].as_str().unwrap_or_default()),
            Some("moved") => tell_moved(event, output),
            Some("arrived") => last = Some(event),
            _ => {}
        }
    }
    child.wait().await?;
    last.context("the other process ended without a word")
}

fn tell_moved(mut event: Value, output: Output) {
    let human = event["human"].take();
    if let Some(fields) = event.as_object_mut() {
        fields.remove("human");
    }
    output.event("moved", human.as_str().unwrap_or_default(), event);
}

/// Compares what both sides know.
fn prove(before: u64, told: &Value, output: Output) -> Result<()> {
    let number = |name: &str| told[name].as_u64().with_context(|| format!("the other process did not say {name}"));
    let (after, total, others) = (number("counted")?, number("total")?, number("others")?);
    if (total, others) != (before + after, before + after) {
        bail!("{before} counts before and {after} after, but {total} in the counter of all and {others} in the others");
    }
    let pause = told["pause_seconds"].as_f64().unwrap_or_default();
    let human = format!(
        "proved: {before} counts before the move and {after} after it, and none of them is missing; the program stood still \
         for {:.1} ms",
        pause * 1e3
    );
    let value = json!({ "before": before, "after": after, "pause_seconds": pause });
    output.event("proved", &human, value);
    Ok(())
}

/// The process that the program moves to.
async fn arrive(uri: &Uri, output: Output) -> Result<()> {
    // Alone it would wait for the other process for ever.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let leecher = Migration::new().leech(&Registry::standard(), uri, vec![Place::slice()]).await?;
    leecher.ready().await?;
    let running = leecher.finalize().await.map_err(|left| anyhow::anyhow!("{left}"))?;
    let memory = running.regions()[0].take_slice().context("the region is memory")?;
    let counting = Counting::start(memory);
    let report = running.report();
    let human = format!(
        "it runs over there after {} were copied; downtime {}",
        size::format(report.pulled_before),
        report.downtime
    );
    output.event(
        "moved",
        "",
        json!({
            "human": human,
            "rounds": report.rounds,
            "pulled_before": report.pulled_before,
            "dirty_bytes": report.dirty,
            "downtime_seconds": report.downtime.total().as_secs_f64(),
        }),
    );
    tokio::time::sleep(WHILE).await;
    running.pulled().await?;
    running.confirmed()?;
    let Counted { memory, here, pause } = counting.stop().await?;
    let (memory, (total, others)) = looked_at(memory).await?;
    let value = json!({ "counted": here, "total": total, "others": others, "pause_seconds": pause.as_secs_f64() });
    output.event("arrived", "", value);
    drop(memory);
    Ok(())
}

/// Reads all of the memory, on a thread that may wait.
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
        fill(&mut bytes);
        (0..5000).for_each(|number| count(&mut bytes, number % 10 == 0));
        assert_eq!(totals(&bytes), (5000, 5000));
        let turn = (OTHERS..1000).find(|index| counter(&bytes, *index) != first(*index)).unwrap();
        let less = counter(&bytes, turn).wrapping_sub(1);
        set(&mut bytes, turn, less);
        assert_eq!(totals(&bytes), (5000, 4999));
    }
}
