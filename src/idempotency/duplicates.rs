//! Deduplication of equal calls: same caller, route, operator and body bytes. A pure table without I/O or clock.
//!
//! A call is in the table while it is at work, and afterwards while it is in *doubt*: its outcome is unknown, or it is
//! *undelivered* (it succeeded, and its caller disconnected before it had the answer), or a person resolved it as done.
//! Meanwhile it refuses an equal call, or flags it (`without_key = "warn"`).
//!
//! Calls with and without a key are compared with each other. Two calls with keys are not: with different keys both calls are
//! intended, and for one key [`super::claims`] decides.
//!
//! A success of a call without a key is remembered even if its caller has the answer, for a window of its own
//! (`fingerprint_window`). It flags an equal call without a key, or refuses it (`without_key = "block"`).
//!
//! A doubt is never evicted, and under `block` neither is a success. The table is bounded by refusing new calls.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use smallvec::SmallVec;
use uuid::Uuid;

use super::recent;
use super::recent::Recent;
use crate::audit::unresolved_calls::AT_MOST as MAX_DOUBTS;
use crate::config::WithoutKey;
use crate::keyed_hash::KeyedFingerprint;

/// The most successes that are remembered under `guard` and `warn`.
// These modes only flag a call that equals a success. So the oldest success may be forgotten: that lets no call pass which would
// have been refused.
const MAX_SUCCEEDED: usize = 32 * 1024;

type Table<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// The calls at work, in doubt and recently succeeded, by call hash. All times are in seconds since 1970.
pub(super) struct DuplicateDetector {
    // Nearly always one call for a call hash. Several are equal calls that were only flagged, or calls with keys of their own.
    calls: Table<KeyedFingerprint, SmallVec<[KnownCall; 1]>>,
    /// The time at which each doubt began, and its call hash, for the expiry. An entry whose doubt is gone is ignored.
    // A set in the order of time: a start restores doubts in any order, up to ten thousand of them with one time, and a doubt
    // that is repeated in vain over and over must leave one entry only.
    began: BTreeSet<(u32, KeyedFingerprint)>,
    succeeded: Recent,
    /// The most successes that are remembered under `block`.
    max_successes: usize,
    /// Under `block`: the number of remembered successes of each caller, by the hash of its name.
    successes: Table<u32, usize>,
    /// The number of doubts of each caller, by the hash of its name.
    held: Table<u32, usize>,
    doubts: usize,
    mode: WithoutKey,
    /// How long a doubt refuses equal calls, in seconds.
    window: u32,
    /// How long a success of a call without a key is remembered, in seconds.
    success_window: u32,
}

/// What the table stores about a call to compare it with others. Each call has one, also if no other call equals it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Duplicate {
    pub(super) id: Uuid,
    /// The key hash of its `Idempotency-Key`.
    pub(super) key: Option<KeyedFingerprint>,
    /// The caller, hashed.
    pub(super) caller: u32,
    /// Whether it repeats by force a doubt of a call without a key. Calls with any key are then compared with it, see
    /// [`Self::is_unkeyed`].
    pub(super) replaces_unkeyed: bool,
}

impl Duplicate {
    /// Whether calls with any key are compared with this call: it has no key, or it repeats by force a doubt of a call without a
    /// key.
    // The second case prevents this: a call with key A repeated a doubt without a key by force. A call with key B was then
    // compared with neither of the two, and was sent as well.
    pub(super) fn is_unkeyed(&self) -> bool {
        self.key.is_none() || self.replaces_unkeyed
    }

    /// Whether an equal new call is compared with this known one. Two calls with keys are not: with different keys both are
    /// intended, and for one key the claim on the key decides.
    fn is_compared_with(&self, call: &Self) -> bool {
        self.is_unkeyed() || call.key.is_none()
    }

    /// Whether a new call may name this one in `Idempotency-Force`.
    // A call with another key cannot be named: it does not refuse the new call, and once superseded it would no longer refuse
    // others.
    fn can_be_forced_by(&self, call: &Self) -> bool {
        self.is_compared_with(call) || self.key == call.key
    }
}

#[derive(Debug)]
struct KnownCall {
    call: Duplicate,
    state: State,
}

#[derive(Debug)]
enum State {
    AtWork {
        /// The doubt that this call repeats by force. It is restored if the call turns out not to be done.
        supersedes: Option<Box<(Duplicate, InDoubt)>>,
    },
    InDoubt(InDoubt),
}

/// The state of a call that has ended, but whose caller does not know how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InDoubt {
    pub(super) kind: InDoubtKind,
    pub(super) since: u32,
}

