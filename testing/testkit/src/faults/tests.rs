use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;
use tokio::time::Instant;

use super::*;
use crate::store::Store;
use crate::{conformance, fill};

fn faults() -> Arc<Faults> {
    Faults::new(Arc::new(Store::new(100_001).filled(1)))
}

async fn read(backend: &dyn Backend, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; len];
    backend.read_at(offset, &mut buf).await.map(|()| buf)
}

#[tokio::test]
async fn without_faults_it_conforms() {
    conformance::backend(async || Faults::new(Arc::new(Store::new(100_001))) as _).await;
}

#[tokio::test(start_paused = true)]
async fn behind_a_link_it_conforms() {
    let make = async || {
        let link = Link::new(Arc::new(Store::new(30_001)), Duration::from_millis(20), Some(100_000_000));
        link as Arc<dyn Backend>
    };
    conformance::backend(make).await;
}

#[tokio::test]
async fn strikes_the_calls_that_were_named() {
    let faults = faults();
    faults.add(Rule::on(Operation::Read).touching(4096..8192).after(1).times(2).fail(ErrorKind::Unavailable));
    let mut results = Vec::new();
    for _ in 0..5 {
        read(&*faults, 0, 4096).await.expect("not touched");
        results.push(read(&*faults, 4000, 200).await.map_err(|error| error.kind()).is_ok());
    }
    assert_eq!(results, [true, false, false, true, true]);
    assert_eq!((faults.count(Operation::Read), faults.bytes(Operation::Read)), (10, 5 * 4296));
    assert_eq!(faults.take_calls()[1], call(Operation::Read, 4000, 200));
    assert!(faults.calls().is_empty());
}

#[tokio::test]
async fn chance_is_the_same_for_the_same_seed() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let faults = faults();
        faults.add(Rule::any().chance(0.5, 42).fail(ErrorKind::Exhausted));
        let results = join_all((0..64).map(|_| read(&*faults, 0, 1))).await;
        runs.push(results.into_iter().map(|result| result.is_ok()).collect::<Vec<_>>());
    }
    assert_eq!(runs[0], runs[1]);
    assert!((16..48).contains(&runs[0].iter().filter(|ok| **ok).count()));
}

#[tokio::test]
async fn a_lost_answer_is_a_write_that_happened() {
    let faults = faults();
    faults.add(Rule::on(Operation::Write).times(1).fail_after(ErrorKind::Unavailable));
    assert!(faults.write_at(10, &fill::bytes(10, 100, 2)).await.is_err());
    fill::check(&read(&*faults, 10, 100).await.unwrap(), 10, 2).unwrap();
    faults.add(Rule::on(Operation::Write).fail(ErrorKind::Unavailable));
    assert!(faults.write_at(10, &fill::bytes(10, 100, 3)).await.is_err());
    fill::check(&read(&*faults, 10, 100).await.unwrap(), 10, 2).unwrap();
}

#[tokio::test]
async fn short_reads_fail_and_leave_rubbish() {
    let faults = faults();
    faults.add(Rule::on(Operation::Read).short(100));
    let mut buf = [0; 200];
    assert_eq!(faults.read_at(0, &mut buf).await.unwrap_err().kind(), ErrorKind::Corrupt);
    fill::check(&buf[..100], 0, 1).unwrap();
    assert_eq!(buf[100..], [0xbd; 100]);
    let pieces = faults.capabilities().pieces.unwrap();
    let mut lent = 0;
    let mut count = |_: u64, piece: Piece<'_>| -> Result<()> {
        lent += piece.len();
        Ok(())
    };
    assert_eq!(pieces.read_pieces(0, 9000, &mut count).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(lent <= 100);
    let mut reads = [ReadOp { offset: 0, buf: &mut buf }];
    assert!(faults.capabilities().read_many.unwrap().read_many(&mut reads).await.is_err());
}

#[tokio::test]
async fn a_pause_holds_until_released() {
    let (faults, pause) = (faults(), Pause::new());
    faults.add(Rule::on(Operation::Read).hold(&pause));
    let reads: Vec<_> = (0..4)
        .map(|_| {
            let faults = faults.clone();
            tokio::spawn(async move { read(&*faults, 0, 10).await })
        })
        .collect();
    pause.wait_held(4).await;
    assert_eq!((faults.in_flight(), faults.most_in_flight()), (4, 4));
    reads[0].abort();
    faults.flying.subscribe().wait_for(|flying| flying.now == 3).await.unwrap();
    pause.let_go(1);
    faults.flying.subscribe().wait_for(|flying| flying.now == 2).await.unwrap();
    assert_eq!(pause.held(), 2);
    pause.release();
    let results = join_all(reads).await;
    assert_eq!(results.into_iter().filter(|result| result.is_ok()).count(), 3);
    faults.wait_idle().await;
    pause.hold();
    assert!(read(&*faults, 0, 10).now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn delays_hangs_and_cancellations() {
    let faults = faults();
    faults.add(Rule::on(Operation::Read).times(1).delay(Duration::from_secs(3)));
    let start = Instant::now();
    read(&*faults, 0, 1).await.unwrap();
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    faults.add(Rule::on(Operation::Read).times(1).hang());
    assert!(tokio::time::timeout(Duration::from_secs(999), read(&*faults, 0, 1)).await.is_err());
    faults.add(Rule::on(Operation::Write).cancel(1));
    assert_eq!(faults.write_at(0, &[9]).await.unwrap_err().kind(), ErrorKind::Cancelled);
    fill::check(&read(&*faults, 0, 1).await.unwrap(), 0, 1).unwrap();
    faults.clear();
    faults.write_at(0, &[9]).await.unwrap();
    assert_eq!(faults.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_link_is_as_slow_as_asked() {
    let link = Link::new(Arc::new(Store::new(1_000_000).filled(1)), Duration::from_millis(100), Some(1_000_000));
    let start = Instant::now();
    read(&*link, 0, 0).await.unwrap();
    assert_eq!(start.elapsed().as_millis(), 100);
    join_all((0..4).map(|n| read(&*link, n * 250_000, 250_000))).await;
    let took = start.elapsed().as_millis();
    assert!((1200..1210).contains(&took), "four quarters of a megabyte share the link: {took} ms");
}

#[tokio::test]
async fn cancelling_counts_polls() {
    let mut polls = 0;
    let never = std::future::poll_fn(|context| -> Poll<()> {
        polls += 1;
        context.waker().wake_by_ref();
        Poll::Pending
    });
    assert!(cancel_after(5, never).await.is_none());
    assert_eq!(polls, 5);
    assert_eq!(cancel_after(1, async { 3 }).await, Some(3));
    assert_eq!(cancel_after(0, async { 3 }).await, None);
}
