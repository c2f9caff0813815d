//! A WebAssembly program whose memory is a region, `wasm`: see the README beside it.
//!
//! This file is the commands: where the region comes from, and that the work stops here and goes on there. The program's
//! instance is in `machine`, its memory in `memory`.

mod machine;
mod memory;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use r3map::migration::{Hooks, Migration, Place};
use r3map::{Mount, OpenOptions, Registry, Uri};
use tokio::sync::{Mutex, watch};

use crate::machine::{Machine, Program, SIZE};

/// Counts primes with a WebAssembly program, which can be moved to another process in the middle of it.
#[derive(Debug, Parser)]
enum Arguments {
    /// Begin, and let another process take the work over; without --listen do all of it here.
    Run {
        /// Where it can be taken from, for instance grpc://0.0.0.0:1337.
        #[arg(long)]
        listen: Option<Uri>,
        /// Rest so long after every few milliseconds of work.
        #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
        rest: Duration,
    },
    /// Take the work over from another process, and finish it.
    Take {
        /// Where that one listens.
        from: Uri,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    let done = runtime.block_on(async {
        match arguments {
            Arguments::Run { listen, rest } => run(listen, rest).await,
            Arguments::Take { from } => take(&from).await,
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}

fn say(text: &str) {
    // Who does not listen any more does not want to hear it.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Begins, and works until it is finished or taken away.
async fn run(listen: Option<Uri>, rest: Duration) -> Result<()> {
    let registry = Registry::standard();
    let zeros = registry.open(&format!("null:?size={SIZE}").parse()?, &OpenOptions::default()).await?;
    // Direct: what is written stays in memory, and is pushed to nobody.
    let mount = Mount::direct(zeros).slice().await?;
    let source = mount.source();
    let mut machine = Program::new()?.start(mount)?;
    // Whoever takes it over takes something that has begun.
    machine.step()?;
    let machine = Arc::new(Mutex::new(machine));
    let (may, working) = watch::channel(true);
    let Some(uri) = listen else { return work(machine, working, rest).await };
    let regions = vec![("primes".to_owned(), source)];
    let seeding = Migration::new().hooks(hooks(&machine, may)).seed(&registry, &[uri], regions).await?;
    say(&format!("to be taken from {}", seeding.uris().join(" ")));
    tokio::select! {
        done = work(machine.clone(), working, rest) => return done,
        _ = seeding.seeder().gone() => {}
    }
    let done = machine.lock().await.work()?;
    say(&format!("moved away after {done} pieces of work"));
    // The other side waits for the answer; whoever else asks has gone.
    let _ = seeding.close().await;
    Ok(())
}

/// What being moved does to the work: it stops between two calls of the program, and goes on if nothing comes of the move.
fn hooks(machine: &Arc<Mutex<Machine>>, may: watch::Sender<bool>) -> Hooks {
    let (machine, may) = (machine.clone(), Arc::new(may));
    let again = may.clone();
    let suspend = move || {
        may.send_replace(false);
        let machine = machine.clone();
        async move {
            // Whoever has it is in a call, and sees that it may not make another.
            drop(machine.lock().await);
            Ok(())
        }
    };
    let resume = move || {
        again.send_replace(true);
        async { Ok(()) }
    };
    Hooks::default().on_suspend(suspend).on_resume(resume)
}

/// Takes the work over, and finishes it.
async fn take(from: &Uri) -> Result<()> {
    let leecher = Migration::new().leech(&Registry::standard(), from, vec![Place::slice()]).await?;
    machine::check(leecher.ready().await?.size)?;
    let program = Program::new()?;
    let running = leecher.finalize().await.map_err(|left| anyhow::anyhow!("{left}"))?;
    let mount = running.regions()[0].take_slice().context("what came is not memory")?;
    let mut machine = program.start(mount)?;
    say(&format!(
        "moved here after {} pieces of work; nobody did any for {}",
        machine.work()?,
        running.report().downtime
    ));
    // The work goes on at once. What is missing comes when it is touched, and by itself.
    let (_may, working) = watch::channel(true);
    work(Arc::new(Mutex::new(machine)), working, Duration::ZERO).await?;
    running.pulled().await?;
    Ok(running.confirmed()?)
}

/// Works while it may, until the result is there.
async fn work(machine: Arc<Mutex<Machine>>, mut working: watch::Receiver<bool>, rest: Duration) -> Result<()> {
    let found = loop {
        working.wait_for(|may| *may).await.context("the work was given up")?;
        let (machine, working) = (machine.clone(), working.clone());
        // On a thread that may wait for pages, and is not one of those that fetch them.
        let stepping = tokio::task::spawn_blocking(move || {
            let mut machine = machine.blocking_lock();
            if *working.borrow() { machine.step() } else { Ok(None) }
        });
        if let Some(count) = stepping.await.context("the program has failed")?? {
            break count;
        }
        tokio::time::sleep(rest).await;
    };
    let done = machine.lock().await.work()?;
    say(&format!("{found} primes up to ten million, after {done} pieces of work"));
    Ok(())
}
