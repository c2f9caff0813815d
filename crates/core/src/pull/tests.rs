//! The order of pulls, and their limits.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::{ChunkSize, Error, ErrorKind, Geometry, Operation};

const CHUNK: u64 = 4096;

fn table(chunks: u64) -> Arc<Table> {
    let geometry = Geometry::new(chunks * CHUNK - 1, ChunkSize::new(CHUNK).unwrap()).unwrap();
    Arc::new(Table::new(geometry, None))
}

fn plan(table: &Arc<Table>, workers: Workers, max_chunks: u64, priority: Priority) -> PullPlan {
    PullPlan::new(table.clone(), workers, max_chunks * CHUNK, priority)
}

fn fixed(workers: usize) -> Workers {
    Workers::Fixed(NonZeroUsize::new(workers).unwrap())
}

fn install(mut pull: Pull) {
    let blocks = pull.table().geometry().blocks_touched(&pull.bytes());
    while let Some(install) = pull.claim(blocks.clone()) {
        install.commit().unwrap();
    }
    pull.end(u64::MAX, Ok(()));
}

/// Does everything, and answers the chunks in the order in which they came.
fn run(plan: &mut PullPlan) -> Vec<u64> {
    let mut order = Vec::new();
    while let Next::Pull(pull, flight) = plan.next(Duration::ZERO, false) {
        order.extend(pull.chunks());
        install(pull);
        plan.finish(flight, &[], Duration::ZERO, false, Duration::ZERO);
    }
    order
}

#[test]
fn urgent_comes_before_the_callers_list_and_that_before_the_rest() {
    let table = table(10);
    let mut plan = plan(&table, fixed(1), 1, Priority::List([7, 3, 99, 3].into()));
    plan.urgent([5, 4]);
    assert_eq!(run(&mut plan), [5, 4, 7, 3, 0, 1, 2, 6, 8, 9]);
    assert!(matches!(plan.next(Duration::ZERO, false), Next::Done));
}

#[test]
fn adjacent_chunks_are_joined_up_to_the_limit() {
    let table = table(20);
    let mut plan = plan(&table, fixed(9), 4, Priority::List([10, 11, 12, 2].into()));
    let mut requests = Vec::new();
    while let Next::Pull(pull, flight) = plan.next(Duration::ZERO, false) {
        requests.push(pull.chunks());
        install(pull);
        plan.finish(flight, &[], Duration::ZERO, false, Duration::ZERO);
    }
    assert_eq!(requests, [10..13, 2..3, 0..2, 3..7, 7..10, 13..17, 17..20]);
}

#[test]
fn fixed_workers_are_a_limit_and_off_is_off() {
    let table = table(20);
    let mut two = plan(&table, fixed(2), 1, Priority::None);
    let Next::Pull(_first, flight) = two.next(Duration::ZERO, false) else { panic!() };
    let Next::Pull(_second, _flying) = two.next(Duration::ZERO, false) else { panic!() };
    assert!(matches!(two.next(Duration::ZERO, false), Next::Full));
    two.finish(flight, &[], Duration::ZERO, false, Duration::ZERO);
    assert!(matches!(two.next(Duration::ZERO, false), Next::Pull(..)));
    let mut off = plan(&table, Workers::Off, 1, Priority::None);
    assert!(matches!(off.next(Duration::ZERO, false), Next::Full));
}

#[test]
fn adaptive_keeps_some_in_flight_and_less_while_a_demand_waits() {
    let table = table(100_000);
    let count = |polite| {
        let mut plan = plan(&table, Workers::Adaptive, 256, Priority::None);
        let mut taken = Vec::new();
        while let Next::Pull(pull, flight) = plan.next(Duration::ZERO, polite) {
            taken.push((pull, flight));
        }
        let in_flight = plan.window().in_flight();
        assert!(taken.len() >= 4, "requests overlap");
        in_flight
    };
    assert!(count(true) < count(false));
}

#[test]
fn where_nobody_reads_more_is_in_flight() {
    let table = table(1_000_000);
    let in_flight = |alone| {
        let mut plan = plan(&table, Workers::Adaptive, 256, Priority::None).alone(alone);
        // A short link that carries a gigabyte per second. Answers what was in flight, and when all of it has come.
        let mut fill = |mut now: Duration| {
            let mut taken = Vec::new();
            while let Next::Pull(pull, flight) = plan.next(now, false) {
                taken.push((pull, flight));
            }
            let in_flight = plan.window().in_flight();
            for (pull, flight) in taken {
                now += Duration::from_nanos(pull.bytes().end - pull.bytes().start);
                install(pull);
                plan.finish(flight, &[], Duration::ZERO, false, now);
            }
            (in_flight, now)
        };
        let warm = (0..20).fold(Duration::ZERO, |now, _| fill(now).1);
        fill(warm).0
    };
    assert!(in_flight(false) < in_flight(true) / 2);
}

