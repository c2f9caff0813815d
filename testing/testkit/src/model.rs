//! Random operations against a backend and against a plain `Vec<u8>`, which must agree.
//!
//! A run is a list of batches; the steps of a batch run at once and never overlap where one of them changes bytes. What
//! a step works on is a number modulo what exists, so that every list of steps means something for every region; that
//! is what makes a failing list easy to shrink. A failure prints its seed and the shortest list that was found.

use std::fmt::Write;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use r3map_core::{Backend, Piece, ReadOp, Result};

use crate::conformance::{panic_message, unit_of};
use crate::random::{Random, fresh_seed};
use crate::{deadline, fill};

/// How long one list of batches may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How many shorter lists are tried to explain a failure.
const SHRINKS: usize = 200;
/// The longest transfer of one step in bytes.
const LONGEST: u64 = 256 << 10;

/// How much to try.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the lists come from: `None` takes the environment variable `R3MAP_MODEL_SEED`, or else a fresh one.
    pub seed: Option<u64>,
    /// How many lists.
    pub runs: u32,
    /// How many batches in a list.
    pub batches: usize,
    /// The most steps in a batch.
    pub at_once: u64,
}

impl Default for Settings {
    /// Eight lists of sixty batches of up to four steps: a second or so on a backend in memory.
    fn default() -> Self {
        Self { seed: None, runs: 8, batches: 60, at_once: 4 }
    }
}

/// One operation; `at` and `len` are modulo what the region has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Step {
    action: Action,
    at: u64,
    len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Read,
    ReadPieces,
    ReadMany,
    Write { seed: u64 },
    WriteZeroes,
    Trim,
    Flush,
}

type Batch = Vec<Step>;

/// Runs random lists against regions that `make` opens, each fresh and never written.
///
/// # Panics
/// When a backend and the model disagree, with the seed and the shortest list of steps that shows it.
pub async fn check(make: impl AsyncFn() -> Arc<dyn Backend>, settings: Settings) {
    let seed = settings.seed.or_else(seed_from_environment).unwrap_or_else(fresh_seed);
    for run in 0..settings.runs {
        let seed = seed.wrapping_add(u64::from(run));
        let batches = batches(&settings, &mut Random::new(seed));
        if let Err(wrong) = attempt(&make, &batches).await {
            let (batches, wrong) = shrink(&make, batches, wrong).await;
            panic!("{wrong}\nafter{}\n(replay with R3MAP_MODEL_SEED={seed})", listing(&batches));
        }
    }
}

fn seed_from_environment() -> Option<u64> {
    std::env::var("R3MAP_MODEL_SEED").ok().map(|seed| seed.parse().expect("R3MAP_MODEL_SEED is a number"))
}

fn batches(settings: &Settings, random: &mut Random) -> Vec<Batch> {
    (0..settings.batches).map(|_| (0..=random.below(settings.at_once)).map(|_| step(random)).collect()).collect()
}

fn step(random: &mut Random) -> Step {
    let action = match random.below(20) {
        0..5 => Action::Read,
        5..7 => Action::ReadPieces,
        7..9 => Action::ReadMany,
        9..15 => Action::Write { seed: 1 + random.below(1 << 20) },
        15..17 => Action::WriteZeroes,
        17..19 => Action::Trim,
        _ => Action::Flush,
    };
    // Lengths of every magnitude are as likely, and so are ends at borders.
    let magnitude = random.below(20);
    let len = random.next_u64() >> (63 - magnitude);
    let border = if random.chance(0.3) { 4095 } else { 0 };
    Step { action, at: random.next_u64() & !border, len: if random.chance(0.3) { len & !border } else { len } }
}

fn listing(batches: &[Batch]) -> String {
    let mut text = String::new();
    for batch in batches {
        let _ = write!(text, "\n  at once:");
        batch.iter().for_each(|step| {
            let _ = write!(text, " {step:?}");
        });
    }
    text
}

