//! Up to the moment when the regions change hands: copying while the application runs over there, and the handover.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Error, Result, anyhow, bail};
use r3map::migration::{
    Arrived, FinalizeError, Landing, Leecher, Owed, PullPhase, PullProgress, Pulling, Running, Unsettled, Verdict,
};
use r3map::size;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::TICK;
use crate::args::Finalize;
use crate::output::{Bar, Output};
use crate::signals::Signals;

/// How long to wait before a seeder that does not answer is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a seeder may take to hear that nothing comes of it. It goes on recording for nothing if it does not.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

const GAVE_UP: &str = "gave up while the region was changing hands";

/// Why the regions are not here.
pub(super) enum Failed {
    /// They are over there, where the application runs on.
    Stays(Error),
    /// The seeder may have handed over or not.
    Unknown(Error),
}

/// When to move, apart from what copying says: Enter, and SIGUSR1.
pub(super) struct Trigger {
    when: Finalize,
    signal: Signal,
    enter: Option<oneshot::Receiver<()>>,
}

impl Trigger {
    /// From now on SIGUSR1 no longer ends the process.
    pub(super) fn new(when: Finalize) -> Result<Self> {
        let enter = (when == Finalize::Manual && may_read()).then(enter);
        Ok(Self { when, signal: signal(SignalKind::user_defined1())?, enter })
    }

    fn is_manual(&self) -> bool {
        self.when == Finalize::Manual
    }

    /// Returns when somebody presses Enter or sends the signal, and never if nobody does.
    async fn asked(&mut self) {
        let Self { signal, enter, .. } = self;
        let enter = async {
            if let Some(pressed) = enter {
                let pressed = pressed.await;
                *enter = None;
                if pressed.is_ok() {
                    return;
                }
            }
            // A closed standard input is nobody's Enter.
            std::future::pending().await
        };
        tokio::select! {
            _ = signal.recv() => {}
            () = enter => {}
        }
    }
}

/// Whether standard input is ours to read: a process in the background that reads its terminal is stopped.
fn may_read() -> bool {
    let stdin = std::io::stdin();
    !stdin.is_terminal()
        || rustix::termios::tcgetpgrp(&stdin).is_ok_and(|foreground| foreground == rustix::process::getpgrp())
}

/// Reads a line on a thread of its own: reading cannot be given up, and must not keep the process from ending.
fn enter() -> oneshot::Receiver<()> {
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || {
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|read| read > 0) {
            let _ = tell.send(());
        }
    });
    told
}

/// Copies until the regions shall be moved.
pub(super) async fn copy(
    leecher: Leecher<Pulling<Landing>>,
    trigger: &mut Trigger,
    signals: &mut Signals,
    output: Output,
) -> Result<Leecher<Pulling<Landing>>> {
    let size = leecher.progress().borrow().size;
    output.tell("connected", &format!("copying {}", size::format(size)), json!({ "size": size }));
    let bar = output.bar("copying", size);
    let stopped = tokio::select! {
        copied = until_asked(&leecher, trigger, &bar, output) => Some(copied),
        () = signals.next() => None,
    };
    bar.finish();
    match stopped {
        Some(Ok(())) => Ok(leecher),
        Some(Err(error)) => {
            let _ = tokio::time::timeout(ABORT_LIMIT, leecher.abort()).await;
            Err(error.context("the region stays where it is, and the application runs on there"))
        }
        None => {
            let _ = tokio::time::timeout(ABORT_LIMIT, leecher.abort()).await;
            bail!("stopped before the region was asked for; the application runs on over there")
        }
    }
}

async fn until_asked(
    leecher: &Leecher<Pulling<Landing>>,
    trigger: &mut Trigger,
    bar: &Bar,
    output: Output,
) -> Result<()> {
    let (mut told, mut rounds) = (false, 0);
    let mut progress = leecher.progress();
    loop {
        let now = progress.borrow_and_update().clone();
        bar.set(now.present, &changes(&now));
        if now.rounds > rounds {
            rounds = now.rounds;
            let human = format!("{rounds}; {} were written meanwhile", size::format(now.dirty));
            output.step("round", &human, json!({ "round": rounds, "dirty_bytes": now.dirty, "pulled": now.pulled }));
        }
        if now.phase != PullPhase::Pulling && !told {
            told = true;
            let ready = leecher.ready().await?;
            bar.aside(|| tell_copied(&ready, trigger, output));
        }
        if now.phase == PullPhase::Stopped {
            // Copying on until somebody asks has come to an error.
            leecher.ready().await?;
        }
        if told && !trigger.is_manual() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            changed = progress.wait_for(|later| later.phase != now.phase) => drop(changed),
            () = trigger.asked() => return Ok(()),
        }
    }
}

