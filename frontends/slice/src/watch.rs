//! Waiting for page faults: looking for the next one before going to sleep.
//!
//! Who touches one missing page after another from another processor is answered sooner if nobody has to be woken there:
//! to wake a processor takes longer than to fill a page that is at hand. So a fault thread looks for the next fault for
//! some microseconds before it sleeps, for as long as that pays, and gives way each time to whoever else wants to run.
//!
//! It does not pay where both share a processor. Then the one runs when the other sleeps, and nobody waits; and the
//! kernel would part two threads of which one never sleeps. That they share it shows by the fault being there as soon as
//! the thread has given way.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use r3map_sys::{Event, Fault, Pager, Woken};

/// How long to look: about as long as sleeping and waking up take.
const LOOK: Duration = Duration::from_micros(50);
/// After so many failures in a row it is tried once in 2¹⁰ times.
const MOST_FAILURES: u32 = 10;

/// How many faults are then waited for before it is looked again whether that is still so.
const TOGETHER: u32 = 63;

/// What one fault thread knows of the past.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// In a row.
    failures: u32,
    /// How often not to look.
    skip: u32,
}

impl Watch {
    /// As [`Pager::wait`]. `faults` holds those that were answered last: who has had none to answer does not look.
    pub(crate) fn wait(&mut self, pager: &Pager, stop: &Event, faults: &mut Vec<Fault>) -> io::Result<Woken> {
        match !faults.is_empty() && self.looks() && self.look(pager, stop, faults)? {
            true => Ok(Woken::Faults),
            false => pager.wait(stop, faults),
        }
    }

    fn looks(&mut self) -> bool {
        let looks = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        looks
    }

    /// Whether there were faults in time. None are looked for once `stop` is raised, however many there are.
    fn look(&mut self, pager: &Pager, stop: &Event, faults: &mut Vec<Fault>) -> io::Result<bool> {
        let (begun, mut first) = (Instant::now(), true);
        while !stop.is_raised() {
            thread::yield_now();
            pager.take(faults)?;
            if !faults.is_empty() {
                self.found(first);
                return Ok(true);
            }
            if begun.elapsed() >= LOOK {
                break;
            }
            first = false;
        }
        self.failures = (self.failures + 1).min(MOST_FAILURES);
        self.skip = 1 << self.failures;
        Ok(false)
    }

    fn found(&mut self, at_once: bool) {
        self.failures = 0;
        self.skip = if at_once { TOGETHER } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use r3map_sys::{Install, Mapping, PAGE_SIZE, Protection, ScopeWanted};

    use super::*;

    const PAGE: usize = 4096;

    fn mapping() -> Mapping {
        Mapping::new(2 * PAGE_SIZE, Protection::Tracked, ScopeWanted::Widest).unwrap()
    }

    /// As if it had just been answered.
    fn answered() -> Vec<Fault> {
        vec![Fault { offset: 0, write: false }]
    }

    /// Has another thread touch the second page, and calls `seek` until that fault is found.
    fn until_found(mapping: &Mapping, mut seek: impl FnMut(&Pager) -> Vec<Fault>) {
        let pager = mapping.pager();
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(black_box(mapping.as_slice())[PAGE], 9));
            let found = std::iter::repeat_with(|| seek(pager)).find(|faults| !faults.is_empty()).unwrap();
            assert_eq!(found, [Fault { offset: PAGE_SIZE, write: false }]);
            pager.install(PAGE_SIZE, &[9; PAGE], Install::Clean).unwrap();
        });
    }

    #[test]
    fn a_fault_is_found_by_looking() {
        let stop = Event::new().unwrap();
        until_found(&mapping(), |pager| {
            let (mut watch, mut faults) = (Watch { failures: 3, skip: 0 }, answered());
            let found = watch.look(pager, &stop, &mut faults).unwrap();
            assert_eq!((found, watch.failures), if faults.is_empty() { (false, 4) } else { (true, 0) });
            faults
        });
    }

    #[test]
    fn who_shares_a_processor_with_the_reader_does_not_look_for_a_while() {
        let mut watch = Watch { failures: 5, skip: 0 };
        watch.found(true);
        assert!((0..TOGETHER).all(|_| !watch.looks()));
        assert!(watch.looks(), "it may have changed");
        watch.found(false);
        assert!(watch.looks() && watch.failures == 0);
    }

    #[test]
    fn a_fault_is_waited_for_by_who_does_not_look() {
        let stop = Event::new().unwrap();
        until_found(&mapping(), |pager| {
            let (mut watch, mut faults) = (Watch { failures: 3, skip: 5 }, answered());
            assert_eq!(watch.wait(pager, &stop, &mut faults).unwrap(), Woken::Faults);
            assert_eq!((watch.failures, watch.skip), (3, 4));
            faults
        });
    }

    #[test]
    fn looking_in_vain_becomes_rare() {
        let (mapping, stop) = (mapping(), Event::new().unwrap());
        let (mut watch, mut looks) = (Watch::default(), 0);
        for _ in 0..5000 {
            if watch.looks() {
                assert!(!watch.look(mapping.pager(), &stop, &mut answered()).unwrap());
                looks += 1;
            }
        }
        assert_eq!(watch.failures, MOST_FAILURES);
        // After 2 + 4 + … + 1024 times it is each 1025th.
        assert_eq!(looks, 13);
    }

    /// Who looks for as long as there are faults would never stop.
    #[test]
    fn stopping_comes_before_faults() {
        let (mapping, stop) = (mapping(), Event::new().unwrap());
        stop.raise();
        until_found(&mapping, |pager| {
            let mut faults = answered();
            for _ in 0..100 {
                assert_eq!(Watch::default().wait(pager, &stop, &mut faults).unwrap(), Woken::Stopped);
                faults = answered();
            }
            pager.take(&mut faults).unwrap();
            faults
        });
    }
}
