//! Equal calls without a key, a pure table: who sends the same body for the same operator on the same route again
//! while the first is at work or in doubt has most likely lost an answer.
//!
//! Calls in flight and in doubt are remembered for the window. Those that succeeded are, too, where they are refused
//! (`without_key = "block"`); where they are only flagged, the oldest are forgotten beyond a bound.

use std::collections::{HashMap, VecDeque, hash_map::Entry};

use smallvec::SmallVec;
use uuid::Uuid;

use super::recent::Recent;
use crate::{audit::chain::Mark, config::WithoutKey};

/// So many calls that succeeded are remembered, to be flagged.
const MAX_DONE: usize = 32 * 1024;

type ByMark<T> = HashMap<Mark, T, foldhash::fast::RandomState>;

/// Times are in seconds since 1970.
pub(super) struct Twins {
    /// The calls at work; several of one mark only where they are but flagged.
    in_flight: ByMark<SmallVec<[Uuid; 1]>>,
    /// The youngest call in doubt of each mark, and since when.
    doubts: ByMark<(Uuid, u32)>,
    /// When a doubt began. It may have been replaced since.
    doubted: VecDeque<(u32, Mark)>,
    done: Recent,
    mode: WithoutKey,
    window: u32,
}

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Was {
    NotDone,
    Unknown,
    Done,
}

impl Twins {
    pub(super) fn new(mode: WithoutKey, window: u32) -> Self {
        let (in_flight, doubts, doubted, done) = <_>::default();
        Self { in_flight, doubts, doubted, done, mode, window }
    }

    /// A call wants to be sent. Returns an equal one that was sent before, if this one may go all the same;
    /// refuses with its id, if not.
    pub(super) fn begin(&mut self, mark: Mark, id: Uuid, now: u32) -> Result<Option<Uuid>, Uuid> {
        self.expire(now);
        let first = self.look(mark, now)?;
        self.in_flight.entry(mark).or_default().push(id);
        Ok(first)
    }

    /// What a call would come to.
    pub(super) fn look(&self, mark: Mark, now: u32) -> Result<Option<Uuid>, Uuid> {
        let (refuses_open, refuses_done) = match self.mode {
            WithoutKey::Guard => (true, false),
            WithoutKey::Block => (true, true),
            WithoutKey::Warn | WithoutKey::Off | WithoutKey::RequireKey => (false, false),
        };
        let counts = |since: u32| !is_old(since, now, self.window);
        let in_flight = self.in_flight.get(&mark).and_then(|calls| calls.last().copied());
        let doubt = || self.doubts.get(&mark).filter(|(_, since)| counts(*since)).map(|(id, _)| *id);
        if let Some(open) = in_flight.or_else(doubt) {
            return if refuses_open { Err(open) } else { Ok(Some(open)) };
        }
        match self.done.get(&mark).filter(|call| counts(call.since)) {
            Some(done) if refuses_done => Err(done.id),
            done => Ok(done.map(|done| done.id)),
        }
    }

    /// A call is over; also one that the trail tells of, which may be older than all that is known.
    pub(super) fn end(&mut self, mark: Mark, id: Uuid, was: Was, now: u32) {
        if matches!(self.mode, WithoutKey::Off | WithoutKey::RequireKey) {
            return; // nobody looks
        }
        if let Entry::Occupied(mut calls) = self.in_flight.entry(mark) {
            calls.get_mut().retain(|call| *call != id);
            if calls.get().is_empty() {
                calls.remove();
            }
        }
        match was {
            Was::NotDone => {}
            Was::Done => self.done.push(mark, id, now),
            Was::Unknown => {
                let doubt = self.doubts.entry(mark).or_insert((id, now));
                if doubt.1 <= now {
                    *doubt = (id, now);
                }
                self.doubted.push_back((now, mark));
            }
        }
    }

    fn expire(&mut self, now: u32) {
        let Self { doubts, doubted, done, window, mode, .. } = self;
        let is_old = |since: u32| is_old(since, now, *window);
        let max_done = if *mode == WithoutKey::Block { usize::MAX } else { MAX_DONE };
        while done.len() > max_done || done.oldest().is_some_and(|call| is_old(call.since)) {
            done.forget_oldest();
        }
        while let Some((_, mark)) = doubted.pop_front_if(|(since, _)| is_old(*since)) {
            if let Entry::Occupied(doubt) = doubts.entry(mark)
                && is_old(doubt.get().1)
            {
                doubt.remove();
            }
        }
    }
}

