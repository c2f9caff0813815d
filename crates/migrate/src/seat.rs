//! Who owns the regions on this side, and what a call means now: the states of the [protocol](crate::protocol), and
//! nothing else. No I/O, no clock; whoever drives it does what it says and tells how that ended.

use std::collections::VecDeque;

use r3map_core::{Error, ErrorKind, Operation, Result};

use crate::Standing;
use crate::protocol::{Handover, MigrationId, check_epoch};

/// How many migrations are remembered that came to nothing.
const REMEMBERED: usize = 64;

/// The seeder's place in the protocol.
#[derive(Debug)]
pub(crate) struct Seat {
    epoch: u64,
    state: State,
    /// Migrations for which recording has ended. It does not begin again, for who believes that it never ended.
    ended: VecDeque<MigrationId>,
    /// The migration from which the regions were taken back last.
    revoked: Option<MigrationId>,
    /// The migration that was recorded for last.
    last: MigrationId,
}

#[derive(Debug, Clone)]
enum State {
    Owner,
    Tracked { id: MigrationId, rounds: u64, leased: bool },
    HandedOver { id: MigrationId, answer: Handover },
    Gone { id: MigrationId },
}

/// What `track` means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Track {
    /// Start recording, whatever was recorded for another.
    Start,
    /// It is being recorded already.
    Already,
}

/// What `dirty` means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Dirty {
    /// Take a new record; the last one has arrived.
    Next,
    /// Give the last one again.
    Again,
}

/// What `finalize` means.
#[derive(Debug, PartialEq)]
pub(crate) enum Finalize {
    /// Suspend, flush, fence and take the last record.
    Start {
        /// The last numbered record has arrived and need not be part of the answer.
        received: bool,
    },
    /// It was done before: this was the answer.
    Again(Handover),
}

/// What `confirm` means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Confirm {
    /// The regions have gone.
    Gone,
    /// That is known already.
    Already,
}

/// What `abort` means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Abort {
    /// Nothing is being done for this leecher.
    Nothing,
    /// Stop recording.
    Untrack,
    /// The regions come back: lift the fence and resume.
    TakeBack,
}

impl Seat {
    /// A seat that owns its regions since `epoch`, or as it was when the process ended.
    ///
    /// # Errors
    /// `Conflict` where the regions are not this side's to seed; `Corrupt` for an epoch that cannot be.
    pub(crate) fn new(epoch: u64, standing: Option<Standing>) -> Result<Self> {
        let mut revoked = None;
        let (epoch, state) = match standing {
            None => (epoch, State::Owner),
            Some(Standing::Owner { epoch: since, revoked: from }) => {
                revoked = from;
                (epoch.max(since), State::Owner)
            }
            Some(Standing::HandedOver { id, epoch, dirty }) => {
                let answer = Handover { epoch, dirty, ..Handover::default() };
                (epoch, State::HandedOver { id, answer })
            }
            Some(Standing::Gone { id, epoch }) => (epoch, State::Gone { id }),
            Some(Standing::Pulling { .. } | Standing::Asking { .. } | Standing::Arrived { .. }) => {
                return Err(conflict("the region has not arrived here as a whole: go on leeching it"));
            }
        };
        check_epoch(epoch)?;
        Ok(Self { epoch, state, ended: VecDeque::new(), revoked, last: MigrationId::NONE })
    }

    /// The same in another state.
    fn changed(&self, epoch: u64, state: State) -> Self {
        Self { epoch, state, ended: self.ended.clone(), ..*self }
    }

    /// The epoch of the present owner.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Who had the regions before they were taken back.
    pub(crate) fn revoked(&self) -> Option<MigrationId> {
        self.revoked
    }

    /// Whether the application here may write.
    pub(crate) fn owns(&self) -> bool {
        matches!(self.state, State::Owner | State::Tracked { .. })
    }