#[test]
fn what_failed_waits_and_others_go_on() {
    let table = table(4);
    let mut plan = plan(&table, fixed(1), 1, Priority::None);
    let (now, pause) = (Duration::from_secs(1), Duration::from_secs(5));
    let Next::Pull(mut pull, flight) = plan.next(now, false) else { panic!() };
    pull.end(1, Err(Error::new(ErrorKind::Corrupt, Operation::Read, "bad")));
    plan.finish(flight, std::slice::from_ref(&(0..1)), pause, false, now);
    let mut others = Vec::new();
    let due = loop {
        match plan.next(now, false) {
            Next::Pull(pull, flight) => {
                others.extend(pull.chunks());
                install(pull);
                plan.finish(flight, &[], pause, false, now);
            }
            Next::Later(due) => break due,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((others, due), (vec![1, 2, 3], now + pause));
    let Next::Pull(pull, _flight) = plan.next(due, false) else { panic!() };
    assert_eq!(pull.chunks(), 0..1);
}

#[test]
fn a_remote_that_is_away_is_left_alone() {
    let table = table(4);
    let mut plan = plan(&table, fixed(2), 1, Priority::None);
    let Next::Pull(pull, flight) = plan.next(Duration::ZERO, false) else { panic!() };
    drop(pull);
    plan.finish(flight, std::slice::from_ref(&(0..1)), Duration::from_secs(5), true, Duration::ZERO);
    let Next::Later(due) = plan.next(Duration::from_secs(4), false) else { panic!() };
    assert_eq!(due, Duration::from_secs(5));
    let Next::Pull(_probe, flight) = plan.next(due, false) else { panic!() };
    assert!(matches!(plan.next(due, false), Next::Full), "one finds out whether it is back");
    plan.finish(flight, &[], Duration::ZERO, false, due);
    let Next::Pull(_one, _flight) = plan.next(due, false) else { panic!() };
    assert!(matches!(plan.next(due, false), Next::Pull(..)));
}

#[test]
fn the_order_follows_a_reader() {
    let table = table(100);
    let mut plan = plan(&table, fixed(1), 1, Priority::None);
    plan.demanded(&(50..51));
    plan.demanded(&(10..11));
    let Next::Pull(pull, flight) = plan.next(Duration::ZERO, false) else { panic!() };
    assert_eq!(pull.chunks(), 0..1, "jumping about is not followed");
    install(pull);
    plan.finish(flight, &[], Duration::ZERO, false, Duration::ZERO);
    plan.demanded(&(11..12));
    let order = run(&mut plan);
    assert_eq!((order[0], order.len()), (12, 99));
}

#[test]
fn a_priority_is_asked_in_parts_of_a_large_region() {
    let chunks = 3 * SORTED as u64 + 17;
    let table = table(chunks);
    let value = |chunk: u64| (chunk.wrapping_mul(2_654_435_761) % 1000).cast_signed();
    let mut plan = plan(&table, fixed(1), 1, Priority::Function(Arc::new(value)));
    let order = run(&mut plan);
    assert_eq!(order.len() as u64, chunks);
    assert!(order.is_sorted_by_key(|chunk| (std::cmp::Reverse(value(*chunk)), *chunk)));
}

proptest! {
    #[test]
    fn every_absent_chunk_is_pulled_once(
        chunks in 1u64..60,
        valid in proptest::collection::vec(0u64..60, 0..20),
        list in proptest::collection::vec(0u64..70, 0..20),
        urgent in proptest::collection::vec(0u64..70, 0..20),
        max in 1u64..9,
    ) {
        let table = table(chunks);
        let valid: HashSet<u64> = valid.into_iter().filter(|chunk| *chunk < chunks).collect();
        valid.iter().for_each(|chunk| table.restore(*chunk..chunk + 1, false));
        let mut plan = plan(&table, Workers::Adaptive, max, Priority::List(list.into()));
        plan.urgent(urgent);
        let order = run(&mut plan);
        let once: HashSet<u64> = order.iter().copied().collect();
        prop_assert_eq!(once.len(), order.len());
        prop_assert!(once.is_disjoint(&valid));
        prop_assert!(table.is_complete());
    }
}
