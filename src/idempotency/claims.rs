//! The claims on `Idempotency-Key`s: which call holds each key, within the window. A pure table without I/O or clock.
//!
//! The call that holds a key is in flight, of unknown outcome, or has ended with a result that repetitions get. A call that was
//! certainly not done releases its key. A claim is never evicted; it expires with the window. The table is bounded, in keys and
//! so in bytes, by refusing new keys. Each caller has a share, so that none can use up all keys.
//!
//! The table contains keyed hashes of keys and bodies only. Neither a key nor a body can be computed from its hash.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::slots::{EntryNumber, Slots};
use crate::keyed_hash::KeyedFingerprint;

/// The largest number of different result codes that are remembered.
// An upstream has some dozens. The bound is for one that puts a new text into each reply, which would fill the memory.
const MAX_CODES: usize = 4096;

/// The most memory that the remembered result codes take, in bytes.
// A code has at most 64 bytes, and its entry is in a list and in a map.
const CODES_BYTES: usize = MAX_CODES * 256;

type Table<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// The claims by key. All times are in seconds since 1970.
pub(super) struct Claims {
    /// The storage of the claims, by key hash. Its queue is in the order of expiry. It contains the claims whose call has ended,
    /// and those in flight that repeat a doubt; of these only the doubt expires.
    // A claim in flight that repeats nothing is not queued: until its call ends, its key must not be free.
    slots: Slots<Claim>,
    /// The number of keys of each caller, by the hash of its name.
    held: Table<u32, usize>,
    codes: Codes,
    max: usize,
    window: u32,
}

/// The call that holds a key.
// 56 bytes, which a test checks: there may be ten million. So a doubt is boxed, and a result code is a number.
#[derive(Debug)]
struct Claim {
    print: KeyedFingerprint,
    id: Uuid,
    /// When the call began, or when it ended, if it has.
    since: u32,
    /// The caller, hashed.
    caller: u32,
    state: State,
}

impl Claim {
    /// The time from which the window of a queued claim counts.
    fn expires_from(&self) -> u32 {
        match &self.state {
            // Only the doubt expires, not the claim.
            State::InFlight { repeats } => repeats.as_ref().map_or(0, |repeats| repeats.since),
            State::Unknown { .. } | State::Ended { .. } => self.since,
        }
    }
}

#[derive(Debug)]
enum State {
    InFlight {
        /// The call of unknown outcome that this one repeats by force.
        repeats: Option<Box<RepeatedCall>>,
    },
    Unknown {
        /// The call of unknown outcome that this one has repeated by force.
        // Kept, since a person may resolve this call as not done. Then the earlier one is in doubt again.
        repeats: Option<Box<RepeatedCall>>,
        /// Whether a call without this key has repeated this call by force, and so supersedes it.
        is_superseded: bool,
    },
    Ended {
        is_success: bool,
        is_resolved: bool,
        status: u16,
        code: Option<CodeNumber>,
    },
}

/// A call of unknown outcome that a later call with its key repeats by force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RepeatedCall {
    id: Uuid,
    since: u32,
    /// Whether a person resolved it as done while the repetition was in flight.
    is_done: bool,
    /// Whether a call without this key has repeated it by force, too, and so supersedes it.
    is_superseded: bool,
}

impl RepeatedCall {
    fn new(id: Uuid, since: u32) -> Self {
        Self { id, since, is_done: false, is_superseded: false }
    }

    /// Returns the state that the key gets back if the call that repeats this doubt was not done.
    fn state(&self) -> State {
        let Self { is_superseded, .. } = *self;
        if self.is_done { State::RESOLVED } else { State::Unknown { repeats: None, is_superseded } }
    }
}

impl State {
    /// The state of a call that a person resolved as done.
    const RESOLVED: Self = Self::Ended { is_success: true, is_resolved: true, status: 200, code: None };
}

/// The result codes of claims, each stored once.
#[derive(Default)]
struct Codes {
    list: Vec<Arc<[u8]>>,
    numbers: Table<Arc<[u8]>, CodeNumber>,
}

/// The index of a result code in the list.
#[derive(Clone, Copy, Debug)]
struct CodeNumber(u16);

/// A call's request for a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) key: KeyedFingerprint,
    pub(super) print: KeyedFingerprint,
    /// The caller, hashed.
    pub(super) caller: u32,
    /// The number of keys that the caller may hold.
    pub(super) share: usize,
    /// The call of unknown outcome that `Idempotency-Force` asks to repeat.
    pub(super) force: Option<Uuid>,
}

