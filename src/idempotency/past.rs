//! Restores earlier calls from the trail at a start, and applies the resolution of a call by a person.
//!
//! A call is *superseded* if a later one has repeated it by force: new calls are then compared with the later one instead.

use std::sync::{MutexGuard, PoisonError};

use uuid::Uuid;

use super::claims::{Claims, Wanted};
use super::duplicates::{Duplicate, InDoubt, InDoubtKind};
use super::{Idempotency, now};
use crate::audit::unresolved_calls::{CallState, Resolution, UnresolvedCall};
use crate::keyed_hash::{Hash, KeyedFingerprint, parse_hex};

/// Changes of claims that were made during the rebuild. The rebuild builds a new table of claims, and at its end applies these
/// changes to the new table.
#[derive(Default)]
pub(super) struct Meanwhile {
    pub(super) resolved: Vec<(UnresolvedCall, Resolution)>,
    /// Calls of unknown outcome, by key and id, and whether another call supersedes each of them.
    pub(super) superseded: Vec<(KeyedFingerprint, Uuid, bool)>,
}

impl Idempotency {
    /// Registers a call of the unresolved list as a doubt that began at `since`, in seconds since 1970. Does nothing for a
    /// superseded call of unknown outcome.
    pub(super) fn restore(&self, call: &UnresolvedCall, since: u32) {
        let kind = match call.state {
            // The later call that supersedes it is a doubt as well. Of two doubts neither could be forced: the other one would
            // refuse it.
            CallState::AtWork | CallState::Unknown if call.superseded => return,
            CallState::AtWork | CallState::Unknown => InDoubtKind::Unknown,
            CallState::Undelivered => InDoubtKind::Undelivered,
            CallState::Done => InDoubtKind::Resolved,
        };
        if let Some((call_hash, call)) = self.identify(call) {
            self.duplicates().put_in_doubt(call_hash, call, InDoubt { kind, since });
        }
    }

    /// Registers a success that the rebuild has read, if the call has no key. `since` is in seconds since 1970.
    pub(super) fn restore_success(&self, call: &UnresolvedCall, since: u32) {
        if let Some((call_hash, call)) = self.identify(call) {
            self.duplicates().succeed(call_hash, call, since);
        }
    }

    /// Applies what a person found about a call of unknown outcome. Before this, the event of the resolution must be committed
    /// and the unresolved list be updated.
    pub fn resolve(&self, call: &UnresolvedCall, result: Resolution) {
        // Locked until both tables have changed, so that the end of the rebuild comes before all of this or after it.
        let mut meanwhile = self.meanwhile();
        if let Some(meanwhile) = &mut *meanwhile {
            meanwhile.resolved.push((call.clone(), result));
        }
        self.resolve_claim(&mut self.claims(), call, result, now());
        self.resolve_duplicate(call, result, now());
        drop(meanwhile);
        // If this call was not done, it no longer supersedes the call that it repeated by force, which refuses equal calls
        // again.
        let first = call.forced.and_then(|first| self.audit.unresolved().get(first).cloned());
        if let Some(first) = first.filter(|_| result == Resolution::NotDone) {
            self.restore(&first, now());
            if let Some(key) = first.key.as_ref().and_then(|key| parse_hex(key)) {
                self.set_superseded(key, first.id, first.superseded);
            }
        }
    }

    /// Sets whether another call supersedes the call `id`, which has this key and an unknown outcome.
    pub(super) fn set_superseded(&self, key: KeyedFingerprint, id: Uuid, superseded: bool) {
        if let Some(meanwhile) = &mut *self.meanwhile() {
            meanwhile.superseded.push((key, id, superseded));
        }
        self.claims().set_superseded(key, id, superseded);
    }

    /// The changes that the rebuild has still to apply; `None` once it is over.
    // Locked before `claims`, `duplicates` and the list of the unresolved, never after them.
    pub(super) fn meanwhile(&self) -> MutexGuard<'_, Option<Meanwhile>> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies a resolution to the key of its call, if it has one. `claims` is a parameter, since the rebuild has a table of its
    /// own.
    pub(super) fn resolve_claim(
        &self,
        claims: &mut Claims,
        call: &UnresolvedCall,
        result: Resolution,
        now: u32,
    ) {
        let Some(key) = call.key.as_ref().and_then(|key| parse_hex(key)) else { return };
        match (result, call.print.as_ref().and_then(|print| parse_hex(print))) {
            (Resolution::Done, Some(print)) => {
                let caller = self.hash_of(call.caller.as_deref().unwrap_or_default());
                let wanted = Wanted { key, print, caller, share: usize::MAX, force: None };
                claims.resolve_done(wanted, call.id, now);
            }
            // Every intent with a key has a fingerprint. Without one the key could not be compared.
            (Resolution::Done, None) => {}
            (Resolution::NotDone, _) => claims.resolve_not_done(key, call.id, now),
        }
    }

    /// Applies a resolution to the table of equal calls.
    pub(super) fn resolve_duplicate(&self, call: &UnresolvedCall, result: Resolution, now: u32) {
        if let Some((call_hash, duplicate)) = self.identify(call) {
            self.duplicates().resolve(call_hash, duplicate, result == Resolution::Done, now);
        }
    }

    /// Returns the call hash of a call of the trail and its entry for the table of equal calls; `None` if the trail has no caller
    /// or no fingerprint of it.
    pub(super) fn identify(&self, call: &UnresolvedCall) -> Option<(KeyedFingerprint, Duplicate)> {
        let caller = call.caller.as_ref()?;
        let key = call.key.as_ref().and_then(|key| parse_hex(key));
        let (call_hash, duplicate) = self.compared_of(caller, self.print_of(call)?, call.id, key);
        let replaces_unkeyed = key.is_some() && self.repeats_unkeyed(call);
        Some((call_hash, Duplicate { replaces_unkeyed, ..duplicate }))
    }

    /// Whether a call repeats by force a call without a key, directly or through a chain of calls with keys.
    // A call that is not on the list any more may have been without a key. It counts as such: a refusal too many is the smaller
    // harm.
    fn repeats_unkeyed(&self, call: &UnresolvedCall) -> bool {
        let list = self.audit.unresolved();
        let mut forced = call.forced;
        while let Some(id) = forced {
            match list.get(id) {
                // Ids follow the wall clock, which may have gone back. Where they go up, the chain is not followed further, so
                // that this loop ends even if the calls of the list name each other in a circle.
                Some(first) if first.key.is_some() && first.forced.is_none_or(|earlier| earlier < id) => {
                    forced = first.forced;
                }
                _ => return true,
            }
        }
        false
    }

    /// Returns the fingerprint of a call of the trail; `None` if its record has none and none can be computed from it.
    pub(super) fn print_of(&self, call: &UnresolvedCall) -> Option<KeyedFingerprint> {
        // In trails of earlier versions intents without a key have none. There it is computed from their other members.
        if let Some(print) = &call.print {
            return parse_hex(print);
        }
        let digest: Hash = parse_hex(call.digest.as_ref()?)?;
        let (operator, route) = (call.operator.as_ref()?, call.route.as_ref()?);
        Some(self.hash_keys.fingerprint(&[b"print", &digest, operator.as_bytes(), route.as_bytes()]))
    }
}
