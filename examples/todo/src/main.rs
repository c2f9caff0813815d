//! A to-do list whose whole state is a region of memory, `todo`: see the README beside it.
//!
//! This file is the program: where the region comes from, what is typed, and that it moves. What is in the region is in
//! `list`, how it is given out in `arena`.

mod arena;
mod list;

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use r3map::migration::{Arrived, Hooks, Leecher, Migration, Place, Running, Seeding};
use r3map::{CopySettings, Mount, OpenOptions, Registry, SliceMount, Uri};
use tokio::sync::{Mutex, mpsc};

use crate::list::List;

/// A to-do list that lives in mapped memory, and moves between hosts while it is used.
///
/// It reads what to do from standard input, a line each: add TEXT, done NUMBER, remove NUMBER, list, save URI, quit.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    from: From,
    /// Let the list be taken from here, for instance grpc://0.0.0.0:1338.
    #[arg(long, global = true)]
    listen: Option<Uri>,
}

#[derive(Debug, clap::Subcommand)]
enum From {
    /// Mount a region that has a list, or zeros.
    Open {
        /// For instance grpc://host:1337, where `r3map serve` has it.
        region: Uri,
    },
    /// Take the list from another `todo`, which runs on until it is here.
    Take {
        /// Where that one listens.
        from: Uri,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    complain(error);
    ExitCode::FAILURE
}

fn say(text: &str) {
    // Who does not listen any more does not want to hear it.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn complain(error: &anyhow::Error) {
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
}

/// Where the region is.
enum Desk {
    /// In this memory.
    Here(SliceMount),
    /// About to leave, so that it must not be touched any more. It is kept: the other side still reads it.
    Leaving(SliceMount),
    /// Not here yet.
    Nowhere,
    /// Not here any more.
    Gone,
}

type Shared = Arc<Mutex<Desk>>;

/// What a migration away from here does to the program: nothing is written from the moment on when it is suspended.
fn hooks(desk: &Shared) -> Hooks {
    let (leaving, staying) = (desk.clone(), desk.clone());
    let suspend = move || {
        let desk = leaving.clone();
        async move {
            let mut desk = desk.lock().await;
            *desk = match std::mem::replace(&mut *desk, Desk::Nowhere) {
                Desk::Here(mount) => Desk::Leaving(mount),
                other => other,
            };
            Ok(())
        }
    };
    let resume = move || {
        let desk = staying.clone();
        async move {
            let mut desk = desk.lock().await;
            *desk = match std::mem::replace(&mut *desk, Desk::Nowhere) {
                Desk::Leaving(mount) => Desk::Here(mount),
                other => other,
            };
            Ok(())
        }
    };
    Hooks::default().on_suspend(suspend).on_resume(resume)
}

async fn run(arguments: Arguments) -> Result<()> {
    let (registry, desk) = (Registry::standard(), Shared::new(Mutex::new(Desk::Nowhere)));
    let listen = arguments.listen;
    // Whoever takes the list next, once it can be taken from here.
    let (offer, mut offered) = mpsc::channel(1);
    match arguments.from {
        From::Open { region } => {
            let remote = registry.open(&region, &OpenOptions::default()).await?;
            let mount = Mount::managed(remote).slice().await?;
            let source = mount.source();
            *desk.lock().await = Desk::Here(mount);
            if let Some(uri) = listen {
                let regions = vec![("todo".to_owned(), source)];
                offer.send(Migration::new().hooks(hooks(&desk)).seed(&registry, &[uri], regions).await?).await?;
            }
        }
        From::Take { from } => {
            let running = take(&registry, &from, &desk).await?;
            let (registry, desk) = (registry.clone(), desk.clone());
            // The list can be used; the rest of it comes meanwhile.
            tokio::spawn(async move {
                match settle(&registry, running, listen, &desk).await {
                    Ok(Some(seeding)) => drop(offer.send(seeding).await),
                    Ok(None) => {}
                    Err(error) => complain(&error.context("the rest of the list")),
                }
            });
        }
    }
    say("ready");
    serve(&registry, &desk, &mut offered).await
}

/// Takes the list from another host.
async fn take(registry: &Registry, from: &Uri, desk: &Shared) -> Result<Leecher<Running<Arrived>>> {
    let leecher = Migration::new().leech(registry, from, vec![Place::slice()]).await?;
    leecher.ready().await?;
    let running = leecher.finalize().await.map_err(|left| anyhow::anyhow!("{left}"))?;
    let mount = running.regions()[0].take_slice().context("what came is not memory")?;
    *desk.lock().await = Desk::Here(mount);
    say(&format!("moved here; nobody had the list for {}", running.report().downtime));
    Ok(running)
}

/// Waits for the rest of the list, and offers it to the next host.
async fn settle(
    registry: &Registry,
    running: Leecher<Running<Arrived>>,
    listen: Option<Uri>,
    desk: &Shared,
) -> Result<Option<Seeding>> {
    running.pulled().await?;
    running.confirmed()?;
    let Some(uri) = listen else { return Ok(None) };
    let migration = Migration::new().hooks(hooks(desk));
    let (_regions, seeding) = migration.release(registry, &[uri], running).await?;
    Ok(Some(seeding))
}

/// Does what is typed, until the end of it.
async fn serve(registry: &Registry, desk: &Shared, offered: &mut mpsc::Receiver<Seeding>) -> Result<()> {
    let mut lines = read_lines();
    let mut seeding: Option<Seeding> = None;
    loop {
        tokio::select! {
            line = lines.recv() => match line.as_deref().map(str::trim) {
                None | Some("quit") => return end(desk).await,
                Some(line) => match obey(registry, desk, line).await {
                    Ok(answers) => answers.iter().for_each(|answer| say(answer)),
                    Err(error) => complain(&error),
                },
            },
            Some(next) = offered.recv(), if seeding.is_none() => {
                say(&format!("to be taken from {}", next.uris().join(" ")));
                seeding = Some(next);
            }
            () = gone(seeding.as_ref()) => {
                // The memory goes before what offers it.
                *desk.lock().await = Desk::Gone;
                if let Some(seeding) = seeding.take() {
                    // The other side waits for the answer.
                    seeding.close().await.unwrap_or_else(|error| complain(&error.into()));
                }
                say("moved away");
            }
        }
    }
}

/// Waits until somebody else has everything.
async fn gone(seeding: Option<&Seeding>) {
    match seeding {
        Some(seeding) => {
            seeding.seeder().gone().await;
        }
        None => std::future::pending().await,
    }
}

/// What is typed, line by line, read on a thread that nobody waits for.
fn read_lines() -> mpsc::Receiver<String> {
    let (send, lines) = mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if send.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Does one thing. Touching the memory waits for what is not here, on this thread; whatever fetches it works on others.
async fn obey(registry: &Registry, desk: &Shared, line: &str) -> Result<Vec<String>> {
    let mut desk = desk.lock().await;
    let Desk::Here(mount) = &mut *desk else { bail!("the list is on another host, or on its way there: ask there") };
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let number = || rest.parse().with_context(|| format!("{rest:?} is not a number"));
    if word == "save" {
        let uri: Uri = rest.parse()?;
        let from = mount.region().backend();
        let options = OpenOptions { size: Some(from.size()), create: true, ..OpenOptions::default() };
        r3map::copy(from, registry.open(&uri, &options).await?, CopySettings::default(), |_| {}).await?;
        return Ok(vec![format!("saved to {uri}")]);
    }
    let mut list = List::open(mount.as_mut_slice()?)?;
    match word {
        "add" => Ok(vec![format!("added {}", list.add(rest)?)]),
        "done" => list.done(number()?).map(|()| vec![format!("done {rest}")]),
        "remove" => list.remove(number()?).map(|()| vec![format!("removed {rest}")]),
        "list" => list.lines(),
        _ => bail!("{word:?} is unknown: add TEXT, done NUMBER, remove NUMBER, list, save URI, quit"),
    }
}

/// Stores the list where it was mounted from. One that was taken is only here: it goes, unless it was saved.
async fn end(desk: &Shared) -> Result<()> {
    match &mut *desk.lock().await {
        Desk::Here(mount) => Ok(mount.close().await?),
        Desk::Leaving(_) => bail!("the list is moving to another host, which does not have all of it"),
        Desk::Nowhere | Desk::Gone => Ok(()),
    }
}