    /// Whether the leecher has everything.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone { .. })
    }

    pub(crate) fn is_tracked(&self) -> bool {
        matches!(self.state, State::Tracked { .. })
    }

    /// Whether a leecher's silence may end the recording for it.
    pub(crate) fn is_leased(&self, id: MigrationId) -> bool {
        matches!(self.state, State::Tracked { id: now, leased: true, .. } if now == id)
    }

    /// What is to be written down of this.
    pub(crate) fn standing(&self) -> Standing {
        match &self.state {
            State::Owner | State::Tracked { .. } => Standing::Owner { epoch: self.epoch, revoked: self.revoked },
            State::HandedOver { id, answer } => {
                Standing::HandedOver { id: *id, epoch: self.epoch, dirty: answer.dirty.clone() }
            }
            State::Gone { id } => Standing::Gone { id: *id, epoch: self.epoch },
        }
    }

    /// Without a lease a name may come again: all leechers in Go have the same one. `after` is for whom was recorded last as
    /// far as the leecher knows, if it says that.
    pub(crate) fn track(&self, id: MigrationId, leased: bool, after: Option<MigrationId>) -> Result<Track> {
        match &self.state {
            State::Owner | State::Tracked { .. } if leased && self.ended.contains(&id) => Err(over()),
            // Not anew: a call that comes late must not empty a record that the leecher counts on.
            State::Tracked { id: now, .. } if *now == id => Ok(Track::Already),
            // Nor one that is kept for somebody who came later.
            State::Owner | State::Tracked { .. } if after.is_some_and(|after| after != self.last) => Err(overtaken()),
            State::Owner | State::Tracked { .. } => Ok(Track::Start),
            State::HandedOver { .. } | State::Gone { .. } => Err(self.elsewhere()),
        }
    }

    pub(crate) fn tracked(&mut self, id: MigrationId, leased: bool) {
        self.untracked();
        (self.state, self.last) = (State::Tracked { id, rounds: 0, leased }, id);
    }

    /// Nobody is recorded for any more.
    pub(crate) fn untracked(&mut self) {
        if let State::Tracked { id, .. } = self.state {
            self.state = State::Owner;
            self.end(id);
        }
    }

    fn end(&mut self, id: MigrationId) {
        if self.ended.len() == REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(id);
    }

    pub(crate) fn dirty(&self, id: MigrationId, round: u64) -> Result<Dirty> {
        match self.rounds(id)? {
            rounds if round == rounds + 1 => Ok(Dirty::Next),
            rounds if round == rounds && round > 0 => Ok(Dirty::Again),
            rounds => Err(conflict(format!("record {round} is asked for after record {rounds}"))),
        }
    }

    pub(crate) fn took(&mut self) {
        if let State::Tracked { rounds, .. } = &mut self.state {
            *rounds += 1;
        }
    }

    pub(crate) fn finalize(&self, id: MigrationId, received: u64) -> Result<Finalize> {
        if let State::HandedOver { id: to, answer } = &self.state
            && *to == id
        {
            return Ok(Finalize::Again(answer.clone()));
        }
        match self.rounds(id)? {
            rounds if received == rounds => Ok(Finalize::Start { received: true }),
            rounds if received.checked_add(1) == Some(rounds) => Ok(Finalize::Start { received: false }),
            rounds => Err(conflict(format!("{received} of {rounds} records have arrived, which cannot be"))),
        }
    }

    /// The regions change hands with this answer, which begins the next epoch.
    pub(crate) fn handed_over(&self, id: MigrationId, mut answer: Handover) -> Self {
        answer.epoch = self.epoch + 1;
        self.changed(answer.epoch, State::HandedOver { id, answer })
    }

    pub(crate) fn confirm(&self, id: MigrationId) -> Result<Confirm> {
        match &self.state {
            State::HandedOver { id: to, .. } if *to == id => Ok(Confirm::Gone),
            State::Gone { id: to } if *to == id => Ok(Confirm::Already),
            _ if self.revoked == Some(id) => Err(revoked()),
            _ => Err(conflict("the region was not handed over for this migration")),
        }
    }

    pub(crate) fn gone(&self, id: MigrationId) -> Self {
        self.changed(self.epoch, State::Gone { id })
    }

    pub(crate) fn abort(&self, id: MigrationId) -> Result<Abort> {
        match &self.state {
            State::Tracked { id: now, .. } if *now == id => Ok(Abort::Untrack),
            State::Owner | State::Tracked { .. } => Ok(Abort::Nothing),
            State::HandedOver { id: to, .. } if *to == id => Ok(Abort::TakeBack),
            State::HandedOver { .. } | State::Gone { .. } => Err(self.elsewhere()),
        }
    }

    /// The same with the regions back, in an epoch that the leecher never had.
    pub(crate) fn taken_back(&self) -> Self {
        let mut back = self.changed(self.epoch + 1, State::Owner);
        if let State::HandedOver { id, .. } = self.state {
            back.end(id);
            back.revoked = Some(id);
        }
        back
    }

    /// How many records were taken for `id`.
    fn rounds(&self, id: MigrationId) -> Result<u64> {
        match &self.state {
            State::Tracked { id: now, rounds, .. } if *now == id => Ok(*rounds),
            State::Owner | State::Tracked { .. } => Err(over()),
            State::HandedOver { .. } | State::Gone { .. } => Err(self.elsewhere()),
        }
    }

    /// What is answered to whoever is not the one who has them.
    pub(crate) fn elsewhere(&self) -> Error {
        conflict(format!("the region was handed over (epoch {}): it is somewhere else now", self.epoch))
    }
}

