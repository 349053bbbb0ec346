//! The claims on keys, a pure table: what each key stands for, within the window.
//!
//! A claim is in flight, of unknown outcome, or ended with an answer that is kept. What was certainly not done gives
//! its key back. Nothing is ever evicted; what is older than the window goes.

use std::collections::{HashMap, VecDeque, hash_map::Entry};

use uuid::Uuid;

use crate::audit::chain::Mark;

/// Times are in seconds since 1970.
pub(super) struct Claims {
    by_key: HashMap<Mark, Claim, foldhash::fast::RandomState>,
    /// Claims that are not in flight, by the time of their end. One that was claimed anew since counts no more.
    over: VecDeque<(u32, Mark)>,
    max: usize,
    window: u32,
}

#[derive(Debug)]
struct Claim {
    print: Mark,
    id: Uuid,
    since: u32,
    state: State,
}

#[derive(Debug)]
enum State {
    /// `doubt` is the call of unknown outcome that this one repeats.
    InFlight {
        doubt: Option<Doubt>,
    },
    Unknown,
    Ended(Ending),
}

/// A call of unknown outcome that another one repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Doubt {
    id: Uuid,
    since: u32,
}

/// What is known of an answer, whatever else was forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// It succeeded; else it failed.
    pub(super) is_success: bool,
    pub(super) status: u16,
    pub(super) result_code: Option<Box<[u8]>>,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// It was not sent, or refused before it was processed.
    NotDone,
    Unknown,
    Ended(Ending),
}

/// What a claim comes to; the ids are those of the call that stands in the way.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Begin {
        doubt: Option<Uuid>,
    },
    Replay(Uuid, Ending),
    InFlight(Uuid),
    Unknown(Uuid),
    /// Another call has the key; how that one ended, if it did.
    Mismatch(Uuid, Option<Ending>),
    Full,
}

impl Claims {
    pub(super) fn new(max: usize, window: u32) -> Self {
        Self { by_key: HashMap::default(), over: VecDeque::new(), max, window }
    }

