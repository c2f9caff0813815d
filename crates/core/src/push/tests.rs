//! When rounds come.

use std::num::NonZeroUsize;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn plan() -> PushPlan {
    PushPlan::new(Workers::Fixed(NonZeroUsize::MIN), 20 * SECOND, 1000)
}

#[test]
fn a_round_comes_with_the_interval_and_with_half_the_budget() {
    let mut plan = plan();
    assert_eq!(plan.round(499, SECOND), Round::Later(20 * SECOND));
    assert_eq!(plan.round(500, SECOND), Round::Budget);
    plan.round_ended(Round::Budget, true, 2 * SECOND);
    assert_eq!(plan.round(0, 20 * SECOND), Round::Complete, "a budget's round does not put the interval's off");
    plan.round_ended(Round::Complete, true, 21 * SECOND);
    assert_eq!(plan.round(0, 40 * SECOND), Round::Later(41 * SECOND));
}

#[test]
fn failures_wait_longer_and_longer_and_success_forgets_them() {
    let mut plan = plan();
    let mut now = 20 * SECOND;
    for pause in [1, 2, 4, 8, 16, 30, 30] {
        assert_eq!(plan.round(1000, now), Round::Complete);
        plan.round_ended(Round::Complete, false, now);
        assert_eq!(plan.round(1000, now), Round::Later(now + pause * SECOND), "no hurry while it fails");
        now += pause * SECOND;
    }
    let flight = plan.start(1, now);
    plan.finish(flight, true, now);
    plan.round_ended(Round::Complete, true, now);
    assert_eq!(plan.round(1000, now), Round::Budget);
}

#[test]
fn workers_are_a_limit() {
    let mut one = plan();
    assert!(one.has_room());
    let flight = one.start(10, SECOND);
    assert!(!one.has_room());
    assert_eq!(one.window().in_flight(), 10);
    one.finish(flight, false, SECOND);
    assert!(one.has_room());
    let mut adaptive = PushPlan::new(Workers::Adaptive, SECOND, 1);
    let mut flights = Vec::new();
    while adaptive.has_room() {
        flights.push(adaptive.start(1 << 20, SECOND));
    }
    assert_eq!(flights.len() as u64, adaptive.window().target() >> 20);
}