/// How a call with a key ended. A replay states it even if the stored reply was evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResult {
    /// Whether the call succeeded; otherwise it failed.
    pub is_success: bool,
    /// The HTTP status that the caller got.
    pub status: u16,
    /// The upstream's result code, at most 64 bytes; `None` if there was none, or too many different ones to remember.
    pub result_code: Option<Arc<[u8]>>,
    /// Whether a person resolved the call as done. The upstream's reply is then not known.
    pub is_resolved: bool,
}

#[cfg(test)]
impl StoredResult {
    fn resolved() -> Self {
        Self { is_success: true, status: 200, result_code: None, is_resolved: true }
    }
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KeyedCompletion {
    /// It was not sent, or the upstream refused it before processing. Its key is free again.
    NotDone,
    Unknown,
    Ended(StoredResult),
}

/// The decision about a call that asks for a key. An id in it is that of the call that holds the key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum KeyDecision {
    /// The call gets the key; `repeats` is the call that it repeats by force.
    Begin {
        repeats: Option<Uuid>,
    },
    Replay(Uuid, StoredResult),
    InFlight(Uuid),
    Unknown(Uuid),
    /// The key is held by a call with another body or operator. Also the result of that call, if it is known.
    Mismatch(Uuid, Option<StoredResult>),
    /// The table is full.
    Full,
    /// The caller holds as many keys as it may.
    ShareFull,
}

impl Claims {
    /// A table for `max` keys. `window` is in seconds.
    pub(super) fn new(max: usize, window: u32) -> Self {
        Self::with_room(max, window, 0)
    }

    /// A table whose index has room for this many claims from the beginning, so that a start does not grow it over and over.
    pub(super) fn with_room(max: usize, window: u32, room: usize) -> Self {
        let (held, codes) = <_>::default();
        Self { slots: Slots::with_room(room.min(max)), held, codes, max, window }
    }

    /// The most memory that this many keys take, in bytes.
    pub(super) const fn max_bytes(keys: usize) -> usize {
        Slots::<Claim>::max_bytes(keys) + CODES_BYTES
    }

    /// The number of keys that are held.
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// Decides about a call and, if the decision is [`KeyDecision::Begin`], gives it the key. `id` is the call's own.
    pub(super) fn claim(&mut self, wanted: Wanted, id: Uuid, now: u32) -> KeyDecision {
        let decision = self.peek(wanted, now);
        if let KeyDecision::Begin { .. } = decision {
            let Wanted { key, print, caller, .. } = wanted;
            let known = self.slots.find(&key).and_then(|number| self.slots.get_mut(number));
            if let Some(claim) = known {
                let repeats = Some(Box::new(RepeatedCall::new(claim.id, claim.since)));
                (claim.id, claim.since, claim.state) = (id, now, State::InFlight { repeats });
            } else {
                self.add(
                    key,
                    Claim { print, id, since: now, caller, state: State::InFlight { repeats: None } },
                );
            }
        }
        decision
    }

    /// Returns what [`Self::claim`] would, and gives no key away.
    pub(super) fn peek(&mut self, wanted: Wanted, now: u32) -> KeyDecision {
        self.expire(now);
        let Wanted { print, force, .. } = wanted;
        let Some(claim) = self.slots.find(&wanted.key).and_then(|number| self.slots.get(number)) else {
            return self.look_for_room(wanted);
        };
        match &claim.state {
            // Checked first: whatever state the key is in, its answer belongs to another body.
            _ if claim.print != print => KeyDecision::Mismatch(claim.id, self.result(claim)),
            State::InFlight { .. } => KeyDecision::InFlight(claim.id),
            State::Unknown { is_superseded: false, .. } if force == Some(claim.id) => {
                KeyDecision::Begin { repeats: force }
            }
            State::Unknown { .. } => KeyDecision::Unknown(claim.id),
            State::Ended { .. } => match self.result(claim) {
                Some(result) => KeyDecision::Replay(claim.id, result),
                None => KeyDecision::Unknown(claim.id),
            },
        }
    }

    /// Returns [`KeyDecision::Begin`] if there is room for a further key of this caller, else what is full.
    fn look_for_room(&self, Wanted { caller, share, .. }: Wanted) -> KeyDecision {
        if self.len() >= self.max {
            return KeyDecision::Full;
        }
        let is_full = self.held.get(&caller).is_some_and(|held| *held >= share);
        if is_full { KeyDecision::ShareFull } else { KeyDecision::Begin { repeats: None } }
    }

    /// How the call of a claim ended; `None` if it has not, or if its outcome is unknown.
    fn result(&self, claim: &Claim) -> Option<StoredResult> {
        match claim.state {
            State::InFlight { .. } | State::Unknown { .. } => None,
            State::Ended { is_success, is_resolved, status, code } => {
                let result_code = code.and_then(|code| self.codes.get(code));
                Some(StoredResult { is_success, status, result_code, is_resolved })
            }
        }
    }