/// Why a caller does not know how its call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InDoubtKind {
    /// The outcome is unknown to the gateway, too.
    Unknown,
    /// The call succeeded, and its answer did not reach the caller.
    Undelivered,
    /// The outcome was unknown until a person resolved the call as done.
    Resolved,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion {
    NotDone,
    Succeeded,
    InDoubt(InDoubtKind),
}

/// The equal call that came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// It is at work, or its outcome is unknown.
    Open(Uuid),
    Succeeded(Uuid),
}

/// A call that another one repeats by force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Forced {
    pub(super) id: Uuid,
    /// The key hash of its `Idempotency-Key`.
    pub(super) key: Option<KeyedFingerprint>,
}

/// Why a call may not be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    /// An equal call came first.
    Duplicate(First),
    /// The table has no room for a further doubt, or this caller has used up its share of that room.
    Full,
    /// Under `block`: the table has no room for a further success, or this caller has used up its share of that room.
    FullOfSuccesses,
}

impl DuplicateDetector {
    /// An empty table. Both windows are in seconds; `max_successes` is a bound under `block` only.
    pub(super) fn new(mode: WithoutKey, window: u32, success_window: u32, max_successes: usize) -> Self {
        let (calls, began, succeeded, successes, held) = <_>::default();
        let doubts = 0;
        Self { calls, began, succeeded, max_successes, successes, held, doubts, mode, window, success_window }
    }

    /// The most memory that this many successes take under `block`, in bytes.
    pub(super) const fn max_bytes(max_successes: usize) -> usize {
        Recent::max_bytes(max_successes)
    }

    /// Whether the mode compares calls at all.
    pub(super) fn is_on(&self) -> bool {
        !matches!(self.mode, WithoutKey::Off | WithoutKey::RequireKey)
    }

    /// Registers a call that is to be sent as at work. Returns two calls, each `None` if there is none: the equal call that came
    /// first and does not refuse this one, and the call that this one repeats by force.
    ///
    /// `force` is the call that it asks to repeat. `is_alone`: no other caller is configured. Fails, and registers nothing, if
    /// an equal call refuses it, or if there is no room for the doubt or success that it may become.
    pub(super) fn begin(
        &mut self,
        call_hash: KeyedFingerprint,
        call: Duplicate,
        force: Option<Uuid>,
        is_alone: bool,
        now: u32,
    ) -> Result<(Option<First>, Option<Forced>), Rejection> {
        self.expire(now);
        let first = self.peek(call_hash, call, force, is_alone, now)?;
        let forced = force.and_then(|force| self.forced(call_hash, force, &call));
        let supersedes =
            forced.as_ref().and_then(|forced| self.take_forced(call_hash, forced, now)).map(Box::new);
        let replaces_unkeyed =
            call.key.is_some() && supersedes.as_ref().is_some_and(|doubt| doubt.0.is_unkeyed());
        let known =
            KnownCall { call: Duplicate { replaces_unkeyed, ..call }, state: State::AtWork { supersedes } };
        self.calls.entry(call_hash).or_default().push(known);
        Ok((first, forced))
    }

    /// Returns the equal call with the id `force`, if it has ended and `call` may repeat it by force; otherwise `None`.
    fn forced(&self, call_hash: KeyedFingerprint, force: Uuid, call: &Duplicate) -> Option<Forced> {
        let success =
            self.succeeded.get(&call_hash).filter(|success| call.key.is_none() && success.id == force);
        if success.is_some() {
            return Some(Forced { id: force, key: None });
        }
        let is_it = |known: &&KnownCall| known.call.id == force && matches!(known.state, State::InDoubt(_));
        let known = self.calls.get(&call_hash)?.iter().find(is_it)?;
        known.call.can_be_forced_by(call).then_some(Forced { id: force, key: known.call.key })
    }

    /// Returns what [`Self::begin`] would decide, and registers nothing. Does not call [`Self::expire`], so that entries whose
    /// window is over still take room.
    pub(super) fn peek(
        &self,
        call_hash: KeyedFingerprint,
        call: Duplicate,
        force: Option<Uuid>,
        is_alone: bool,
        now: u32,
    ) -> Result<Option<First>, Rejection> {
        let first = self.first(call_hash, call, force, now);
        let refuses = match first {
            None => false,
            Some(_) if self.mode == WithoutKey::Warn => false,
            // A success that is not held as a doubt: its caller has the answer, and may mean the same task a second time.
            Some(First::Succeeded(id)) if !self.holds(call_hash, id) => self.mode == WithoutKey::Block,
            Some(_) => true,
        };
        if let Some(first) = first.filter(|_| refuses) {
            return Err(Rejection::Duplicate(first));
        }
        // Room is asked for before the call is sent, although it needs some only if it ends in doubt: a doubt for which there is
        // none would be forgotten, and its repetition sent. Half for each caller, so that none has all others refused.
        let share = if is_alone { MAX_DOUBTS } else { MAX_DOUBTS / 2 };
        let is_full =
            self.doubts >= MAX_DOUBTS || self.held.get(&call.caller).is_some_and(|held| *held >= share);
        if is_full {
            Err(Rejection::Full)
        } else if call.key.is_none() && self.is_full_of_successes(call.caller, is_alone) {
            Err(Rejection::FullOfSuccesses)
        } else {
            Ok(first)
        }
    }