    /// The same, with room for so many claims already.
    pub(super) fn with_room(max: usize, window: u32, room: usize) -> Self {
        let mut claims = Self::new(max, window);
        claims.by_key.reserve(room.min(max));
        claims
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// A call wants its key. `force` is the call of unknown outcome that it means to repeat.
    pub(super) fn claim(
        &mut self,
        key: Mark,
        print: Mark,
        id: Uuid,
        force: Option<Uuid>,
        now: u32,
    ) -> Verdict {
        let verdict = self.look(key, print, force, now);
        if let Verdict::Begin { .. } = verdict {
            let doubt = self.by_key.get(&key).map(|doubt| Doubt { id: doubt.id, since: doubt.since });
            self.by_key.insert(key, Claim { print, id, since: now, state: State::InFlight { doubt } });
        }
        verdict
    }

    /// What a claim would come to.
    pub(super) fn look(&mut self, key: Mark, print: Mark, force: Option<Uuid>, now: u32) -> Verdict {
        self.expire(now);
        let Some(claim) = self.by_key.get(&key) else {
            let is_full = self.by_key.len() >= self.max;
            return if is_full { Verdict::Full } else { Verdict::Begin { doubt: None } };
        };
        match &claim.state {
            State::Ended(ending) if claim.print != print => Verdict::Mismatch(claim.id, Some(ending.clone())),
            _ if claim.print != print => Verdict::Mismatch(claim.id, None),
            State::InFlight { .. } => Verdict::InFlight(claim.id),
            State::Ended(ending) => Verdict::Replay(claim.id, ending.clone()),
            State::Unknown if force == Some(claim.id) => Verdict::Begin { doubt: force },
            State::Unknown => Verdict::Unknown(claim.id),
        }
    }

    /// A call that held its key is over. Does nothing for any other.
    pub(super) fn end(&mut self, key: Mark, id: Uuid, how: How, now: u32) {
        let Entry::Occupied(mut place) = self.by_key.entry(key) else { return };
        let claim = place.get_mut();
        let State::InFlight { doubt } = claim.state else { return };
        if claim.id != id {
            return;
        }
        match (how, doubt) {
            (How::NotDone, None) => {
                place.remove();
                return;
            }
            // What became of the first one is as unknown as before, and no younger.
            (How::NotDone, Some(Doubt { since, .. })) if now.saturating_sub(since) > self.window => {
                place.remove();
                return;
            }
            (How::NotDone, Some(Doubt { id, since })) => {
                (claim.id, claim.since, claim.state) = (id, since, State::Unknown);
                return;
            }
            (How::Unknown, _) => claim.state = State::Unknown,
            (How::Ended(ending), _) => claim.state = State::Ended(ending),
        }
        claim.since = now;
        self.over.push_back((now, key));
    }

    /// Puts a claim back that the trail tells of, in flight; even beyond the bound, since nothing is evicted.
    pub(super) fn restore(&mut self, key: Mark, print: Mark, id: Uuid, doubt: Option<Uuid>, since: u32) {
        let doubt = doubt.map(|id| {
            let known = self.by_key.get(&key).filter(|claim| claim.id == id);
            Doubt { id, since: known.map_or(since, |claim| claim.since) }
        });
        self.by_key.insert(key, Claim { print, id, since, state: State::InFlight { doubt } });
    }

    fn expire(&mut self, now: u32) {
        while let Some((since, key)) =
            self.over.front().copied().filter(|(since, _)| self.is_old(*since, now))
        {
            self.over.pop_front();
            if let Entry::Occupied(place) = self.by_key.entry(key)
                && place.get().since == since
                && !matches!(place.get().state, State::InFlight { .. })
            {
                place.remove();
            }
        }
    }

    fn is_old(&self, since: u32, now: u32) -> bool {
        now.saturating_sub(since) > self.window
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const WINDOW: u32 = 100;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn ended() -> How {
        How::Ended(Ending { is_success: true, status: 200, result_code: None })
    }

    #[test]
    fn a_key_is_given_once_until_it_comes_back() {
        let mut claims = Claims::new(10, WINDOW);
        let (key, print) = ([1; 16], [2; 16]);
        let begin = Verdict::Begin { doubt: None };
        assert_eq!(claims.claim(key, print, id(1), None, 0), begin);
        assert_eq!(claims.claim(key, print, id(2), None, 0), Verdict::InFlight(id(1)));
        assert_eq!(claims.claim(key, [3; 16], id(2), None, 0), Verdict::Mismatch(id(1), None));
        claims.end(key, id(2), ended(), 0); // not the holder
        assert_eq!(claims.claim(key, print, id(3), None, 0), Verdict::InFlight(id(1)));
        claims.end(key, id(1), How::NotDone, 0);
        assert_eq!(claims.claim(key, [3; 16], id(4), None, 0), begin);
        claims.end(key, id(4), ended(), 0);
        let Verdict::Replay(first, _) = claims.claim(key, [3; 16], id(5), None, WINDOW) else { panic!() };
        assert_eq!(first, id(4));
        assert_eq!(claims.claim(key, print, id(6), None, WINDOW + 1), begin);
    }

    #[test]
    fn a_doubt_stays_until_it_is_forced_by_its_name() {
        let mut claims = Claims::new(10, WINDOW);
        let (key, print) = ([1; 16], [2; 16]);
        claims.claim(key, print, id(1), None, 0);
        claims.end(key, id(1), How::Unknown, 0);
        assert_eq!(claims.claim(key, print, id(2), None, 0), Verdict::Unknown(id(1)));
        assert_eq!(claims.claim(key, print, id(2), Some(id(9)), 0), Verdict::Unknown(id(1)));
        assert_eq!(claims.claim(key, print, id(3), Some(id(1)), 0), Verdict::Begin { doubt: Some(id(1)) });
        assert_eq!(claims.claim(key, print, id(4), Some(id(1)), 0), Verdict::InFlight(id(3)));
        claims.end(key, id(3), How::NotDone, 0);
        assert_eq!(claims.claim(key, print, id(5), None, 0), Verdict::Unknown(id(1)), "as unknown as before");
        assert_eq!(claims.claim(key, print, id(6), Some(id(1)), 0), Verdict::Begin { doubt: Some(id(1)) });
        claims.end(key, id(6), How::Unknown, 0);
        assert_eq!(claims.claim(key, print, id(7), Some(id(1)), 0), Verdict::Unknown(id(6)), "forced once");
    }

    #[test]
    fn a_full_table_refuses_new_keys_and_knows_the_old_ones() {
        let mut claims = Claims::new(1, WINDOW);
        claims.claim([1; 16], [0; 16], id(1), None, 0);
        assert_eq!(claims.claim([2; 16], [0; 16], id(2), None, 0), Verdict::Full);
        assert_eq!(claims.claim([1; 16], [0; 16], id(2), None, 0), Verdict::InFlight(id(1)));
        claims.end([1; 16], id(1), ended(), 0);
        assert_eq!(claims.claim([2; 16], [0; 16], id(3), None, WINDOW), Verdict::Full);
        assert_eq!(claims.claim([2; 16], [0; 16], id(3), None, WINDOW + 1), Verdict::Begin { doubt: None });
    }

    #[derive(Clone, Debug)]
    enum Step {
        Claim { key: u8, print: u8, force: bool },
        End { which: usize, how: How },
        Wait(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3_u8, 0..2_u8, any::<bool>()).prop_map(|(key, print, force)| Step::Claim { key, print, force }),
            3 => (0..8_usize, prop_oneof![Just(How::NotDone), Just(How::Unknown), Just(ended())])
                .prop_map(|(which, how)| Step::End { which, how }),
            1 => (0..60_u32).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: of one key and print, within the window, nothing is sent beside or behind
        /// what is at work, in doubt or done, but what was forced by name.
        #[test]
        fn nothing_is_sent_twice_but_what_is_forced(steps in prop::collection::vec(step(), 1..200)) {
            let mut claims = Claims::new(100, WINDOW);
            let (mut now, mut next, mut flying) = (1000, 0, Vec::new());
            // What stands for each key: the last id, since when, and how it ended.
            let mut last: HashMap<u8, (Uuid, u32, Option<How>)> = HashMap::new();
            for step in steps {
                match step {
                    Step::Wait(time) => now += time,
                    Step::Claim { key, print, force } => {
                        next += 1;
                        let stands = last.get(&key).cloned();
                        let force = stands.as_ref().filter(|_| force).map(|(id, ..)| *id);
                        if let Verdict::Begin { doubt } = claims.claim([key; 16], [print; 16], id(next), force, now) {
                            match stands.clone() {
                                None | Some((_, _, Some(How::NotDone))) => prop_assert_eq!(doubt, None),
                                Some((_, since, Some(_))) if now - since > WINDOW => prop_assert_eq!(doubt, None),
                                Some((before, _, Some(How::Unknown))) => prop_assert_eq!(doubt, Some(before)),
                                other => prop_assert!(false, "sent again: {:?}", other),
                            }
                            let doubt = doubt.and(stands).map(|(id, since, _)| (id, since));
                            last.insert(key, (id(next), now, None));
                            flying.push((key, id(next), doubt));
                        }
                    }
                    Step::End { which, how } => {
                        if flying.is_empty() {
                            continue;
                        }
                        let (key, ending, doubt) = flying.remove(which % flying.len());
                        claims.end([key; 16], ending, how.clone(), now);
                        let stands = match (how, doubt) {
                            (How::NotDone, Some((doubt, since))) => (doubt, since, Some(How::Unknown)),
                            (how, _) => (ending, now, Some(how)),
                        };
                        last.insert(key, stands);
                    }
                }
            }
        }
    }
}
