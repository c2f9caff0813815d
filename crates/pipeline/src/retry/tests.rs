use futures_util::future::join_all;
use r3map_core::ChunkSize;
use r3map_testkit::faults::{Faults, Pause, Rule};
use r3map_testkit::store::Store;
use r3map_testkit::{conformance, fill, model};

use super::*;

const SIZE: u64 = 100_001;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Backs off for 1, 2, 4, 4, 4 ... seconds; an attempt has ten.
fn settings(limit: Option<u64>) -> RetrySettings {
    let backoff = Backoff { initial: secs(1), max: secs(4), multiplier: 2.0 };
    RetrySettings { limit: limit.map(secs), attempt_timeout: secs(10), backoff }
}

fn retry(limit: Option<u64>) -> (Arc<Faults>, Arc<Retry>) {
    let faults = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
    (faults.clone(), Arc::new(Retry::new(faults, settings(limit)).unwrap()))
}

async fn read(backend: &dyn Backend, len: usize) -> Result<()> {
    let mut buf = vec![0; len];
    backend.read_at(0, &mut buf).await?;
    fill::check(&buf, 0, 1).map_err(|wrong| Error::new(ErrorKind::Internal, Operation::Read, wrong))
}

#[tokio::test]
async fn conforms() {
    let make =
        |store: Store| -> Arc<dyn Backend> { Arc::new(Retry::new(Arc::new(store), RetrySettings::default()).unwrap()) };
    let chunk = ChunkSize::new(8192).unwrap();
    conformance::backend(async || make(Store::new(SIZE))).await;
    conformance::backend(async || make(Store::new(SIZE).whole_chunks(chunk).max_request(20_000))).await;
    conformance::filled(async || make(Store::new(SIZE).plain().filled(2).read_only()), 2).await;
}

#[tokio::test(start_paused = true)]
async fn agrees_with_the_model_while_everything_fails_now_and_then() {
    let chunk = ChunkSize::new(8192).unwrap();
    for whole in [false, true] {
        let make = async || {
            let store = if whole { Store::new(SIZE).whole_chunks(chunk) } else { Store::new(SIZE) };
            let faults = Faults::new(Arc::new(store));
            faults.add(Rule::any().chance(0.2, 7).fail(ErrorKind::Unavailable));
            faults.add(Rule::any().chance(0.2, 8).fail_after(ErrorKind::Unavailable));
            faults.add(Rule::any().chance(0.05, 9).hang());
            faults.add(Rule::any().chance(0.05, 10).hang_after());
            Arc::new(Retry::new(faults, settings(None)).unwrap()) as _
        };
        // Virtual time flies while a call waits, past the model's own deadline if a list is long.
        model::check(make, model::Settings { batches: 4, ..model::Settings::default() }).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_succeeds_at_once_is_made_once() {
    let (faults, retry) = retry(None);
    read(&*retry, 100).await.unwrap();
    assert_eq!(faults.calls().len(), 1);
    assert!(retry.outage().borrow().is_none());
}

#[tokio::test(start_paused = true)]
async fn waits_longer_from_attempt_to_attempt() {
    let (faults, retry) = retry(None);
    faults.add(Rule::any().times(5).fail(ErrorKind::Unavailable));
    let start = Instant::now();
    retry.write_at(0, &[1]).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 1 + 2 + 4 + 4 + 4);
    assert_eq!(faults.count(Operation::Write), 6);
}

#[tokio::test(start_paused = true)]
async fn gives_up_at_the_limit_and_says_so() {
    let (faults, retry) = retry(Some(8));
    faults.add(Rule::any().fail(ErrorKind::Unavailable));
    let start = Instant::now();
    let error = read(&*retry, 1).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 8);
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_eq!(
        error.message(),
        "gave up after 8.0s; check that the remote is up and reachable: it fails, as the test asked"
    );
    // At 0, 1, 3 and 7 seconds.
    assert_eq!(faults.count(Operation::Read), 4);
}

#[tokio::test(start_paused = true)]
async fn a_silent_remote_is_asked_again() {
    let (faults, retry) = retry(None);
    faults.add(Rule::any().times(2).hang());
    let start = Instant::now();
    retry.flush().await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 10 + 1 + 10 + 2);
    assert_eq!((faults.count(Operation::Flush), faults.in_flight()), (3, 0));
}

