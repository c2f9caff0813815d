//! Who may have how much of what all connections share, so that nobody waits for one who does not give back what they
//! have: a client that never reads its answers, or sends a payload byte by byte.
//!
//! The more is taken, the less each may have: after taking something, one has at most a small part of what is then left,
//! unless all together have little. So one after another who takes what it can and keeps it takes less than the one before, and something is left for the
//! next. One who has nothing yet comes before those who have something: a first request may be longer, and while it
//! waits the others leave nearly all of what is left alone.
//!
//! So whoever takes little passes those who wait for more, again and again. That is why an eighth of all is given out
//! otherwise: to those who have nothing and ask for no more than that, in the order in which they came. Nobody waits longer
//! there than it takes those who came before to give back what they got.
//!
//! It counts, and wakes who waits; what the units stand for is the caller's business. Taking and giving back cost one
//! short lock each.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// What part of what is left one may have.
const PART: u32 = 8;
/// The same while another waits who has nothing: so little that it gets its turn among hundreds.
const SPARING: u32 = 64;
/// What part of what one alone cannot have has to be left by a first request that is longer than half of what is left.
const RESERVE: u32 = 4;

/// What part of all is given out in order.
const ORDERLY: u32 = 8;

/// So many units for all, and who waits for some.
#[derive(Debug)]
pub struct Fair {
    /// What whoever may have it takes.
    common: u32,
    /// What is given out in order.
    orderly: u32,
    /// The most that one may have.
    own: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of what is common.
    free: u32,
    /// Of what is given out in order.
    orderly: u32,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    account: Arc<Account>,
    wanted: u32,
    waker: Waker,
}

/// Of which units.
#[derive(Debug, Clone, Copy)]
enum Part {
    Common,
    Orderly,
}

#[derive(Debug)]
struct Account {
    fair: Arc<Fair>,
    /// The most that it may have.
    own: u32,
    /// All that it has. Changed under the lock only.
    held: AtomicU32,
    /// How much of that was given out in order. Changed under the lock only.
    orderly: AtomicU32,
}

/// One who takes units, one request at a time.
#[derive(Debug)]
pub struct Taker {
    account: Arc<Account>,
    /// What was asked for and not taken yet; once it is no longer waited for, it has been granted.
    asked: Option<u32>,
}

/// Units that were taken, given back when this is dropped.
#[derive(Debug)]
pub struct FairShare {
    account: Arc<Account>,
    units: u32,
}

impl Fair {
    /// So many units, of which one may have at most `own`. Whoever has nothing and asks for an eighth of all or less is
    /// served after a bounded number of others, if those who were served in order before give back what they got, and
    /// unless one may have nearly all. Nothing bounds how many of those who ask for little may pass one who asks for more.
    #[must_use]
    pub fn new(total: u32, own: u32) -> Arc<Self> {
        let orderly = match total / ORDERLY {
            part if own <= total - part => part,
            _ => 0,
        };
        let common = total - orderly;
        let state = Mutex::new(State { free: common, orderly, waiting: VecDeque::new() });
        Arc::new(Self { common, orderly, own: own.min(common), state })
    }

    /// For one who takes units.
    #[must_use]
    pub fn taker(self: &Arc<Self>) -> Taker {
        self.taker_of(self.own)
    }