fn is_old(since: u32, now: u32, window: u32) -> bool {
    now.saturating_sub(since) > window
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = [7; 16];
    const WINDOW: u32 = 60;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn after(mode: WithoutKey, was: Option<Was>) -> Result<Option<Uuid>, Uuid> {
        let mut twins = Twins::new(mode, WINDOW);
        assert_eq!(twins.begin(MARK, id(1), 0), Ok(None));
        if let Some(was) = was {
            twins.end(MARK, id(1), was, 0);
        }
        assert_eq!(twins.begin([8; 16], id(2), 0), Ok(None), "another body");
        twins.begin(MARK, id(3), WINDOW)
    }

    #[test]
    fn each_mode_says_what_becomes_of_an_equal_call() {
        let (free, flagged, refused) = (Ok(None), Ok(Some(id(1))), Err(id(1)));
        for (mode, in_flight, unknown, done) in [
            (WithoutKey::Guard, refused, refused, flagged),
            (WithoutKey::Block, refused, refused, refused),
            (WithoutKey::Warn, flagged, flagged, flagged),
        ] {
            assert_eq!(after(mode, None), in_flight, "{mode:?}");
            assert_eq!(after(mode, Some(Was::Unknown)), unknown, "{mode:?}");
            assert_eq!(after(mode, Some(Was::Done)), done, "{mode:?}");
            assert_eq!(after(mode, Some(Was::NotDone)), free, "{mode:?}");
        }
    }

    #[test]
    fn a_call_that_was_not_sent_leaves_the_one_before_it() {
        let mut twins = Twins::new(WithoutKey::Guard, WINDOW);
        twins.begin(MARK, id(1), 0).unwrap();
        twins.end(MARK, id(1), Was::Done, 0);
        assert_eq!(twins.begin(MARK, id(2), 0), Ok(Some(id(1))));
        twins.end(MARK, id(2), Was::NotDone, 0);
        assert_eq!(twins.begin(MARK, id(3), 0), Ok(Some(id(1))));
    }

    #[test]
    fn where_they_are_refused_those_that_succeeded_are_not_forgotten() {
        let mut twins = Twins::new(WithoutKey::Block, WINDOW);
        for number in 0..=MAX_DONE as u128 + 1 {
            twins.begin(number.to_be_bytes(), id(number), 0).unwrap();
            twins.end(number.to_be_bytes(), id(number), Was::Done, 0);
        }
        assert_eq!(twins.begin([0; 16], id(9), WINDOW), Err(id(0)));
        assert_eq!(twins.begin([0; 16], id(9), WINDOW + 1), Ok(None));
    }

    #[test]
    fn the_window_ends() {
        let mut twins = Twins::new(WithoutKey::Guard, WINDOW);
        twins.begin(MARK, id(1), 0).unwrap();
        twins.end(MARK, id(1), Was::Unknown, 0);
        assert_eq!(twins.begin(MARK, id(2), WINDOW), Err(id(1)));
        assert_eq!(twins.begin(MARK, id(2), WINDOW + 1), Ok(None));
        assert_eq!(twins.begin(MARK, id(3), 10 * WINDOW), Err(id(2)), "in flight for as long as it takes");
    }

    #[test]
    fn what_the_trail_tells_of_an_older_one_shortens_no_window() {
        let mut twins = Twins::new(WithoutKey::Block, WINDOW);
        twins.begin(MARK, id(2), 50).unwrap();
        twins.end(MARK, id(2), Was::Done, 50);
        twins.end(MARK, id(1), Was::Done, 0); // read back from the trail, later
        assert_eq!(twins.begin(MARK, id(3), 50 + WINDOW), Err(id(2)));
        assert_eq!(twins.begin(MARK, id(3), 51 + WINDOW), Ok(None));
    }

    #[test]
    fn a_doubt_that_the_trail_tells_of_hides_no_younger_call() {
        for was in [None, Some(Was::Unknown)] {
            let mut twins = Twins::new(WithoutKey::Guard, WINDOW);
            twins.begin(MARK, id(2), 50).unwrap();
            if let Some(was) = was {
                twins.end(MARK, id(2), was, 50);
            }
            twins.end(MARK, id(1), Was::Unknown, 0); // read back from the trail, later
            assert_eq!(twins.begin(MARK, id(3), WINDOW + 1), Err(id(2)), "{was:?}");
            twins.end(MARK, id(2), Was::NotDone, WINDOW + 1);
            let left = if was.is_none() { Ok(None) } else { Err(id(2)) };
            assert_eq!(twins.begin(MARK, id(4), WINDOW + 1), left, "{was:?}");
        }
    }

    #[test]
    fn of_several_equal_calls_at_work_none_is_forgotten_and_none_stays() {
        let mut twins = Twins::new(WithoutKey::Warn, WINDOW);
        assert_eq!(twins.begin(MARK, id(1), 0), Ok(None));
        assert_eq!(twins.begin(MARK, id(2), 0), Ok(Some(id(1))));
        twins.end(MARK, id(1), Was::NotDone, 0);
        assert_eq!(twins.look(MARK, 0), Ok(Some(id(2))));
        twins.end(MARK, id(2), Was::NotDone, 0);
        assert_eq!(twins.look(MARK, 0), Ok(None));
        assert!(twins.in_flight.is_empty());
    }

    #[test]
    fn what_succeeded_may_be_forgotten_and_a_doubt_may_not() {
        let mut twins = Twins::new(WithoutKey::Guard, WINDOW);
        twins.begin([0; 16], id(0), 0).unwrap();
        twins.end([0; 16], id(0), Was::Unknown, 0);
        for number in 1..=2 * MAX_DONE as u128 {
            let mark = (number << 32).to_be_bytes();
            twins.begin(mark, id(number), 0).unwrap();
            twins.end(mark, id(number), Was::Done, 0);
        }
        assert!(twins.done.len() <= MAX_DONE + 1, "{}", twins.done.len());
        assert_eq!(twins.begin((1_u128 << 32).to_be_bytes(), id(1), 0), Ok(None));
        assert_eq!(twins.begin([0; 16], id(1), 0), Err(id(0)));
    }
}