    /// Whether, under `block`, no further success of this caller could be remembered. A caller may hold half of all successes,
    /// or all if it is alone.
    fn is_full_of_successes(&self, caller: u32, is_alone: bool) -> bool {
        let share = if is_alone { self.max_successes } else { self.max_successes.div_ceil(2) };
        let holds = || self.successes.get(&caller).copied().unwrap_or_default();
        self.mode == WithoutKey::Block && (self.succeeded.len() >= self.max_successes || holds() >= share)
    }

    /// Returns the equal call that matters most: one that is at work or of unknown outcome, else one that is undelivered or
    /// resolved, else one that succeeded. A call that has ended and that the new call repeats by force is left out.
    fn first(
        &self,
        call_hash: KeyedFingerprint,
        call: Duplicate,
        force: Option<Uuid>,
        now: u32,
    ) -> Option<First> {
        let (mut open, mut undelivered) = (None, None);
        for known in self.calls.get(&call_hash).into_iter().flatten() {
            let is_forced = force == Some(known.call.id);
            match known.state {
                _ if !known.call.is_compared_with(&call) => {}
                // A call at work counts even if it is forced: it may still be done, and then both would be. It is returned
                // rather than a doubt, which could not be forced while this call is at work.
                State::AtWork { .. } => open = Some(known.call.id),
                State::InDoubt(doubt) if is_forced || is_expired(doubt.since, now, self.window) => {}
                State::InDoubt(InDoubt { kind: InDoubtKind::Unknown, .. }) => {
                    open.get_or_insert(known.call.id);
                }
                State::InDoubt(InDoubt {
                    kind: InDoubtKind::Undelivered | InDoubtKind::Resolved, ..
                }) => {
                    undelivered = Some(known.call.id);
                }
            }
        }
        let succeeded = || {
            // A call with a key is intended, whatever succeeded before.
            let success = self.succeeded.get(&call_hash).filter(|_| call.key.is_none())?;
            let counts = !is_expired(success.since, now, self.success_window) && force != Some(success.id);
            counts.then_some(success.id)
        };
        open.map(First::Open).or_else(|| undelivered.or_else(succeeded).map(First::Succeeded))
    }

    /// Whether a call is at work or in doubt.
    fn holds(&self, call_hash: KeyedFingerprint, id: Uuid) -> bool {
        self.calls.get(&call_hash).into_iter().flatten().any(|known| known.call.id == id)
    }

    /// Removes and returns the doubt that a new call repeats by force, and so supersedes. `None` if the forced call is a
    /// success, or a doubt whose window is over.
    fn take_forced(
        &mut self,
        call_hash: KeyedFingerprint,
        forced: &Forced,
        now: u32,
    ) -> Option<(Duplicate, InDoubt)> {
        let doubt = self.calls.get(&call_hash)?.iter().find_map(|known| match known.state {
            State::InDoubt(doubt) if known.call.id == forced.id => Some((known.call, doubt)),
            State::InDoubt(_) | State::AtWork { .. } => None,
        })?;
        self.forget(call_hash, forced.id);
        (!is_expired(doubt.1.since, now, self.window)).then_some(doubt)
    }

    /// Ends a call that is at work, and returns it. Returns `None`, and does nothing, if the call is not at work.
    pub(super) fn end(
        &mut self,
        call_hash: KeyedFingerprint,
        id: Uuid,
        completion: Completion,
        now: u32,
    ) -> Option<Duplicate> {
        let Entry::Occupied(mut calls) = self.calls.entry(call_hash) else { return None };
        let is_it = |known: &KnownCall| known.call.id == id && matches!(known.state, State::AtWork { .. });
        let position = calls.get().iter().position(is_it)?;
        let KnownCall { call, state } = calls.get_mut().swap_remove(position);
        if calls.get().is_empty() {
            calls.remove();
        }
        match (completion, state) {
            // The call was sent, so that it refuses equal calls itself from now on. A doubt that it repeated is not restored.
            (Completion::InDoubt(kind), _) => {
                self.put_in_doubt(call_hash, call, InDoubt { kind, since: now });
            }
            (Completion::Succeeded, _) => self.succeed(call_hash, call, now),
            // The repetition changed nothing, so the doubt is restored with its old time: a new one would prolong it with each
            // repetition in vain.
            (Completion::NotDone, State::AtWork { supersedes: Some(doubt) }) => {
                self.put_in_doubt(call_hash, doubt.0, doubt.1);
            }
            (Completion::NotDone, _) => {}
        }
        Some(call)
    }