    /// For one who may have more than others, or less.
    #[must_use]
    pub fn taker_of(self: &Arc<Self>, own: u32) -> Taker {
        let (held, orderly) = (AtomicU32::new(0), AtomicU32::new(0));
        let account = Account { fair: self.clone(), own: own.min(self.common), held, orderly };
        Taker { account: Arc::new(account), asked: None }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fits(&self, state: &State, account: &Account, wanted: u32) -> bool {
        let Some(left) = state.free.checked_sub(wanted) else { return false };
        let after = account.held() + wanted;
        // What is left when this one has all that it may have.
        let others = self.common - account.own;
        let fair = match account.held() {
            // Without the reserve, what is longer than half of all would wait for ever.
            0 => after <= left || left >= others / RESERVE,
            _ if state.waiting.iter().any(|other| other.account.held() == 0) => after <= left / SPARING,
            // What all together have is no more than one alone may have.
            _ if left >= others => true,
            _ => after <= left / PART,
        };
        fair && after <= account.own
    }

    /// Whether one may wait for its turn.
    fn is_in_order(&self, account: &Account, wanted: u32) -> bool {
        account.held() == 0 && wanted <= self.orderly
    }

    /// Whose turn it is, if there is enough for that one: nobody behind it is asked before.
    fn next_in_order(&self, state: &State) -> Option<usize> {
        let index = state.waiting.iter().position(|next| self.is_in_order(&next.account, next.wanted))?;
        (state.waiting[index].wanted <= state.orderly).then_some(index)
    }

    /// Where to take what is asked for now, by one that does not wait yet.
    fn part_for(&self, state: &State, account: &Account, wanted: u32) -> Option<Part> {
        if self.fits(state, account, wanted) {
            return Some(Part::Common);
        }
        let first = || !state.waiting.iter().any(|other| self.is_in_order(&other.account, other.wanted));
        let turn = wanted <= state.orderly && self.is_in_order(account, wanted) && first();
        turn.then_some(Part::Orderly)
    }

    /// Takes what `change` gives back, grants what then can be granted, and wakes who got something.
    fn give_back(&self, change: impl FnOnce(&mut State)) {
        let mut woken = Vec::new();
        let mut state = self.lock();
        change(&mut state);
        // From the beginning after each: the last one that had nothing may have been what others had to wait for.
        loop {
            let position = state.waiting.iter().position(|next| self.fits(&state, &next.account, next.wanted));
            let (part, index) = match position {
                Some(index) => (Part::Common, index),
                None => match self.next_in_order(&state) {
                    Some(index) => (Part::Orderly, index),
                    None => break,
                },
            };
            let Some(next) = state.waiting.remove(index) else { break };
            next.account.take(&mut state, next.wanted, part);
            woken.push(next.waker);
        }
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl Account {
    fn held(&self) -> u32 {
        self.held.load(Ordering::Relaxed)
    }

    fn take(&self, state: &mut State, units: u32, part: Part) {
        match part {
            Part::Common => state.free -= units,
            Part::Orderly => {
                state.orderly -= units;
                // It had nothing.
                self.orderly.store(units, Ordering::Relaxed);
            }
        }
        self.held.store(self.held() + units, Ordering::Relaxed);
    }

    /// What was given out in order comes back first, whatever it is that is given back: others wait for it.
    fn give_back(&self, state: &mut State, units: u32) {
        let orderly = self.orderly.load(Ordering::Relaxed);
        let returned = orderly.min(units);
        state.orderly += returned;
        state.free += units - returned;
        self.orderly.store(orderly - returned, Ordering::Relaxed);
        self.held.store(self.held() - units, Ordering::Relaxed);
    }
}

impl State {
    fn position(&self, account: &Arc<Account>) -> Option<usize> {
        self.waiting.iter().position(|other| Arc::ptr_eq(&other.account, account))
    }
}

impl Taker {
    /// Takes so many units, or as many as one may have.
    ///
    /// # Cancellation
    /// What was waited for is not taken.
    pub async fn take(&mut self, wanted: u32) -> FairShare {
        let taking = &mut Taking(self);
        poll_fn(|context| taking.0.poll_take(context, wanted)).await
    }

    /// The same by polling: ask for the same again until it is ready.
    pub fn poll_take(&mut self, context: &mut Context<'_>, wanted: u32) -> Poll<FairShare> {
        let fair = &self.account.fair;
        let mut state = fair.lock();
        if let Some(units) = self.asked {
            if let Some(index) = state.position(&self.account) {
                state.waiting[index].waker.clone_from(context.waker());
                return Poll::Pending;
            }
            self.asked = None;
            return Poll::Ready(FairShare { account: self.account.clone(), units });
        }
        let units = wanted.min(self.account.own);
        if let Some(part) = fair.part_for(&state, &self.account, units) {
            self.account.take(&mut state, units, part);
            return Poll::Ready(FairShare { account: self.account.clone(), units });
        }
        let (account, waker) = (self.account.clone(), context.waker().clone());
        state.waiting.push_back(Waiting { account, wanted: units, waker });
        self.asked = Some(units);
        Poll::Pending
    }

    /// Waits no longer, and gives back what was granted meanwhile.
    fn forget(&mut self) {
        let Some(units) = self.asked.take() else { return };
        self.account.fair.give_back(|state| match state.position(&self.account) {
            Some(index) => drop(state.waiting.remove(index)),
            None => self.account.give_back(state, units),
        });
    }
}

impl Drop for Taker {
    fn drop(&mut self) {
        self.forget();
    }
}

/// Forgets what is being waited for when it is dropped.
struct Taking<'a>(&'a mut Taker);

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.forget();
    }
}

