//! Equal calls without a key, a pure table: who sends the same body for the same operator on the same route again
//! while the first is at work or in doubt has most likely lost an answer.
//!
//! Calls in flight and in doubt are remembered for the window. Those that succeeded are, too, where they are refused
//! (`without_key = "block"`); where they are only flagged, the oldest are forgotten beyond a bound.

use std::collections::{HashMap, VecDeque, hash_map::Entry};

use uuid::Uuid;

use crate::{audit::chain::Mark, config::WithoutKey};

/// So many calls that succeeded are remembered, to be flagged.
const MAX_DONE: usize = 32 * 1024;

/// Times are in seconds since 1970.
pub(super) struct Twins {
    seen: HashMap<Mark, Twin, foldhash::fast::RandomState>,
    done: VecDeque<(u32, Mark)>,
    unknown: VecDeque<(u32, Mark)>,
    mode: WithoutKey,
    window: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Twin {
    id: Uuid,
    since: u32,
    state: State,
    /// An earlier one, while this is in flight: (id, since, state).
    before: Option<(Uuid, u32, State)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    InFlight,
    Unknown,
    Done,
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
        Self { seen: HashMap::default(), done: VecDeque::new(), unknown: VecDeque::new(), mode, window }
    }

    /// A call wants to be sent. Returns an equal one that was sent before, if this one may go all the same;
    /// refuses with its id, if not.
    pub(super) fn begin(&mut self, mark: Mark, id: Uuid, now: u32) -> Result<Option<Uuid>, Uuid> {
        self.expire(now);
        let mine = Twin { id, since: now, state: State::InFlight, before: None };
        let first = self.seen.insert(mark, mine);
        let Some(first) = first.filter(|twin| twin.counts(now, self.window)) else { return Ok(None) };
        if self.refuses(&first) {
            self.seen.insert(mark, first);
            return Err(first.id);
        }
        let before = Some((first.id, first.since, first.state));
        self.seen.insert(mark, Twin { before, ..mine });
        Ok(Some(first.id))
    }

    /// What a call would come to.
    pub(super) fn look(&self, mark: Mark, now: u32) -> Result<Option<Uuid>, Uuid> {
        match self.seen.get(&mark).filter(|twin| twin.counts(now, self.window)) {
            Some(first) if self.refuses(first) => Err(first.id),
            first => Ok(first.map(|first| first.id)),
        }
    }

    fn refuses(&self, first: &Twin) -> bool {
        match (self.mode, first.state) {
            (WithoutKey::Block, _) | (WithoutKey::Guard, State::InFlight | State::Unknown) => true,
            (WithoutKey::Guard, State::Done) => false,
            (WithoutKey::Warn | WithoutKey::Off | WithoutKey::RequireKey, _) => false,
        }
    }

    pub(super) fn end(&mut self, mark: Mark, id: Uuid, was: Was, now: u32) {
        if matches!(self.mode, WithoutKey::Off | WithoutKey::RequireKey) {
            return; // nobody looks
        }
        let over = |state| Twin { id, since: now, state, before: None };
        let twin = match self.seen.entry(mark) {
            Entry::Occupied(place) if place.get().id == id || was == Was::Unknown => place,
            Entry::Occupied(_) => return,
            Entry::Vacant(_) if was == Was::NotDone => return,
            Entry::Vacant(place) => place.insert_entry(over(State::InFlight)),
        };
        match (was, twin.get().before) {
            (Was::Unknown, _) => {
                *twin.into_mut() = over(State::Unknown);
                self.unknown.push_back((now, mark));
            }
            (Was::Done, _) => {
                *twin.into_mut() = over(State::Done);
                self.done.push_back((now, mark));
            }
            (Was::NotDone, None) => drop(twin.remove()),
            (Was::NotDone, Some((id, since, state))) => {
                *twin.into_mut() = Twin { id, since, state, before: None };
            }
        }
    }

    fn expire(&mut self, now: u32) {
        let Self { seen, done, unknown, window, mode } = self;
        let is_old = |since: u32| is_old(since, now, *window);
        let max_done = if *mode == WithoutKey::Block { usize::MAX } else { MAX_DONE };
        let mut forget = |(since, mark): (u32, Mark)| {
            if seen.get(&mark).is_some_and(|twin| twin.since == since && twin.state != State::InFlight) {
                seen.remove(&mark);
            }
        };
        while done.len() > max_done || done.front().is_some_and(|(since, _)| is_old(*since)) {
            done.pop_front().into_iter().for_each(&mut forget);
        }
        while unknown.front().is_some_and(|(since, _)| is_old(*since)) {
            unknown.pop_front().into_iter().for_each(&mut forget);
        }
    }
}

impl Twin {
    fn counts(&self, now: u32, window: u32) -> bool {
        self.state == State::InFlight || !is_old(self.since, now, window)
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
    fn what_succeeded_may_be_forgotten_and_a_doubt_may_not() {
        let mut twins = Twins::new(WithoutKey::Guard, WINDOW);
        twins.begin([0; 16], id(0), 0).unwrap();
        twins.end([0; 16], id(0), Was::Unknown, 0);
        for number in 1..=2 * MAX_DONE as u128 {
            let mark = (number << 32).to_be_bytes();
            twins.begin(mark, id(number), 0).unwrap();
            twins.end(mark, id(number), Was::Done, 0);
        }
        assert!(twins.seen.len() <= MAX_DONE + 2, "{}", twins.seen.len());
        assert_eq!(twins.begin((1_u128 << 32).to_be_bytes(), id(1), 0), Ok(None));
        assert_eq!(twins.begin([0; 16], id(1), 0), Err(id(0)));
    }
}