/// Leaves out whatever can be left out with the failure still there.
async fn shrink(
    make: &impl AsyncFn() -> Arc<dyn Backend>,
    mut batches: Vec<Batch>,
    mut wrong: String,
) -> (Vec<Batch>, String) {
    let mut tries = SHRINKS;
    let mut part = batches.len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < batches.len() && tries > 0 {
            tries -= 1;
            let mut fewer = batches.clone();
            fewer.drain(at..(at + part).min(batches.len()));
            match attempt(make, &fewer).await {
                Err(still) => (batches, wrong) = (fewer, still),
                Ok(()) => at += part,
            }
        }
        part /= 2;
    }
    (batches, wrong)
}

async fn attempt(make: &impl AsyncFn() -> Arc<dyn Backend>, batches: &[Batch]) -> Result<(), String> {
    let run = async {
        let mut model = Model::new(make().await);
        for batch in batches {
            model.run(batch).await?;
        }
        model.compare().await
    };
    let run = AssertUnwindSafe(deadline(LIMIT, "a list of random operations", run)).catch_unwind();
    run.await.unwrap_or_else(|panic| Err(panic_message(&*panic).to_owned()))
}

struct Model {
    backend: Arc<dyn Backend>,
    bytes: Vec<u8>,
}

impl Model {
    fn new(backend: Arc<dyn Backend>) -> Self {
        let bytes = vec![0; index(backend.size())];
        Self { backend, bytes }
    }

    /// Runs the steps of a batch that do not get in one another's way, at once.
    async fn run(&mut self, batch: &[Step]) -> Result<(), String> {
        let mut steps: Vec<(Action, Range<u64>)> = Vec::new();
        for step in batch {
            let range = self.range(step);
            let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
            let meets =
                |(action, other): &(Action, Range<u64>)| overlaps(other) && (changes(*action) || changes(step.action));
            if self.is_able(step.action) && !steps.iter().any(meets) {
                steps.push((step.action, range));
            }
        }
        let calls = steps.iter().map(|(action, range)| self.call(*action, range));
        for result in join_all(calls).await {
            result?;
        }
        steps.iter().for_each(|(action, range)| self.apply(*action, range));
        Ok(())
    }

    fn range(&self, step: &Step) -> Range<u64> {
        let size = self.backend.size();
        let transfers = !matches!(step.action, Action::Trim | Action::WriteZeroes | Action::Flush);
        let unit = if transfers { unit_of(&*self.backend) } else { 1 };
        let max = self.backend.capabilities().max_request.unwrap_or(LONGEST).min(LONGEST).max(unit);
        let start = step.at % size / unit * unit;
        let len = 1 + step.len % max.min(size);
        let end = (start + len).next_multiple_of(unit);
        start..if end - start > max { start + max / unit * unit } else { end }.min(size)
    }

    fn is_able(&self, action: Action) -> bool {
        let capabilities = self.backend.capabilities();
        match action {
            Action::Read | Action::Flush => true,
            Action::Write { .. } => !capabilities.read_only,
            Action::ReadPieces => capabilities.pieces.is_some(),
            Action::ReadMany => capabilities.read_many.is_some(),
            Action::WriteZeroes => capabilities.write_zeroes.is_some() && !capabilities.read_only,
            Action::Trim => capabilities.trim.is_some() && !capabilities.read_only,
        }
    }

    async fn call(&self, action: Action, range: &Range<u64>) -> Result<(), String> {
        let (offset, len) = (range.start, range.end - range.start);
        let capabilities = self.backend.capabilities();
        let failed = |error| format!("{action:?} of {range:?}: {error}");
        match (action, capabilities.trim, capabilities.write_zeroes) {
            (Action::Write { seed }, ..) => {
                self.backend.write_at(offset, &fill::bytes(offset, index(len), seed)).await.map_err(failed)
            }
            (Action::Trim, Some(trim), _) => trim.trim(offset, len).await.map_err(failed),
            (Action::WriteZeroes, _, Some(zeroing)) => zeroing.write_zeroes(offset, len).await.map_err(failed),
            (Action::Flush, ..) => self.backend.flush().await.map_err(failed),
            _ => self.compare_range(action, range, self.read(action, range).await.map_err(failed)?),
        }
    }