impl Drop for FairShare {
    fn drop(&mut self) {
        self.account.fair.give_back(|state| self.account.give_back(state, self.units));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// In the units of the server: the most that it takes by default, at 4 KiB.
    const TOTAL: u32 = 512 << 8;
    const OWN: u32 = 64 << 8;
    const MIB: u32 = 1 << 8;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn take(taker: &mut Taker, wanted: u32) -> Option<FairShare> {
        match taker.poll_take(&mut Context::from_waker(Waker::noop()), wanted) {
            Poll::Ready(taken) => Some(taken),
            Poll::Pending => None,
        }
    }

    /// Takers that take requests of so much until they get no more, and keep them.
    fn hogs(fair: &Arc<Fair>, count: usize, wanted: u32) -> Vec<(Taker, Vec<FairShare>)> {
        (0..count).map(|_| all_of(fair.taker(), wanted)).collect()
    }

    fn all_of(mut taker: Taker, wanted: u32) -> (Taker, Vec<FairShare>) {
        let taken = std::iter::from_fn(|| take(&mut taker, wanted)).collect();
        (taker, taken)
    }

    #[test]
    fn who_gives_nothing_back_leaves_something_for_everybody_else() {
        for (count, wanted) in [(1, MIB), (8, MIB), (40, MIB), (40, 1), (100, 32 * MIB)] {
            let fair = Fair::new(TOTAL, OWN);
            let hogs = hogs(&fair, count, wanted);
            let most = hogs.iter().map(|(_, taken)| taken.iter().map(|taken| taken.units).sum::<u32>()).max().unwrap();
            assert!(most <= OWN, "{count} × {wanted}");
            let mut other = fair.taker();
            for _ in 0..100 {
                let taken = take(&mut other, MIB).unwrap_or_else(|| panic!("{count} × {wanted} are in the way"));
                drop(taken);
            }
        }
    }

    #[test]
    fn one_alone_may_have_all_that_one_may_have_and_the_next_ones_hardly_less() {
        let hogs = hogs(&Fair::new(TOTAL, OWN), 4, MIB);
        assert_eq!(hogs.iter().map(|(_, taken)| taken.len()).collect::<Vec<_>>(), [64, 42, 38, 33]);
        for total in [OWN, OWN * 100] {
            assert_eq!(all_of(Fair::new(total, OWN).taker(), MIB).1.len(), 64);
        }
    }

    #[test]
    fn a_long_request_gets_its_turn_among_many_that_never_rest() {
        for (total, own, wanted, others) in
            [(TOTAL, 2 * OWN, 80 * MIB, 250), (TOTAL, 2 * OWN, 2 * OWN, 250), (64, 32, 32, 8)]
        {
            let fair = Fair::new(total, own);
            assert!(wanted > fair.orderly, "it waits for its turn among all");
            let mut others = hogs(&fair, others, 1);
            let mut long = fair.taker();
            let mut got = take(&mut long, wanted);
            assert!(got.is_none(), "they are in its way at first");
            // Each of them gives back what it had, part by part, and asks again at once.
            for _ in 0..total {
                for (taker, taken) in &mut others {
                    if !taken.is_empty() {
                        taken.swap_remove(0);
                    }
                    taken.extend(take(taker, 1));
                }
                got = take(&mut long, wanted);
                if got.is_some() {
                    break;
                }
            }
            assert!(got.is_some(), "{wanted} of {total}");
        }
    }

    /// Clients that have one request in progress each, and ask for the next at once: the short ones could take whatever
    /// comes back before there is enough for a long one.
    #[test]
    fn everybody_is_served_after_a_bounded_number_of_others() {
        for (clients, short) in [(300, MIB), (300, 2 * MIB), (600, MIB)] {
            let fair = Fair::new(TOTAL, OWN);
            let woken: Vec<_> = (0..clients).map(|_| Arc::new(Woken::default())).collect();
            let mut takers: Vec<_> = (0..clients).map(|_| fair.taker()).collect();
            let mut ask = |client: usize| {
                let wanted = if client % 100 == 99 { 32 * MIB } else { short };
                let waker = woken[client].clone().into();
                match takers[client].poll_take(&mut Context::from_waker(&waker), wanted) {
                    Poll::Ready(taken) => Some(taken),
                    Poll::Pending => None,
                }
            };
            // How many had been served when each began to wait; who has something, and what.
            let (mut since, mut holding) = (vec![0; clients], VecDeque::new());
            let (mut served, mut longest) = (0, 0);
            let mut ready: Vec<_> = (0..clients).collect();
            for _ in 0..20 * clients {
                for client in ready {
                    let Some(taken) = ask(client) else { continue };
                    served += 1;
                    longest = longest.max(served - since[client]);
                    holding.push_back((client, taken));
                }
                let (client, taken) = holding.pop_front().expect("somebody always has something");
                since[client] = served;
                drop(taken);
                // Before anybody who waits has time to: as on a server that reads on at once.
                ready = std::iter::once(client).collect();
                ready.extend((0..clients).filter(|&other| woken[other].0.swap(0, Ordering::Relaxed) > 0));
            }
            let waiting = (0..clients).filter(|client| !holding.iter().any(|(other, _)| other == client));
            let oldest = waiting.map(|client| served - since[client]).max().unwrap_or(0);
            assert!(longest.max(oldest) <= 4 * clients, "{clients} × {short}: {longest}, {oldest}");
        }
    }

    #[test]
    fn what_was_granted_and_not_fetched_is_given_back() {
        let fair = Fair::new(2, 2);
        let (mut first, mut second, mut third) = (fair.taker(), fair.taker(), fair.taker());
        let held = take(&mut first, 2);
        assert!(take(&mut second, 2).is_none() && take(&mut third, 2).is_none());
        drop(held);
        drop(second);
        assert!(take(&mut third, 2).is_some());
    }

    #[test]
    fn who_gives_up_waiting_gets_what_it_asks_for_next() {
        let fair = Fair::new(4, 4);
        let (mut first, mut second) = (fair.taker(), fair.taker());
        let held = take(&mut first, 4);
        assert!(second.take(4).now_or_never().is_none());
        assert!(take(&mut second, 3).is_none());
        drop(held);
        let later = take(&mut second, 3).expect("there is room");
        assert_eq!(later.units, 3);
        drop(later);
        let held = take(&mut first, 4);
        let mut waiting = Box::pin(second.take(4));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(held);
        drop(waiting);
        assert_eq!(fair.lock().free, 4, "what was granted is given back");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(usize, u32),
        GiveBack(usize, usize),
        Leave(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..6usize, 1..20u32).prop_map(|(who, units)| Step::Ask(who, units)),
            4 => (0..6usize, any::<usize>()).prop_map(|(who, which)| Step::GiveBack(who, which)),
            1 => (0..6usize).prop_map(Step::Leave),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nobody_waits_for_what_they_may_have(
            total in 1..64u32,
            own in 1..64u32,
            steps in prop::collection::vec(step(), 1..200),
        ) {
            let fair = Fair::new(total, own);
            let woken: Vec<_> = (0..6).map(|_| Arc::new(Woken::default())).collect();
            let mut takers: Vec<_> = (0..6).map(|_| (fair.taker(), Vec::new())).collect();
            for step in steps {
                let before: Vec<_> = takers.iter().map(|(taker, _)| fair.lock().position(&taker.account)).collect();
                let counts: Vec<_> = woken.iter().map(|woken| woken.0.load(Ordering::Relaxed)).collect();
                match step {
                    Step::Ask(who, units) => {
                        let (taker, taken) = &mut takers[who];
                        let waker = woken[who].clone().into();
                        let units = taker.asked.unwrap_or(units);
                        if let Poll::Ready(got) = taker.poll_take(&mut Context::from_waker(&waker), units) {
                            taken.push(got);
                        }
                    }
                    Step::GiveBack(who, which) => {
                        let taken = &mut takers[who].1;
                        if !taken.is_empty() {
                            taken.swap_remove(which % taken.len());
                        }
                    }
                    Step::Leave(who) => takers[who].0 = fair.taker(),
                }
                let state = fair.lock();
                let held: u32 = takers.iter().map(|(taker, _)| taker.account.held()).sum();
                let left_behind: u32 = takers
                    .iter()
                    .flat_map(|(taker, taken)| taken.iter().filter(|taken| !Arc::ptr_eq(&taken.account, &taker.account)))
                    .map(|taken| taken.units)
                    .sum();
                prop_assert_eq!(state.free + state.orderly + held + left_behind, total);
                prop_assert!(takers.iter().all(|(taker, _)| taker.account.held() <= fair.own));
                prop_assert!(state.waiting.iter().all(|next| !fair.fits(&state, &next.account, next.wanted)));
                prop_assert_eq!(fair.next_in_order(&state), None);
                for (who, (taker, _)) in takers.iter().enumerate() {
                    let granted = before[who].is_some() && state.position(&taker.account).is_none();
                    let left = taker.asked.is_none();
                    prop_assert!(!granted || left || woken[who].0.load(Ordering::Relaxed) > counts[who]);
                }
            }
            for (_, taken) in &mut takers {
                taken.clear();
            }
            // With nobody holding anything but what was granted, everybody gets their turn.
            for _ in 0..takers.len() {
                for (taker, _) in &mut takers {
                    if let Some(units) = taker.asked {
                        drop(take(taker, units));
                    }
                }
            }
            prop_assert!(takers.iter().all(|(taker, _)| taker.asked.is_none()));
            let state = fair.lock();
            prop_assert_eq!((state.free, state.orderly), (fair.common, fair.orderly));
        }
    }
}