#[tokio::test(start_paused = true)]
async fn the_limit_cuts_an_attempt_short() {
    let (faults, retry) = retry(Some(3));
    faults.add(Rule::any().hang());
    let start = Instant::now();
    let error = read(&*retry, 1).await.unwrap_err();
    assert_eq!((start.elapsed().as_secs(), error.kind()), (3, ErrorKind::Unavailable));
    assert!(error.message().contains("no answer within 3s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_cut_short_does_not_hide_why() {
    let (faults, retry) = retry(Some(5));
    faults.add(Rule::any().times(2).fail(ErrorKind::Unavailable));
    faults.add(Rule::any().after(2).hang());
    let error = read(&*retry, 1).await.unwrap_err();
    assert!(error.message().ends_with("it fails, as the test asked"), "{error}");
    assert_eq!(faults.count(Operation::Read), 3);
}

#[tokio::test(start_paused = true)]
async fn other_errors_are_not_retried() {
    let others = [
        ErrorKind::InvalidInput,
        ErrorKind::NotFound,
        ErrorKind::Denied,
        ErrorKind::Exhausted,
        ErrorKind::Corrupt,
        ErrorKind::Conflict,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ];
    for kind in others {
        let (faults, retry) = retry(None);
        faults.add(Rule::any().fail(kind));
        assert_eq!(retry.flush().await.unwrap_err().kind(), kind);
        assert_eq!(retry.write_at(0, &[1]).await.unwrap_err().kind(), kind);
        assert_eq!(faults.calls().len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn every_kind_of_call_is_retried() {
    let (faults, retry) = retry(None);
    let capabilities = retry.capabilities();
    let mut buf = [0; 10];
    let calls: [(Operation, futures_util::future::BoxFuture<'_, Result<()>>); 5] = [
        (
            Operation::Read,
            Box::pin(async {
                capabilities.read_many.unwrap().read_many(&mut [ReadOp { offset: 5, buf: &mut buf }]).await
            }),
        ),
        (Operation::Trim, Box::pin(async { capabilities.trim.unwrap().trim(50, 5).await })),
        (Operation::WriteZeroes, Box::pin(async { capabilities.write_zeroes.unwrap().write_zeroes(60, 5).await })),
        (Operation::Extents, Box::pin(async { capabilities.extents.unwrap().extents(0, 5).await.map(|_| ()) })),
        (Operation::Flush, Box::pin(retry.flush())),
    ];
    for (operation, call) in calls {
        faults.add(Rule::on(operation).times(1).fail_after(ErrorKind::Unavailable));
        call.await.unwrap();
        assert_eq!(faults.count(operation), 2, "{operation}");
    }
    fill::check(&buf, 5, 1).unwrap();
}

#[tokio::test(start_paused = true)]
async fn pieces_go_on_where_they_stopped() {
    for chunk in [None, Some(ChunkSize::new(8192).unwrap())] {
        let store = Store::new(SIZE).filled(1);
        let faults =
            Faults::new(Arc::new(chunk.map_or_else(|| Store::new(SIZE).filled(1), |chunk| store.whole_chunks(chunk))));
        // The store lends blocks: the second attempt stops inside of a chunk.
        let retry = Retry::new(Broken::new(faults.clone(), 3), settings(None)).unwrap();
        let mut bytes = Vec::new();
        let mut visit = |at: u64, piece: Piece<'_>| -> Result<()> {
            assert_eq!(at, bytes.len() as u64, "each byte is lent once, in order");
            match piece {
                Piece::Data(data) => bytes.extend_from_slice(data),
                Piece::Zeroes(_) => panic!("there are no zeros"),
            }
            Ok(())
        };
        retry.capabilities().pieces.unwrap().read_pieces(0, SIZE, &mut visit).await.unwrap();
        assert_eq!(bytes.len() as u64, SIZE);
        fill::check(&bytes, 0, 1).unwrap();
        assert!(faults.count(Operation::Read) > 5);
    }
}

/// Lends a few pieces, and then breaks down; what is asked again is lent from there.
struct Broken {
    inner: Arc<Faults>,
    pieces: usize,
}

impl Broken {
    fn new(inner: Arc<Faults>, pieces: usize) -> Arc<Self> {
        Arc::new(Self { inner, pieces })
    }
}

#[async_trait]
impl Backend for Broken {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { pieces: Some(self), ..self.inner.capabilities() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[async_trait]
impl ReadPieces for Broken {
    async fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        visit: &mut (dyn for<'p> FnMut(u64, Piece<'p>) -> Result<()> + Send),
    ) -> Result<()> {
        let mut left = self.pieces;
        let mut lend = |at: u64, piece: Piece<'_>| {
            if left == 0 {
                return Err(Error::new(ErrorKind::Unavailable, Operation::Read, "broken"));
            }
            left -= 1;
            visit(at, piece)
        };
        self.inner.capabilities().pieces.unwrap().read_pieces(offset, len, &mut lend).await
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_visitor_refuses_is_not_retried() {
    let (faults, retry) = retry(None);
    let mut visits = 0;
    let mut visit = |_: u64, _: Piece<'_>| -> Result<()> {
        visits += 1;
        Err(Error::new(ErrorKind::Unavailable, Operation::Read, "my own trouble"))
    };
    let error = retry.capabilities().pieces.unwrap().read_pieces(0, SIZE, &mut visit).await.unwrap_err();
    assert_eq!((error.message(), visits, faults.calls().len()), ("my own trouble", 1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_outage_can_be_watched() {
    let (faults, retry) = retry(None);
    let mut outage = retry.outage();
    faults.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let start = Instant::now();
    let reads: Vec<_> = (0..3).map(|_| spawn_read(&retry)).collect();
    outage.wait_for(Option::is_some).await.unwrap();
    tokio::time::sleep(secs(20)).await;
    let seen = outage.borrow_and_update().clone().unwrap();
    assert_eq!((seen.since, seen.error.kind()), (start, ErrorKind::Unavailable));
    reads[0].abort();
    reads[1].abort();
    tokio::time::sleep(secs(1)).await;
    assert!(outage.borrow().is_some(), "one still waits");
    faults.clear();
    outage.wait_for(Option::is_none).await.unwrap();
    assert_eq!(join_all(reads).await.into_iter().filter(|read| matches!(read, Ok(Ok(())))).count(), 1);
}

fn spawn_read(retry: &Arc<Retry>) -> tokio::task::JoinHandle<Result<()>> {
    let retry = retry.clone();
    tokio::spawn(async move { read(&*retry, 10).await })
}

#[tokio::test(start_paused = true)]
async fn who_gets_through_wakes_the_others() {
    let (faults, retry) = retry(None);
    // The slow ones find out late, and will back off long; the quick one gets through meanwhile.
    faults.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let slow: Vec<_> = (0..8).map(|_| spawn_read(&retry)).collect();
    tokio::time::sleep(Duration::from_millis(7100)).await;
    faults.clear();
    faults.add(Rule::on(Operation::Write).times(1).fail(ErrorKind::Unavailable));
    retry.write_at(SIZE - 1, &[1]).await.unwrap();
    let woken = Instant::now();
    for read in join_all(slow).await {
        read.unwrap().unwrap();
    }
    assert_eq!(woken.elapsed(), Duration::ZERO, "they do not sleep out their four seconds");
}

/// An attempt to write takes too long and is dropped; nothing of it comes after the retry's success.
#[tokio::test(start_paused = true)]
async fn a_dropped_attempt_does_not_land_late() {
    let (faults, retry) = retry(None);
    let pause = Pause::new();
    faults.add(Rule::on(Operation::Write).times(1).hold(&pause));
    retry.write_at(0, &fill::bytes(0, 100, 2)).await.unwrap();
    retry.write_at(0, &fill::bytes(0, 100, 1)).await.unwrap();
    pause.release();
    tokio::time::sleep(secs(100)).await;
    read(&*retry, 100).await.unwrap();
    assert_eq!(faults.count(Operation::Write), 3);
}

#[tokio::test(start_paused = true)]
async fn only_an_answer_ends_an_outage() {
    let (faults, retry) = retry(Some(8));
    faults.add(Rule::any().fail(ErrorKind::Unavailable));
    let start = Instant::now();
    assert!(timeout(secs(3), retry.flush()).await.is_err(), "that is dropped");
    read(&*retry, 1).await.unwrap_err();
    let since = |outage: Option<Outage>| outage.expect("nobody has answered").since;
    assert_eq!(since(retry.outage().borrow().clone()), start);
    faults.clear();
    faults.add(Rule::on(Operation::Write).fail(ErrorKind::Denied));
    retry.write_at(0, &[1]).await.unwrap_err();
    assert!(retry.outage().borrow().is_none(), "a refusal is an answer too");
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_over_when_the_last_who_waits_is_dropped_after_an_answer() {
    let (faults, retry) = retry(None);
    faults.add(Rule::on(Operation::Read).fail(ErrorKind::Unavailable));
    let wait_for_failure = async |reads: usize| {
        while faults.count(Operation::Read) < reads {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let outage = retry.outage();
    let waiting = spawn_read(&retry);
    wait_for_failure(1).await;
    retry.flush().await.unwrap();
    assert!(outage.borrow().is_some(), "one still waits");
    waiting.abort();
    waiting.await.unwrap_err();
    assert!(outage.borrow().is_none(), "another was answered since");

    let waiting = spawn_read(&retry);
    wait_for_failure(2).await;
    retry.flush().await.unwrap();
    wait_for_failure(3).await;
    waiting.abort();
    waiting.await.unwrap_err();
    assert!(outage.borrow().is_some(), "it failed again since another was answered");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let good = RetrySettings::default();
    good.validate().unwrap();
    let backoff = good.backoff.clone();
    let bad = [
        (RetrySettings { limit: Some(Duration::ZERO), ..good.clone() }, "retry limit"),
        (RetrySettings { attempt_timeout: Duration::ZERO, ..good.clone() }, "attempt"),
        (RetrySettings { backoff: Backoff { initial: Duration::ZERO, ..backoff.clone() }, ..good.clone() }, "backoff"),
        (RetrySettings { backoff: Backoff { initial: secs(9), ..backoff.clone() }, ..good.clone() }, "backoff"),
        (RetrySettings { backoff: Backoff { multiplier: 0.5, ..backoff.clone() }, ..good.clone() }, "multiplied"),
        (RetrySettings { backoff: Backoff { multiplier: f64::NAN, ..backoff }, ..good }, "multiplied"),
    ];
    for (settings, named) in bad {
        let error = settings.validate().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidInput && error.message().contains(named), "{error}");
    }
}

/// A remote behind a line whose bytes are counted: calls take their time, and something moves meanwhile or not.
struct Line {
    inner: Arc<Faults>,
    opened: Instant,
    /// Bytes a second, and for how many seconds since the beginning they move.
    rate: u64,
    until: u64,
}

impl Line {
    fn retry(rate: u64, until: u64, limit: Option<u64>) -> (Arc<Faults>, Retry) {
        let inner = Faults::new(Arc::new(Store::new(SIZE).filled(1)));
        let line = Self { inner: inner.clone(), opened: Instant::now(), rate, until };
        (inner, Retry::new(Arc::new(line), settings(limit)).unwrap())
    }
}

impl Activity for Line {
    fn moved(&self) -> u64 {
        self.opened.elapsed().as_secs().min(self.until) * self.rate
    }
}

#[async_trait]
impl Backend for Line {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { activity: Some(self), ..Capabilities::default() }
    }

    async fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf).await
    }

    async fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

const MOVING: u64 = 100_000;

#[tokio::test(start_paused = true)]
async fn an_attempt_may_take_as_long_as_bytes_move() {
    // Ten times as long as an attempt may be silent, and longer than the limit.
    for limit in [Some(30), None] {
        let (faults, retry) = Line::retry(MOVING, u64::MAX, limit);
        faults.add(Rule::any().times(1).delay(secs(100)));
        retry.write_at(0, &[1; 100]).await.unwrap();
        assert_eq!(faults.count(Operation::Write), 1, "made once");
    }
}

#[tokio::test(start_paused = true)]
async fn silence_counts_from_when_bytes_have_stopped_moving() {
    let (faults, retry) = Line::retry(MOVING, 25, Some(40));
    faults.add(Rule::any().hang());
    let start = Instant::now();
    let error = read(&retry, 100).await.unwrap_err();
    // Bytes move for 25 s; then come ten seconds of silence, a wait, and the same again until the limit, which begins
    // when nothing moves any more.
    let took = start.elapsed().as_secs_f64();
    assert!((63.0..=67.0).contains(&took), "{took}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("no answer within"), "{error}");
    assert_eq!(faults.count(Operation::Read), 4);
}

#[tokio::test(start_paused = true)]
async fn what_keeps_a_connection_alive_is_no_sign_that_a_call_gets_on() {
    // Less than 16 KiB in ten seconds.
    let (faults, retry) = Line::retry(1600, u64::MAX, Some(10));
    faults.add(Rule::any().hang());
    let start = Instant::now();
    read(&retry, 1).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_forgotten_while_others_move_is_made_again() {
    // 100 MB/s: what was in front of the call has long moved when its time is over. 1 MB/s: that takes half a minute.
    for (rate, attempts) in [(100_000_000, 4..=4), (1_000_000, 2..=2)] {
        let (faults, retry) = Line::retry(rate, u64::MAX, Some(40));
        faults.add(Rule::any().hang());
        let error = read(&retry, 1).await.unwrap_err();
        assert!(error.message().contains("though others are answered"), "{error}");
        assert!(attempts.contains(&faults.count(Operation::Read)), "{rate}: {}", faults.count(Operation::Read));
    }
    let (faults, retry) = Line::retry(100_000_000, u64::MAX, None);
    faults.add(Rule::any().times(1).hang());
    read(&retry, 1).await.unwrap();
}