    async fn read(&self, action: Action, range: &Range<u64>) -> Result<Vec<u8>> {
        let capabilities = self.backend.capabilities();
        let mut buf = vec![0xa5; index(range.end - range.start)];
        match (action, capabilities.pieces, capabilities.read_many) {
            (Action::ReadPieces, Some(pieces), _) => {
                let mut copy = |at: u64, piece: Piece<'_>| {
                    let target = &mut buf[index(at - range.start)..][..index(piece.len())];
                    match piece {
                        Piece::Data(data) => target.copy_from_slice(data),
                        Piece::Zeroes(_) => target.fill(0),
                    }
                    Ok(())
                };
                pieces.read_pieces(range.start, range.end - range.start, &mut copy).await?;
            }
            (Action::ReadMany, _, Some(many)) => {
                let unit = index(unit_of(&*self.backend));
                let middle = (buf.len() / 2 / unit * unit).max(unit).min(buf.len());
                let (a, b) = buf.split_at_mut(middle);
                let second = range.start + a.len() as u64;
                let mut reads = vec![ReadOp { offset: range.start, buf: a }];
                if !b.is_empty() {
                    reads.insert(0, ReadOp { offset: second, buf: b });
                }
                many.read_many(&mut reads).await?;
            }
            _ => self.backend.read_at(range.start, &mut buf).await?,
        }
        Ok(buf)
    }

    fn compare_range(&self, action: Action, range: &Range<u64>, found: Vec<u8>) -> Result<(), String> {
        let expected = &self.bytes[index(range.start)..index(range.end)];
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(at) => Err(format!(
                "{action:?} of {range:?}: byte {} is {:#04x}, the model has {:#04x}",
                range.start + at as u64,
                found[at],
                expected[at]
            )),
        }
    }

    fn apply(&mut self, action: Action, range: &Range<u64>) {
        let bytes = &mut self.bytes[index(range.start)..index(range.end)];
        match action {
            Action::Write { seed } => fill::write(bytes, range.start, seed),
            Action::WriteZeroes | Action::Trim => bytes.fill(0),
            Action::Read | Action::ReadPieces | Action::ReadMany | Action::Flush => {}
        }
    }

    async fn compare(&self) -> Result<(), String> {
        let step = Step { action: Action::Read, at: 0, len: u64::MAX - 1 };
        let mut at = 0;
        while at < self.backend.size() {
            let len = self.range(&step).end.min(self.backend.size() - at);
            self.call(Action::Read, &(at..at + len)).await?;
            at += len;
        }
        Ok(())
    }
}

fn changes(action: Action) -> bool {
    matches!(action, Action::Write { .. } | Action::WriteZeroes | Action::Trim)
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("a model fits into memory")
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use r3map_core::ChunkSize;

    use super::*;
    use crate::store::Store;

    #[tokio::test]
    async fn a_good_backend_agrees() {
        for size in [1, 4095, 4096, 300_001] {
            check(async || Arc::new(Store::new(size)) as _, Settings::default()).await;
        }
        let chunk = ChunkSize::new(8192).unwrap();
        let make = async || Arc::new(Store::new(300_001).whole_chunks(chunk).max_request(20_000)) as _;
        check(make, Settings::default()).await;
    }

    /// Forgets the last byte of every write across one border.
    struct Forgetful(Store);

    #[async_trait]
    impl Backend for Forgetful {
        fn size(&self) -> u64 {
            self.0.size()
        }

        async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.0.read_at(offset, buf).await
        }

        async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
            let crosses = offset < 65536 && offset + buf.len() as u64 > 65536;
            self.0.write_at(offset, &buf[..buf.len() - usize::from(crosses)]).await
        }

        async fn flush(&self) -> Result<()> {
            self.0.flush().await
        }
    }

    #[tokio::test]
    async fn a_bad_one_is_found_and_explained_in_few_steps() {
        let make = async || Arc::new(Forgetful(Store::new(200_001).plain())) as _;
        let settings = Settings { seed: Some(1), ..Settings::default() };
        let panic = AssertUnwindSafe(check(make, settings)).catch_unwind().await.expect_err("it must be found");
        let message = panic_message(&*panic);
        assert!(message.contains("the model has"), "{message}");
        assert!(message.contains("R3MAP_MODEL_SEED="), "{message}");
        assert!(message.matches("at once").count() <= 3, "{message}");
    }
}