    /// Registers a doubt, even beyond the bound. Does nothing if the call is known, or if the mode compares no calls.
    pub(super) fn put_in_doubt(&mut self, call_hash: KeyedFingerprint, call: Duplicate, doubt: InDoubt) {
        // A start may register a call twice: from the list of the unresolved, and from a resolution in the trail.
        if !self.is_on() || self.holds(call_hash, call.id) {
            return;
        }
        self.calls.entry(call_hash).or_default().push(KnownCall { call, state: State::InDoubt(doubt) });
        self.began.insert((doubt.since, call_hash));
        self.doubts += 1;
        *self.held.entry(call.caller).or_default() += 1;
    }

    /// Registers a success whose caller has the answer, if the call has no key.
    pub(super) fn succeed(&mut self, call_hash: KeyedFingerprint, call: Duplicate, since: u32) {
        if call.key.is_none() && self.is_on() {
            // Counted by caller under `block` only: other modes do not use the count, and each call would cost a look-up.
            let call = recent::PastCall { call_hash, id: call.id, since, caller: call.caller };
            if self.succeeded.push(call) && self.mode == WithoutKey::Block {
                *self.successes.entry(call.caller).or_default() += 1;
            }
        }
    }

    /// Turns an undelivered success into one whose caller has the answer, and returns its call. Returns `None`, and changes
    /// nothing, if the call is not undelivered.
    pub(super) fn delivered(&mut self, call_hash: KeyedFingerprint, id: Uuid, now: u32) -> Option<Duplicate> {
        let is_it = |known: &KnownCall| {
            let undelivered =
                matches!(known.state, State::InDoubt(InDoubt { kind: InDoubtKind::Undelivered, .. }));
            known.call.id == id && undelivered
        };
        self.calls.get(&call_hash)?.iter().find(|known| is_it(known))?;
        let call = self.forget(call_hash, id)?;
        self.succeed(call_hash, call, now);
        Some(call)
    }

    /// Applies what a person found about a call of unknown outcome. If it was done, it refuses equal calls for a whole window
    /// from now on; if not, it refuses none.
    pub(super) fn resolve(&mut self, call_hash: KeyedFingerprint, call: Duplicate, is_done: bool, now: u32) {
        self.forget(call_hash, call.id);
        let doubt = InDoubt { kind: InDoubtKind::Resolved, since: now };
        for known in self.calls.get_mut(&call_hash).into_iter().flatten() {
            if let State::AtWork { supersedes } = &mut known.state
                && supersedes.as_ref().is_some_and(|superseded| superseded.0.id == call.id)
            {
                // A call that repeats it by force is under way and supersedes it. The result counts if that call is not done.
                *supersedes = is_done.then(|| Box::new((call, doubt)));
                return;
            }
        }
        if is_done {
            self.put_in_doubt(call_hash, call, doubt);
        }
    }

    /// Removes a doubt and returns its call. Its entry in `began` stays until it expires.
    fn forget(&mut self, call_hash: KeyedFingerprint, id: Uuid) -> Option<Duplicate> {
        let calls = self.calls.get_mut(&call_hash)?;
        let is_it = |known: &KnownCall| known.call.id == id && matches!(known.state, State::InDoubt(_));
        let position = calls.iter().position(is_it)?;
        let KnownCall { call, .. } = calls.swap_remove(position);
        if calls.is_empty() {
            self.calls.remove(&call_hash);
        }
        self.release(call.caller);
        Some(call)
    }

