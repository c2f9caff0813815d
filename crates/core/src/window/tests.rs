//! The controller on simulated links: a queue that drains at a bandwidth, and a round trip.

use super::*;

struct Link {
    bytes_per_second: u64,
    round_trip: Duration,
    free_at: Duration,
    arriving: VecDeque<(Duration, Flight)>,
}

impl Link {
    fn new(bytes_per_second: u64, round_trip: Duration) -> Self {
        Self { bytes_per_second, round_trip, free_at: Duration::ZERO, arriving: VecDeque::new() }
    }

    fn send(&mut self, window: &mut Window, bytes: u64, now: Duration) {
        let flight = window.start(bytes, now);
        let takes = Duration::from_nanos(bytes * 1_000_000_000 / self.bytes_per_second);
        self.free_at = self.free_at.max(now + self.round_trip) + takes;
        self.arriving.push_back((self.free_at, flight));
    }

    /// Keeps the window full until `total` bytes have come; answers the time it took.
    fn transfer(&mut self, window: &mut Window, total: u64, from: Duration) -> Duration {
        self.transfer_in(window, None, total, from)
    }

    /// The same in requests of one length.
    fn transfer_in(&mut self, window: &mut Window, length: Option<u64>, total: u64, from: Duration) -> Duration {
        let (mut now, mut sent, mut come) = (from, 0, 0);
        while come < total {
            while sent < total && (window.requests() == 0 || window.room(Others::Possible) > 0) {
                let sized = (window.wanted(Others::Possible) / 8).clamp(64 << 10, 1 << 20);
                let bytes = length.unwrap_or(sized).min(total - sent);
                self.send(window, bytes, now);
                sent += bytes;
            }
            let (at, flight) = self.arriving.pop_front().unwrap();
            now = at;
            come += flight.bytes;
            window.finish(flight, true, now);
        }
        now - from
    }

    fn holds(&self) -> u64 {
        carried(self.bytes_per_second, self.round_trip)
    }
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_fast_long_link_is_full_after_a_few_round_trips() {
    for ms in [1, 5, 10, 20, 40, 100] {
        let mut link = Link::new(1 << 30, ms * MS);
        let took = link.transfer(&mut Window::default(), 256 << 20, Duration::ZERO);
        let least = Duration::from_millis(250) + ms * MS;
        assert!(took < least + 6 * ms * MS, "{took:?} at {ms} ms");
    }
}

#[test]
fn what_queues_is_bounded_by_what_the_link_holds() {
    for (rate, ms) in [(100 << 20, 40), (1 << 30, 10), (20 << 20, 200)] {
        let (mut link, mut window) = (Link::new(rate, ms * MS), Window::default());
        let warm = link.transfer(&mut window, 20 * link.holds().max(4 << 20), Duration::ZERO);
        assert!(window.target() < 3 * link.holds().max(FLOOR), "{} at {rate} and {ms} ms", window.target());
        let more = link.transfer(&mut window, 20 * link.holds(), warm);
        let rate_got = per_second(20 * link.holds(), more);
        assert!(rate_got > rate / 10 * 8, "{rate_got} of {rate} at {ms} ms");
    }
}

#[test]
fn a_slow_link_is_not_flooded_at_the_start() {
    let (mut link, mut window) = (Link::new(1 << 20, 20 * MS), Window::default());
    let mut most = 0;
    let mut now = Duration::ZERO;
    for _ in 0..50 {
        now += link.transfer(&mut window, 1 << 20, now);
        most = most.max(window.target());
    }
    assert!(most <= 32 << 20, "{most}");
    assert!(window.target() <= 2 << 20, "{}", window.target());
}

#[test]
fn it_grows_again_when_the_link_does() {
    let mut window = Window::default();
    let mut slow = Link::new(10 << 20, 20 * MS);
    let mut now = slow.transfer(&mut window, 100 << 20, Duration::ZERO);
    let before = window.target();
    let mut fast = Link::new(500 << 20, 20 * MS);
    for _ in 0..20 {
        now += fast.transfer(&mut window, 50 << 20, now);
    }
    assert!(window.target() > 4 * before, "{before} to {}", window.target());
}

#[test]
fn what_fails_leaves_nothing_in_flight_and_teaches_nothing() {
    let mut window = Window::default();
    let flight = window.start(1 << 20, Duration::ZERO);
    assert_eq!((window.in_flight(), window.requests()), (1 << 20, 1));
    window.finish(flight, false, 50 * MS);
    assert_eq!((window.in_flight(), window.requests(), window.target()), (0, 0, INITIAL));
}

#[test]
fn politeness_leaves_room() {
    let window = Window::default();
    assert_eq!((window.room(Others::Possible), window.room(Others::Waiting)), (INITIAL, INITIAL / 4 * 3));
}

#[test]
fn what_queues_does_not_grow_with_time() {
    for (rate, ms) in [(100 << 20, 40), (1 << 30, 10), (20 << 20, 200)] {
        let (mut link, mut window) = (Link::new(rate, ms * MS), Window::default());
        let warm = link.transfer(&mut window, 20 * link.holds(), Duration::ZERO);
        let took = link.transfer(&mut window, 100 * rate, warm);
        assert!(window.target() < 3 * link.holds(), "{} at {rate} and {ms} ms", window.target());
        let rate_got = per_second(100 * rate, took);
        assert!(rate_got > rate / 100 * 95, "{rate_got} of {rate} at {ms} ms");
    }
}

#[test]
fn a_longer_way_is_found_out_whatever_the_requests_are() {
    for length in [None, Some(1 << 20)] {
        let mut window = Window::default();
        let now = Link::new(100 << 20, 45 * MS).transfer_in(&mut window, length, 100 << 20, Duration::ZERO);
        // At half of what the link carries at most until the old way is forgotten.
        let took = Link::new(100 << 20, 135 * MS).transfer_in(&mut window, length, 3 << 30, now);
        assert!(took < Duration::from_secs(31) + LATENCY_MEMORY, "{took:?} in {length:?}");
    }
}

#[test]
fn a_remote_that_was_away_is_no_long_way() {
    let mut window = Window::default();
    let now = Link::new(10 << 20, 20 * MS).transfer(&mut window, 100 << 20, Duration::ZERO);
    let flight = window.start(1 << 20, now);
    let later = now + Duration::from_secs(40);
    window.finish(flight, true, later);
    assert!(window.target() <= 16 << 20, "{}", window.target());
    Link::new(10 << 20, 20 * MS).transfer(&mut window, 100 << 20, later);
    assert!(window.target() <= 4 << 20, "{}", window.target());
}

#[test]
fn a_short_link_has_enough_to_do_where_nobody_can_wait() {
    let (mut link, mut window) = (Link::new(1 << 30, MS / 10), Window::default());
    link.transfer(&mut window, 1 << 30, Duration::ZERO);
    let bulk = carried(1 << 30, BULK);
    assert!((bulk / 2..bulk * 2).contains(&window.wanted(Others::None)), "{}", window.wanted(Others::None));
    assert!(window.wanted(Others::Possible) <= 3 << 20, "{}", window.wanted(Others::Possible));
}