    /// Ends the call that holds a key. Does nothing for any other call.
    pub(super) fn end(&mut self, key: KeyedFingerprint, id: Uuid, completion: KeyedCompletion, now: u32) {
        let Some(number) = self.slots.find(&key) else { return };
        let Some(claim) = self.slots.get_mut(number).filter(|claim| claim.id == id) else { return };
        // A call ends once. Its result is kept, or what a person has found about it meanwhile.
        let State::InFlight { repeats } = &mut claim.state else { return };
        let repeats = repeats.take();
        claim.state = match completion {
            KeyedCompletion::NotDone => return self.give_back(number, repeats.as_deref(), now),
            KeyedCompletion::Unknown => State::Unknown { repeats, is_superseded: false },
            KeyedCompletion::Ended(StoredResult { is_success, status, result_code, is_resolved }) => {
                let code = result_code.and_then(|code| self.codes.put(&code));
                State::Ended { is_success, is_resolved, status, code }
            }
        };
        claim.since = now;
        self.slots.queue(number);
    }

    /// Releases the key of a call that was not done. If the call repeated a doubt, the doubt holds the key again, and its window
    /// goes on as if there had been no repetition.
    fn give_back(&mut self, number: EntryNumber, repeats: Option<&RepeatedCall>, now: u32) {
        let repeats = repeats.filter(|repeats| now.saturating_sub(repeats.since) <= self.window);
        let Some(repeats) = repeats else { return self.remove(number) };
        if let Some(claim) = self.slots.get_mut(number) {
            (claim.id, claim.since, claim.state) = (repeats.id, repeats.since, repeats.state());
        }
        self.queue_unless_queued(number);
    }

    /// Applies the finding of a person that a call of unknown outcome was done: for a whole window from now on, its key is
    /// answered as a success. This may exceed the bound of the table. A later call that holds the key keeps it while it is in
    /// flight, and afterwards if it succeeded or has another body or operator.
    pub(super) fn resolve_done(&mut self, Wanted { key, print, caller, .. }: Wanted, id: Uuid, now: u32) {
        let Some(number) = self.slots.find(&key) else {
            // The claim has expired. Its caller may still have the key, and now there is an answer for it.
            self.add(key, Claim { print, id, since: now, caller, state: State::RESOLVED });
            if let Some(number) = self.slots.find(&key) {
                self.slots.queue(number);
            }
            return;
        };
        let Some(claim) = self.slots.get_mut(number) else { return };
        match &mut claim.state {
            State::InFlight { repeats: Some(repeats) } if repeats.id == id => {
                repeats.is_done = true;
                return;
            }
            // Another call has taken the key meanwhile. Its end decides how the key is answered.
            State::InFlight { .. } => return,
            State::Ended { is_success: true, .. } if claim.id != id => return,
            _ if claim.id != id && claim.print != print => return,
            State::Unknown { .. } | State::Ended { .. } => {}
        }
        (claim.id, claim.since, claim.state) = (id, now, State::RESOLVED);
        // To the end of the queue, since its window begins now.
        self.slots.unlink(number);
        self.slots.queue(number);
    }

    /// Applies the finding of a person that a call of unknown outcome was not done: its key is free again, unless the call
    /// repeated another one that is still of unknown outcome.
    pub(super) fn resolve_not_done(&mut self, key: KeyedFingerprint, id: Uuid, now: u32) {
        let Some(number) = self.slots.find(&key) else { return };
        let Some(claim) = self.slots.get_mut(number) else { return };
        match &mut claim.state {
            State::InFlight { repeats } | State::Unknown { repeats, .. }
                if repeats.as_ref().is_some_and(|it| it.id == id) =>
            {
                *repeats = None;
            }
            State::Unknown { repeats, .. } if claim.id == id => {
                let repeats = repeats.take();
                self.give_back(number, repeats.as_deref(), now);
            }
            // A correction of an earlier finding. What ended with a reply of the upstream is not for a person to change.
            State::Ended { is_resolved: true, .. } if claim.id == id => self.remove(number),
            State::InFlight { .. } | State::Unknown { .. } | State::Ended { .. } => {}
        }
    }