fn over() -> Error {
    conflict(
        "nothing is recorded for this migration any more (the leecher was silent for too long, another one came, or the \
         seeder was started anew): start again",
    )
}

fn overtaken() -> Error {
    conflict("another leecher has come since this one looked: look again")
}

/// What is answered to whoever has the regions no more.
pub(crate) fn revoked() -> Error {
    conflict("the region was taken back here: whoever it was handed over to must not use it any more")
}

fn conflict(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Conflict, Operation::Open, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MigrationId = MigrationId([1; 16]);
    const B: MigrationId = MigrationId([2; 16]);

    fn seat() -> Seat {
        Seat::new(7, None).unwrap()
    }

    fn tracked(rounds: u64) -> Seat {
        let mut seat = seat();
        seat.tracked(A, true);
        (0..rounds).for_each(|_| seat.took());
        seat
    }

    fn handed() -> Seat {
        tracked(0).handed_over(A, Handover::default())
    }

    #[test]
    fn records_are_numbered_and_the_last_one_can_be_asked_for_again() {
        let seat = tracked(2);
        assert_eq!(seat.dirty(A, 3).unwrap(), Dirty::Next);
        assert_eq!(seat.dirty(A, 2).unwrap(), Dirty::Again);
        for round in [0, 1, 4] {
            assert!(seat.dirty(A, round).is_err(), "{round}");
        }
        assert!(tracked(0).dirty(A, 0).is_err());
        assert!(seat.dirty(B, 3).is_err());
    }

    #[test]
    fn a_late_track_empties_nothing_and_a_new_leecher_takes_over() {
        let mut seat = tracked(2);
        assert_eq!(seat.track(A, true, None).unwrap(), Track::Already);
        assert_eq!(seat.track(B, true, Some(A)).unwrap(), Track::Start);
        seat.tracked(B, true);
        assert!(seat.dirty(A, 3).is_err() && seat.finalize(A, 2).is_err());
        assert_eq!(seat.abort(A).unwrap(), Abort::Nothing, "the one who was replaced");
        assert!(seat.track(A, true, None).is_err(), "a call that comes late takes nothing over again");
    }

    #[test]
    fn a_late_track_replaces_nobody_who_came_later() {
        let mut seat = seat();
        let (late, never) = (MigrationId([3; 16]), MigrationId([4; 16]));
        seat.tracked(A, true);
        assert_eq!(seat.track(A, true, Some(MigrationId::NONE)).unwrap(), Track::Already, "it is asked again");
        for after in [MigrationId::NONE, B] {
            assert_eq!(seat.track(late, true, Some(after)).unwrap_err().kind(), ErrorKind::Conflict);
        }
        assert_eq!(seat.track(late, true, None).unwrap(), Track::Start, "it does not say what it knew");
        seat.untracked();
        assert!(seat.track(late, true, Some(MigrationId::NONE)).is_err());
        assert_eq!(seat.track(late, true, Some(A)).unwrap(), Track::Start);
        let seat = handed().taken_back();
        assert!(seat.track(never, true, Some(MigrationId::NONE)).is_err());
    }

    #[test]
    fn finalize_is_answered_again_and_only_to_whom_it_was_answered() {
        let seat = tracked(2);
        assert_eq!(seat.finalize(A, 2).unwrap(), Finalize::Start { received: true });
        assert_eq!(seat.finalize(A, 1).unwrap(), Finalize::Start { received: false });
        assert!(seat.finalize(A, 0).is_err() && seat.finalize(A, 3).is_err() && seat.finalize(B, 2).is_err());
        let seat = seat.handed_over(A, Handover::default());
        assert!(!seat.owns());
        let Finalize::Again(answer) = seat.finalize(A, 0).unwrap() else { panic!("it was done") };
        assert_eq!((answer.epoch, seat.epoch()), (8, 8));
        for refused in
            [seat.finalize(B, 0).err(), seat.track(A, true, None).err(), seat.dirty(A, 1).err(), seat.confirm(B).err()]
        {
            assert_eq!(refused.unwrap().kind(), ErrorKind::Conflict);
        }
    }

    #[test]
    fn what_comes_after_an_abort_or_a_confirm_changes_nothing() {
        assert_eq!(tracked(1).abort(A).unwrap(), Abort::Untrack);
        assert_eq!(handed().abort(A).unwrap(), Abort::TakeBack);
        assert!(handed().abort(B).is_err());
        let back = handed().taken_back();
        assert!(back.owns() && back.epoch() > handed().epoch());
        assert_eq!((handed().revoked(), back.revoked()), (None, Some(A)));
        assert!(back.finalize(A, 0).is_err() && back.confirm(A).is_err());
        assert_eq!(handed().confirm(A).unwrap(), Confirm::Gone);
        let gone = handed().gone(A);
        assert_eq!(gone.confirm(A).unwrap(), Confirm::Already);
        assert!(gone.abort(A).is_err() && gone.finalize(A, 0).is_err() && gone.track(B, true, None).is_err());
    }

    #[test]
    fn what_has_ended_does_not_begin_again() {
        let mut seat = tracked(0);
        assert!(seat.is_leased(A) && !seat.is_leased(B));
        seat.untracked();
        assert!(seat.dirty(A, 1).is_err() && seat.finalize(A, 0).is_err());
        let late = seat.track(A, true, None).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Conflict, "there is a gap in what would be recorded for it: {late}");
        assert!(handed().taken_back().track(A, true, None).is_err());
        assert_eq!(seat.track(A, false, None).unwrap(), Track::Start, "all leechers in Go are called the same");
        seat.tracked(A, false);
        assert!(!seat.is_leased(A));
        for id in 0..100 {
            seat.tracked(MigrationId([id; 16]), true);
        }
        assert_eq!(seat.ended.len(), REMEMBERED);
        assert!(seat.track(MigrationId([98; 16]), true, None).is_err());
    }

    #[test]
    fn a_restart_goes_on_where_it_was() {
        for seat in [seat(), tracked(3), handed(), handed().gone(A), handed().taken_back()] {
            let again = Seat::new(0, Some(seat.standing())).unwrap();
            assert_eq!((again.standing(), again.owns()), (seat.standing(), seat.owns()));
            assert_eq!(again.revoked(), seat.revoked());
        }
        for coming in [Standing::Pulling { id: A, rounds: 3 }, Standing::Asking { id: A, rounds: 3 }] {
            assert!(Seat::new(0, Some(coming)).is_err());
        }
    }
}