fn tell_copied(ready: &PullProgress, trigger: &Trigger, output: Output) {
    let dirty = size::format(ready.dirty);
    let unconverged = ready.verdict.is_some_and(Verdict::is_unconverged);
    let how = if unconverged { "it is written to as fast as it is copied" } else { "the rest is small" };
    let next = if trigger.is_manual() { "; Enter or SIGUSR1 moves it" } else { "" };
    let human = format!("copied: {how} ({dirty} were written in round {}){next}", ready.rounds);
    let value = json!({
        "rounds": ready.rounds,
        "pulled": ready.pulled,
        "dirty_bytes": ready.dirty,
        "converged": !unconverged,
    });
    output.event("copied", &human, value);
}

fn changes(progress: &PullProgress) -> String {
    match progress.rounds {
        0 => String::new(),
        rounds => format!("(round {rounds}, {} changed in the last)", size::format(progress.dirty)),
    }
}

/// Moves the regions. Where nobody knows what came of the asking, the seeder is asked again until somebody does, or until
/// `until`; whoever says stop has it asked to forget about it.
pub(super) async fn finalize(
    mut leecher: Leecher<Pulling<Landing>>,
    until: Until,
    signals: &mut Signals,
    output: Output,
) -> Result<Leecher<Running<Arrived>>, Failed> {
    output.note("moving", "the application is being stopped over there");
    let mut stop = false;
    loop {
        let FinalizeError { error, then } = match ask(leecher, &mut stop, signals, output).await? {
            Ok(running) => return Ok(running),
            Err(left) => left,
        };
        match then {
            Unsettled::Refused(again) => {
                let _ = tokio::time::timeout(ABORT_LIMIT, again.abort()).await;
                return Err(stays(anyhow!(error)));
            }
            Unsettled::Returned => return Err(stays(anyhow!(error))),
            Unsettled::Owed(owed) => {
                output.note("returning", &format!("the region cannot be used here, and is given back: {error}"));
                give_back(&owed, until, signals).await?;
                return Err(stays(anyhow!(error)));
            }
            Unsettled::Unknown(again) if stop => {
                let aborted = tokio::select! {
                    aborted = again.abort() => aborted,
                    () = until.passed() => return Err(until.failed(&error)),
                    () = signals.next() => return Err(Failed::Unknown(anyhow!(GAVE_UP))),
                };
                if let Err((error, Some(owed))) = aborted {
                    output.note("returning", &format!("the seeder does not answer; asking on: {error}"));
                    give_back(&owed, until, signals).await?;
                }
                return Err(stays(anyhow!("stopped")));
            }
            Unsettled::Unknown(_) if until.is_over() => return Err(until.failed(&error)),
            Unsettled::Unknown(again) => {
                output.note(
                    "waiting",
                    &format!("the seeder does not say whether it has handed over; asking again: {error}"),
                );
                leecher = again;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = signals.next() => stop = true,
        }
    }
}

/// Until when a seeder is asked.
#[derive(Clone, Copy)]
pub(super) struct Until {
    began: Instant,
    end: Option<Instant>,
}

impl Until {
    /// A limit that is longer than time goes is none.
    pub(super) fn new(limit: Option<Duration>) -> Self {
        let began = Instant::now();
        Self { began, end: limit.and_then(|limit| began.checked_add(limit)) }
    }

    fn is_over(self) -> bool {
        self.end.is_some_and(|end| Instant::now() >= end)
    }

    /// Returns when it is over.
    async fn passed(self) {
        match self.end {
            Some(end) => tokio::time::sleep_until(end).await,
            None => std::future::pending().await,
        }
    }

    fn failed(self, error: &r3map::Error) -> Failed {
        let time = self.began.elapsed();
        Failed::Unknown(anyhow!("the seeder has not said for {time:.0?} whether it has handed over: {error}"))
    }
}

fn stays(error: Error) -> Failed {
    Failed::Stays(error.context("the region stays where it is, and the application runs on there"))
}

type Asked = Result<Leecher<Running<Arrived>>, FinalizeError<Landing>>;

/// Asks for the regions. The asking itself cannot be stopped without not knowing what came of it.
async fn ask(
    leecher: Leecher<Pulling<Landing>>,
    stop: &mut bool,
    signals: &mut Signals,
    output: Output,
) -> Result<Asked, Failed> {
    let mut asking = std::pin::pin!(leecher.finalize());
    loop {
        tokio::select! {
            asked = &mut asking => return Ok(asked),
            () = signals.next() => {
                if std::mem::replace(stop, true) {
                    return Err(Failed::Unknown(anyhow!(GAVE_UP)));
                }
                output.note("stopping", "the region is changing hands; waiting for the seeder's answer, Ctrl-C again gives up");
            }
        }
    }
}

/// Gives the regions back, however often the seeder does not answer.
async fn give_back(owed: &Owed, until: Until, signals: &mut Signals) -> Result<(), Failed> {
    loop {
        let given = tokio::select! {
            given = owed.abort() => given,
            () = signals.next() => return Err(Failed::Unknown(anyhow!(GAVE_UP))),
        };
        match given {
            Ok(()) => return Ok(()),
            Err(error) if !error.kind().is_retryable() => return Err(Failed::Unknown(anyhow!(error))),
            Err(error) if until.is_over() => return Err(until.failed(&error)),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