    /// Sets whether a call without this key supersedes a call of unknown outcome, which then cannot be repeated by force.
    // Two tables know of a doubt with a key. Without this flag it could be forced once in each, and be sent twice.
    pub(super) fn set_superseded(&mut self, key: KeyedFingerprint, id: Uuid, superseded: bool) {
        let Some(claim) = self.slots.find(&key).and_then(|number| self.slots.get_mut(number)) else { return };
        match &mut claim.state {
            State::Unknown { is_superseded, .. } if claim.id == id => *is_superseded = superseded,
            State::InFlight { repeats: Some(repeats) } if repeats.id == id => {
                repeats.is_superseded = superseded;
            }
            State::InFlight { .. } | State::Unknown { .. } | State::Ended { .. } => {}
        }
    }

    /// Whether a call without this key supersedes the doubt that the call in flight repeats.
    pub(super) fn is_superseded(&self, key: KeyedFingerprint) -> bool {
        let claim = self.slots.find(&key).and_then(|number| self.slots.get(number));
        claim.is_some_and(
            |claim| matches!(&claim.state, State::InFlight { repeats: Some(repeats) } if repeats.is_superseded),
        )
    }

    /// Sorts the queue by expiry. To be called once a trail was read.
    // Two boots with different clocks, or a resolution, put a young claim before an old one. [`Self::expire`] stops at the first
    // that is not old, so that those after it would be remembered and counted for too long.
    pub(super) fn sort(&mut self) {
        self.slots.sort_queue_by_key(Claim::expires_from);
    }

    // A claim that repeats a doubt may be queued for it already, and keeps that place: it expires with the doubt.
    fn queue_unless_queued(&mut self, number: EntryNumber) {
        if !self.slots.is_queued(number) {
            self.slots.queue(number);
        }
    }

    /// Restores a claim of the trail as in flight, even beyond the bounds, since a claim is never evicted. Later records of the
    /// trail end it by [`Self::end`].
    pub(super) fn restore(&mut self, wanted: Wanted, id: Uuid, since: u32) {
        let Wanted { key, print, caller, force, .. } = wanted;
        let known = self.slots.find(&key);
        let before = known.and_then(|number| self.slots.get(number)).map(|claim| (claim.id, claim.since));
        // The forced call may be an equal call without this key. Only a call that holds the key becomes the doubt: it gets the
        // key back if this call was not done. Otherwise the key becomes free.
        let repeats = before
            .filter(|(known, _)| force == Some(*known))
            .map(|(id, since)| Box::new(RepeatedCall::new(id, since)));
        let is_queued = repeats.is_some();
        let claim = Claim { print, id, since, caller, state: State::InFlight { repeats } };
        let Some(number) = known else { return self.add(key, claim) };
        if !is_queued {
            self.slots.unlink(number);
        }
        // In place, without a change of `held`: a key is of one caller.
        if let Some(known) = self.slots.get_mut(number) {
            *known = claim;
        }
    }

    fn add(&mut self, key: KeyedFingerprint, claim: Claim) {
        *self.held.entry(claim.caller).or_default() += 1;
        self.slots.insert(key, claim);
    }

    fn remove(&mut self, number: EntryNumber) {
        let Some(Claim { caller, .. }) = self.slots.remove(number) else { return };
        if let Some(held) = self.held.get_mut(&caller) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&caller);
            }
        }
    }

    /// Removes claims whose window is over.
    fn expire(&mut self, now: u32) {
        while let Some(number) = self.slots.front() {
            let Some(claim) = self.slots.get_mut(number) else { return };
            if now.saturating_sub(claim.expires_from()) <= self.window {
                return;
            }
            match &mut claim.state {
                State::InFlight { repeats } => {
                    // The doubt is too old to be restored. The call itself is at work, so that the key is not free.
                    *repeats = None;
                    self.slots.unlink(number);
                }
                State::Unknown { .. } | State::Ended { .. } => self.remove(number),
            }
        }
    }
}

impl Codes {
    fn get(&self, CodeNumber(number): CodeNumber) -> Option<Arc<[u8]>> {
        self.list.get(usize::from(number)).cloned()
    }