    /// Releases the room of one doubt.
    fn release(&mut self, caller: u32) {
        self.doubts -= 1;
        if let Some(held) = self.held.get_mut(&caller) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&caller);
            }
        }
    }

    /// Removes doubts and successes whose windows are over, so that there is room for new calls. Except under `block`, also
    /// removes the oldest successes beyond [`MAX_SUCCEEDED`].
    pub(super) fn expire(&mut self, now: u32) {
        let blocks = self.mode == WithoutKey::Block;
        let max = if blocks { usize::MAX } else { MAX_SUCCEEDED };
        let Self { succeeded, success_window, successes, .. } = self;
        while succeeded.len() > max
            || succeeded.oldest().is_some_and(|call| is_expired(call.since, now, *success_window))
        {
            let forgotten = succeeded.forget_oldest().filter(|_| blocks);
            if let Some(Entry::Occupied(mut held)) = forgotten.map(|call| successes.entry(call.caller)) {
                *held.get_mut() -= 1;
                if *held.get() == 0 {
                    held.remove();
                }
            }
        }
        let window = self.window;
        while let Some((since, call_hash)) = self.began.first().copied()
            && is_expired(since, now, window)
        {
            self.began.pop_first();
            self.expire_mark(call_hash, now);
        }
    }

    /// Removes the doubts of a call hash whose window is over. Calls at work never expire.
    fn expire_mark(&mut self, call_hash: KeyedFingerprint, now: u32) {
        let Some(calls) = self.calls.get_mut(&call_hash) else { return };
        let mut gone = SmallVec::<[u32; 1]>::new();
        calls.retain(|known| {
            let is_gone =
                matches!(known.state, State::InDoubt(doubt) if is_expired(doubt.since, now, self.window));
            if is_gone {
                gone.push(known.call.caller);
            }
            !is_gone
        });
        if calls.is_empty() {
            self.calls.remove(&call_hash);
        }
        gone.into_iter().for_each(|caller| self.release(caller));
    }
}

