//! Earlier calls: restores them from the trail at the start, and applies what a person resolved.

use std::sync::{MutexGuard, PoisonError};

use uuid::Uuid;

use super::claims::{Claims, Wanted};
use super::duplicates::{Doubt, DoubtKind, Duplicate};
use super::{Idempotency, now};
use crate::audit::unresolved::{CallState, Resolution, UnresolvedCall};
use crate::keyed_hash::{Hash, Mark, parse_hex};

/// What changes claims that are not known yet.
#[derive(Default)]
pub(super) struct Meanwhile {
    pub(super) resolved: Vec<(UnresolvedCall, Resolution)>,
    /// Keys and calls of unknown outcome, and whether another call stands for them.
    pub(super) superseded: Vec<(Mark, Uuid, bool)>,
}

impl Idempotency {
    /// Remembers a doubt that the trail tells of.
    pub(super) fn restore(&self, call: &UnresolvedCall, since: u32) {
        let kind = match call.state {
            CallState::AtWork | CallState::Unknown if call.superseded => return,
            CallState::AtWork | CallState::Unknown => DoubtKind::Unknown,
            CallState::Undelivered => DoubtKind::Undelivered,
            CallState::Done => DoubtKind::Resolved,
        };
        if let Some((mark, call)) = self.identify(call) {
            self.duplicates().doubt(mark, call, Doubt { kind, since });
        }
    }

    /// Remembers a success that the trail tells of.
    pub(super) fn restore_success(&self, call: &UnresolvedCall, since: u32) {
        if let Some((mark, call)) = self.identify(call) {
            self.duplicates().succeed(mark, call, since);
        }
    }

    /// Takes into account what a person found about a call of unknown outcome; its event is committed.
    pub fn resolve(&self, call: &UnresolvedCall, result: Resolution) {
        let mut meanwhile = self.meanwhile();
        if let Some(meanwhile) = &mut *meanwhile {
            meanwhile.resolved.push((call.clone(), result));
        }
        self.resolve_claim(&mut self.claims(), call, result, now());
        self.resolve_duplicate(call, result, now());
        drop(meanwhile);
        // The list has changed by now: a call that this one repeated by force guards again.
        let first = call.forced.and_then(|first| self.audit.unresolved().get(first).cloned());
        if let Some(first) = first.filter(|_| result == Resolution::NotDone) {
            self.restore(&first, now());
            if let Some(key) = first.key.as_ref().and_then(|key| parse_hex(key)) {
                self.set_superseded(key, first.id, first.superseded);
            }
        }
    }

    /// Says whether another call stands for one of unknown outcome with a key.
    pub(super) fn set_superseded(&self, key: Mark, id: Uuid, superseded: bool) {
        if let Some(meanwhile) = &mut *self.meanwhile() {
            meanwhile.superseded.push((key, id, superseded));
        }
        self.claims().set_superseded(key, id, superseded);
    }

    pub(super) fn meanwhile(&self) -> MutexGuard<'_, Option<Meanwhile>> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the key of a resolved call stands for, if it has one.
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
            (Resolution::Done, None) => {} // no intent with a key lacks its print
            (Resolution::NotDone, _) => claims.resolve_not_done(key, call.id, now),
        }
    }

    pub(super) fn resolve_duplicate(&self, call: &UnresolvedCall, result: Resolution, now: u32) {
        if let Some((mark, duplicate)) = self.identify(call) {
            self.duplicates().resolve(mark, duplicate, result == Resolution::Done, now);
        }
    }

    pub(super) fn identify(&self, call: &UnresolvedCall) -> Option<(Mark, Duplicate)> {
        let caller = call.caller.as_ref()?;
        let key = call.key.as_ref().and_then(|key| parse_hex(key));
        let (mark, duplicate) = self.compared_of(caller, self.print_of(call)?, call.id, key);
        let stands_for_unkeyed = key.is_some() && self.repeats_unkeyed(call);
        Some((mark, Duplicate { stands_for_unkeyed, ..duplicate }))
    }

    /// Whether a call repeats by force one without a key, or one that does so. What is not on the list may have been such a call.
    fn repeats_unkeyed(&self, call: &UnresolvedCall) -> bool {
        let list = self.audit.unresolved();
        let mut forced = call.forced;
        while let Some(id) = forced {
            match list.get(id) {
                // Ids are in the order of the wall clock, which may have gone back. Where they go up, the chain is not
                // followed, so that it ends whatever stands in the list.
                Some(first) if first.key.is_some() && first.forced.is_none_or(|earlier| earlier < id) => {
                    forced = first.forced;
                }
                _ => return true,
            }
        }
        false
    }

    /// The print of an intent. Intents without a key had none in earlier versions.
    pub(super) fn print_of(&self, call: &UnresolvedCall) -> Option<Mark> {
        if let Some(print) = &call.print {
            return parse_hex(print);
        }
        let digest: Hash = parse_hex(call.digest.as_ref()?)?;
        let (operator, route) = (call.operator.as_ref()?, call.route.as_ref()?);
        Some(self.marks.mark(&[b"print", &digest, operator.as_bytes(), route.as_bytes()]))
    }
}