    /// The number of a code, which is added if it is new; `None` if there are too many.
    fn put(&mut self, code: &Arc<[u8]>) -> Option<CodeNumber> {
        if let Some(number) = self.numbers.get(code) {
            return Some(*number);
        }
        let number = u16::try_from(self.list.len()).ok().filter(|number| usize::from(*number) < MAX_CODES)?;
        self.list.push(code.clone());
        self.numbers.insert(code.clone(), CodeNumber(number));
        Some(CodeNumber(number))
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

    /// A key of the first caller, which may hold all of them.
    fn wanted(key: KeyedFingerprint, print: KeyedFingerprint, force: Option<Uuid>) -> Wanted {
        Wanted { key, print, caller: 1, share: usize::MAX, force }
    }

    fn ended() -> KeyedCompletion {
        KeyedCompletion::Ended(StoredResult {
            is_success: true,
            status: 200,
            result_code: None,
            is_resolved: false,
        })
    }

    #[test]
    fn key_is_claimed_once_until_it_is_released() {
        let mut claims = Claims::new(10, WINDOW);
        let (key, print) = ([1; 16], [2; 16]);
        let begin = KeyDecision::Begin { repeats: None };
        assert_eq!(claims.claim(wanted(key, print, None), id(1), 0), begin);
        assert_eq!(claims.claim(wanted(key, print, None), id(2), 0), KeyDecision::InFlight(id(1)));
        assert_eq!(claims.claim(wanted(key, [3; 16], None), id(2), 0), KeyDecision::Mismatch(id(1), None));
        // Not the call that holds the key.
        claims.end(key, id(2), ended(), 0);
        assert_eq!(claims.claim(wanted(key, print, None), id(3), 0), KeyDecision::InFlight(id(1)));
        claims.end(key, id(1), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.claim(wanted(key, [3; 16], None), id(4), 0), begin);
        claims.end(key, id(4), ended(), 0);
        let KeyDecision::Replay(first, _) = claims.claim(wanted(key, [3; 16], None), id(5), WINDOW) else {
            panic!()
        };
        assert_eq!(first, id(4));
        assert_eq!(claims.claim(wanted(key, print, None), id(6), WINDOW + 1), begin);
    }

    #[test]
    fn unknown_outcome_stays_until_forced_by_its_request_id() {
        let mut claims = Claims::new(10, WINDOW);
        let (key, print) = ([1; 16], [2; 16]);
        claims.claim(wanted(key, print, None), id(1), 0);
        claims.end(key, id(1), KeyedCompletion::Unknown, 0);
        assert_eq!(claims.claim(wanted(key, print, None), id(2), 0), KeyDecision::Unknown(id(1)));
        assert_eq!(claims.claim(wanted(key, print, Some(id(9))), id(2), 0), KeyDecision::Unknown(id(1)));
        assert_eq!(
            claims.claim(wanted(key, print, Some(id(1))), id(3), 0),
            KeyDecision::Begin { repeats: Some(id(1)) }
        );
        assert_eq!(claims.claim(wanted(key, print, Some(id(1))), id(4), 0), KeyDecision::InFlight(id(3)));
        claims.end(key, id(3), KeyedCompletion::NotDone, 0);
        assert_eq!(
            claims.claim(wanted(key, print, None), id(5), 0),
            KeyDecision::Unknown(id(1)),
            "as unknown as before"
        );
        assert_eq!(
            claims.claim(wanted(key, print, Some(id(1))), id(6), 0),
            KeyDecision::Begin { repeats: Some(id(1)) }
        );
        claims.end(key, id(6), KeyedCompletion::Unknown, 0);
        assert_eq!(
            claims.claim(wanted(key, print, Some(id(1))), id(7), 0),
            KeyDecision::Unknown(id(6)),
            "forced once"
        );
    }

    #[test]
    fn superseded_call_is_not_forced_again() {
        let (key, print) = ([1; 16], [2; 16]);
        let mut claims = Claims::new(10, WINDOW);
        claims.claim(wanted(key, print, None), id(1), 0);
        claims.end(key, id(1), KeyedCompletion::Unknown, 0);
        let force = Some(id(1));
        claims.set_superseded(key, id(9), true);
        assert_eq!(
            claims.peek(wanted(key, print, force), 0),
            KeyDecision::Begin { repeats: force },
            "another call"
        );
        claims.set_superseded(key, id(1), true);
        assert_eq!(claims.claim(wanted(key, print, force), id(2), 0), KeyDecision::Unknown(id(1)));
        claims.set_superseded(key, id(1), false);
        assert_eq!(claims.claim(wanted(key, print, force), id(3), 0), KeyDecision::Begin { repeats: force });
        assert!(!claims.is_superseded(key));
        // Also while it is repeated: the call without the key may have taken the other table's lock first.
        claims.set_superseded(key, id(1), true);
        assert!(claims.is_superseded(key));
        claims.end(key, id(3), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.claim(wanted(key, print, force), id(4), 0), KeyDecision::Unknown(id(1)));
        assert_eq!(claims.peek(wanted(key, print, None), WINDOW + 1), KeyDecision::Begin { repeats: None });
    }

    #[test]
    fn restored_claims_expire_in_order_of_time() {
        let mut claims = Claims::new(3, WINDOW);
        for (key, since) in [(1, 50), (2, 0), (3, 20)] {
            claims.restore(wanted([key; 16], [0; 16], None), id(key.into()), since);
            claims.end([key; 16], id(key.into()), ended(), since);
        }
        claims.sort();
        let new = wanted([4; 16], [0; 16], None);
        for (now, decision, left) in [
            (WINDOW, KeyDecision::Full, 3),
            (WINDOW + 1, KeyDecision::Begin { repeats: None }, 2),
            (WINDOW + 21, KeyDecision::Begin { repeats: None }, 1),
            (WINDOW + 51, KeyDecision::Begin { repeats: None }, 0),
        ] {
            assert_eq!((claims.peek(new, now), claims.len()), (decision, left), "{now}");
        }
    }

    #[test]
    fn resolution_frees_the_key_or_replays_its_result() {
        let (key, print) = ([1; 16], [2; 16]);
        let unknown = || {
            let mut claims = Claims::new(10, WINDOW);
            claims.claim(wanted(key, print, None), id(1), 0);
            claims.end(key, id(1), KeyedCompletion::Unknown, 0);
            claims
        };
        let resolved = |id| KeyDecision::Replay(id, StoredResult::resolved());
        let mut claims = unknown();
        claims.resolve_not_done(key, id(9), 5);
        assert_eq!(claims.peek(wanted(key, print, None), 5), KeyDecision::Unknown(id(1)));
        claims.resolve_not_done(key, id(1), 5);
        assert_eq!(claims.peek(wanted(key, print, None), 5), KeyDecision::Begin { repeats: None });
        let mut claims = unknown();
        claims.resolve_done(wanted(key, print, None), id(1), 5);
        assert_eq!(claims.peek(wanted(key, print, None), 5 + WINDOW), resolved(id(1)));
        // A person may correct a result, and correct it back.
        claims.resolve_not_done(key, id(1), 5);
        assert_eq!(claims.peek(wanted(key, print, None), 5), KeyDecision::Begin { repeats: None });
        claims.resolve_done(wanted(key, print, None), id(1), 6);
        assert_eq!(claims.peek(wanted(key, print, None), 6), resolved(id(1)));
        assert_eq!(claims.peek(wanted(key, print, None), 7 + WINDOW), KeyDecision::Begin { repeats: None });
    }

    #[test]
    fn resolving_a_forced_call_or_its_original_has_the_same_effect() {
        let (key, print) = ([1; 16], [2; 16]);
        let forced = || {
            let mut claims = Claims::new(10, WINDOW);
            claims.claim(wanted(key, print, None), id(1), 0);
            claims.end(key, id(1), KeyedCompletion::Unknown, 0);
            claims.claim(wanted(key, print, Some(id(1))), id(2), 1);
            claims
        };
        let done = |id| KeyDecision::Replay(id, StoredResult::resolved());
        let free = KeyDecision::Begin { repeats: None };
        // Resolved while its repetition is in flight: that one decides first.
        let mut claims = forced();
        claims.resolve_done(wanted(key, print, None), id(1), 2);
        assert_eq!(claims.peek(wanted(key, print, None), 2), KeyDecision::InFlight(id(2)));
        claims.end(key, id(2), KeyedCompletion::NotDone, 3);
        assert_eq!(claims.peek(wanted(key, print, None), 3), done(id(1)));
        let both_unknown = || {
            let mut claims = forced();
            claims.end(key, id(2), KeyedCompletion::Unknown, 2);
            claims
        };
        let mut claims = both_unknown();
        claims.resolve_not_done(key, id(2), 3);
        assert_eq!(
            claims.peek(wanted(key, print, None), 3),
            KeyDecision::Unknown(id(1)),
            "as unknown as before"
        );
        claims.resolve_not_done(key, id(1), 3);
        assert_eq!(claims.peek(wanted(key, print, None), 3), free);
        let mut claims = both_unknown();
        claims.resolve_not_done(key, id(1), 3);
        assert_eq!(claims.peek(wanted(key, print, None), 3), KeyDecision::Unknown(id(2)));
        claims.resolve_not_done(key, id(2), 3);
        assert_eq!(claims.peek(wanted(key, print, None), 3), free);
        let mut claims = both_unknown();
        claims.resolve_done(wanted(key, print, None), id(1), 3);
        claims.resolve_not_done(key, id(2), 4);
        assert_eq!(claims.peek(wanted(key, print, None), 4), done(id(1)));
        let mut claims = both_unknown();
        claims.resolve_done(wanted(key, print, None), id(2), 3);
        claims.resolve_not_done(key, id(1), 4);
        assert_eq!(claims.peek(wanted(key, print, None), 4), done(id(2)));
    }

    #[test]
    fn full_claim_table_rejects_new_keys_and_keeps_known_ones() {
        let mut claims = Claims::new(1, WINDOW);
        claims.claim(wanted([1; 16], [0; 16], None), id(1), 0);
        assert_eq!(claims.claim(wanted([2; 16], [0; 16], None), id(2), 0), KeyDecision::Full);
        assert_eq!(claims.claim(wanted([1; 16], [0; 16], None), id(2), 0), KeyDecision::InFlight(id(1)));
        claims.end([1; 16], id(1), ended(), 0);
        assert_eq!(claims.claim(wanted([2; 16], [0; 16], None), id(3), WINDOW), KeyDecision::Full);
        assert_eq!(
            claims.claim(wanted([2; 16], [0; 16], None), id(3), WINDOW + 1),
            KeyDecision::Begin { repeats: None }
        );
    }

    #[test]
    fn full_share_rejects_new_keys_of_its_caller_only() {
        let mut claims = Claims::new(10, WINDOW);
        let of = |caller, key| Wanted { caller, share: 2, ..wanted([key; 16], [0; 16], None) };
        let begin = KeyDecision::Begin { repeats: None };
        assert_eq!(claims.claim(of(1, 1), id(1), 0), begin);
        assert_eq!(claims.claim(of(1, 2), id(2), 0), begin);
        claims.end([1; 16], id(1), KeyedCompletion::Unknown, 0);
        assert_eq!(claims.claim(of(1, 3), id(3), 0), KeyDecision::ShareFull);
        assert_eq!(claims.claim(of(2, 4), id(4), 0), begin, "another caller");
        assert_eq!(claims.claim(of(1, 2), id(5), 0), KeyDecision::InFlight(id(2)), "a known key");
        let forced = Wanted { force: Some(id(1)), ..of(1, 1) };
        assert_eq!(
            claims.claim(forced, id(6), 0),
            KeyDecision::Begin { repeats: Some(id(1)) },
            "a key that it has"
        );
        assert_eq!(claims.peek(Wanted { share: 3, ..of(1, 3) }, 0), begin, "a larger share");
        claims.end([2; 16], id(2), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.claim(of(1, 3), id(7), 0), begin, "a key came back");
        claims.end([3; 16], id(7), ended(), 0);
        claims.end([1; 16], id(6), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.claim(of(1, 5), id(8), WINDOW), KeyDecision::ShareFull);
        assert_eq!(claims.claim(of(1, 5), id(8), WINDOW + 1), begin, "both have expired");
        assert_eq!((claims.len(), &claims.held), (2, &Table::from_iter([(1, 1), (2, 1)])));
    }

    #[test]
    fn restored_claims_are_counted_and_kept_beyond_a_share() {
        let mut claims = Claims::new(3, WINDOW);
        let of = |caller, key| Wanted { caller, share: 1, ..wanted([key; 16], [0; 16], None) };
        for key in 1..=4 {
            claims.restore(of(1, key), id(key.into()), 0);
            claims.end([key; 16], id(key.into()), ended(), 0);
        }
        // The key was used again. It counts once.
        claims.restore(of(1, 1), id(9), 1);
        claims.end([1; 16], id(9), KeyedCompletion::Unknown, 1);
        assert_eq!((claims.len(), claims.held[&1]), (4, 4), "even beyond all bounds");
        assert_eq!(claims.peek(of(2, 5), 1), KeyDecision::Full);
        let begin = KeyDecision::Begin { repeats: None };
        assert_eq!(claims.peek(of(2, 5), WINDOW + 1), begin);
        assert_eq!(claims.peek(of(1, 5), WINDOW + 1), KeyDecision::ShareFull, "one has not expired");
        assert_eq!(claims.peek(of(1, 5), WINDOW + 2), begin);
    }

    #[test]
    fn restored_forced_call_that_was_not_done_releases_its_key() {
        let mut claims = Claims::new(3, WINDOW);
        let forcing = |force| Wanted { caller: 1, share: 3, ..wanted([1; 16], [0; 16], force) };
        claims.restore(forcing(Some(id(7))), id(1), 0);
        claims.end([1; 16], id(1), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.peek(forcing(None), 0), KeyDecision::Begin { repeats: None });
        claims.restore(forcing(None), id(2), 0);
        claims.end([1; 16], id(2), KeyedCompletion::Unknown, 0);
        claims.restore(forcing(Some(id(2))), id(3), 0);
        claims.end([1; 16], id(3), KeyedCompletion::NotDone, 0);
        assert_eq!(claims.peek(forcing(None), 0), KeyDecision::Unknown(id(2)), "a doubt of its own stays");
    }

    #[test]
    fn claimed_keys_stay_within_the_stated_memory_bound() {
        assert_eq!(size_of::<Option<Claim>>(), 56);
        // Multiplied, so that keys differ in all bits as keyed hashes do.
        let key = |number: u32| u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        for max in [10_000, 114_689] {
            let mut claims = Claims::new(max, WINDOW);
            let mut peak = 0;
            for number in 0..4 * max as u32 {
                // So fast that half as many as fit are alive. Removed entries leave traces in the index, which must not grow.
                let now = number * 2 * WINDOW / max as u32;
                claims.claim(wanted(key(number), [0; 16], None), id(number.into()), now);
                claims.end(key(number), id(number.into()), ended(), now);
                peak = peak.max(claims.slots.bytes() * claims.len() / max);
            }
            assert!(claims.len() > max / 4, "the control");
            // While the index grows, the old one of half its size exists, too.
            assert!(claims.slots.bytes() * 3 / 2 <= Claims::max_bytes(max), "{}", claims.slots.bytes());
        }
    }

    #[test]
    fn result_codes_are_stored_once_and_bounded() {
        let mut claims = Claims::new(1_000_000, WINDOW);
        let code = |number: u32| Some(Arc::from(number.to_string().into_bytes()));
        let limit = MAX_CODES as u32;
        for number in 0..limit + 2 {
            let (key, id) = (u128::from(number).to_be_bytes(), id(number.into()));
            let result = StoredResult {
                is_success: false,
                status: 400,
                result_code: code(number),
                is_resolved: false,
            };
            claims.claim(wanted(key, [0; 16], None), id, 0);
            claims.end(key, id, KeyedCompletion::Ended(result.clone()), 0);
            let stored =
                StoredResult { result_code: result.result_code.filter(|_| number < limit), ..result };
            let decision = claims.peek(wanted(key, [0; 16], None), 0);
            assert_eq!(decision, KeyDecision::Replay(id, stored));
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Claim { key: u8, print: u8, force: bool },
        End { which: usize, completion: KeyedCompletion },
        Wait(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3_u8, 0..2_u8, any::<bool>()).prop_map(|(key, print, force)| Step::Claim { key, print, force }),
            3 => (0..8_usize, prop_oneof![Just(KeyedCompletion::NotDone), Just(KeyedCompletion::Unknown), Just(ended())])
                .prop_map(|(which, completion)| Step::End { which, completion }),
            1 => (0..60_u32).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// In any order of steps, within the window, no call of a key is sent while an earlier one is at work, in doubt or
        /// done, unless it forces that one by its id.
        #[test]
        fn only_forced_calls_are_sent_twice(steps in prop::collection::vec(step(), 1..200)) {
            let mut claims = Claims::new(100, WINDOW);
            let (mut now, mut next, mut flying) = (1000, 0, Vec::new());
            // The model: for each key the id of the call that holds it, since when, and how that ended.
            let mut last: HashMap<u8, (Uuid, u32, Option<KeyedCompletion>)> = HashMap::new();
            for step in steps {
                match step {
                    Step::Wait(time) => now += time,
                    Step::Claim { key, print, force } => {
                        next += 1;
                        let stands = last.get(&key).cloned();
                        let force = stands.as_ref().filter(|_| force).map(|(id, ..)| *id);
                        let wanted = wanted([key; 16], [print; 16], force);
                        if let KeyDecision::Begin { repeats } = claims.claim(wanted, id(next), now) {
                            match stands.clone() {
                                None | Some((_, _, Some(KeyedCompletion::NotDone))) => prop_assert_eq!(repeats, None),
                                Some((_, since, Some(_))) if now - since > WINDOW => prop_assert_eq!(repeats, None),
                                Some((before, _, Some(KeyedCompletion::Unknown))) => prop_assert_eq!(repeats, Some(before)),
                                other => prop_assert!(false, "sent again: {:?}", other),
                            }
                            let repeats = repeats.and(stands).map(|(id, since, _)| (id, since));
                            last.insert(key, (id(next), now, None));
                            flying.push((key, id(next), repeats));
                        }
                    }
                    Step::End { which, completion } => {
                        if flying.is_empty() {
                            continue;
                        }
                        let (key, result, repeats) = flying.remove(which % flying.len());
                        claims.end([key; 16], result, completion.clone(), now);
                        let stands = match (completion, repeats) {
                            (KeyedCompletion::NotDone, Some((repeats, since))) => {
                                (repeats, since, Some(KeyedCompletion::Unknown))
                            }
                            (completion, _) => (result, now, Some(completion)),
                        };
                        last.insert(key, stands);
                    }
                }
            }
        }
    }
}