// Saturating: a time in the future, as a clock that went back leaves it in the trail, counts as new.
fn is_expired(since: u32, now: u32, window: u32) -> bool {
    now.saturating_sub(since) > window
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL_HASH: KeyedFingerprint = [7; 16];
    const WINDOW: u32 = 600;
    const SUCCESS_WINDOW: u32 = 60;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Each call with a key has one of its own.
    fn call(number: u128, is_keyed: bool) -> Duplicate {
        let key = is_keyed.then(|| number.to_be_bytes());
        Duplicate { id: id(number), key, caller: 1, replaces_unkeyed: false }
    }

    fn forced(number: u128) -> Option<Forced> {
        Some(Forced { id: id(number), key: None })
    }

    fn detector(mode: WithoutKey) -> DuplicateDetector {
        DuplicateDetector::new(mode, WINDOW, SUCCESS_WINDOW, 5 * MAX_SUCCEEDED)
    }

    fn begin(detector: &mut DuplicateDetector, number: u128, now: u32) -> Result<Option<First>, Rejection> {
        detector.begin(CALL_HASH, call(number, false), None, false, now).map(|(first, _)| first)
    }

    const UNKNOWN: Completion = Completion::InDoubt(InDoubtKind::Unknown);
    const UNDELIVERED: Completion = Completion::InDoubt(InDoubtKind::Undelivered);

    /// What is decided about a second call after a first one that ended as `completion` says, or is at work (`None`). The
    /// booleans say which of the two has a key.
    fn second(
        mode: WithoutKey,
        [first, second]: [bool; 2],
        completion: Option<Completion>,
    ) -> Result<Option<First>, Rejection> {
        let mut detector = detector(mode);
        assert_eq!(detector.begin(CALL_HASH, call(1, first), None, false, 0), Ok((None, None)));
        if let Some(completion) = completion {
            detector.end(CALL_HASH, id(1), completion, 0);
        }
        // The control: a refusal below is due to the equal call hash, not to a table that refuses everything.
        let other = detector.begin([8; 16], call(2, second), None, false, 0);
        assert_eq!(other, Ok((None, None)), "another body");
        detector.begin(CALL_HASH, call(3, second), None, false, SUCCESS_WINDOW).map(|(first, _)| first)
    }

    #[test]
    fn each_mode_handles_duplicates_as_documented() {
        let refused = |first| Err(Rejection::Duplicate(first));
        let (open, done) = (First::Open(id(1)), First::Succeeded(id(1)));
        for (keys, is_seen) in
            [([false, false], true), ([true, false], true), ([false, true], true), ([true, true], false)]
        {
            for (mode, refuses) in
                [(WithoutKey::Guard, true), (WithoutKey::Block, true), (WithoutKey::Warn, false)]
            {
                for (completion, first) in [(None, open), (Some(UNKNOWN), open), (Some(UNDELIVERED), done)] {
                    let expected = match (is_seen, refuses) {
                        (false, _) => Ok(None),
                        (true, false) => Ok(Some(first)),
                        (true, true) => refused(first),
                    };
                    assert_eq!(second(mode, keys, completion), expected, "{mode:?} {keys:?} {completion:?}");
                }
                let expected = match (keys, mode) {
                    ([false, false], WithoutKey::Block) => refused(done),
                    ([false, false], _) => Ok(Some(done)),
                    _ => Ok(None),
                };
                assert_eq!(second(mode, keys, Some(Completion::Succeeded)), expected, "{mode:?} {keys:?}");
                assert_eq!(second(mode, keys, Some(Completion::NotDone)), Ok(None), "{mode:?} {keys:?}");
            }
        }
    }

    #[test]
    fn forced_call_replaces_an_unresolved_call_once() {
        for (kind, first) in [
            (UNKNOWN, First::Open as fn(Uuid) -> First),
            (UNDELIVERED, First::Succeeded as fn(Uuid) -> First),
        ] {
            let mut detector = detector(WithoutKey::Guard);
            begin(&mut detector, 1, 0).unwrap();
            detector.end(CALL_HASH, id(1), kind, 0);
            let force = |detector: &mut DuplicateDetector, number, force| {
                detector.begin(CALL_HASH, call(number, false), Some(id(force)), false, 1)
            };
            let refused = |first| Err(Rejection::Duplicate(first));
            assert_eq!(force(&mut detector, 2, 9), refused(first(id(1))), "another id");
            assert_eq!(force(&mut detector, 2, 1), Ok((None, forced(1))));
            assert_eq!(force(&mut detector, 3, 1), refused(First::Open(id(2))), "at work");
            detector.end(CALL_HASH, id(2), Completion::NotDone, 1);
            assert_eq!(force(&mut detector, 4, 9), refused(first(id(1))), "the doubt is back");
            assert_eq!(force(&mut detector, 5, 1), Ok((None, forced(1))));
            detector.end(CALL_HASH, id(5), UNKNOWN, 1);
            assert_eq!(force(&mut detector, 6, 1), refused(First::Open(id(5))), "forced once");
            assert_eq!(detector.doubts, 1);
        }
    }

    #[test]
    fn keyed_forced_call_in_flight_rejects_calls_of_another_key() {
        for (first_has_key, expected) in
            [(false, Err(Rejection::Duplicate(First::Open(id(2))))), (true, Ok((None, None)))]
        {
            let mut detector = detector(WithoutKey::Guard);
            detector.begin(CALL_HASH, call(1, first_has_key), None, false, 0).unwrap();
            detector.end(CALL_HASH, id(1), UNKNOWN, 0);
            detector.begin(CALL_HASH, call(2, true), Some(id(1)), false, 1).unwrap();
            assert_eq!(detector.begin(CALL_HASH, call(3, true), None, false, 1), expected, "{first_has_key}");
        }
    }

    #[test]
    fn unresolved_keyed_forced_call_replaces_its_unkeyed_original() {
        let mut detector = detector(WithoutKey::Guard);
        begin(&mut detector, 1, 0).unwrap();
        detector.end(CALL_HASH, id(1), UNKNOWN, 0);
        let keyed = |detector: &mut DuplicateDetector, number, force: Option<u128>| {
            detector.begin(CALL_HASH, call(number, true), force.map(id), false, 1).map(|(first, _)| first)
        };
        let refused = |number| Err(Rejection::Duplicate(First::Open(id(number))));
        keyed(&mut detector, 2, Some(1)).unwrap();
        detector.end(CALL_HASH, id(2), UNKNOWN, 1);
        assert_eq!(keyed(&mut detector, 3, None), refused(2));
        assert_eq!(keyed(&mut detector, 3, Some(1)), refused(2), "the first one is superseded");
        // The repetition refuses equal calls as the first call did. It may itself be repeated by force, under a third key.
        keyed(&mut detector, 4, Some(2)).unwrap();
        detector.end(CALL_HASH, id(4), UNKNOWN, 1);
        assert_eq!(keyed(&mut detector, 5, None), refused(4));
        keyed(&mut detector, 6, Some(4)).unwrap();
        detector.end(CALL_HASH, id(6), Completion::Succeeded, 1);
        assert_eq!(keyed(&mut detector, 7, None), Ok(None), "nothing is in doubt");
    }

    #[test]
    fn call_of_another_key_cannot_be_forced() {
        let mut detector = detector(WithoutKey::Guard);
        detector.begin(CALL_HASH, call(1, true), None, false, 0).unwrap();
        detector.end(CALL_HASH, id(1), UNKNOWN, 0);
        assert_eq!(detector.begin(CALL_HASH, call(2, true), Some(id(1)), false, 0), Ok((None, None)));
        detector.end(CALL_HASH, id(2), Completion::Succeeded, 0);
        // If the first call counted as repeated, it would no longer refuse calls without a key.
        assert_eq!(begin(&mut detector, 3, 0), Err(Rejection::Duplicate(First::Open(id(1)))), "as before");
        let mut detector = self::detector(WithoutKey::Block);
        begin(&mut detector, 1, 0).unwrap();
        detector.end(CALL_HASH, id(1), Completion::Succeeded, 0);
        assert_eq!(
            detector.begin(CALL_HASH, call(2, true), Some(id(1)), false, 0),
            Ok((None, None)),
            "no refusal"
        );
    }

    #[test]
    fn call_in_flight_is_not_forced_and_failed_forcing_uses_no_space() {
        let mut detector = detector(WithoutKey::Warn);
        begin(&mut detector, 1, 0).unwrap();
        let forced = |detector: &mut DuplicateDetector, number| {
            detector.begin(CALL_HASH, call(number, false), Some(id(1)), false, 0).unwrap().1
        };
        assert_eq!(forced(&mut detector, 2), None);
        detector.end(CALL_HASH, id(2), Completion::NotDone, 0);
        detector.end(CALL_HASH, id(1), UNKNOWN, 0);
        // Two doubts of one second that are repeated by turns: a list of their times grew with each attempt.
        let other = [8; 16];
        detector.begin(other, call(100, false), None, false, 0).unwrap();
        detector.end(other, id(100), UNKNOWN, 0);
        for number in 3..9 {
            assert_eq!(forced(&mut detector, number), self::forced(1));
            detector.end(CALL_HASH, id(number), Completion::NotDone, 0);
            detector.begin(other, call(100 + number, false), Some(id(100)), false, 0).unwrap();
            detector.end(other, id(100 + number), Completion::NotDone, 0);
        }
        assert_eq!((detector.doubts, detector.began.len()), (2, 2));
    }

    #[test]
    fn restored_unresolved_calls_expire_in_order_of_time() {
        let mut detector = detector(WithoutKey::Guard);
        for (number, since) in [(1, 50), (2, 0)] {
            let doubt = InDoubt { kind: InDoubtKind::Resolved, since };
            detector.put_in_doubt([number; 16], call(number.into(), false), doubt);
        }
        // The older doubt came second. Behind a younger one in a queue it would have stayed for too long.
        begin(&mut detector, 3, WINDOW + 1).unwrap();
        assert_eq!(detector.doubts, 1);
    }

    #[test]
    fn block_mode_sends_a_forced_call_after_a_success() {
        let mut detector = detector(WithoutKey::Block);
        begin(&mut detector, 1, 0).unwrap();
        detector.end(CALL_HASH, id(1), Completion::Succeeded, 0);
        assert_eq!(detector.begin(CALL_HASH, call(2, false), Some(id(1)), false, 0), Ok((None, forced(1))));
    }

    #[test]
    fn keyed_call_that_forces_its_own_unresolved_call_supersedes_it() {
        let mut detector = detector(WithoutKey::Guard);
        detector.begin(CALL_HASH, call(1, true), None, false, 0).unwrap();
        detector.end(CALL_HASH, id(1), UNKNOWN, 0);
        let key = call(1, true).key;
        let again = detector.begin(CALL_HASH, Duplicate { key, ..call(2, true) }, Some(id(1)), false, 0);
        assert_eq!(again, Ok((None, Some(Forced { id: id(1), key }))));
        detector.end(CALL_HASH, id(2), Completion::Succeeded, 0);
        assert_eq!(begin(&mut detector, 3, 0), Ok(None));
    }

    #[test]
    fn undelivered_success_is_reported_once() {
        let mut detector = detector(WithoutKey::Guard);
        begin(&mut detector, 1, 0).unwrap();
        detector.end(CALL_HASH, id(1), UNDELIVERED, 0);
        assert!(begin(&mut detector, 2, WINDOW).is_err());
        assert_eq!(detector.delivered(CALL_HASH, id(1), 10), Some(call(1, false)));
        assert_eq!(detector.delivered(CALL_HASH, id(1), 10), None);
        assert_eq!(begin(&mut detector, 3, 10), Ok(Some(First::Succeeded(id(1)))), "flagged");
    }

    #[test]
    fn unresolved_calls_expire_with_the_window_but_calls_in_flight_stay() {
        let mut detector = detector(WithoutKey::Guard);
        begin(&mut detector, 1, 0).unwrap();
        detector.end(CALL_HASH, id(1), UNKNOWN, 0);
        assert!(begin(&mut detector, 2, WINDOW).is_err());
        assert_eq!(begin(&mut detector, 2, WINDOW + 1), Ok(None));
        // An exchange has a deadline of its own. Until it ends the task may still be done, however long that takes.
        assert!(begin(&mut detector, 3, 10 * WINDOW).is_err());
        detector.end(CALL_HASH, id(2), Completion::NotDone, 10 * WINDOW);
        assert!(detector.calls.is_empty() && detector.held.is_empty());
        assert_eq!(detector.doubts, 0);
    }

    #[test]
    fn full_duplicate_table_rejects_and_each_caller_gets_at_most_half() {
        let mut detector = detector(WithoutKey::Guard);
        let call_hash = |number: usize| (number as u128).to_be_bytes();
        let doubt = InDoubt { kind: InDoubtKind::Unknown, since: 0 };
        let of = |caller, number: usize| Duplicate { caller, ..call(number as u128, false) };
        for number in 0..MAX_DOUBTS / 2 {
            detector.put_in_doubt(call_hash(number), of(1, number), doubt);
        }
        assert_eq!(detector.peek(CALL_HASH, of(1, 0), None, false, 0), Err(Rejection::Full));
        assert_eq!(detector.peek(CALL_HASH, of(1, 0), None, true, 0), Ok(None), "alone");
        assert_eq!(detector.peek(CALL_HASH, of(2, 0), None, false, 0), Ok(None));
        for number in MAX_DOUBTS / 2..MAX_DOUBTS {
            detector.put_in_doubt(call_hash(number), of(3 + number as u32, number), doubt);
        }
        assert_eq!(detector.peek(CALL_HASH, of(2, 0), None, true, 0), Err(Rejection::Full));
        assert_eq!(detector.begin(CALL_HASH, of(2, 0), None, true, WINDOW + 1), Ok((None, None)));
        assert_eq!(detector.doubts, 0);
    }

    #[test]
    fn eviction_drops_only_successes_and_none_in_block_mode() {
        let call_hash = |number: usize| ((number as u128) << 32).to_be_bytes();
        for (mode, is_kept) in [(WithoutKey::Guard, false), (WithoutKey::Block, true)] {
            let mut detector = detector(mode);
            detector.put_in_doubt(
                CALL_HASH,
                call(0, false),
                InDoubt { kind: InDoubtKind::Unknown, since: 0 },
            );
            for number in 1..=2 * MAX_SUCCEEDED {
                detector.begin(call_hash(number), call(number as u128, false), None, false, 0).unwrap();
                detector.end(call_hash(number), id(number as u128), Completion::Succeeded, 0);
            }
            let first = detector.begin(call_hash(1), call(9, false), None, false, SUCCESS_WINDOW);
            assert_eq!(first.is_err(), is_kept, "{mode:?}");
            assert!(begin(&mut detector, 9, 0).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn block_mode_rejects_new_calls_instead_of_evicting_successes() {
        let call_hash = |number: u128| (number << 32).to_be_bytes();
        for (mode, is_bounded) in [(WithoutKey::Guard, false), (WithoutKey::Block, true)] {
            let mut detector = DuplicateDetector::new(mode, WINDOW, SUCCESS_WINDOW, 4);
            let of = |caller, number| Duplicate { caller, ..call(number, false) };
            let mut send = |caller, number, now| {
                let begun = detector.begin(call_hash(number), of(caller, number), None, false, now);
                if begun.is_ok() {
                    detector.end(call_hash(number), id(number), Completion::Succeeded, now);
                }
                begun.map(drop)
            };
            let full = if is_bounded { Err(Rejection::FullOfSuccesses) } else { Ok(()) };
            assert_eq!([send(1, 1, 0), send(1, 2, 1)], [Ok(()); 2]);
            assert_eq!(send(1, 3, 1), full, "{mode:?}: half of all is one caller's");
            assert_eq!([send(2, 4, 1), send(3, 5, 1)], [Ok(()); 2], "{mode:?}");
            assert_eq!(send(4, 6, 1), full, "{mode:?}: all");
            let equal = detector.peek(call_hash(1), of(4, 9), None, false, SUCCESS_WINDOW);
            assert_eq!(equal.is_err(), is_bounded, "{mode:?}: none is forgotten: {equal:?}");
            assert_eq!(
                detector.peek(call_hash(9), call(9, true), None, false, 1),
                Ok(None),
                "a key needs no room"
            );
            assert_eq!(
                detector.begin(call_hash(7), of(1, 7), None, false, SUCCESS_WINDOW + 1),
                Ok((None, None))
            );
            let left = if is_bounded { 2 } else { 0 };
            assert_eq!(
                detector.successes.values().sum::<usize>(),
                left + usize::from(is_bounded),
                "{mode:?}"
            );
        }
    }

    #[test]
    fn older_success_from_the_trail_does_not_shorten_the_window() {
        let mut detector = detector(WithoutKey::Block);
        begin(&mut detector, 2, 50).unwrap();
        detector.end(CALL_HASH, id(2), Completion::Succeeded, 50);
        // Read back from the trail while younger calls are served already.
        detector.succeed(CALL_HASH, call(1, false), 0);
        assert!(begin(&mut detector, 3, 50 + SUCCESS_WINDOW).is_err());
        assert_eq!(begin(&mut detector, 3, 51 + SUCCESS_WINDOW), Ok(None));
    }
}
